"""The only place with signs: scores to losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evomerge.errors import UserError
from evomerge.fitness import FitnessSpec
from evomerge.objective import Objective, column_mean, differentiated, products
from evomerge.schema import validated


def fitness(*tasks: dict[str, Any], **other: Any) -> FitnessSpec:
    rows = [{"name": f"t{i}", "data": "x", **t} for i, t in enumerate(tasks)]
    return validated(FitnessSpec, {"tasks": rows, **other}, "fitness")


def scores(*means: float, metric: str = "accuracy") -> dict[str, Any]:
    """Two items a task, around a mean."""
    return {f"t{i}": {metric: np.array([m - 0.1, m + 0.1], np.float32)} for i, m in enumerate(means)}


def loss(o: Objective, *means: float, metric: str = "accuracy") -> float:
    out = o.losses(scores(*means, metric=metric))
    assert out.shape == (1,)
    return float(out[0])


def plain(spec: FitnessSpec) -> Objective:
    return Objective(spec, {}, {})


def test_means_are_in_float64() -> None:
    """A task's mean does not lose digits over many float32 scores."""
    column = np.full(1_000_000, 0.1, np.float32)

    mean = column_mean({"t0": {"accuracy": column}}, "t0", "accuracy")
    assert mean == pytest.approx(float(np.float32(0.1)), abs=1e-12)


def test_higher_scores_are_lower_losses() -> None:
    """Accuracy counts negatively, cross-entropy as it is: less loss is better for both."""
    accuracy, entropy = plain(fitness({})), plain(fitness({"metric": "cross_entropy"}))

    assert loss(accuracy, 0.7) == pytest.approx(-0.7)
    assert loss(entropy, 0.7, metric="cross_entropy") == pytest.approx(0.7)


def test_weights_are_shares() -> None:
    """Tasks count by their share of all weights."""
    spec = fitness({"weight": 3.0}, {"weight": 1.0})

    assert loss(plain(spec), 0.8, 0.4) == pytest.approx(-(0.75 * 0.8 + 0.25 * 0.4))


def bound(spec: FitnessSpec, metric: str = "accuracy") -> Objective:
    """Base at 0.5 and 0.4; baselines up to 0.9 and 0.6 (or down to 0.1 and 0.2)."""
    means = {"a": (0.9, 0.3), "b": (0.1, 0.6), "uniform": (0.3, 0.2)}
    others = {name: scores(*m, metric=metric) for name, m in means.items()}
    return Objective.bind(spec, scores(0.5, 0.4, metric=metric), others)


def test_references_are_base_and_best() -> None:
    """`low` is the base, `high` the best baseline of each task, in the metric's own direction; the base is one."""
    up = bound(fitness({}, {}))
    down = bound(fitness({"metric": "cross_entropy"}, {"metric": "cross_entropy"}), "cross_entropy")
    alone = Objective.bind(fitness({}), scores(0.5), {"a": scores(0.2)})

    assert up.low == {("t0", "accuracy"): pytest.approx(0.5), ("t1", "accuracy"): pytest.approx(0.4)}
    assert up.high == {("t0", "accuracy"): pytest.approx(0.9), ("t1", "accuracy"): pytest.approx(0.6)}
    assert down.high == {("t0", "cross_entropy"): pytest.approx(0.1), ("t1", "cross_entropy"): pytest.approx(0.2)}
    assert alone.high == alone.low


def test_recovered_gain_is_a_share() -> None:
    """The base loses 0, the best baseline on every task -1; more is cut off, less than the base costs."""
    o = bound(fitness({}, {}, objective="recovered_gain"))

    assert loss(o, 0.5, 0.4) == pytest.approx(0.0, abs=1e-6)
    assert loss(o, 0.9, 0.6) == pytest.approx(-1.0)
    assert loss(o, 1.0, 1.0) == pytest.approx(-1.0)
    assert loss(o, 0.7, 0.5) == pytest.approx(-0.5)
    assert loss(o, 0.1, 0.4) == pytest.approx(0.5)


