"""A merge first, then routes through it: one journal, cut off in either stage, by any number of workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.commit import TOGETHER, alike
from evomerge.config import load
from evomerge.export.verify import verify
from evomerge.export.write import write_export
from evomerge.history import History
from evomerge.proposal import ItemSet, Job
from evomerge.recipe import MERGED, Recipe, in_common
from evomerge.run import run

With = Callable[..., Any]
WEIGHTS = {"method": "task_arithmetic", "axes": {"weight": {"low": -0.5, "high": 1.5, "default": "uniform"}}}
ROUTES = {"route": {"encoding": "slices", "models": ["merged", "experts"]}}
STAGES = [{"space": WEIGHTS, "share": 0.5}, {"space": ROUTES, "share": 0.5, "algorithm": "random"}]
HYBRID = {
    "search_space": {"stages": STAGES},
    "search": {"algorithm": "cma-es", "seed": 3, "budget": {"evaluations": 16}, "population": 4, "probes": False},
}


@pytest.fixture(scope="module")
def hybrid(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of both stages."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("hybrid") / "out"
    run(load(small_experiment, HYBRID), out)
    return out


def routed(history: History) -> list[tuple[int, Recipe]]:
    found = [(e.id, history.recipe(e.id)) for e in history.entries.values() if e.stage == 1]
    return [(i, r) for i, r in found if r.route is not None]


def test_routes_go_through_the_best_merge(hybrid: Path) -> None:
    """The second stage begins with the best merge of the first, and its routes' merged layers are just that merge's."""
    history = History.read(hybrid)
    first = [e for e in history.entries.values() if history.recipe(e.id).route is None and e.scores("search")]
    before = [e for e in first if e.stage < 1]
    best = min(before, key=lambda e: (history.loss(e, "search"), e.id))
    merged = history.recipe(history.merged[1])

    assert history.merged == {1: best.id}
    through = [r for _, r in routed(history) if any(h.from_ == MERGED for h in r.route.hops)]  # type: ignore[union-attr]
    assert through
    for recipe in through:
        for name, rule in recipe.blocks.items():
            if name.startswith("layers."):
                assert rule == merged.blocks[name]


def test_cut_in_either_stage(hybrid: Path, experiment_with: With, tmp_path: Path) -> None:
    """Between and inside events, before, at and behind the second stage's start: completed to the same bytes."""
    out = Path(shutil.copytree(hybrid, tmp_path / "out"))
    journal = (out / "journal.jsonl").read_bytes()
    lines = journal.splitlines(keepends=True)
    second = next(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "stage" and b'"merged"' in line)

    for cut in (second - 4, second, second + 1, second + 7):
        kept = b"".join(lines[:cut])
        (out / "journal.jsonl").write_bytes(kept[:-3] if cut == second + 7 else kept)
        run(experiment_with(**HYBRID), out)
        assert (out / "journal.jsonl").read_bytes() == journal


def test_two_workers_write_the_same_journal(hybrid: Path, experiment_with: With, tmp_path: Path) -> None:
    """Units of routes are formed without regard to who works on them."""
    two = {**HYBRID, "workers": {"backend": "local", "count": 2, "device": "cpu"}}
    run(experiment_with(**two), tmp_path / "out")

    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == (hybrid / "journal.jsonl").read_bytes()


def test_a_route_through_the_merge_leaves_as_a_model(hybrid: Path, tmp_path: Path) -> None:
    """It is exported with the merge's weights inside, and a rebuild gives the same tensors and scores."""
    number, _ = next((i, r) for i, r in routed(History.read(hybrid)) if any(h.from_ == MERGED for h in r.route.hops))  # type: ignore[union-attr]
    write_export(History.read(hybrid), number, "hf", tmp_path / "model")

    v = verify(tmp_path / "model")
    assert (v.ok, v.problems) == (True, ())


# -- units ---------------------------------------------------------------------------------------------------------


def jobs(*paths: list[tuple[str, int]]) -> list[Job]:
    items = ItemSet("search", {"sums": (0,)})
    out = []
    for i, path in enumerate(paths):
        hops = [{"from": source, "layer": layer} for source, layer in path]
        recipe = Recipe.model_validate({"merge": [], "route": {"hops": hops}} if path else {"merge": []})
        out.append(Job(i, 0, recipe, items))
    return out


def test_merges_stay_alone_and_in_order() -> None:
    """Without routes every job is a unit, as it was given."""
    assert [[j.proposal for j in unit] for unit in alike(jobs([], [], []))] == [[0], [1], [2]]


def test_routes_that_begin_alike_stand_together() -> None:
    """Half of the path decides; whoever is alone stays so; units do not grow beyond a few."""
    a = [("x", i) for i in range(6)]
    units = alike(jobs(a, [("y", 0), *a], [*a[:3], ("y", 3)], [], [*a, ("y", 1)]))

    assert sorted(sorted(j.proposal for j in unit) for unit in units) == [[0, 2, 4], [1], [3]]
    for unit in units:
        for first, second in pairwise(unit):
            assert in_common(first.recipe.path, second.recipe.path) >= 3
    many = alike(jobs(*[[*a, ("y", i)] for i in range(2 * TOGETHER + 1)]))
    assert [len(unit) for unit in many] == [TOGETHER, TOGETHER, 1]
