"""Depth, parameters and latency as objectives: those of the exported model; what is measured is recorded once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.check import check
from evomerge.config import load
from evomerge.errors import UserError
from evomerge.evaluate import EvaluatorSpec, MergeEvaluator
from evomerge.export.hf import build_weights
from evomerge.export.verify import verify
from evomerge.export.write import write_export
from evomerge.fitness import FitnessSpec
from evomerge.history import History
from evomerge.pool import ModelPool
from evomerge.prepare import compile_plans, load_items
from evomerge.proposal import ItemSet, Job, WorkUnit
from evomerge.recipe import Recipe
from evomerge.run import run
from evomerge.schema import validated
from evomerge.score import structure
from evomerge.score.plan import PlanShape
from evomerge.score.structure import seconds_of, weights_of
from evomerge.stock import stock_config, stock_model
from evomerge.tasks.base import NOTHING

SHAPE = {"name": "shape", "kind": "structure"}
SPEED = {"name": "speed", "kind": "structure", "metric": "latency", "tokens": 8, "repetitions": 2}
REPEATED = [("base", 0), ("one", 1), ("base", 0), ("one", 1), ("base", 1)]
SHORT = [("one", 1)]


def routed(hops: list[tuple[str, int]]) -> dict[str, Any]:
    return {"recipe": 1, "route": {"hops": [{"from": n, "layer": i} for n, i in hops]}}


class Evaluator:
    """Base and one expert with tasks of kind `structure`."""

    def __init__(self, base: Path, one: Path, *tasks: dict[str, Any]) -> None:
        self.pool = ModelPool.open(base, {"one": one})
        self.manifest = self.pool.manifest()
        specs = validated(FitnessSpec, {"tasks": [{"name": "t", "data": "x"}, *tasks]}, "fitness").tasks[1:]
        items = load_items(specs, NOTHING)
        plans = compile_plans(specs, items, self.pool.checkpoints["base"], PlanShape(64))
        self.evaluator = MergeEvaluator(
            EvaluatorSpec(str(base), {"one": str(one)}, self.manifest, "float32", plans, "cpu", 1)
        )
        self.items = ItemSet("search", dict.fromkeys(plans, (0,)))

    def recipe(self, hops: list[tuple[str, int]]) -> Recipe:
        return Recipe.model_validate(routed(hops)).canonical(self.manifest)

    def scores(self, *recipes: Recipe) -> list[dict[str, dict[str, float]]]:
        """Of one work unit, in which common beginnings of routes are shared."""
        jobs = tuple(Job(i, 0, r, self.items) for i, r in enumerate(recipes))
        out = []
        for e, _ in self.evaluator.evaluate(WorkUnit(0, jobs)):
            assert e.scores is not None, e.reason
            out.append({t: {m: float(x[0]) for m, x in columns.items()} for t, columns in e.scores.items()})
        return out


@pytest.mark.parametrize("tied", [False, True])
def test_they_are_those_of_the_export(tied: bool, tiny_model: Any) -> None:
    """Routes longer and shorter than the base, and after them a plain merge: hops, and all exported elements."""
    e = Evaluator(tiny_model("llama", 0, tied=tied), tiny_model("llama", 1, tied=tied), SHAPE)
    recipes = [e.recipe(REPEATED), e.recipe(SHORT), e.recipe([("base", 0), ("one", 1)])]
    exported = [sum(t.numel() for t in build_weights(r, e.pool, e.manifest).values()) for r in recipes]
    scores = [s["shape"] for s in e.scores(*recipes)]

    assert [s["depth"] for s in scores] == [5, 1, 2]
    assert [s["parameters"] for s in scores] == pytest.approx([n / 1e6 for n in exported], rel=1e-6)
    assert exported[2] == e.manifest.parameters
    assert all({*s} == {"depth", "parameters"} for s in scores)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "qwen2", "mamba"])
def test_weights_of_plain_models(arch: str, tiny_model: Any) -> None:
    """Every parameter once, tied or not, in families with a row of their own and without."""
    folder = tiny_model(arch)
    model = stock_model(folder, stock_config(folder, json.loads((folder / "config.json").read_text())), torch.float32)

    assert weights_of(model) == ModelPool.open(folder, {}).manifest().parameters


# -- latency ----------------------------------------------------------------------------------------------------------


def test_latency_is_the_median_behind_a_first_pass(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of 100, 1, 4 and 2 seconds: the first is not counted. All are over the same tokens."""
    from transformers import AutoModelForCausalLM

    clock = itertools.accumulate([0.0, 100.0, 0.0, 1.0, 0.0, 4.0, 0.0, 2.0])
    monkeypatch.setattr(structure.time, "perf_counter", lambda: next(clock))
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), local_files_only=True).eval()
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    assert seconds_of(model, 600, 3) == 2.0
    assert len(seen) == 4
    assert all(torch.equal(x, seen[0]) for x in seen)
    assert seen[0].shape == (1, 600)
    assert int(seen[0].max()) == 511  # the vocabulary's last token


def test_timed_passes_go_through_every_layer(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the second candidate's path begins with all of the first's: whole passes, three of each."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    e = Evaluator(tiny_model("llama", 0), tiny_model("llama", 1), SPEED)
    calls = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(x.shape[1]) or forward(self, x))
    scores = e.scores(e.recipe(REPEATED[:3]), e.recipe(REPEATED))

    assert calls == [8] * 3 * (3 + 5)
    assert all(s["speed"]["latency"] > 0.0 and s["speed"]["depth"] == n for s, n in zip(scores, (3, 5), strict=True))


