"""Warm starts: an earlier run's finalists, or any recipe, in a new experiment; sources are matched by content hash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.config import Experiment
from evomerge.errors import UserError
from evomerge.history import History
from evomerge.pareto import order
from evomerge.prepare import open_pool
from evomerge.recipe import Recipe


def given_by(path: Path, experiment: Experiment) -> list[dict[str, Any]]:
    """The recipes to begin from that a path gives: a run's finalists, or the one of a recipe file.

    Raises UserError where a source is not in the new pool.
    """
    if path.is_file():
        return [_renamed(Recipe.load(path), _names(experiment), path)]
    return finalists_of(path, experiment)


def finalists_of(path: Path, experiment: Experiment) -> list[dict[str, Any]]:
    """The finalists of the run in `path`, best on its select split first, in the names of the new pool.

    Baselines are left out: the new run scores its own. Raises UserError where a source is not in the new pool.
    """
    history = History.read(path)
    if history.final is None:
        raise UserError(f"{path}: has no finalists yet; finish it with `evomerge resume {path}`")
    names = _names(experiment)
    numbers = sorted(history.final["finalists"])
    losses = np.array([np.atleast_1d(history.final["losses"][str(i)]) for i in numbers])
    ranked = (numbers[i] for i in order(losses))
    return [_renamed(history.recipe(i), names, path) for i in ranked if history.entry(i).role != "baseline"]


def _names(experiment: Experiment) -> dict[str, str]:
    """Content hash -> name in the experiment's pool."""
    return {digest: name for name, digest in open_pool(experiment).manifest().hashes.items()}


def _renamed(recipe: Recipe, names: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The recipe in the names of the new pool; sources without a hash keep theirs."""
    renamed = {}
    for name, source in recipe.sources.items():
        if source.sha256 is not None and source.sha256 not in names:
            known, asis = name in names.values(), ""
            if known and path.is_file():
                asis = f", drop the sha256 from the file to take {name!r} as it is now"
            raise UserError(
                f"{path}: its source {name!r} is not in the new pool{', which has other weights by that name' * known} "
                f"(sha256 {source.sha256[:12]}); name that checkpoint under models{asis}, or leave out this warm start"
            )
        renamed[name] = name if source.sha256 is None else names[source.sha256]
    sources = {renamed[n]: s.model_copy(update={"path": None}) for n, s in recipe.sources.items()}
    update: dict[str, Any] = {"base": renamed.get(recipe.base, recipe.base), "sources": sources}
    if (s := recipe.segments) is not None:
        weights = {renamed.get(n, n): w for n, w in s.weights.items()}
        update["segments"] = s.model_copy(update={"weights": weights})
    else:
        update["merge"] = tuple(
            r.model_copy(update={"sources": {renamed.get(s, s): c for s, c in r.sources.items()}})
            for r in recipe.merge or ()
        )
    if (route := recipe.route) is not None:
        ends = {"embed": route.embed, "final_norm": route.final_norm, "head": route.head}
        ends = {end: renamed.get(name, name) for end, name in ends.items()}
        hops = tuple(h.model_copy(update={"from_": renamed.get(h.from_, h.from_)}) for h in route.hops)
        update["route"] = route.model_copy(update={**ends, "hops": hops})
    return recipe.model_copy(update=update).to_json()
