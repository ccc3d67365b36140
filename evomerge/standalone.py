"""Build or score one model outside a run: what `evomerge merge`, `score` and `verify` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from evomerge.fitness import FitnessSpec
from evomerge.hub import folder_of, named
from evomerge.merge.bank import Bank
from evomerge.merge.builder import Builder
from evomerge.merge.live import inference, live_model, load_tokenizer
from evomerge.merge.route import Router
from evomerge.pool import ModelPool
from evomerge.prepare import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, compile_plans, load_items
from evomerge.proposal import Scores
from evomerge.recipe import Recipe
from evomerge.score import make_scorer
from evomerge.score.plan import PlanShape, Scorable
from evomerge.tasks.base import NOTHING, SPLITS, Allowed


def score_folder(
    folder: Path,
    fitness: FitnessSpec,
    *,
    splits: Sequence[str] = SPLITS,
    device: str = "cpu",
    allow: Allowed = NOTHING,
) -> dict[str, Scores]:
    """split -> task -> metric -> per-item scores of a model folder or hub id. Raises UserError."""
    pool = ModelPool.open(folder_of(named(Path.cwd(), str(folder))), {})
    recipe = Recipe.model_validate({"base": pool.base, "dtype": pool.stored_dtype, "merge": []})
    return score_recipe(recipe, pool, fitness, splits=splits, device=device, allow=allow)


def score_recipe(
    recipe: Recipe,
    pool: ModelPool,
    fitness: FitnessSpec,
    *,
    splits: Sequence[str] = SPLITS,
    device: str = "cpu",
    allow: Allowed = NOTHING,
) -> dict[str, Scores]:
    """split -> task -> metric -> per-item scores of a recipe built over a pool. Raises UserError."""
    base = pool.checkpoints[pool.base]
    items = load_items(fitness.tasks, allow)
    shape = PlanShape(GPU_BATCH_TOKENS if device.startswith("cuda") else CPU_BATCH_TOKENS)
    plans = compile_plans(fitness.tasks, items, base, shape)
    manifest = pool.manifest()
    canonical = recipe.canonical(manifest)
    place = torch.device(device)
    inference(place, torch.get_num_threads())
    builder = Builder(Bank.load(pool, manifest, place), canonical.dtype)
    model = live_model(base.path, builder.views(), canonical.dtype)
    router = Router(model, pool, builder)
    candidate = Scorable(model, load_tokenizer(base.path), router.distance)
    builder.build(canonical)
    router.follow(canonical)
    out: dict[str, dict[str, Mapping[str, object]]] = {s: {} for s in splits}
    for task, plan in plans.items():
        scorer = make_scorer(plan.kind)
        for split in splits:
            out[split][task] = scorer.score(candidate, plan, plan.splits[split])
    return out  # type: ignore[return-value]
