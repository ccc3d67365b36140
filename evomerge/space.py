"""SearchSpace: named axes over the unit cube; every point decodes to a valid canonical recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from evomerge.errors import UserError, nearest
from evomerge.manifest import Manifest
from evomerge.merge.methods import METHODS, Scalar
from evomerge.proposal import Genome, frozen_genome
from evomerge.recipe import Dtype, Match, Recipe, Rule, check_value, rounded


@dataclass(frozen=True)
class Axis:
    """One gene. `value` maps [0, 1] onto [low, high] (float, int) or onto `choices` (categorical)."""

    name: str
    kind: Literal["float", "int", "categorical"] = "float"
    low: float = 0.0
    high: float = 1.0
    choices: tuple[str, ...] = ()
    log: bool = False
    default: float | str = 0.0
    when: tuple[str, frozenset[str]] | None = None

    @property
    def levels(self) -> int | None:
        """Number of distinct values of an int or categorical axis, None for a float."""
        if self.kind == "float":
            return None
        return len(self.choices) if self.kind == "categorical" else int(self.high - self.low) + 1

    def value(self, u: float) -> float | str:
        """The value at `u` in [0, 1]; floats rounded to 1e-6. Total: the ends belong to the outer levels."""
        levels = self.levels
        if levels is not None:
            step = min(int(u * levels), levels - 1)
            return self.choices[step] if self.kind == "categorical" else self.low + step
        if self.log:
            exponent = math.log(self.low) + u * (math.log(self.high) - math.log(self.low))
            return min(max(rounded(math.exp(exponent)), self.low), self.high)
        return min(max(rounded(self.low + u * (self.high - self.low)), self.low), self.high)

    def unit(self, value: float | str) -> float:
        """The inverse of `value`: the middle of a level. Raises ValueError outside the axis."""
        if self.kind == "categorical":
            return (self.choices.index(str(value)) + 0.5) / len(self.choices)
        if isinstance(value, str) or not self.low <= value <= self.high:
            raise ValueError(f"{self.name}: {value} lies outside [{self.low}, {self.high}]")
        if self.kind == "int":
            return (value - self.low + 0.5) / (self.high - self.low + 1)
        if self.high == self.low:
            return 0.5
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


class SearchSpace(Protocol):
    """What an optimizer and the driver need of a space."""

    axes: tuple[Axis, ...]

    def decode(self, g: Genome, m: Manifest) -> Recipe:
        """The canonical recipe at a point of the unit cube. Total."""
        ...

    def encode(self, r: Recipe, m: Manifest) -> Genome:
        """A point that decodes to `r`. Raises ValueError where the space cannot express it."""
        ...


# -- the YAML form ------------------------------------------------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AxisSpec(_Part):
    """Bounds of one coefficient; one axis per group, and per expert where the method has one per source."""

    low: float
    high: float
    default: float | Literal["uniform"] | None = Field(None, description="uniform: 1 / number of experts")
    log: bool = False

    @field_validator("low", "high", "default")
    @classmethod
    def _on_the_grid(cls, value: float | str | None) -> float | str | None:
        # Decoded coefficients are multiples of 1e-6; a bound between two of them could not be encoded again.
        return rounded(value) if isinstance(value, float) else value

    @model_validator(mode="after")
    def _ordered(self) -> AxisSpec:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"`low < high` must hold, but got (low={self.low:g}, high={self.high:g})")
        if isinstance(self.default, float) and not self.low <= self.default <= self.high:
            raise ValueError(f"default {self.default:g} lies outside [{self.low:g}, {self.high:g}]")
        if self.log and self.low <= 0:
            raise ValueError(f"a log axis needs low > 0, got {self.low:g}")
        return self


class Buckets(_Part):
    """Contiguous runs of layers of nearly equal length, with one set of axes each."""

    buckets: int = Field(ge=1)


class NamedGroup(_Part):
    """A hand-made group of blocks."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    match: Match | Literal["all"]


