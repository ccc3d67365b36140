"""The worker's side: recipes in, evaluations out, whatever happens."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.config import load
from evomerge.errors import UserError
from evomerge.evaluate import MergeEvaluator, pick_device
from evomerge.prepare import Prepared, prepare
from evomerge.proposal import Evaluation, ItemSet, Job, Telemetry, WorkUnit
from evomerge.recipe import Recipe
from evomerge.score.model import Altered
from evomerge.standalone import score_folder


def one(evaluator: Any, recipe: Recipe, items: ItemSet) -> tuple[Evaluation, Telemetry]:
    [result] = evaluator.evaluate(WorkUnit(0, (Job(7, 0, recipe, items),)))
    assert isinstance(result[0], Evaluation)
    return result


@pytest.fixture(scope="module")
def prepared(small_experiment: Path) -> Prepared:
    return prepare(load(small_experiment))


@pytest.fixture
def evaluator(prepared: Prepared) -> MergeEvaluator:
    return prepared.evaluator()()


def test_experts_alone_score_as_their_folders(prepared: Prepared, evaluator: MergeEvaluator) -> None:
    """The baselines' recipes, built one after the other in one memory, score like each folder by itself."""
    experiment = prepared.experiment
    folders = {"base": experiment.models.base, **experiment.models.experts}
    for name, folder in folders.items():
        result, telemetry = one(evaluator, prepared.baselines()[name], prepared.items["report"])
        alone = score_folder(Path(folder), experiment.fitness, splits=("report",))["report"]

        assert result.status == "ok"
        assert telemetry.peak_mb > 0
        for task, metrics in alone.items():
            for metric, column in metrics.items():
                assert np.array_equal(result.scores[task][metric], column), (name, task, metric)


def test_only_the_asked_items_are_scored(prepared: Prepared, evaluator: MergeEvaluator) -> None:
    """Columns follow the item set: its tasks, its positions, its order."""
    recipe = prepared.baselines()["uniform"]
    everything, _ = one(evaluator, recipe, prepared.items["search"])
    where = prepared.items["search"].tasks["words"]
    part, _ = one(evaluator, recipe, ItemSet("rung", {"words": (where[5], where[0])}))

    assert set(part.scores) == {"words"}
    expected = everything.scores["words"]["cross_entropy"][[5, 0]]
    assert part.scores["words"]["cross_entropy"] == pytest.approx(expected, abs=1e-5)


def test_a_second_visit_changes_no_block(prepared: Prepared, evaluator: MergeEvaluator) -> None:
    """Telemetry counts the blocks that were written: all at first, none for the same recipe again."""
    recipe = prepared.baselines()["one"]
    counts = [one(evaluator, recipe, prepared.items["select"])[1].changed_blocks for _ in range(2)]

    assert counts == [len(prepared.manifest.blocks), 0]


def test_bad_weights_are_recorded_and_forgotten(tiny_model: Any, experiment_with: Callable[..., Any]) -> None:
    """An expert with a NaN gives failed:nan with the block's name; the next candidate scores as ever."""
    sick = tiny_model("llama", 1, name="sick")
    tensors = load_file(sick / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, sick / "model.safetensors")
    bad = prepare(experiment_with(**{"models.experts.one": str(sick)}))
    good = prepare(experiment_with())
    evaluator, healthy = bad.evaluator()(), good.evaluator()()

    first, _ = one(evaluator, bad.baselines()["uniform"], bad.items["search"])
    assert (first.status, first.scores) == ("failed:nan", None)
    assert "layers.1.mlp" in first.reason
    second, _ = one(evaluator, bad.baselines()["two"], bad.items["search"])
    expected, _ = one(healthy, good.baselines()["two"], good.items["search"])
    for task in expected.scores:
        assert np.array_equal(second.scores[task]["accuracy"], expected.scores[task]["accuracy"])
        assert np.array_equal(second.scores[task]["cross_entropy"], expected.scores[task]["cross_entropy"])


def test_overflowing_logits_are_recorded(prepared: Prepared, evaluator: MergeEvaluator) -> None:
    """Weights that are finite but overflow in the forward pass give failed:nan from the scorer."""
    huge = {"method": "linear", "params": {"normalize": False}, "sources": {"one": {"weight": 1e6}}}
    merge = [{"match": {"block": block}, **huge} for block in ("final_norm", "head")]
    recipe = Recipe.model_validate({"merge": merge}).canonical(prepared.manifest)
    evaluator._builder.bank.flat["one"][-1000:] *= 1e30  # rows of the head

    result, _ = one(evaluator, recipe, prepared.items["search"])
    assert result.status == "failed:nan"
    assert "NaN or infinite" in result.reason
    assert one(evaluator, prepared.baselines()["base"], prepared.items["search"])[0].ok


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ZeroDivisionError("by\nzero"), "failed:error", "ZeroDivisionError: by zero"),
        (ValueError("x" * 2000), "failed:error", "ValueError: xxx"),
        (MemoryError(), "failed:oom", "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "failed:oom", "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "failed:oom", "out of device memory"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else "",
)
def test_other_exceptions_are_results(
    prepared: Prepared,
    evaluator: MergeEvaluator,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: str,
    reason: str,
) -> None:
    """Whatever a scorer raises becomes a recorded failure of one short line; the evaluator lives on."""

    def fail(*_: object) -> None:
        raise error

    scorer = evaluator._scorers["multiple_choice"]
    with monkeypatch.context() as m:
        m.setattr(scorer, "score", fail)
        result, _ = one(evaluator, prepared.baselines()["one"], prepared.items["search"])

    assert result.status == status
    assert result.reason.startswith(reason)
    assert "\n" not in result.reason
    assert len(result.reason) <= 500
    assert one(evaluator, prepared.baselines()["one"], prepared.items["search"])[0].ok


