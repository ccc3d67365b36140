"""Which layers deserve axes of their own: those with the largest task vectors.

After Expert Merging++ (arXiv 2509.25712), which hands out coefficients by |alpha| mean|tau| n, summed over experts:
how far a layer moves when its coefficient does. Here with the Euclidean norm and alpha = 1, as nothing is known of
coefficients before a search.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evomerge.manifest import Manifest
from evomerge.recipe import Match
from evomerge.search.base import Geometry
from evomerge.space import Important, NamedGroup, SpaceSpec

REST, OUTSIDE = "other-layers", "outside"


def layer_sizes(geometry: Geometry, manifest: Manifest) -> NDArray[np.float64]:
    """sum_k ||tau_k|| of every layer, shape (n_layers,). Reads the whole pool once."""
    square = np.zeros((manifest.layers[manifest.base], len(manifest.experts)))
    base = geometry.sources.index(manifest.base)
    for b in manifest.blocks.values():
        gram = geometry.gram(b.start, b.stop)
        if b.layer is not None:
            distance = gram.diagonal() - 2 * gram[base] + gram[base, base]
            square[b.layer] += np.delete(distance, base)
    size: NDArray[np.float64] = np.sqrt(np.maximum(square, 0.0)).sum(axis=1)
    return size


def important_groups(spec: SpaceSpec, sizes: NDArray[np.float64], manifest: Manifest) -> SpaceSpec:
    """The space with a group for each of its `important` layers, one for the other layers, and one for what is in none.

    Of layers with equal sizes the first ones are taken.
    """
    assert isinstance(spec.groups, Important)
    chosen = sorted(np.argsort(-sizes, kind="stable")[: spec.groups.important].tolist())
    groups = [NamedGroup(name=f"layers.{i}", match=Match(layers=(i, i))) for i in chosen]
    if len(chosen) < len(sizes):
        groups.append(NamedGroup(name=REST, match=Match(layers=(0, len(sizes) - 1))))
    if any(b.layer is None for b in manifest.blocks.values()):
        groups.append(NamedGroup(name=OUTSIDE, match="all"))
    return spec.model_copy(update={"groups": tuple(groups)})
