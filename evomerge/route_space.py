"""Layer routes as search spaces: which layers tokens go through, in which order, and how the stream is scaled between.

The data-flow space of Evolutionary Model Merge (arXiv 2403.13187, section 3.2) and plainer ones. Four encodings:
  indicator  the paper's: all layers of model A in order, then of B and so on, the array repeated; a gene a slot, which
             is in the path where its gene is above 0.5;
  slices     a list of at most k runs of layers (model, start, end), as people write them by hand;
  repeats    how often each layer of one model is gone through, from 0;
  scales     the natural path of one model with a scale and gains for each layer.
The paper pins the ends: A's embedding, final norm and head, and A's first and last layer begin and end every path,
where they do not stand there already. So no path is empty. Its table of scales W_ij is `scales: pairs`; by default a
slot has one scale instead, which acts only on hops that are not to the next layer of the same model, since the others
were trained so. Inactive scales are 1 in the recipe, so that equal models have equal ids.

`merged` is the model that merge rules of the same point build (a joint space), or an earlier stage's recipe (`around`).
It counts as one model with the base where natural order is concerned: its layers without rules are the base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np

from evomerge.errors import UserError, nearest
from evomerge.manifest import Manifest
from evomerge.merge.methods import METHODS, Method
from evomerge.proposal import Genome, frozen_genome
from evomerge.recipe import MAX_HOPS, MERGED, Dtype, Hop, Recipe, Route, Rule, taken_whole
from evomerge.space import Axis, AxisSpec, RouteSpec, RuleSpace, SearchSpace, SpaceSpec, decoded

EXPERTS = "experts"
"""What a list of models calls all experts that it does not name."""
BOUNDS = AxisSpec(low=0.5, high=2.0, log=True)
"""Of scales and gains that the spec gives none for. Ours; the paper's start is 1, its range is not given."""
THRESHOLD = 0.5
SIGMA = 1 / 6
"""CMA-ES's default step: at first the indicators are two of them from the threshold, so that A is the likely path."""
REPEATS = AxisSpec(low=0, high=2)
MOST_AXES = 10_000

Values = Mapping[str, float | str]


class Step(NamedTuple):
    """A layer of a model, and the gene that its scale and gains go by; None where it has none."""

    model: str
    layer: int
    gene: str | None


class Place(NamedTuple):
    """A hop of a recipe: the models of the space that it may come from, and the layer."""

    models: frozenset[str]
    layer: int


