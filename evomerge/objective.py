"""Scores -> losses: the only place with signs. Optimizers minimise what comes out of here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.fitness import FitnessSpec, Goal
from evomerge.proposal import Differentiated, Gradients, Scores
from evomerge.tasks import Task

Column = tuple[str, str]
"""A task's name and one of its metrics."""


def column_mean(scores: Scores, task: str, metric: str) -> float:
    """Mean over a task's items in float64, higher or lower as the metric goes."""
    return float(np.mean(scores[task][metric], dtype=np.float64))


def differentiated(spec: FitnessSpec) -> Differentiated:
    """The objectives' tasks, each once, with the metrics that are differentiated. KeyError where one has none."""
    pairs = [(t.name, t.smooth[goal.metric or t.metric]) for goal in spec.goals for t, _ in spec.weights_of(goal)]
    return tuple(dict.fromkeys(pairs))


def products(spec: FitnessSpec, gradients: Gradients) -> NDArray[np.float64]:
    """<dL/dW_b, c_k> of every objective's loss L to minimise, shape (n_objectives, n_blocks, 1 + n_experts): the
    weighted mean over its tasks.

    Of their smooth metrics, and without a floor: a step of a count has no slope, and a price on few items is noise.
    """
    metrics = dict(differentiated(spec))
    parts = [
        [share * t.sign(metrics[t.name]) * gradients[t.name].astype(np.float64) for t, share in spec.weights_of(goal)]
        for goal in spec.goals
    ]
    return np.array([np.sum(of_goal, axis=0) for of_goal in parts])


@dataclass(frozen=True)
class Objective:
    """A fitness bound to its references on the items that are being scored, in each metric's own direction.

    `low` is the base's mean by task and metric, `high` the best baseline's (or the task's own expert's). A
    `weighted_mean` without a floor needs neither.
    """

    spec: FitnessSpec
    low: Mapping[Column, float]
    high: Mapping[Column, float]

    @classmethod
    def bind(cls, spec: FitnessSpec, base: Scores, baselines: Mapping[str, Scores]) -> Objective:
        """Take the references from the base's and the other baselines' scores (name -> scores)."""
        low, high = {}, {}
        for goal in spec.terms:
            for task, _ in spec.weights_of(goal):
                metric = goal.metric or task.metric
                at = (task.name, metric)
                low[at] = column_mean(base, *at)
                others = {n: column_mean(s, *at) for n, s in baselines.items()}
                if task.expert is not None:
                    high[at] = others.get(task.expert, low[at])
                else:
                    best = min if task.sign(metric) > 0 else max
                    high[at] = best([low[at], *others.values()])
        return cls(spec, low, high)

    def losses(self, scores: Scores) -> NDArray[np.float64]:
        """Losses to minimise, shape (n_objectives,), in the order of `spec.goals`."""
        return np.array([self._loss(goal, scores) for goal in self.spec.goals])

    def violation(self, scores: Scores) -> float:
        """By how much the constraints are missed, summed; 0 where all are kept."""
        total = 0.0
        for c in self.spec.constraints:
            value = self._value(c, scores)
            limit = c.at_most if c.at_most is not None else -(c.at_least or 0.0)
            total += max(value - limit, 0.0)
        return total

    def measures(self, scores: Scores) -> NDArray[np.float64]:
        """The behaviour measures, shape (n_measures,), in the order of `spec.measures` and their metrics' own sense."""
        signs = [-1.0 if self.spec.rises(m) else 1.0 for m in self.spec.measures]
        return np.array([s * self._value(m, scores) for s, m in zip(signs, self.spec.measures, strict=True)])

    @property
    def failed(self) -> NDArray[np.float64]:
        """What a candidate without scores loses, shape (n_objectives,)."""
        return np.full(len(self.spec.goals), np.inf)

    def _loss(self, goal: Goal, scores: Scores) -> float:
        value = self._value(goal, scores)
        if self.spec.floor is not None and goal.kind != "forgetting":
            for task, weight in self.spec.weights_of(goal):
                if not task.benchmark:
                    continue
                value += weight * self._price(task, goal.metric or task.metric, scores)
        return value

    def _value(self, goal: Goal, scores: Scores) -> float:
        """The objective itself, lower is better, without the price of the floor."""
        value = 0.0
        for task, weight in self.spec.weights_of(goal):
            at = (task.name, goal.metric or task.metric)
            sign, mean = task.sign(at[1]), column_mean(scores, *at)
            if goal.kind == "forgetting":
                value += weight * max(sign * (mean - self.low[at]), 0.0)
            elif goal.kind == "recovered_gain":
                value -= weight * self.recovered(task, at[1], mean)
            else:
                value += weight * sign * mean
        return value

    def recovered(self, task: Task, metric: str, mean: float) -> float:
        """The gain over the base as a share of the reference's, at most 1; the base itself has 0."""
        at = (task.name, metric)
        gain = self.high[at] - self.low[at]
        if gain * task.sign(metric) >= 0.0:  # the reference does not improve on the base: its own score is the unit
            gain = -task.sign(metric) * (abs(self.low[at]) or 1.0)
        return min((mean - self.low[at]) / gain, 1.0)

    def _price(self, task: Task, metric: str, scores: Scores) -> float:
        """What falling below the base costs; a mean over many tasks would hide it."""
        assert self.spec.floor is not None
        at = (task.name, metric)
        short = task.sign(metric) * (column_mean(scores, *at) - self.low[at]) + self.spec.floor.margin
        return self.spec.floor.penalty * max(short, 0.0)