def test_recovered_gain_of_a_lower_metric() -> None:
    """For cross-entropy the gain counts downwards."""
    o = bound(
        fitness({"metric": "cross_entropy"}, {"metric": "cross_entropy"}, objective="recovered_gain"), "cross_entropy"
    )

    assert loss(o, 0.1, 0.2, metric="cross_entropy") == pytest.approx(-1.0)
    assert loss(o, 0.9, 0.4, metric="cross_entropy") == pytest.approx(0.5)


@pytest.mark.parametrize(("metric", "better", "worse"), [("accuracy", 0.75, 0.25), ("cross_entropy", 0.25, 0.75)])
@pytest.mark.parametrize("base", [0.5, 0.0])
def test_no_gain_to_recover(metric: str, better: float, worse: float, base: float) -> None:
    """Where no baseline beats the base, its own score is the unit: better is still better."""
    o = Objective.bind(fitness({"metric": metric}, objective="recovered_gain"), scores(base, metric=metric), {})
    at_base = loss(o, base, metric=metric)

    assert at_base == pytest.approx(0.0, abs=1e-5)
    if base:
        assert loss(o, better, metric=metric) == pytest.approx(-0.5, abs=1e-5)
        assert loss(o, worse, metric=metric) == pytest.approx(0.5, abs=1e-5)
    else:
        assert np.isfinite(loss(o, worse, metric=metric))


def test_floor_prices_forgetting() -> None:
    """Below the base plus the margin every lost point costs `penalty` more; above it nothing."""
    o = bound(fitness({}, {}, floor={"penalty": 3.0, "margin": 0.1}))
    free = bound(fitness({}, {}))

    assert loss(o, 0.6, 0.5) == pytest.approx(loss(free, 0.6, 0.5))
    assert loss(o, 0.5, 0.5) == pytest.approx(loss(free, 0.5, 0.5) + 0.5 * 3.0 * 0.1)
    assert loss(o, 0.2, 0.9) > loss(o, 0.6, 0.5)


def test_floor_of_a_lower_metric() -> None:
    """For cross-entropy, falling below the base means rising above it."""
    spec = fitness({"metric": "cross_entropy"}, floor={"penalty": 2.0})
    o = Objective.bind(spec, scores(0.5, metric="cross_entropy"), {})

    assert loss(o, 0.4, metric="cross_entropy") == pytest.approx(0.4)
    assert loss(o, 0.7, metric="cross_entropy") == pytest.approx(0.7 + 2.0 * 0.2)


def test_failures_lose_without_bound() -> None:
    """A failure has +inf in every objective."""
    assert plain(fitness({})).failed.tolist() == [np.inf]
    assert plain(fitness({}, objectives=[{"name": "a"}, {"name": "b"}])).failed.tolist() == [np.inf, np.inf]


# -- several objectives --------------------------------------------------------------------------------------


def test_objectives_are_losses_in_their_order() -> None:
    """Each objective has its own tasks and weights; a lower-is-better metric counts as it is."""
    goals = [
        {"name": "first", "tasks": ["t0"]},
        {"name": "both", "tasks": {"t0": 1, "t1": 3}},
        {"name": "entropy", "tasks": ["t1"], "metric": "cross_entropy"},
    ]
    given = scores(0.8, 0.4)
    given["t1"]["cross_entropy"] = np.array([1.0, 2.0], np.float32)
    o = plain(fitness({}, {}, objectives=goals))

    assert o.losses(given) == pytest.approx([-0.8, -(0.25 * 0.8 + 0.75 * 0.4), 1.5])
    assert o.spec.metrics_of(o.spec.tasks[1]) == ("accuracy", "cross_entropy")


def test_forgetting_is_what_was_lost_against_the_base() -> None:
    """Only tasks below the base count, by how far; a floor does not price it twice."""
    goals = [{"name": "forgotten", "kind": "forgetting"}]
    o = bound(fitness({}, {}, objectives=goals, floor={"penalty": 3.0}))

    assert loss(o, 0.5, 0.4) == pytest.approx(0.0, abs=1e-7)
    assert loss(o, 0.9, 0.9) == 0.0
    assert loss(o, 0.3, 0.9) == pytest.approx(0.5 * 0.2)