class SpaceSpec(_Part):
    """A search space: one method over groups of blocks."""

    description: str = ""
    method: str = "task_arithmetic"
    groups: Literal["all", "layers", "layer-modules"] | Buckets | tuple[NamedGroup, ...] = "all"
    axes: Mapping[str, AxisSpec] = Field(min_length=1)
    params: Mapping[str, Scalar] = Field(default_factory=dict, description="fixed options and coefficients")

    @model_validator(mode="after")
    def _known(self) -> SpaceSpec:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}{nearest(self.method, METHODS)}")
        method = METHODS[self.method]
        for name, axis in self.axes.items():
            if name not in method.coefficients:
                raise ValueError(f"{self.method} has no coefficient {name!r}{nearest(name, method.coefficients)}")
            c = method.coefficients[name]
            if not (c.low <= axis.low and axis.high <= c.high):
                raise ValueError(
                    f"{name}: bounds must lie within [{c.low:g}, {c.high:g}], got [{axis.low:g}, {axis.high:g}]"
                )
        for name, value in self.params.items():
            if name not in method.options and name not in method.coefficients:
                raise ValueError(
                    f"{self.method} has no parameter {name!r}{nearest(name, (*method.options, *method.coefficients))}"
                )
            if name in self.axes:
                raise ValueError(f"{name} is both an axis and fixed in params; keep one")
            check_value(method, name, value)
        return self


class RuleSpace:
    """One merge method whose coefficients vary by group of blocks and by expert."""

    def __init__(self, spec: SpaceSpec, manifest: Manifest, dtype: Dtype) -> None:
        """Bind a spec to a pool. Raises UserError where a group is empty or groups overlap."""
        self.spec = spec
        self.dtype = dtype
        self.groups = _groups(spec, manifest)
        self._experts = manifest.experts
        method = METHODS[spec.method]
        # A linear merge over the experts alone has no place for the base; others add to it.
        axes = []
        for group in self.groups:
            for expert in self._experts:
                axes += [self._axis(f"{expert}.{group}.{c}", c) for c in method.per_source if c in spec.axes]
            axes += [self._axis(f"{group}.{c}", c) for c in method.per_block if c in spec.axes]
        self.axes: tuple[Axis, ...] = tuple(axes)

    def _axis(self, name: str, coefficient: str) -> Axis:
        spec = self.spec.axes[coefficient]
        default: float
        if spec.default == "uniform":
            default = min(max(1.0 / max(len(self._experts), 1), spec.low), spec.high)
        elif spec.default is None:
            default = min(max(METHODS[self.spec.method].coefficients[coefficient].default, spec.low), spec.high)
        else:
            default = float(spec.default)
        return Axis(name, "float", spec.low, spec.high, log=spec.log, default=default)

    @property
    def default(self) -> Genome:
        """The point where every axis has its default."""
        return frozen_genome([a.unit(a.default) for a in self.axes])

    def probes(self) -> list[Genome]:
        """Where to look first: the default, and each expert alone with half and with full weight (kept in bounds)."""
        if "weight" not in self.spec.axes:
            return [self.default]
        out = [self.default]
        for expert in self._experts:
            for weight in (0.5, 1.0):
                genes = []
                for axis in self.axes:
                    value = axis.default
                    if axis.name.endswith(".weight"):
                        value = weight if axis.name.partition(".")[0] == expert else 0.0
                        value = min(max(value, axis.low), axis.high)
                    genes.append(axis.unit(value))
                out.append(frozen_genome(np.clip(np.array(genes), 0.0, 1.0)))
        return out

    def decode(self, g: Genome, m: Manifest) -> Recipe:
        """The canonical recipe at `g`. ValueError only for a vector of the wrong length or off the cube."""
        if g.shape != (len(self.axes),) or not np.all((g >= 0) & (g <= 1)):
            raise ValueError(f"expected {len(self.axes)} genes in [0, 1], got shape {g.shape}")
        values = {axis.name: float(axis.value(float(u))) for axis, u in zip(self.axes, g, strict=True)}
        method = METHODS[self.spec.method]
        chosen: dict[str, Rule] = {}
        for group, blocks in self.groups.items():
            params: dict[str, Scalar] = {n: v for n, v in self.spec.params.items() if n not in method.per_source}
            params |= {c: values[f"{group}.{c}"] for c in method.per_block if c in self.spec.axes}
            sources = {}
            for expert in self._experts:
                coefs = {n: float(v) for n, v in self.spec.params.items() if n in method.per_source}
                coefs |= {c: values[f"{expert}.{group}.{c}"] for c in method.per_source if c in self.spec.axes}
                sources[expert] = coefs
            weights = [c.get("weight", 1.0) for c in sources.values()]
            normalised = params.get("normalize", True)
            if method.delta == "none" and (not any(weights) or (normalised and abs(sum(weights)) < 1e-6)):
                # Weights that build no model, or cannot be normalised, mean "nothing of the experts": the base,
                # so decode is total.
                continue
            rule = Rule.model_construct(match="all", method=self.spec.method, params=params, sources=sources)
            chosen |= dict.fromkeys(blocks, rule)
        return Recipe.model_construct(base=m.base, dtype=self.dtype, sources={}).assembled(chosen, m)

    def encode(self, r: Recipe, m: Manifest) -> Genome:
        """A point that decodes to the canonical form of `r`. Raises ValueError where there is none."""
        blocks = r.canonical(m).blocks
        method = METHODS[self.spec.method]
        weights = self.spec.axes.get("weight")
        # A source that is not there has weight 0; what else it has is inert. Where no weight can be 0, lambda is.
        zero_weight = weights is not None and weights.low <= 0.0 <= weights.high
        genes = []
        for group, names in self.groups.items():
            rule = blocks.get(names[0])
            for expert in self._experts:
                coefs = rule.sources.get(expert) if rule is not None else None
                for c in method.per_source:
                    if c in self.spec.axes:
                        axis = self._axis(f"{expert}.{group}.{c}", c)
                        absent = 0.0 if c == "weight" and zero_weight else axis.default
                        genes.append(axis.unit(coefs[c] if coefs is not None and c in coefs else absent))
            for c in method.per_block:
                if c in self.spec.axes:
                    axis = self._axis(f"{group}.{c}", c)
                    absent = 0.0 if c == "lambda" and not zero_weight and axis.low <= 0.0 <= axis.high else axis.default
                    genes.append(axis.unit(absent if rule is None else float(rule.params.get(c, axis.default))))
        g = frozen_genome(np.clip(np.array(genes), 0.0, 1.0))
        if self.decode(g, m).id != r.canonical(m).id:
            raise ValueError("this space cannot express the recipe: another method, grouping or fixed parameter")
        return g


