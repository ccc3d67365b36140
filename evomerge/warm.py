"""Warm starts: an earlier run's finalists as recipes of a new experiment, matched by content hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from evomerge.config import Experiment
from evomerge.errors import UserError
from evomerge.history import History
from evomerge.pareto import order
from evomerge.prepare import open_pool


def finalists_of(path: Path, experiment: Experiment) -> list[dict[str, Any]]:
    """The finalists of the run in `path`, best on its select split first, in the names of the new pool.

    Baselines are left out: the new run scores its own. Raises UserError where a source is not in the new pool.
    """
    history = History.read(path)
    if history.final is None:
        raise UserError(f"{path}: has no finalists yet; finish it with `evomerge resume {path}`")
    manifest = open_pool(experiment).manifest()
    name_of = {digest: name for name, digest in manifest.hashes.items()}
    numbers = sorted(history.final["finalists"])
    losses = np.array([np.atleast_1d(history.final["losses"][str(i)]) for i in numbers])
    out = []
    for number in (numbers[i] for i in order(losses)):
        if history.entry(number).role == "baseline":
            continue
        recipe = history.recipe(number)
        renamed = {}
        for name, source in recipe.sources.items():
            if source.sha256 not in name_of:
                raise UserError(
                    f"{path}: its source {name!r} is not in the new pool; a warm start needs all old sources"
                )
            renamed[name] = name_of[source.sha256]
        sources = {renamed[n]: s for n, s in recipe.sources.items()}
        update: dict[str, Any] = {"base": renamed[recipe.base], "sources": sources}
        if (s := recipe.segments) is not None:
            update["segments"] = s.model_copy(update={"weights": {renamed[n]: w for n, w in s.weights.items()}})
        else:
            update["merge"] = tuple(
                r.model_copy(update={"sources": {renamed[s]: c for s, c in r.sources.items()}})
                for r in recipe.blocks.values()
            )
        out.append(recipe.model_copy(update=update).to_json())
    return out
