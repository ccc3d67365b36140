"""Export to a checkpoint folder that stock transformers loads, with a record from which it can be rebuilt."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from evomerge.export.card import CARD, Parent, model_card, parent_of
from evomerge.export.mergekit import MergekitError, to_mergekit
from evomerge.files import new_folder
from evomerge.history import History
from evomerge.hub import name_of
from evomerge.manifest import Manifest
from evomerge.merge.bank import Bank
from evomerge.merge.builder import Builder
from evomerge.merge.route import layer_types, routed_config, routed_weights
from evomerge.pool import ModelPool, raw_bytes
from evomerge.recipe import Recipe
from evomerge.yamlio import dump_yaml

RECORD = "evomerge.json"
RECIPE = "recipe.yaml"
MERGEKIT = "mergekit_config.yml"
SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
NOT_OURS = ("torch_dtype", "quantization_config", "_name_or_path", "auto_map")
"""Keys of the base's config.json that do not hold for the merge: how and where the base was stored, code of its own."""


def build_weights(recipe: Recipe, pool: ModelPool, manifest: Manifest) -> Mapping[str, Tensor]:
    """The recipe's weights on the CPU, by tensor name: the same code and bits that were scored there."""
    builder = Builder(Bank.load(pool, manifest, torch.device("cpu")), recipe.dtype)
    builder.build(recipe)
    return builder.views() if recipe.route is None else routed_weights(recipe.route, pool, builder)


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def write_hf(
    target: Path,
    recipe: Recipe,
    pool: ModelPool,
    manifest: Manifest,
    *,
    scores: Any = None,
    fitness: Any = None,
    notes: Mapping[str, Any] | None = None,
    history: History | None = None,
    candidate: int | None = None,
) -> Path:
    """Write the folder `target`, whole or not at all; returns it.

    `scores` and `fitness` go into the record, where `evomerge verify` finds them; the card tells of the run
    (`history`) and of the `candidate` in it. Raises UserError where the target is in the way, BuildError where the
    weights are not finite.
    """
    with new_folder(target) as folder:
        weights = build_weights(recipe, pool, manifest)
        base = pool.checkpoints[pool.base]
        # A route has layers that the base's files have no names for; transformers reads its own names, too.
        _write_shards(folder, base.stored_form(weights) if recipe.route is None else weights)
        config = {n: v for n, v in base.config.items() if n not in NOT_OURS} | {"dtype": recipe.dtype}
        if recipe.route is not None:
            config |= routed_config(recipe.route, pool)
        _write(folder / "config.json", json.dumps(config, indent=2) + "\n")
        for name in TOKENIZER_FILES:
            if (base.path / name).is_file():
                shutil.copyfile(base.path / name, folder / name)
        _write(folder / RECIPE, recipe_with_paths(recipe, pool).to_yaml())
        try:
            _write(folder / MERGEKIT, dump_yaml(mergekit_config(recipe, pool, manifest)))
            mergekit = MERGEKIT
        except MergekitError as e:
            mergekit = f"not expressible: {e}"
        record = {
            "format": 1,
            "recipe_id": recipe.id,
            "sources": {n: {"path": str(p), "sha256": manifest.hashes[n]} for n, p in _paths(pool).items()},
            "tensors": {n: tensor_sha256(t) for n, t in weights.items()},
            "mergekit": mergekit,
            "scores": scores,
            "fitness": fitness,
            **(notes or {}),
        }
        _write(folder / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
        _write(folder / CARD, model_card(recipe, _parents(recipe, pool, manifest, history), history, candidate))
    return target


def mergekit_config(recipe: Recipe, pool: ModelPool, manifest: Manifest) -> dict[str, Any]:
    """`to_mergekit` of an opened pool. Raises MergekitError, too, where only the configs of its models tell."""
    if recipe.route is not None:
        kept = getattr(pool.checkpoints[pool.base].stock.config, "layer_types", None)
        if layer_types(recipe.route, pool) != kept:
            raise MergekitError(
                "mergekit changes the number of layers in config.json, but not layer_types, which the base's "
                f"architecture {pool.checkpoints[pool.base].model_type!r} has for each layer"
            )
    config = to_mergekit(recipe, manifest, _paths(pool))
    if recipe.route is not None:
        rows = {n: {t: c.tensors[t].shape[0] for t in c.stock.rows} for n, c in pool.checkpoints.items()}
        for source in {n for end in recipe.blocks.values() for n in end.sources}:
            if rows[source] != rows[pool.base]:
                raise MergekitError(
                    f"mergekit takes all {max(rows[source].values())} token rows of {source!r}, the recipe the base's "
                    f"{max(rows[pool.base].values())}"
                )
    return config


def _parents(recipe: Recipe, pool: ModelPool, manifest: Manifest, history: History | None) -> list[Parent]:
    """The sources that the canonical recipe uses, base first."""
    given = {} if history is None else {manifest.base: history.experiment.models.base}
    given |= {} if history is None else dict(history.experiment.models.experts)
    names = [recipe.base, *(n for n in recipe.sources if n != recipe.base)]
    opened = {n: pool.checkpoints[n] for n in names}
    return [parent_of(n, c.path, manifest.hashes[n], c.config, given.get(n, "")) for n, c in opened.items()]


def recipe_with_paths(recipe: Recipe, pool: ModelPool) -> Recipe:
    """The recipe as people need it: with the folders or hub ids of its sources."""
    paths = _paths(pool)
    sources = {n: s.model_copy(update={"path": str(paths[n])}) for n, s in recipe.sources.items()}
    return recipe.model_copy(update={"sources": sources})


def _paths(pool: ModelPool) -> dict[str, Path]:
    return {n: Path(name_of(c.path)) for n, c in pool.checkpoints.items()}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_shards(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """safetensors files of at most SHARD_BYTES, with an index where there are several."""
    shards = list(_shards(weights))
    if len(shards) == 1:
        _save({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors")
        return
    where = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _save({n: weights[n].contiguous() for n in names}, folder / file)
        where.update(dict.fromkeys(names, file))
    total = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def _save(weights: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(weights, path, {"format": "pt"})
    except SafetensorError as e:  # a full disk, too
        raise OSError(str(e)) from None


def _shards(weights: Mapping[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, t in weights.items():
        n = t.numel() * t.element_size()
        if names and size + n > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += n
    yield names