class RouteSpace:
    """Axes of the merge that builds `merged`, where there is one, then those of the encoding, then scales and gains."""

    def __init__(self, spec: SpaceSpec, manifest: Manifest, dtype: Dtype) -> None:
        """Bind a spec to a pool. Raises UserError for unknown models, a merge that no route goes through, too short
        paths and too many axes."""
        assert spec.route is not None
        self.spec, self.dtype = spec, dtype
        self._route, self._manifest = spec.route, manifest
        merges = spec.merges
        self._rules = None if merges is None else RuleSpace(merges, manifest, dtype)
        if self._rules is not None and not manifest.experts:
            raise UserError(
                f"search space: route: no expert has as many layers as the base, so {', '.join(self._rules.spec.axes)} "
                "merges nothing; leave the merge axes out"
            )
        self._merged = Recipe.model_construct(base=manifest.base, dtype=dtype, sources={}).assembled({}, manifest)
        self.methods: tuple[Method, ...] = (METHODS["linear"],) if self._rules is None else self._rules.methods
        self.models = _models(self._route, manifest, MERGED if self._rules is not None else manifest.base)
        if self._rules is not None and MERGED not in self.models:
            raise UserError(
                f"search space: route.models: {', '.join(self._rules.spec.axes)} build `{MERGED}`, which no route goes "
                f"through; name {MERGED} too, or drop these axes"
            )
        self.max_hops = self._most_hops()
        self._encoding = ENCODINGS[self._route.encoding](self.models, spec, self.max_hops)
        merging = () if self._rules is None else self._rules.axes
        coefficients = tuple(islice(self._coefficients(), MOST_AXES))
        if len(merging) + len(self._encoding.axes) + len(coefficients) > MOST_AXES:
            raise UserError(
                f"search space: route: more than {MOST_AXES:,} axes; take fewer models or repetitions"
                + (", or scales: slots" if self._route.scales == "pairs" else "")
            )
        self.axes: tuple[Axis, ...] = (*merging, *self._encoding.axes, *(self._axis(*c) for c in coefficients))

    def _most_hops(self) -> int:
        first, layers = next(iter(self.models.items()))
        if self._route.encoding == "scales" and layers <= MAX_HOPS:
            return layers
        if layers > MAX_HOPS:
            raise UserError(f"search space: route: a path has at most {MAX_HOPS} hops, but {first} has {layers} layers")
        most = self._route.max_hops
        if most is None:
            return min(2 * max(self.models.values()), MAX_HOPS)
        if most < layers:
            raise UserError(f"search space: route.max_hops: {first} alone has {layers} layers, but max_hops is {most}")
        return most

    def _coefficients(self) -> Iterator[tuple[str, str]]:
        """(coefficient, axis) of every scale and gain."""
        given = [n for n in ("scale", "attn_gain", "mlp_gain") if n in self.spec.axes]
        if self._route.encoding == "scales":
            names = given or ["scale", "attn_gain", "mlp_gain"]
        else:
            names = ["scale"] * (self._route.scales == "slots") + [n for n in given if n != "scale"]
        for gene in self._encoding.genes:
            for name in names:
                yield name, f"{gene}.{name}"
        if self._route.scales == "pairs":
            layers = list(dict.fromkeys((self._family(m), i) for m, n in self.models.items() for i in range(n)))
            for a in layers:
                for b in layers:
                    yield "scale", _pair(a, b)

    def _axis(self, coefficient: str, name: str) -> Axis:
        bounds = self.spec.axes.get(coefficient, BOUNDS)
        default = bounds.default if isinstance(bounds.default, float) else 1.0
        return Axis(name, "float", bounds.low, bounds.high, log=bounds.log, default=default)

    def _family(self, model: str) -> str:
        return self._manifest.base if model == MERGED else model

    @property
    def waits_for_merge(self) -> bool:
        """Whether paths go through a `merged` model that only an earlier stage can build."""
        return self._rules is None and MERGED in self.models

    def around(self, r: Recipe) -> SearchSpace:
        """A copy in which `merged` is what the rules or segments of `r` build; every decoded recipe carries them.

        The space itself where no route goes through `merged`, and where it has axes of its own for it.
        """
        if not self.waits_for_merge:
            return self
        space = RouteSpace(self.spec, self._manifest, self.dtype)
        whole = r.model_copy(update={"route": None, "dtype": self.dtype})
        space._merged = whole.canonical(self._manifest)
        return space

    # -- points -----------------------------------------------------------------------------------------------

    @property
    def default(self) -> Genome:
        """The point where every axis has its default: the first model as it is."""
        return self._genome({})

    def _genome(self, values: Values) -> Genome:
        genes = [a.unit(values.get(a.name, a.default)) for a in self.axes]
        return frozen_genome(np.clip(np.array(genes), 0.0, 1.0))

    def probes(self) -> list[Genome]:
        """Where to look first: the first model as it is, also with the probes of its merge; then all layers of each
        other model between the ends."""
        merges = [{}] if self._rules is None else [decoded(self._rules.axes, g) for g in self._rules.probes()]
        out = [self._genome(values) for values in merges]
        (first, depth), *others = self.models.items()
        for model, layers in others:
            between = [(model, i) for i in range(layers)]
            path = [Place(frozenset([n]), i) for n, i in ((first, 0), *between, (first, depth - 1))]
            if (values := next(self._encoding.values(path), None)) is not None:
                out.append(self._genome(values))
        return out

    def decode(self, g: Genome, m: Manifest) -> Recipe:
        """The canonical recipe at `g`. ValueError only for a vector of the wrong length or off the cube."""
        values = decoded(self.axes, g)
        first = self._encoding.first
        merged = self._merged
        if self._rules is not None:
            merged = self._rules.decode(g[: len(self._rules.axes)], m)
        # Segments know no blocks: whose ends there are cannot be told apart from the mix.
        end = MERGED if merged.segments is not None else first
        hops = self._hops(self._encoding.steps(values), values)
        route = Route.model_construct(embed=end, final_norm=end, head=end, hops=hops)
        return merged.model_copy(update={"route": route}).canonical(m)

    def _hops(self, steps: Sequence[Step], values: Values) -> tuple[Hop, ...]:
        hops = []
        for before, step in zip([None, *steps], steps, strict=False):
            numbers: dict[str, Any] = {c: values[a] for c, a in self._acting(before, step).items() if a in values}
            hops.append(Hop.model_construct(from_=step.model, layer=step.layer, **{**_PLAIN, **numbers}))
        return tuple(hops)

    def _acting(self, before: Step | None, step: Step) -> dict[str, str]:
        """coefficient -> the axis that it has at a step, where one acts there."""
        out = {c: f"{step.gene}.{c}" for c in _PLAIN if step.gene is not None}
        if self._route.encoding == "scales":
            return out
        out.pop("scale", None)
        if before is None:
            return out
        a, b = ((self._family(s.model), s.layer) for s in (before, step))
        if self._route.scales == "pairs":
            out["scale"] = _pair(a, b)
        elif (a[0], a[1] + 1) != b and step.gene is not None:
            out["scale"] = f"{step.gene}.scale"
        return out

    # -- back -------------------------------------------------------------------------------------------------

    def encode(self, r: Recipe, m: Manifest) -> Genome:
        """A point that decodes to the canonical form of `r`. Raises ValueError where there is none."""
        canonical = r.canonical(m)
        for merging, merged in self._mergers(canonical, m):
            if (path := self._places(canonical, merged, m)) is None:
                continue
            for values in self._encoding.values(path):
                try:
                    g = self._genome({**merging, **values, **self._scales(canonical, values)})
                except ValueError:
                    continue
                if self.decode(g, m).id == canonical.id:
                    return g
        raise ValueError("this space cannot express the recipe: no path of it is the recipe's")

    def _mergers(self, r: Recipe, m: Manifest) -> Iterator[tuple[Values, Recipe]]:
        """What may build `merged` in a recipe: values of the merge axes, and the recipe of it.

        A joint space's rules are only known for the blocks that the path uses. Where a merge may also be a hop through
        a source as it is, both are tried.
        """
        if self._rules is None:
            yield {}, self._merged
            return
        if r.segments is not None:
            return
        for guess in (True, False):
            sure, unsure = self._known(r, m)
            blocks: dict[str, Rule] = {}
            for names in self._rules.groups.values():
                found = [sure[n] for n in names if n in sure] or [unsure[n] for n in names if guess]
                rule = next((f for f in found if f is not None), None)
                blocks |= {n: rule for n in names if rule is not None}
            used = {rule.method for rule in blocks.values()}
            for method in self._rules.methods:
                if used <= {method.name}:
                    try:
                        g = self._rules.read(method, blocks)
                    except ValueError:
                        continue
                    yield decoded(self._rules.axes, g), self._rules.decode(g, m)

    def _known(self, r: Recipe, m: Manifest) -> tuple[dict[str, Rule | None], dict[str, Rule | None]]:
        """Block -> its rule in a recipe: of those blocks that are sure to be of `merged`, and of the others."""
        rules, last = r.blocks, m.layers[m.base] - 1
        pinned = self._encoding.first == MERGED
        sure: dict[str, Rule | None] = {}
        unsure: dict[str, Rule | None] = {}
        hops = None if r.route is None else {h.layer for h in r.route.hops if h.from_ == MERGED}
        for block in m.blocks.values():
            rule = rules.get(block.name)
            if block.layer is None:
                certain = pinned
            elif hops is None:
                certain = (pinned and block.layer in (0, last)) or (rule is not None and taken_whole(rule) is None)
            else:
                certain = block.layer in hops
            (sure if certain else unsure)[block.name] = rule
        return sure, unsure

    def _places(self, r: Recipe, merged: Recipe, m: Manifest) -> list[Place] | None:
        """The path of a canonical recipe; None where a hop is of no model of this space."""
        ruled = set(range(m.layers[m.base]))
        if merged.segments is None:
            ruled = {b.layer for n, b in m.blocks.items() if n in merged.blocks and b.layer is not None}
        path = []
        if r.route is not None:
            for hop in r.route.hops:
                also = {MERGED} if hop.from_ == m.base and hop.layer not in ruled else set()
                path.append((({hop.from_} | also), hop.layer))
        elif r.segments is not None:
            path = [({MERGED}, i) for i in range(m.layers[m.base])]
        else:
            for i in range(m.layers[m.base]):
                names = [n for n, b in m.blocks.items() if b.layer == i]
                mine = [r.blocks.get(n) for n in names]
                sources = {m.base if rule is None else taken_whole(rule) for rule in mine}
                found = {s for s in sources if s is not None} if len(sources) == 1 else set()
                if merged.segments is None and mine == [merged.blocks.get(n) for n in names]:
                    found.add(MERGED)
                path.append((found, i))
        places = [Place(frozenset(found & set(self.models)), layer) for found, layer in path]
        return places if all(p.models for p in places) else None

    def _scales(self, r: Recipe, values: Values) -> dict[str, float | str]:
        """What the axes of scales and gains say where a recipe's path has the genes that `values` make it of."""
        if r.route is None:
            return {a.name: 1.0 for a in self.axes if a.name.rpartition(".")[2] in _PLAIN}
        out: dict[str, float | str] = {}
        whole = {a.name: a.default for a in self.axes} | dict(values)
        steps = self._encoding.steps(whole)
        for before, step, hop in zip([None, *steps], steps, r.route.hops, strict=False):
            out |= {a: getattr(hop, c) for c, a in self._acting(before, step).items()}
        return out

    @property
    def _longest(self) -> int:
        """Hops of the longest path: no more than there are slots, and the ends."""
        if self._route.encoding != "indicator":
            return self.max_hops
        return min(self.max_hops, self._encoding.slots + 2)

    def describe(self) -> dict[str, Any]:
        """What `check` prints."""
        rules = None if self._rules is None else self._rules.describe()
        own = {a.name.rpartition(".")[2]: a for a in self.axes if a.name.startswith("route.")}
        return {
            "method": "routes" if rules is None else f"routes, {rules['method']}",
            "groups": 0 if rules is None else rules["groups"],
            "axes": len(self.axes),
            "names": [a.name for a in self.axes],
            "bounds": {
                **({} if rules is None else rules["bounds"]),
                **{n: list(a.choices) if a.kind == "categorical" else [a.low, a.high] for n, a in own.items()},
            },
            "fixed": {} if rules is None else rules["fixed"],
            "route": {
                "encoding": self._route.encoding,
                "models": dict(self.models),
                "slots": self._encoding.slots,
                "hops": [self._encoding.least_hops, self._longest],
                "scales": self._route.scales if "scale" in own else "none",
            },
        }


