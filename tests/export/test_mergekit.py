"""mergekit configurations: what is written, and what is refused (executed by mergekit in tests/oracle)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import UserError
from evomerge.export.hf import mergekit_config
from evomerge.export.mergekit import MergekitError, to_mergekit
from evomerge.manifest import Manifest
from evomerge.pool import ModelPool
from evomerge.recipe import Recipe

PATHS = {n: Path("/models") / n for n in ("base", "x", "y")}


@pytest.fixture(scope="module")
def manifest(tiny_model: Any) -> Manifest:
    return ModelPool.open(tiny_model("llama"), {"x": tiny_model("llama", 1), "y": tiny_model("llama", 2)}).manifest()


def exported(manifest: Manifest, *rules: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    return to_mergekit(
        Recipe.model_validate({"dtype": dtype, "merge": list(rules)}).canonical(manifest), manifest, PATHS
    )


def test_one_rule_for_all(manifest: Manifest) -> None:
    """Where all blocks agree there are plain numbers and no filters."""
    config = exported(
        manifest,
        {
            "method": "ties",
            "params": {"lambda": 0.5},
            "sources": {"x": {"weight": 0.3, "density": 0.2}, "y": {"weight": -1.0}},
        },
    )

    assert config == {
        "merge_method": "ties",
        "base_model": "/models/base",
        "models": [
            {"model": "/models/x", "parameters": {"weight": 0.3, "density": 0.2}},
            {"model": "/models/y", "parameters": {"weight": -1.0, "density": 1.0}},
        ],
        "parameters": {"normalize": True, "lambda": 0.5},
        "dtype": "float32",
    }


def test_filters_name_blocks_and_end_with_a_catch_all(manifest: Manifest) -> None:
    """Every block's substrings appear, match its tensors only, and blocks of the base have weight 0."""
    rule = {"method": "task_arithmetic", "sources": {"x": {"weight": 0.4}}}
    config = exported(manifest, {"match": {"layers": [1, 1], "module": "mlp"}, **rule})
    [x] = config["models"]
    filters = x["parameters"]["weight"]

    assert filters[-1] == {"value": 0.0}
    assert {f["filter"]: f["value"] for f in filters[:-1]} == {
        "model.embed_tokens": 0.0,
        "model.norm": 0.0,
        "lm_head": 0.0,
        **{
            f"layers.{i}.{m}": 0.4 if (i, m) == (1, "mlp") else 0.0
            for i in (0, 1)
            for m in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        },
    }
    for block in manifest.blocks.values():
        for tensor in block.tensors:
            [first] = [f for f in filters[:-1] if f["filter"] in tensor.name]
            assert first["value"] == (0.4 if block.name == "layers.1.mlp" else 0.0)
    assert config["parameters"] == {"lambda": 1.0, "normalize": False}


def test_linear_lists_the_base(manifest: Manifest) -> None:
    """A linear merge takes the base as an input: weight 1 where the block is the base's, else as in the rule."""
    config = exported(manifest, {"match": {"module": "attention"}, "method": "linear", "sources": {"x": {}, "y": {}}})

    assert [m["model"] for m in config["models"]] == ["/models/base", "/models/x", "/models/y"]
    base = {f["filter"]: f["value"] for f in config["models"][0]["parameters"]["weight"][:-1]}
    assert base["layers.0.self_attn"] == 0.0
    assert base["layers.0.mlp"] == base["lm_head"] == 1.0
    assert config["parameters"] == {"normalize": True}


def test_half_precision_is_computed_in_fp32(manifest: Manifest) -> None:
    """The result's dtype is mergekit's out_dtype; it computes in fp32 as we do."""
    config = exported(manifest, {"method": "task_arithmetic", "sources": {"x": {}}}, dtype="bfloat16")

    assert (config["dtype"], config["out_dtype"]) == ("float32", "bfloat16")


def test_the_base_alone(manifest: Manifest) -> None:
    """A recipe without rules is task arithmetic with an expert of weight 0: mergekit wants an input."""
    config = exported(manifest)

    assert config["merge_method"] == "task_arithmetic"
    assert config["models"] == [{"model": "/models/x", "parameters": {"weight": 0.0}}]


