"""Layer swapping: the first and last layers from one model, those between from another.

Bandarkar et al. 2024, "Layer Swapping for Zero-Shot Cross-Lingual Transfer in Large Language Models",
arXiv 2410.01335. There the outer layers are of an expert in a language and the inner ones of an expert in a task.
How many layers are swapped is searched here; the default bounds (a quarter of the layers below, an eighth above, a
sixteenth for each transition: 8, 4 and 2 of 32) are ours, as the paper's own numbers are not verified.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from evomerge.errors import UserError, nearest
from evomerge.manifest import Manifest
from evomerge.merge.methods import METHODS, Method
from evomerge.proposal import Genome, frozen_genome
from evomerge.recipe import Dtype, Recipe, Rule
from evomerge.space import SWAP_AXES, Axis, LayerSwap, SearchSpace, SpaceSpec, decoded

ENDS = ("outer", "inner", "base")
SHARES = {"bottom": 4, "top": 8, "transition": 16}
"""The default upper bound of a number of layers is the model's, divided by this."""

Mix = tuple[str, ...]
"""The sources, sorted, whose mean a layer is: one, or two in a transition."""


class LayerSwapSpace:
    """Axes `outer`, `inner`, `embed`, `head` (categorical, where not given), `bottom`, `top`, `transition` (int).

    Layers 0 ... bottom - 1 and the last `top` are the outer model's. The `transition` layers next to each of these
    two runs are the mean of both models; a run of no layers has none. Where the runs meet, outer layers come first.
    """

    def __init__(self, spec: SpaceSpec, manifest: Manifest, dtype: Dtype) -> None:
        """Bind a spec to a pool. Raises UserError for unknown sources and for more layers than the model has."""
        assert spec.layer_swap is not None
        self.spec = spec
        self.dtype = dtype
        self.methods: tuple[Method, ...] = (METHODS["linear"],)
        self._swap: LayerSwap = spec.layer_swap
        self._base = manifest.base
        self._layers = manifest.layers[manifest.base]
        for role in ("outer", "inner"):
            name = getattr(self._swap, role)
            if name is not None and name not in manifest.hashes:
                raise UserError(
                    f"search space: layer_swap.{role}: unknown source {name!r}{nearest(name, manifest.hashes)}"
                )
        # With one expert the base is its partner.
        models = manifest.experts if len(manifest.experts) > 1 else (*manifest.experts, manifest.base)
        starts = {"outer": models[0], "inner": models[1], "embed": "outer", "head": "outer"}
        axes = [
            Axis(role, "categorical", choices=ENDS if role in ("embed", "head") else models, default=start)
            for role, start in starts.items()
            if getattr(self._swap, role) is None
        ]
        self.axes: tuple[Axis, ...] = (*axes, *(self._count(name) for name in SWAP_AXES))

    def _count(self, name: str) -> Axis:
        given = self.spec.axes.get(name)
        low, high = (0.0, float(max(1, self._layers // SHARES[name]))) if given is None else (given.low, given.high)
        if high > self._layers:
            raise UserError(f"search space: {name}: the model has {self._layers} layers, but high is {high:g}")
        default = given.default if given is not None and isinstance(given.default, float) else (low + high) // 2
        return Axis(name, "int", low, high, default=default)

    @property
    def default(self) -> Genome:
        """The point where every axis has its default."""
        return self._genome({})

    def _genome(self, values: Mapping[str, float | str]) -> Genome:
        return frozen_genome([a.unit(values.get(a.name, a.default)) for a in self.axes])

    def probes(self) -> list[Genome]:
        """Where to look first: the default for every choice of outer and inner model."""
        choices = {a.name: a.choices for a in self.axes}
        if "outer" in choices and "inner" in choices:
            pairs = itertools.permutations(choices["outer"], 2)
            return [self._genome({"outer": outer, "inner": inner}) for outer, inner in pairs]
        one = next((role for role in ("outer", "inner") if role in choices), None)
        return [self.default] if one is None else [self._genome({one: c}) for c in choices[one]]

    def decode(self, g: Genome, m: Manifest) -> Recipe:
        """The canonical recipe at `g`: a linear rule a block. ValueError for a vector that is no point of the space."""
        values = {**self._swap.model_dump(exclude_none=True), **decoded(self.axes, g)}
        outer, inner = str(values["outer"]), str(values["inner"])
        layers = self._mixes(outer, inner, *(int(values[name]) for name in SWAP_AXES))
        ends = {"outer": outer, "inner": inner, "base": self._base}
        rules: dict[Mix, Rule] = {}
        chosen = {}
        for block in m.blocks.values():
            end = "embed" if block.module == "embed" else "head"
            mix = (ends[str(values[end])],) if block.layer is None else layers[block.layer]
            if mix != (self._base,):
                sources = {name: {"weight": 1.0} for name in mix}
                rules.setdefault(mix, Rule.model_construct(match="all", method="linear", params={}, sources=sources))
                chosen[block.name] = rules[mix]
        return Recipe.model_construct(base=m.base, dtype=self.dtype, sources={}).assembled(chosen, m)

    def _mixes(self, outer: str, inner: str, bottom: int, top: int, transition: int) -> list[Mix]:
        """Of each layer, the models it is the mean of."""
        n = self._layers
        out = []
        for i in range(n):
            if i < bottom or i >= n - top:
                mix = {outer}
            elif (bottom and i < bottom + transition) or (top and i >= n - top - transition):
                mix = {outer, inner}
            else:
                mix = {inner}
            out.append(tuple(sorted(mix)))
        return out

    def encode(self, r: Recipe, m: Manifest) -> Genome:
        """A point that decodes to the canonical form of `r`. Raises ValueError where there is none."""
        canonical = r.canonical(m)
        rules = canonical.blocks
        wanted = {
            b.name: tuple(sorted(rules[b.name].sources)) if b.name in rules else (m.base,) for b in m.blocks.values()
        }
        used = {name for mix in wanted.values() for name in mix}
        axes = {a.name: a for a in self.axes}

        def options(role: str) -> tuple[str, ...]:
            if role not in axes:
                return (str(getattr(self._swap, role)),)
            choices = axes[role].choices
            return tuple(c for c in choices if c in used) or choices

        counts = [range(int(axes[name].low), int(axes[name].high) + 1) for name in SWAP_AXES]
        for outer, inner in itertools.product(options("outer"), options("inner")):
            for numbers in itertools.product(*counts):
                layers = self._mixes(outer, inner, *numbers)
                if any(wanted[b.name] != layers[b.layer] for b in m.blocks.values() if b.layer is not None):
                    continue
                for embed, head in itertools.product(ENDS, ENDS):
                    found: dict[str, float | str] = dict(zip(SWAP_AXES, map(float, numbers), strict=True))
                    g = self._genome({"outer": outer, "inner": inner, "embed": embed, "head": head, **found})
                    if self.decode(g, m).id == canonical.id:
                        return g
        raise ValueError("this space cannot express the recipe: no swap of layers gives it")

    def around(self, r: Recipe) -> SearchSpace:
        """Itself: layers are swapped between the pool's models."""
        return self

    def describe(self) -> dict[str, Any]:
        """What `check` prints."""
        return {
            "method": "layer_swap",
            "groups": self._layers,
            "axes": len(self.axes),
            "names": [a.name for a in self.axes],
            "bounds": {a.name: list(a.choices) if a.kind == "categorical" else [a.low, a.high] for a in self.axes},
            "fixed": self._swap.model_dump(exclude_none=True),
        }
