"""Statistics of the report: known values, other implementations, and plain sense."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from evomerge.config import fitness_of
from evomerge.history import History
from evomerge.report.results import (
    MEAN,
    Results,
    Score,
    difference,
    interval,
    mean_over_tasks,
    results,
    spread,
    text_table,
    warnings_on,
)

Column = np.ndarray[Any, Any]


def binary(wins: int, n: int) -> Column:
    return np.array([1.0] * wins + [0.0] * (n - wins), np.float32)


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [
        (15, 20, 0.531299, 0.888138),  # Wilson 1927 without continuity correction, R: prop.test(correct=FALSE)
        (81, 263, 0.255289, 0.366216),  # Newcombe 1998, table I
        (15, 148, 0.062386, 0.160461),
        (0, 20, 0.0, 0.161125),
        (1, 29, 0.006113, 0.171755),
        (20, 20, 0.838875, 1.0),
    ],
)
def test_wilson_interval(wins: int, n: int, low: float, high: float) -> None:
    """Shares of right answers get Wilson's interval: known values, never outside [0, 1]."""
    mean, lower, upper = interval(binary(wins, n))

    assert mean == wins / n
    assert (lower, upper) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))
    assert 0.0 <= lower <= mean <= upper <= 1.0


def test_wilson_by_its_formula() -> None:
    """The interval solves (p - x)^2 = z^2 x (1 - x) / n at both ends."""
    z = stats.norm.ppf(0.975)
    for wins, n in ((3, 11), (58, 100), (199, 200)):
        _, low, high = interval(binary(wins, n))
        for x in (low, high):
            assert (wins / n - x) ** 2 == pytest.approx(z**2 * x * (1 - x) / n, rel=1e-6)


def test_student_interval() -> None:
    """Graded scores get Student's t: equal to scipy's own interval of the mean."""
    x = np.random.default_rng(1).normal(0.3, 2.0, 37).astype(np.float32)

    mean, low, high = interval(x)

    ci = stats.ttest_1samp(x.astype(np.float64), 0.0).confidence_interval(0.95)
    assert mean == pytest.approx(float(x.mean(dtype=np.float64)))
    assert (low, high) == (pytest.approx(ci.low), pytest.approx(ci.high))


def test_one_item_says_nothing() -> None:
    """A single graded score has an unbounded interval, and a difference of one pair no significance."""
    assert interval(np.array([0.25])) == (0.25, -math.inf, math.inf)
    mean, low, high, p = difference(np.array([0.5]), np.array([0.25]))
    assert (mean, low, high, p) == (0.25, -math.inf, math.inf, 1.0)


def test_difference_is_paired() -> None:
    """The interval is that of the paired differences, not of two samples; equal to scipy's paired test."""
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 5, 60)
    a, b = hard + rng.normal(0.3, 0.5, 60), hard + rng.normal(0, 0.5, 60)

    mean, low, high, p = difference(a, b)

    ci = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert mean == pytest.approx(float((a - b).mean()))
    assert (low, high) == (pytest.approx(ci.low), pytest.approx(ci.high))
    assert low > 0
    assert p < 0.01
    unpaired = stats.ttest_ind(a, b)
    assert unpaired.pvalue > 0.3


def test_difference_turns_its_sign() -> None:
    """Swapping the models turns mean and interval around and leaves p."""
    rng = np.random.default_rng(3)
    a, b = rng.random(40), rng.random(40)

    mean, low, high, p = difference(a, b)
    back = difference(b, a)

    assert back == (pytest.approx(-mean), pytest.approx(-high), pytest.approx(-low), pytest.approx(p))


def pairs(both: int, wins: int, losses: int, neither: int) -> tuple[Column, Column]:
    a = [1.0] * both + [1.0] * wins + [0.0] * losses + [0.0] * neither
    b = [1.0] * both + [0.0] * wins + [1.0] * losses + [0.0] * neither
    return np.array(a, np.float32), np.array(b, np.float32)


