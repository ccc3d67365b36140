"""Runs of elitist algorithms with sampled items: survivors are scored on each new sample, once, and it is counted."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.config import load
from evomerge.evaluate import MergeEvaluator
from evomerge.history import History
from evomerge.journal import read
from evomerge.run import run
from evomerge.search.ga import Ga

With = Callable[..., Any]
COMMON: dict[str, Any] = {
    "search.items": {"policy": "adaptive", "start": 4, "grow": 1.5},
    "search.population": 4,
    "search.probes": False,
    "search.budget": {"evaluations": 16},
}
TWO = [{"name": "gain"}, {"name": "forgetting", "kind": "forgetting"}]
SETTINGS: dict[str, dict[str, Any]] = {
    "ga": {**COMMON, "search.algorithm": "ga"},
    "nsga-ii": {**COMMON, "search.algorithm": "nsga-ii", "fitness.objectives": TWO},
    "niches": {**COMMON, "search.algorithm": "niches", "search.population": 5, "search.budget": {"evaluations": 18}},
}
INCUMBENTS = {"ga": 2, "nsga-ii": 4, "niches": 5}
each = pytest.mark.parametrize("algorithm", SETTINGS)


@pytest.fixture(scope="module")
def evaluated() -> dict[str, Counter[tuple[str, str, int]]]:
    """How often each item of a recipe was really scored in `whole`, by algorithm."""
    return {a: Counter() for a in SETTINGS}


@pytest.fixture(scope="module")
def whole(
    small_experiment: Path,
    tmp_path_factory: pytest.TempPathFactory,
    evaluated: dict[str, Counter[tuple[str, str, int]]],
) -> dict[str, Path]:
    """algorithm -> the directory of a finished run."""
    torch.set_num_threads(1)
    evaluate = MergeEvaluator.evaluate
    out = {}
    for algorithm, settings in SETTINGS.items():
        out[algorithm] = tmp_path_factory.mktemp("elitist") / algorithm

        def counted(self: MergeEvaluator, unit: Any, seen: Counter[Any] = evaluated[algorithm]) -> Any:
            for job in unit.jobs:
                seen.update((job.recipe.id, t, i) for t, at in job.items.tasks.items() for i in at)
            return evaluate(self, unit)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MergeEvaluator, "evaluate", counted)
            run(load(small_experiment, settings), out[algorithm])
    return out


@each
def test_survivors_are_scored_on_every_new_sample(algorithm: str, whole: dict[str, Path]) -> None:
    """Before the members of each generation but the first, on their items, each survivor of earlier ones."""
    events = read(whole[algorithm] / "journal.jsonl")[0]
    names = {e["id"]: e["name"] for e in events if e["kind"] == "items"}
    group = {e["id"]: e["group"] for e in events if e["kind"] == "asked" and e["role"] == "search"}
    by_sample: dict[str, list[int]] = {}
    for e in events:
        if e["kind"] == "told" and names[e["items"]].startswith("search "):
            by_sample.setdefault(names[e["items"]], []).append(e["id"])

    assert len(by_sample) >= 3
    for g, (name, ids) in enumerate(by_sample.items()):
        assert name == f"search 0.{g}.0"
        old = [i for i in ids if group[i] < g]
        assert ids[: len(old)] == old
        assert len({*ids}) == len(ids)
        assert len(old) == (INCUMBENTS[algorithm] if g else 0)
    h = History.read(whole[algorithm])
    assert [sum(group[i] == x.group for i in group) for x in h.generations] == [x.members[0] for x in h.generations]
    assert all(len(x.items) == 1 for x in h.generations)


@each
def test_no_item_is_scored_twice(
    algorithm: str, whole: dict[str, Path], evaluated: dict[str, Counter[tuple[str, str, int]]]
) -> None:
    """A survivor's items that it was scored on before are taken from there, and the history counts the same."""
    h = History.read(whole[algorithm])

    assert any(len(e.samples) > 1 for e in h.entries.values())
    assert {*evaluated[algorithm].values()} == {1}
    assert sum(h.evaluated.values()) == len(evaluated[algorithm])


@each
def test_a_cut_run_ends_as_a_whole_one(
    algorithm: str, whole: dict[str, Path], experiment_with: With, tmp_path: Path
) -> None:
    """Cut off before, among and behind the survivors' new results, resumed: the same journal to the byte."""
    journal = (whole[algorithm] / "journal.jsonl").read_bytes()
    lines = journal.splitlines(keepends=True)
    begins = [i for i, line in enumerate(lines) if b'"name":"search 0.1.0"' in line and b'"kind":"items"' in line]
    for cut in (begins[0], begins[0] + 2, begins[0] + INCUMBENTS[algorithm] + 2):
        out = tmp_path / str(cut)
        shutil.copytree(whole[algorithm], out)
        (out / "journal.jsonl").write_bytes(b"".join(lines[:cut]) + lines[cut][:9])
        run(experiment_with(**SETTINGS[algorithm]), out)
        assert (out / "journal.jsonl").read_bytes() == journal


