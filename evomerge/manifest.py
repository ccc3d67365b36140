"""Manifest: all that search spaces and recipes may know of weights. Pure data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evomerge.canonical import digest


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the base in the flat layout: `offset` and the size are counted in elements."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    block: str
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def matrix(self) -> bool:
        """True of a layer's matrices: what singular directions are known of.

        Embedding and head are left out, which are as tall as the vocabulary, and stacks of matrices.
        """
        return len(self.shape) == 2 and self.block.startswith("layers.")


@dataclass(frozen=True)
class Block:
    """A run of the flat layout that shares one set of coefficients.

    `module` is one of embed, attention, mlp, norm, final_norm, head; `layer` is None outside the layers.
    """

    name: str
    module: str
    layer: int | None
    start: int
    stop: int
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class Manifest:
    """Names, shapes and hashes of a pool. `hashes` may hold opaque tokens where the weights are remote."""

    base: str
    layers: Mapping[str, int]
    tensors: tuple[TensorInfo, ...]
    hashes: Mapping[str, str]

    @property
    def experts(self) -> tuple[str, ...]:
        """Every source but the base, sorted."""
        return tuple(sorted(name for name in self.hashes if name != self.base))

    @cached_property
    def blocks(self) -> Mapping[str, Block]:
        """Blocks by name, in layout order: embed, layers.0.attention, layers.0.mlp, ..., final_norm, head."""
        grouped: dict[str, list[TensorInfo]] = {}
        for t in self.tensors:
            grouped.setdefault(t.block, []).append(t)
        out = {}
        for name, tensors in grouped.items():
            parts = name.split(".")
            layer = int(parts[1]) if parts[0] == "layers" else None
            last = tensors[-1]
            out[name] = Block(name, parts[-1], layer, tensors[0].offset, last.offset + last.size, tuple(tensors))
        return out

    @property
    def elements(self) -> int:
        """Length of the flat layout, alignment gaps included."""
        last = self.tensors[-1]
        return last.offset + last.size

    @property
    def parameters(self) -> int:
        """Number of weights in one model, tied tensors counted once."""
        return sum(t.size for t in self.tensors)

    @cached_property
    def layout(self) -> str:
        """sha256 of names, shapes and offsets: what a flat position means."""
        return "sha256:" + digest([[t.name, list(t.shape), t.offset] for t in self.tensors])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `from_json` is the inverse."""
        return {
            "base": self.base,
            "layers": dict(self.layers),
            "tensors": [[t.name, list(t.shape), t.dtype, t.block, t.offset] for t in self.tensors],
            "hashes": dict(self.hashes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what `to_json` wrote."""
        tensors = tuple(
            TensorInfo(str(n), tuple(int(d) for d in s), str(t), str(b), int(o)) for n, s, t, b, o in data["tensors"]
        )
        layers = {str(n): int(count) for n, count in data["layers"].items()}
        return cls(str(data["base"]), layers, tensors, {str(n): str(h) for n, h in data["hashes"].items()})


ALIGN = 64
"""Tensors start at multiples of this many elements, so that every view is aligned as torch aligns its own."""


def lay_out(named: list[tuple[str, tuple[int, ...], str, str]]) -> tuple[TensorInfo, ...]:
    """Place (name, shape, dtype, block) rows, already in block order, one after the other."""
    out: list[TensorInfo] = []
    offset = 0
    for name, shape, dtype, block in named:
        info = TensorInfo(name, shape, dtype, block, offset)
        out.append(info)
        offset += -(-info.size // ALIGN) * ALIGN
    return tuple(out)
