"""The exam that every search algorithm takes: a new line in ALGORITHMS inherits all of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from evomerge.errors import UserError
from evomerge.proposal import Genome, Proposal, Result, frozen_genome
from evomerge.search import ALGORITHMS, make_optimizer, make_options, needs_of
from evomerge.search.archive import Dimension
from evomerge.search.base import Needs, Optimizer, Selective, Start
from evomerge.space import Axis

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "map with gradients": ("map", {"gradients": True}),
    "bayesian-map with gradients": ("bayesian-map", {"gradients": True}),
}
"""Settings that ask something else of the driver take the exam too."""
SLOW = {"gp": 14, "bayesian-map": 50, "bayesian-map with gradients": 50}
"""Algorithms that take long to ask: their exam is in the slow tier, with as many evaluations where more are no better
an exam: for gp ten uniform points and one group of the process, for bayesian-map its design and two generations."""
GENOMES = [*(a for a in ALGORITHMS if needs_of(a).proposes == "genomes"), *VARIANTS]
"""Those that propose recipes have an exam of their own (test_recipes.py)."""
pytestmark = pytest.mark.parametrize(
    "algorithm", [pytest.param(a, marks=[pytest.mark.slow] if a in SLOW else []) for a in GENOMES]
)

Loss = Callable[[Genome], float]


MIDDLE = frozen_genome([0.5])
MEASURES = (Dimension("first", 0.0, 1.0, 6), Dimension("last", 0.0, 1.0, 6))


def floats(n: int) -> tuple[Axis, ...]:
    return tuple(Axis(f"x{i}") for i in range(n))


def options_of(algorithm: str, settings: dict[str, Any]) -> Any:
    name, own = VARIANTS.get(algorithm, (algorithm, {}))
    return make_options(name, {**own, **settings})


def needs(algorithm: str) -> Needs:
    return needs_of(VARIANTS.get(algorithm, (algorithm,))[0], options_of(algorithm, {}))


def made(algorithm: str, axes: Sequence[Axis], start: Start, rng: Any, ids: Any, **settings: Any) -> Optimizer:
    name = VARIANTS.get(algorithm, (algorithm,))[0]
    return make_optimizer(name, axes, start, rng, ids, options_of(algorithm, settings))


def optimizer(
    algorithm: str, axes: Sequence[Axis] | int = 3, seed: int = 1, start: float = 0.3, first_id: int = 0
) -> Optimizer:
    axes = floats(axes) if isinstance(axes, int) else axes
    rng = np.random.Generator(np.random.PCG64(seed))
    begin = start_at(algorithm, frozen_genome(np.full(len(axes), start)))
    return made(algorithm, axes, begin, rng, itertools.count(first_id))


def start_at(algorithm: str, genome: Genome) -> Start:
    """A start with as many objectives as an algorithm needs, and measures where it needs them."""
    count = 2 if needs(algorithm).objectives == "several" else 1
    return Start(genome, count, measures=MEASURES if needs(algorithm).measures else ())


def skip_without_choices(algorithm: str) -> None:
    """Models of the losses need ordered axes; `prepare` refuses others for them."""
    if "categorical" not in needs(algorithm).axis_kinds:
        pytest.skip("searches ordered axes only")


def genome_of(p: Proposal) -> Genome:
    assert p.genome is not None
    return p.genome


def sphere(g: Genome) -> float:
    return float(((g - 0.71) ** 2).sum())


def told(loss: float, opt: Optimizer, p: Proposal) -> Result:
    """A result; a second objective, where it is needed, pulls the same way, the gradient is the sphere's, and two genes
    are measured."""
    count = 2 if opt.needs.objectives == "several" else 1
    status = "ok" if math.isfinite(loss) else "failed:nan"
    asked = opt.differentiates if isinstance(opt, Selective) else opt.needs.gradients
    slope = 2 * (genome_of(p) - 0.71)
    gradient = np.array([slope, 2 * slope][:count]) if asked and math.isfinite(loss) else None
    measures = genome_of(p)[[0, -1]] if opt.needs.measures else np.zeros(0)
    return Result(np.array([loss, 2 * loss][:count]), status, measures=measures, gradient=gradient)


def skip_descent(algorithm: str, why: str) -> None:
    if needs(algorithm).gradients and needs(algorithm).design is None:
        pytest.skip(f"follows gradients: {why}")


def search(opt: Optimizer, budget: int, loss: Loss = sphere, slice_: int = 10**6) -> list[tuple[Proposal, float]]:
    """Ask, score and tell in proposal order until the budget is spent."""
    done: list[tuple[Proposal, float]] = []
    while len(done) < budget and not opt.stop():
        group: list[Proposal] = []
        while part := opt.ask(min(slice_, budget - len(done) - len(group))):
            group += part
            if len(done) + len(group) == budget:
                break
        for p in group:
            value = loss(genome_of(p))
            opt.tell(p, told(value, opt, p))
            done.append((p, value))
    return done


def few(algorithm: str, budget: int, least: int = 0) -> int:
    """The budget, or what is enough of an algorithm that takes long to ask; `least` where a test needs more."""
    return min(budget, max(SLOW[algorithm], least)) if algorithm in SLOW else budget


def genomes(done: list[tuple[Proposal, float]]) -> np.ndarray[Any, Any]:
    return np.array([p.genome for p, _ in done])


@pytest.mark.parametrize("n", [1, 2, 10, 250])
def test_proposals_are_points_of_the_cube(algorithm: str, n: int) -> None:
    """In every dimension genomes are read-only float64 vectors of the unit cube, without a recipe."""
    if algorithm in SLOW and n > 100:
        pytest.skip("meant for few axes")
    if n > (needs(algorithm).most_axes or n):
        pytest.skip("takes fewer axes")
    opt, budget = optimizer(algorithm, n), few(algorithm, 60)

    done = search(opt, budget)

    assert len(done) == budget
    for p, _ in done:
        g = genome_of(p)
        assert g.shape == (n,)
        assert g.dtype == np.float64
        assert not g.flags.writeable
        assert g.min() >= 0.0
        assert g.max() <= 1.0
        assert p.recipe is None


def test_ask_gives_at_most_what_was_asked_for(algorithm: str) -> None:
    """ask(n) returns 0 to n proposals, and [] while the tells of a generation are awaited (if it awaits any)."""
    opt = optimizer(algorithm)
    group: list[Proposal] = []

    while len(group) < 1000:
        part = opt.ask(3)
        assert len(part) <= 3
        if not part:
            break
        group += part

    assert group
    if opt.needs.steady:
        assert opt.ask(1), "a steady-state algorithm may always be asked"
        return
    assert opt.ask(100) == []
    assert len({p.group for p in group}) == 1


def test_a_partly_told_generation_keeps_waiting(algorithm: str) -> None:
    """No proposal of the next generation appears before the last tell of this one."""
    opt = optimizer(algorithm)
    group = opt.ask(10**6)

    for p in group[:-1]:
        opt.tell(p, told(1.0, opt, p))
        assert opt.needs.steady or opt.ask(10) == []
    opt.tell(group[-1], told(1.0, opt, group[-1]))

    assert [p.group for p in opt.ask(1)] == [group[0].group + 1]


def test_ids_come_from_the_shared_iterator(algorithm: str) -> None:
    """Numbers go up in the order of asking, without gaps, from where the run's iterator stands."""
    opt = optimizer(algorithm, first_id=7)

    done = search(opt, few(algorithm, 40))

    assert [p.id for p, _ in done] == list(range(7, 7 + len(done)))