def _groups(spec: SpaceSpec, m: Manifest) -> dict[str, tuple[str, ...]]:
    """Group name -> names of its blocks, in layout order; a block is in at most one group."""
    blocks = m.blocks
    layers = m.layers[m.base]
    if spec.groups == "all":
        return {"all": tuple(blocks)}
    if isinstance(spec.groups, tuple):
        out: dict[str, tuple[str, ...]] = {}
        owner: dict[str, str] = {}
        for g in spec.groups:
            names = tuple(n for n, b in blocks.items() if g.match == "all" or g.match.covers(b))
            names = tuple(n for n in names if n not in owner)
            if not names or g.name in out:
                raise UserError(
                    f"search space: group {g.name!r} is a repeat or matches no block left by earlier groups"
                )
            owner.update(dict.fromkeys(names, g.name))
            out[g.name] = names
        return out
    per_layer = spec.groups == "layer-modules"
    runs = layers if not isinstance(spec.groups, Buckets) else min(spec.groups.buckets, layers)
    edges = [round(i * layers / runs) for i in range(runs + 1)]
    grouped: dict[str, list[str]] = {}
    for name, b in blocks.items():
        if b.layer is None:
            key = b.module if per_layer else "outside"
        elif per_layer:
            key = name
        else:
            run = next(i for i in range(runs) if b.layer < edges[i + 1])
            first, last = edges[run], edges[run + 1] - 1
            key = f"layers.{first}" if first == last else f"layers.{first}-{last}"
        grouped.setdefault(key, []).append(name)
    return {k: tuple(v) for k, v in grouped.items()}


def describe(space: RuleSpace) -> dict[str, Any]:
    """What `check` prints of a space."""
    return {"method": space.spec.method, "groups": len(space.groups), "axes": len(space.axes)}
