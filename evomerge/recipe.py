"""Recipe: what to build. Pure data; equal ids imply equal models.

A recipe is written by people with rules (`match: {layers: [0, 15], module: attention}`) and hashed in its
canonical form: one rule a block, defaults filled in, coefficients rounded to 1e-6, inert genes removed.

Inert forms that the canonical form removes (each leaves the built weights the same to the last bit):
  1. a source of weight 0, in every method of `merge/methods.py`;
  2. a whole rule without remaining sources, or with lambda 0: the block is the base's;
  3. a `linear` rule whose only source is the base, normalised or of weight 1: the block is the base's;
  4. sources that no rule mentions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
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
    if isinstance(value, bool | str) or not c.low <= value <= c.high:
        raise ValueError(f"{name}: `{c.low:g} <= {name} <= {c.high:g}` must hold, but got {value!r}")


class Hop(_Part):
    """One step of a layer route. `scale` multiplies the residual input; gains multiply branch outputs."""

    from_: str = Field(alias="from")
    layer: int = Field(ge=0)
    scale: float = Field(1.0, gt=0)
    attn_gain: float = 1.0
    mlp_gain: float = 1.0


class Route(_Part):
    """The path of tokens through layers of several sources."""

    embed: str
    final_norm: str
    head: str
    hops: tuple[Hop, ...] = Field(min_length=1)


class Segments(_Part):
    """A piecewise linear mix over the flat layout (natural niches); cuts may fall inside tensors."""

    layout: str
    cuts: tuple[int, ...]
    weights: Mapping[str, tuple[float, ...]]


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
        if self.sources and self.merge is not None:
            for rule in self.merge:
                for name in rule.sources:
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

    # -- canonical form ---------------------------------------------------------------------------------

    def canonical(self, manifest: Manifest) -> Recipe:
        """One rule a block, sources with the manifest's hashes, nothing inert (module docstring).

        Raises UserError for sources, hashes or blocks that the manifest does not have. Idempotent.
        """
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
        for i, rule in enumerate(self.merge or ()):
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
        """Block name -> its rule, of a canonical recipe. Blocks that are missing are the base's."""
        if self.merge is None:
            raise ValueError("only a canonical recipe has one rule a block: call canonical(manifest) first")
        out = {}
        for rule in self.merge:
            if rule.match == "all" or rule.match.block is None or rule.match.block in out:
                raise ValueError("only a canonical recipe has one rule a block: call canonical(manifest) first")
            out[rule.match.block] = rule
        return out

    @cached_property
    def id(self) -> str:
        """sha256 of the canonical JSON, 64 hex digits. ValueError on a recipe that is not canonical."""
        blocks = {
            name: [r.method, dict(r.params), {s: dict(c) for s, c in r.sources.items()}]
            for name, r in self.blocks.items()
        }
        return digest(
            {
                "recipe": self.recipe,
                "base": self.base,
                "dtype": self.dtype,
                "sources": {n: s.sha256 for n, s in self.sources.items()},
                "tokenizer": self.tokenizer.policy,
                "merge": blocks,
            }
        )

    def unsupported(self) -> str | None:
        """Why this version cannot build the recipe, or None. The format is wider than what is built so far."""
        for part in ("route", "segments", "ensemble", "factor_mix"):
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
        params[n] = rounded(float(params[n]))
    sources = {}
    for name in sorted(rule.sources):
        if name not in manifest.hashes:
            raise UserError(f"merge rule for {block}: unknown source {name!r}{nearest(name, manifest.hashes)}")
        if name == base and method.delta == "base":
            raise UserError(f"merge rule for {block}: {rule.method} adds to the base; it cannot be a source too")
        given = rule.sources[name]
        values = {n: rounded(float(given.get(n, coefs[n].default))) for n in method.per_source}
        if values["weight"] != 0.0:
            sources[name] = values
    if method.delta == "none" and rule.sources and not sources:
        raise UserError(f"merge rule for {block}: all weights of {rule.method} are 0, which builds no model")
    if not sources or params.get("lambda") == 0.0:
        return None
    normalised = method.delta == "none" and params["normalize"] is True
    if method.delta == "none" and set(sources) == {base} and (normalised or sources[base]["weight"] == 1.0):
        return None
    if normalised:
        total = sum(v["weight"] for v in sources.values())
        if abs(total) < 1e-6:
            raise UserError(f"merge rule for {block}: the weights of linear sum to {total:g} and cannot be normalised")
    return Rule.model_construct(
        match=_only(block), method=rule.method, params=dict(sorted(params.items())), sources=sources
    )


def rounded(x: float) -> float:
    """To 1e-6, so that a recipe printed and read back is the same recipe; never -0.0."""
    return round(x, DECIMALS) + 0.0
