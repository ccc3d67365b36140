"""The inline executor: evaluates in the driver's own process. For tests, notebooks and debugging."""

from __future__ import annotations

from collections import deque

from evomerge.proposal import WorkUnit
from evomerge.workers import Done, Evaluator, MakeEvaluator


class InlineExecutor:
    """One unit per `wait`; nothing protects the driver from a candidate that hangs."""

    def __init__(self, make: MakeEvaluator) -> None:
        """The evaluator is made at the first unit."""
        self._make = make
        self._evaluator: Evaluator | None = None
        self._queue: deque[WorkUnit] = deque()

    def submit(self, unit: WorkUnit) -> None:
        """Queue a unit."""
        self._queue.append(unit)

    def wait(self, seconds: float) -> list[Done]:
        """Evaluate the oldest unit, however long it takes."""
        if not self._queue:
            return []
        if self._evaluator is None:
            self._evaluator = self._make()
        unit = self._queue.popleft()
        results = self._evaluator.evaluate(unit)
        return [(job, e, t) for job, (e, t) in zip(unit.jobs, results, strict=True)]

    def close(self) -> None:
        """Drop what is queued."""
        self._queue.clear()
