"""Policies of items: samples, halves, and what each policy makes of a generation's results."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from evomerge.check import check
from evomerge.config import AdaptiveItems, HalvingItems, load
from evomerge.errors import UserError
from evomerge.items import (
    POLICIES,
    Adaptive,
    Halving,
    behind,
    halves,
    rank_correlation,
    samples,
    split_half,
    taken,
)
from evomerge.proposal import ItemSet, Result
from evomerge.search import ALGORITHMS, needs_of

WHOLE = ItemSet("search", {"a": tuple(range(5, 205)), "b": tuple(range(100)), "c": (9, 7, 8)})
SEED = (3, 0)


def losses_on(items: ItemSet) -> Callable[[Any], Any]:
    """Minus the mean over all items."""
    return lambda scores: np.array([-np.mean(np.concatenate([c["m"] for c in scores.values()]))])


def generation(items: ItemSet, spread: float, members: int = 12) -> dict[int, Result]:
    """Members whose quality differs by `spread`, scored 0 or 1 by chance."""
    rng = np.random.default_rng(1)
    out = {}
    for i in range(members):
        p = 0.5 + spread * (i / (members - 1) - 0.5)
        scores = {t: {"m": (rng.random(len(at)) < p).astype(np.float32)} for t, at in items.tasks.items()}
        out[i] = Result(losses_on(items)(scores), scores=scores)
    return out


# -- samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 10, 25, 60, 150, 302])
def test_samples_are_by_task(size: int) -> None:
    """Every task has its share, of its own items, each once; two at least."""
    [part] = samples(WHOLE, [size], SEED, 4)

    for task, at in part.tasks.items():
        assert len({*at} & {*WHOLE.tasks[task]}) == len(at)
        assert len(at) == max(2, round(len(WHOLE.tasks[task]) * size / WHOLE.count))
    assert abs(part.count - size) <= 6


def test_samples_are_fresh_and_repeat() -> None:
    """The same seed, stage and generation give the same items; another seed, stage or generation gives others."""
    ids = {(s, g): samples(WHOLE, [30], s, g)[0].id for s in ((3, 0), (3, 1), (4, 0)) for g in range(4)}

    assert len(set(ids.values())) == 12
    assert all(samples(WHOLE, [30], s, g)[0].id == i for (s, g), i in ids.items())


def test_every_item_has_its_chance() -> None:
    """Over many generations all items are drawn about equally often."""
    drawn = np.zeros(205)
    for g in range(300):
        drawn[list(samples(WHOLE, [60], SEED, g)[0].tasks["a"])] += 1

    assert stats.chisquare(drawn[5:]).pvalue > 0.001


def test_rungs_are_nested() -> None:
    """A rung has the items of those before it, and one as large as the split is the split itself."""
    small, large, whole = samples(WHOLE, [20, 80, 1000], SEED, 0)

    assert all({*small.tasks[t]} <= {*large.tasks[t]} for t in WHOLE.tasks)
    assert small.count < large.count
    assert whole is WHOLE


def test_taken_scores_are_those_of_the_items() -> None:
    """In the order that is asked for; an item that was not scored is an error."""
    scores = {"a": {"m": np.array([5, 6, 7], np.float32)}, "b": {"m": np.array([1], np.float32)}}
    there = ItemSet("x", {"a": (50, 60, 70), "b": (10,)})

    got = taken(scores, there, ItemSet("y", {"a": (70, 50)}))
    assert {t: c["m"].tolist() for t, c in got.items()} == {"a": [7, 5]}
    with pytest.raises(KeyError):
        taken(scores, there, ItemSet("y", {"a": (71,)}))


# -- correlation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_rank_correlation_is_spearmans(seed: int) -> None:
    """As scipy has it, with ties."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 15))
    a, b = rng.integers(0, 6, n).astype(float), rng.integers(0, 6, n).astype(float)
    a[:2], b[:2] = (0, 1), (0, 1)

    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert rank_correlation(a, np.zeros(n)) == 0.0


def test_halves_cut_every_task() -> None:
    """Both halves together are the items; a task with one item has it in both."""
    items = ItemSet("x", {"a": (1, 2, 3, 4, 5), "b": (7,)})
    one, two = halves(items, np.random.default_rng(0))

    assert sorted(one.tasks["a"] + two.tasks["a"]) == [1, 2, 3, 4, 5]
    assert (len(one.tasks["a"]), one.tasks["b"], two.tasks["b"]) == (2, (7,), (7,))


def test_split_half_tells_signal_from_noise() -> None:
    """Near 1 where members differ a lot, near 0 where they do not, NaN for two; the same on every call."""
    [items] = samples(WHOLE, [150], SEED, 0)

    def rho(spread: float, members: int = 30) -> float:
        scores = [r.scores for r in generation(items, spread, members).values()]
        return split_half(scores, items, SEED, 0, losses_on)

    assert rho(0.9) > 0.8
    assert abs(rho(0.0)) < 0.35
    assert rho(0.9) == rho(0.9)
    assert math.isnan(rho(0.9, 2))


# -- adaptive -------------------------------------------------------------------------------------------------


def adaptive(**settings: Any) -> Adaptive:
    return Adaptive(AdaptiveItems(policy="adaptive", **settings), WHOLE, SEED, losses_on)


def sizes(policy: Adaptive, spreads: list[float]) -> list[int]:
    out = []
    for g, spread in enumerate(spreads):
        items = policy.first(g)
        out.append(items.count)
        assert policy.first(g).id == items.id
        assert policy.more(g, 0, generation(items, spread)) == {}
    return out


