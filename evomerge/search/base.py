"""The ask/tell seam. Optimizers see vectors, losses and item ids; they know nothing of weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from evomerge.manifest import Manifest
from evomerge.proposal import Genome, Proposal, Result
from evomerge.search.archive import Dimension


@dataclass(frozen=True)
class Needs:
    """What an optimizer asks of the driver.

    `scope`: within which set of proposals losses must be comparable (scored on the same items): those of a
    generation; those of a generation and the incumbents, which an `Elitist` has renewed; all that were told (archive);
    whole ones, as only the best seen counts (best); or none at all.
    """

    objectives: Literal["one", "several", "any"] = "one"
    axis_kinds: frozenset[str] = frozenset({"float", "int", "categorical"})
    per_item_scores: bool = False
    scope: Literal["none", "generation", "incumbents", "archive", "best"] = "generation"
    constraints: bool = False
    """Whether it looks at `Result.violation` itself."""
    proposes: Literal["genomes", "recipes"] = "genomes"
    """Recipes come from algorithms that mix sources themselves; they use no axes, and no probes are scored for them."""
    steady: bool = False
    """Whether it may be asked while tells are outstanding (steady state with a fixed lag)."""
    geometry: bool = False
    """Whether it asks for the sources' inner products (`Start.geometry`)."""
    measures: int = 0
    """How many behaviour measures it needs at least (`Result.measures`); algorithms that need none ignore them."""
    design: Callable[[int, Any], int] | None = None
    """For algorithms that rest on models of the losses, (axes, options) -> candidates before their first front, or
    (experts, options) -> all candidates of those that propose recipes. Constraints have no model: they know none."""
    most_axes: int | None = None
    """Axes beyond which it is of no use; None where there is no such number."""
    gradients: bool = False
    """Whether it is told `Result.gradient`; an option `gradients`, where there is one, decides (`needs_of`)."""
    methods: tuple[str, ...] = ("linear",)
    """Merge methods of the recipes that it proposes; genomes have their space's."""
    routes: bool = False
    """Whether these recipes have routes: models may be of different depth, and their layers must follow one another."""


class Optimizer(Protocol):
    """Proposes and learns. `ask` and `tell` may be called from a plain loop:

    while not opt.stop():
        for p in opt.ask(100):
            opt.tell(p, Result(losses=np.array([f(p.genome)])))
    """

    needs: Needs

    def ask(self, n: int) -> list[Proposal]:
        """0 to n proposals; an empty list means that tells are awaited."""
        ...

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result, in proposal order. Failed results have loss +inf."""
        ...

    def stop(self) -> Mapping[str, float]:
        """Reasons to stop with their values; empty while running."""
        ...

    def recommend(self, k: int) -> list[Proposal]:
        """At most k answers that deserve scoring in full, for example the distribution's mean."""
        ...


@runtime_checkable
class Elitist(Optimizer, Protocol):
    """An optimizer of scope `incumbents`: survivors of earlier generations compete with each new one.

    Where every generation has items of its own, the survivors are scored on them too:

    old = opt.incumbents()
    group = opt.ask(100)
    opt.renew({i: result of i on the new items for i in old}), then tell the group
    """

    def incumbents(self) -> list[int]:
        """Numbers of the told proposals that compete with the next generation; [] while one is under way."""
        ...

    def renew(self, results: Mapping[int, Result]) -> None:
        """Replace the incumbents' results before the generation is told; failed ones have loss +inf.

        Raises ValueError for anybody else, and for a NaN loss.
        """
        ...


@runtime_checkable
class Selective(Optimizer, Protocol):
    """An optimizer that is told gradients, which have their price, of some proposals only."""

    @property
    def differentiates(self) -> bool:
        """Whether those of the next proposals are asked for."""
        ...


class Geometry(Protocol):
    """The one thing that an algorithm may know of weights: inner products of the sources."""

    @property
    def sources(self) -> tuple[str, ...]:
        """What the rows stand for, the base among them."""
        ...

    def gram(self, start: int, stop: int) -> NDArray[np.float64]:
        """<theta_k, theta_l> over the flat positions from `start` to before `stop`, shape (n_sources, n_sources)."""
        ...


@dataclass(frozen=True)
class Column:
    """A task's per-item scores that a search optimises; `share` is the task's part of the objective, in (0, 1]."""

    task: str
    metric: str
    higher: bool
    share: float


@dataclass(frozen=True)
class Start:
    """Where a search begins: a point of the unit cube, how many losses it will be told, whether
    results may violate constraints, and what it asked before.

    `recall(id)` is the genome of proposal `id` where a journal that is replayed has it, else None: algorithms that
    take long to ask may take it in place of asking again.
    """

    genome: Genome
    objectives: int = 1
    constrained: bool = False
    recall: Callable[[int], Genome | None] = lambda _: None
    manifest: Manifest | None = None
    dtype: str = "float32"
    columns: tuple[Column, ...] = ()
    """For algorithms with `per_item_scores`: where they stand in `Result.scores`."""
    geometry: Geometry | None = None
    """For algorithms that need it."""
    lag: int | None = None
    """How many proposals may be out at once; None where all are told before more are asked."""
    others: tuple[Genome, ...] = ()
    """The rest of the front so far, for algorithms that keep several answers."""
    measures: tuple[Dimension, ...] = ()
    """What stands in `Result.measures`, with bounds and cells."""
    sampled: bool = False
    """Whether each generation is scored on items of its own; then a steady-state search has generations too."""
    note: Callable[[str], None] = lambda _: None
    """Tells the user one line, such as that a model was refused; again where a run is resumed."""


Ids = Iterator[int]
"""Numbers proposals; shared by all optimizers of a run."""


def check_told(p: Proposal, r: Result, waiting: Container[object], objectives: int = 1) -> None:
    """What every `tell` asks first. Raises ValueError for a stranger, told twice, and for losses that are NaN or too
    many or few."""
    if p.id not in waiting:
        raise ValueError(f"proposal {p.id} was told but is not waiting; was it returned by ask()?")
    if len(r.losses) != objectives:
        raise ValueError(f"proposal {p.id} was told {len(r.losses)} losses, expected {objectives}")
    if np.isnan(r.losses).any():
        raise ValueError(f"proposal {p.id} was told a loss of NaN; failures are +inf")


def check_renewed(results: Mapping[int, Result], incumbents: Collection[int]) -> None:
    """Raises ValueError for new results of others than the incumbents, and for NaN losses."""
    for i, r in results.items():
        if i not in incumbents:
            raise ValueError(f"proposal {i} was renewed but is no incumbent")
        if np.isnan(r.losses).any():
            raise ValueError(f"proposal {i} was renewed with a loss of NaN; failures are +inf")
