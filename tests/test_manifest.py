"""The manifest: layout, blocks and hashes, and which tensors of a family form which block."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.architectures import ARCHITECTURES, MODULES, block_order
from evomerge.manifest import ALIGN, Manifest, TensorInfo, lay_out


@given(shapes=st.lists(st.lists(st.integers(1, 90), max_size=3).map(tuple), min_size=1, max_size=8))
def test_tensors_lie_one_after_the_other(shapes: list[tuple[int, ...]]) -> None:
    """Tensors start at aligned offsets, do not overlap, and leave gaps smaller than the alignment."""
    infos = lay_out([(f"t{i}", s, "F32", "embed") for i, s in enumerate(shapes)])

    end = 0
    for info, shape in zip(infos, shapes, strict=True):
        assert info.shape == shape
        assert info.offset % ALIGN == 0
        assert 0 <= info.offset - end < ALIGN
        end = info.offset + info.size


def test_sizes() -> None:
    """A tensor's size is the product of its shape; a scalar has one element."""
    assert [TensorInfo("t", s, "F32", "b", 0).size for s in ((), (3,), (2, 5), (0, 4))] == [1, 3, 10, 0]


@pytest.mark.parametrize("tied", [False, True])
def test_blocks_in_layout_order(tied: bool, manifest_of: Any) -> None:
    """Blocks come as embedding, layers (attention, mlp, norm), final norm, head; together they are the layout."""
    m: Manifest = manifest_of(layers=2, tied=tied)

    layers = [f"layers.{i}.{x}" for i in range(2) for x in ("attention", "mlp", "norm")]
    assert list(m.blocks) == ["embed", *layers, "final_norm", *([] if tied else ["head"])]
    for block in m.blocks.values():
        assert block.start == block.tensors[0].offset
        assert block.stop == block.tensors[-1].offset + block.tensors[-1].size
        assert {t.block for t in block.tensors} == {block.name}
    assert sum(len(b.tensors) for b in m.blocks.values()) == len(m.tensors)
    assert m.elements == max(b.stop for b in m.blocks.values())
    assert m.blocks["layers.1.mlp"].layer == 1
    assert m.blocks["layers.1.mlp"].module == "mlp"
    assert m.blocks["final_norm"].layer is None


def test_parameters_are_counted_once(manifest_of: Any) -> None:
    """Gaps are no parameters, and a tied head is none either."""
    untied, tied = manifest_of(), manifest_of(tied=True)

    assert untied.parameters == sum(t.size for t in untied.tensors) < untied.elements
    assert untied.parameters - tied.parameters == 16 * 8


def test_experts_are_sorted(manifest_of: Any) -> None:
    """Experts are all sources but the base, in an order that does not depend on the file."""
    assert manifest_of(experts=("zoo", "art", "math")).experts == ("art", "math", "zoo")


def test_json_round_trip(manifest_of: Any) -> None:
    """A manifest read back from its JSON is equal, with the same layout."""
    m: Manifest = manifest_of()

    back = Manifest.from_json(json.loads(json.dumps(m.to_json())))

    assert back == m
    assert back.layout == m.layout
    assert isinstance(back.tensors[0].shape, tuple)


def test_layout_is_what_a_position_means(manifest_of: Any) -> None:
    """The layout's hash depends on names, shapes and offsets, and not on hashes or sources."""
    m: Manifest = manifest_of()

    assert manifest_of(experts=("other",)).layout == m.layout
    assert len({x.layout for x in (m, manifest_of(tied=True), manifest_of(layers=3))}) == 3
    assert m.layout.startswith("sha256:")


LLAMA = ARCHITECTURES["llama"]


@pytest.mark.parametrize(
    ("tensor", "block"),
    [
        ("model.embed_tokens.weight", "embed"),
        ("lm_head.weight", "head"),
        ("model.norm.weight", "final_norm"),
        ("model.layers.0.self_attn.q_proj.weight", "layers.0.attention"),
        ("model.layers.0.self_attn.q_proj.bias", "layers.0.attention"),
        ("model.layers.7.self_attn.q_norm.weight", "layers.7.attention"),
        ("model.layers.12.mlp.down_proj.weight", "layers.12.mlp"),
        ("model.layers.12.input_layernorm.weight", "layers.12.norm"),
        ("model.layers.12.post_attention_layernorm.weight", "layers.12.norm"),
        ("model.layers.x.mlp.up_proj.weight", None),
        ("model.layers.0.cross_attn.q_proj.weight", None),
        ("transformer.wte.weight", None),
        ("model.embed_tokens.bias", None),
        ("", None),
    ],
)
def test_block_of_a_tensor(tensor: str, block: str | None) -> None:
    """Every tensor of a Llama-like model has its block; foreign names have none."""
    assert LLAMA.block_of(tensor) == block


def test_block_order_sorts_layers_by_number() -> None:
    """Layer 10 comes after layer 9, and every known module has its place."""
    blocks = [
        "head",
        "final_norm",
        "layers.10.attention",
        "layers.9.norm",
        "layers.9.attention",
        "layers.9.mlp",
        "embed",
    ]

    assert sorted(blocks, key=block_order) == [
        "embed",
        "layers.9.attention",
        "layers.9.mlp",
        "layers.9.norm",
        "layers.10.attention",
        "final_norm",
        "head",
    ]
    assert {b.split(".")[-1] for b in blocks} == set(MODULES)
