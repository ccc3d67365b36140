"""A search told by GP-IRT, for comparison with adaptive items told by the sample's mean.

`python experiments/irt/search.py [SEED ...]` writes search.json beside this file. The search is that of
experiments/adaptive_items, with its coarse run, its budgets and the probability of the right choice. Every five
generations M2PL is fitted on all responses of the run so far; from then on candidates on a sample of the items have the
losses of `irt.py`'s GP-IRT, task by task. What is chosen at the end is scored in full as ever. The estimator is no
option of `evomerge` (README.md says why), so the one place where losses come from is replaced.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from irt import Array, Items, ability, fit, sigmoid

from evomerge.proposal import Evaluation, ItemSet, Result, Scores
from evomerge.run import run
from evomerge.session import Candidate, Session
from evomerge.warm import finalists_of

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "adaptive_items"))
from adaptive_items import BUDGETS, COARSE, experiment, row  # noqa: E402

METRIC = "probability"
AGAIN = 5
"""Generations from one fit to the next, the first one among them."""


class GpIrt:
    """What a run has seen of every recipe, and the items fitted on it."""

    def __init__(self, whole: ItemSet) -> None:
        ends = np.cumsum([0, *(len(at) for at in whole.tasks.values())])
        self._columns = {t: np.arange(a, b) for t, a, b in zip(whole.tasks, ends, ends[1:], strict=False)}
        self._place = {t: {p: i for i, p in enumerate(at)} for t, at in whole.tasks.items()}
        self._seen: dict[str, Array] = {}
        self._items: Items | None = None
        self._group = 0

    def _taken(self, items: ItemSet) -> dict[str, Array]:
        return {t: self._columns[t][[self._place[t][p] for p in at]] for t, at in items.tasks.items()}

    def add(self, recipe: str, scores: Scores, items: ItemSet) -> None:
        """Remember one evaluation."""
        seen = self._seen.setdefault(recipe, np.full(sum(map(len, self._columns.values())), np.nan))
        for task, at in self._taken(items).items():
            seen[at] = scores[task][METRIC]

    def begin(self, group: int) -> None:
        """A generation begins: fit where it is time to."""
        if group != self._group and group % AGAIN == 0:
            self._items, _ = fit(np.array(list(self._seen.values())), 8, slopes=True)
        self._group = group

    def whole(self, scores: Scores, items: ItemSet) -> Scores | None:
        """The mean over all items of each task, as the score of a single one; None before the first fit."""
        if self._items is None:
            return None
        slopes, difficulty, taken = self._items.slopes, self._items.difficulty, self._taken(items)
        at = np.concatenate(list(taken.values()))
        y = np.concatenate([scores[t][METRIC] for t in taken]).astype(np.float64)
        theta = ability(y[None], slopes[at], difficulty[at], np.zeros(slopes.shape[1]))
        p = sigmoid(slopes @ theta[0] - difficulty)
        out = {}
        for task, own in taken.items():
            plain = float(np.mean(scores[task][METRIC], dtype=np.float64))
            rest = np.setdiff1d(self._columns[task], own)
            filled = (len(own) * plain + p[rest].sum()) / len(self._columns[task])
            out[task] = {METRIC: np.array([(plain + filled) / 2])}
        return out


def told_by_gp_irt() -> None:
    """Replace what optimizers are told of candidates on a sample."""
    keep = Session.keep

    def estimated(s: Session, c: Candidate, e: Evaluation, items: ItemSet) -> Result:
        r = keep(s, c, e, items)
        gp = s.__dict__.setdefault("gp_irt", GpIrt(s.whole))
        if e.scores is None:
            return r
        if items.id != s.whole.id:
            gp.begin(c.proposal.group)
            if (scores := gp.whole(e.scores, items)) is not None:
                r = replace(r, losses=s.losses_on(s.whole)(scores))
        gp.add(c.recipe.id, e.scores, items)
        return r

    Session.keep = estimated  # type: ignore[method-assign]


def main(seeds: list[int]) -> None:
    """Run what is missing into runs/irt."""
    coarse = experiment("full", METRIC, 1, COARSE)
    run(coarse, Path("runs") / "adaptive-items" / "coarse-1")
    start = finalists_of(Path("runs") / "adaptive-items" / "coarse-1", coarse)[:1]
    told_by_gp_irt()
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for budget in BUDGETS["adaptive"]:
            history = run(experiment("adaptive", METRIC, seed, budget, start), Path("runs") / "irt" / f"gp-irt-{seed}")
            rows.append({**row(history, "adaptive", METRIC, seed, budget), "estimate": "gp-irt"})
            print(seed, budget, rows[-1]["evaluated"], f"{rows[-1]['probability']:.4f}", flush=True)
    (HERE / "search.json").write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [1, 2, 3])