_PLAIN = {"scale": 1.0, "attn_gain": 1.0, "mlp_gain": 1.0}


def _pair(a: tuple[str, int], b: tuple[str, int]) -> str:
    return f"route.{a[0]}.{a[1]}>{b[0]}.{b[1]}.scale"


def _models(route: RouteSpec, m: Manifest, first: str) -> dict[str, int]:
    """Model -> its number of layers, the first being A. Raises UserError for unknown ones."""
    experts = [n for n in sorted(m.hashes) if n != m.base]
    names = route.models or ((first,) if route.one_model else (first, EXPERTS))
    out: list[str] = []
    for name in names:
        if name == EXPERTS:
            out += [n for n in experts if n not in names]
        elif name in (MERGED, *m.hashes):
            out.append(name)
        else:
            known = (MERGED, EXPERTS, *m.hashes)
            raise UserError(f"search space: route.models: unknown model {name!r}{nearest(name, known)}")
    if not out:
        raise UserError("search space: route.models: there are no experts; name a model, or add one")
    return {n: m.layers[m.base if n == MERGED else n] for n in out}


# -- encodings ------------------------------------------------------------------------------------------------


class _Encoding(Protocol):
    """How paths are written as genes."""

    axes: tuple[Axis, ...]
    genes: tuple[str, ...]
    """What has a scale of its own, each the beginning of an axis' name."""
    slots: int
    least_hops: int
    first: str
    """Model A."""

    def __init__(self, models: Mapping[str, int], spec: SpaceSpec, max_hops: int) -> None: ...

    def steps(self, values: Values) -> list[Step]:
        """The path at a point, from A's first layer to its last."""
        ...

    def values(self, path: Sequence[Place]) -> Iterator[dict[str, float | str]]:
        """Values of `axes` that may give a path; whether they do, decoding tells."""
        ...


