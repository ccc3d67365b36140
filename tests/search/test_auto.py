"""What `auto` picks: every rule, settings that fit the budget, and that what it picks can run."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.proposal import Result, frozen_genome
from evomerge.search import make_optimizer, make_options, needs_of
from evomerge.search.auto import RULES, Problem, choose, divisions
from evomerge.search.base import Start
from evomerge.space import Axis

METHODS = Axis("method", "categorical", choices=("a", "b", "c"))
SWITCH = Axis("switch", "categorical", choices=("a", "b"))
CONDITIONAL = Axis("density", when=("switch", frozenset({"a"})))


def floats(n: int) -> tuple[Axis, ...]:
    return tuple(Axis(f"x{i}") for i in range(n))


@pytest.mark.parametrize(
    ("problem", "algorithm"),
    [
        (Problem(floats(3), lag=True), "tpe"),
        (Problem(floats(3), 2, 500, lag=True), "tpe"),
        (Problem(floats(3), 1, 15), "random"),
        (Problem(floats(3), 3, 15), "random"),
        (Problem(floats(3), 2, 79), "tpe"),
        (Problem(floats(3), 2, 80), "nsga-ii"),
        (Problem((*floats(3), METHODS), 2, 80), "nsga-ii"),
        (Problem(floats(3), 3, 80), "nsga-iii"),
        (Problem(floats(3), 2), "nsga-ii"),
        (Problem((*floats(3), METHODS), 1, 400), "tpe"),
        (Problem((*floats(3), SWITCH), 1, 400), "cma-es"),
        (Problem((*floats(3), SWITCH, CONDITIONAL), 1, 400), "tpe"),
        (Problem((*floats(3), Axis("layers", "int", 0, 9)), 1, 400), "cma-es"),
        (Problem(floats(12), 1, 150), "gp"),
        (Problem(floats(12), 1, 151), "cma-es"),
        (Problem(floats(13), 1, 150), "cma-es"),
        (Problem(floats(12), 1), "cma-es"),
        (Problem(floats(13), 1, 43), "tpe"),  # generations of 11
        (Problem(floats(13), 1, 44), "cma-es"),
        (Problem(floats(1000), 1, 95), "tpe"),  # generations of 24
        (Problem(floats(1000), 1, 96), "cma-es"),
    ],
)
def test_rules(problem: Problem, algorithm: str) -> None:
    """The table, at the edges of every rule; the reason names the algorithm and the problem."""
    choice = choose(problem)

    assert choice.algorithm == algorithm
    assert choice.why.startswith(f"{algorithm} (")
    assert problem.describe() in choice.why
    assert "\n" not in choice.why


def test_every_rule_is_reached() -> None:
    """No row of the table stands behind one that holds wherever it does."""
    problems = [
        Problem(axes, m, n, lag)
        for axes in (floats(3), floats(40), (*floats(3), METHODS))
        for m in (1, 2, 3)
        for n in (10, 40, 500)
        for lag in (False, True)
    ]

    assert {next(r.when for r in RULES if r.holds(p)) for p in problems} == {r.when for r in RULES}


AXES = st.lists(st.sampled_from([Axis("x"), METHODS, SWITCH, CONDITIONAL, Axis("n", "int", 0, 3)]), min_size=1)


@given(AXES, st.integers(1, 6), st.none() | st.integers(1, 5000), st.booleans())
def test_whatever_is_picked_can_run(axes: list[Axis], objectives: int, evaluations: int | None, lag: bool) -> None:
    """Objectives and lag are within the algorithm's needs, settings are valid, a population fits into the budget."""
    choice = choose(Problem(axes, objectives, evaluations, lag))
    needs = needs_of(choice.algorithm)

    assert needs.objectives in ("any", "one" if objectives == 1 else "several")
    assert needs.steady or not lag
    options = make_options(choice.algorithm, choice.settings)
    assert evaluations is None or options.population * (1 if choice.algorithm == "random" else 4) <= evaluations or lag
    assert choose(Problem(axes, objectives, evaluations, lag)) == choice


@pytest.mark.parametrize(("objectives", "evaluations"), [(1, 10), (1, 60), (1, 300), (2, 300), (3, 300)])
def test_it_searches(objectives: int, evaluations: int) -> None:
    """An optimizer is made of the choice and asked for its first group."""
    axes = floats(20)
    choice = choose(Problem(axes, objectives, evaluations))
    start, rng = Start(frozen_genome(np.full(20, 0.5)), objectives), np.random.default_rng(1)
    opt = make_optimizer(
        choice.algorithm, axes, start, rng, itertools.count(), make_options(choice.algorithm, choice.settings)
    )

    group = opt.ask(evaluations)
    for p in group:
        opt.tell(p, Result(np.ones(objectives)))
    assert len(group) == choice.settings["population"]
    assert opt.ask(1)


@pytest.mark.parametrize(("objectives", "population", "parts"), [(3, 20, 4), (3, 28, 6), (3, 100, 12), (10, 20, 1)])
def test_directions_do_not_outnumber_the_population(objectives: int, population: int, parts: int) -> None:
    """As many reference directions as there is room for; one division more would be too many."""
    assert divisions(objectives, population) == parts
    assert math.comb(objectives + parts - 1, parts) <= population < math.comb(objectives + parts, parts + 1)