def test_the_search_is_told(experiment_with: With, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The losses of survivors on the new sample, as the history has them."""
    told: list[dict[int, float]] = []
    renew = Ga.renew

    def recorded(self: Ga, results: Any) -> None:
        told.append({i: r.loss for i, r in results.items()})
        renew(self, results)

    monkeypatch.setattr(Ga, "renew", recorded)
    h = run(experiment_with(**SETTINGS["ga"]), tmp_path / "out")

    assert len(told) == len(h.generations) - 1
    for g, losses in enumerate(told, 1):
        assert losses == {i: h.loss(h.entry(i), f"search 0.{g}.0") for i in losses}
        assert all(f"search 0.{g}.0" in h.entry(i).renewed for i in losses)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_write_the_same(whole: dict[str, Path], experiment_with: With, tmp_path: Path) -> None:
    """Survivors and newcomers are under way together; what is written does not depend on who is done first."""
    run(experiment_with(**SETTINGS["ga"], **{"workers.backend": "local", "workers.count": 2}), tmp_path / "out")

    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == (whole["ga"] / "journal.jsonl").read_bytes()


@each
def test_a_budget_of_items_holds_survivors_too(algorithm: str, experiment_with: With, tmp_path: Path) -> None:
    """What survivors cost on new samples is within the budget."""
    settings = {**SETTINGS[algorithm], "search.budget": {"item_evaluations": 110}}
    h = run(experiment_with(**settings), tmp_path / "out")
    # All that was scored on samples; what the end scored in full is not of the search.
    seen: dict[str, set[tuple[str, int]]] = {}
    for e in h.entries.values():
        if e.role == "search" and e.recipe_id not in {b.recipe_id for b in h.baselines.values()}:
            for n in e.samples:
                seen.setdefault(e.recipe_id, set()).update((t, i) for t, at in h.samples[n].tasks.items() for i in at)
    spent = sum(len(x) for x in seen.values())

    assert any(e.renewed for e in h.entries.values())
    assert spent <= 110
    assert spent > 110 - (INCUMBENTS[algorithm] + 2) * 14


@each
def test_full_scoring_renews_nobody(algorithm: str, experiment_with: With, tmp_path: Path) -> None:
    """Where all items are scored, and where a sample has grown to all, there is nothing to score again."""
    for items in ("full", {"policy": "adaptive", "start": 24}):
        settings = {**SETTINGS[algorithm], "search.items": items, "search.budget": {"evaluations": 11}}
        h = run(experiment_with(**settings), tmp_path / str(len(str(items))))
        events = read(h.path / "journal.jsonl")[0]
        search = {e["id"] for e in events if e["kind"] == "items" and e["name"] == "search"}
        told = Counter(e["id"] for e in events if e["kind"] == "told" and e["items"] in search)

        assert not h.samples
        assert {*told.values()} == {1}


def test_a_survivor_may_win(whole: dict[str, Path]) -> None:
    """The last generation's survivors are among those that the end scores in full."""
    h = History.read(whole["niches"])
    last = h.generations[-1].group
    kept = [e for e in h.entries.values() if e.samples and "search" in e.results]

    assert any(e.group < last - 1 or (e.renewed and e.group < last) for e in kept)
    for e in kept:
        whole_scores = e.scores("search")
        assert whole_scores is not None
        for name, sampled in e.samples.items():
            assert sampled.scores is not None
            for task, at in h.samples[name].tasks.items():
                expected = whole_scores[task]["cross_entropy"][list(at)]
                assert np.array_equal(sampled.scores[task]["cross_entropy"], expected)


def test_who_was_scored_in_full_stays_so(whole: dict[str, Path], experiment_with: With, tmp_path: Path) -> None:
    """An extended run scores survivors on new samples; who was scored in full before is ranked by that."""
    shutil.copytree(whole["ga"], tmp_path / "out")
    h = run(experiment_with(**{**SETTINGS["ga"], "search.budget": {"evaluations": 36}}), tmp_path / "out")
    known = {e.recipe_id: e for e in sorted(h.entries.values(), key=lambda e: -e.id) if "search" in e.results}
    best = sorted(known.values(), key=lambda e: (h.loss(e, "search"), e.id))[:3]

    assert h.final is not None
    assert {e.id for e in best} <= {*h.final["finalists"]}
    assert any(e.renewed for e in best)
