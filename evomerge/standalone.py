"""Build or score one model outside a run: what `evomerge merge`, `score` and `verify` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from evomerge.config import FitnessSpec
from evomerge.hub import folder_of, named
from evomerge.merge.bank import Bank
from evomerge.merge.builder import Builder
from evomerge.merge.live import inference, live_model, load_tokenizer
from evomerge.pool import ModelPool
from evomerge.prepare import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS
from evomerge.proposal import Scores
from evomerge.recipe import Recipe
from evomerge.score import make_scorer
from evomerge.score.plan import PlanShape
from evomerge.score.tasks import SPLITS, load_items


def score_folder(
    folder: Path, fitness: FitnessSpec, *, splits: Sequence[str] = SPLITS, device: str = "cpu"
) -> dict[str, Scores]:
    """split -> task -> metric -> per-item scores of a model folder or hub id. Raises UserError."""
    pool = ModelPool.open(folder_of(named(Path.cwd(), str(folder))), {})
    recipe = Recipe.model_validate({"base": pool.base, "dtype": pool.stored_dtype, "merge": []})
    return score_recipe(recipe, pool, fitness, splits=splits, device=device)


def score_recipe(
    recipe: Recipe, pool: ModelPool, fitness: FitnessSpec, *, splits: Sequence[str] = SPLITS, device: str = "cpu"
) -> dict[str, Scores]:
    """split -> task -> metric -> per-item scores of a recipe built over a pool. Raises UserError."""
    base = pool.checkpoints[pool.base]
    items = {t.name: load_items(t, Path.cwd()) for t in fitness.tasks}
    shape = PlanShape(GPU_BATCH_TOKENS if device.startswith("cuda") else CPU_BATCH_TOKENS)
    tokenizer = load_tokenizer(base.path)
    limit = base.context_length
    manifest = pool.manifest()
    canonical = recipe.canonical(manifest)
    place = torch.device(device)
    inference(place, torch.get_num_threads())
    builder = Builder(Bank.load(pool, manifest, place), canonical.dtype)
    model = live_model(base.path, builder.views(), canonical.dtype)
    builder.build(canonical)
    out: dict[str, dict[str, Mapping[str, object]]] = {s: {} for s in splits}
    for task in fitness.tasks:
        scorer = make_scorer(task.kind)
        plan = scorer.compile(task, items[task.name], tokenizer, limit, shape)
        for split in splits:
            out[split][task.name] = scorer.score(model, plan, plan.splits[split])
    return out  # type: ignore[return-value]
