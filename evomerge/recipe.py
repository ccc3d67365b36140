"""Recipe: what to build. Pure data; equal ids imply equal models.

A recipe is written by people with rules (`match: {layers: [0, 15], module: attention}`) and hashed in its
canonical form: one rule a block, defaults filled in, coefficients rounded to 1e-6, inert genes removed.

Inert forms that the canonical form removes (each leaves the built weights the same to the last bit):
  1. a source of weight 0, in every method of `merge/methods.py` (in `slerp`: t is 0 or 1, one model remains), or,
     in `spectral`, with all bands 0;
  2. a whole rule without remaining sources, or with lambda 0: the block is the base's;
  3. a `linear` rule whose only source is the base, normalised or of weight 1, and a `slerp` rule whose only source
     is the base: the block is the base's;
  4. the weight of the only source of a `slerp` rule: it becomes 1;
  5. `mask_seed` and `rescale` of a DARE rule whose densities are all 1: they become the defaults;
  6. sources that no rule mentions.
Of `route`, which then leaves rules for the blocks that it uses only:
  7. whose embedding, final norm and head: they become rules, and `merged`;
  8. a hop through a merged layer without rules: it is the base's;
  9. a path through layers 0, 1, ... to the last without scales and gains: a merge, whatever its sources.
Of `segments`: cuts between neighbours with equal weights, and sources of weight 0 everywhere; a cut in an alignment
gap moves behind it; one source of weight 1 alone becomes its `linear` rule.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evomerge.canonical import digest
from evomerge.errors import UserError, nearest
from evomerge.hub import named
from evomerge.manifest import Block, Manifest
from evomerge.merge.methods import METHODS, Method, Scalar
from evomerge.schema import validated
from evomerge.yamlio import dump_yaml, load_yaml, parse_yaml

DECIMALS = 6
Dtype = Literal["float32", "bfloat16", "float16"]
Module = Literal["embed", "attention", "mlp", "norm", "final_norm", "head"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Source(_Part):
    """One ingredient: a model folder, an adapter, or the result of an earlier stage."""

    sha256: str | None = Field(None, description="content hash; checked where given")
    kind: Literal["model", "adapter"] = "model"
    path: str | None = Field(None, description="folder, or hub id org/name@revision; no part of the recipe's id")
    recipe: Recipe | None = Field(None, description="an earlier stage's winner, inlined")


class Match(_Part):
    """Which blocks a rule is for; fields left out match everything."""

    block: str | None = Field(None, description="one block by name, for example layers.3.attention")
    layers: tuple[int, int] | None = Field(None, description="first and last layer, both included")
    module: Module | tuple[Module, ...] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Match:
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[1]:
            raise ValueError(f"layers: `0 <= first <= last` must hold, but got {list(self.layers)}")
        if self.block is not None and (self.layers is not None or self.module is not None):
            raise ValueError("block names one block already; leave out layers and module")
        return self

    def covers(self, block: Block) -> bool:
        """True where the rule is for this block."""
        if self.block is not None:
            return self.block == block.name
        if self.layers is not None and (block.layer is None or not self.layers[0] <= block.layer <= self.layers[1]):
            return False
        modules = (self.module,) if isinstance(self.module, str) else self.module
        return modules is None or block.module in modules

    def beyond(self, manifest: Manifest) -> str | None:
        """What is wrong where the layers go past the model's last one, else None."""
        layers = manifest.layers[manifest.base]
        if self.layers is None or self.layers[1] < layers:
            return None
        return f"layers {list(self.layers)} go past the last one: the model has {layers} layers, 0 to {layers - 1}"


class Rule(_Part):
    """How the blocks that match are merged."""

    match: Match | Literal["all"] = "all"
    method: str
    params: Mapping[str, Scalar] = Field(default_factory=dict)
    sources: Mapping[str, Mapping[str, float]]

    @model_validator(mode="after")
    def _known(self) -> Rule:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}{nearest(self.method, METHODS)}")
        method = METHODS[self.method]
        for name, value in self.params.items():
            if name not in method.per_block and name not in method.options:
                raise ValueError(
                    f"{self.method} has no parameter {name!r}{nearest(name, (*method.per_block, *method.options))}"
                )
            check_value(method, name, value)
        for source, coefs in self.sources.items():
            for name, value in coefs.items():
                if name not in method.per_source:
                    raise ValueError(
                        f"source {source!r}: {self.method} has no {name!r} per source{nearest(name, method.per_source)}"
                    )
                check_value(method, name, value)
        return self


