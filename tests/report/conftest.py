"""Histories without models, as large or as hostile as a test wants them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.canonical import encode_array
from evomerge.config import Experiment, load
from evomerge.history import Entry, History
from evomerge.prepare import Prepared, baselines, bind_spaces
from evomerge.proposal import Evaluation, frozen_genome
from evomerge.run import run
from evomerge.workers.fake import FakeEvaluator

MakeHistory = Callable[..., History]


@pytest.fixture
def made_history(manifest_of: Callable[..., Any], tmp_path: Path) -> MakeHistory:
    """made_history(candidates=40, tasks=3, ...) -> the History of a search whose scores are random numbers."""

    def make(
        candidates: int = 40,
        tasks: int = 3,
        layers: int = 2,
        experts: tuple[str, ...] = ("math", "code"),
        *,
        method: str = "task_arithmetic",
        groups: str = "layer-modules",
        finished: bool = True,
        fails: Callable[[int], str | None] = lambda i: None,
        parents: Callable[[int], tuple[int, ...]] = lambda i: (),
        description: str = "",
    ) -> History:
        rng = np.random.default_rng(5)
        manifest = manifest_of(layers, experts)
        axes = {"weight": {"low": -0.5, "high": 1.5}} | (
            {"density": {"low": 0.1, "high": 1}} if method == "ties" else {}
        )
        experiment = Experiment.model_validate(
            {
                "name": "made",
                "description": description,
                "models": {"base": "/models/base", "experts": {e: f"/models/{i}" for i, e in enumerate(experts)}},
                "search_space": {"method": method, "groups": groups, "axes": axes},
                "fitness": {"tasks": [{"name": f"task-{i}", "data": "/data.jsonl"} for i in range(tasks)]},
                "search": {"algorithm": "cma-es", "budget": {"evaluations": candidates}},
            }
        )
        (space,) = bind_spaces(experiment, manifest, "float32")
        ids = {
            s: {t.name: [str(i) for i in range(20)] for t in experiment.tasks} for s in ("search", "select", "report")
        }

        def scored(i: int, split: str) -> Evaluation:
            if reason := fails(i):
                return Evaluation("failed:error", None, reason)
            rights = rng.random((tasks, 20)) < 0.4 + 0.3 * i / (candidates + 10)
            return Evaluation(
                "ok",
                {t.name: {"accuracy": r} for t, r in zip(experiment.tasks, rights.astype(np.float32), strict=True)},
            )

        entries: dict[int, Entry] = {}
        for i, (name, recipe) in enumerate(baselines(manifest, "float32").items()):
            results = {
                s: Evaluation("ok", scored(0, s).scores or scored(-1, s).scores)
                for s in (ids if finished else ("search",))
            }
            entries[i] = Entry(i, -1, 0, "baseline", name, recipe.id, None, recipe.to_json(), (), results)
        first = len(entries)
        # A few points in turn: decoding thousands would take longer than the page.
        genomes = [frozen_genome(rng.random(len(space.axes))) for _ in range(min(candidates, 30))]
        known = [(encode_array(g), space.decode(g, manifest).id) for g in genomes]
        for i in range(first, first + candidates):
            genome, recipe_id = known[i % len(known)]
            results = {"search": scored(i, "search")}
            entries[i] = Entry(i, 0, i // 10, "search", "", recipe_id, genome, None, parents(i), results)
        final = None
        if finished:
            winner = max(i for i, e in entries.items() if e.scores("search") is not None)
            for split in ("select", "report"):
                entries[winner].results[split] = scored(winner, split)
            final = {"winner": winner, "finalists": [winner]}
        path = tmp_path / "made"
        path.mkdir(exist_ok=True)
        (path / "experiment.yaml").write_text(experiment.to_yaml(), encoding="utf-8")
        telemetry = [
            {"at": 1e9 + i, "run_seconds": float(i), "proposal": i, "items": "search", "build_seconds": 0.1}
            | {"score_seconds": 0.8, "peak_mb": 512.0, "worker": f"local-{i % 2}", "device": "cpu", "attempts": 1}
            for i in range(1, 40)
        ]
        (path / "telemetry.jsonl").write_text("".join(json.dumps(t) + "\n" for t in telemetry), encoding="utf-8")
        facts = {"numerics": {"device": "cpu", "torch": "2"}, "experiment_id": "0" * 64}
        return History(
            path, experiment, manifest, "float32", facts, entries, ids, final, finished, looks=int(finished), cached=0
        )

    return make


@pytest.fixture(scope="session")
def front_run(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> History:
    """NSGA-II over made-up scores: many candidates, so that the front has several members."""
    overrides = {
        "fitness.objectives": [{"name": "first", "tasks": ["sums"]}, {"name": "second", "tasks": ["words"]}],
        "search": {"algorithm": "nsga-ii", "budget": {"evaluations": 60}, "population": 12, "finalists": 12},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prepared, "evaluator", lambda _: partial(FakeEvaluator, metrics=("accuracy", "cross_entropy")))
        return run(load(small_experiment, overrides), tmp_path_factory.mktemp("front") / "run")


AROUND = {
    "base": "base",
    "route": {
        "hops": [{"from": "base", "layer": 0}, {"from": "two", "layer": 0, "scale": 0.9}, {"from": "two", "layer": 1}]
    },
}
THROUGH = {
    "base": "base",
    "merge": [{"method": "task_arithmetic", "sources": {"one": {"weight": 0.5}}}],
    "route": {
        "hops": [
            {"from": "one", "layer": 0},
            {"from": "merged", "layer": 1, "attn_gain": 0.8},
            {"from": "merged", "layer": 1},
        ]
    },
}


@pytest.fixture(scope="session")
def routed_run(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> History:
    """The small experiment for two objectives, with two given routes as the finalists that its front has."""
    overrides = {
        "search": {"algorithm": "random", "budget": {"evaluations": 2}, "finalists": 2},
        "search.warm_start": [AROUND, THROUGH],
        "fitness.objectives": [{"name": "first", "tasks": ["sums"]}, {"name": "second", "tasks": ["words"]}],
    }
    history = run(load(small_experiment, overrides), tmp_path_factory.mktemp("routed") / "run")
    around, through = (e.id for e in history.entries.values() if e.role == "given")
    entries = dict(history.entries)
    scored = next(e for e in entries.values() if "report" in e.results)
    for i in (around, through):
        entries[i] = replace(entries[i], results={**scored.results, **entries[i].results})
    final = {**(history.final or {}), "winner": through, "front": [around, through]}
    return replace(history, entries=entries, final=final)
