"""The in-place builder: candidates are written over one buffer whose views are the live model's parameters.

Building is history-free: a block is a pure function of its rule or its segments, so build(A), build(B) gives the
bits of build(B) alone, and blocks that did not change are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from evomerge.canonical import canonical_json
from evomerge.manifest import Manifest
from evomerge.merge.bank import Bank
from evomerge.merge.pipeline import BuildError, Sketches, apply, mix
from evomerge.pool import TORCH_DTYPES
from evomerge.recipe import Recipe, Rule


class Builder:
    """One buffer at fixed addresses, shape (manifest.elements,), and what is in it."""

    def __init__(self, bank: Bank, dtype: str) -> None:
        """Allocate the buffer in a recipe's dtype on the bank's device; nothing is built yet."""
        self.bank = bank
        self.dtype = dtype
        device = next(iter(bank.flat.values())).device
        self.buffer = torch.zeros(bank.manifest.elements, dtype=TORCH_DTYPES[dtype], device=device)
        self._sketches = Sketches(bank.manifest.hashes)
        self._built: dict[str, str] = {}

    def views(self) -> Mapping[str, Tensor]:
        """Tensor name -> its view of the buffer, in the tensor's shape."""
        return {t.name: self.buffer[t.offset : t.offset + t.size].view(t.shape) for t in self.bank.manifest.tensors}

    def build(self, recipe: Recipe) -> int:
        """Write a canonical recipe's weights; returns how many blocks changed.

        Raises BuildError where a weight is NaN or infinite; ValueError for another dtype than the buffer's.
        """
        if recipe.dtype != self.dtype:
            raise ValueError(f"the buffer holds {self.dtype}, the recipe asks for {recipe.dtype}")
        changed: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, part in _parts(recipe, self.bank.manifest).items():
                key = _key(part)
                if self._built.get(name) == key:
                    continue
                self._built.pop(name, None)
                changed[name] = self._write(name, part)
                self._built[name] = key
        if changed and not bool(torch.isfinite(torch.stack(list(changed.values()))).all()):
            sick = [n for n, h in changed.items() if not bool(torch.isfinite(h))]
            for n in sick:
                del self._built[n]
            raise BuildError(
                f"NaN or infinite weights in {sick[0]}" + (f" and {len(sick) - 1} more" if sick[1:] else "")
            )
        return len(changed)

    def forget(self) -> None:
        """Build every block anew next time: somebody else may have written to the buffer."""
        self._built.clear()

    def distance(self) -> float:
        """||theta - theta_0|| / ||theta_0|| over all weights of what is built, in float64."""
        moved = norm = 0.0
        with torch.no_grad():
            for t in self.bank.manifest.tensors:
                base = self.bank.flat[self.bank.manifest.base][t.offset : t.offset + t.size].double()
                built = self.buffer[t.offset : t.offset + t.size].double()
                moved += float((built - base).square().sum())
                norm += float(base.square().sum())
        return float((moved / norm) ** 0.5) if norm else 0.0

    def _write(self, block: str, part: Part) -> Tensor:
        view = self.bank.view(block)
        out = self.buffer[view.block.start : view.block.stop]
        if part is None:
            out.copy_(view.base)
            return view.base.float().sum() * 0.0
        if isinstance(part, Rule):
            return apply(out, view, part, self._sketches)
        healths = [
            mix(out[start:stop], [(view.sources[n][start:stop], weights[n]) for n in sorted(weights)])
            for start, stop, weights in part
        ]
        return torch.stack(healths).sum()


Part = Rule | list[tuple[int, int, dict[str, float]]] | None
"""What a block is built by: a rule; segments with their shares, counted from the block's start; None for the base."""


def _parts(recipe: Recipe, manifest: Manifest) -> dict[str, Part]:
    if recipe.segments is None:
        return {name: recipe.blocks.get(name) for name in manifest.blocks}
    return {
        b.name: [(start - b.start, stop - b.start, w) for start, stop, w in recipe.segments.within(b.start, b.stop)]
        for b in manifest.blocks.values()
    }


def _key(part: Part) -> str:
    if part is None:
        return "base"
    if isinstance(part, Rule):
        return canonical_json([part.method, dict(part.params), {s: dict(c) for s, c in part.sources.items()}])
    return canonical_json(part)