def test_plans_know_what_they_time(tiny_model: Any) -> None:
    """Three passes of 8 tokens; none where nothing is timed. How it is timed makes another task."""
    e = Evaluator(tiny_model("llama", 0), tiny_model("llama", 1), SHAPE, SPEED, {**SPEED, "name": "b", "tokens": 9})
    plans = e.evaluator._plans

    assert [p.tokens((0,)) for p in plans.values()] == [0, 24, 27]
    assert plans["shape"].tokens(()) == plans["speed"].tokens(()) == 0
    assert plans["speed"].content() != plans["b"].content()


# -- in runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_tasks(small_experiment: Path) -> Callable[..., Any]:
    """with_tasks(task, ..., **overrides) -> the small experiment with one task of items, and these."""
    task = json.loads(small_experiment.read_text())["fitness"]["tasks"][0]

    def make(*tasks: dict[str, Any], objectives: Any = None, **overrides: Any) -> Any:
        fitness = {"tasks": [task, *tasks], **({"objectives": objectives} if objectives else {})}
        return load(small_experiment, {"fitness": fitness, "search.probes": False, **overrides})

    return make


def test_a_front_of_accuracy_and_depth(with_tasks: Callable[..., Any], tmp_path: Path) -> None:
    """NSGA-II beside given routes: the shallow one is on the front, whatever its accuracy; the deep one is known as
    deep."""
    objectives = [{"name": "loss", "tasks": ["sums"]}, {"name": "depth", "tasks": ["shape"], "metric": "depth"}]
    experiment = with_tasks(
        SHAPE,
        objectives=objectives,
        **{
            "search.algorithm": "nsga-ii",
            "search.budget": {"evaluations": 8},
            "search.warm_start": [routed(SHORT), routed(REPEATED)],
        },
    )
    history = run(experiment, tmp_path / "run")
    given = {e.id: history.losses(e, "search") for e in history.entries.values() if e.role == "given"}
    final = history.losses

    assert [losses[1] for losses in given.values()] == [1.0, 5.0]
    assert {final(e, "search")[1] for e in history.entries.values() if e.role == "search"} == {2.0}
    assert min(given) in history.front
    assert run(experiment, tmp_path / "run").front == history.front


def test_a_run_with_latency(with_tasks: Callable[..., Any], tmp_path: Path) -> None:
    """Cut off and resumed it keeps what it recorded; a finished one runs again to the same bytes; the export is
    verified but for the seconds."""
    objectives = [{"name": "loss", "tasks": ["sums"]}, {"name": "latency", "tasks": ["speed"]}]
    experiment = with_tasks(
        SPEED, objectives=objectives, **{"search.algorithm": "nsga-ii", "search.budget": {"evaluations": 8}}
    )
    assert any("latency is measured, so a fresh run" in n for n in check(experiment).notes)
    journal = tmp_path / "run" / "journal.jsonl"
    run(experiment, journal.parent)
    whole = journal.read_bytes()
    run(experiment, journal.parent)
    assert journal.read_bytes() == whole

    cut = whole[: len(whole) * 2 // 3]
    kept = cut[: cut.rindex(b"\n") + 1]
    journal.write_bytes(cut)
    run(experiment, journal.parent)
    assert journal.read_bytes().startswith(kept)
    history = History.read(journal.parent)
    assert len(history.front) >= 1
    for entry in history.entries.values():
        scores = entry.scores("search")
        assert scores is not None
        assert scores["speed"]["latency"][0] > 0.0

    write_export(history, history.front[0], "hf", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "evomerge.json").read_text())
    assert any("latency" in m for tasks in report["scores"].values() for m in tasks.values())
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({**SHAPE, "data": "x.jsonl"}, "kind structure looks at no items; remove data and splits"),
        ({**SHAPE, "metric": "size"}, "unknown metric 'size'"),
        ({**SHAPE, "repetitions": 0}, "repetitions"),
        ({**SHAPE, "tokens": 0}, "tokens"),
    ],
)
def test_wrong_tasks_are_refused(task: dict[str, Any], words: str) -> None:
    """In one line."""
    with pytest.raises(UserError) as caught:
        validated(FitnessSpec, {"tasks": [{"name": "t", "data": "x"}, task]}, "fitness")

    assert words in str(caught.value)


def test_latency_is_an_objective_of_tasks_about_it(with_tasks: Callable[..., Any]) -> None:
    """Another task of the kind does not measure it; a sequence has to fit into the model."""
    with pytest.raises(UserError, match="task 'shape' has no metric 'latency'"):
        with_tasks(SHAPE, objectives=[{"name": "latency", "tasks": ["shape"], "metric": "latency"}])
    with pytest.raises(UserError, match="task 'speed': tokens is 257; the model takes 256"):
        check(with_tasks({**SPEED, "tokens": 257}))


def test_scores_have_the_shape_of_positions(tiny_model: Any) -> None:
    """One value for each item, all the same."""
    e = Evaluator(tiny_model("llama", 0), tiny_model("llama", 1), SHAPE)
    plan = e.evaluator._plans["shape"]
    columns = e.evaluator._scorers["structure"].score(e.evaluator._candidate, plan, (0, 1, 2))

    assert {m: x.tolist() for m, x in columns.items()}["depth"] == [2.0, 2.0, 2.0]
    assert all(x.dtype == np.float32 for x in columns.values())
