"""Experiment -> everything a run needs, or one line before anything expensive."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.config import Workers
from evomerge.errors import UserError
from evomerge.prepare import baselines, check_device, make_executor, prepare
from evomerge.score.plan import PlanShape
from evomerge.workers.fake import FakeEvaluator
from evomerge.workers.inline import InlineExecutor
from evomerge.workers.local import LocalExecutor

With = Callable[..., Any]


def test_baselines_are_base_experts_and_uniform(experiment_with: With) -> None:
    """The base has no rules, each expert one source, the uniform merge all in equal parts; all distinct."""
    p = prepare(experiment_with())
    recipes = p.baselines()

    assert list(recipes) == ["base", "one", "two", "uniform"]
    assert recipes["base"].blocks == {}
    assert {r.method for n, r in recipes.items() for r in r.blocks.values()} == {"linear"}
    assert all(set(r.sources) == {"one"} for r in recipes["one"].blocks.values())
    assert all(
        {s: c["weight"] for s, c in r.sources.items()} == {"one": 1.0, "two": 1.0}
        for r in recipes["uniform"].blocks.values()
    )
    assert len({r.id for r in recipes.values()}) == 4


def test_one_expert_has_no_uniform_merge(tiny_model: Any) -> None:
    """With a single expert the uniform merge would be that expert."""
    from evomerge.pool import ModelPool

    manifest = ModelPool.open(tiny_model("llama"), {"x": tiny_model("llama", 1)}).manifest()

    assert list(baselines(manifest, "float32")) == ["base", "x"]


def test_identity_is_what_determines_results(experiment_with: With, tiny_model: Any, tmp_path: Path) -> None:
    """Budget, workers, name and copies of the models leave the id; seed, models, items and dtype change it."""
    first = prepare(experiment_with()).experiment_id
    copy = str(shutil.copytree(experiment_with().models.experts["one"], tmp_path / "copy"))
    same = [
        {"search.budget": {"evaluations": 99}},
        {"workers.backend": "local", "workers.count": 2},
        {"name": "other", "description": "text"},
        {"models.experts.one": copy},
        {"export.format": "hf"},
    ]
    other = [
        {"search.seed": 4},
        {"search.population": 5},
        {"search.finalists": 4},
        {"models.experts.one": str(tiny_model("llama", 5))},
        {"models.dtype": "bfloat16"},
        {"search_space.axes.weight": {"low": -0.5, "high": 1.4}},
    ]

    assert [prepare(experiment_with(**o)).experiment_id == first for o in same] == [True] * len(same)
    ids = [prepare(experiment_with(**o)).experiment_id for o in other]
    assert len({first, *ids}) == len(other) + 1


def test_journalled_shape_is_kept(experiment_with: With) -> None:
    """A run that is resumed keeps the batch shape it began with."""
    p = prepare(experiment_with(), PlanShape(77))

    assert p.plan_shape == PlanShape(77)
    assert {plan.shape for plan in p.plans.values()} == {PlanShape(77)}


def test_dtype_is_the_bases_unless_named(experiment_with: With, tiny_model: Any) -> None:
    """auto takes the base's stored dtype."""
    half = {
        "models.base": str(tiny_model("llama", dtype="bfloat16")),
        "models.experts": {"x": str(tiny_model("llama", 1, dtype="bfloat16"))},
    }

    assert prepare(experiment_with()).dtype == "float32"
    assert prepare(experiment_with(**half)).dtype == "bfloat16"
    assert prepare(experiment_with(**half, **{"models.dtype": "float32"})).dtype == "float32"


def stages(*spaces: dict[str, Any]) -> dict[str, Any]:
    return {"search_space": {"stages": [{"space": s, "share": 1 / len(spaces)} for s in spaces]}}


WIDE = {"axes": {"weight": {"low": -1.0, "high": 2.0}}}


@pytest.mark.parametrize(
    "fine",
    [
        {"groups": "layers", "axes": {"weight": {"low": 0.0, "high": 2.0}}},
        {"method": "linear", "groups": "layers", **WIDE},
    ],
    ids=["narrower", "another method"],
)
def test_stages_must_be_able_to_follow(experiment_with: With, fine: dict[str, Any]) -> None:
    """A stage that cannot begin where the one before may end is refused before the run."""
    with pytest.raises(UserError, match="stage 2 cannot start from all that stage 1 may find"):
        prepare(experiment_with(**stages(WIDE, fine)))
    assert len(prepare(experiment_with(**stages(WIDE, {"groups": "layers", **WIDE}))).spaces) == 2


TWO = {"fitness.objectives": [{"name": "sums", "tasks": ["sums"]}, {"name": "words", "tasks": ["words"]}]}


def goals(first: dict[str, Any]) -> dict[str, Any]:
    return {"fitness.objectives": [{"name": "first", "tasks": ["sums"], **first}, {"name": "all"}]}


