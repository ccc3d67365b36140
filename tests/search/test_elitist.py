"""The exam of algorithms whose survivors compete with newcomers: on new items they are what their new results say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import evomerge.search
from evomerge.manifest import Manifest
from evomerge.proposal import Proposal, Result, frozen_genome
from evomerge.search import ALGORITHMS, make_optimizer, make_options, needs_of
from evomerge.search.base import Column, Elitist, Optimizer, Start
from evomerge.space import Axis

ELITIST = [a for a in ALGORITHMS if needs_of(a).scope == "incumbents"]
each = pytest.mark.parametrize("algorithm", ELITIST)
POPULATION = 6
Make = Callable[..., Any]


class Orthogonal:
    """Sources that have nothing in common."""

    def __init__(self, manifest: Manifest) -> None:
        self.sources = (manifest.base, *manifest.experts)

    def gram(self, start: int, stop: int) -> np.ndarray:
        return np.eye(len(self.sources)) * (stop - start)


@pytest.fixture
def make(manifest_of: Callable[..., Manifest]) -> Make:
    """make(algorithm, constrained=False) -> an optimizer whose generations have items of their own."""

    def optimizer(algorithm: str, constrained: bool = False) -> Optimizer:
        needs, manifest = needs_of(algorithm), manifest_of()
        axes = () if needs.proposes == "recipes" else (Axis("x"), Axis("y"), Axis("n", "int", 0, 4))
        start = Start(
            frozen_genome([0.5] * len(axes)),
            objectives=2 if needs.objectives == "several" else 1,
            constrained=constrained,
            manifest=manifest,
            columns=(Column("t", "accuracy", higher=True, share=1.0),),
            geometry=Orthogonal(manifest),
            sampled=True,
        )
        rng = np.random.Generator(np.random.PCG64(1))
        options = make_options(algorithm, {"population": POPULATION})
        return make_optimizer(algorithm, axes, start, rng, itertools.count(), options)

    return optimizer


def result(loss: float, opt: Optimizer, violation: float = 0.0) -> Result:
    """Worse in every objective, and on all of two items, the higher the loss."""
    count = 2 if opt.needs.objectives == "several" else 1
    right = np.full(2, math.exp(-loss) if math.isfinite(loss) else 0.0, np.float32)
    scores = {"t": {"accuracy": right}} if math.isfinite(loss) else {}
    return Result(np.array([loss, 2 * loss][:count]), "ok" if scores else "failed:nan", scores, violation)


def generation(
    opt: Any, losses: Callable[[Proposal], float], renewed: Callable[[int], float] | None = None
) -> tuple[list[int], list[Proposal]]:
    """Ask and tell one generation; incumbents are renewed before. Their numbers, and the members."""
    old = opt.incumbents()
    members: list[Proposal] = []
    while len(members) < POPULATION or not opt.incumbents():
        part = opt.ask(100)
        if not members and renewed is not None:
            opt.renew({i: result(renewed(i), opt) for i in old})
        for p in part:
            opt.tell(p, result(losses(p), opt))
        members += part
    return old, members


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_scope_says_who_can_renew(algorithm: str) -> None:
    """Algorithms of scope `incumbents` have the two methods, others have not, so that the table tells the truth."""
    has = [hasattr(evomerge.search._class(algorithm), m) for m in ("incumbents", "renew")]

    assert has == [algorithm in ELITIST] * 2


@each
def test_incumbents_are_known_between_generations(algorithm: str, make: Make) -> None:
    """None at first and within a generation; then told proposals, the better ones where not all stay."""
    opt = make(algorithm)
    assert isinstance(opt, Elitist)
    assert opt.incumbents() == []
    told: dict[int, float] = {}
    for g in range(3):
        count = 0
        while count < POPULATION or not opt.incumbents():
            for p in opt.ask(100):
                assert p.group == g
                assert opt.incumbents() == []
                told[p.id] = float((7 * p.id) % 11)
                opt.tell(p, result(told[p.id], opt))
                count += 1
        incumbents = opt.incumbents()
        assert incumbents
        assert len({*incumbents}) == len(incumbents) <= POPULATION
        assert {*incumbents} <= {*told}
        best = sorted(told.values())[: len(incumbents)]
        if len(incumbents) < len(told):
            assert sorted(told[i] for i in incumbents) == best


@each
@pytest.mark.parametrize("constrained", [False, True])
def test_selection_follows_the_new_losses(algorithm: str, constrained: bool, make: Make) -> None:
    """Survivors told 1 and newcomers told 0.5: who stays is decided by what the survivors were renewed to."""
    for renewed, stay in ((None, False), (2.0, False), (0.1, True)):
        opt = make(algorithm, constrained)
        generation(opt, lambda p: 1.0)
        old, _ = generation(opt, lambda p: 0.5, None if renewed is None else lambda i, x=renewed: x)

        assert old
        assert ({*opt.incumbents()} == {*old}) if stay else not {*opt.incumbents()} & {*old}, renewed


@each
def test_the_order_among_survivors_is_the_new_one(algorithm: str, make: Make) -> None:
    """One survivor becomes the only one that newcomers do not beat: it alone is among the next survivors."""
    opt = make(algorithm)
    generation(opt, lambda p: 1.0)
    chosen = opt.incumbents()[1]
    old, _ = generation(opt, lambda p: 0.5, lambda i: 0.1 if i == chosen else 3.0)

    assert {*old} & {*opt.incumbents()} == {chosen}
    assert generation(opt, lambda p: 0.5, lambda i: 3.0 if i == chosen else 0.1)[0]
    assert chosen not in opt.incumbents()


@each
def test_children_follow_the_new_losses(algorithm: str, make: Make) -> None:
    """Equal searches whose survivors were renewed differently ask differently afterwards, and alike where alike."""

    def after(x: Sequence[float]) -> list[Any]:
        opt = make(algorithm)
        generation(opt, lambda p: 1.0 + p.id / 100)
        generation(opt, lambda p: 2.0, lambda i: x[i % 2])
        out = []
        for _ in range(2):
            members = generation(opt, lambda p: 3.0, lambda i: 1.0)[1]
            out += [p.recipe.id if p.genome is None else p.genome.tobytes() for p in members]  # type: ignore[union-attr]
        return out

    assert after([0.1, 1.9]) == after([0.1, 1.9])
    assert after([0.1, 1.9]) != after([1.9, 0.1])


@each
def test_a_survivor_that_fails_on_new_items_leaves(algorithm: str, make: Make) -> None:
    """Where newcomers are worse than it was, but known."""
    opt = make(algorithm)
    generation(opt, lambda p: 0.1)
    lost = opt.incumbents()[0]
    generation(opt, lambda p: 1.0, lambda i: math.inf if i == lost else 0.1)

    assert lost not in opt.incumbents()
    assert opt.ask(1)


@each
def test_strangers_and_nan_are_refused(algorithm: str, make: Make) -> None:
    """Both leave the search as it was."""
    opt, other = make(algorithm), make(algorithm)
    for o in (opt, other):
        generation(o, lambda p: 1.0 + p.id)
    old = opt.incumbents()
    assert other.incumbents() == old
    first, second = opt.ask(100), other.ask(100)
    with pytest.raises(ValueError, match="no incumbent"):
        opt.renew({i: result(1.0, opt) for i in [*old, 999]})
    with pytest.raises(ValueError, match="NaN"):
        opt.renew({i: Result(result(1.0, opt).losses * math.nan) for i in old})
    for o, group in ((opt, first), (other, second)):
        o.renew({i: result(2.0, o) for i in old})
        for p in group:
            o.tell(p, result(3.0, o))

    assert opt.incumbents() == other.incumbents()


@pytest.mark.parametrize("algorithm", ["nsga-ii", "nsga-iii"])
def test_parents_mate_by_their_new_results(algorithm: str, make: Make) -> None:
    """What Optuna's tournaments compare are the renewed values and violations, for survivors and newcomers alike."""
    opt = make(algorithm, constrained=True)
    generation(opt, lambda p: 1.0)
    old = opt.incumbents()
    group = opt.ask(100)
    opt.renew({i: result(0.1 + i, opt, violation=float(i == old[0])) for i in old})
    for p in group:
        opt.tell(p, result(2.0 + p.id, opt))
    parents = opt._trials.parents(opt._group + 1)

    assert old[0] not in parents
    assert {*old[1:]} <= {*parents}
    for i, trial in parents.items():
        loss = (0.1 if i in old else 2.0) + i
        assert trial.values == [loss, 2 * loss]
        assert trial.constraints == {"fitness": 0.0}


def test_an_archive_is_on_one_set_of_items(make: Make) -> None:
    """Niches: all rows are replaced, by samples of another length too; a member without a result is an error."""
    opt = make("niches")
    generation(opt, lambda p: 1.0)
    old = opt.incumbents()
    opt.ask(1)
    with pytest.raises(ValueError, match="were not renewed"):
        opt.renew({i: result(1.0, opt) for i in old[1:]})

    def longer(i: int) -> Result:
        return Result(np.zeros(1), scores={"t": {"accuracy": np.array([1, 0, 1, i == old[2]], np.float32)}})

    opt.renew({i: longer(i) for i in old if i != old[3]} | {old[3]: Result(np.zeros(1), violation=0.2)})
    assert opt._archive.scores.shape == (len(old) - 1, 4)
    assert [i for _, i in opt._archive.members] == [i for i in old if i != old[3]]
    assert opt._archive.scores[:, 3].tolist() == [float(i == old[2]) for i in old if i != old[3]]
