"""What supervised executors share: a queued unit with its attempts, and its failure as a recorded result."""

from __future__ import annotations

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


def failed(worker: str, task: Task, status: str, reason: str) -> list[Done]:
    """The same failure for every job of a unit."""
    telemetry = Telemetry(worker=worker, attempts=task.attempts)
    return [(job, Evaluation(status, reason=reason), telemetry) for job in task.unit.jobs]
