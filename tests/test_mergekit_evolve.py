"""Genome files of mergekit-evolve become experiments, or one line that names what cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.cli import main
from evomerge.config import load
from evomerge.errors import UserError
from evomerge.mergekit_evolve import to_experiment, to_yaml
from evomerge.prepare import open_pool, prepare
from evomerge.space import RuleSpace
from evomerge.tasks.base import Allowed
from evomerge.yamlio import dump_yaml

Write = Callable[..., Path]
Folder = Callable[..., Path]


@pytest.fixture
def genome(tmp_path: Path, tiny_model: Any) -> Write:
    """genome(tasks=..., limit=..., **keys of `genome`) -> a file after the example of mergekit's docs/evolve.md."""

    def make(**given: Any) -> Path:
        for name in ("base", "math", "code"):
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(tiny_model("llama", {"base": 0, "math": 1, "code": 2}[name], **LAYERS))
        outer = ("tasks", "limit", "num_fewshot", "shuffle", "random_init", "apply_chat_template")
        keys: dict[str, Any] = {
            "models": ["math", "code"],
            "merge_method": "ties",
            "base_model": "base",
            "tokenizer_source": None,
            "layer_granularity": 2,
            "normalize": False,
            "allow_negative_weights": False,
            "smooth": False,
        }
        data: dict[str, Any] = {"tasks": [{"name": "one", "weight": 0.5, "metric": "acc,none"}, {"name": "two"}]}
        data |= {k: v for k, v in given.items() if k in outer}
        keys |= {k: v for k, v in given.items() if k not in outer}
        path = tmp_path / "genome.yml"
        path.write_text(dump_yaml({"genome": keys, **data}))
        return path

    return make


LAYERS = {"num_hidden_layers": 4}


def bound(path: Path) -> RuleSpace:
    """The written experiment's space over its real pool."""
    experiment = load(to_experiment(path, "x"))
    return RuleSpace(experiment.search_space, open_pool(experiment).manifest(), "float32")


# -- what is expressed ----------------------------------------------------------------------------------------


def test_the_documented_example(genome: Write, tmp_path: Path) -> None:
    """Models, method, slices of layers, tasks with weights and metrics, limits; readable and loadable."""
    path = genome(limit=40, num_fewshot=2)
    target = tmp_path / "sub" / "mine.yaml"
    assert main(["import", str(path), "--to", str(target)]) == 0
    text, experiment = target.read_text(), load(target)

    assert text.startswith("# From mergekit-evolve's genome.yml. Differences:\n")
    assert "embedding, final norm and head have weights of their own" in text
    assert experiment.name == "mine"
    assert experiment.models.base == str(tmp_path.resolve() / experiment.models.base)
    assert list(experiment.models.experts) == [Path(p).name for p in experiment.models.experts.values()]
    assert experiment.models.dtype == "bfloat16"
    one, two = experiment.tasks
    assert (one.name, one.metric, one.weight, one.filter) == ("one", "acc", 0.5, None)
    assert (two.metric, two.weight, two.limit, two.num_fewshot) == ("acc", 1.0, 40, 2)
    assert two.apply_chat_template
    space = bound(path)
    assert list(space.groups) == ["outside", "layers.0-1", "layers.2-3"]
    assert len(space.axes) == 3 * 2 * 2
    assert {(a.low, a.high, a.default) for a in space.axes if a.name.endswith("weight")} == {(0.0, 1.5, 0.5)}
    assert {a.default for a in space.axes if a.name.endswith("density")} == {1.0}


def test_filters_split_the_slices(genome: Write) -> None:
    """Attention, MLP and the rest, for all layers together or for each slice; the start is the average."""
    together = bound(
        genome(layer_granularity=0, filters=["self_attn", "mlp"], merge_method="task_arithmetic", normalize=None)
    )
    apart = bound(genome(filters=["mlp", "self_attn"]))

    assert list(together.groups) == ["attention", "mlp", "rest"]
    assert set(together.groups["rest"]) == {"embed", "final_norm", "head", *(f"layers.{i}.norm" for i in range(4))}
    assert len(together.axes) == 3 * 2
    assert list(apart.groups) == [
        *(f"layers.{at}.{m}" for at in ("0-1", "2-3") for m in ("mlp", "attention", "rest")),
        "outside",
    ]
    assert apart.groups["layers.2-3.attention"] == ("layers.2.attention", "layers.3.attention")
    assert apart.groups["outside"] == ("embed", "final_norm", "head")
    assert np.allclose([a.default for a in together.axes], 0.5)
    assert "weights of their own" not in to_yaml(to_experiment(genome(layer_granularity=0), "x"), "g.yml")


def test_negative_weights(genome: Write) -> None:
    """Of coefficients where they are allowed; of a task they mean that lower is better."""
    path = genome(allow_negative_weights=True, tasks=[{"name": "t", "weight": -2.0, "metric": "loss,strict"}, "t"])
    data = to_experiment(path, "x")
    experiment = load(data)

    assert data["search_space"]["axes"]["weight"]["low"] == -1.5
    first, second = experiment.tasks
    assert (first.name, first.sign("loss"), first.weight, first.filter) == ("t-loss", 1.0, 2.0, "strict")
    assert (second.name, second.sign("acc"), second.weight) == ("t-acc", -1.0, 1.0)


