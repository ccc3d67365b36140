"""M2N2 by parts: competition, attraction, archive, and children without weights against a dense implementation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evomerge.errors import UserError
from evomerge.manifest import Manifest
from evomerge.proposal import Proposal, Result, frozen_genome
from evomerge.search import make_optimizer, make_options
from evomerge.search.base import Column, Start
from evomerge.search.niches import (
    Archive,
    Group,
    Mix,
    Niches,
    arc,
    attraction,
    choose_parents,
    groups_of,
    merged,
    recipe_of,
    resources,
    shared_fitness,
)


class Flat:
    """Sources as dense vectors, rows of an array."""

    def __init__(self, sources: tuple[str, ...], x: np.ndarray) -> None:
        self.sources, self.x = sources, x

    def gram(self, start: int, stop: int) -> np.ndarray:
        part: np.ndarray = self.x[:, start:stop]
        return part @ part.T


def dense(m: Mix, x: np.ndarray) -> np.ndarray:
    """The vector of a mix."""
    out = np.empty(x.shape[1])
    for i, (start, stop) in enumerate(itertools.pairwise([*m.cuts, x.shape[1]])):
        out[start:stop] = m.weights[i] @ x[:, start:stop]
    return out


def slerp(t: np.ndarray | float, a: np.ndarray, b: np.ndarray, angle_of: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """SLERP element by element as the released code has it, the angle taken from a pair of whole vectors."""
    u, v = angle_of
    if not u.any() or not v.any():
        return (1 - t) * a + t * b
    omega = np.arccos(np.clip((u / np.linalg.norm(u)) @ (v / np.linalg.norm(v)), -1, 1))
    if np.sin(omega) <= 1e-6:
        return (1 - t) * a + t * b
    return np.sin((1 - t) * omega) / np.sin(omega) * a + np.sin(t * omega) / np.sin(omega) * b


# -- competition and attraction ------------------------------------------------------------------------------------

SCORES = np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])


def test_members_share_what_others_solve_too() -> None:
    """By hand: an item that three solve is worth a third to each; without competition all count the same."""
    assert shared_fitness(SCORES, 1.0) == pytest.approx([1 / 3 + 1, 1 / 3 + 1, 1 / 3])
    assert shared_fitness(SCORES, 2.0) == pytest.approx([1 / 9 + 1, 1 / 9 + 1, 1 / 9])
    assert shared_fitness(SCORES, 0.0) == pytest.approx([2, 2, 1])
    soft = np.array([[0.2, 0.0], [0.6, 0.5]])
    assert shared_fitness(soft, 1.0) == pytest.approx([0.6 * 0.2 / 0.8, 0.6 * 0.6 / 0.8 + 0.5])


def test_attraction_is_what_the_first_lacks() -> None:
    """By hand: the second brings the third item, the third nothing; nobody attracts himself."""
    assert attraction(SCORES, 0, 1.0) == pytest.approx([0, 1, 0])
    assert attraction(SCORES, 2, 1.0) == pytest.approx([1, 1, 0])


def test_parents_are_drawn_by_fitness_and_attraction() -> None:
    """Frequencies of 6000 draws against the shares written out, three standard deviations wide."""
    rng = np.random.default_rng(0)
    pairs = [choose_parents(SCORES, rng, 1.0, attracted=True) for _ in range(6000)]

    firsts = np.bincount([a for a, _ in pairs], minlength=3) / 6000
    assert firsts == pytest.approx([4 / 9, 4 / 9, 1 / 9], abs=0.02)
    assert {b for a, b in pairs if a == 0} == {1}
    assert {b for a, b in pairs if a == 1} == {0}
    mates_of_third = [b for a, b in pairs if a == 2]
    assert np.mean(mates_of_third) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("attracted", [True, False])
@pytest.mark.parametrize(
    "scores",
    [
        np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]),  # the first has all that there is
        np.ones((3, 2)),  # all alike
        np.zeros((3, 2)),  # nobody can do anything
        np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]),  # only one has any fitness
    ],
)
def test_zero_attraction_and_self_mating(scores: np.ndarray, attracted: bool) -> None:
    """Whatever the scores, two different members come out, and no division by zero."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = choose_parents(scores, rng, 1.0, attracted=attracted)
        assert a != b
        assert {a, b} <= {0, 1, 2}


def test_the_archive_keeps_who_is_needed() -> None:
    """Empty slots fill first; the worst leaves in place, of equals the first; a newcomer may be the worst."""
    archive: Archive[str] = Archive(2, 1.0)
    archive.add("a", np.array([1.0, 0.0, 0.0]))
    assert (archive.members, archive.scores.shape) == (["a"], (1, 3))
    archive.add("b", np.array([0.0, 1.0, 1.0]))
    archive.add("worse", np.array([0.0, 0.0, 0.0]))
    assert archive.members == ["a", "b"]
    archive.add("like a", np.array([1.0, 0.0, 0.0]))
    assert archive.members == ["like a", "b"]
    archive.add("all", np.ones(3))
    assert archive.members == ["all", "b"]
    assert archive.scores.tolist() == [[1, 1, 1], [0, 1, 1]]