@pytest.mark.parametrize(("wins", "losses"), [(1, 9), (9, 1), (5, 5), (0, 6), (30, 14), (0, 1)])
def test_mcnemar_is_exact(wins: int, losses: int) -> None:
    """p is the two-sided binomial tail of the discordant pairs alone, as by hand and by scipy."""
    n = wins + losses
    by_hand = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n)

    for both, neither in ((0, 0), (50, 20)):
        p = difference(*pairs(both, wins, losses, neither))[3]
        assert p == pytest.approx(by_hand)
        assert p == pytest.approx(float(stats.binomtest(wins, n, 0.5).pvalue))


def test_mcnemar_known_value() -> None:
    """1 against 9 discordant pairs: p = 22 / 1024."""
    assert difference(*pairs(40, 9, 1, 50))[3] == pytest.approx(22 / 1024)


def test_equal_columns_do_not_differ() -> None:
    """Identical scores, right/wrong or graded, differ by 0 with p = 1."""
    for column in (binary(7, 20), np.linspace(-1, 2, 20)):
        mean, low, high, p = difference(column, column)
        assert (mean, low, high, p) == (0.0, 0.0, 0.0, 1.0)


def test_constant_difference_is_certain() -> None:
    """A difference that is the same on every item has no spread: p = 0."""
    b = np.linspace(0.0, 1.0, 9)

    mean, low, high, p = difference(b + 0.5, b)

    assert (mean, low, high) == (pytest.approx(0.5),) * 3
    assert p < 1e-12


def test_p_agrees_with_a_permutation_test() -> None:
    """For graded scores p is near that of flipping the signs of the paired differences at random."""
    rng = np.random.default_rng(4)
    d = rng.gamma(2.0, 1.0, 80) - 1.7
    flips = rng.choice([-1.0, 1.0], (20_000, 80)) @ d / 80
    by_permutation = float((np.abs(flips) >= abs(d.mean())).mean())

    p = difference(d, np.zeros(80))[3]

    assert 0.001 < by_permutation < 0.5
    assert p == pytest.approx(by_permutation, rel=0.35)


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Where nothing differs, about one in twenty 95% intervals misses 0; McNemar's exact test errs on the safe side."""
    rng = np.random.default_rng(5)
    misses = alarms = 0
    for _ in range(400):
        low, high = difference(rng.normal(size=50), rng.normal(size=50))[1:3]
        misses += not low <= 0 <= high
        a, b = (rng.random(50) < 0.4).astype(float), (rng.random(50) < 0.4).astype(float)
        alarms += difference(a, b)[3] < 0.05

    assert 8 <= misses <= 34
    assert alarms <= 24


def test_mean_over_tasks_is_plain() -> None:
    """Every task counts the same, however many items it has; the variance is stratified."""
    rows = [np.array([0.0, 1.0]), np.array([1.0] * 6 + [0.0] * 2), np.array([0.3, 0.3, 0.6])]

    mean, low, high, p = mean_over_tasks(rows)

    variance = sum(r.var(ddof=1) / len(r) for r in rows) / 9
    assert mean == pytest.approx((0.5 + 0.75 + 0.4) / 3)
    assert (low, high) == (
        pytest.approx(mean - 1.959964 * variance**0.5),
        pytest.approx(mean + 1.959964 * variance**0.5),
    )
    assert p == pytest.approx(2 * stats.norm.sf(mean / variance**0.5))


def test_mean_over_one_task_is_that_task() -> None:
    """With one task the mean is its mean, and order of items or tasks does not matter."""
    rng = np.random.default_rng(6)
    x, y = rng.random(50), rng.random(30)

    assert mean_over_tasks([x])[0] == pytest.approx(interval(x)[0])
    assert mean_over_tasks([x, y]) == pytest.approx(mean_over_tasks([y[::-1], rng.permutation(x)]))


def test_mean_over_a_single_item_is_unbounded() -> None:
    """A task of one item makes the mean's interval unbounded instead of pretending certainty."""
    mean, low, high, p = mean_over_tasks([np.array([1.0]), np.array([0.0, 1.0])])

    assert (mean, low, high, p) == (0.75, -math.inf, math.inf, 1.0)


