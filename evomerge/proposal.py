"""The records that travel between search, driver and workers. Frozen, picklable, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from evomerge.canonical import digest
from evomerge.recipe import Recipe

Genome: TypeAlias = NDArray[np.float64]
"""A read-only point of the unit cube, shape (n_axes,)."""

Scores: TypeAlias = Mapping[str, Mapping[str, NDArray[np.float32]]]
"""task -> metric -> one score per item, shape (n_items,)."""

Gradients: TypeAlias = Mapping[str, NDArray[np.float32]]
"""task -> <dL/dW_b, c_k> by block b and source k, shape (n_blocks, 1 + n_experts), L the mean of a metric of it.

Blocks are in the manifest's order. The first source is the base with c_0 = theta_0; the experts follow in the
manifest's order with their differences from it, c_k = theta_k - theta_0.
"""

Differentiated: TypeAlias = tuple[tuple[str, str], ...]
"""The tasks whose gradient is asked for, each with its metric."""

GRADIENT_PRICE = 3
"""Item evaluations that an item's gradient counts as, beside its score: a forward and a backward pass."""


def frozen_genome(values: NDArray[np.float64] | list[float]) -> Genome:
    """A read-only float64 copy. Raises ValueError outside the unit cube or where not finite."""
    g = np.array(values, dtype=np.float64)
    if g.ndim != 1 or not np.all((g >= 0.0) & (g <= 1.0)):
        raise ValueError(f"a genome is a vector in the unit cube, got shape {g.shape}, values {g!r}")
    g.setflags(write=False)
    return g


@dataclass(frozen=True)
class Proposal:
    """One candidate. Exactly one of `genome` and `recipe` is set; `group` is the generation."""

    id: int
    group: int
    genome: Genome | None = None
    recipe: Recipe | None = None
    parents: tuple[int, ...] = ()


@dataclass(frozen=True)
class ItemSet:
    """Items to score: task -> positions in the task's plan. `name` is the split or the rung it stands for."""

    name: str
    tasks: Mapping[str, tuple[int, ...]]

    @cached_property
    def id(self) -> str:
        """Hash of the positions, 16 hex digits."""
        return digest({t: list(p) for t, p in self.tasks.items()})[:16]

    @property
    def count(self) -> int:
        """Number of items over all tasks."""
        return sum(len(p) for p in self.tasks.values())


@dataclass(frozen=True)
class Job:
    """One recipe to build and score on one item set."""

    proposal: int
    rung: int
    recipe: Recipe
    items: ItemSet
    gradients: Differentiated = ()


@dataclass(frozen=True)
class WorkUnit:
    """Jobs that one worker does in a row. Formed by the driver only, so never by worker count."""

    id: int
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Evaluation:
    """What became of a job: `ok` with scores, or `failed:nan|oom|timeout|died|error` with a reason."""

    status: str
    scores: Scores | None = None
    reason: str = ""
    gradients: Gradients | None = None
    """Of the tasks that the job asked for; None where it asked for none."""

    @property
    def ok(self) -> bool:
        """True where there are scores."""
        return self.status == "ok"


@dataclass(frozen=True)
class Telemetry:
    """Where and how long; kept beside the journal, never in it. Seconds and mebibytes."""

    build_seconds: float = 0.0
    score_seconds: float = 0.0
    peak_mb: float = 0.0
    worker: str = ""
    device: str = ""
    attempts: int = 1
    changed_blocks: int = 0


@dataclass(frozen=True)
class Result:
    """What an optimizer is told: losses to minimise, shape (n_objectives,); +inf where the job failed."""

    losses: NDArray[np.float64]
    status: str = "ok"
    scores: Scores = field(default_factory=dict)
    violation: float = 0.0
    """By how much the fitness's constraints are missed; 0 where all are kept."""
    measures: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """The fitness's behaviour measures, shape (n_measures,); NaN where the job failed."""
    gradient: NDArray[np.float64] | None = None
    """d(losses)/d(genome), shape (n_objectives, n_axes); None where it was not asked for, and where the job failed. A
    loss is the weighted mean over its tasks (see `objective.products`)."""

    @property
    def loss(self) -> float:
        """The only loss of a single-objective search."""
        if self.losses.shape != (1,):
            raise ValueError(f"a scalar search was told {self.losses.shape[0]} losses")
        return float(self.losses[0])
