"""Gram matrices of whole models from their files, against products of the bank's vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.merge import geometry
from evomerge.merge.bank import Bank
from evomerge.merge.geometry import FlatGeometry
from evomerge.pool import ModelPool


def flat_vectors(pool: ModelPool, g: FlatGeometry) -> np.ndarray:
    bank = Bank.load(pool, pool.manifest(), torch.device("cpu"))
    return np.stack([bank.flat[n].double().numpy() for n in g.sources])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stride", [1000, 1 << 20])
def test_any_stretch(dtype: str, stride: int, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stretch has the products of the flat vectors there, in whatever order they are asked for."""
    monkeypatch.setattr(geometry, "STRIDE", stride)
    folders = [tiny_model("llama", seed, dtype=dtype) for seed in (0, 1, 2)]
    pool = ModelPool.open(folders[0], {"b": folders[1], "a": folders[2]})
    manifest = pool.manifest()
    g = FlatGeometry(pool, manifest)
    x = flat_vectors(pool, g)
    rng = np.random.default_rng(0)

    assert g.sources == ("base", "a", "b")
    n = manifest.elements
    for start, stop in [(0, n), (0, 1), (n - 1, n), *(sorted(rng.integers(0, n + 1, 2)) for _ in range(40))]:
        expected = x[:, start:stop] @ x[:, start:stop].T
        assert np.allclose(g.gram(start, stop), expected, rtol=1e-10, atol=1e-9)


def test_rows_that_a_source_lacks_are_the_bases(tiny_model: Any) -> None:
    """Vocabularies of other lengths are aligned as in the bank, from any start within the rows."""
    base: Path = tiny_model("llama", 0)
    pool = ModelPool.open(
        base, {"long": tiny_model("llama", 1, vocab_size=520), "short": tiny_model("llama", 2, vocab_size=500)}
    )
    manifest = pool.manifest()
    g = FlatGeometry(pool, manifest)
    x = flat_vectors(pool, g)
    embed = manifest.tensors[0]
    assert embed.shape[0] == 512

    for start, stop in ((0, embed.size), (499 * 32 + 5, 505 * 32), (505 * 32 + 1, embed.size), (0, manifest.elements)):
        assert np.allclose(g.gram(start, stop), x[:, start:stop] @ x[:, start:stop].T, rtol=1e-10, atol=1e-9)
