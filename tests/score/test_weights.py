"""Distance from the base as an objective term: no items, no benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from evomerge.cli import main
from evomerge.config import load
from evomerge.errors import UserError
from evomerge.fitness import FitnessSpec
from evomerge.objective import Objective
from evomerge.report.front import front
from evomerge.report.results import results, text_table
from evomerge.run import run
from evomerge.schema import validated

TASK = {"name": "w", "kind": "weights"}


@pytest.fixture(scope="module")
def both(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of two objectives, accuracy and distance, over one task of items."""
    task = json.loads(small_experiment.read_text())["fitness"]["tasks"][0]
    objectives = [{"name": "loss", "tasks": ["sums"]}, {"name": "distance", "tasks": ["w"]}]
    fitness = {"tasks": [task, TASK], "objectives": objectives}
    overrides = {
        "fitness": fitness,
        "search": {"algorithm": "random", "budget": {"evaluations": 3}, "finalists": 2, "probes": False},
    }
    return run(load(small_experiment, overrides), tmp_path_factory.mktemp("runs") / "both")


def test_the_distance_is_an_objective(both: Any) -> None:
    """The base has 0; experts have their distance, and every candidate's loss is what its weights say."""
    base, one = both.baselines["base"].scores("search"), both.baselines["one"].scores("search")

    assert base["w"]["distance"].tolist() == [0.0]
    assert 0.05 < one["w"]["distance"][0] < 0.5
    for entry in both.entries.values():
        scores = entry.scores("search")
        if scores is not None:
            assert both.losses(entry, "search")[1] == pytest.approx(float(scores["w"]["distance"][0]))


def test_tables_leave_it_out(both: Any) -> None:
    """No column, no part of the mean: both are those of the benchmark alone."""
    table = results(both).table

    assert {s.task for s in table} == {"sums", "mean"}
    by = {(s.model, s.task): s.score for s in table}
    assert all(by[m, "mean"] == pytest.approx(by[m, "sums"]) for m, _ in by)
    assert "w (" not in text_table(both)


def test_candidates_show_it(both: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`show` prints the distance of a candidate."""
    assert main(["show", str(both.path)]) == 0
    assert " w 0." in capsys.readouterr().out


def test_models_and_recipes_show_it(both: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`score` of a recipe gives the distance without an interval."""
    recipe = tmp_path / "one.yaml"
    assert main(["show", str(both.path), "1"]) == 0
    recipe.write_text(capsys.readouterr().out, encoding="utf-8")

    assert main(["score", str(recipe), str(both.path / "experiment.yaml"), "--split", "report", "--json"]) == 0

    row = next(r for r in json.loads(capsys.readouterr().out)["scores"] if r["task"] == "w")
    assert row["score"] == row["low"] == row["high"] > 0.05


def test_floors_and_forgetting_do_not_price_it() -> None:
    """The floor is about what models can do; the distance of the base, 0, is no score to fall below."""
    items = {"name": "t", "data": "x.jsonl"}
    plain = validated(FitnessSpec, {"tasks": [items, TASK]}, "fitness")
    priced = validated(FitnessSpec, {"tasks": [items, TASK], "floor": {"penalty": 9.0}}, "fitness")

    def loss(spec: FitnessSpec) -> float:
        base = {"t": {"accuracy": np.array([0.5])}, "w": {"distance": np.array([0.0])}}
        far = {"t": {"accuracy": np.array([0.5])}, "w": {"distance": np.array([0.3])}}
        return float(Objective.bind(spec, base, {"base": base}).losses(far)[0])

    assert loss(plain) == loss(priced) == pytest.approx(-0.25 + 0.15)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([TASK], "none of these says how well a model does"),
        ([{**TASK, "data": "x.jsonl"}], "kind weights looks at no items; remove data and splits"),
        (
            [{**TASK, "splits": {"search": "a.jsonl", "select": "b.jsonl", "report": "c.jsonl"}}],
            "remove data and splits",
        ),
        ([{**TASK, "metric": "accuracy"}], "unknown metric 'accuracy'"),
    ],
)
def test_wrong_tasks_are_refused(tasks: list[Any], words: str) -> None:
    """A fitness needs a benchmark; weights have no items."""
    with pytest.raises(UserError) as caught:
        validated(FitnessSpec, {"tasks": tasks}, "fitness")

    assert words in str(caught.value)


def test_the_front_and_the_card_give_it_no_interval(
    both: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One number for all weights has no interval, and is no evaluation that the hub should list."""
    cells = [m["scores"]["report"]["w"] for m in front(both)["members"]]
    assert all(c["low"] == c["high"] == c["score"] for c in cells)
    assert main(["front", str(both.path)]) == 0
    assert "inf" not in capsys.readouterr().out
    assert main(["export", str(both.path), "--to", str(tmp_path / "out")]) == 0
    listed = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert {r.dataset_name for r in listed or ()} <= {"sums"}
