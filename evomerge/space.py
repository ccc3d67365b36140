"""SearchSpace: named axes over the unit cube; every point decodes to a valid canonical recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from evomerge.errors import UserError, nearest
from evomerge.manifest import Manifest
from evomerge.merge.methods import METHODS, Method, Scalar
from evomerge.proposal import Genome, frozen_genome
from evomerge.recipe import MAX_HOPS, Dtype, Match, Recipe, Rule, check_value, rounded


@dataclass(frozen=True)
class Axis:
    """One gene. `value` maps [0, 1] onto [low, high] (float, int) or onto `choices` (categorical).

    `when` names another axis and those of its choices with which this one has an effect; None: always.
    """

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

    def slope(self, u: float) -> float:
        """d value / d u of a float axis at `u`, the rounding apart."""
        if self.log:
            return float(self.value(u)) * (math.log(self.high) - math.log(self.low))
        return self.high - self.low

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
    methods: tuple[Method, ...]

    @property
    def default(self) -> Genome:
        """The point where every axis has its default."""
        ...

    def probes(self) -> list[Genome]:
        """A few telling points to look at first."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `check` prints: method, groups, axes, names, bounds, fixed."""
        ...

    def decode(self, g: Genome, m: Manifest) -> Recipe:
        """The canonical recipe at a point of the unit cube. Total."""
        ...

    def encode(self, r: Recipe, m: Manifest) -> Genome:
        """A point that decodes to `r`. Raises ValueError where the space cannot express it."""
        ...

    def around(self, r: Recipe) -> SearchSpace:
        """The space with the model that `r` builds as a source `merged`; itself where it has no such source."""
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


class Important(_Part):
    """The layers that matter most, with axes of their own; the other layers share theirs."""

    important: int = Field(ge=1, description="how many; the groups are fixed when a run begins")
    by: Literal["size", "sensitivity"] = Field(
        "size", description="of the task vectors; or how much the objective changes with a layer's coefficients"
    )


