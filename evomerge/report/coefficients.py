"""Coefficients of recipes as maps, block by expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from evomerge.architectures import MODULES
from evomerge.manifest import Block, Manifest
from evomerge.merge.methods import METHODS
from evomerge.recipe import MERGED, Match, Recipe, Rule
from evomerge.report.figures import Figure, heat_map

Rows: TypeAlias = list[list[float | None]]
"""Values by row (source) and column (run of blocks); None where a block has no such coefficient."""


@dataclass(frozen=True)
class CoefficientMap:
    """One coefficient of several candidates over the same columns and rows."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: Mapping[int, Rows]

    @property
    def constant(self) -> float | None:
        """The value that the coefficient has wherever there is one, None where it varies."""
        first, *others = {x for rows in self.values.values() for row in rows for x in row if x is not None}
        return None if others else first

    def figure(self, candidate: int | None = None) -> Figure:
        """A heat map of one candidate, or one without values; its colours cover all candidates here."""
        finite = [x for rows in self.values.values() for row in rows for x in row if x is not None]
        z = [] if candidate is None else self.values[candidate]
        # Densities begin at 0; weights and lambda have a sign, and 0 is what leaves a source out.
        signed = self.name in ("weight", "lambda") or any(x < 0 for x in finite)
        limit = max((abs(x) for x in finite), default=0.0) or 1.0
        return heat_map(self.name, self.columns, self.rows, z, limit=limit, signed=signed)


def coefficient_maps(recipes: Mapping[int, Recipe], manifest: Manifest) -> list[CoefficientMap]:
    """The maps of canonical recipes, a map for each coefficient that their methods have.

    Neighbouring blocks whose values agree in all recipes share a column. Of segments, which may be cut inside of a
    block, each block has its mean weights. Of a route there are the blocks that it goes through as `merged`.
    """
    recipes = {i: by_block(r, manifest) for i, r in recipes.items()}
    sources = manifest.experts
    if any(manifest.base in r.sources for x in recipes.values() for r in x.blocks.values()):
        sources = (*sources, manifest.base)
    methods = [METHODS[m] for m in dict.fromkeys(r.method for x in recipes.values() for r in x.blocks.values())]
    per_source = {n: sources for m in methods for n in m.per_source}
    rows = per_source | {n: (n,) for m in methods for n in m.per_block}
    built = {i: merged_blocks(x, manifest) for i, x in recipes.items()}

    def row(n: str, i: int, b: str) -> tuple[float | None, ...]:
        if b not in built[i]:
            return (None,) * len(rows[n])
        return _sources(recipes[i], b, n, sources) if n in per_source else _params(recipes[i], b, n)

    values = {(n, i, b): row(n, i, b) for n in rows for i in recipes for b in manifest.blocks}
    columns = _columns(manifest, lambda b: tuple(values[n, i, b] for n in rows for i in recipes))
    out = []
    for n, names in rows.items():
        by_candidate: dict[int, Rows] = {}
        for i in recipes:
            by_column = [values[n, i, first] for first in columns.values()]
            if any(x is not None for column in by_column for x in column):
                by_candidate[i] = [list(row) for row in zip(*by_column, strict=True)]
        out.append(CoefficientMap(n, tuple(columns), names, by_candidate))
    return [m for m in out if m.values]


def merged_blocks(recipe: Recipe, manifest: Manifest) -> set[str]:
    """The blocks whose coefficients matter: all, or of a route those of its merged layers and of the model's ends.

    None of a route through no merged layer, whose ends are told in words.
    """
    if recipe.route is None:
        return set(manifest.blocks)
    layers = {h.layer for h in recipe.route.hops if h.from_ == MERGED}
    return {b.name for b in manifest.blocks.values() if b.layer is None or b.layer in layers} if layers else set()


def by_block(recipe: Recipe, manifest: Manifest) -> Recipe:
    """A canonical recipe as it is, or of segments one with their mean weights over each block, to look at."""
    if recipe.segments is None:
        return recipe
    rules = []
    for b in manifest.blocks.values():
        means: dict[str, float] = {}
        for start, stop, weights in recipe.segments.within(b.start, b.stop):
            for n, w in weights.items():
                means[n] = means.get(n, 0.0) + w * (stop - start) / (b.stop - b.start)
        sources = {n: {"weight": w} for n, w in means.items()}
        rules.append(Rule(match=Match(block=b.name), method="linear", params={"normalize": False}, sources=sources))
    return recipe.model_copy(update={"segments": None, "merge": tuple(rules)})


def _sources(recipe: Recipe, block: str, name: str, sources: Sequence[str]) -> tuple[float | None, ...]:
    """A coefficient by source. A source that a rule leaves out has weight 0; what else it has means nothing."""
    rule = recipe.blocks.get(block)
    absent = 0.0 if name == "weight" else None
    return tuple(absent if rule is None or s not in rule.sources else rule.sources[s].get(name) for s in sources)


def _params(recipe: Recipe, block: str, name: str) -> tuple[float | None, ...]:
    rule = recipe.blocks.get(block)
    return (float(rule.params[name]) if rule is not None and name in rule.params else None,)


def _columns(manifest: Manifest, key: Callable[[str], object]) -> dict[str, str]:
    """Label -> first block of each run of neighbouring blocks with equal keys.

    Neighbours are those in depth where the modules of every layer agree, else those of one kind of module.
    """
    blocks = list(manifest.blocks.values())
    layers: dict[int, set[object]] = {}
    for b in blocks:
        if b.layer is not None:
            layers.setdefault(b.layer, set()).add(key(b.name))
    whole = all(len(keys) == 1 for keys in layers.values())
    if not whole:
        # final_norm and head come last in this order, as they do in the model.
        blocks.sort(key=lambda b: (MODULES.index(b.module), -1 if b.layer is None else b.layer))
    runs = [list(run) for _, run in groupby(blocks, key=lambda b: (None if whole else b.module, key(b.name)))]
    return {_label(run, whole=whole, every=len(run) == len(blocks)): run[0].name for run in runs}


def _label(run: Sequence[Block], *, whole: bool, every: bool) -> str:
    if every:
        return "all blocks"
    layers = [b.layer for b in run if b.layer is not None]
    if not layers:
        return ", ".join(b.module.replace("_", " ") for b in run)
    first, last = min(layers), max(layers)
    kind = "layer" if whole else run[0].module
    name = f"{kind} {first}" if first == last else f"{kind}s {first}-{last}" if whole else f"{kind} {first}-{last}"
    outside = [b.module.replace("_", " ") for b in run if b.layer is None]
    return ", ".join([name, *outside])