END = "route.end"
"""The gene of A's last layer where no slot of the path is it."""


class _Pinned:
    """What encodings with free ends have in common."""

    def __init__(self, models: Mapping[str, int], max_hops: int) -> None:
        self.first = next(iter(models))
        self.models = dict(models)
        self.last = models[self.first] - 1
        self.max_hops = max_hops
        self.least_hops = min(self.last + 1, 2)

    def pinned(self, steps: list[Step], end: str = END) -> list[Step]:
        """The path with A's first and last layer as its ends, and no longer than it may be."""
        if not steps or steps[0][:2] != (self.first, 0):
            steps = [Step(self.first, 0, None), *steps]
        closed = steps[-1][:2] == (self.first, self.last)
        if len(steps) + (not closed) > self.max_hops:
            steps = steps[: self.max_hops - 1]
            closed = bool(steps) and steps[-1][:2] == (self.first, self.last)
        return steps if closed else [*steps, Step(self.first, self.last, end)]

    def bodies(self, path: Sequence[Place]) -> Iterator[list[Place]]:
        """What of a path has to be written out where its ends are, or are not, the pinned ones."""
        a = frozenset([self.first])
        for written_start, written_end in ((True, True), (True, False), (False, True), (False, False)):
            body = list(path[not written_start : len(path) - (not written_end)])
            for at, written, layer in ((0, written_start, 0), (-1, written_end, self.last)):
                if body and written:
                    body[at] = Place(body[at].models & a, body[at].layer)
                elif body and body[at].layer == layer:  # else it would be the end itself
                    body[at] = Place(body[at].models - a, layer)
            if all(place.models for place in body):
                yield body