@pytest.mark.parametrize(
    ("rules", "dtype", "reason"),
    [
        (
            [
                {"match": {"module": "mlp"}, "method": "ties", "sources": {"x": {}}},
                {"method": "task_arithmetic", "sources": {"x": {}}},
            ],
            "float32",
            "mergekit has one merge method a file, the recipe has task_arithmetic and ties",
        ),
        (
            [
                {"match": {"module": "mlp"}, "method": "ties", "params": {"normalize": False}, "sources": {"x": {}}},
                {"method": "ties", "sources": {"x": {}}},
            ],
            "float32",
            "mergekit has one 'normalize' a file",
        ),
        (
            [{"method": "ties", "sources": {"x": {"density": 0.5}}}],
            "bfloat16",
            "breaks ties of trimmed half-precision weights arbitrarily",
        ),
        (
            [{"method": "dare_linear", "sources": {"x": {"density": 0.5}}}],
            "float32",
            "mergekit draws random masks of its own",
        ),
        (
            [
                {"match": {"layers": [0, 0]}, "method": "slerp", "sources": {"x": {}, "y": {}}},
                {"method": "slerp", "sources": {"base": {}, "x": {}}},
            ],
            "float32",
            "slerp is between two models, the recipe has base, x, y",
        ),
        (
            [
                {
                    "match": {"layers": [0, 0]},
                    "method": "slerp",
                    "params": {"vectors": "deltas"},
                    "sources": {"x": {}, "y": {}},
                }
            ],
            "float32",
            "nuslerp cannot leave a block, here embed, as the base has it",
        ),
        (
            [
                {
                    "match": {"layers": [0, 0]},
                    "method": "slerp",
                    "params": {"vectors": "deltas"},
                    "sources": {"x": {}, "y": {}},
                },
                {"method": "slerp", "sources": {"x": {}, "y": {}}},
            ],
            "float32",
            "slerp of weights or of deltas in a file",
        ),
        (
            [{"method": "spectral", "sources": {"x": {"band_1": 0.5}}}],
            "float32",
            "no exact equivalent of 'spectral'",
        ),
    ],
    ids=[
        "methods",
        "options",
        "half-precision trimming",
        "random masks",
        "slerp of three",
        "base left alone",
        "weights and deltas",
        "bands",
    ],
)
def test_refusals_give_the_reason(manifest: Manifest, rules: list[dict[str, Any]], dtype: str, reason: str) -> None:
    """What mergekit cannot express exactly is refused as bad input, with the reason."""
    with pytest.raises(MergekitError, match=reason) as caught:
        exported(manifest, *rules, dtype=dtype)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("arch", "rule", "reason"),
    [
        ("gpt2", {"match": {"layers": [0, 0]}, "method": "task_arithmetic"}, "checked with mergekit for Llama-like"),
        ("gpt_neox", {"match": {"module": "mlp"}, "method": "task_arithmetic"}, "checked with mergekit for Llama-like"),
        ("mixtral", {"method": "ties"}, "trims each expert of a mixture by itself"),
    ],
)
def test_other_families(tiny_model: Any, arch: str, rule: dict[str, Any], reason: str) -> None:
    """What mergekit calls otherwise or cuts otherwise is refused; one number for all is not."""
    other = ModelPool.open(tiny_model(arch), {"x": tiny_model(arch, 1)}).manifest()
    source = {"weight": 0.5, **({"density": 0.3} if rule["method"] == "ties" else {})}

    with pytest.raises(MergekitError, match=reason):
        exported(other, {**rule, "sources": {"x": source}})
    plain = exported(other, {"method": "task_arithmetic", "sources": {"x": {"weight": 0.5}}})
    assert plain["models"] == [{"model": "/models/x", "parameters": {"weight": 0.5}}]


def test_slerp_with_the_base(manifest: Manifest) -> None:
    """t is the other model's share; blocks without a rule have t = 0."""
    rule = {"method": "slerp", "sources": {"base": {"weight": 3.0}, "x": {"weight": 1.0}}}
    config = exported(manifest, {"match": {"module": "mlp"}, **rule})
    t = {f["filter"]: f["value"] for f in config["parameters"]["t"][:-1]}

    assert config["merge_method"] == "slerp"
    assert config["base_model"] == "/models/base"
    assert config["models"] == [{"model": "/models/x"}]
    assert t["layers.1.mlp"] == 0.25
    assert t["layers.1.self_attn"] == t["lm_head"] == 0.0


def test_slerp_between_experts(manifest: Manifest) -> None:
    """One of them is what mergekit calls the base; deltas of two experts are its nuslerp."""
    sources = {"y": {"weight": 0.5}, "x": {"weight": 1.5}}
    plain = exported(manifest, {"method": "slerp", "sources": sources})
    deltas = exported(manifest, {"method": "slerp", "params": {"vectors": "deltas"}, "sources": sources})

    assert (plain["base_model"], plain["models"]) == ("/models/x", [{"model": "/models/y"}])
    assert plain["parameters"] == {"t": 0.25}
    assert (deltas["merge_method"], deltas["base_model"]) == ("nuslerp", "/models/base")
    assert deltas["models"] == [
        {"model": "/models/x", "parameters": {"weight": 1.5}},
        {"model": "/models/y", "parameters": {"weight": 0.5}},
    ]
    assert deltas["parameters"] == {"nuslerp_flatten": True, "nuslerp_row_wise": False}