def searching(algorithm: str, evaluations: int, **settings: Any) -> dict[str, Any]:
    return {"search": {"algorithm": algorithm, "seed": 3, "budget": {"evaluations": evaluations}, **settings}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (searching("cma-es", 40) | TWO, r"cma-es minimises one loss, .* 2 objectives \(sums, words\); use .*nsga-ii"),
        (searching("nsga-ii", 40), "nsga-ii is for several objectives, the fitness has one; use cma-es or"),
        (searching("nsga-ii", 30) | TWO, "the population of nsga-ii, 40, is larger than the budget of 30 candidates"),
        (searching("cma-es", 12, population=13), "the population of cma-es, 13, is larger .* use algorithm: auto"),
        (searching("cma-es", 5), "the population of cma-es, 6, is larger than the budget of 5"),
        (searching("ga", 12), "set a smaller population, raise the budget"),
        (
            searching("cma-es", 20, population=21) | stages(WIDE, {"groups": "layers", **WIDE}),
            "stage 1: the population of cma-es, 21, is larger than the budget of 10",
        ),
        (
            searching("map", 15, population=4, probes=False) | TWO,
            r"map needs 16 candidates for 2 axes \(12 of its design, 4 of the front\), the budget is 15; raise it, ",
        ),
        (
            searching("map", 20, population=4) | TWO,
            r"map needs 21 candidates for 2 axes \(12 of its design, 4 of the front, 5 probes\), the budget is 20",
        ),
        (
            searching("map", 100) | TWO | {"search_space.method": ["ties", "task_arithmetic"]},
            "map cannot search the categorical axis 'method'; fix it in the space, or use",
        ),
        (
            searching("map", 40) | TWO | {"fitness.constraints": [{"name": "c", "kind": "forgetting", "at_most": 0.1}]},
            "map models the objectives and knows no constraints; use nsga-ii",
        ),
        (searching("map", 40), "map is for several objectives, the fitness has one; use cma-es or"),
        (
            searching("map", 9, population=4, probes=False, gradients=True) | TWO,
            r"map needs 10 candidates for 2 axes \(6 of its design, 4 of the front\), the budget is 9; raise it, ",
        ),
        (
            searching("map", 0, population=4, probes=False, gradients=True)
            | {"search.budget": {"item_evaluations": 27 * 24 + 23}}
            | TWO,
            r"map needs 28 candidates for 2 axes \(24 for the 6 of its design with gradients, 4 of the front\), the "
            r"budget is 27",
        ),
        (
            searching("map", 40, gradients=True) | TWO | {"search_space.method": "ties"},
            "map needs gradients, but ties is not linear in its coefficients; use linear or task_arithmetic",
        ),
        (
            searching("map", 40, gradients=True) | TWO | {"fitness.floor": {"penalty": 2.0}},
            "map fits values and slopes of the same losses, and fitness.floor has a kink at the base; drop the floor, "
            "or leave `gradients` out",
        ),
        (
            searching("map", 40, gradients=True) | goals({"kind": "recovered_gain"}),
            "and first is of kind recovered_gain, which has kinks; use weighted_mean, or leave `gradients` out",
        ),
        (
            searching("map", 40, gradients=True) | goals({"metric": "accuracy"}),
            "and accuracy of task 'sums' is a count without slope; use metric: probability or cross_entropy or "
            "answer_loss, or leave `gradients` out",
        ),
        (
            searching("map", 40, gradients=True) | goals({"metric": "probability"}),
            "task 'sums' stands for probability and for cross_entropy; name one of them, or leave `gradients` out",
        ),
        (
            searching("bayesian-map", 400) | TWO | {"search_space.groups": "layer-modules"},
            r"bayesian-map is for at most 6 axes, the space has \d+; search fewer \(groups: all\), or use map",
        ),
        (
            searching("nested-map", 22, probes=False) | TWO,
            r"nested-map needs 23 candidates for 2 experts \(23 of its merges\), the budget is 22; raise it, name",
        ),
        (searching("auto", 40, sigma=0.2), "gp has no setting 'sigma'.*auto picked gp.*drop the setting"),
        (searching("auto", 10, population=11, lag=2, sigma=0.2), "tpe has no setting 'sigma'"),
    ],
)
def test_algorithms_that_do_not_fit(experiment_with: With, overrides: dict[str, Any], words: str) -> None:
    """Objectives, populations and settings that the search cannot have: one line with the way out."""
    with pytest.raises(UserError, match=words) as caught:
        prepare(experiment_with(**overrides))
    assert "\n" not in str(caught.value)


def test_auto_is_written_out(experiment_with: With) -> None:
    """What it picks stands in the experiment and in the identity, as if it had been named; a line says why."""
    prepared = prepare(experiment_with(**searching("auto", 40)))
    named = experiment_with(**searching("gp", 40, population=2, startup=10))

    assert prepared.experiment.search.algorithm == "gp"
    assert prepared.experiment.search.settings == {"population": 2, "startup": 10}
    assert prepared.experiment_id == prepare(named).experiment_id
    assert prepared.notes[0].startswith("auto picked gp (population 2, startup 10) for 2 axes, one objective, 40 cand")
    assert "auto" not in prepared.experiment.to_yaml()


