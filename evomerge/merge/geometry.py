"""Inner products of whole models over any stretch of the flat layout, without keeping a model in memory.

The files are read once, from the start to the last position asked for; sums up to every STRIDE-th element are kept.
A stretch is the difference of two prefixes, so a new cut costs one partial stride of reading.
"""

from __future__ import annotations

import bisect

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.manifest import Manifest, TensorInfo
from evomerge.pool import ModelPool

STRIDE = 1 << 20
"""Elements between two kept sums: 8 MiB of fp64 per source while one is computed."""


class FlatGeometry:
    """Gram matrices of a pool's sources; see `search.base.Geometry`."""

    def __init__(self, pool: ModelPool, manifest: Manifest) -> None:
        """Read nothing yet."""
        self._pool, self._manifest = pool, manifest
        self._starts = [t.offset for t in manifest.tensors]
        self._prefixes: dict[int, NDArray[np.float64]] = {}
        self._open: dict[str, tuple[str, torch.Tensor]] = {}
        """One flat tensor a source: some are converted when they are read, which is dear to do stride by stride."""
        self._strides = [np.zeros((len(self.sources), len(self.sources)))]
        """Sums up to 0, STRIDE, 2 STRIDE, ..."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The base, then the experts by name."""
        return (self._manifest.base, *self._manifest.experts)

    def gram(self, start: int, stop: int) -> NDArray[np.float64]:
        """<theta_k, theta_l> over [start, stop) in fp64, shape (n_sources, n_sources)."""
        return self._prefix(stop) - self._prefix(start)

    def _prefix(self, stop: int) -> NDArray[np.float64]:
        if stop not in self._prefixes:
            while len(self._strides) <= stop // STRIDE:
                at = (len(self._strides) - 1) * STRIDE
                self._strides.append(self._strides[-1] + self._products(at, at + STRIDE))
            at = stop // STRIDE * STRIDE
            self._prefixes[stop] = self._strides[stop // STRIDE] + self._products(at, stop)
        return self._prefixes[stop]

    def _products(self, start: int, stop: int) -> NDArray[np.float64]:
        """The Gram matrix of one stretch, tensor by tensor; gaps are zeros."""
        n = len(self.sources)
        total = np.zeros((n, n))
        first = max(bisect.bisect_right(self._starts, start) - 1, 0)
        for t in self._manifest.tensors[first:]:
            if t.offset >= stop:
                break
            a, b = max(start, t.offset) - t.offset, min(stop, t.offset + t.size) - t.offset
            if a < b:
                x = torch.stack([self._part(source, t, a, b) for source in self.sources]).numpy()
                total += x @ x.T
        return total

    def _part(self, source: str, t: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Elements of one tensor in fp64; rows of the vocabulary that a source lacks are the base's, as in the bank."""
        own = self._flat(source, t.name)
        if len(own) < stop:
            base = self._flat(self._manifest.base, t.name)
            return torch.cat([own[start:].double(), base[max(start, len(own)) : stop].double()])
        return own[start:stop].double()

    def _flat(self, source: str, name: str) -> torch.Tensor:
        if source not in self._open or self._open[source][0] != name:
            self._open[source] = (name, self._pool.checkpoints[source].tensor(name).reshape(-1))
        return self._open[source][1]