def check_value(method: Method, name: str, value: Scalar) -> None:
    """Raises ValueError where a method's coefficient or option cannot have this value."""
    if name in method.options:
        allowed = method.options[name][1]
        if not any(type(value) is type(a) and value == a for a in allowed):
            raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")
        return
    c = method.coefficients[name]
    if c.integer and type(value) is not int:
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if isinstance(value, bool | str) or not c.low <= value <= c.high:
        raise ValueError(f"{name}: `{c.low:g} <= {name} <= {c.high:g}` must hold, but got {value!r}")


MERGED = "merged"
"""What routes call the model that a recipe's rules or segments build."""
MAX_HOPS = 1000


class Hop(_Part):
    """One step of a layer route: layer `layer` (from 0) of a source, or of the merged model.

    `scale` multiplies the residual stream that enters it; gains multiply what its two branches add.
    """

    from_: str = Field(alias="from")
    layer: int = Field(ge=0)
    scale: float = Field(1.0, ge=1e-3, le=1e3)
    attn_gain: float = Field(1.0, ge=-1e3, le=1e3)
    mlp_gain: float = Field(1.0, ge=-1e3, le=1e3)

    @property
    def plain(self) -> bool:
        """Whether the layer is as its source has it."""
        return (self.scale, self.attn_gain, self.mlp_gain) == (1.0, 1.0, 1.0)


class Route(_Part):
    """The path of tokens through layers of several sources, and whose embedding, final norm and head it has."""

    embed: str = MERGED
    final_norm: str = MERGED
    head: str = MERGED
    hops: tuple[Hop, ...] = Field(min_length=1, max_length=MAX_HOPS)

    def gains(self) -> list[tuple[float, float]]:
        """What each hop's branch outputs are multiplied by, (attention, mlp), so that nothing else need be.

        A branch of a pre-norm block does not depend on the (positive) scale of the stream, nor does the final norm.
        So a scale w at the input of hop j is the same as dividing what j and all later hops add by w.
        """
        out, accumulated = [], 1.0
        for hop in self.hops:
            # Beyond these float32 has no numbers any more.
            accumulated = min(max(accumulated * hop.scale, 1e-30), 1e30)
            out.append((hop.attn_gain / accumulated, hop.mlp_gain / accumulated))
        return out


class Segments(_Part):
    """A piecewise constant linear mix over the flat layout (natural niches); cuts may fall inside tensors.

    Elements from `cuts[i]` to the next cut are `sum_k weights[k][i] theta_k`, the base being one of the sources.
    """

    layout: str = Field(description="the manifest's layout: what a flat position means")
    cuts: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, description="rising flat positions from 0")
    weights: Mapping[str, tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...]] = Field(min_length=1)

    @model_validator(mode="after")
    def _aligned(self) -> Segments:
        if self.cuts[0] != 0 or any(a >= b for a, b in pairwise(self.cuts)):
            raise ValueError("cuts must begin with 0 and rise")
        for name, column in self.weights.items():
            if len(column) != len(self.cuts):
                raise ValueError(f"source {name!r} has {len(column)} weights for {len(self.cuts)} segments")
        return self

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int, dict[str, float]]]:
        """(start, stop, source -> weight other than 0) of every part of the segments in this stretch of the layout."""
        first = bisect.bisect_right(self.cuts, start) - 1
        last = bisect.bisect_left(self.cuts, stop)
        edges = [start, *self.cuts[first + 1 : last], stop]
        for i, (a, b) in enumerate(pairwise(edges), first):
            yield a, b, {n: column[i] for n, column in self.weights.items() if column[i] != 0.0}


class Ensemble(_Part):
    """A mix of output distributions; exported as an ensemble, never as weights."""

    rule: Literal["logprob_mean", "prob_mean"]
    missing_mass: Literal["renormalise", "floor"] = "renormalise"
    members: Mapping[str, float] = Field(min_length=1)


