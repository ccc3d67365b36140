"""Scores -> losses: the only place with signs. Optimizers minimise what comes out of here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.config import FitnessSpec
from evomerge.proposal import Scores
from evomerge.recipe import Recipe
from evomerge.score.tasks import METRICS, TaskSpec


def task_means(scores: Scores, tasks: Iterable[TaskSpec]) -> dict[str, float]:
    """task -> mean of the metric that is optimised, in float64, higher or lower as the metric goes."""
    return {t.name: float(np.mean(scores[t.name][t.metric], dtype=np.float64)) for t in tasks}


@dataclass(frozen=True)
class Objective:
    """A fitness bound to its references: `low` and `high` per task, in the metric's own direction.

    The references are the base's score and the best baseline's score on the items that are being scored;
    `weighted_mean` without a floor needs none.
    """

    spec: FitnessSpec
    low: Mapping[str, float]
    high: Mapping[str, float]

    @classmethod
    def bind(cls, spec: FitnessSpec, base: Scores, baselines: Iterable[Scores]) -> Objective:
        """Take the references from the baselines' scores."""
        rows = [task_means(s, spec.tasks) for s in (base, *baselines)]
        best = {t.name: (max if METRICS[t.metric] == "higher" else min)(r[t.name] for r in rows) for t in spec.tasks}
        return cls(spec, rows[0], best)

    def losses(self, scores: Scores, recipe: Recipe | None = None) -> NDArray[np.float64]:
        """Losses to minimise, shape (n_objectives,)."""
        total = sum(t.weight for t in self.spec.tasks)
        value = 0.0
        for task, mean in zip(self.spec.tasks, task_means(scores, self.spec.tasks).values(), strict=True):
            value += task.weight / total * (self._loss(task, mean) + self._price(task, mean))
        return np.array([value])

    def _price(self, task: TaskSpec, mean: float) -> float:
        """What falling below the base costs; a mean over many tasks would hide it."""
        if self.spec.floor is None:
            return 0.0
        sign = 1.0 if METRICS[task.metric] == "higher" else -1.0
        short = sign * (self.low[task.name] - mean) + self.spec.floor.margin
        return self.spec.floor.penalty * max(short, 0.0)

    def _loss(self, task: TaskSpec, mean: float) -> float:
        sign = -1.0 if METRICS[task.metric] == "higher" else 1.0
        if self.spec.objective == "weighted_mean":
            return sign * mean
        gain = self.high[task.name] - self.low[task.name]
        if gain == 0.0:  # no baseline improves on the base: its own score is the unit
            gain = -sign * max(abs(self.low[task.name]), 1e-9)
        return -min((mean - self.low[task.name]) / gain, 1.0)


FAILED = np.array([np.inf])
FAILED.setflags(write=False)