def test_a_stranger_is_refused(algorithm: str) -> None:
    """Telling a proposal that was never asked is an error, and so is one of an earlier generation."""
    opt = optimizer(algorithm)
    first = opt.ask(10**6)
    with pytest.raises(ValueError, match="not waiting"):
        opt.tell(Proposal(999_999, 0, genome=first[0].genome), told(1.0, opt, first[0]))
    for p in first:
        opt.tell(p, told(1.0, opt, p))
    opt.ask(10**6)

    with pytest.raises(ValueError, match="not waiting"):
        opt.tell(first[0], told(1.0, opt, first[0]))


def test_told_twice_is_refused(algorithm: str) -> None:
    """The second tell of a proposal is an error and changes nothing."""
    opt, other = optimizer(algorithm), optimizer(algorithm)
    group = opt.ask(10**6)
    opt.tell(group[0], told(2.0, opt, group[0]))

    with pytest.raises(ValueError, match="not waiting"):
        opt.tell(group[0], told(0.0, opt, group[0]))

    for p in group[1:]:
        opt.tell(p, told(sphere(genome_of(p)), opt, p))
    for p in other.ask(10**6):
        other.tell(p, told(2.0 if p.id == 0 else sphere(genome_of(p)), other, p))
    assert [genome_of(p).tobytes() for p in opt.ask(9)] == [genome_of(p).tobytes() for p in other.ask(9)]