def test_recovered_gain_against_the_tasks_own_expert() -> None:
    """`expert` names whose gain is the unit, also where another baseline does better."""
    o = bound(fitness({"expert": "uniform"}, {"expert": "b"}, objective="recovered_gain"))

    assert o.high["t0", "accuracy"] == pytest.approx(0.3)
    assert loss(o, 0.5, 0.5) == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("goals", "words"),
    [
        ([{"name": "a", "tasks": ["t9"]}], "there is no task 't9'"),
        ([{"name": "a"}, {"name": "a"}], "names must differ"),
        ([{"name": "a", "metric": "acuracy"}], "did you mean 'accuracy'"),
        ([{"name": "a", "tasks": {"t0": 0}}], "weights must be above 0"),
        ([{"name": "a", "tasks": []}], "at least one task"),
        ([{"name": "a", "kind": "gain"}], "recovered_gain"),
    ],
)
def test_bad_objectives(goals: list[dict[str, Any]], words: str) -> None:
    """Each complaint is one line that names the objective or the key."""
    with pytest.raises(UserError, match=words):
        fitness({}, objectives=goals)


# -- constraints ---------------------------------------------------------------------------------------------


def test_violations_are_how_much_is_missed() -> None:
    """Limits count in the metric's own direction; what is kept counts nothing; several add up."""
    limits = [
        {"name": "kept", "kind": "forgetting", "at_most": 0.02},
        {"name": "floor", "tasks": ["t1"], "at_least": 0.3},
    ]
    o = bound(fitness({}, {}, constraints=limits))

    assert o.violation(scores(0.9, 0.9)) == 0.0
    assert o.violation(scores(0.9, 0.35)) == pytest.approx(0.5 * 0.05 - 0.02, abs=1e-6)
    assert o.violation(scores(0.9, 0.2)) == pytest.approx((0.5 * 0.2 - 0.02) + 0.1, abs=1e-6)
    assert o.losses(scores(0.9, 0.2)) == pytest.approx(bound(fitness({}, {})).losses(scores(0.9, 0.2)))


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"name": "a"}, "exactly one of at_most and at_least"),
        ({"name": "a", "at_most": 1, "at_least": 0}, "exactly one of at_most and at_least"),
        ({"name": "a", "at_most": 0.5}, "at_least is for metrics where higher is better"),
        ({"name": "a", "metric": "cross_entropy", "at_least": 0.5}, "at_most for those where lower is"),
        ({"name": "a", "kind": "forgetting", "at_least": 0.5}, "forgetting is limited by at_most"),
        ({"name": "a", "tasks": ["t7"], "at_least": 0.5}, "there is no task 't7'"),
    ],
)
def test_bad_constraints(limit: dict[str, Any], words: str) -> None:
    """Each complaint is one line."""
    with pytest.raises(UserError, match=words):
        fitness({}, constraints=[limit])


# -- measures ------------------------------------------------------------------------------------------------


def test_measures_are_in_their_own_sense() -> None:
    """A metric as it is, whichever way is good; forgetting and recovered gain as they are named; no floor on any."""
    bounds = {"low": 0.0, "high": 1.0}
    measures = [
        {"name": "right", "tasks": ["t1"], **bounds},
        {"name": "both", **bounds},
        {"name": "forgotten", "kind": "forgetting", **bounds},
        {"name": "gained", "kind": "recovered_gain", "tasks": ["t0"], **bounds},
    ]
    o = bound(fitness({}, {}, measures=measures, floor={"penalty": 3}))
    entropy = fitness({"metric": "cross_entropy"}, measures=[{"name": "loss", "low": 0.0, "high": 9.0}])

    assert o.measures(scores(0.7, 0.2)) == pytest.approx([0.2, 0.45, 0.5 * 0.2, 0.5], abs=1e-6)
    assert o.losses(scores(0.9, 0.9)) == pytest.approx(bound(fitness({}, {})).losses(scores(0.9, 0.9)))
    assert plain(entropy).measures(scores(0.7, metric="cross_entropy")) == pytest.approx([0.7])
    assert [d.higher for d in (*o.spec.dimensions, *entropy.dimensions)] == [True, True, False, True, False]