@pytest.mark.parametrize(("normalize", "expected"), [(None, True), (False, False), (True, True)])
def test_normalize_defaults_to_what_the_method_does(genome: Write, normalize: bool | None, expected: bool) -> None:
    """True for ties and linear where nothing is said."""
    assert to_experiment(genome(normalize=normalize), "x")["search_space"]["params"] == {"normalize": expected}


def test_a_linear_merge_is_one_of_the_models_alone(genome: Write) -> None:
    """The base is looked at for comparison only; the start is the average."""
    path = genome(merge_method="linear", normalize=None, layer_granularity=0)
    experiment = load(to_experiment(path, "x"))
    space = bound(path)
    start = space.decode(space.default, open_pool(experiment).manifest())

    assert {n: c["weight"] for n, c in start.blocks["embed"].sources.items()} == dict.fromkeys(
        experiment.models.experts, 0.5
    )


def test_models_of_the_hub_keep_their_ids(genome: Write) -> None:
    """Nothing is fetched where no slices ask for the number of layers."""
    data = to_experiment(genome(models=["math", "org/some-code"], layer_granularity=0), "x")

    assert data["models"]["experts"]["some-code"] == "org/some-code"
    assert load(data).models.experts["some-code"] == "org/some-code"


def test_it_can_be_searched(genome: Write, lm_eval_task: Folder, tmp_path: Path) -> None:
    """The whole way: a genome file and a folder of lm-eval tasks, imported and prepared."""
    rows = [{"question": f"q{n} is", "choices": [" a", f" b{n}"], "gold": n % 2} for n in range(30)]
    path = genome(tasks=["mine"], apply_chat_template=False)
    target = tmp_path / "mine.yaml"
    assert main(["import", str(path), "--to", str(target), "--include-path", str(lm_eval_task(rows))]) == 0
    prepared = prepare(load(target), allow=Allowed(code=True))

    assert sum(i.count for i in prepared.items.values()) == 30


def test_dare_and_slerp(genome: Write) -> None:
    """DARE-TIES as mergekit's: a sum, rescaled by L1; SLERP with the base has t as its only weight."""
    dare = bound(genome(merge_method="dare_ties", normalize=None, layer_granularity=0))
    assert dare.spec.params == {"normalize": False, "rescale": "l1"}
    assert [a.name.split(".", 1)[1] for a in dare.axes] == ["all.weight", "all.density"] * 2

    slerp = bound(genome(merge_method="slerp", models=["base", "math"], layer_granularity=2, normalize=None))
    assert {(a.name.rsplit(".", 1)[1], a.low, a.high) for a in slerp.axes} == {("weight", 0.0, 1.0)}
    assert len({a.name.split(".")[0] for a in slerp.axes}) == 1, "the other model's only"


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"merge_method": "della"}, "genome.merge_method: 'della' is not searched here; use linear, task_arith"),
        ({"merge_method": "slerp"}, "genome.models: slerp is between the base and one other model"),
        ({"base_model": None}, "genome.base_model: missing; differences to it are merged"),
        ({"merge_method": "linear", "base_model": None}, "genome.base_model: missing; give one that is no model of"),
        ({"merge_method": "linear", "base_model": "math"}, "genome.base_model: math; give one that is no model of"),
        ({"smooth": True}, "genome.smooth: there is no equivalent of weights that are interpolated"),
        ({"tokenizer_source": "union"}, "genome.tokenizer_source: there is no equivalent of another tokenizer"),
        ({"merge_method": "task_arithmetic", "normalize": True}, "genome.normalize: there is no equivalent"),
        ({"shuffle": True}, "shuffle: there is no equivalent"),
        ({"random_init": True}, "random_init: there is no equivalent"),
        ({"filters": ["norm"]}, "genome.filters: only self_attn and mlp have an equivalent, got 'norm'"),
        ({"layer_granularity": 3}, "genome.layer_granularity: 3 does not divide the 4 layers"),
        ({"models": ["base"]}, "genome.models: only the base; name at least one other"),
        ({"models": ["./gone"]}, "'./gone' is neither a folder nor a model's id on the hub"),
        ({"tasks": [{"name": "t", "weight": 0}]}, "tasks: a weight of 0 has no equivalent"),
        ({"tasks": []}, "tasks"),
        ({"layer_granularities": 2}, "unknown key 'genome.layer_granularities'; did you mean 'layer_granularity'?"),
    ],
)
def test_what_has_no_equivalent_is_named(genome: Write, keys: dict[str, Any], expected: str) -> None:
    """One line, with the file and the key."""
    path = genome(**keys)
    with pytest.raises(UserError) as caught:
        to_experiment(path, "x")

    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_running_a_genome_file_says_how(genome: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not an experiment; an existing file is not written over."""
    path = genome()
    assert main(["check", str(path)]) == 2
    assert f"evomerge import {path} --to experiment.yaml" in capsys.readouterr().err
    (tmp_path / "there.yaml").write_text("x")
    assert main(["import", str(path), "--to", str(tmp_path / "there.yaml")]) == 2
    assert "exists; choose another --to" in capsys.readouterr().err


def test_a_base_without_layers(genome: Write, tmp_path: Path) -> None:
    """Slices need to know how many there are."""
    path = genome()
    (tmp_path / "base").unlink()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"num_hidden_layers": "many"}))

    with pytest.raises(UserError, match="num_hidden_layers should be a number of layers, got 'many'"):
        to_experiment(path, "x")
