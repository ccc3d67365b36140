"""Executors: the driver's side of the workers. The interface, and the table by backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from evomerge.proposal import Evaluation, Job, Telemetry, WorkUnit

Done = tuple[Job, Evaluation, Telemetry]


class Evaluator(Protocol):
    """The worker's side, synchronous."""

    def evaluate(self, unit: WorkUnit) -> list[tuple[Evaluation, Telemetry]]:
        """One result per job, in order; never raises for a bad candidate."""
        ...


MakeEvaluator = Callable[[], Evaluator]
"""Called once in every worker process; must be picklable."""


class Executor(Protocol):
    """Runs work units somewhere."""

    def submit(self, unit: WorkUnit) -> None:
        """Queue a unit; returns at once."""
        ...

    def wait(self, seconds: float) -> list[Done]:
        """Whatever finished within `seconds`, in no particular order."""
        ...

    def close(self) -> None:
        """Stop the workers; units that are not done are dropped."""
        ...