# -- children without weights ----------------------------------------------------------------------------------------


def test_arc_at_its_edges() -> None:
    """Ends are the parents; parallel, opposite and zero vectors are interpolated linearly."""
    for t, expected in ((0.0, (1.0, 0.0)), (1.0, (0.0, 1.0))):
        assert arc(t, 4.0, 0.5, 9.0) == pytest.approx(expected)
    assert arc(0.5, 1.0, 0.0, 1.0) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    for products in ((1.0, 2.0, 4.0), (1.0, -2.0, 4.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 2.0 + 1e-13, 4.0)):
        assert arc(0.3, *products) == (0.7, 0.3)
    near = arc(0.3, 1.0, math.cos(1e-4), 1.0)
    assert near == pytest.approx((0.7, 0.3), abs=1e-8)


@pytest.mark.parametrize("per_side", [False, True])
@pytest.mark.parametrize("deltas", [False, True])
@pytest.mark.parametrize("by", ["all", "module"])
def test_sixty_merges_equal_dense_ones(
    by: str, deltas: bool, per_side: bool, manifest_of: Callable[..., Manifest]
) -> None:
    """A chain of 60 merges among members, each compared with SLERP on the dense vectors of its dense parents."""
    rng = np.random.default_rng(7)
    manifest = manifest_of(experts=("a", "b"))
    n = manifest.elements
    base = rng.standard_normal(n)
    x = np.stack([base, *(base + 0.3 * rng.standard_normal(n) for _ in "ab")])
    flat = Flat(("base", "a", "b"), x)
    groups = groups_of(manifest, by)
    origin = np.eye(3)[0] if deltas else np.zeros(3)
    zero = origin @ x
    members = [Mix((0,), np.eye(3)[[k]]) for k in range(3)]
    vectors = [dense(m, x) for m in members]
    owner = np.empty(n, dtype=int)
    for g, group in enumerate(groups):
        for start, stop in group.spans:
            owner[start:stop] = g

    for _ in range(60):
        i, j = rng.choice(len(members), 2, replace=False)
        shares = rng.random(len(groups)).tolist()
        inside = [rng.integers(g.size) for g in groups]
        splits = [g.place(int(k)) for g, k in zip(groups, inside, strict=True)]
        child = merged(members[i], members[j], flat, groups, shares, splits, origin=origin, per_side=per_side)
        expected = np.empty(n)
        for g in range(len(groups)):
            own = np.flatnonzero(owner == g)  # the group flattened by itself
            a, b = vectors[i][own] - zero[own], vectors[j][own] - zero[own]
            for side, t in ((slice(None, inside[g]), shares[g]), (slice(inside[g], None), 1 - shares[g])):
                pair = (a[side], b[side]) if per_side else (a, b)
                if len(a[side]):
                    expected[own[side]] = zero[own[side]] + slerp(t, a[side], b[side], pair)
        assert np.allclose(dense(child, x), expected, rtol=1e-9, atol=1e-9)
        members.append(child)
        vectors.append(expected)
    assert len(members[-1].cuts) > 5


def test_places_within_groups() -> None:
    """A group's elements are counted over its spans in order."""
    g = Group(((3, 5), (9, 12)))

    assert [g.place(i) for i in range(g.size)] == [3, 4, 9, 10, 11]
    with pytest.raises(IndexError):
        g.place(5)


# -- scores as resources -------------------------------------------------------------------------------------------


def test_scores_of_several_tasks_side_by_side() -> None:
    """Every task has its share of the whole, whatever its number of items; losses count as probabilities."""
    columns = (Column("x", "accuracy", higher=True, share=0.5), Column("y", "loss", higher=False, share=0.5))
    r = Result(
        np.zeros(1), scores={"x": {"accuracy": np.array([1, 0.0])}, "y": {"loss": np.array([0, np.log(2), 9, 9])}}
    )

    got = resources(r, columns)
    assert got[:4] == pytest.approx([1.0, 0.0, 0.5, 0.25])
    assert resources(r, columns[:1]) == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("score", [-0.1, 1.5, math.nan, math.inf])
def test_scores_outside_are_refused(score: float) -> None:
    """No silent clipping: one line that names task and metric."""
    r = Result(np.zeros(1), scores={"x": {"bleu": np.array([0.5, score])}})
    with pytest.raises(UserError, match=r"scores in \[0, 1\], but task 'x' has bleu from"):
        resources(r, (Column("x", "bleu", higher=True, share=1.0),))


# -- the algorithm ---------------------------------------------------------------------------------------------------


