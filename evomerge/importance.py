"""Which layers deserve axes of their own: those that fine-tuning moved most, or on which the objective hangs.

After Expert Merging++ (arXiv 2509.25712), which hands out coefficients by |alpha| mean|tau| n, summed over experts:
how far a layer moves when its coefficient does. By size that is the Euclidean norm with alpha = 1, as nothing is known
of coefficients before a search. By sensitivity it is the derivative of the objective by the layer's coefficient, which
weighs how far the layer moves with what that does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import UserError
from evomerge.fitness import FitnessSpec
from evomerge.manifest import Manifest
from evomerge.objective import differentiated, products
from evomerge.proposal import ItemSet, Job, WorkUnit
from evomerge.recipe import Match, Recipe
from evomerge.search.base import Geometry
from evomerge.space import Important, NamedGroup, SpaceSpec
from evomerge.workers import MakeEvaluator

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


def layer_sensitivities(
    fitness: FitnessSpec, make: MakeEvaluator, recipe: Recipe, items: ItemSet, manifest: Manifest
) -> NDArray[np.float64]:
    """sum_k |<dL/dW, tau_k>| of every layer at a recipe, shape (n_layers,), by one backward pass over the items.

    Raises UserError where the recipe cannot be scored.
    """
    [(e, _)] = make().evaluate(WorkUnit(0, (Job(0, 0, recipe, items, differentiated(fitness)),)))
    if e.gradients is None:
        raise UserError(
            f"groups: by sensitivity: the experts' mean could not be differentiated ({e.reason or e.status})"
        )
    [by_block] = products(fitness, e.gradients)[:, :, 1:]
    by_layer = np.zeros((manifest.layers[manifest.base], by_block.shape[1]))
    for b, row in zip(manifest.blocks.values(), by_block, strict=True):
        if b.layer is not None:
            by_layer[b.layer] += row
    total: NDArray[np.float64] = np.abs(by_layer).sum(axis=1)
    return total


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
