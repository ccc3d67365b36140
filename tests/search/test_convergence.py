"""Our search against other implementations of the same algorithms: equal budgets, starts and seeds.

Where we wrap a sampler the trajectories are the same, point by point. Elsewhere many seeds are compared: the upper end
of a bootstrap interval of (ours - theirs), of log10 of the best loss or of the hypervolume that is missing, must stay
below a margin.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from evomerge.pareto import hypervolume
from evomerge.proposal import Result, frozen_genome
from evomerge.search import make_optimizer, make_options
from evomerge.search.base import Start
from evomerge.search.cmaes import import_cma
from evomerge.search.optuna_study import import_optuna, made
from evomerge.space import Axis

Array = np.ndarray[Any, Any]
LEVELS = 10
Losses = Array
"""Of all candidates of a search, in order; shape (budget, n_objectives)."""


@dataclass(frozen=True)
class Problem:
    """Losses over the unit cube; `best` is the least loss, or the largest hypervolume below `reference`."""

    name: str
    n: int
    losses: Callable[[Array], Sequence[float]]
    reference: tuple[float, ...] = ()
    best: float = 0.0
    integers: int = 0
    """How many of the last axes have ten levels."""
    start: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def axes(self) -> tuple[Axis, ...]:
        floats = [Axis(f"x{i}") for i in range(self.n - self.integers)]
        return (*floats, *(Axis(f"n{i}", "int", 0, LEVELS - 1) for i in range(self.integers)))

    @property
    def objectives(self) -> int:
        return len(self.reference) or 1

    def score(self, losses: Losses) -> float:
        """log10 of the best loss, or of the share of the hypervolume that is missing; lower is better."""
        if not self.reference:
            return math.log10(max(float(losses.min()), 1e-9))
        return math.log10(max(1.0 - hypervolume(losses, np.array(self.reference)) / self.best, 1e-6))


def _scalar(name: str, n: int, f: Callable[[Array], float], low: float, high: float, integers: int = 0) -> Problem:
    return Problem(name, n, lambda u: [f(low + (high - low) * u)], integers=integers, start=np.full(n, 0.2))


def _middle(u: Array) -> Array:
    """The middle of the level, as our integer axes are scored."""
    return (np.minimum(np.floor(u * LEVELS), LEVELS - 1) + 0.5) / LEVELS


def _mixed(u: Array) -> Sequence[float]:
    whole = _middle(u[-3:])
    return [float(((u[:-3] - 0.62) ** 2).sum() + ((whole - 0.65) ** 2).sum())]


def _zdt(name: str, n: int) -> Problem:
    """Zitzler, Deb and Thiele 2000."""

    def losses(u: Array) -> Sequence[float]:
        f, g = float(u[0]), 1.0 + 9.0 * float(u[1:].mean())
        h = {"zdt1": 1 - math.sqrt(f / g), "zdt2": 1 - (f / g) ** 2}
        h["zdt3"] = h["zdt1"] - f / g * math.sin(10 * math.pi * f)
        return [f, g * h[name]]

    # The area below the reference that the true front (g = 1) dominates: 31/6, 29/6 and 5.627.
    lowest = np.minimum.accumulate([losses(np.array([f, 0.0]))[1] for f in np.linspace(0, 1, 10_001)])
    best = 1.1 * 5.0 - float(np.trapezoid(lowest, dx=1e-4)) - 0.1 * lowest[-1]
    return Problem(name, n, losses, (1.1, 5.0), best, start=np.full(n, 0.5))


def _dtlz2(n: int) -> Problem:
    """Deb, Thiele, Laumanns and Zitzler 2002, three objectives: the front is an eighth of the unit sphere."""

    def losses(u: Array) -> Sequence[float]:
        g = 1 + float(((u[2:] - 0.5) ** 2).sum())
        a, b = (float(x) * math.pi / 2 for x in u[:2])
        return [g * math.cos(a) * math.cos(b), g * math.cos(a) * math.sin(b), g * math.sin(a)]

    # The middle of the cube would lie on the front.
    return Problem("dtlz2", n, losses, (2.0, 2.0, 2.0), 8 - math.pi / 6, start=np.full(n, 0.2))


def _bowls(n: int) -> Problem:
    """Squared distances from three points: the Pareto set is the triangle between them, and nothing lies on a side."""
    centres = np.random.default_rng(3).random((3, n)) * 0.8 + 0.1

    def losses(u: Array) -> Sequence[float]:
        return [float(((u - c) ** 2).sum()) for c in centres]

    triangle = np.random.default_rng(4).dirichlet(np.ones(3), 600) @ centres
    best = hypervolume(np.array([losses(u) for u in triangle]), np.full(3, 1.5))
    return Problem("bowls", n, losses, (1.5,) * 3, best, start=np.full(n, 0.2))


SPHERE = _scalar("sphere", 8, lambda x: float((x**2).sum()), -5, 7)
PROBLEMS = {
    p.name: p
    for p in (
        SPHERE,
        _scalar("ellipsoid", 8, lambda x: float(np.geomspace(1, 1e4, len(x)) @ x**2), -5, 7),
        _scalar(
            "rosenbrock",
            6,
            lambda x: float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()),
            -3,
            4,
        ),
        _scalar("rastrigin", 5, lambda x: float((x**2 - 10 * np.cos(2 * math.pi * x) + 10).sum()), -5, 7),
        _scalar("valley", 3, lambda x: float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()), -3, 4),
        Problem("mixed", 8, _mixed, integers=3, start=np.full(8, 0.25)),
        _zdt("zdt1", 10),
        _zdt("zdt2", 10),
        _zdt("zdt3", 10),
        _dtlz2(10),
    )
}


# -- ours and theirs ------------------------------------------------------------------------------------------


def seeded(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def ours(algorithm: str, problem: Problem, budget: int, seed: int, **settings: float) -> tuple[Array, Losses]:
    """Genomes and losses of all candidates."""
    opt = make_optimizer(
        algorithm,
        problem.axes,
        Start(frozen_genome(problem.start), problem.objectives),
        seeded(seed),
        itertools.count(),
        make_options(algorithm, settings),
    )
    genomes: list[Array] = []
    losses: list[Sequence[float]] = []
    while len(losses) < budget and not opt.stop():
        for p in opt.ask(budget - len(losses)):
            assert p.genome is not None
            genomes.append(p.genome)
            losses.append(problem.losses(p.genome))
            opt.tell(p, Result(np.array(losses[-1])))
    return np.array(genomes), np.array(losses)


class Counted:
    """A problem that remembers what it was asked."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.seen = problem, []  # type: ignore[var-annotated]

    def __call__(self, u: Any) -> Sequence[float]:
        self.seen.append(self.problem.losses(np.clip(np.asarray(u, float), 0, 1)))
        return self.seen[-1]  # type: ignore[no-any-return]


