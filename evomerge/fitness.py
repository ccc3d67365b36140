"""Fitness: the tasks, and how their scores become one loss or several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from evomerge.errors import nearest
from evomerge.library import find
from evomerge.schema import validated
from evomerge.search.archive import Dimension
from evomerge.tasks import Task
from evomerge.tasks.presets import expanded
from evomerge.yamlio import load_yaml


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Floor(_Part):
    """A price on forgetting: `penalty` per unit that a task's metric lies below the base's plus `margin`."""

    penalty: float = Field(3.0, gt=0)
    margin: float = Field(0.0, ge=0, description="in the metric's units; covers noise of the search items")


class Goal(_Part):
    """One objective: some tasks' metrics made one number. Lower-is-better metrics are turned round by themselves."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    kind: Literal["weighted_mean", "recovered_gain", "forgetting"] = Field(
        "weighted_mean",
        description="weighted_mean of the tasks' metrics; recovered_gain: each task's gain over the base as a share "
        "of its best baseline's (or its `expert`'s) gain, cut off at 1; forgetting: how far tasks fall below the base",
    )
    tasks: tuple[str, ...] | Mapping[str, float] | None = Field(
        None, description="names, or names with weights; default all tasks with their own weights"
    )
    metric: str | None = Field(None, description="another metric of these tasks than the one they search on")

    @model_validator(mode="after")
    def _weighted(self) -> Goal:
        if self.tasks is not None and not self.tasks:
            raise ValueError("tasks: name at least one task, or leave the key out for all")
        if isinstance(self.tasks, Mapping) and not all(w > 0 for w in self.tasks.values()):
            raise ValueError(f"tasks: weights must be above 0, got {dict(self.tasks)}")
        return self


class Constraint(Goal):
    """A limit on what an objective could be: candidates beyond it rank behind all that keep it."""

    at_most: float | None = Field(None, description="for forgetting, and for metrics where lower is better")
    at_least: float | None = Field(None, description="for recovered gain, and for metrics where higher is better")

    @model_validator(mode="after")
    def _one_limit(self) -> Constraint:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("exactly one of at_most and at_least is needed")
        if self.kind == "forgetting" and self.at_most is None:
            raise ValueError("forgetting is limited by at_most")
        if self.kind == "recovered_gain" and self.at_least is None:
            raise ValueError("recovered gain is limited by at_least")
        return self


class Measure(Goal):
    """One dimension of what candidates are like, for archives: what an objective could be, in its metrics' own sense,
    within bounds that are cut into cells. What lies beyond them belongs to the outer cells."""

    low: float
    high: float
    cells: int = Field(10, ge=1, le=1000, description="of equal width, for an archive that is a grid")

    @model_validator(mode="after")
    def _bounded(self) -> Measure:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"`low < high` must hold, but got (low={self.low:g}, high={self.high:g})")
        return self


