"""Manifest: all that search spaces and recipes may know of weights. Pure data, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from evomerge.canonical import digest

RESERVED = frozenset({"base", "merged", "uniform", "experts"})
"""Names that no expert may have: they mean something in recipes, spaces and tables."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a flat layout: `offset` and the size are counted in elements."""

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
    layouts: Mapping[str, tuple[TensorInfo, ...]] = field(default_factory=dict)
    """The tensors of sources with another number of layers than the base: routes visit them, merges cannot."""

    @property
    def experts(self) -> tuple[str, ...]:
        """Every source but the base that can be merged with it, sorted."""
        return tuple(sorted(name for name in self.hashes if name != self.base and name not in self.layouts))

    @cached_property
    def blocks(self) -> Mapping[str, Block]:
        """Blocks by name, in layout order: embed, layers.0.attention, layers.0.mlp, ..., final_norm, head."""
        return _blocks(self.tensors)

    @cached_property
    def _others(self) -> Mapping[str, Mapping[str, Block]]:
        return {name: _blocks(tensors) for name, tensors in self.layouts.items()}

    def blocks_of(self, source: str) -> Mapping[str, Block]:
        """The blocks of one source: other ones than the base's where it has another number of layers."""
        return self._others.get(source, self.blocks)

    def elements_of(self, source: str) -> int:
        """Length of one source's flat layout."""
        last = self.layouts.get(source, self.tensors)[-1]
        return last.offset + last.size

    @property
    def elements(self) -> int:
        """Length of the flat layout, alignment gaps included."""
        return self.elements_of(self.base)

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
            "tensors": _rows(self.tensors),
            "hashes": dict(self.hashes),
            **({"layouts": {n: _rows(t) for n, t in self.layouts.items()}} if self.layouts else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what `to_json` wrote."""
        layers = {str(n): int(count) for n, count in data["layers"].items()}
        hashes = {str(n): str(h) for n, h in data["hashes"].items()}
        layouts = {str(n): _tensors(rows) for n, rows in data.get("layouts", {}).items()}
        return cls(str(data["base"]), layers, _tensors(data["tensors"]), hashes, layouts)


def _blocks(tensors: tuple[TensorInfo, ...]) -> dict[str, Block]:
    grouped: dict[str, list[TensorInfo]] = {}
    for t in tensors:
        grouped.setdefault(t.block, []).append(t)
    out = {}
    for name, mine in grouped.items():
        parts = name.split(".")
        layer = int(parts[1]) if parts[0] == "layers" else None
        last = mine[-1]
        out[name] = Block(name, parts[-1], layer, mine[0].offset, last.offset + last.size, tuple(mine))
    return out


def _rows(tensors: tuple[TensorInfo, ...]) -> list[list[Any]]:
    return [[t.name, list(t.shape), t.dtype, t.block, t.offset] for t in tensors]


def _tensors(rows: Sequence[Sequence[Any]]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(str(n), tuple(int(d) for d in s), str(t), str(b), int(o)) for n, s, t, b, o in rows)


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
