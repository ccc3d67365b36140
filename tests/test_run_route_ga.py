"""Runs of the genetic algorithm on routes, over models of three and four layers: cut off, resumed, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.check import check, text
from evomerge.config import load
from evomerge.errors import UserError
from evomerge.export.verify import open_recipe_pool
from evomerge.export.write import write_export
from evomerge.fitness import FitnessSpec
from evomerge.history import History
from evomerge.pool import ModelPool
from evomerge.run import run
from evomerge.schema import validated

SEARCH = {"seed": 4, "budget": {"evaluations": 20}, "population": 6, "finalists": 2}


@pytest.fixture(scope="module")
def experiment(small_experiment: Path, tiny_model: Any) -> Callable[..., Any]:
    """experiment(**settings of search) -> base of three layers, expert of four, one task, without a search space."""
    data = json.loads(small_experiment.read_text())
    [task] = data["fitness"]["tasks"][:1]
    task["splits"] = {s: str(small_experiment.parent / f) for s, f in task["splits"].items()}
    base, deep = (str(tiny_model("llama", n, num_hidden_layers=n)) for n in (3, 4))

    def make(algorithm: str = "route-ga", **search: Any) -> Any:
        settings = {**SEARCH, **search} if algorithm == "route-ga" else {"budget": {"evaluations": 4}}
        return load(
            {
                "name": "routes",
                "models": {"base": base, "experts": {"deep": deep}},
                "fitness": {"tasks": [task]},
                "search": {**settings, "algorithm": algorithm},
                "workers": {"backend": "inline", "device": "cpu"},
            }
        )

    return make


@pytest.fixture(scope="module")
def finished(experiment: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with scales."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("routes") / "out"
    run(experiment(scales=True, mutations=2), out)
    return out


def test_a_run(finished: Path) -> None:
    """The base's path is its baseline and costs nothing; the deeper model's is a route; all candidates are scored,
    and the winner is no worse than any of them on the select split."""
    history = History.read(finished)
    searched = [e for e in history.entries.values() if e.role == "search"]
    routes = [history.recipe(e.id).route for e in searched]

    assert len(searched) == 20
    assert searched[0].recipe_id == history.baselines["base"].recipe_id
    assert routes[0] is None
    assert routes[1] is not None
    assert [(h.from_, h.layer) for h in routes[1].hops] == [("deep", i) for i in range(4)]
    assert {len(r.hops) for r in routes if r is not None} > {3, 4}
    assert any(h.scale != 1.0 for r in routes if r is not None for h in r.hops)
    assert all(e.scores("search") is not None for e in searched)
    assert history.winner_id is not None
    winner = history.loss(history.entries[history.winner_id], "select")
    assert winner == min(history.loss(e, "select") for e in history.entries.values() if e.scores("select") is not None)


def test_cut_anywhere(finished: Path, experiment: Callable[..., Any], tmp_path: Path) -> None:
    """Between and inside events the run is completed to the same bytes."""
    journal = (finished / "journal.jsonl").read_bytes()
    ends = [i + 1 for i, b in enumerate(journal) if b == ord("\n")]
    out = tmp_path / "out"
    run(experiment(scales=True, mutations=2), out)
    assert (out / "journal.jsonl").read_bytes() == journal
    for cut in (ends[12], ends[25] - 7, ends[-4]):
        (out / "journal.jsonl").write_bytes(journal[:cut])
        run(experiment(scales=True, mutations=2), out)
        assert (out / "journal.jsonl").read_bytes() == journal


def test_the_export_loads(finished: Path, tmp_path: Path) -> None:
    """The best route is a plain checkpoint of as many layers."""
    history = History.read(finished)
    best = min(
        (e for e in history.entries.values() if history.recipe(e.id).route is not None),
        key=lambda e: history.loss(e, "search"),
    )
    write_export(history, best.id, "hf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)

    assert len(model.model.layers) == len(history.recipe(best.id).route.hops)
    pool, _ = open_recipe_pool(history.recipe(best.id), history.source_paths())
    assert {*pool.checkpoints} <= {"base", "deep"}
    assert history.recipe(best.id).canonical(history.manifest).id == best.recipe_id


def test_survivors_on_growing_samples(experiment: Callable[..., Any], tmp_path: Path) -> None:
    """Adaptive items: the elite is scored on each generation's items."""
    history = run(experiment(items={"policy": "adaptive", "start": 4, "grow": 1.5}), tmp_path / "out")

    assert len([e for e in history.entries.values() if e.role == "search"]) >= 12
    assert len({g.items for g in history.generations}) > 1


def test_check_counts_every_layer(experiment: Callable[..., Any]) -> None:
    """Resident are both models, each with its own layers, and what is built; paths have up to eight hops."""
    asked = experiment()
    found = check(asked)

    assert "no axes: route-ga" in text(found)
    models = (asked.models.base, asked.models.experts["deep"])
    three, four = (ModelPool.open(Path(p), {}).manifest() for p in models)
    layer = four.parameters - three.parameters
    assert found.flop_per_candidate == 2 * (three.parameters + 5 * layer) * found.tokens_per_candidate
    assert found.memory_bytes == 4 * (three.elements + four.elements + three.elements)


def test_who_cannot_have_routes(experiment: Callable[..., Any], tiny_model: Any) -> None:
    """Merges cannot be searched over these models; families whose layers are not known are refused before a run."""
    with pytest.raises(UserError, match="4 layers, but the base has 3; only layer routes"):
        check(experiment(algorithm="greedy-soup"))
    mamba = experiment()
    paths = {"base": str(tiny_model("mamba", 0)), "experts": {"other": str(tiny_model("mamba", 1))}}
    mamba = mamba.model_copy(update={"models": mamba.models.model_copy(update=paths)})
    with pytest.raises(UserError, match=r"layer routes are known for .*, not for 'mamba'"):
        check(mamba)
    far = experiment()
    tasks = [*far.fitness.model_dump(exclude_defaults=True)["tasks"], {"name": "w", "kind": "weights"}]
    fitness = validated(FitnessSpec, {"tasks": tasks}, "fitness")
    with pytest.raises(UserError, match="task 'w' of kind weights compares a model with the base weight by weight"):
        check(far.model_copy(update={"fitness": fitness}))
