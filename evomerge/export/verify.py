"""Verify an export: rebuild it from its record, compare every tensor, score it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import RunError, UserError
from evomerge.export.hf import RECIPE, RECORD, build_weights, tensor_sha256
from evomerge.hub import folder_of
from evomerge.pool import Checkpoint, ModelPool
from evomerge.recipe import Recipe
from evomerge.tasks.base import NOTHING, Allowed
from evomerge.yamlio import load_yaml


@dataclass(frozen=True)
class Verification:
    """What was checked; `ok` where nothing differs. Score differences are absolute, per task and metric."""

    ok: bool
    tensors: int
    differing: tuple[str, ...]
    scores: Mapping[str, float]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "ok": self.ok,
            "tensors": self.tensors,
            "differing": list(self.differing),
            "score_differences": dict(self.scores),
            "problems": list(self.problems),
        }


SCORE_TOLERANCE = 1e-4
"""Absolute, on a task's mean: the noise of fp32 log-probabilities between machines. Routes in half precision are not
held to it: folding their scales rounds the weights once more (experiments/routes/folding.md)."""


def verify(path: Path, allow: Allowed = NOTHING) -> Verification:
    """Rebuild and compare. Raises UserError where `path` is no export or a source is missing or changed."""
    record = read_record(path)
    recipe = Recipe.load(path / RECIPE)
    pool, manifest = open_recipe_pool(recipe, {n: Path(s["path"]) for n, s in record["sources"].items()})
    canonical = recipe.canonical(manifest, str(path / RECIPE))
    problems = []
    if canonical.id != record["recipe_id"]:
        problems.append(f"{RECIPE} has id {canonical.id[:12]}, the record {str(record['recipe_id'])[:12]}")
    expected = {n: tensor_sha256(t) for n, t in build_weights(canonical, pool, manifest).items()}
    export = Checkpoint(path)
    differing = sorted(
        n
        for n in {*expected, *export.tensors, *export.foreign}
        if n not in expected or n not in export.tensors or tensor_sha256(export.tensor(n)) != expected[n]
    )
    if differing:
        problems.append(f"{len(differing)} tensors differ from a rebuild, the first is {differing[0]}")
    recorded = {n for n in expected if record["tensors"].get(n) != expected[n]}
    if recorded:
        problems.append(f"{len(recorded)} tensors differ from the record, the first is {min(recorded)}")
    scores: dict[str, float] = {}
    if record.get("fitness") and record.get("scores"):
        try:
            scores = _score_differences(path, record, allow)
        except (RunError, UserError) as e:
            problems.append(f"cannot be scored: {e}")
        if canonical.route is None or canonical.dtype == "float32":
            problems += [f"{k} differs by {v:.2g}" for k, v in scores.items() if not v <= SCORE_TOLERANCE]
    return Verification(not problems, len(expected), tuple(differing), scores, tuple(problems))


def read_record(path: Path) -> dict[str, Any]:
    """The record that an export carries. Raises UserError."""
    file = path / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != 1 or not isinstance(record["sources"], dict) or not isinstance(record["tensors"], dict):
            raise ValueError
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); expected a folder that evomerge exported") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: is not an export record of this version") from None
    return dict(record)


def open_recipe_pool(recipe: Recipe, paths: Mapping[str, Path]) -> tuple[ModelPool, Any]:
    """Pool and manifest of a recipe whose sources name folders or hub ids. Raises UserError."""
    missing = [n for n in recipe.sources if n not in paths]
    if recipe.base not in paths or missing:
        raise UserError(f"the recipe names no folder (path) for source {(missing or [recipe.base])[0]!r}")
    experts = {n: folder_of(p) for n, p in paths.items() if n != recipe.base}
    pool = ModelPool.open(folder_of(paths[recipe.base]), experts, recipe.base)
    return pool, pool.manifest()


def _score_differences(path: Path, record: Mapping[str, Any], allow: Allowed) -> dict[str, float]:
    """|score now - score in the record| by split, task and metric."""
    from evomerge.fitness import FitnessSpec
    from evomerge.schema import validated
    from evomerge.standalone import score_folder

    fitness = validated(FitnessSpec, record["fitness"], str(path / RECORD))
    measured = {t.name: t.measured for t in fitness.tasks}
    out = {}
    for split, tasks in record["scores"].items():
        now = score_folder(path, fitness, splits=(split,), allow=allow)[split]
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                if metric in measured.get(task, ()):
                    continue
                out[f"{split}.{task}.{metric}"] = abs(float(now[task][metric].mean()) - float(value))
    return out


def recipe_paths(recipe: Recipe) -> dict[str, Path]:
    """Folders of a recipe's sources. Raises UserError where one is missing."""
    out = {}
    for name, source in recipe.sources.items():
        if source.path is None:
            raise UserError(f"source {name!r}: the recipe gives no folder; add `path:` to it")
        out[name] = Path(source.path)
    if recipe.base not in out:
        raise UserError(f"the recipe gives no folder for its base {recipe.base!r}; add it to sources with `path:`")
    return out


def is_recipe(path: Path) -> bool:
    """True for a YAML file with a recipe in it."""
    return path.is_file() and path.suffix in (".yaml", ".yml") and isinstance(load_yaml(path), dict)
