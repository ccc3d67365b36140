"""Evaluate a group and commit its results in candidate order: journal first, then the caller.

The worker count decides only who waits for whom; what is committed, and in which order, never depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from evomerge.errors import RunError
from evomerge.journal import Journal, scores_from_json, scores_to_json
from evomerge.proposal import Evaluation, ItemSet, Job, Scores, WorkUnit
from evomerge.recipe import Recipe
from evomerge.rundir import RunDirectory
from evomerge.workers import Executor

WAIT_SECONDS = 1.0


@dataclass
class ScoreCache:
    """Scores by (recipe, item): what was scored once is never scored again, also across resumes."""

    _known: dict[str, list[tuple[ItemSet, Scores]]] = field(default_factory=dict)

    def add(self, recipe_id: str, items: ItemSet, scores: Scores) -> None:
        """Remember the scores of one evaluation."""
        self._known.setdefault(recipe_id, []).append((items, scores))

    def get(self, recipe_id: str, items: ItemSet) -> Scores | None:
        """The scores of all `items`, put together from earlier evaluations, or None where one is missing."""
        known = self._known.get(recipe_id, [])
        for there, scores in known:
            if there.id == items.id:
                return scores
        if not known:
            return None
        out: dict[str, dict[str, np.ndarray]] = {}
        for task, wanted in items.tasks.items():
            at: dict[int, tuple[Scores, int]] = {}
            for there, scores in known:
                at.update({p: (scores, i) for i, p in enumerate(there.tasks.get(task, ()))})
            if any(p not in at for p in wanted):
                return None
            metrics = at[wanted[0]][0][task] if wanted else {}
            out[task] = {m: np.array([at[p][0][task][m][at[p][1]] for p in wanted], np.float32) for m in metrics}
        return out


class Committer:
    """Holds the journal, the executor and the cache of one run."""

    def __init__(self, journal: Journal, executor: Executor, rundir: RunDirectory) -> None:
        self._journal = journal
        self._executor = executor
        self._rundir = rundir
        self._cache = ScoreCache()
        self._units = 0
        self.cached = 0
        """Candidates answered from earlier scores in this sitting."""

    def evaluate(self, group: Sequence[tuple[int, Recipe]], items: ItemSet) -> Iterator[tuple[int, Evaluation]]:
        """Score (proposal id, canonical recipe) pairs; yields in the given order, each after its journal entry.

        Recorded results are replayed; equal recipes are evaluated once.
        """
        recorded = {e["id"] for e in self._journal.upcoming("told")}
        fresh: dict[str, Evaluation] = {}
        submitted: set[str] = set()
        for proposal, recipe in group:
            if proposal in recorded:
                submitted.add(recipe.id)  # a copy further on shares its result, as it would have without the cut
                continue
            if recipe.id in submitted or self._cache.get(recipe.id, items) is not None:
                continue
            submitted.add(recipe.id)
            self._executor.submit(WorkUnit(self._units, (Job(proposal, 0, recipe, items),)))
            self._units += 1
        for proposal, recipe in group:
            if proposal in recorded:
                evaluation = self._replayed(proposal, items)
                fresh.setdefault(recipe.id, evaluation)
                if evaluation.ok and evaluation.scores is not None and self._cache.get(recipe.id, items) is None:
                    self._cache.add(recipe.id, items, evaluation.scores)
                yield proposal, evaluation
                continue
            known = self._cache.get(recipe.id, items)
            if known is not None:
                self.cached += 1
                yield proposal, self._told(proposal, items, Evaluation("ok", known), cached=True)
                continue
            while recipe.id not in fresh:
                for job, evaluation, telemetry in self._executor.wait(WAIT_SECONDS):
                    fresh[job.recipe.id] = evaluation
                    self._rundir.telemetry(job.proposal, items.name, telemetry)
            evaluation = fresh[recipe.id]
            if evaluation.scores is not None:
                self._cache.add(recipe.id, items, evaluation.scores)
            yield proposal, self._told(proposal, items, evaluation)

    def _told(self, proposal: int, items: ItemSet, e: Evaluation, *, cached: bool = False) -> Evaluation:
        extra = {"cached": True} if cached else {}
        self._journal.record(
            "told",
            id=proposal,
            rung=0,
            items=items.id,
            status=e.status,
            reason=e.reason,
            scores=scores_to_json(e.scores),
            **extra,
        )
        return e

    def _replayed(self, proposal: int, items: ItemSet) -> Evaluation:
        event = self._journal.take()
        if event["id"] != proposal or event["items"] != items.id:
            raise RunError(
                f"{self._journal.path} event {event['seq']}: the journal has results of candidate {event['id']} "
                f"where the replay has {proposal}; was it written by another version?"
            )
        return Evaluation(event["status"], scores_from_json(event["scores"]), event["reason"])
