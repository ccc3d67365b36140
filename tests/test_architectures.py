"""Blocks: the table of families against the derivation from names, and what has no row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from evomerge.architectures import ARCHITECTURES, derived_block
from evomerge.errors import UserError
from evomerge.pool import ModelPool
from evomerge.stock import Stock


def stock(folder: Path, **config: object) -> Stock:
    """The stock model of a config of a few keys; the rest are transformers' defaults. No weights, no memory."""
    (folder / "config.json").write_text(json.dumps(config))
    return Stock(folder, config)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_agrees_with_the_names(arch: str, tmp_path: Path) -> None:
    """Every parameter of the full-size default model has a block by its row, and names alone say the same."""
    s = stock(tmp_path, model_type=arch)
    row = ARCHITECTURES[arch]

    assert s.notes == ()
    for name in s.shapes:
        assert row.block_of(name) == derived_block(name, row.layer, s.embed, s.head)[0], name
    assert set(s.blocks.values()) >= {f"layers.{i}.{m}" for i in range(s.layers) for m in ("attention", "mlp", "norm")}


@pytest.mark.parametrize(
    ("arch", "tensor", "module"),
    [
        ("mixtral", "model.layers.1.mlp.experts.gate_up_proj", "mlp"),
        ("bloom", "transformer.word_embeddings_layernorm.weight", "embed"),
        ("bloom", "transformer.ln_f.bias", "final_norm"),
        ("opt", "model.decoder.embed_positions.weight", "embed"),
        ("opt", "model.decoder.layers.1.fc1.weight", "mlp"),
        ("opt", "model.decoder.layers.1.final_layer_norm.weight", "norm"),
        ("opt", "model.decoder.final_layer_norm.weight", "final_norm"),
        ("mamba", "backbone.layers.1.mixer.conv1d.weight", "attention"),
        ("mamba", "backbone.norm_f.weight", "final_norm"),
        ("gptj", "lm_head.bias", "head"),
        ("cohere", "model.layers.1.input_layernorm.weight", "norm"),
        ("deepseek_v3", "model.layers.1.self_attn.q_a_layernorm.weight", "attention"),
        ("deepseek_v3", "model.layers.3.mlp.gate.e_score_correction_bias", "mlp"),
        ("mpt", "transformer.blocks.1.ffn.up_proj.weight", "mlp"),
    ],
)
def test_families_without_a_row(arch: str, tensor: str, module: str, tmp_path: Path) -> None:
    """The stock model's names say what belongs where."""
    assert stock(tmp_path, model_type=arch).blocks[tensor].split(".")[-1] == module


def test_what_was_decided_without_a_name_is_noted(tiny_model: Any) -> None:
    """Mixers count as attention, and the pool says so; a family in the table has nothing to say."""
    notes = ModelPool.open(tiny_model("mamba"), {"x": tiny_model("mamba", 1)}).notes()

    assert notes == ["mamba: tensors of 'mixer' are counted as attention"]
    assert ModelPool.open(tiny_model("gemma2"), {"x": tiny_model("gemma2", 1)}).notes() == []


def test_layers_that_are_not_one_list_are_refused(tmp_path: Path) -> None:
    """A model with two numbered lists cannot be merged layer by layer."""
    with pytest.raises(UserError, match="are not one list of tensors numbered from 0 to"):
        stock(tmp_path, model_type="gemma3n_text")


@pytest.mark.parametrize(
    ("arch", "key", "layers"), [("gpt2", "n_layer", 3), ("llama", "num_hidden_layers", 3), ("bloom", "n_layer", 4)]
)
def test_layers_and_context_are_read_as_transformers_does(tmp_path: Path, arch: str, key: str, layers: int) -> None:
    """Each family's own key counts layers, and GPT-2's n_positions is its context."""
    s = stock(tmp_path, **{"model_type": arch, key: layers, "n_positions": 77})

    assert s.layers == layers
    assert {b.split(".")[1] for b in s.blocks.values() if b.startswith("layers")} == {str(i) for i in range(layers)}
    assert s.context_length == {"gpt2": 77, "llama": 2048, "bloom": 1 << 30}[arch]


def test_parts_of_names() -> None:
    """The first part that says something decides; digits and dots do not confuse it."""
    layer = re.compile(r"m\.(\d+)\.(.+)")
    none: frozenset[str] = frozenset()
    cases = {
        "m.0.attn.q_norm.weight": ("layers.0.attention", True),
        "m.10.self_attn_layer_norm.weight": ("layers.10.norm", True),
        "m.2.ln1.bias": ("layers.2.norm", True),
        "m.2.feed_forward.ln.bias": ("layers.2.mlp", True),
        "m.2.temporal_block.linear.weight": ("layers.2.attention", False),
        "m.2.scale": ("layers.2.mlp", False),
        "wpe.weight": ("embed", True),
        "ln_out.weight": ("final_norm", True),
        "project_out.weight": ("head", False),
    }

    assert {n: derived_block(n, layer, none, none) for n in cases} == cases