def test_noise_adds_items() -> None:
    """Generations of equals grow the sample by the factor, up to all."""
    got = sizes(adaptive(start=30, threshold=0.9), [0.0] * 12)

    assert got[:4] == [samples(WHOLE, [n], SEED, 0)[0].count for n in (30, 39, 51, 66)]
    assert got[-1] == WHOLE.count


def test_clear_differences_take_items_away() -> None:
    """Where halves agree the sample shrinks, never below the start."""
    policy = adaptive(start=30, threshold=0.3)
    policy._next = 200.0
    got = sizes(policy, [1.0] * 16)

    assert got[:3] == [samples(WHOLE, [n], SEED, 0)[0].count for n in (200, 174, 151)]
    assert got[-1] == samples(WHOLE, [30], SEED, 0)[0].count


def test_a_generation_in_two_pieces_has_one_sample() -> None:
    """A budget may cut a generation; its second piece is scored on the same items and all members count."""
    whole, cut = adaptive(threshold=0.9), adaptive(threshold=0.9)
    members = generation(whole.first(0), 0.4)
    whole.more(0, 0, members)
    for piece in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]):
        assert cut.first(0).id == whole.first(0).id
        cut.more(0, 0, {i: members[i] for i in piece})

    assert cut.first(1).id == whole.first(1).id
    assert cut.price == whole.price


# -- halving --------------------------------------------------------------------------------------------------


def halving(**settings: Any) -> Halving:
    return Halving(HalvingItems(policy="halving", **settings), WHOLE, SEED)


def test_the_best_go_on() -> None:
    """The best share of each rung; failures never; the last rung ends it."""
    policy = halving(rungs=(20, 60, 400), keep=0.5)
    got = {i: Result(np.array([x])) for i, x in enumerate([3.0, 1.0, 2.0, math.inf, 0.5, 9.0])}

    first = policy.more(0, 0, got)
    assert {*first} == {1, 2, 4}
    assert {i.id for i in first.values()} == {samples(WHOLE, [20, 60], SEED, 0)[1].id}
    second = policy.more(0, 1, {i: got[i] for i in first})
    assert {*second} == {1, 4}
    assert all(i is WHOLE for i in second.values())
    assert policy.more(0, 2, {i: got[i] for i in second}) == {}
    assert policy.more(0, 0, {3: got[3]}) == {}


def test_the_price_of_halving() -> None:
    """Items of a candidate on average: rungs that it does not reach cost nothing."""
    assert halving(rungs=(20, 60), keep=0.5).price == 20 + 20
    assert halving(rungs=(103, 1000), keep=0.4).price == 103 + 80


def test_who_stopped_comes_behind() -> None:
    """Losses of another rung are moved, in their own order, behind all that went on; failures stay infinite."""
    told = behind({1: np.array([0.1]), 2: np.array([0.3]), 3: np.array([math.inf])}, [np.array([0.5]), np.array([0.4])])
    assert told[1][0] >= 0.5
    assert told[2][0] - told[1][0] == pytest.approx(0.2)
    assert told[3][0] == math.inf
    already = {1: np.array([0.7])}
    assert behind(already, [np.array([0.5])])[1][0] == 0.7
    assert behind(already, [])[1][0] == 0.7


# -- the table and the settings -------------------------------------------------------------------------------

SPECS = {
    "sample": {"policy": "sample"},
    "adaptive": {"policy": "adaptive"},
    "halving": {"policy": "halving", "rungs": [4, 100]},
}


@pytest.mark.parametrize(("algorithm", "policy"), list(itertools.product(ALGORITHMS, SPECS)))
def test_check_follows_the_table(algorithm: str, policy: str, small_experiment: Path) -> None:
    """Pairs of algorithm and policy that the table has are accepted, others refused with the way out."""
    data = json.loads(small_experiment.read_text())
    data["search"] = {"algorithm": algorithm, "items": SPECS[policy], "budget": {"evaluations": 60}}
    if needs_of(algorithm).objectives == "several":
        data["fitness"]["objectives"] = [{"name": "x"}, {"name": "y", "kind": "forgetting"}]
    experiment = load(_with_paths(data, small_experiment.parent))
    if policy in POLICIES[needs_of(algorithm).scope]:
        notes = check(experiment).notes
        assert any("items are sampled" in n for n in notes)
        assert any("who survives" in n for n in notes) == (needs_of(algorithm).scope == "incumbents")
        return
    with pytest.raises(
        UserError, match=rf"search.items: {algorithm} compares .* {policy} items .* use items: (.*)"
    ) as e:
        check(experiment)
    out = e.value.args[0].rpartition("use items: ")[2]
    assert out.startswith(" or ".join(POLICIES[needs_of(algorithm).scope]) + ", or ")
    for other in re.split(" or ", out.partition(", or ")[2]):
        assert policy in POLICIES[needs_of(other).scope]


def _with_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    for task in data["fitness"]["tasks"]:
        task["splits"] = {s: str(folder / f) for s, f in task["splits"].items()}
    return data


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"policy": "adaptive", "start": 1}, "start"),
        ({"policy": "adaptive", "grow": 1.0}, "grow"),
        ({"policy": "halving", "rungs": [60]}, "rungs"),
        ({"policy": "halving", "rungs": [60, 50]}, "rungs: each must have more items"),
        ({"policy": "sample", "count": 1}, "count"),
        ({"policy": "halved"}, "items"),
        ("some", "items"),
    ],
)
def test_wrong_settings_are_named(items: Any, message: str, experiment_with: Callable[..., Any]) -> None:
    """In one line, with the key."""
    with pytest.raises(UserError, match=message) as e:
        experiment_with(**{"search.items": items})
    assert "\n" not in str(e.value)
