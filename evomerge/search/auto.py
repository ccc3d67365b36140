"""`search.algorithm: auto`: an algorithm and its settings from the space, the objectives and the budget.

Rules of thumb of the field, first match wins: `RULES` is the whole of it. The choice is made once, when a run begins,
and stands in its experiment.yaml from then on. Constraints and workers change nothing: where an algorithm does not
know constraints, who violates them is ranked behind all who do not.

Hansen et al. 2010 (BBOB) for CMA-ES once some generations can be paid, Bergstra et al. 2011 for tree-structured
spaces, Jones et al. 1998 for models where evaluations are few, Deb et al. 2002 and Deb and Jain 2014 for fronts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evomerge.search.cmaes import FULL_COVARIANCE_AXES, default_population
from evomerge.space import Axis

AUTO = "auto"
GENERATIONS = 4
"""With fewer generations an algorithm that learns from whole ones ends before it has learned anything."""
TINY_BUDGET = 16
"""Below this many candidates a model of the losses would rest on almost nothing."""
GP_AXES, GP_BUDGET = 12, 150
"""Up to here a Gaussian process finds more with every evaluation than others, and fits in seconds."""
LEAST_FRONT, MOST_FRONT = 20, 100
"""Bounds of a population that has to hold a front."""


@dataclass(frozen=True)
class Problem:
    """What is known of one stage before it begins. `evaluations` is None under a budget of time."""

    axes: Sequence[Axis]
    objectives: int = 1
    evaluations: int | None = None
    lag: bool = False
    """Whether a steady state is asked for."""

    @property
    def budget(self) -> float:
        """Evaluations, where time alone is limited without bound."""
        return math.inf if self.evaluations is None else self.evaluations

    @property
    def unordered(self) -> bool:
        """Whether an axis has choices without an order (two can always be ordered), or is not always in use."""
        return any(a.when is not None or (a.kind == "categorical" and (a.levels or 0) > 2) for a in self.axes)

    def describe(self) -> str:
        """In words."""
        axes = f"{len(self.axes)} {'unordered or conditional ' if self.unordered else ''}axes"
        goals = "one objective" if self.objectives == 1 else f"{self.objectives} objectives"
        budget = "a budget of time" if self.evaluations is None else f"{self.evaluations} candidates"
        return f"{axes}, {goals}, {budget}"


class Rule(NamedTuple):
    """One row of the table: where it holds, what it picks, why."""

    when: str
    algorithm: str
    why: str
    holds: Callable[[Problem], bool]


RULES = (
    Rule("`lag` is set", "tpe", "of those with a steady state it is the one that learns", lambda p: p.lag),
    Rule(
        f"fewer than {TINY_BUDGET} candidates",
        "random",
        "too few to learn from",
        lambda p: p.budget < TINY_BUDGET,
    ),
    Rule(
        f"several objectives, fewer than {GENERATIONS * LEAST_FRONT} candidates",
        "tpe",
        "takes several objectives and learns without whole generations",
        lambda p: p.objectives > 1 and p.budget < GENERATIONS * LEAST_FRONT,
    ),
    Rule("three or more objectives", "nsga-iii", "crowding says little there", lambda p: p.objectives > 2),
    Rule("two objectives", "nsga-ii", "spreads over the front by crowding", lambda p: p.objectives == 2),
    Rule(
        "an axis with three or more choices, or conditional",
        "tpe",
        "models each axis by its kind and needs no order of choices",
        lambda p: p.unordered,
    ),
    Rule(
        f"at most {GP_AXES} axes and {GP_BUDGET} candidates",
        "gp",
        "finds most with few evaluations where axes are few",
        lambda p: len(p.axes) <= GP_AXES and p.budget <= GP_BUDGET,
    ),
    Rule(
        f"fewer than {GENERATIONS} generations of cma-es",
        "tpe",
        "learns without whole generations",
        lambda p: p.budget < GENERATIONS * default_population(len(p.axes)),
    ),
    Rule(
        "else",
        "cma-es",
        f"learns scales and correlations of the axes (beyond {FULL_COVARIANCE_AXES} axes scales only)",
        lambda p: True,
    ),
)
"""First match wins; the README has the same table."""


@dataclass(frozen=True)
class Choice:
    """An algorithm with the settings that the problem decides, and one line that says why."""

    algorithm: str
    settings: dict[str, int]
    why: str


def choose(problem: Problem) -> Choice:
    """The first rule that holds. Total: something is picked for every problem."""
    rule = next(r for r in RULES if r.holds(problem))
    settings = _settings(rule.algorithm, problem)
    shown = ", ".join(f"{k} {v}" for k, v in settings.items())
    return Choice(rule.algorithm, settings, f"{rule.algorithm} ({shown}) for {problem.describe()}: {rule.why}")


def _settings(algorithm: str, p: Problem) -> dict[str, int]:
    if algorithm == "cma-es":
        return {"population": default_population(len(p.axes))}
    if algorithm == "random":
        return {"population": min(16, int(p.budget))}
    if algorithm in ("tpe", "gp"):
        startup = 16 if algorithm == "tpe" else 10
        # A quarter of a small budget on uniform points, and sixteen rounds of learning.
        return {"population": _within(p.budget / 16, 1, 4), "startup": _within(p.budget / 4, 4, startup)}
    # Fifteen generations, as long as the front has room.
    population = 40 if p.evaluations is None else _within(p.budget / 15, LEAST_FRONT, MOST_FRONT)
    return {"population": population} | ({"divisions": divisions(p.objectives, population)} if p.objectives > 2 else {})


def divisions(objectives: int, population: int) -> int:
    """The most divisions whose reference directions do not outnumber the population, at least 1.

    Das and Dennis 1998: with p divisions of m objectives there are (m + p - 1 choose p) directions.
    """
    p = 1
    while math.comb(objectives + p, p + 1) <= population:
        p += 1
    return p


def _within(x: float, low: int, high: int) -> int:
    return int(min(max(x, low), high))