class _Indicator(_Pinned):
    """The paper's array: a slot is in the path where its gene is above the threshold."""

    def __init__(self, models: Mapping[str, int], spec: SpaceSpec, max_hops: int) -> None:
        super().__init__(models, max_hops)
        assert spec.route is not None
        self._slots = [
            Step(model, i, f"route.{r}.{model}.{i}")
            for r in range(1, spec.route.repetitions + 1)
            for model, layers in models.items()
            for i in range(layers)
        ]
        self.slots = len(self._slots)
        self.genes = (*(str(s.gene) for s in self._slots), END)
        self.axes = tuple(
            Axis(f"{s.gene}.on", default=_ON if n <= self.last else _OFF) for n, s in enumerate(self._slots)
        )

    def steps(self, values: Values) -> list[Step]:
        return self.pinned([s for s in self._slots if float(values[f"{s.gene}.on"]) > THRESHOLD])

    def values(self, path: Sequence[Place]) -> Iterator[dict[str, float | str]]:
        for body in self.bodies(path):
            todo = iter(body)
            wanted = next(todo, None)
            out: dict[str, float | str] = {}
            for slot in self._slots:  # the earliest slot that fits leaves most to choose from
                on = wanted is not None and slot.layer == wanted.layer and slot.model in wanted.models
                out[f"{slot.gene}.on"] = _ON if on else _OFF
                if on:
                    wanted = next(todo, None)
            if wanted is None:
                yield out


_ON = round(THRESHOLD + 2 * SIGMA, 6)
_OFF = round(THRESHOLD - 2 * SIGMA, 6)


