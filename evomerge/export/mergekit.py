"""Export to a mergekit configuration that `mergekit-yaml` executes to the same weights, or a refusal.

Weights per block become name filters (substring match, first match wins, catch-all last), layer routes slices of
`passthrough`. mergekit accepts unknown keys in silence, so only what it was seen to execute exactly is written
(`make oracle`, mergekit 0.1.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.architectures import ARCHITECTURES
from evomerge.errors import UserError
from evomerge.manifest import Block, Manifest
from evomerge.merge.methods import METHODS
from evomerge.recipe import MERGED, Recipe, Route, Rule, taken_whole

NAMES = {m: m for m in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")}
"""Our method -> mergekit's. SLERP has a form of its own."""


class MergekitError(UserError):
    """mergekit cannot express this recipe exactly; the text is the reason."""


def to_mergekit(recipe: Recipe, manifest: Manifest, paths: Mapping[str, Path]) -> dict[str, Any]:
    """A mergekit configuration for a canonical recipe. Raises MergekitError with the reason where there is none."""
    if recipe.segments is not None:
        raise MergekitError("mergekit has one weight for a whole tensor, the recipe's segments may cut through tensors")
    if recipe.route is not None:
        return _routed(recipe, recipe.route, manifest, paths)
    rules = recipe.blocks
    methods = sorted({r.method for r in rules.values()})
    if len(methods) > 1:
        raise MergekitError(f"mergekit has one merge method a file, the recipe has {' and '.join(methods)}")
    name = methods[0] if methods else "task_arithmetic"
    if METHODS[name].combine == "spherical":
        return {**_spherical(recipe, manifest, paths), **_dtypes(recipe)}
    if name not in NAMES:
        raise MergekitError(f"mergekit has no exact equivalent of {name!r}")
    method = METHODS[name]
    experts = [s for s in manifest.hashes if s != manifest.base and s in recipe.sources]
    # A base-only recipe still needs an input: any expert at weight 0.
    experts = experts or [s for s in manifest.hashes if s != manifest.base][:1]
    options = _common_options(rules, name)
    sparse = any(c.get("density", 1.0) < 1.0 for r in rules.values() for c in r.sources.values())
    if sparse and method.sparsify == "bernoulli":
        raise MergekitError("mergekit draws random masks of its own, so it would build another model; use density 1")
    if sparse and recipe.dtype != "float32":
        # Equal magnitudes at the cut: we keep all, mergekit an arbitrary choice; rounded weights have many.
        raise MergekitError("mergekit breaks ties of trimmed half-precision weights arbitrarily; use dtype float32")
    if sparse and any(len(t.shape) > 2 for t in manifest.tensors):
        # A cut is made per tensor: ours over all experts of a layer as the live model holds them.
        raise MergekitError("mergekit trims each expert of a mixture by itself, not the experts of a layer together")
    models: list[dict[str, Any]] = []
    listed = [manifest.base, *experts] if name == "linear" else experts
    for source in listed:
        parameters: dict[str, Any] = {}
        for coefficient in method.per_source:
            parameters[coefficient] = _filtered(
                manifest, lambda b, s=source, c=coefficient: _value(rules.get(b.name), s, c, manifest.base)
            )
        models.append({"model": str(paths[source]), "parameters": parameters})
    config: dict[str, Any] = {
        "merge_method": NAMES[name],
        "base_model": str(paths[manifest.base]),
        "models": models,
    }
    parameters = dict(options)
    if "lambda" in method.per_block:
        parameters["lambda"] = _filtered(
            manifest, lambda b: float(rules[b.name].params["lambda"]) if b.name in rules else 1.0
        )
    if name in ("task_arithmetic", "dare_linear"):
        parameters["normalize"] = False
    config["parameters"] = parameters
    return {**config, **_dtypes(recipe)}


def _dtypes(recipe: Recipe) -> dict[str, str]:
    # Computing in fp32 and rounding once is what we do; mergekit's `dtype` alone computes in that dtype.
    return {"dtype": "float32"} | ({} if recipe.dtype == "float32" else {"out_dtype": recipe.dtype})


def _routed(recipe: Recipe, route: Route, manifest: Manifest, paths: Mapping[str, Path]) -> dict[str, Any]:
    """Slices of layers that follow one another in their source and share gains, which scale the branches' outputs.

    mergekit takes the embedding from the first slice's model, final norm and head from the last one's; where that is
    another model than the route's first or last layer is of, a slice without layers stands for it.
    """
    slices: list[dict[str, Any]] = []
    previous = None
    for hop, gains in zip(route.hops, route.gains(), strict=True):
        if hop.from_ == MERGED:
            raise MergekitError(
                f"mergekit either merges layers or stacks them, and layer {hop.layer} of the route is merged; export "
                "the merge first and let the route visit it as a source"
            )
        if previous == (hop.from_, hop.layer - 1, gains):
            slices[-1]["sources"][0]["layer_range"][1] += 1
        else:
            source: dict[str, Any] = {"model": str(paths[hop.from_]), "layer_range": [hop.layer, hop.layer + 1]}
            if gains != (1.0, 1.0):
                branches = zip(ARCHITECTURES["llama"].branches, gains, strict=True)
                scale = [*({"filter": name, "value": gain} for name, gain in branches), {"value": 1.0}]
                source["parameters"] = {"scale": scale}
            slices.append({"sources": [source]})
        previous = (hop.from_, hop.layer, gains)
    ends = {}
    for block in manifest.blocks.values():
        _filters(block)  # refuses names that were not checked
        if block.layer is None:
            ends[block.module] = _taken_from(recipe, block.name)
    if (norm := ends["final_norm"]) != (head := ends.get("head", norm)):
        raise MergekitError(f"mergekit takes final norm and head from one model, the recipe from {norm!r} and {head!r}")
    if (embed := ends["embed"]) != route.hops[0].from_:
        slices.insert(0, {"sources": [{"model": str(paths[embed]), "layer_range": [0, 0]}]})
    if norm != route.hops[-1].from_:
        slices.append({"sources": [{"model": str(paths[norm]), "layer_range": [0, 0]}]})
    # Layers are rounded to the recipe's dtype first and scaled then, in the live model as by mergekit's `dtype`.
    base = str(paths[manifest.base])
    return {"merge_method": "passthrough", "base_model": base, "slices": slices, "dtype": recipe.dtype}


