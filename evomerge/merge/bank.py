"""The resident weights: every source as one flat vector in the manifest's layout, in the dtype it was stored in.

Deltas are never stored: a bf16 delta does not reproduce its expert, and an fp32 one would double the memory.
They are formed in fp32 inside the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.manifest import Block, Manifest
from evomerge.pool import DTYPES, ModelPool


@dataclass(frozen=True)
class BlockView:
    """One block of all sources: flat vectors of shape (stop - start,), and where its tensors lie in them."""

    block: Block
    base: Tensor
    sources: Mapping[str, Tensor]

    def spans(self) -> list[tuple[str, int, int]]:
        """(tensor name, start, stop) within the block's flat vectors."""
        at = self.block.start
        return [(t.name, t.offset - at, t.offset - at + t.size) for t in self.block.tensors]


class Bank:
    """Base and experts, resident on one device."""

    def __init__(self, flat: Mapping[str, Tensor], manifest: Manifest) -> None:
        """Take one flat vector a source, of length `manifest.elements_of(source)`, the base among them."""
        self.flat = dict(flat)
        self.manifest = manifest

    @classmethod
    def load(cls, pool: ModelPool, manifest: Manifest, device: torch.device) -> Bank:
        """Copy every tensor from its mapped file to its place. Mixed dtypes of one source are promoted.

        Rows of the vocabulary are tokens by id, in the base's number: rows that only a source has are left out,
        and rows that it lacks are the base's.
        """
        base = pool.checkpoints[pool.base]
        flat = {}
        for name, checkpoint in pool.checkpoints.items():
            own = checkpoint.tensors
            tensors = manifest.layouts.get(name, manifest.tensors)
            short = {t.name for t in tensors if own[t.name].shape[:1] < t.shape[:1]}
            kinds = {DTYPES[own[t.name].dtype] for t in tensors}
            kinds |= {DTYPES[base.tensors[n].dtype] for n in short}
            dtype = kinds.pop() if len(kinds) == 1 else torch.float32
            vector = torch.zeros(manifest.elements_of(name), dtype=dtype, device=device)
            for t in tensors:
                place = vector[t.offset : t.offset + t.size].view(t.shape)
                tensor = checkpoint.tensor(t.name)
                if t.name in base.stock.rows:
                    rows = min(len(place), len(tensor))
                    place[:rows].copy_(tensor[:rows])
                    if t.name in short:
                        place[rows:].copy_(base.tensor(t.name)[rows:])
                else:
                    place.copy_(tensor)
            flat[name] = vector
        return cls(flat, manifest)

    def view(self, block: str) -> BlockView:
        """The block of every source that has it, without copying."""
        sources = {}
        for name, vector in self.flat.items():
            if (mine := self.manifest.blocks_of(name).get(block)) is not None:
                sources[name] = vector[mine.start : mine.stop]
        return BlockView(self.manifest.blocks[block], sources[self.manifest.base], sources)