class _Slices(_Pinned):
    """Up to k runs of layers start, ..., end - 1 of a model; empty where end is not above start."""

    def __init__(self, models: Mapping[str, int], spec: SpaceSpec, max_hops: int) -> None:
        super().__init__(models, max_hops)
        assert spec.route is not None
        self.slots = spec.route.slices
        self._names = [f"route.slice{k}" for k in range(1, self.slots + 1)]
        self.genes = (*self._names, END)
        names, deepest = tuple(models), max(models.values())
        axes = []
        for k, name in enumerate(self._names):
            if len(names) > 1:
                axes.append(Axis(f"{name}.model", "categorical", choices=names, default=self.first))
            axes.append(Axis(f"{name}.start", "int", 0, deepest - 1, default=0))
            axes.append(Axis(f"{name}.end", "int", 0, deepest, default=0 if k else self.last + 1))
        self.axes = tuple(axes)

    def steps(self, values: Values) -> list[Step]:
        steps = []
        for name in self._names:
            model = str(values.get(f"{name}.model", self.first))
            end = min(int(values[f"{name}.end"]), self.models[model])
            steps += [Step(model, i, name) for i in range(int(values[f"{name}.start"]), end)]
        return self.pinned(steps)

    def values(self, path: Sequence[Place]) -> Iterator[dict[str, float | str]]:
        for body in self.bodies(path):
            runs: list[tuple[frozenset[str], int, int]] = []
            for models, layer in body:  # the longest runs are the fewest
                if runs and runs[-1][2] == layer and (common := runs[-1][0] & models):
                    runs[-1] = (common, runs[-1][1], layer + 1)
                else:
                    runs.append((models, layer, layer + 1))
            if len(runs) > self.slots:
                continue
            out: dict[str, float | str] = {}
            for k, name in enumerate(self._names):
                names, start, end = runs[k] if k < len(runs) else (frozenset([self.first]), 0, 0)
                out |= {f"{name}.start": start, f"{name}.end": end}
                if len(self.models) > 1:
                    out[f"{name}.model"] = next(n for n in self.models if n in names)
            yield out


class _Repeats(_Pinned):
    """How often each layer of one model is gone through before the next; its ends at least once."""

    def __init__(self, models: Mapping[str, int], spec: SpaceSpec, max_hops: int) -> None:
        super().__init__(models, max_hops)
        bounds = spec.axes.get("repeats", REPEATS)
        self.genes = tuple(f"route.{i}" for i in range(self.last + 1))
        self.slots = len(self.genes)
        self.least_hops = max(self.least_hops, self.slots * int(bounds.low))
        default = bounds.default if isinstance(bounds.default, float) else 1.0
        self.axes = tuple(Axis(f"{g}.repeats", "int", bounds.low, bounds.high, default=default) for g in self.genes)

    def steps(self, values: Values) -> list[Step]:
        steps = []
        for i, gene in enumerate(self.genes):
            count = max(int(values[f"{gene}.repeats"]), int(i in (0, self.last)))
            steps += [Step(self.first, i, gene)] * count
        return self.pinned(steps, self.genes[-1])

    def values(self, path: Sequence[Place]) -> Iterator[dict[str, float | str]]:
        if all(self.first in place.models for place in path):
            counts = [sum(place.layer == i for place in path) for i in range(len(self.genes))]
            # Layers that max_hops cut off may have been wanted.
            yield {a.name: max(float(n), a.low) for a, n in zip(self.axes, counts, strict=True)}


class _Scales:
    """The natural path of one model."""

    axes: tuple[Axis, ...] = ()

    def __init__(self, models: Mapping[str, int], spec: SpaceSpec, max_hops: int) -> None:
        [(self.first, layers)] = models.items()
        self.genes = tuple(f"route.{i}" for i in range(layers))
        self.slots = self.least_hops = layers

    def steps(self, values: Values) -> list[Step]:
        return [Step(self.first, i, gene) for i, gene in enumerate(self.genes)]

    def values(self, path: Sequence[Place]) -> Iterator[dict[str, float | str]]:
        if [p.layer for p in path] == list(range(self.slots)) and all(self.first in p.models for p in path):
            yield {}


ENCODINGS: Mapping[str, type[_Encoding]] = {
    "indicator": _Indicator,
    "slices": _Slices,
    "repeats": _Repeats,
    "scales": _Scales,
}