class FactorMix(_Part):
    """Adapter factors mixed one by one, as some servers do it; never exported as a weight merge."""

    sources: Mapping[str, Mapping[str, float]] = Field(min_length=1)


class Tokenizer(_Part):
    """Whose tokenizer the merged model has."""

    policy: Literal["base", "union"] = "base"


class Recipe(_Part):
    """What to build. See the module docstring for the canonical form."""

    recipe: Literal[1] = 1
    base: str = "base"
    dtype: Dtype = Field("float32", description="of the built weights; part of the id")
    sources: Annotated[Mapping[str, Source], Field(default_factory=dict)]
    tokenizer: Tokenizer = Tokenizer()
    merge: tuple[Rule, ...] | None = Field(None, description="first match wins; unmatched blocks are the base's")
    segments: Segments | None = None
    route: Route | None = None
    ensemble: Ensemble | None = None
    factor_mix: FactorMix | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if sum(x is not None for x in (self.merge, self.segments, self.ensemble, self.factor_mix)) > 1:
            raise ValueError("merge, segments, ensemble and factor_mix exclude one another")
        if self.route is not None and (self.ensemble or self.factor_mix):
            raise ValueError("a route goes with merge or segments, not with ensemble or factor_mix")
        if self.sources and (self.merge is not None or self.segments is not None or self.route is not None):
            mixed: list[Iterable[str]] = [r.sources for r in self.merge or ()]
            mixed += [self.segments.weights] if self.segments is not None else []
            mixed += [_sources_of(self.route)] if self.route is not None else []
            for name in (n for sources in mixed for n in sources):
                if name not in self.sources:
                    raise ValueError(f"unknown source {name!r}{nearest(name, self.sources)}")
            if self.base not in self.sources:
                raise ValueError(f"the base {self.base!r} is not among the sources{nearest(self.base, self.sources)}")
        return self

    # -- reading and writing ----------------------------------------------------------------------------

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> Recipe:
        """Parse a recipe. Raises UserError in one line."""
        return validated(cls, parse_yaml(text, where), where)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe file; `path`s of sources are hub ids or relative to it. Raises UserError."""
        recipe = validated(cls, load_yaml(path), str(path))
        sources = {
            n: s.model_copy(update={"path": named(path.parent, s.path)}) if s.path else s
            for n, s in recipe.sources.items()
        }
        return recipe.model_copy(update={"sources": sources})

    def to_json(self) -> dict[str, Any]:
        """Plain data; fields at their defaults are left out."""
        return {"recipe": 1, **self.model_dump(mode="json", by_alias=True, exclude_defaults=True)}

    def to_yaml(self) -> str:
        """YAML that reads back to an equal recipe."""
        return dump_yaml(self.to_json())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Recipe:
        """A changed copy; what is remembered of the original (`blocks`, `id`, `path`) does not go with it."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("blocks", "id", "path"):
            copy.__dict__.pop(name, None)
        return copy

    # -- canonical form ---------------------------------------------------------------------------------

    def canonical(self, manifest: Manifest, where: str = "") -> Recipe:
        """One rule a block, sources with the manifest's hashes, nothing inert (module docstring).

        Raises UserError for sources, hashes or blocks that the manifest does not have; `where` names the recipe's
        file in it. Idempotent.
        """
        try:
            return self._canonical(manifest)
        except UserError as e:
            raise UserError(f"{where}: {e}" if where else str(e)) from None

    def _canonical(self, manifest: Manifest) -> Recipe:
        if (reason := self.unsupported()) is not None:
            raise UserError(reason)
        if self.base != manifest.base:
            raise UserError(f"the recipe's base is {self.base!r}, the pool's is {manifest.base!r}")
        for name, source in self.sources.items():
            if name not in manifest.hashes:
                raise UserError(f"the recipe needs a source {name!r}{nearest(name, manifest.hashes)}")
            if source.sha256 is not None and source.sha256 != manifest.hashes[name]:
                raise UserError(
                    f"source {name!r} should have sha256 {source.sha256[:12]}..., "
                    f"but the pool's has {manifest.hashes[name][:12]}...: not the same weights"
                )
        if self.route is not None:
            return self._with_route(self.route, manifest)
        if self.segments is not None:
            return self._with_segments(self.segments, manifest)
        for i, rule in enumerate(self.merge or ()):
            if rule.match != "all" and (reason := rule.match.beyond(manifest)) is not None:
                raise UserError(f"merge rule {i + 1}: {reason}")
            if rule.match != "all" and not any(rule.match.covers(b) for b in manifest.blocks.values()):
                # Tied models have no head of their own; a rule for it alone is inert, not wrong.
                if rule.match.module == "head" or rule.match.block == "head":
                    continue
                raise UserError(
                    f"merge rule {i + 1} matches no block of this model: {rule.match.model_dump(exclude_none=True)}"
                )
        chosen = {}
        for block in manifest.blocks.values():
            for rule in self.merge or ():
                if rule.match == "all" or rule.match.covers(block):
                    chosen[block.name] = rule
                    break
        return self.assembled(chosen, manifest)

    def _with_route(self, route: Route, manifest: Manifest) -> Recipe:
        """The canonical recipe of a route, or of the merge that it amounts to."""
        for i, hop in enumerate(route.hops, 1):
            source = self.base if hop.from_ == MERGED else hop.from_
            if source not in manifest.layers:
                raise UserError(
                    f"route, hop {i}: unknown source {source!r}{nearest(source, (MERGED, *manifest.layers))}"
                )
            if hop.layer >= (layers := manifest.layers[source]):
                raise UserError(f"route, hop {i}: {hop.from_!r} has layers 0 to {layers - 1}, not {hop.layer}")
        merged = self.model_copy(update={"route": None})._canonical(manifest)
        ends = {"embed": route.embed, "final_norm": route.final_norm, "head": route.head}
        if "head" not in manifest.blocks and ends.pop("head") != route.embed:
            raise UserError(
                f"route: these models tie the head to the embedding, so head {route.head!r} must be the same as embed "
                f"{route.embed!r}"
            )
        for end, source in ends.items():
            if source not in (MERGED, *manifest.hashes):
                raise UserError(f"route.{end}: unknown source {source!r}{nearest(source, (MERGED, *manifest.hashes))}")
        if merged.segments is not None:
            return self._through_segments(route, ends, merged, manifest)
        rules = dict(merged.blocks)
        for end, source in ends.items():
            if source != MERGED:
                rules[end] = _whole(source)
        ruled = {b.layer for n, b in manifest.blocks.items() if n in rules}
        hops = tuple(
            _rounded_hop(h, self.base if h.from_ == MERGED and h.layer not in ruled else h.from_) for h in route.hops
        )
        if _natural(hops, manifest):
            for block in manifest.blocks.values():
                if block.layer is not None and (source := hops[block.layer].from_) != MERGED:
                    rules[block.name] = _whole(source)
            return merged.assembled(rules, manifest)
        used = {h.layer for h in hops if h.from_ == MERGED}
        kept = {n: r for n, r in rules.items() if (at := manifest.blocks[n].layer) is None or at in used}
        return merged.assembled(kept, manifest)._along(hops, manifest)

    def _through_segments(self, route: Route, ends: Mapping[str, str], merged: Recipe, manifest: Manifest) -> Recipe:
        for end, source in ends.items():
            if source != MERGED:
                raise UserError(f"route.{end}: with segments it is {MERGED!r}, got {source!r}")
        hops = tuple(_rounded_hop(h, h.from_) for h in route.hops)
        if _natural(hops, manifest) and all(h.from_ == MERGED for h in hops):
            return merged
        return merged._along(hops, manifest)

    def _along(self, hops: tuple[Hop, ...], manifest: Manifest) -> Recipe:
        """This canonical recipe with a canonical path, and with the sources that it visits."""
        visited = {self.base, *self.sources, *(h.from_ for h in hops)} - {MERGED}
        return self.model_copy(
            update={
                "route": Route.model_construct(embed=MERGED, final_norm=MERGED, head=MERGED, hops=hops),
                "sources": {n: Source.model_construct(sha256=manifest.hashes[n]) for n in sorted(visited)},
            }
        )

    def _with_segments(self, s: Segments, manifest: Manifest) -> Recipe:
        """The canonical recipe of segments."""
        if s.layout != manifest.layout:
            raise UserError(
                f"segments: made for the layout {s.layout[:19]}..., but these models have {manifest.layout[:19]}...: "
                "a cut would fall on other weights"
            )
        if s.cuts[-1] >= manifest.elements:
            raise UserError(f"segments: the cut {s.cuts[-1]} is behind the last of {manifest.elements} elements")
        for name in s.weights:
            if name not in manifest.hashes:
                raise UserError(f"segments: unknown source {name!r}{nearest(name, manifest.hashes)}")
        names = sorted(s.weights)
        starts = [t.offset for t in manifest.tensors]
        rows: list[tuple[int, tuple[float, ...]]] = []
        for i, cut in enumerate(s.cuts):
            t = manifest.tensors[bisect.bisect_right(starts, cut) - 1]
            if cut >= t.offset + t.size:
                cut = starts[bisect.bisect_right(starts, cut)]
            row = tuple(rounded(s.weights[n][i]) for n in names)
            if rows and rows[-1][0] == cut:
                rows.pop()
            if not rows or rows[-1][1] != row:
                rows.append((cut, row))
        columns = {n: column for n, *column in zip(names, *(row for _, row in rows), strict=True) if any(column)}
        if not all(any(row) for _, row in rows):
            raise UserError("segments: all weights of a segment are 0, which builds no model")
        if len(rows) == 1 and list(columns.values()) == [[1.0]]:
            rule = Rule(match="all", method="linear", sources={n: {"weight": 1.0} for n in columns})
            return self.model_copy(update={"segments": None, "merge": (rule,)})._canonical(manifest)
        used = {self.base, *columns}
        return self.model_copy(
            update={
                "segments": Segments.model_construct(
                    layout=manifest.layout,
                    cuts=tuple(cut for cut, _ in rows),
                    weights={n: tuple(column) for n, column in columns.items()},
                ),
                "sources": {n: Source.model_construct(sha256=manifest.hashes[n]) for n in sorted(used)},
            }
        )

    def assembled(self, chosen: Mapping[str, Rule], manifest: Manifest) -> Recipe:
        """The canonical recipe in which block `b` is merged by `chosen[b]`; its match does not matter.

        Raises UserError as `canonical` does. A rule that several blocks share is reduced once.
        """
        reduced: dict[int, Rule | None] = {}
        rules = []
        for block in manifest.blocks:
            rule = chosen.get(block)
            if rule is None:
                continue
            if id(rule) not in reduced:
                reduced[id(rule)] = _reduced(rule, block, self.base, manifest)
            r = reduced[id(rule)]
            if r is not None:
                rules.append(
                    Rule.model_construct(match=_only(block), method=r.method, params=r.params, sources=r.sources)
                )
        used = {self.base, *(n for r in reduced.values() if r is not None for n in r.sources)}
        return self.model_copy(
            update={
                "merge": tuple(rules),
                "sources": {n: Source.model_construct(sha256=manifest.hashes[n]) for n in sorted(used)},
            }
        )

    @cached_property
    def blocks(self) -> Mapping[str, Rule]:
        """Block name -> its rule, of a canonical recipe. Blocks that are missing are the base's.

        ValueError for segments, which know no blocks.
        """
        if self.segments is not None:
            raise ValueError("a recipe of segments has no rules by block")
        if self.merge is None:
            raise ValueError("only a canonical recipe has one rule a block: call canonical(manifest) first")
        out = {}
        for rule in self.merge:
            if rule.match == "all" or rule.match.block is None or rule.match.block in out:
                raise ValueError("only a canonical recipe has one rule a block: call canonical(manifest) first")
            out[rule.match.block] = rule
        return out

    @cached_property
    def path(self) -> tuple[Any, ...]:
        """Of a canonical recipe with a route, all that each hop's output depends on, hop by hop; else empty.

        Tokens that go through models whose paths begin alike have the same hidden states so far.
        """
        if self.route is None:
            return ()

        @cache
        def built(prefix: str) -> Any:
            if self.segments is not None:
                return self.segments.model_dump_json()
            rules = [(n, r) for n, r in self.blocks.items() if n.startswith(prefix)]
            return tuple(f"{n} {r.model_dump_json(exclude={'match'})}" for n, r in rules)

        embed = built("embed")
        hops = zip(self.route.hops, self.route.gains(), strict=True)
        return tuple(
            (embed, h.from_, h.layer, gains, built(f"layers.{h.layer}.") if h.from_ == MERGED else ())
            for h, gains in hops
        )

    def grouped(self) -> Recipe:
        """The same recipe with the blocks that share a rule under one match, layers as ranges: shorter to read.

        Of a canonical recipe, which is what `canonical` makes of it again. Segments stay as they are.
        """
        if self.segments is not None:
            return self
        runs: dict[str, list[tuple[Rule, list[int]]]] = {}
        for name, rule in self.blocks.items():
            head, _, module = name.rpartition(".")
            layer = [int(head.removeprefix("layers."))] if head else []
            mine = runs.setdefault(module, [])
            if mine and layer and mine[-1][1][-1] + 1 == layer[0] and _alike(mine[-1][0], rule):
                mine[-1][1].append(layer[0])
            else:
                mine.append((rule, layer))
        groups: list[tuple[Rule, tuple[int, int] | None, list[str]]] = []
        for module, parts in runs.items():
            for rule, layers in parts:
                span = (layers[0], layers[-1]) if layers else None
                same = [g for g in groups if g[1] == span and _alike(g[0], rule)]
                if same:
                    same[0][2].append(module)
                else:
                    groups.append((rule, span, [module]))
        rules = []
        for rule, span, modules in groups:
            which = None if set(modules) == _IN_LAYERS else modules if len(modules) > 1 else modules[0]
            rules.append(rule.model_copy(update={"match": Match.model_validate({"layers": span, "module": which})}))
        return self.model_copy(update={"merge": tuple(rules)})

    @cached_property
    def id(self) -> str:
        """sha256 of the canonical JSON, 64 hex digits. ValueError on a recipe that is not canonical."""
        if self.segments is not None:
            if any(n not in self.sources for n in (self.base, *self.segments.weights)):
                raise ValueError("only a canonical recipe has an id: call canonical(manifest) first")
            s = self.segments
            what: Any = {
                "segments": [s.layout, list(s.cuts), {n: list(column) for n, column in s.weights.items()}],
            }
        else:
            what = {
                "merge": {
                    name: [r.method, dict(r.params), {s: dict(c) for s, c in r.sources.items()}]
                    for name, r in self.blocks.items()
                }
            }
        if self.route is not None:
            what["route"] = [[h.from_, h.layer, h.scale, h.attn_gain, h.mlp_gain] for h in self.route.hops]
        return digest(
            {
                "recipe": self.recipe,
                "base": self.base,
                "dtype": self.dtype,
                "sources": {n: s.sha256 for n, s in self.sources.items()},
                "tokenizer": self.tokenizer.policy,
                **what,
            }
        )

    def unsupported(self) -> str | None:
        """Why this version cannot build the recipe, or None. The format is wider than what is built so far."""
        for part in ("ensemble", "factor_mix"):
            if getattr(self, part) is not None:
                return f"recipes with {part!r} are not built by this version yet; use merge rules"
        if self.tokenizer.policy != "base":
            return "tokenizer policy 'union' is not built by this version yet; use 'base'"
        for name, source in self.sources.items():
            if source.kind == "adapter":
                return f"source {name!r} is an adapter, which this version cannot build; merge it into a model first"
            if source.recipe is not None:
                return f"source {name!r} is a nested recipe, which this version cannot build; export it first"
        return None