def niches(manifest: Manifest, *, lag: int | None = None, **settings: Any) -> Niches:
    sources = (manifest.base, *manifest.experts)
    x = np.random.default_rng(0).standard_normal((len(sources), manifest.elements))
    start = Start(
        frozen_genome([]),
        manifest=manifest,
        columns=(Column("t", "accuracy", higher=True, share=1.0),),
        geometry=Flat(sources, x),
        lag=lag,
    )
    rng = np.random.Generator(np.random.PCG64(1))
    opt = make_optimizer("niches", (), start, rng, itertools.count(), make_options("niches", settings))
    assert isinstance(opt, Niches)
    return opt


def tell(opt: Niches, p: Proposal, right: list[float] | None, violation: float = 0.0) -> None:
    scores = {} if right is None else {"t": {"accuracy": np.array(right, dtype=np.float32)}}
    opt.tell(p, Result(np.array([math.inf if right is None else 1.0]), scores=scores, violation=violation))


def test_seeds_then_children_of_seeds_then_of_members(manifest_of: Callable[..., Manifest]) -> None:
    """Base and experts first, as baselines have them; children fill the archive; then one at a time, with parents."""
    manifest = manifest_of()
    opt = niches(manifest, population=5)
    first = opt.ask(100)

    assert [p.parents for p in first[:3]] == [(), (), ()]
    assert [set(p.recipe.sources) for p in first[:3]] == [{"base"}, {"base", "code"}, {"base", "math"}]  # type: ignore
    assert all(p.recipe.segments is None for p in first[:3])  # type: ignore[union-attr]
    assert len(first) == 5
    assert all(set(p.parents) < {0, 1, 2} and len(set(p.parents)) == 2 for p in first[3:])
    assert opt.ask(1) == []
    for i, p in enumerate(first):
        tell(opt, p, [float(i == k) for k in range(5)])
    for _ in range(20):
        [p] = opt.ask(100)
        assert len(set(p.parents)) == 2
        tell(opt, p, [1.0, 0.0, 0.0, 0.0, 0.0])


def test_a_member_is_what_was_scored(manifest_of: Callable[..., Manifest]) -> None:
    """Parents are rounded as their recipes are, so a chain of recipes is a chain of what was built."""
    manifest = manifest_of()
    opt = niches(manifest, population=4)
    for _ in range(30):
        for p in opt.ask(100):
            tell(opt, p, [float(p.id % 2), 1.0])
    for mix, _ in opt._archive.members:
        again = recipe_of(mix, opt._sources, manifest, "float32")
        assert again.segments is None or np.array_equal(
            np.array([again.segments.weights.get(n, [0.0] * len(mix.cuts)) for n in opt._sources]).T, mix.weights
        )


def test_with_a_lag_it_never_waits(manifest_of: Callable[..., Manifest]) -> None:
    """Before anybody is known, children come of seeds."""
    opt = niches(manifest_of(), lag=4, population=3)
    group = opt.ask(12)

    assert len(group) == 12
    assert all(set(p.parents) <= {0, 1, 2} for p in group)
    for p in group:
        tell(opt, p, [1.0, 0.0])
    assert len(opt.ask(3)) == 3


def test_failures_and_violations_stay_out(manifest_of: Callable[..., Manifest]) -> None:
    """They are nobody's parents; where all fail, children of seeds go on."""
    opt = niches(manifest_of(), population=3)
    for i in range(20):
        for p in opt.ask(100):
            tell(opt, p, None if i % 2 else [1.0, 1.0], violation=0.5)
            assert set(p.parents) <= {0, 1, 2}
    assert opt._archive.members == []


def test_settings_are_checked() -> None:
    """Each in one line."""
    for settings, words in (
        ({"population": 1}, "population: at least 2"),
        ({"alpha": -1}, "`0 <= alpha`"),
        ({"split": 1}, "split should be true or false, got 1"),
        ({"vectors": "tau"}, "vectors should be weights or deltas, got 'tau'"),
        ({"groups": True}, "groups should be all or module, got True"),
        ({"population": 2.5}, "population should be a whole number"),
    ):
        with pytest.raises(UserError, match=words):
            make_options("niches", settings)


@pytest.mark.parametrize("settings", [{"split": False}, {"vectors": "deltas"}, {"groups": "module"}])
def test_switches_change_children(settings: dict[str, Any], manifest_of: Callable[..., Manifest]) -> None:
    """Without a split one segment remains; deltas keep the base's weight at what is missing; modules cut apart."""
    opt = niches(manifest_of(), population=6, **settings)
    children = [p.recipe.segments for p in opt.ask(100) if p.parents]  # type: ignore[union-attr]

    assert children
    for s in children:
        assert s is not None
        if settings.get("split") is False:
            assert s.cuts == (0,)
        if settings.get("vectors") == "deltas":
            assert [sum(row) for row in zip(*s.weights.values(), strict=True)] == pytest.approx([1.0] * len(s.cuts))
        if settings.get("groups") == "module":
            assert len(s.cuts) > 4
