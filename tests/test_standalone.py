"""One model outside a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from evomerge.errors import RunError
from evomerge.history import History
from evomerge.pool import ModelPool
from evomerge.recipe import Recipe
from evomerge.standalone import score_folder, score_recipe


def test_a_recipe_scores_as_in_its_run(finished_run: Path) -> None:
    """The winner, rebuilt outside the run, has the journal's scores to the bit on every split."""
    history = History.read(finished_run)
    paths = history.source_paths()
    pool = ModelPool.open(paths.pop("base"), paths)
    assert history.winner_id is not None
    scores = score_recipe(history.winner, pool, history.experiment.fitness)

    entry = history.entry(history.winner_id)
    for split in ("search", "select", "report"):
        recorded = entry.scores(split)
        assert recorded is not None
        for task, metrics in recorded.items():
            for metric, column in metrics.items():
                assert np.array_equal(scores[split][task][metric], column)


def test_a_folder_is_a_recipe_of_its_base(finished_run: Path, tiny_model: Any) -> None:
    """Scoring a folder equals scoring a pool's base; only the asked splits come back."""
    fitness = History.read(finished_run).experiment.fitness
    folder = tiny_model("llama", 1)
    pool = ModelPool.open(tiny_model("llama"), {"one": folder})
    recipe = Recipe.model_validate({"merge": [{"method": "linear", "sources": {"one": {}}}]})
    alone = score_folder(folder, fitness, splits=("select",))
    merged = score_recipe(recipe, pool, fitness, splits=("select",))

    assert list(alone) == ["select"]
    for task in ("sums", "words"):
        assert np.array_equal(alone["select"][task]["probability"], merged["select"][task]["probability"])


def test_a_route_is_followed(finished_run: Path, tiny_model: Any) -> None:
    """A path through all layers of another model, with its ends, is that model; one that turns back is not."""
    fitness = History.read(finished_run).experiment.fitness
    deep = tiny_model("llama", 1, num_hidden_layers=3)
    pool = ModelPool.open(tiny_model("llama"), {"deep": deep})
    ends = {"embed": "deep", "final_norm": "deep", "head": "deep"}

    def scored(*layers: int) -> Any:
        hops = [{"from": "deep", "layer": i} for i in layers]
        recipe = Recipe.model_validate({"route": {**ends, "hops": hops}})
        return score_recipe(recipe, pool, fitness, splits=("select",))["select"]["words"]["probability"]

    alone = score_folder(deep, fitness, splits=("select",))["select"]["words"]["probability"]
    assert np.array_equal(scored(0, 1, 2), alone)
    assert not np.array_equal(scored(0, 1, 0), alone)


def test_nan_weights_are_a_run_error(experiment_with: Callable[..., Any], tiny_model: Any) -> None:
    """A model with NaN weights cannot be scored; that is one line, not a traceback."""
    sick = tiny_model("llama", name="sick")
    tensors = load_file(sick / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, sick / "model.safetensors")

    with pytest.raises(RunError, match="NaN or infinite weights in final_norm"):
        score_folder(sick, experiment_with().fitness)