class NamedGroup(_Part):
    """A hand-made group of blocks."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    match: Match | Literal["all"]


class LayerSwap(_Part):
    """Layer swapping: which model the first and last layers come from, and which one those between them.

    What is left out is searched.
    """

    outer: str | None = Field(None, description="source of the first and the last layers")
    inner: str | None = Field(None, description="source of the layers between them")
    embed: Literal["outer", "inner", "base"] | None = Field(None, description="whose embedding")
    head: Literal["outer", "inner", "base"] | None = Field(None, description="whose final norm and head")


SWAP_AXES = ("bottom", "top", "transition")


class RouteSpec(_Part):
    """Layer routes: the path of tokens through layers of one model or of several, and how it is written as genes."""

    encoding: Literal["indicator", "slices", "repeats", "scales"] = Field(
        description="an array of layers to be in or out; a list of slices; how often each layer is gone through; or "
        "a scale and gains for each layer of the natural path"
    )
    models: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="the first gives the ends; `merged` is what merge axes or the stage before build, `experts` all "
        "of them; default base (with merge axes merged) and experts",
    )
    repetitions: int = Field(2, ge=1, le=16, description="indicator: how often the array of all layers is repeated")
    slices: int = Field(4, ge=1, le=64, description="slices: how many at most")
    scales: Literal["slots", "pairs", "none"] = Field(
        "slots", description="of hops off the natural order; or a table of all pairs of layers; or all 1"
    )
    max_hops: int | None = Field(
        None, ge=1, le=MAX_HOPS, description="later hops are dropped; default twice the deepest model"
    )

    @property
    def one_model(self) -> bool:
        """Whether the encoding is of the layers of one model."""
        return self.encoding in ("repeats", "scales")

    @model_validator(mode="after")
    def _fitting(self) -> RouteSpec:
        for key, encodings in (("repetitions", ("indicator",)), ("slices", ("slices",)), ("max_hops", _FREE)):
            if key in self.model_fields_set and self.encoding not in encodings:
                raise ValueError(f"{key}: is for encoding {' or '.join(encodings)}, got encoding {self.encoding}")
        if self.encoding == "scales" and self.scales != "slots":
            raise ValueError(f"scales: encoding scales is about one for each layer; leave out `scales: {self.scales}`")
        if self.models is not None and len(set(self.models)) < len(self.models):
            raise ValueError(f"models: expected different names, got {list(self.models)}")
        if self.models is not None and self.one_model and (len(self.models) > 1 or "experts" in self.models):
            raise ValueError(
                f"models: encoding {self.encoding} is of the layers of one model, got {list(self.models)}; name one, "
                "or take encoding indicator or slices"
            )
        return self


_FREE = ("indicator", "slices", "repeats")
ROUTE_AXES = ("scale", "attn_gain", "mlp_gain", "repeats")
"""Axes of layer routes; all other names are coefficients of merges."""


class SpaceSpec(_Part):
    """A search space: a method, or the choice of one, over groups of blocks; layer swapping; or layer routes, which
    go with a merge whose coefficients are searched too."""

    description: str = ""
    method: str | tuple[str, ...] = Field("task_arithmetic", description="of a list, one is chosen by the search")
    groups: Literal["all", "layers", "layer-modules"] | Buckets | Important | tuple[NamedGroup, ...] = "all"
    axes: Mapping[str, AxisSpec] = Field(default_factory=dict, description="what is searched, with its bounds")
    params: Mapping[str, Scalar] = Field(default_factory=dict, description="fixed options and coefficients")
    experts: tuple[str, ...] | None = Field(None, description="those that are merged; default all")
    layer_swap: LayerSwap | None = Field(None, description="in place of method, groups, params and experts")
    route: RouteSpec | None = Field(None, description="layer routes; the other keys are then about `merged`")

    @property
    def methods(self) -> tuple[Method, ...]:
        """The method, or those to choose from."""
        return tuple(METHODS[n] for n in ((self.method,) if isinstance(self.method, str) else self.method))

    @property
    def merges(self) -> SpaceSpec | None:
        """The part that is about merging; None where there is none beside layer swapping or routes."""
        if self.route is None:
            return self if self.layer_swap is None else None
        axes = {n: a for n, a in self.axes.items() if n not in ROUTE_AXES}
        return self.model_copy(update={"axes": axes, "route": None}) if axes else None

    @model_serializer(mode="wrap")
    def _as_before(self, inner: Any) -> Any:
        # Experiment ids hash this: keys that came later are left out where they say nothing.
        return {k: v for k, v in inner(self).items() if v is not None or k not in ("experts", "layer_swap", "route")}

    @model_validator(mode="after")
    def _known(self) -> SpaceSpec:
        if self.layer_swap is not None:
            return self._swaps()
        if self.route is not None:
            _check_route_axes(self.route, self.axes)
            known = {*ROUTE_AXES, *(c for method in METHODS.values() for c in method.coefficients)}
            if unknown := [n for n in self.axes if n not in known]:
                raise ValueError(f"unknown axis {unknown[0]!r}{nearest(unknown[0], known)}")
            beside = self.model_fields_set & {"method", "groups", "params", "experts"}
            if beside and self.merges is None:
                raise ValueError(
                    f"{', '.join(sorted(beside))}: nothing is merged here; name a coefficient of the merge under axes, "
                    "such as weight, or leave it out"
                )
        if (merges := self.merges) is not None:
            merges._check_merges()
        return self

    def _check_merges(self) -> None:
        names = (self.method,) if isinstance(self.method, str) else self.method
        for name in names:
            if name not in METHODS:
                raise ValueError(f"unknown method {name!r}{nearest(name, METHODS)}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"method: expected one or several different methods, got {list(names)}")
        if not self.axes:
            raise ValueError("axes: expected at least one coefficient to search")
        any_of = " or ".join(names)
        coefficients = {c for method in self.methods for c in method.coefficients}
        options = {o for method in self.methods for o in method.options}
        for name in self.axes:
            if name not in coefficients:
                raise ValueError(f"{any_of} has no coefficient {name!r}{nearest(name, coefficients)}")
        for name in self.params:
            if name not in coefficients | options:
                raise ValueError(f"{any_of} has no parameter {name!r}{nearest(name, coefficients | options)}")
            if name in self.axes:
                raise ValueError(f"{name} is both an axis and fixed in params; keep one")
        for method in self.methods:
            for name, axis in self.axes.items():
                if name in method.coefficients:
                    _check_bounds(method, name, axis)
            for name, value in self.params.items():
                if name in method.coefficients or name in method.options:
                    check_value(method, name, value)

    def _swaps(self) -> SpaceSpec:
        beside = self.model_fields_set & {"method", "groups", "params", "experts", "route"}
        if beside:
            raise ValueError(f"layer_swap goes without {', '.join(sorted(beside))}")
        for name, axis in self.axes.items():
            if name not in SWAP_AXES:
                raise ValueError(f"layer_swap has no axis {name!r}{nearest(name, SWAP_AXES)}")
            _check_whole(name, axis)
            if axis.low < 0:
                raise ValueError(f"{name}: a number of layers is at least 0, got {axis.low:g}")
        return self


def _check_bounds(method: Method, name: str, axis: AxisSpec) -> None:
    c = method.coefficients[name]
    if not (c.low <= axis.low and axis.high <= c.high):
        raise ValueError(f"{name}: bounds must lie within [{c.low:g}, {c.high:g}], got [{axis.low:g}, {axis.high:g}]")
    if c.integer:
        _check_whole(name, axis)


def _check_route_axes(route: RouteSpec, axes: Mapping[str, AxisSpec]) -> None:
    """Raises ValueError for axes that the encoding does not have, and for bounds that leave out the model as it is."""
    per_encoding = {"repeats": ROUTE_AXES, "scales": ROUTE_AXES[:3]}
    known = per_encoding.get(route.encoding, ROUTE_AXES[:1])
    for name, axis in axes.items():
        if name not in ROUTE_AXES:
            continue
        if name not in known:
            raise ValueError(f"{name}: encoding {route.encoding} has no such axis, only {', '.join(known)}")
        if name == "scale" and route.scales == "none":
            raise ValueError("scale is an axis, but `scales: none` makes all 1; keep one")
        if name == "scale" and axis.low <= 0:
            raise ValueError(f"scale: the residual stream is scaled by positive numbers, got low {axis.low:g}")
        low, high = (0.0, 16.0) if name == "repeats" else (1e-3 if name == "scale" else -1e3, 1e3)
        if not low <= axis.low <= 1 <= axis.high <= high:
            raise ValueError(
                f"{name}: bounds must lie within [{low:g}, {high:g}] and hold 1, the model as it is, got "
                f"[{axis.low:g}, {axis.high:g}]"
            )
        if axis.default == "uniform":
            raise ValueError(f"{name}: uniform is a default of merge weights; give a number")
        if name == "repeats":
            _check_whole(name, axis)


def _check_whole(name: str, axis: AxisSpec) -> None:
    numbers = [axis.low, axis.high, *([] if axis.default is None else [axis.default])]
    if axis.log or any(isinstance(n, str) or n != int(n) for n in numbers):
        raise ValueError(f"{name}: expected whole numbers as bounds and default, and no log")


METHOD = "method"
"""Name of the categorical axis of a space with several methods."""


class RuleSpace:
    """Merge rules whose coefficients vary by group of blocks and by expert, all of one method.

    Of several methods the axis `method` chooses; coefficients that not all of them have are conditional on it.
    """

    def __init__(self, spec: SpaceSpec, manifest: Manifest, dtype: Dtype) -> None:
        """Bind a spec to a pool. Raises UserError where a group is empty or groups overlap, for unknown experts,
        and where slerp, which is between two models, has more or too few."""
        self.spec = spec
        self.dtype = dtype
        self.methods = spec.methods
        self.groups = _groups(spec, manifest)
        self._experts = _experts(spec, manifest)
        per_source = {n: None for method in self.methods for n in method.per_source if n in spec.axes}
        per_block = {n: None for method in self.methods for n in method.per_block if n in spec.axes}
        axes = []
        if len(self.methods) > 1:
            names = tuple(method.name for method in self.methods)
            axes.append(Axis(METHOD, "categorical", choices=names, default=names[0]))
        for group in self.groups:
            for expert in self._experts:
                axes += [self._axis(f"{expert}.{group}.{c}", c) for c in per_source]
            axes += [self._axis(f"{group}.{c}", c) for c in per_block]
        self.axes: tuple[Axis, ...] = tuple(axes)

    def _axis(self, name: str, coefficient: str) -> Axis:
        spec = self.spec.axes[coefficient]
        having = [method for method in self.methods if coefficient in method.coefficients]
        c = having[0].coefficients[coefficient]
        default: float
        if spec.default == "uniform":
            default = min(max(1.0 / max(len(self._experts), 1), spec.low), spec.high)
        elif spec.default is None:
            default = min(max(c.default, spec.low), spec.high)
        else:
            default = float(spec.default)
        when = None if len(having) == len(self.methods) else (METHOD, frozenset(method.name for method in having))
        kind: Literal["int", "float"] = "int" if c.integer else "float"
        return Axis(name, kind, spec.low, spec.high, log=spec.log, default=default, when=when)

    @property
    def default(self) -> Genome:
        """The point where every axis has its default."""
        return self._genome({})

    def _genome(self, values: Mapping[str, float | str]) -> Genome:
        """The point with these values, defaults elsewhere. ValueError outside an axis."""
        genes = [a.unit(values.get(a.name, a.default)) for a in self.axes]
        return frozen_genome(np.clip(np.array(genes), 0.0, 1.0))

    def probes(self) -> list[Genome]:
        """Where to look first: the default under each method, and each expert alone with half and with full weight
        (kept in bounds)."""
        out = [self.default]
        if len(self.methods) > 1:
            out += [self._genome({METHOD: method.name}) for method in self.methods[1:]]
        bands = [b for method in self.methods for b in method.bands if b in self.spec.axes]
        amounts = ("weight",) if "weight" in self.spec.axes else tuple(bands)
        weights = [a for a in self.axes if a.name.rpartition(".")[2] in amounts]
        if not weights:
            return out
        for expert in self._experts:
            for weight in (0.5, 1.0):
                wanted = {a.name: weight if a.name.partition(".")[0] == expert else 0.0 for a in weights}
                out.append(self._genome({a.name: min(max(wanted[a.name], a.low), a.high) for a in weights}))
        return out

    def decode(self, g: Genome, m: Manifest) -> Recipe:
        """The canonical recipe at `g`. ValueError only for a vector of the wrong length or off the cube."""
        values = decoded(self.axes, g)
        method = METHODS[str(values[METHOD])] if len(self.methods) > 1 else self.methods[0]
        chosen: dict[str, Rule] = {}
        for group, blocks in self.groups.items():
            rule = self._rule(method, group, values, m)
            if rule is not None:
                chosen |= dict.fromkeys(blocks, rule)
        return Recipe.model_construct(base=m.base, dtype=self.dtype, sources={}).assembled(chosen, m)

    def _rule(self, method: Method, group: str, values: Mapping[str, float | str], m: Manifest) -> Rule | None:
        def number(coefficient: str, axis: str) -> float:
            value = float(values[axis])
            return int(value) if method.coefficients[coefficient].integer else value

        axes, fixed = self.spec.axes, self.spec.params
        params = {n: v for n, v in fixed.items() if n in method.options or n in method.per_block}
        params |= {c: number(c, f"{group}.{c}") for c in method.per_block if c in axes}
        sources = {}
        for expert in self._experts:
            sources[expert] = {n: float(v) for n, v in fixed.items() if n in method.per_source}
            sources[expert] |= {c: number(c, f"{expert}.{group}.{c}") for c in method.per_source if c in axes}
        weights = [c.get("weight", method.coefficients["weight"].default) for c in sources.values()]
        adds = method.adds_to_base(params)
        normalised = method.combine == "weighted_mean" and params.get("normalize", True)
        if method.combine == "spherical" and len(self._experts) == 1:
            # Between the base and the only expert, whose weight is t.
            sources[m.base] = {"weight": max(1.0 - weights[0], 0.0)}
        elif not any(weights) and (method.combine == "spherical" or not adds):
            # Weights that build no model, or cannot be normalised, mean "nothing of the experts": the base,
            # so decode is total.
            return None
        elif normalised and abs(sum(weights)) < 1e-6:
            return None
        return Rule.model_construct(match="all", method=method.name, params=params, sources=sources)

    def why_no_gradient(self) -> str | None:
        """Why derivatives by the axes are not to be had, and what to do, or None where `gradient` gives them."""
        for method in self.methods:
            if not method.linear:
                able = " or ".join(n for n, known in METHODS.items() if known.linear)
                return f"{method.name} is not linear in its coefficients; use {able}"
        for axis in self.axes:
            if axis.kind != "float":
                return f"the {axis.kind} axis {axis.name!r} has no derivative; fix it"
        return None

    def gradient(self, g: Genome, products: NDArray[Any], m: Manifest) -> Genome:
        """The derivative of a loss by the genome at `g`, shape (n_axes,), by the chain rule over axis and coefficient.

        `products` are <dL/dW_b, c_k> (see `proposal.Gradients`), shape (n_blocks, 1 + n_experts). Zero where weights
        sum to nothing and the base is built in their place. Only where `why_no_gradient` is None.
        """
        values = {axis.name: float(axis.value(float(u))) for axis, u in zip(self.axes, g, strict=True)}
        method, fixed = self.methods[0], self.spec.params
        rows = {name: n for n, name in enumerate(m.blocks)}
        columns = [1 + m.experts.index(e) for e in self._experts]
        slopes: dict[str, float] = {}
        for group, blocks in self.groups.items():

            def coefficient(name: str, axis: str) -> float:
                return values.get(axis, float(fixed.get(name, method.coefficients[name].default)))

            total = products[[rows[b] for b in blocks]].sum(axis=0, dtype=np.float64)
            base, experts = total[0], total[columns]
            weights = np.array([coefficient("weight", f"{e}.{group}.weight") for e in self._experts])
            if method.adds_to_base(fixed):  # theta_0 + lambda sum w_i tau_i
                lam = coefficient("lambda", f"{group}.lambda")
                by_weight = lam * experts
                slopes[f"{group}.lambda"] = weights @ experts
            elif not fixed.get("normalize", method.options["normalize"][0]):  # sum w_i theta_i
                by_weight = (experts + base) * weights.any()
            elif abs(weights.sum()) < 1e-6:
                by_weight = np.zeros(len(weights))
            else:  # theta_0 + sum w_i tau_i / sum w_i
                by_weight = (experts - weights @ experts / weights.sum()) / weights.sum()
            slopes |= {f"{e}.{group}.weight": d for e, d in zip(self._experts, by_weight, strict=True)}
        return np.array([slopes[a.name] * a.slope(float(u)) for a, u in zip(self.axes, g, strict=True)])

    def encode(self, r: Recipe, m: Manifest) -> Genome:
        """A point that decodes to the canonical form of `r`. Raises ValueError where there is none."""
        canonical = r.canonical(m)
        used = {rule.method for rule in canonical.blocks.values()}
        reason = "this space cannot express the recipe: another method, grouping or fixed parameter"
        for method in self.methods:
            if used <= {method.name}:
                try:
                    g = self.read(method, canonical.blocks)
                except ValueError as e:
                    reason = str(e)
                    continue
                if self.decode(g, m).id == canonical.id:
                    return g
        raise ValueError(reason)

    def around(self, r: Recipe) -> SearchSpace:
        """Itself: merges are of the pool's models."""
        return self

    def read(self, method: Method, blocks: Mapping[str, Rule]) -> Genome:
        """The point that says of each group what `blocks` has for its first block; decoding it tells whether it does
        of the others. Raises ValueError outside an axis."""
        return self._genome(self._values(method, blocks))

    def _values(self, method: Method, blocks: Mapping[str, Rule]) -> dict[str, float | str]:
        """What the axes say of a recipe; axes that say nothing are left out."""
        axes = self.spec.axes
        weights = axes.get("weight")
        # A source that is not there has weight 0; what else it has is inert. Where no weight can be 0, all its bands
        # are, or lambda is.
        zero_weight = weights is not None and weights.low <= 0.0 <= weights.high
        zero_bands = not zero_weight and all(
            axes[b].low <= 0.0 <= axes[b].high if b in axes else self.spec.params.get(b) == 0.0 for b in method.bands
        )
        values: dict[str, float | str] = {METHOD: method.name}
        for group, names in self.groups.items():
            rule = blocks.get(names[0])
            for expert in self._experts:
                coefs = rule.sources.get(expert) if rule is not None else None
                for c in method.per_source:
                    if coefs is not None and c in coefs:
                        values[f"{expert}.{group}.{c}"] = coefs[c]
                    elif (c == "weight" and zero_weight) or (c in method.bands and zero_bands):
                        values[f"{expert}.{group}.{c}"] = 0.0
                if method.combine == "spherical" and coefs is not None and rule is not None and len(rule.sources) == 1:
                    # Any weight above 0 of an only source is the same; canonical is 1, which may be out of bounds.
                    values[f"{expert}.{group}.weight"] = min(1.0, weights.high) if weights is not None else 1.0
            for c in method.per_block:
                if rule is not None:
                    values[f"{group}.{c}"] = float(rule.params[c])
                elif c == "lambda" and not zero_weight and c in axes:
                    axis = axes[c]
                    if axis.low <= 0.0 <= axis.high:
                        values[f"{group}.{c}"] = 0.0
        return values

    def describe(self) -> dict[str, Any]:
        """What `check` prints."""
        choice = {METHOD: [method.name for method in self.methods]} if len(self.methods) > 1 else {}
        return {
            "method": " | ".join(method.name for method in self.methods),
            "groups": len(self.groups),
            "axes": len(self.axes),
            "names": [a.name for a in self.axes],
            "bounds": {**choice, **{c: [x.low, x.high] for c, x in self.spec.axes.items()}},
            "fixed": {
                c: self.spec.params.get(c, k.default)
                for method in self.methods
                for c, k in method.coefficients.items()
                if c not in self.spec.axes
            }
            | dict(self.spec.params),
        }