Source.model_rebuild()  # Recipe and Source name each other


def _sources_of(route: Route) -> set[str]:
    return {route.embed, route.final_norm, route.head, *(h.from_ for h in route.hops)} - {MERGED}


def _rounded_hop(hop: Hop, source: str) -> Hop:
    return Hop.model_construct(
        from_=source,
        layer=hop.layer,
        scale=rounded(hop.scale),
        attn_gain=rounded(hop.attn_gain),
        mlp_gain=rounded(hop.mlp_gain),
    )


def _natural(hops: tuple[Hop, ...], manifest: Manifest) -> bool:
    """Whether a path takes every layer once, in order and as its source has it."""
    mergeable = {MERGED, manifest.base, *manifest.experts}
    return [h.layer for h in hops] == list(range(manifest.layers[manifest.base])) and all(
        h.plain and h.from_ in mergeable for h in hops
    )


def taken_whole(rule: Rule) -> str | None:
    """The source whose weights a canonical rule takes as they are, or None."""
    if rule.method != "linear" or len(rule.sources) != 1:
        return None
    [(name, coefficients)] = rule.sources.items()
    return name if rule.params["normalize"] or coefficients["weight"] == 1.0 else None


def _whole(source: str) -> Rule:
    """A rule that takes one source as it is."""
    return Rule.model_construct(match="all", method="linear", params={}, sources={source: {"weight": 1.0}})