def test_metrics_of_measures_are_scored() -> None:
    """What only a measure reads stands among a task's needed columns."""
    spec = fitness({}, measures=[{"name": "sure", "metric": "probability", "low": 0.0, "high": 1.0}])

    assert spec.metrics_of(spec.tasks[0]) == ("accuracy", "probability")


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        ({"low": 0.0}, "high"),
        ({"low": 1.0, "high": 1.0}, r"`low < high` must hold, but got \(low=1, high=1\)"),
        ({"low": float("-inf"), "high": 1.0}, "`low < high` must hold"),
        ({"low": 0.0, "high": 1.0, "cells": 0}, "cells"),
        ({"low": 0.0, "high": 1.0, "tasks": ["t7"]}, "measures: a: there is no task 't7'"),
        ({"low": 0.0, "high": 1.0, "metric": "speed"}, "has no metric 'speed'"),
        ({"low": 0.0, "high": 1.0, "tasks": ["t0", "t1"]}, "of metrics that go one way"),
    ],
)
def test_bad_measures(measure: dict[str, Any], words: str) -> None:
    """Each complaint is one line."""
    with pytest.raises(UserError, match=words):
        fitness({}, {"metric": "cross_entropy"}, measures=[{"name": "a", "tasks": ["t0"], **measure}])


def test_measures_have_names_of_their_own() -> None:
    measure = {"name": "a", "low": 0.0, "high": 1.0}

    with pytest.raises(UserError, match="measures: the names must differ"):
        fitness({}, measures=[measure, measure])


# -- gradients --------------------------------------------------------------------------------------------------


def test_products_are_the_weighted_mean_with_its_sign() -> None:
    """Higher-is-better metrics count negatively, and only tasks of the objective count."""
    spec = fitness(
        {"metric": "probability", "weight": 3.0},
        {"metric": "cross_entropy"},
        {"metric": "accuracy"},
        objectives=[{"name": "some", "tasks": ["t0", "t1"]}],
    )
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 10.0, np.float32)

    assert differentiated(spec) == (("t0", "probability"), ("t1", "cross_entropy"))
    assert products(spec, {"t0": a, "t1": b}).shape == (1, 2, 3)
    assert np.allclose(products(spec, {"t0": a, "t1": b}), -0.75 + 2.5)


def test_several_objectives_share_their_tasks_gradients() -> None:
    """One gradient for each task, however many objectives it is in; every objective has its own weighted mean."""
    goals = [{"name": "first", "tasks": ["t0"]}, {"name": "both", "tasks": {"t0": 1.0, "t1": 3.0}}]
    spec = fitness({"metric": "probability"}, {"metric": "cross_entropy"}, objectives=goals)
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 10.0, np.float32)

    assert differentiated(spec) == (("t0", "probability"), ("t1", "cross_entropy"))
    first, both = products(spec, {"t0": a, "t1": b})
    assert np.allclose(first, -1.0)
    assert np.allclose(both, -0.25 + 7.5)


def test_counts_are_differentiated_as_what_they_round() -> None:
    """For accuracy it is the probability of the right choice; an objective's own metric goes before the tasks'."""
    assert differentiated(fitness({"metric": "accuracy"})) == (("t0", "probability"),)
    spec = fitness({"metric": "accuracy"}, objectives=[{"name": "x", "metric": "answer_loss"}])
    assert differentiated(spec) == (("t0", "answer_loss"),)
    assert np.allclose(products(spec, {"t0": np.ones((1, 2), np.float32)}), 1.0)
