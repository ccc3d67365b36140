"""The bank: every source as stored, at the manifest's places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "phi", "gemma2"])
def test_rows_are_tokens_by_id(tiny_model: Any, arch: str, tied: bool) -> None:
    """Surplus rows are left out and missing rows are the base's, in embedding, head and head bias alike."""
    long, short = (tiny_model(arch, i, tied=tied, vocab_size=v) for i, v in ((1, 520), (2, 500)))
    pool = ModelPool.open(tiny_model(arch, tied=tied), {"long": long, "short": short})
    manifest = pool.manifest()
    bank = Bank.load(pool, manifest, CPU)

    base = pool.checkpoints["base"]
    by_token = [t for t in manifest.tensors if t.name in base.stock.rows]
    assert len(by_token) == (1 if tied else 2) + (arch == "phi")
    for t in manifest.tensors:
        long_, short_ = (bank.flat[n][t.offset : t.offset + t.size].view(t.shape) for n in ("long", "short"))
        if t in by_token:
            assert t.shape[0] == 512
            assert torch.equal(long_, pool.checkpoints["long"].tensor(t.name)[:512])
            assert torch.equal(short_[:500], pool.checkpoints["short"].tensor(t.name))
            assert torch.equal(short_[500:], base.tensor(t.name)[500:])
        else:
            assert torch.equal(long_, pool.checkpoints["long"].tensor(t.name))


def test_borrowed_rows_keep_the_bases_bits(tiny_model: Any) -> None:
    """A bf16 expert that lacks rows of an fp32 base is held in fp32, so those rows have a delta of exactly zero."""
    short = tiny_model("llama", 1, dtype="bfloat16", vocab_size=500)
    pool = ModelPool.open(tiny_model("llama"), {"short": short, "whole": tiny_model("llama", 2, dtype="bfloat16")})
    bank = Bank.load(pool, pool.manifest(), CPU)

    assert {n: v.dtype for n, v in bank.flat.items()} == {
        "base": torch.float32,
        "short": torch.float32,
        "whole": torch.bfloat16,
    }
    view = bank.view("embed")
    rows = slice(500 * 32, 512 * 32)
    assert torch.equal(view.sources["short"][rows], view.base[rows])


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