def test_nan_is_refused(algorithm: str) -> None:
    """A loss of NaN is an error; the proposal still waits and may be told +inf."""
    opt = optimizer(algorithm)
    group = opt.ask(10**6)

    with pytest.raises(ValueError, match="NaN"):
        opt.tell(group[0], told(math.nan, opt, group[0]))

    for p in group:
        opt.tell(p, told(math.inf, opt, p))
    assert opt.ask(1)


def test_another_number_of_losses_is_refused(algorithm: str) -> None:
    """A search says so when it is told another number of losses than it has, and keeps waiting."""
    opt = optimizer(algorithm)
    if algorithm == "random":
        pytest.skip("learns nothing from losses, so takes any number")
    group = opt.ask(10**6)

    with pytest.raises(ValueError, match="3 losses"):
        opt.tell(group[0], Result(np.array([1.0, 2.0, 3.0])))

    for p in group:
        opt.tell(p, told(1.0, opt, p))
    assert opt.ask(1)


def test_same_seed_same_trajectory(algorithm: str) -> None:
    """Equal seeds give equal genomes, bit for bit, whatever else happened to numpy's global generator."""
    first = search(optimizer(algorithm, 5, seed=3), few(algorithm, 120))
    np.random.seed(99)  # noqa: NPY002
    second = search(optimizer(algorithm, 5, seed=3), few(algorithm, 120))

    assert genomes(first).tobytes() == genomes(second).tobytes()


def test_another_seed_differs(algorithm: str) -> None:
    """Another seed gives other genomes from the first generation on."""
    skip_descent(algorithm, "draws nothing")
    first, second = (genomes(search(optimizer(algorithm, seed=s), few(algorithm, 20))) for s in (3, 4))

    assert not np.array_equal(first[1:4], second[1:4])


def test_global_generator_is_untouched(algorithm: str) -> None:
    """A whole search leaves numpy's global generator exactly as it was."""
    np.random.seed(5)  # noqa: NPY002
    before = np.random.get_state()  # noqa: NPY002

    opt = optimizer(algorithm, 4)
    search(opt, few(algorithm, 100))
    opt.recommend(2)

    after = np.random.get_state()  # noqa: NPY002
    assert before[0] == after[0]
    assert np.array_equal(before[1], after[1])
    assert before[2:] == after[2:]


def test_slicing_does_not_matter(algorithm: str) -> None:
    """ask(1) again and again gives the same proposals as asking for a whole generation."""
    whole = search(optimizer(algorithm, 4), few(algorithm, 90))
    sliced = search(optimizer(algorithm, 4), few(algorithm, 90), slice_=1)
    threes = search(optimizer(algorithm, 4), few(algorithm, 90), slice_=3)

    for other in (sliced, threes):
        assert [(p.id, p.group) for p, _ in whole] == [(p.id, p.group) for p, _ in other]
        assert genomes(whole).tobytes() == genomes(other).tobytes()


def test_generations_of_failures_are_survived(algorithm: str) -> None:
    """Where everything fails the search goes on asking, and still learns nothing it should not."""
    opt = optimizer(algorithm)

    done = search(opt, 80, lambda g: math.inf)

    assert len(done) == 80
    assert not opt.stop()
    assert all(np.isfinite(genome_of(p)).all() for p in opt.recommend(3))
    assert len(search(opt, 40)) == 40


