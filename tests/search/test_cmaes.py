"""CMA-ES: as good as pycma's own loop, restarts, the diagonal form, integers and reasons to stop."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from evomerge.proposal import Proposal, Result, frozen_genome
from evomerge.search.base import Start
from evomerge.search.cmaes import FULL_COVARIANCE_AXES, CmaEs, Options, import_cma
from evomerge.space import Axis

Loss = Callable[[np.ndarray[Any, Any]], float]


def sphere(g: np.ndarray[Any, Any]) -> float:
    return float(((g - 0.6) ** 2).sum())


def ellipsoid(g: np.ndarray[Any, Any]) -> float:
    scales = 10.0 ** (4 * np.arange(len(g)) / (len(g) - 1))
    return float((scales * (g - 0.6) ** 2).sum())


def rosenbrock(g: np.ndarray[Any, Any]) -> float:
    x = 4 * g - 1.4  # the minimum (1, ..., 1) at 0.6
    return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())


def make(
    axes: Sequence[Axis] | int, seed: int = 1, start: float = 0.3, options: Options | None = None
) -> tuple[CmaEs, np.random.Generator]:
    axes = tuple(Axis(f"x{i}") for i in range(axes)) if isinstance(axes, int) else axes
    rng = np.random.Generator(np.random.PCG64(seed))
    return CmaEs(axes, Start(frozen_genome([start] * len(axes))), rng, itertools.count(), options), rng


def generation(opt: CmaEs, loss: Loss) -> list[tuple[Proposal, float]]:
    out = []
    for p in opt.ask(10**6):
        assert p.genome is not None
        out.append((p, loss(p.genome)))
    for p, value in out:
        opt.tell(p, Result(np.array([value])))
    return out


def minimise(opt: CmaEs, loss: Loss, budget: int) -> float:
    best, used = math.inf, 0
    while used < budget and not opt.stop():
        done = generation(opt, loss)
        used += len(done)
        best = min(best, *(v for _, v in done))
    return best


def pycma_alone(n: int, seed: int, loss: Loss, budget: int) -> float:
    """pycma's own ask-and-tell loop as its manual has it: same box, start, step and evaluations."""
    options = {
        "bounds": [0, 1],
        "BoundaryHandler": "BoundTransform",
        "seed": seed + 1,
        "verbose": -9,
        "verb_log": 0,
        "maxfevals": budget,
        "tolfunhist": 0,
        "tolfun": 0,
        "tolx": 0,
    }
    state = np.random.get_state()  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        es = import_cma().CMAEvolutionStrategy([0.3] * n, 1 / 6, options)
        while es.countevals < budget:
            xs = es.ask()
            es.tell(xs, [loss(np.asarray(x)) for x in xs])
    np.random.set_state(state)  # noqa: NPY002
    return float(es.result.fbest)


@pytest.mark.parametrize(
    ("loss", "n", "budget"),
    [(sphere, 6, 500), (ellipsoid, 6, 1200), (rosenbrock, 4, 1500)],
    ids=["sphere", "ellipsoid", "rosenbrock"],
)
def test_no_worse_than_pycma_alone(loss: Loss, n: int, budget: int) -> None:
    """With equal budgets the median over seeds of log10(loss) is within one decade of pycma's own loop."""
    seeds = range(5)

    ours = [math.log10(minimise(make(n, s)[0], loss, budget) + 1e-16) for s in seeds]
    theirs = [math.log10(pycma_alone(n, s, loss, budget) + 1e-16) for s in seeds]

    assert np.median(ours) <= np.median(theirs) + 1.0
    assert np.median(ours) < -3


def test_optimum_in_a_corner_is_reached() -> None:
    """The transform at the bounds lets the search come close to a corner of the cube."""
    opt, _ = make(4)

    assert minimise(opt, lambda g: float(g.sum()), 800) < 1e-3


def test_one_axis_converges() -> None:
    """A single axis, which is doubled inside, is searched as well as any other."""
    opt, _ = make(1)

    assert minimise(opt, sphere, 150) < 1e-6
    assert [p.genome.shape for p in opt.recommend(1) if p.genome is not None] == [(1,)]


def test_population_follows_the_tutorial() -> None:
    """Without a setting a generation has 4 + floor(3 ln n) candidates."""
    sizes = {n: len(make(n)[0].ask(10**6)) for n in (1, 2, 10, 100)}

    assert sizes == {n: 4 + math.floor(3 * math.log(n)) for n in sizes}


def test_restart_doubles_the_population() -> None:
    """Once pycma has converged, the next generation is twice as large and starts somewhere else."""
    opt, _ = make(2, options=Options(population=6, restarts=2))
    sizes, centres = [], []

    for _ in range(120):
        done = generation(opt, lambda g: float(((g - 0.05) ** 2).sum()))
        sizes.append(len(done))
        centres.append(np.mean([p.genome for p, _ in done], axis=0))
        if len(done) == 12:
            break

    assert sizes[-2:] == [6, 12]
    assert np.abs(centres[-2] - 0.05).max() < 1e-3
    assert np.abs(centres[-1] - centres[-2]).max() > 0.05


def test_exhausted_restarts_stop_with_numbers() -> None:
    """After the last restart stop() names pycma's reasons with finite numbers, and ask gives nothing more."""
    opt, _ = make(2, options=Options(population=5, restarts=1))

    for _ in range(400):
        if opt.stop():
            break
        generation(opt, sphere)

    reasons = opt.stop()
    assert reasons
    assert all(k.startswith("cma:") and isinstance(v, float) and math.isfinite(v) for k, v in reasons.items())
    assert opt.ask(10) == []
    assert len(opt.recommend(1)) == 1