def test_recipe_of_another_dtype_is_a_recorded_error(prepared: Prepared, evaluator: MergeEvaluator) -> None:
    """The buffer's dtype is fixed; a recipe of another one fails by itself."""
    half = prepared.baselines()["one"].model_copy(update={"dtype": "bfloat16"})

    result, _ = one(evaluator, half, prepared.items["search"])
    assert result.status == "failed:error"
    assert "bfloat16" in result.reason


def test_what_travels_to_workers_is_small_and_picklable(prepared: Prepared) -> None:
    """Paths and plans travel, weights never do."""
    make = prepared.evaluator()
    data = pickle.dumps(make)

    assert len(data) < 100_000
    assert pickle.loads(data).args[0].manifest == prepared.manifest


def test_a_pool_that_vanished_is_bad_input(experiment_with: Callable[..., Any], tiny_model: Any) -> None:
    """A folder that is gone when the worker starts is a UserError, which executors hand to the driver."""
    moving = tiny_model("llama", 1, name="moving")
    make = prepare(experiment_with(**{"models.experts.one": str(moving)})).evaluator()
    (moving / "model.safetensors").unlink()

    with pytest.raises(UserError, match=r"no model\.safetensors"):
        make()


def test_auto_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto takes the first CUDA device where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == "cuda:0"
    assert pick_device("cpu") == "cpu"


# -- routes --------------------------------------------------------------------------------------------------------

SCALED = {"route": {"hops": [{"from": "one", "layer": 1}, {"from": "two", "layer": 0, "scale": 0.5}]}}


def routed(prepared: Prepared, *layers: int) -> Recipe:
    hops = [{"from": "one", "layer": i} for i in layers]
    return Recipe.model_validate({"route": {"hops": hops}}).canonical(prepared.manifest)


def test_a_unit_of_routes_scores_as_one_by_one(prepared: Prepared, evaluator: MergeEvaluator) -> None:
    """Paths that begin alike share states and give the bits that each gives alone; merges in between do no harm."""
    recipes = [
        routed(prepared, 1, 0, 1),
        routed(prepared, 1, 0, 0, 1),
        prepared.baselines()["one"],
        routed(prepared, 1),
    ]
    items = prepared.items["search"]
    alone = [one(evaluator, r, items)[0] for r in recipes]
    jobs = tuple(Job(i, 0, r, items) for i, r in enumerate(recipes))
    together = [e for e, _ in evaluator.evaluate(WorkUnit(0, jobs))]

    for a, b in zip(alone, together, strict=True):
        for task, metrics in a.scores.items():
            for metric, column in metrics.items():
                assert np.array_equal(b.scores[task][metric], column)
    assert not np.array_equal(together[0].scores["sums"]["probability"], together[1].scores["sums"]["probability"])


def test_shared_states_never_cost_a_candidate(
    prepared: Prepared, evaluator: MergeEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory runs out while states are kept for others, they go and the candidate is tried again without."""
    scored = evaluator._scored

    def scarce(task: str, positions: tuple[int, ...]) -> Any:
        if evaluator._router.shared.used:
            raise MemoryError
        return scored(task, positions)

    monkeypatch.setattr(evaluator, "_scored", scarce)
    recipes = [routed(prepared, 1, 0, 1), routed(prepared, 1, 0, 0), routed(prepared, 1, 0)]
    jobs = tuple(Job(i, 0, r, prepared.items["search"]) for i, r in enumerate(recipes))

    assert [e.status for e, _ in evaluator.evaluate(WorkUnit(0, jobs))] == ["ok"] * 3


def test_altered_weights_of_a_source_are_read_anew(prepared: Prepared, evaluator: MergeEvaluator) -> None:
    """A route's layers are the resident weights: whoever writes to them must not leave a trace in later candidates."""
    items = prepared.items["search"]
    before, _ = one(evaluator, prepared.baselines()["one"], items)
    scored = evaluator._scored

    def altering(task: str, positions: tuple[int, ...]) -> Any:
        evaluator._candidate.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        raise Altered("the function changed the model")

    evaluator._scored = altering  # type: ignore[method-assign]
    assert one(evaluator, routed(prepared, 1, 0), items)[0].status == "failed:error"
    evaluator._scored = scored  # type: ignore[method-assign]
    after, _ = one(evaluator, prepared.baselines()["one"], items)

    assert np.array_equal(after.scores["sums"]["probability"], before.scores["sums"]["probability"])


def test_a_copy_of_a_routed_model_is_that_model(prepared: Prepared, evaluator: MergeEvaluator) -> None:
    """Functions of a user may copy what they are given; the copy keeps its path and gains, the live one moves on."""
    scaled = Recipe.model_validate(SCALED).canonical(prepared.manifest)
    one(evaluator, scaled, prepared.items["select"])
    live = evaluator._candidate.model
    tokens = torch.arange(5, 25)[None]
    with torch.inference_mode():
        expected = live(input_ids=tokens).logits
        twin = copy.deepcopy(live)
        one(evaluator, routed(prepared, 1, 0), prepared.items["select"])

        assert torch.equal(twin(input_ids=tokens).logits, expected)
        assert not torch.equal(live(input_ids=tokens).logits, expected)
