"""The bank: every source as stored, at the manifest's places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from evomerge.merge.bank import Bank
from evomerge.pool import ModelPool

CPU = torch.device("cpu")


def test_sources_stand_at_the_manifests_offsets(tiny_model: Any) -> None:
    """Every tensor of every source lies at its offset with the bits of its file."""
    pool = ModelPool.open(tiny_model("qwen2", tied=True), {"x": tiny_model("qwen2", 1, tied=True)})
    manifest = pool.manifest()
    bank = Bank.load(pool, manifest, CPU)

    for source, checkpoint in pool.checkpoints.items():
        stored = load_file(checkpoint.path / "model.safetensors")
        for t in manifest.tensors:
            assert torch.equal(bank.flat[source][t.offset : t.offset + t.size].view(t.shape), stored[t.name])


def test_stored_dtypes_are_kept(tiny_model: Any) -> None:
    """A bf16 expert stays bf16; a source of mixed dtypes is promoted to fp32, which loses nothing."""
    mixed = tiny_model("llama", 1, dtype="bfloat16", name="mixed")
    file: Path = mixed / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t.float() if "norm" in n else t for n, t in tensors.items()}, file)
    pool = ModelPool.open(tiny_model("llama"), {"half": tiny_model("llama", 2, dtype="bfloat16"), "mixed": mixed})
    bank = Bank.load(pool, pool.manifest(), CPU)

    assert {n: v.dtype for n, v in bank.flat.items()} == {
        "base": torch.float32,
        "half": torch.bfloat16,
        "mixed": torch.float32,
    }
    for t in bank.manifest.tensors:
        flat = bank.flat["mixed"][t.offset : t.offset + t.size].view(t.shape)
        assert torch.equal(flat.to(torch.bfloat16), tensors[t.name])


def test_views_are_no_copies(tiny_model: Any) -> None:
    """A block's view shares the bank's memory and knows where its tensors lie in it."""
    pool = ModelPool.open(tiny_model("llama"), {"x": tiny_model("llama", 1)})
    bank = Bank.load(pool, pool.manifest(), CPU)
    view = bank.view("layers.1.mlp")

    start = view.block.start * 4
    assert view.base.data_ptr() == bank.flat["base"].data_ptr() + start
    assert view.sources["x"].data_ptr() == bank.flat["x"].data_ptr() + start
    name, a, b = view.spans()[1]
    assert torch.equal(view.sources["x"][a:b].view(48, 32), pool.checkpoints["x"].tensor(name))