class FitnessSpec(_Part):
    """What is good: tasks, and how their scores become one loss, or several for a search along a Pareto front."""

    description: str = ""
    tasks: tuple[Task, ...] = Field(min_length=1)
    objective: Literal["weighted_mean", "recovered_gain"] = Field(
        "weighted_mean", description="the only objective, over all tasks (see the kinds of `objectives`)"
    )
    objectives: tuple[Goal, ...] = Field((), description="in place of `objective`: one or several, each minimised")
    constraints: tuple[Constraint, ...] = Field(
        (), description="limits, for example {name: kept, kind: forgetting, at_most: 0.02}"
    )
    measures: tuple[Measure, ...] = Field(
        (),
        description="what an archive is laid out by, for example {name: length, tasks: [sums], metric: tokens, "
        "low: 0, high: 32, cells: 8}",
    )
    floor: Floor | None = Field(None, description="price on tasks that fall below the base; not on forgetting itself")

    @field_validator("tasks", mode="before")
    @classmethod
    def _presets(cls, tasks: Any) -> Any:
        return [expanded(t) for t in tasks] if isinstance(tasks, list | tuple) else tasks

    @model_validator(mode="after")
    def _consistent(self) -> FitnessSpec:
        if not self.benchmarks:
            raise ValueError("tasks: none of these says how well a model does; add one that scores models on items")
        names = [t.name for t in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: the names must differ, got {names}")
        if self.objectives and "objective" in self.model_fields_set:
            raise ValueError("objective and objectives exclude one another; keep one")
        named: tuple[tuple[str, tuple[Goal, ...]], ...] = (
            ("objectives", self.objectives),
            ("constraints", self.constraints),
            ("measures", self.measures),
        )
        for key, goals in named:
            titles = [g.name for g in goals]
            if len(set(titles)) < len(titles):
                raise ValueError(f"{key}: the names must differ, got {titles}")
            for goal in goals:
                self._check_goal(goal, f"{key}: {goal.name}")
        return self

    def _check_goal(self, goal: Goal, where: str) -> None:
        tasks = {t.name: t for t in self.tasks}
        for name in goal.tasks or ():
            if name not in tasks:
                raise ValueError(f"{where}: there is no task {name!r}{nearest(name, tasks)}")
        ways = set()
        for task, _ in self.weights_of(goal):
            metric = goal.metric or task.metric
            if metric not in task.directions:
                raise ValueError(
                    f"{where}: task {task.name!r} has no metric {metric!r}{nearest(metric, task.directions)}"
                )
            ways.add(task.directions[metric])
        if isinstance(goal, Constraint) and goal.kind == "weighted_mean":
            wanted = "higher" if goal.at_most is None else "lower"
            if ways != {wanted}:
                raise ValueError(
                    f"{where}: at_least is for metrics where higher is better, at_most for those where lower is"
                )

        if isinstance(goal, Measure) and goal.kind == "weighted_mean" and len(ways) > 1:
            raise ValueError(f"{where}: a measure is of metrics that go one way, higher or lower")

    @property
    def benchmarks(self) -> tuple[Task, ...]:
        """The tasks that say how well a model does; tables show these."""
        return tuple(t for t in self.tasks if t.benchmark)

    @property
    def goals(self) -> tuple[Goal, ...]:
        """The objectives; one over all tasks where none are named."""
        return self.objectives or (Goal(name="loss", kind=self.objective),)

    @property
    def terms(self) -> tuple[Goal, ...]:
        """Everything that is computed from scores: objectives, constraints and measures."""
        return (*self.goals, *self.constraints, *self.measures)

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The measures as dimensions of an archive."""
        return tuple(Dimension(m.name, m.low, m.high, m.cells, self.rises(m)) for m in self.measures)

    def rises(self, goal: Goal) -> bool:
        """Whether more of what a goal is about is better."""
        if goal.kind != "weighted_mean":
            return goal.kind == "recovered_gain"
        return all(t.directions[goal.metric or t.metric] == "higher" for t, _ in self.weights_of(goal))

    def weights_of(self, goal: Goal) -> list[tuple[Task, float]]:
        """The tasks of an objective with their shares, which sum to 1."""
        if goal.tasks is None:
            weighted = [(t, t.weight) for t in self.tasks]
        elif isinstance(goal.tasks, Mapping):
            weighted = [(t, goal.tasks[t.name]) for t in self.tasks if t.name in goal.tasks]
        else:
            weighted = [(t, t.weight) for t in self.tasks if t.name in goal.tasks]
        total = sum(w for _, w in weighted)
        return [(t, w / total) for t, w in weighted]

    def units_added_by(self, goal: Goal) -> str:
        """The metrics of an objective where they have several units and nobody says what each is worth; else "".

        Weights say so, the tasks' own or the objective's.
        """
        weighted = self.weights_of(goal)
        if isinstance(goal.tasks, Mapping) or any("weight" in t.model_fields_set for t, _ in weighted):
            return ""
        metrics = [(t, goal.metric or t.metric) for t, _ in weighted]
        if len({t.unit(m) for t, m in metrics}) == 1:
            return ""
        return ", ".join(f"{m} of {t.name}" for t, m in metrics)

    def metrics_of(self, task: Task) -> tuple[str, ...]:
        """The columns of a task that objectives and tables read."""
        used = [g.metric for g in self.terms if g.metric and any(t.name == task.name for t, _ in self.weights_of(g))]
        return tuple(dict.fromkeys([task.metric, task.report_metric, *used]))


def resolve_fitness(spec: str | FitnessSpec, folder: Path) -> FitnessSpec:
    """A library name or path to a spec with absolute data files. Raises UserError."""
    if isinstance(spec, str):
        path = find("fitness", spec, folder)
        return resolve_fitness(validated(FitnessSpec, load_yaml(path), str(path)), path.resolve().parent)
    return spec.model_copy(update={"tasks": tuple(t.resolved(folder) for t in spec.tasks)})
