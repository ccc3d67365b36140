"""Models whose layers cannot follow one another are refused in one line that names the tensor or setting."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import UserError
from evomerge.merge.route import check_routable
from evomerge.pool import ModelPool


def refusal(call: Callable[[], object]) -> str:
    """The one line in which something is refused."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def configured(tiny_model: Any, arch: str, **settings: object) -> Path:
    """A copy of a tiny model of seed 1 whose config.json says something else."""
    folder: Path = tiny_model(arch, 1, name="x")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("arch", "settings", "named"),
    [
        ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, "rope_parameters is {'rope_"),
        ("phi", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}}, "rope_parameters is"),
        ("gemma3_text", {"rope_local_base_freq": 7.0, "rope_parameters": None}, "rope_parameters is"),
        ("mistral", {"sliding_window": 3}, "sliding_window is 3, but the base's is"),
        ("qwen2", {"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, but the base's is 1e-06"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True, but the base's is"),
        ("gemma2", {"attn_logit_softcapping": 9.0}, "attn_logit_softcapping is 9.0, but the base's is 2.0"),
        ("gemma3_text", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64, but the base's is 8"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act is gelu, but the base's is silu"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False, but the base's is True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, but the base's"),
        ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual is False, but the base's is True"),
    ],
)
def test_settings_that_a_model_has_once(arch: str, settings: dict[str, object], named: str, tiny_model: Any) -> None:
    """What a layer computes with, and config.json says once for all layers, must be the base's."""
    pool = ModelPool.open(tiny_model(arch), {"x": configured(tiny_model, arch, **settings)})

    assert f"expert 'x' ({pool.checkpoints['x'].path}): {named}" in refusal(lambda: check_routable(pool))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"hidden_size": 64, "num_hidden_layers": 3},
            "shape of 'model.embed_tokens.weight' is [512, 64], but",
        ),
        (
            {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
            "num_attention_heads is 2, but",
        ),
        ({"head_dim": 16}, "shape of 'model.layers.0.self_attn.q_proj.weight' is [64, 32], but the base"),
        (
            {"intermediate_size": 64, "num_hidden_layers": 1},
            "shape of 'model.layers.0.mlp.gate_proj.weight' is [64",
        ),
        ({"attention_bias": True}, "tensor 'model.layers.0.self_attn.k_proj.bias' is not in the base"),
    ],
)
def test_pools_refuse_other_shapes(settings: dict[str, object], named: str, tiny_model: Any) -> None:
    """Widths and heads are compared when a pool is opened, whatever the number of layers."""
    expert = tiny_model("llama", 1, **settings)

    assert named in refusal(lambda: ModelPool.open(tiny_model("llama"), {"x": expert}))


def test_layers_that_are_not_alike(tiny_model: Any) -> None:
    """No family of the table has such layers today; one that had would be refused by tensor."""
    pool = ModelPool.open(tiny_model("llama"), {"x": tiny_model("llama", 1)})
    tensors = pool.checkpoints["x"].tensors
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = replace(tensors[name], shape=(40, 32))

    found = refusal(lambda: check_routable(pool))
    assert f"{name!r} has shape [40, 32], in other layers it is [48, 32]; a route's layers must be alike" in found


def test_a_type_of_attention_that_the_base_lacks(tiny_model: Any) -> None:
    """The base's rotary tables are for the types of attention that it has itself."""
    types = ["sliding_attention", "full_attention", "full_attention"]
    full = tiny_model("gemma3_text", layer_types=types[1:])
    deep = tiny_model("gemma3_text", 1, num_hidden_layers=3, layer_types=types)
    pool = ModelPool.open(full, {"x": deep})

    found = refusal(lambda: check_routable(pool))
    assert "layer_types has 'sliding_attention', which none of the base's layers is" in found
    check_routable(ModelPool.open(deep, {"x": full}))


def test_layers_that_know_their_place(tiny_model: Any) -> None:
    """GPT-2 may divide attention by a layer's number, which a hop does not have."""
    inverse = configured(tiny_model, "gpt2", scale_attn_by_inverse_layer_idx=True)
    pool = ModelPool.open(inverse, {"x": inverse})

    assert "scale_attn_by_inverse_layer_idx ties what a layer does to" in refusal(lambda: check_routable(pool))


@pytest.mark.parametrize("arch", ["olmo2", "mixtral", "mamba"])
def test_families_that_were_not_checked(arch: str, tiny_model: Any) -> None:
    """Norms behind the branches, experts, no attention: whether scales fold is known for the table's rows only."""
    pool = ModelPool.open(tiny_model(arch), {"x": tiny_model(arch, 1)})

    found = refusal(lambda: check_routable(pool))
    assert "layer routes are known for llama, mistral, " in found
    assert f"not for {arch!r}: whether scales fold into its weights was not checked" in found


def test_another_depth_in_a_family_without_a_row(tiny_model: Any) -> None:
    """Refused when the pool is opened."""
    deep = tiny_model("olmo2", 1, num_hidden_layers=3)

    found = refusal(lambda: ModelPool.open(tiny_model("olmo2"), {"x": deep}))
    assert "3 layers, but the base has 2; routes through models of different depth are known for llama" in found