def test_masks_of_density_1_are_no_masks(manifest: Manifest) -> None:
    """DARE that keeps everything is exported; neither seed nor rescaling remains."""
    config = exported(manifest, {"method": "dare_ties", "params": {"mask_seed": 5}, "sources": {"x": {"weight": 0.5}}})

    assert config["merge_method"] == "dare_ties"
    assert config["models"] == [{"model": "/models/x", "parameters": {"weight": 0.5, "density": 1.0}}]
    assert config["parameters"] == {"normalize": False, "lambda": 1.0}


def test_tied_models_have_no_filter_for_the_head(tiny_model: Any) -> None:
    """The head of a tied model is its embedding, and mergekit writes no head either."""
    pool = ModelPool.open(tiny_model("llama", tied=True), {"x": tiny_model("llama", 1, tied=True)})
    rule = {"match": {"layers": [0, 0]}, "method": "task_arithmetic", "sources": {"x": {}}}
    config = exported(pool.manifest(), rule)

    filters = [f.get("filter") for f in config["models"][0]["parameters"]["weight"]]
    assert "lm_head" not in filters
    assert "model.embed_tokens" in filters


# -- layer routes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deeper(tiny_model: Any) -> ModelPool:
    """A base of 2 layers with an expert of as many and one of 3."""
    return ModelPool.open(
        tiny_model("llama"), {"x": tiny_model("llama", 1), "y": tiny_model("llama", 2, num_hidden_layers=3)}
    )


def routed(pool: ModelPool, *hops: dict[str, Any], **recipe: Any) -> dict[str, Any]:
    ends = {end: recipe.pop(end) for end in ("embed", "final_norm", "head") if end in recipe}
    made = Recipe.model_validate({"route": {"hops": hops, **ends}, **recipe})
    return to_mergekit(made.canonical(pool.manifest()), pool.manifest(), PATHS)


def test_a_route_is_stacked_slices(deeper: ModelPool) -> None:
    """Layers that follow one another with equal gains are one slice; gains scale what the branches add."""
    hops = [
        {"from": "base", "layer": 0},
        {"from": "base", "layer": 1},
        {"from": "y", "layer": 1, "scale": 2.0},
        {"from": "y", "layer": 2},
        {"from": "y", "layer": 2, "mlp_gain": 0.5},
        {"from": "base", "layer": 1, "scale": 0.5},
    ]
    branches = ("self_attn.o_proj", "mlp.down_proj")

    def scale(attention: float, mlp: float) -> dict[str, Any]:
        values = zip(branches, (attention, mlp), strict=True)
        return {"scale": [*({"filter": n, "value": v} for n, v in values), {"value": 1.0}]}

    assert routed(deeper, *hops) == {
        "merge_method": "passthrough",
        "base_model": "/models/base",
        "slices": [
            {"sources": [{"model": "/models/base", "layer_range": [0, 2]}]},
            {"sources": [{"model": "/models/y", "layer_range": [1, 3], "parameters": scale(0.5, 0.5)}]},
            {"sources": [{"model": "/models/y", "layer_range": [2, 3], "parameters": scale(0.5, 0.25)}]},
            {"sources": [{"model": "/models/base", "layer_range": [1, 2]}]},
        ],
        "dtype": "float32",
    }


def test_ends_of_other_models_are_slices_without_layers(deeper: ModelPool) -> None:
    """mergekit takes the embedding from the first slice's model, final norm and head from the last one's."""
    config = routed(deeper, {"from": "y", "layer": 2}, embed="x", dtype="bfloat16")

    assert [tuple(s["sources"][0].values()) for s in config["slices"]] == [
        ("/models/x", [0, 0]),
        ("/models/y", [2, 3]),
        ("/models/base", [0, 0]),
    ]
    assert config["dtype"] == "bfloat16"


HALF = {"method": "task_arithmetic", "sources": {"x": {"weight": 0.5}}}


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"merge": [{"match": {"layers": [1, 1]}, **HALF}]}, "layer 1 of the route is merged; export the merge first"),
        ({"merge": [{"match": {"module": "embed"}, **HALF}]}, "the route's embed is merged; export it first"),
        ({"head": "x"}, "final norm and head from one model, the recipe from 'base' and 'x'"),
    ],
)
def test_routes_that_mergekit_cannot_express(deeper: ModelPool, recipe: dict[str, Any], reason: str) -> None:
    """Slices are layers of models as they are, with one model for both final norm and head."""
    with pytest.raises(MergekitError, match=reason):
        routed(deeper, {"from": "merged", "layer": 1}, **recipe)


def test_types_of_layers_stop_a_route(tiny_model: Any) -> None:
    """mergekit leaves the base's layer_types, one for each layer, in config.json."""
    pool = ModelPool.open(tiny_model("qwen3"), {"x": tiny_model("qwen3", 1)})
    recipe = Recipe.model_validate({"route": {"hops": [{"from": "x", "layer": 0}]}}).canonical(pool.manifest())

    with pytest.raises(MergekitError, match="layer_types, which the base's architecture 'qwen3' has for each layer"):
        mergekit_config(recipe, pool, pool.manifest())