def test_auto_of_stages(experiment_with: With) -> None:
    """Each stage has its own choice by its own share; one that names its algorithm keeps it."""
    space = stages(WIDE, {"groups": "layers", **WIDE}, {"groups": "layer-modules", **WIDE})
    space["search_space"]["stages"][1]["algorithm"] = "tpe"
    for stage, sigma in ((0, 0.2), (2, 0.1)):
        space["search_space"]["stages"][stage]["settings"] = {"sigma": sigma}
    prepared = prepare(experiment_with(**searching("auto", 600), **space))

    names = [prepared.experiment.algorithm_of(s)[0] for s in prepared.stages]
    assert names == ["cma-es", "tpe", "cma-es"]
    assert [n.partition(":")[0] for n in prepared.notes[:2]] == ["stage 1", "stage 3"]
    assert "auto" not in prepared.experiment.to_yaml()
    small = prepare(experiment_with(**searching("auto", 60), **space))
    assert small.experiment.algorithm_of(small.stages[0])[0] == "gp"
    assert small.notes[0].endswith("; sigma of the stage is left out")


def test_auto_stays_with_the_first_budget(experiment_with: With) -> None:
    """A raised budget of a run that began does not choose again, and a population that began is not refused."""
    began = prepare(experiment_with(**searching("auto", 40)))
    budget = began.experiment.search.budget
    raised = experiment_with(**searching("auto", 400))

    assert prepare(raised).experiment.search.algorithm == "cma-es"
    assert prepare(raised, began_with=budget).experiment_id == began.experiment_id
    small = experiment_with(**searching("cma-es", 5))
    assert prepare(small, began_with=small.search.budget).experiment.search.algorithm == "cma-es"


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, experiment_with: With) -> None:
    """A CUDA device is asked for by name and refused where there is none of that number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        prepare(experiment_with(**{"workers.device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    with pytest.raises(UserError, match="there are 1 CUDA devices"):
        check_device("cuda:1")
    assert check_device("cuda:0") is None
    assert check_device("cpu") is None


def test_items_come_before_models(experiment_with: With, tmp_path: Path) -> None:
    """A bad item is named by file and line although the models are missing too: cheap checks first."""
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "choices": ["b"], "gold": 0}\n')
    task = {"name": "t", "data": str(tmp_path / "bad.jsonl")}

    with pytest.raises(UserError, match=r"bad\.jsonl line 1: 'choices' should be"):
        prepare(experiment_with(**{"fitness": {"tasks": [task]}, "models.base": "gone"}))


def test_long_items_are_refused_before_the_run(experiment_with: With, tmp_path: Path) -> None:
    """An item beyond the context of the base's config is named."""
    long = {"question": "a b c " * 200, "choices": [" d", " e"], "gold": 0}
    lines = [json.dumps({**long, "question": f"{i} " + long["question"]}) + "\n" for i in range(40)]
    (tmp_path / "long.jsonl").write_text("".join(lines))

    with pytest.raises(UserError, match=r"40 of 40 items .* 256 tokens .* the first, long\.jsonl:\d+, has \d+ "):
        prepare(experiment_with(fitness={"tasks": [{"name": "t", "data": str(tmp_path / "long.jsonl")}]}))


def test_executor_by_backend() -> None:
    """The table of backends; local takes count, time and memory from the experiment."""
    assert isinstance(make_executor(FakeEvaluator, Workers(backend="inline"), "cpu"), InlineExecutor)
    local = make_executor(FakeEvaluator, Workers(backend="local", count=3, timeout_seconds=5, memory_gb=2), "cpu")

    assert isinstance(local, LocalExecutor)
    assert (local._count, local._timeout, local._memory) == (3, 5.0, 2 * 2**30)
    assert local.pids == [], "nothing is started before the first unit"


def test_numerics_name_no_host(experiment_with: With) -> None:
    """What last bits depend on, and nothing that tells machines of one kind apart."""
    import socket

    numerics = prepare(experiment_with()).numerics()

    assert set(numerics) == {
        *("torch", "transformers", "numpy", "scipy", "cma", "optuna"),
        *("threads", "device", "cpu"),
    }
    assert socket.gethostname() not in json.dumps(numerics)


def test_a_stage_below_one_generation_is_noted(experiment_with: With) -> None:
    """A short stage of a long enough search samples only; that is said, not refused."""
    short = prepare(
        experiment_with(**searching("cma-es", 20, population=12), **stages(WIDE, {"groups": "layers", **WIDE}))
    )

    assert "stage 1: 10 candidates are less than one generation of cma-es (12): it only samples" in short.notes