def test_mixed_failures_are_survived(algorithm: str) -> None:
    """Half the cube fails; the search goes on and its best lies in the other half."""
    skip_descent(algorithm, "the start is known to be scored, and this one fails")
    opt = optimizer(algorithm)

    budget = few(algorithm, 200)
    done = search(opt, budget, lambda g: math.inf if g[0] < 0.5 else sphere(g))

    assert len(done) == budget
    best, loss = min(done, key=lambda d: d[1])
    assert math.isfinite(loss)
    assert genome_of(best)[0] >= 0.5


def test_improves_on_its_start(algorithm: str) -> None:
    """Within 300 evaluations of a smooth bowl the best is at least ten times better than the start."""
    opt = optimizer(algorithm, 3)

    done = search(opt, few(algorithm, 300, least=26))

    assert min(loss for _, loss in done) < sphere(np.full(3, 0.3)) / 10


def test_recommendations_are_proposals_of_the_cube(algorithm: str) -> None:
    """recommend(k) gives at most k valid proposals with new numbers, and none before anything was told."""
    opt = optimizer(algorithm, 6)
    assert opt.recommend(3) == []
    done = search(opt, few(algorithm, 100))

    out = opt.recommend(3)

    assert len(out) <= 3
    assert opt.recommend(0) == []
    taken = {p.id for p, _ in done}
    for p in out:
        g = genome_of(p)
        assert g.shape == (6,)
        assert not g.flags.writeable
        assert 0.0 <= g.min() <= g.max() <= 1.0
        assert p.id not in taken


def test_recommending_does_not_change_the_search(algorithm: str) -> None:
    """A look at the recommendation in between draws nothing: the genomes that follow are the same."""
    first, second = optimizer(algorithm), optimizer(algorithm)
    for opt in (first, second):
        search(opt, few(algorithm, 32))

    second.recommend(2)

    rest = 30 if algorithm not in SLOW else 4
    assert genomes(search(first, rest)).tobytes() == genomes(search(second, rest)).tobytes()


def test_replay_reproduces_the_genomes(algorithm: str) -> None:
    """Feeding the recorded losses into a fresh optimizer asks the recorded genomes again, failures included."""
    recorded = search(optimizer(algorithm, 5), few(algorithm, 150), lambda g: math.inf if g[1] > 0.9 else sphere(g))
    losses = iter([loss for _, loss in recorded])

    replayed = search(optimizer(algorithm, 5), few(algorithm, 150), lambda g: next(losses))

    assert genomes(recorded).tobytes() == genomes(replayed).tobytes()


def test_told_with_a_drifted_genome(algorithm: str) -> None:
    """A journalled genome that differs in the last bits is told without error, and the search stays close."""
    exact = optimizer(algorithm, 4)
    drifted = optimizer(algorithm, 4)
    for _ in range(6):
        for a, b in zip(exact.ask(10**6), drifted.ask(10**6), strict=True):
            g = frozen_genome(np.clip(genome_of(b) + 1e-9, 0.0, 1.0))
            assert np.abs(g - genome_of(a)).max() < 1e-6
            loss = sphere(genome_of(a))
            exact.tell(a, told(loss, exact, a))
            drifted.tell(Proposal(b.id, b.group, genome=g), told(loss, drifted, a))

    assert np.abs(genome_of(exact.ask(1)[0]) - genome_of(drifted.ask(1)[0])).max() < 1e-6


def test_proposals_carry_no_hidden_link(algorithm: str) -> None:
    """The start that was handed in stays as it was, and genomes share no memory with it that could change."""
    start = frozen_genome([0.25, 0.5])
    before = start.tobytes()
    rng = np.random.Generator(np.random.PCG64(1))
    begin = start_at(algorithm, start)
    opt = made(algorithm, floats(2), begin, rng, itertools.count())

    search(opt, few(algorithm, 60))

    assert start.tobytes() == before


