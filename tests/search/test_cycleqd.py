"""CycleQD beyond the common exam: its archives, whom it draws, what children are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evomerge.errors import UserError
from evomerge.manifest import Manifest
from evomerge.proposal import Proposal, Result, frozen_genome
from evomerge.search import make_optimizer, make_options
from evomerge.search.archive import Archive, Dimension, Grid
from evomerge.search.base import Optimizer, Start
from evomerge.search.cycleqd import elite_shares

SKILLS = tuple(Dimension(n, 0.0, 1.0, 6) for n in "abc")
Told = list[tuple[Proposal, np.ndarray]]


@pytest.fixture
def manifest(manifest_of: Callable[..., Manifest]) -> Manifest:
    return manifest_of(experts=("a", "b", "c"))


def optimizer(manifest: Manifest, dimensions: tuple[Dimension, ...] = SKILLS, **settings: Any) -> Optimizer:
    start = Start(frozen_genome([]), manifest=manifest, measures=dimensions)
    rng = np.random.Generator(np.random.PCG64(1))
    return make_optimizer("cycleqd", (), start, rng, itertools.count(), make_options("cycleqd", settings))


def bands(p: Proposal, manifest: Manifest) -> np.ndarray:
    """Coefficients of the experts' task vectors by band, shape (n_experts, 4), from the recipe."""
    assert p.recipe is not None
    rule, *others = p.recipe.blocks.values()
    assert all((r.method, r.sources) == (rule.method, rule.sources) for r in others)
    rows = [rule.sources.get(n) for n in manifest.experts]
    if rule.method == "linear":
        total = sum(c["weight"] for c in rule.sources.values())
        assert total == pytest.approx(1.0, abs=1e-5)
        return np.array([[0.0 if c is None else c["weight"]] * 4 for c in rows])
    assert rule.method == "spectral"
    assert rule.params == {"lambda": 1.0}
    assert all(c is None or c["weight"] == 1.0 for c in rows)
    return np.array([[0.0] * 4 if c is None else [c[f"band_{b}"] for b in (1, 2, 3, 4)] for c in rows])


def coefficients(p: Proposal, manifest: Manifest) -> np.ndarray:
    """Means over bands, shape (n_experts,)."""
    return bands(p, manifest).mean(axis=1)


def skills(x: np.ndarray) -> np.ndarray:
    """Each expert brings its own skill and costs the others some; more than one of it helps nobody."""
    z = x - 0.3 * (x.sum() - x) - np.maximum(x - 1.0, 0.0)
    return np.asarray(1.0 / (1.0 + np.exp(4.0 - 8.0 * z)))


def search(opt: Optimizer, manifest: Manifest, budget: int) -> Told:
    told: Told = []
    while len(told) < budget:
        for p in opt.ask(budget - len(told)):
            measures = skills(coefficients(p, manifest))
            opt.tell(p, Result(np.array([-measures.mean()]), measures=measures))
            told.append((p, measures))
    return told


def test_experts_come_first(manifest: Manifest) -> None:
    """One generation of them alone, then whole generations of children."""
    told = search(optimizer(manifest, population=5), manifest, 13)

    assert [p.group for p, _ in told] == [0] * 3 + [1] * 5 + [2] * 5
    np.testing.assert_array_equal([coefficients(p, manifest) for p, _ in told[:3]], np.eye(3))
    assert all(not p.parents for p, _ in told[:3])
    assert all(len(set(p.parents)) == 2 for p, _ in told[3:])


def test_parents_are_elites_of_the_archive_whose_turn_it_is(manifest: Manifest) -> None:
    """Child by child: of the archive of a, of b, of c, of a ... as it was when the generation began."""
    told = search(optimizer(manifest, population=6), manifest, 63)
    archives = [Archive[int](Grid(SKILLS[:2])) for _ in SKILLS]

    for k, group in itertools.groupby(told, key=lambda t: t[0].group):
        members = list(group)
        elites = [{i for _, i in a.elites.values()} for a in archives]
        for n, (p, _) in enumerate(members):
            if k > 0:
                assert set(p.parents) <= elites[n % 3]
        for p, measures in members:
            for j, archive in enumerate(archives):
                archive.add(np.delete(measures, j), -float(measures[j]), p.id)
    assert all(len(a.elites) > 6 for a in archives)


def test_lower_may_be_better(manifest: Manifest) -> None:
    """Of a measure whose less is better the least is the elite."""
    fewer = Dimension("length", 0.0, 1.0, 1, higher=False)
    opt = optimizer(manifest, (fewer, Dimension("a", 0.0, 1.0, 1)), population=1)
    lengths = dict(enumerate((0.5, 0.2, 0.9)))
    for p in opt.ask(3):
        opt.tell(p, Result(np.array([0.0]), measures=np.array([lengths[p.id], lengths[p.id]])))

    [first] = opt.ask(1)
    assert first.parents == (1,), "the archive of length has the shortest"
    opt.tell(first, Result(np.array([np.inf]), "failed:nan"))
    [second] = opt.ask(1)
    assert second.parents == (2,), "the archive of a has the best at a"


