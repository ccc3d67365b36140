"""The live model: stock transformers code over the builder's buffer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.architectures import ARCHITECTURES
from evomerge.errors import UserError
from evomerge.merge.bank import Bank
from evomerge.merge.builder import Builder
from evomerge.merge.live import live_model, load_tokenizer
from evomerge.pool import ModelPool
from evomerge.prepare import baselines

FALLBACKS = ("mixtral", "qwen2_moe", "mamba", "opt", "bloom", "gpt_bigcode")
"""Families without a row in the table, of different kinds."""
TOKENS = torch.tensor([[1, 40, 300, 7, 7, 410, 99, 260, 13, 5]])


def built(base: Path, experts: dict[str, Path], dtype: str) -> tuple[Any, Builder, dict[str, Any]]:
    """A live model with the base built, its builder, and the baselines' recipes."""
    pool = ModelPool.open(base, experts)
    manifest = pool.manifest()
    builder = Builder(Bank.load(pool, manifest, torch.device("cpu")), dtype)
    model = live_model(base, builder.views(), dtype)
    recipes = baselines(manifest, dtype)
    builder.build(recipes["base"])
    return model, builder, recipes


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return out


@pytest.mark.parametrize(("tied", "dtype"), [(False, "float32"), (True, "bfloat16")])
@pytest.mark.parametrize("arch", [*ARCHITECTURES, *FALLBACKS])
def test_logits_are_those_of_the_stock_model(tiny_model: Any, arch: str, tied: bool, dtype: str) -> None:
    """A built base, and then a built expert in the same memory, give from_pretrained's logits to the bit."""
    from transformers import AutoModelForCausalLM

    folders = [tiny_model(arch, seed, tied=tied, dtype=dtype) for seed in (0, 1)]
    model, builder, recipes = built(folders[0], {"x": folders[1]}, dtype)

    for folder, name in zip(folders, ("base", "x"), strict=True):
        builder.build(recipes[name])
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        assert torch.equal(logits(model), logits(stock))
        assert model.dtype == stock.dtype == getattr(torch, dtype)


def test_parameters_are_views_of_the_buffer(tiny_model: Any) -> None:
    """No parameter has memory of its own, none wants gradients, and dropout is off."""
    model, builder, _ = built(tiny_model("llama", tied=True), {}, "float32")
    buffer = builder.buffer
    start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel() * 4

    assert all(start <= p.data_ptr() < end for p in model.parameters())
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_names_and_shapes_must_be_those_of_transformers(tiny_model: Any) -> None:
    """A view too few, too many or of another shape is named."""
    folder = tiny_model("llama")
    _, builder, _ = built(folder, {}, "float32")
    views = dict(builder.views())
    fewer = {n: v for n, v in views.items() if n != "model.norm.weight"}

    with pytest.raises(UserError, match=r"expects a tensor 'model\.norm\.weight' that the checkpoint does not have"):
        live_model(folder, fewer, "float32")
    with pytest.raises(UserError, match="has no place for the tensor 'extra'"):
        live_model(folder, {**views, "extra": views["model.norm.weight"]}, "float32")
    with pytest.raises(UserError, match=r"'model\.norm\.weight' has shape \[31\], transformers expects \[32\]"):
        live_model(folder, {**views, "model.norm.weight": views["model.norm.weight"][:31]}, "float32")


def test_tokenizer_is_read_from_the_folder_only(tiny_model: Any) -> None:
    """A folder's own tokenizer is loaded; without one there is one line."""
    folder = tiny_model("llama", name="bare")
    assert load_tokenizer(folder)("Once")["input_ids"][0] == 1

    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_unreadable_tokenizer(tiny_model: Any) -> None:
    """A tokenizer.json that is no tokenizer is refused in one line."""
    folder = tiny_model("llama", name="odd")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {}}))

    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