_IN_LAYERS = {"attention", "mlp", "norm"}


def _alike(a: Rule, b: Rule) -> bool:
    """Whether two rules differ in their match at most."""
    return (a.method, a.params, a.sources) == (b.method, b.params, b.sources)


@lru_cache(maxsize=4096)
def _only(block: str) -> Match:
    return Match.model_construct(block=block, layers=None, module=None)


def _reduced(rule: Rule, block: str, base: str, manifest: Manifest) -> Rule | None:
    """The rule for one block with defaults filled in and inert parts removed; None where the base remains."""
    method = METHODS[rule.method]
    coefs = method.coefficients
    params: dict[str, Scalar] = {n: default for n, (default, _) in method.options.items()}
    params |= {n: coefs[n].default for n in method.per_block}
    params |= rule.params
    for n in method.per_block:
        params[n] = int(params[n]) if coefs[n].integer else rounded(float(params[n]))
    adds = method.adds_to_base(params)
    sources = {}
    for name in sorted(rule.sources):
        if name not in manifest.hashes:
            raise UserError(f"merge rule for {block}: unknown source {name!r}{nearest(name, manifest.hashes)}")
        if name in manifest.layouts and block.startswith("layers."):
            raise UserError(
                f"merge rule for {block}: {name!r} has {manifest.layers[name]} layers, the base has "
                f"{manifest.layers[base]}; only routes go through models of different depth"
            )
        if name == base and adds:
            raise UserError(f"merge rule for {block}: {rule.method} adds to the base; it cannot be a source too")
        given = rule.sources[name]
        values = {n: rounded(float(given.get(n, coefs[n].default))) for n in method.per_source}
        if values["weight"] != 0.0 and (not method.bands or any(values[b] for b in method.bands)):
            sources[name] = values
    spherical = method.combine == "spherical"
    if (spherical or not adds) and rule.sources and not sources:
        raise UserError(f"merge rule for {block}: all weights of {rule.method} are 0, which builds no model")
    if not sources or params.get("lambda") == 0.0:
        return None
    if spherical and len(sources) > 2:
        raise UserError(
            f"merge rule for {block}: {rule.method} is between two models, but {', '.join(sources)} have weights "
            "above 0; keep two of them, or take linear"
        )
    normalised = method.combine == "weighted_mean" and params["normalize"] is True
    alone = next(iter(sources.values())) if len(sources) == 1 else None
    if alone is not None and spherical:
        alone["weight"] = 1.0
    if not adds and set(sources) == {base} and (normalised or sources[base]["weight"] == 1.0):
        return None
    if normalised:
        total = sum(v["weight"] for v in sources.values())
        if abs(total) < 1e-6:
            raise UserError(f"merge rule for {block}: the weights of linear sum to {total:g} and cannot be normalised")
    if method.sparsify == "bernoulli" and all(v["density"] == 1.0 for v in sources.values()):
        params |= {"mask_seed": int(coefs["mask_seed"].default), "rescale": method.options["rescale"][0]}
    return Rule.model_construct(
        match=_only(block), method=rule.method, params=dict(sorted(params.items())), sources=sources
    )


def in_common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Hops that two paths (`Recipe.path`) have in common at their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def rounded(x: float) -> float:
    """To 1e-6, so that a recipe printed and read back is the same recipe; never -0.0."""
    return round(x, DECIMALS) + 0.0
