"""What supervised executors share: a queued unit with its attempts, and its failure as a recorded result."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from evomerge.proposal import Evaluation, Telemetry, WorkUnit
from evomerge.workers import Done

ATTEMPTS = 3
"""A unit whose worker died is tried this often in all."""


@dataclass
class Task:
    """A unit, and how often it was handed out."""

    unit: WorkUnit
    attempts: int = 0


def give_up(queue: deque[Task], worker: str, task: Task, status: str, reason: str) -> list[Done]:
    """The failure of a unit's only job; the jobs of a larger unit are queued once more, each alone.

    So one that brings its worker down takes no others with it.
    """
    jobs = task.unit.jobs
    if len(jobs) > 1:
        queue.extendleft(Task(WorkUnit(task.unit.id, (job,)), task.attempts) for job in reversed(jobs))
        return []
    telemetry = Telemetry(worker=worker, attempts=task.attempts)
    return [(job, Evaluation(status, reason=reason), telemetry) for job in jobs]