def decoded(axes: tuple[Axis, ...], g: Genome) -> dict[str, float | str]:
    """Axis name -> value at `g`. ValueError for a vector of the wrong length or off the cube."""
    if g.shape != (len(axes),) or not np.all((g >= 0) & (g <= 1)):
        raise ValueError(f"expected {len(axes)} genes in [0, 1], got shape {g.shape}")
    return {axis.name: axis.value(float(u)) for axis, u in zip(axes, g, strict=True)}


def _experts(spec: SpaceSpec, m: Manifest) -> tuple[str, ...]:
    """The experts that a space merges, sorted."""
    experts = m.experts if spec.experts is None else tuple(sorted(set(spec.experts)))
    for name in experts:
        if name not in m.experts:
            raise UserError(f"search space: experts: unknown expert {name!r}{nearest(name, m.experts)}")
    if not experts and not m.layouts:  # models of other depth are for routes, which need no axes of a merge
        raise UserError("search space: experts: expected at least one")
    for method in spec.methods:
        if method.combine == "spherical":
            deltas = method.adds_to_base({n: v for n, v in spec.params.items() if n in method.options})
            if len(experts) > 2 or (deltas and len(experts) < 2):
                raise UserError(
                    f"search space: {method.name} is between two models"
                    + (", here two experts" if deltas else ", two experts or one and the base")
                    + f"; this space has {', '.join(experts)}: name two with `experts: [...]`, or take another method"
                )
    return experts


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
            if g.match != "all" and (reason := g.match.beyond(m)) is not None:
                raise UserError(f"search space: group {g.name!r}: {reason}")
            names = tuple(n for n, b in blocks.items() if g.match == "all" or g.match.covers(b))
            names = tuple(n for n in names if n not in owner)
            if not names or g.name in out:
                raise UserError(
                    f"search space: group {g.name!r} is a repeat or matches no block left by earlier groups"
                )
            owner.update(dict.fromkeys(names, g.name))
            out[g.name] = names
        return out
    if isinstance(spec.groups, Important):
        raise UserError(
            "search space: important layers are known by weights or gradients; `prepare` makes them named groups"
        )
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