@pytest.mark.parametrize("still", [{"mutation": "coefficients", "sigma": 0.0}, {"rate": 0.0}])
def test_children_are_weighted_means(still: dict[str, Any], manifest: Manifest) -> None:
    """Without mutation a child lies on the line between its parents, around the middle; its weights sum to 1."""
    told = search(optimizer(manifest, **still, crossover_sigma=0.2), manifest, 300)

    at = {p.id: coefficients(p, manifest) for p, _ in told}
    shares = []
    for p, _ in told[3:]:
        a, b = (at[i] for i in p.parents)
        assert at[p.id].sum() == pytest.approx(1.0, abs=1e-5)
        if np.linalg.norm(b - a) > 0.05:
            share = (at[p.id] - a) @ (b - a) / ((b - a) @ (b - a))
            np.testing.assert_allclose(at[p.id], a + share * (b - a), atol=1e-5)
            shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    # w_2 / (w_1 + w_2) of two N(1, 0.2) has a standard deviation of about 0.2 / (2 sqrt 2).
    assert np.std(shares) == pytest.approx(0.071, rel=0.2)


def test_mutation_adds_noise_to_every_coefficient(manifest: Manifest) -> None:
    """A child minus the mean of its parents, with next to no noise in the weights."""
    told = search(optimizer(manifest, mutation="coefficients", sigma=0.05, crossover_sigma=0.0), manifest, 400)

    at = {p.id: coefficients(p, manifest) for p, _ in told}
    noise = np.array([at[p.id] - (at[p.parents[0]] + at[p.parents[1]]) / 2 for p, _ in told[3:]])
    assert noise.std(axis=0) == pytest.approx([0.05] * 3, rel=0.15)
    assert noise.mean(axis=0) == pytest.approx([0.0] * 3, abs=0.01)
    assert all(np.ptp(bands(p, manifest), axis=1).max() == 0.0 for p, _ in told), "linear mixes all along"


def test_mutation_adds_bands_of_the_expert_of_the_measure(manifest: Manifest) -> None:
    """A child minus the mean of its parents: uniform shares of every band of one expert, the best at the quality."""
    opt = optimizer(manifest, rate=0.3, crossover_sigma=0.0, population=9)
    for p in opt.ask(3):  # a is best at the third skill, b at the first, c at the second
        opt.tell(p, Result(np.array([0.0]), measures=np.roll(np.eye(3)[p.id], -1)))
    at = {i: np.tile(row[:, None], 4) for i, row in enumerate(np.eye(3))}
    added = []
    for n in range(300):
        [p] = opt.ask(1)
        at[p.id] = bands(p, manifest)
        change = at[p.id] - (at[p.parents[0]] + at[p.parents[1]]) / 2
        expert = (1, 2, 0)[n % 3]
        np.testing.assert_allclose(np.delete(change, expert, axis=0), 0.0, atol=2e-6)
        added.append(change[expert])
        opt.tell(p, Result(np.array([0.0]), measures=skills(coefficients(p, manifest))))

    assert np.min(added) >= -2e-6
    assert np.max(added) <= 0.3 + 2e-6
    assert np.mean(added, axis=0) == pytest.approx([0.15] * 4, abs=0.02)
    assert np.std(added, axis=0) == pytest.approx([0.3 / 12**0.5] * 4, rel=0.1)
    assert np.abs(np.corrcoef(np.transpose(added))[np.triu_indices(4, 1)]).max() < 0.2, "each band by itself"


def test_elite_sampling_by_hand() -> None:
    """Factors from 0.5 to 1.3 for the quality and each place, multiplied; what all share counts nothing."""
    shares = elite_shares(np.array([0.2, 0.6, 0.4]), np.array([[0, 2], [4, 2], [4, 2]]))

    expected = np.array([0.5 * 0.5, 1.3 * 1.3, 0.9 * 1.3])
    assert shares == pytest.approx(expected / expected.sum())
    assert elite_shares(np.array([1.0]), np.array([[3]])) == pytest.approx([1.0])


@pytest.mark.parametrize("mutation", ["singular", "coefficients"])
def test_finds_mixes_that_no_expert_is(mutation: str, manifest: Manifest) -> None:
    """Each archive gets cells beyond the experts', and a mix better on all skills than any expert on its worst."""
    told = search(optimizer(manifest, mutation=mutation), manifest, 203)

    grid = Grid(SKILLS)
    assert len({grid.of(m) for _, m in told}) > 20
    assert max(m.min() for _, m in told) > 2 * max(m.min() for _, m in told[:3])


def test_what_fails_or_violates_is_nobodys_parent(manifest: Manifest) -> None:
    """As long as nothing is in the archives, children are of two experts."""
    opt = optimizer(manifest, population=4)
    experts = opt.ask(10)
    results = [Result(np.array([np.inf]), "failed:nan"), Result(np.array([1e6]), violation=0.1, measures=np.ones(3))]
    for p, r in zip(experts, [*results, results[0]], strict=True):
        opt.tell(p, r)

    assert all(len(set(p.parents)) == 2 for p in opt.ask(10))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"population": 0}, "population: at least 1"),
        ({"crossover_sigma": 0.5}, "`0 <= crossover_sigma <= 0.3` must hold, got 0.5"),
        ({"sigma": -1.0}, "`0 <= sigma` must hold"),
        ({"rate": 2.0}, "`0 <= rate <= 1` must hold, got 2"),
        ({"mutation": "none"}, "mutation should be singular or coefficients, got 'none'"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], words: str) -> None:
    """Each in one line."""
    with pytest.raises(UserError, match=words):
        make_options("cycleqd", settings)


def test_one_measure_is_too_few(manifest: Manifest) -> None:
    with pytest.raises(UserError, match="cycleqd needs two measures or more"):
        optimizer(manifest, SKILLS[:1])
    opt = optimizer(manifest)
    [p] = opt.ask(1)
    with pytest.raises(ValueError, match="3 measures are needed"):
        opt.tell(p, Result(np.array([0.0]), measures=np.zeros(2)))