def test_a_winner_that_was_there_before_is_pointed_out(finished_run: Path) -> None:
    """The table says so in words where the winner is a baseline, or where another model has the higher mean."""
    history = History.read(finished_run)
    assert history.final is not None
    baseline = history.baselines["one"]

    as_winner = replace(history, final={**history.final, "winner": baseline.id})

    assert "the search found nothing better than 'one', which was there before" in text_table(as_winner)
    assert "which was there before" not in text_table(history)


@pytest.mark.parametrize(("metric", "better"), [("accuracy", "other"), ("cross_entropy", "base")])
def test_a_better_model_goes_by_the_metrics_direction(finished_run: Path, metric: str, better: str) -> None:
    """Of scores the higher mean is better, of losses the lower; a mean of both orders nothing."""
    history = History.read(finished_run)
    fitness = fitness_of(history.experiment)
    number = next(e.id for e in history.entries.values() if e.role == "search")
    table = [Score(m, MEAN, metric, "report", x, x, x, 9) for m, x in (("base", 1.0), ("winner", 2.0), ("other", 3.0))]
    mine = Results(table, [], number, {}, 0, 1)

    def with_metrics(*metrics: str) -> History:
        tasks = [t.model_copy(update={"report_metric": m}) for t, m in zip(fitness.tasks, metrics, strict=True)]
        return replace(
            history,
            experiment=history.experiment.model_copy(
                update={"fitness": fitness.model_copy(update={"tasks": tuple(tasks)})}
            ),
        )

    [warning] = warnings_on(with_metrics(metric, metric), mine)
    assert warning.startswith(f"{better!r} has a {'higher' if better == 'other' else 'lower'} mean {metric}")
    [only] = warnings_on(with_metrics("accuracy", "cross_entropy"), mine)
    assert only == "the tasks' metrics have different units, so there is no mean over them"


def test_no_mean_of_different_units(finished_run: Path) -> None:
    """Accuracy and cross-entropy are not added: no mean in the table, in the comparisons or from split to split."""
    history = History.read(finished_run)
    fitness = fitness_of(history.experiment)
    metrics = ("accuracy", "cross_entropy")
    tasks = [t.model_copy(update={"report_metric": m}) for t, m in zip(fitness.tasks, metrics, strict=True)]
    update = {"fitness": fitness.model_copy(update={"tasks": tuple(tasks)})}
    mixed = replace(history, experiment=history.experiment.model_copy(update=update))

    r = results(mixed)
    assert MEAN in {s.task for s in results(history).table}
    assert {s.task for s in r.table} == {c.task for c in r.comparisons} == {"sums", "words"}
    assert r.optimism == {}
    assert "words (n=8, lower is better)" in text_table(mixed)


def test_a_task_that_nobody_solves_is_told(finished_run: Path) -> None:
    """Where every model has 0 right, the task is more likely at fault than the models."""
    history = History.read(finished_run)
    table = [Score(m, "sums", "accuracy", "report", 0.0, 0.0, 0.3, 9) for m in ("base", "winner")]

    [warning, *_] = warnings_on(history, Results(table, [], None, {}, 0, 1))
    assert warning.startswith("every model scores 0 on 'sums'")


@pytest.mark.parametrize(
    ("values", "text"),
    [([1.0, 3.0, 2.0], " [-0.48, 4.48]"), ([2.0], ""), ([2.0, 2.0, 2.0], ""), ([0.0, 0.0], " [0.00, 0.66]")],
)
def test_intervals_that_say_nothing_are_left_out(values: list[float], text: str) -> None:
    """A single item, or items all alike, tell of no interval; shares of right answers always have Wilson's."""
    _, low, high = interval(np.array(values))

    assert spread(low, high) == text
    assert spread(*mean_over_tasks([np.zeros(3), np.zeros(4)])[1:3]) == ""
