"""A made-up evaluator: for tests of everything around evaluation, and for measuring its overhead."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from evomerge.proposal import Evaluation, Job, Telemetry, WorkUnit


@dataclass(frozen=True)
class FakeEvaluator:
    """Scores depend on the recipe's id alone. `failures` says what happens to which proposal.

    A failure is `nan`, `error` (recorded), `die` (the process kills itself), `hang` (sleeps for an hour) or
    `grow` (allocates memory without bound).
    """

    metrics: tuple[str, ...] = ("accuracy", "cross_entropy")
    gradient_shape: tuple[int, int] = (2, 3)
    latency: float = 0.0
    failures: Mapping[int, str] = field(default_factory=dict)

    def evaluate(self, unit: WorkUnit) -> list[tuple[Evaluation, Telemetry]]:
        """One result per job."""
        return [self._one(job) for job in unit.jobs]

    def _one(self, job: Job) -> tuple[Evaluation, Telemetry]:
        time.sleep(self.latency)
        failure = self.failures.get(job.proposal)
        if failure == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if failure == "hang":
            time.sleep(3600)
        if failure == "grow":
            hoard = []
            while True:
                hoard.append(np.ones(2**21))
                time.sleep(0.005)
        if failure is not None:
            return Evaluation(f"failed:{failure}", reason="made up"), Telemetry()
        rng = np.random.Generator(np.random.PCG64(int(job.recipe.id[:12], 16)))
        scores = {
            task: {m: rng.random(len(at)).astype(np.float32) for m in self.metrics}
            for task, at in job.items.tasks.items()
        }
        gradients = {t: rng.standard_normal(self.gradient_shape).astype(np.float32) for t, _ in job.gradients}
        return Evaluation("ok", scores, gradients=gradients if job.gradients else None), Telemetry()