def test_flat_loss_stops_or_restarts() -> None:
    """A loss without any slope ends in a restart, never in an endless search of one point."""
    opt, _ = make(3, options=Options(population=6, restarts=0))

    for _ in range(300):
        if opt.stop():
            break
        generation(opt, lambda g: 1.0)

    assert opt.stop()


def test_recommends_the_mean() -> None:
    """The recommendation is the distribution's mean: near the optimum under noise, not the luckiest sample."""
    opt, rng = make(4)
    noise = np.random.Generator(np.random.PCG64(7))

    for _ in range(60):
        generation(opt, lambda g: sphere(g) + 0.02 * float(noise.standard_normal()))

    (p,) = opt.recommend(5)
    assert p.genome is not None
    assert np.abs(p.genome - 0.6).max() < 0.15
    assert rng is not noise


@pytest.mark.parametrize(("n", "diagonal"), [(FULL_COVARIANCE_AXES, False), (FULL_COVARIANCE_AXES + 1, True)])
def test_diagonal_above_the_limit(n: int, diagonal: bool) -> None:
    """Up to 200 axes pycma learns the full covariance, above them its diagonal only."""
    opt, _ = make(n)

    assert bool(opt._es.opts["CMA_diagonal"]) is diagonal


def test_diagonal_learns() -> None:
    """The separable form improves on a start in 250 dimensions within 60 generations."""
    opt, _ = make(250)

    assert minimise(opt, sphere, 60 * 20) < 0.6 * sphere(np.full(250, 0.3))


def test_integers_do_not_freeze() -> None:
    """Long after the floats have converged, int and categorical axes still try their neighbouring levels."""
    axes = (
        Axis("x"),
        Axis("y"),
        Axis("n", "int", 0, 7, default=3.0),
        Axis("c", "categorical", choices=("a", "b", "c", "d"), default="a"),
    )
    opt, _ = make(axes, start=0.4)
    for _ in range(60):
        generation(opt, lambda g: sphere(g[:2]))

    assert opt._es.countiter == 60, "no restart yet"
    late = [p.genome for _ in range(10) for p, _ in generation(opt, lambda g: sphere(g[:2])) if p.genome is not None]

    for at in (2, 3):
        assert len({axes[at].value(float(g[at])) for g in late}) >= 2


def test_integer_optimum_is_found_and_kept() -> None:
    """The best level of an int axis is found, and most late candidates stand on it."""
    axis = Axis("n", "int", 0, 9, default=2.0)
    axes = (Axis("x"), axis)
    opt, _ = make(axes, start=0.2)

    def loss(g: np.ndarray[Any, Any]) -> float:
        return float((g[0] - 0.6) ** 2 + 0.1 * (float(axis.value(float(g[1]))) - 7) ** 2)

    for _ in range(40):
        generation(opt, loss)
    late = [float(axis.value(float(p.genome[1]))) for p, _ in generation(opt, loss) if p.genome is not None]

    assert np.median(late) == 7.0


def test_lower_bound_on_deviations() -> None:
    """The deviation of an int or categorical axis never falls below half a level; floats may go to zero."""
    axes = (Axis("x"), Axis("n", "int", 0, 9, default=2.0), Axis("c", "categorical", choices=("a", "b"), default="a"))
    opt, _ = make(axes, start=0.5)

    for _ in range(35):
        generation(opt, lambda g: sphere(g[:1]))

    assert opt._es.countiter == 35, "no restart yet"
    x, n, c = opt._es.stds
    assert x < 0.01
    assert n >= 0.5 / 10 * 0.999
    assert c >= 0.25 * 0.999


def test_first_generation_lies_around_the_start() -> None:
    """The first candidates spread around the default that was handed in, by about sigma."""
    opt, _ = make(50, start=0.8, options=Options(sigma=0.02, population=40))

    cloud = np.array([p.genome for p in opt.ask(100)])

    assert abs(cloud.mean() - 0.8) < 0.01
    assert 0.01 < cloud.std() < 0.04


def test_start_of_another_length_is_refused() -> None:
    """A start with another number of genes than the space has axes is an error that names both."""
    with pytest.raises(ValueError, match="2 genes, the space 3 axes"):
        CmaEs(
            tuple(Axis(f"x{i}") for i in range(3)),
            Start(frozen_genome([0.5, 0.5])),
            np.random.Generator(np.random.PCG64(1)),
            itertools.count(),
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigma": 0.0}, "0 < sigma"),
        ({"sigma": 1.5}, "1.5"),
        ({"population": 3}, "at least 4"),
        ({"restarts": -1}, "-1"),
    ],
)
def test_options_are_checked(settings: dict[str, Any], words: str) -> None:
    """Settings outside their range are refused with the rule or the value."""
    with pytest.raises(ValueError, match=words):
        Options(**settings)


def test_failures_do_not_move_the_mean() -> None:
    """A generation in which everything failed leaves the distribution's mean where it was."""
    opt, _ = make(3)
    generation(opt, sphere)
    before = np.array(opt._es.mean)

    generation(opt, lambda g: math.inf)

    assert np.array_equal(before, opt._es.mean)


def test_accepted_drift_is_told_as_recorded() -> None:
    """A genome that differs by more than last bits (--accept-drift) moves the mean with it."""
    exact, drifted = make(3, start=0.5)[0], make(3, start=0.5)[0]

    for opt, shift in ((exact, 0.0), (drifted, 1e-3)):
        for p in opt.ask(10**6):
            assert p.genome is not None
            moved = frozen_genome(np.clip(p.genome + shift, 0.0, 1.0))
            opt.tell(Proposal(p.id, p.group, genome=moved), Result(np.array([sphere(p.genome)])))

    assert np.abs(drifted._es.mean - exact._es.mean - 1e-3).max() < 2e-4