def _taken_from(recipe: Recipe, block: str) -> str:
    """The source that a block outside the layers is a copy of."""
    rule = recipe.blocks.get(block)
    if rule is None:
        return recipe.base
    if (source := taken_whole(rule)) is not None:
        return source
    raise MergekitError(f"mergekit either merges or stacks layers, and the route's {block} is merged; export it first")


def _spherical(recipe: Recipe, manifest: Manifest, paths: Mapping[str, Path]) -> dict[str, Any]:
    """slerp between two models, one of which mergekit calls the base; nuslerp between two experts' deltas."""
    rules = recipe.blocks
    vectors = {str(r.params["vectors"]) for r in rules.values()}
    if len(vectors) > 1:
        raise MergekitError("mergekit takes slerp of weights or of deltas in a file; the recipe's blocks differ in it")
    bare = [b for b in manifest.blocks if b not in rules]
    used = {s for r in rules.values() for s in r.sources} | ({manifest.base} if bare else set())
    deltas = vectors == {"deltas"}
    if deltas and bare:
        raise MergekitError(f"mergekit's nuslerp cannot leave a block, here {bare[0]}, as the base has it")
    # One model alone still needs a partner, at t = 0.
    ends = sorted(used, key=lambda s: (s != manifest.base, s))
    if len(ends) == 1:
        ends += [s for s in manifest.hashes if s not in ends and not (deltas and s == manifest.base)][:1]
    if len(ends) != 2:
        raise MergekitError(f"mergekit's slerp is between two models, the recipe has {', '.join(ends)}")
    first, second = ends

    def weight(block: Block, source: str) -> float:
        rule = rules.get(block.name)
        if rule is None:
            return 1.0 if source == manifest.base else 0.0
        return float(rule.sources[source]["weight"]) if source in rule.sources else 0.0

    if deltas:
        models = [
            {"model": str(paths[s]), "parameters": {"weight": _filtered(manifest, lambda b, s=s: weight(b, s))}}
            for s in ends
        ]
        return {
            "merge_method": "nuslerp",
            "base_model": str(paths[manifest.base]),
            "models": models,
            "parameters": {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        }
    t = _filtered(manifest, lambda b: weight(b, second) / (weight(b, first) + weight(b, second)))
    return {
        "merge_method": "slerp",
        "base_model": str(paths[first]),
        "models": [{"model": str(paths[second])}],
        "parameters": {"t": t},
    }


def _common_options(rules: Mapping[str, Rule], name: str) -> dict[str, Any]:
    method = METHODS[name]
    out: dict[str, Any] = {}
    for option, (default, _) in method.options.items():
        if option == "rescale":  # of masks, which only recipes that are refused have
            continue
        values = {r.params[option] for r in rules.values()} or {default}
        if len(values) > 1:
            raise MergekitError(f"mergekit has one {option!r} a file, the recipe's blocks differ in it")
        out[option] = values.pop()
    return out


def _value(rule: Rule | None, source: str, coefficient: str, base: str) -> float:
    if rule is None:  # the block is the base's
        return 1.0 if coefficient == "density" or source == base else 0.0
    if source not in rule.sources:
        return 1.0 if coefficient == "density" else 0.0
    return float(rule.sources[source][coefficient])


def _filtered(manifest: Manifest, value_of: Any) -> Any:
    """A plain number where all blocks agree, else filters: a module in a layer, embedding, norm, head."""
    values = {b.name: value_of(b) for b in manifest.blocks.values()}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    out: list[dict[str, Any]] = []
    for b in manifest.blocks.values():
        out += [{"filter": f, "value": values[b.name]} for f in _filters(b)]
    return [*out, {"value": 0.0}]


def _filters(block: Block) -> list[str]:
    """Substrings that mean exactly the block's tensors (the dot behind the index keeps 1 from matching 10)."""
    if any(ARCHITECTURES["llama"].block_of(t.name) != block.name for t in block.tensors):
        raise MergekitError("filters by tensor name were checked with mergekit for Llama-like names only")
    if block.layer is None:
        return [t.name.removesuffix(".weight") for t in block.tensors]
    prefixes = {".".join(t.name.split(".")[:4]) for t in block.tensors}
    return sorted(p.removeprefix("model.") for p in prefixes)