def pycma(problem: Problem, budget: int, seed: int) -> Losses:
    """pycma's own loop with its own restarts (fmin2, doubled population), its own integers where there are some."""
    cma = import_cma()
    counted, k = Counted(problem), problem.integers
    # Integer axes are scaled so that pycma's levels are whole numbers.
    scale = np.array([1.0] * (problem.n - k) + [LEVELS] * k)
    shift = np.array([0.0] * (problem.n - k) + [0.5] * k)
    options = {
        "bounds": [list(0 * scale - shift), list(scale - shift)],
        "seed": seed + 1,
        "maxfevals": budget,
        "verbose": -9,
        "verb_log": 0,
        "CMA_stds": scale,
        "integer_variables": list(range(problem.n - k, problem.n)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = np.random.get_state()  # noqa: NPY002
        cma.fmin2(
            lambda x: counted((x + shift) / scale)[0],
            problem.start * scale - shift,
            1 / 6,
            options,
            restarts=9,
            incpopsize=2,
        )
        np.random.set_state(state)  # noqa: NPY002
    return np.array(counted.seen[:budget])


def pymoo(algorithm: str, problem: Problem, budget: int, seed: int) -> Losses:
    """pymoo's own algorithm with its defaults, from uniform points and our start."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.moo.nsga3 import NSGA3
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.optimize import minimize
    from pymoo.util.ref_dirs import get_reference_directions

    counted, population = Counted(problem), make_options(algorithm, {}).population

    class Wrapped(ElementwiseProblem):  # type: ignore[misc]
        def _evaluate(self, x: Array, out: dict[str, Any], *_: Any, **__: Any) -> None:
            out["F"] = counted(x)

    first = seeded(seed + 1000).random((population, problem.n))
    first[0] = problem.start
    make = {
        "nsga-ii": lambda: NSGA2(pop_size=population, sampling=first),
        "nsga-iii": lambda: NSGA3(
            get_reference_directions("das-dennis", 3, n_partitions=6), pop_size=population, sampling=first
        ),
    }
    wrapped = Wrapped(n_var=problem.n, n_obj=problem.objectives, xl=0.0, xu=1.0)
    minimize(wrapped, make[algorithm](), ("n_eval", budget), seed=seed + 1, verbose=False)
    return np.array(counted.seen[:budget])


def params_of(trial: Any, axes: Sequence[Axis]) -> Array:
    """The genome of a trial that suggests every axis as what it is: a float, a whole number, a choice."""
    out = []
    for a in axes:
        if a.levels is None:
            out.append(trial.suggest_float(a.name, 0.0, 1.0))
        elif a.kind == "int":
            out.append((trial.suggest_int(a.name, 0, a.levels - 1) + 0.5) / a.levels)
        else:
            out.append((trial.suggest_categorical(a.name, tuple(range(a.levels))) + 0.5) / a.levels)
    return np.array(out)


def optuna(problem: Problem, budget: int, sampler: Any, group: int = 1) -> tuple[Array, Losses]:
    """Optuna's own loop: `study.optimize`, or with `group` above 1 that many asks before their tells."""
    study = import_optuna().create_study(sampler=sampler, directions=["minimize"] * problem.objectives)
    start = {
        a.name: float(u) if a.levels is None else int(u * a.levels)
        for a, u in zip(problem.axes, problem.start, strict=True)
    }
    study.enqueue_trial(start)
    genomes, losses = [], []

    def objective(trial: Any) -> Any:
        _ = trial.relative_params  # else an enqueued trial is of no generation
        genomes.append(params_of(trial, problem.axes))
        losses.append(problem.losses(genomes[-1]))
        return tuple(losses[-1])

    if group == 1:
        study.optimize(objective, n_trials=budget)
    while len(losses) < budget:
        for trial, told in [(t := study.ask(), objective(t)) for _ in range(min(group, budget - len(losses)))]:
            study.tell(trial, told)
    return np.array(genomes), np.array(losses)


def worse_by(ours: Array, theirs: Array) -> tuple[float, float]:
    """95% bootstrap interval of the mean of ours minus the mean of theirs."""
    rng = np.random.default_rng(0)
    a, b = (x[rng.integers(len(x), size=(4000, len(x)))].mean(axis=1) for x in (ours, theirs))
    low, high = np.quantile(a - b, [0.025, 0.975])
    return float(low), float(high)


# -- the same trajectories ------------------------------------------------------------------------------------


def seed_of(seed: int) -> int:
    """What a sampler is seeded with: the first draw of the search's own generator."""
    return int(seeded(seed).integers(2**32))


def mixed_axes(*, objectives: int) -> Problem:
    """Floats, whole numbers and a choice."""

    class Mixed(Problem):
        @property
        def axes(self) -> tuple[Axis, ...]:
            return (*super().axes, Axis("choice", "categorical", choices=("a", "b", "c")))

    def losses(u: Array) -> Sequence[float]:
        return [float(((u - (i + 1) / 5) ** 2).sum()) for i in range(objectives)]

    return Mixed("axes", 5, losses, (9.0,) * objectives if objectives > 1 else (), integers=2, start=np.full(6, 0.3))


def nsga(optuna: Any) -> dict[str, Any]:
    operators = optuna.samplers.nsgaii
    return {
        "population_size": 12,
        "crossover": operators.SBXCrossover(eta=20),
        "crossover_prob": 0.9,
        "mutation": operators.PolynomialMutation(eta=20),
    }


SAMPLERS: dict[str, tuple[int, Callable[[Any, int], Any]]] = {
    "nsga-ii": (2, lambda o, seed: o.samplers.NSGAIISampler(**nsga(o), seed=seed)),
    "nsga-iii": (3, lambda o, seed: o.samplers.NSGAIIISampler(**nsga(o), dividing_parameter=6, seed=seed)),
    "tpe": (1, lambda o, seed: o.samplers.TPESampler(n_startup_trials=16, multivariate=True, seed=seed)),
}


@pytest.mark.parametrize(
    ("algorithm", "group", "settings"),
    [
        ("nsga-ii", 1, {"population": 12}),
        ("nsga-ii", 12, {"population": 12}),
        ("nsga-iii", 1, {"population": 12}),
        ("tpe", 1, {"population": 1}),
        ("tpe", 4, {}),
    ],
)
def test_same_trajectory_as_optuna(algorithm: str, group: int, settings: dict[str, float]) -> None:
    """Behind our ask and tell a seeded sampler gives the points that it gives in Optuna's own loop, bit for bit."""
    objectives, sampler = SAMPLERS[algorithm]
    problem = mixed_axes(objectives=objectives)

    mine, _ = ours(algorithm, problem, 60, 3, **settings)
    theirs, _ = optuna(problem, 60, made(lambda o: sampler(o, seed_of(3))), group)

    assert mine.shape == (60, 6)
    assert np.unique(mine, axis=0).shape[0] > 40
    assert mine.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("algorithm", ["nsga-ii", "nsga-iii"])
def test_the_start_has_children(algorithm: str) -> None:
    """A start that nothing dominates is a member of the first generation: the second one has its genes."""
    problem = mixed_axes(objectives=SAMPLERS[algorithm][0])
    start = problem.start.copy()
    best = Problem("start", 6, lambda u: [float(((u - start) ** 2).sum())] * problem.objectives, problem.reference)
    best = dataclasses.replace(best, start=start)

    genomes, _ = ours(algorithm, best, 24, 3, population=12)

    assert not (genomes[1:12] == start).any()
    assert (genomes[12:] == start).any()


def test_same_trajectory_as_optunas_gp() -> None:
    """The same for the Gaussian process, which has a sampler of its own for every ask."""
    problem, study = mixed_axes(objectives=1), import_optuna().create_study()
    study.enqueue_trial({"x0": 0.3, "x1": 0.3, "x2": 0.3, "n0": 3, "n1": 3, "choice": 0})
    theirs = []
    for k in range(12):
        seed = int(np.random.SeedSequence([seed_of(3), k]).generate_state(1)[0])
        study.sampler = made(lambda o, s=seed: o.samplers.GPSampler(seed=s, n_startup_trials=10))
        trial = study.ask()
        theirs.append(params_of(trial, problem.axes))
        study.tell(trial, problem.losses(theirs[-1])[0])

    mine, _ = ours("gp", problem, 12, 3, population=1)

    assert mine.tobytes() == np.array(theirs).tobytes()


# -- as good, over many seeds ---------------------------------------------------------------------------------

MARGIN = {1: 0.5, 2: 0.1, 3: 0.1}
"""By number of objectives, in decades: of the best loss, which differs by about as much from seed to seed, and of the
missing hypervolume."""


def theirs(algorithm: str, problem: Problem, budget: int, seed: int) -> Losses:
    """The implementation that an algorithm is compared with, as its authors run it; Optuna's asks one at a time."""
    if algorithm == "cma-es":
        return pycma(problem, budget, seed)
    if algorithm.startswith("nsga"):
        return pymoo(algorithm, problem, budget, seed)
    sampler = {
        "tpe": lambda o: o.samplers.TPESampler(n_startup_trials=16, multivariate=True, seed=seed + 500),
        "gp": lambda o: o.samplers.GPSampler(n_startup_trials=10, seed=seed + 500),
    }
    return optuna(problem, budget, made(sampler[algorithm]))[1]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("algorithm", "name", "budget", "seeds"),
    [
        ("cma-es", "sphere", 300, 24),
        ("nsga-ii", "zdt1", 200, 6),
        pytest.param("cma-es", "sphere", 500, 40, marks=SLOW),
        pytest.param("cma-es", "ellipsoid", 800, 40, marks=SLOW),
        pytest.param("cma-es", "rosenbrock", 1000, 40, marks=SLOW),
        pytest.param("cma-es", "rastrigin", 1500, 40, marks=SLOW),
        pytest.param("cma-es", "mixed", 500, 40, marks=SLOW),
        pytest.param("nsga-ii", "zdt1", 600, 16, marks=SLOW),
        pytest.param("nsga-ii", "zdt2", 600, 16, marks=SLOW),
        pytest.param("nsga-ii", "zdt3", 600, 16, marks=SLOW),
        pytest.param("nsga-iii", "dtlz2", 600, 16, marks=SLOW),
        pytest.param("tpe", "sphere", 150, 16, marks=SLOW),
        pytest.param("tpe", "mixed", 150, 16, marks=SLOW),
        pytest.param("gp", "valley", 30, 8, marks=[SLOW, pytest.mark.timeout(300)]),
    ],
)
def test_not_inferior(algorithm: str, name: str, budget: int, seeds: int) -> None:
    """From the same start and with equal budgets ours is not worse than theirs by more than the margin."""
    problem = PROBLEMS[name]

    # In groups a Gaussian process sees less with the same budget; by itself it is the same.
    alone = {"population": 1} if algorithm == "gp" else {}
    mine = np.array([problem.score(ours(algorithm, problem, budget, s, **alone)[1]) for s in range(seeds)])
    other = np.array([problem.score(theirs(algorithm, problem, budget, s)) for s in range(seeds)])

    low, high = worse_by(mine, other)
    assert high < MARGIN[problem.objectives], f"{mine.mean():.3f} against {other.mean():.3f} [{low:.3f}, {high:.3f}]"
    begin = problem.score(np.array([problem.losses(problem.start)]))
    assert max(mine.mean(), other.mean()) < begin - 0.2, "both searched"


FEW_AXES = {p.name: p for p in (_bowls(3), _zdt("zdt1", 4), _zdt("zdt3", 4), _dtlz2(4))}


@pytest.mark.parametrize(
    ("algorithm", "name", "budget", "seeds"),
    [
        ("map", "bowls", 35, 3),
        pytest.param("map", "bowls", 45, 12, marks=SLOW),
        pytest.param("map", "zdt1", 60, 12, marks=SLOW),
        pytest.param("map", "zdt3", 60, 12, marks=SLOW),
        pytest.param("map", "dtlz2", 60, 12, marks=SLOW),
        pytest.param("bayesian-map", "bowls", 45, 12, marks=SLOW),
        pytest.param("bayesian-map", "zdt1", 60, 12, marks=SLOW),
        pytest.param("bayesian-map", "dtlz2", 60, 12, marks=SLOW),
    ],
)
def test_surrogates_are_not_inferior_to_nsga2(algorithm: str, name: str, budget: int, seeds: int) -> None:
    """In few axes and with budgets of a few generations they miss no more hypervolume than NSGA-II."""
    problem = FEW_AXES[name]

    mine = np.array([problem.score(ours(algorithm, problem, budget, s)[1]) for s in range(seeds)])
    other = np.array([problem.score(ours("nsga-ii", problem, budget, s, population=10)[1]) for s in range(seeds)])

    low, high = worse_by(mine, other)
    assert high < MARGIN[problem.objectives], f"{mine.mean():.3f} against {other.mean():.3f} [{low:.3f}, {high:.3f}]"


def test_an_inferior_search_is_seen() -> None:
    """The comparison fails where it should: random search is worse than CMA-ES by more than the margin."""
    problem = PROBLEMS["sphere"]
    scores = {a: np.array([problem.score(ours(a, problem, 300, s)[1]) for s in range(8)]) for a in ("random", "cma-es")}

    assert worse_by(scores["random"], scores["cma-es"])[1] > MARGIN[1]
