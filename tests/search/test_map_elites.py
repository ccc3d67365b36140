"""MAP-Elites beyond the common exam: what its archive holds, where children come from, and what it illuminates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evomerge.errors import UserError
from evomerge.proposal import Genome, Proposal, Result, frozen_genome
from evomerge.search import make_optimizer, make_options
from evomerge.search.archive import Archive, Dimension, Grid
from evomerge.search.base import Optimizer, Start
from evomerge.space import Axis

DIMENSIONS = (Dimension("a", 0.0, 1.0, 10), Dimension("b", 0.0, 1.0, 10))
Done = list[tuple[Proposal, float, np.ndarray]]


def optimizer(algorithm: str = "map-elites", n: int = 8, seed: int = 1, **settings: Any) -> Optimizer:
    axes = [Axis(f"x{i}") for i in range(n)]
    start = Start(frozen_genome(np.full(n, 0.5)), measures=DIMENSIONS)
    rng = np.random.Generator(np.random.PCG64(seed))
    return make_optimizer(algorithm, axes, start, rng, itertools.count(), make_options(algorithm, settings))


def arm(g: Genome) -> tuple[float, np.ndarray]:
    """The planar arm of Vassiliades and Mouret 2018: the spread of its joints' angles, and where its hand is."""
    angles = np.cumsum((g - 0.5) * 2 * np.pi)
    hand = np.array([np.cos(angles).sum(), np.sin(angles).sum()]) / len(g)
    return float(g.std()), (hand + 1) / 2


def search(opt: Optimizer, budget: int, f: Callable[[Genome], tuple[float, np.ndarray]] = arm) -> Done:
    """Group by group, as a run without a lag asks."""
    done: Done = []
    while len(done) < budget:
        group = opt.ask(budget - len(done))
        for p in group:
            assert p.genome is not None
            loss, measures = f(p.genome)
            opt.tell(p, Result(np.array([loss]), measures=measures))
            done.append((p, loss, measures))
    return done


def qd_score(done: Done) -> float:
    archive: Archive[None] = Archive(Grid(DIMENSIONS))
    for _, loss, measures in done:
        archive.add(measures, loss, None)
    return sum(1.0 - loss for loss, _ in archive.elites.values())


@pytest.mark.parametrize("settings", [{}, {"archive": "cvt", "cells": 64}])
def test_illuminates_more_than_others(settings: dict[str, Any]) -> None:
    """On the arm, equal budget and seeds: more of the archive, and better, than uniform points or a plain GA leave."""

    def mean(algorithm: str, **settings: Any) -> float:
        return float(np.mean([qd_score(search(optimizer(algorithm, seed=s, **settings), 600)) for s in range(4)]))

    ours = mean("map-elites", **settings)
    for other in ("random", "ga"):
        assert ours > 1.1 * mean(other)


def test_parents_are_elites_of_their_time() -> None:
    """A child's parents are, when it is asked, the best of their cells among all that were told."""
    opt, told = optimizer(), Archive[int](Grid(DIMENSIONS))
    for _ in range(12):
        elites = {i for _, i in told.elites.values()}
        for p in opt.ask(100):
            assert set(p.parents) <= elites
            assert bool(p.parents) == (p.id >= 32)
            assert p.genome is not None
            loss, measures = arm(p.genome)
            opt.tell(p, Result(np.array([loss]), measures=measures))
            told.add(measures, loss, p.id)


def test_children_lie_on_lines() -> None:
    """Without isotropic noise a child lies on the line through its two parents, at a normal distance from the first."""
    done = search(optimizer(iso_sigma=0.0, line_sigma=0.1, n=3), 600)

    genomes = {p.id: p.genome for p, _, _ in done}
    shares = []
    for p, _, _ in done:
        if len(p.parents) == 2:
            a, b = (genomes[i] for i in p.parents)
            assert a is not None
            assert b is not None
            assert p.genome is not None
            inside = (p.genome > 0.0) & (p.genome < 1.0)
            along = ((p.genome - a) @ (b - a)) / ((b - a) @ (b - a))
            if inside.all():
                np.testing.assert_allclose(p.genome, a + along * (b - a), atol=1e-9)
                shares.append(along)
    assert len(shares) > 300
    assert np.std(shares) == pytest.approx(0.1, rel=0.15)
    assert np.mean(shares) == pytest.approx(0.0, abs=0.02)


def test_failures_are_nobodys_parents() -> None:
    """What failed is in no cell; as long as all fail, points are uniform."""
    opt = optimizer(startup=1)
    for p in opt.ask(10):
        opt.tell(p, Result(np.array([np.inf]), "failed:nan", measures=np.full(2, np.nan)))

    assert all(not p.parents for p in opt.ask(6))
    opt = optimizer(startup=1, population=1)
    [first] = opt.ask(1)
    opt.tell(first, Result(np.array([1.0]), measures=np.array([0.5, 0.5])))
    [second] = opt.ask(1)
    opt.tell(second, Result(np.array([np.inf]), "failed:nan", measures=np.full(2, np.nan)))
    assert opt.ask(1)[0].parents == (first.id,)


def test_another_number_of_measures_is_refused() -> None:
    """And the proposal still waits."""
    opt = optimizer()
    [p] = opt.ask(1)

    with pytest.raises(ValueError, match="2 measures are needed, told"):
        opt.tell(p, Result(np.array([1.0]), measures=np.array([0.5])))
    opt.tell(p, Result(np.array([1.0]), measures=np.array([0.5, 0.5])))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"archive": "cvt"}, "archive cvt needs 2 to 1000 in all, got None"),
        ({"archive": "cvt", "cells": 100_000}, "got 100000"),
        ({"cells": 50}, "goes with archive: cvt"),
        ({"archive": "voronoi"}, "archive should be grid or cvt, got 'voronoi'"),
        ({"iso_sigma": -0.1}, "must not be below 0"),
        ({"startup": 0}, "startup: at least 1"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], words: str) -> None:
    """Each in one line."""
    with pytest.raises(UserError, match=words):
        make_options("map-elites", settings)


def test_without_measures_there_is_no_archive() -> None:
    with pytest.raises(UserError, match="map-elites needs measures"):
        make_optimizer(
            "map-elites",
            [Axis("x")],
            Start(frozen_genome([0.5])),
            np.random.default_rng(1),
            itertools.count(),
            make_options("map-elites", {}),
        )