def test_axes_of_all_kinds(algorithm: str) -> None:
    """Float, int and categorical axes are searched together, and every level of each is tried."""
    skip_without_choices(algorithm)
    axes = (
        Axis("x"),
        Axis("n", "int", 0, 4, default=2.0),
        Axis("c", "categorical", choices=("a", "b", "c"), default="b"),
    )
    opt = optimizer(algorithm, axes, start=0.5)

    done = search(opt, few(algorithm, 200, least=30), lambda g: float((g[0] - 0.2) ** 2))

    assert {axes[1].value(float(genome_of(p)[1])) for p, _ in done} == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert {axes[2].value(float(genome_of(p)[2])) for p, _ in done} == {"a", "b", "c"}


def any_method() -> tuple[Axis, ...]:
    """A choice of method with weights for all of them and a density for one of them only."""
    return (
        Axis("method", "categorical", choices=("a", "b", "c"), default="a"),
        Axis("w"),
        Axis("density", when=("method", frozenset({"b"}))),
        Axis("count", "int", 0, 5),
    )


def conditional(g: Genome) -> float:
    """Best in method b with weight 0.7 and density 0.2; the density says nothing elsewhere."""
    axes = any_method()
    method = axes[0].value(float(g[0]))
    own = (g[2] - 0.2) ** 2 if method == "b" else 0.3 + 0.1 * (method == "c")
    return float((g[1] - 0.7) ** 2 + own + 0.01 * float(axes[3].value(float(g[3]))))


def test_a_mixed_conditional_space(algorithm: str) -> None:
    """From a start in method a, 300 evaluations (fewer for slow ones) find method b and what is best in it."""
    skip_without_choices(algorithm)
    axes = any_method()
    found = []
    for seed in range(1 if algorithm in SLOW else 5):
        opt = optimizer(algorithm, axes, seed=seed, start=1 / 6)
        done = search(opt, few(algorithm, 300, least=40), conditional)
        best, loss = min(done, key=lambda d: d[1])

        assert {axes[0].value(float(genome_of(p)[0])) for p, _ in done} == {"a", "b", "c"}
        found.append(axes[0].value(float(genome_of(best)[0])) == "b" and loss < 0.1)
    assert all(found)


def test_inert_genes_do_not_hurt(algorithm: str) -> None:
    """Where a gene says nothing at all, equal losses are no failure and no reason to stop."""
    skip_without_choices(algorithm)
    axes = (*any_method(), *(Axis(f"inert{i}", when=("method", frozenset({"c"}))) for i in range(4)))
    opt = optimizer(algorithm, axes, start=0.5)

    budget = few(algorithm, 200)
    done = search(opt, budget, lambda g: float(axes[0].value(float(g[0])) != "a"))

    assert len(done) == budget
    assert min(loss for _, loss in done) == 0.0


def test_unknown_axis_kind_is_refused(algorithm: str) -> None:
    """An axis kind outside the algorithm's needs is refused by name before the search begins."""
    axis: Any = Axis("perm", "permutation")  # type: ignore[arg-type]
    rng = np.random.Generator(np.random.PCG64(1))

    start = start_at(algorithm, frozen_genome([0.5]))
    with pytest.raises(UserError, match=r"cannot search the permutation axis 'perm'"):
        made(algorithm, [axis], start, rng, itertools.count())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"populatoin": 8}, "no setting 'populatoin'; did you mean 'population'"),
        ({"population": "8"}, "population should be a whole number, got '8'"),
        ({"population": True}, "population should be a whole number, got True"),
        ({"population": 8.5}, "population should be a whole number, got 8.5"),
        ({"population": 0}, "population"),
    ],
)
def test_wrong_settings_are_refused(algorithm: str, settings: dict[str, Any], words: str) -> None:
    """Settings are checked by name, kind and range, each in one line."""
    skip_descent(algorithm, "one proposal a step; its settings are in test_adam.py")
    with pytest.raises(UserError) as caught:
        options_of(algorithm, settings)

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_count(algorithm: str) -> None:
    """`population` sets the size of a generation, for every algorithm that has generations."""
    skip_descent(algorithm, "one proposal a step")
    rng = np.random.Generator(np.random.PCG64(1))
    start = start_at(algorithm, frozen_genome([0.5] * 3))
    opt = made(algorithm, floats(3), start, rng, itertools.count(), population=5)

    assert len(opt.ask(100)) == 5
