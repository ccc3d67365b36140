"""Evaluate candidates and commit their results in candidate order: journal first, then the caller.

The worker count decides only who waits for whom; what is committed, and in which order, never depends on it.
A result that arrives before its turn is kept in `finished.jsonl`, so that a killed driver repeats no finished
evaluation; the file is emptied whenever nothing waits in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import RunError, UserError
from evomerge.journal import (
    Event,
    Journal,
    Lines,
    gradients_from_json,
    gradients_to_json,
    read_sealed,
    scores_from_json,
    scores_to_json,
    seal,
    whole,
)
from evomerge.proposal import GRADIENT_PRICE, Differentiated, Evaluation, ItemSet, Job, Scores, WorkUnit
from evomerge.recipe import Recipe, in_common
from evomerge.rundir import FINISHED, RunDirectory
from evomerge.workers import Executor

WAIT_SECONDS = 0.5
TOGETHER = 8
"""Jobs at most in a unit of routes that begin alike."""


class Interrupted(Exception):
    """The user asked to stop; everything acknowledged is in the journal."""


@dataclass
class ScoreCache:
    """Results by (recipe, item): what was evaluated once is never evaluated again, also across resumes."""

    _known: dict[str, list[tuple[ItemSet, Evaluation, bool]]] = field(default_factory=dict)
    """With whether the gradients were asked for."""

    def add(self, recipe_id: str, items: ItemSet, e: Evaluation, *, gradients: bool = False) -> None:
        """Remember one evaluation, a failed one too."""
        if self.get(recipe_id, items, gradients=gradients) is None:
            self._known.setdefault(recipe_id, []).append((items, e, gradients))

    def get(self, recipe_id: str, items: ItemSet, *, gradients: bool = False) -> Evaluation | None:
        """The result on `items`, put together from earlier evaluations where need be; None where an item is missing.

        With `gradients` only one that was asked for on just these items. A failure answers for its own kind of
        question: where the gradient failed, there may be scores.
        """
        known = self._known.get(recipe_id, [])
        for there, e, asked in known:
            if there.id == items.id and (asked == gradients or (asked and e.ok)):
                return e if gradients else replace(e, gradients=None)
        if gradients:
            return None
        scored = [(there, e.scores) for there, e, _ in known if e.scores is not None]
        if not scored:
            return None
        out: dict[str, dict[str, NDArray[np.float32]]] = {}
        for task, wanted in items.tasks.items():
            at: dict[int, tuple[Scores, int]] = {}
            for there, scores in scored:
                at.update({p: (scores, i) for i, p in enumerate(there.tasks.get(task, ()))})
            if any(p not in at for p in wanted):
                return None
            metrics = next(scores[task] for there, scores in scored if task in there.tasks)
            out[task] = {m: np.array([at[p][0][task][m][at[p][1]] for p in wanted], np.float32) for m in metrics}
        return Evaluation("ok", out)

    def missing(self, recipe_id: str, items: ItemSet) -> ItemSet:
        """The part of `items` that has no scores yet: `items` itself where nothing is known."""
        known: dict[str, set[int]] = {}
        for there, e, _ in self._known.get(recipe_id, []):
            for task, at in there.tasks.items() if e.scores is not None else ():
                known.setdefault(task, set()).update(at)
        left = {t: tuple(p for p in at if p not in known.get(t, ())) for t, at in items.tasks.items()}
        part = ItemSet(items.name, {t: at for t, at in left.items() if at})
        return part if part.count < items.count else items


class Committer:
    """Holds the journal, the executor and the cache of one run."""

    def __init__(
        self,
        journal: Journal,
        executor: Executor,
        rundir: RunDirectory,
        interrupted: Callable[[], bool],
        metrics: Mapping[str, Collection[str]] | None = None,
        gradient_shape: tuple[int, int] = (0, 0),
    ) -> None:
        """`interrupted` is looked at while results are awaited, never in the middle of a commit.

        `metrics` are those that each task's results must have to be taken from a file, `gradient_shape` is
        (n_blocks, 1 + n_experts).
        """
        self._metrics = metrics or {}
        self._gradient_shape = gradient_shape
        self._journal = journal
        self._executor = executor
        self._rundir = rundir
        self._interrupted = interrupted
        self._cache = ScoreCache()
        self._units = 0
        self.evaluated = 0
        """Item evaluations of all that was committed, those of a gradient included (`GRADIENT_PRICE`); what earlier
        scores answered is not counted."""
        self._parts: dict[_Key, ItemSet] = {}
        self._running: set[_Key] = set()
        self._promised: set[_Key] = set()
        self._finished = _Finished(rundir.path / FINISHED)

    def submit(
        self,
        group: list[tuple[int, Recipe]],
        items: ItemSet,
        *,
        rung: int = 0,
        together: bool = False,
        gradients: Differentiated = (),
    ) -> None:
        """Hand out what has to be evaluated of (proposal id, canonical recipe) pairs.

        Left out is what the journal, the cache or `finished.jsonl` has, and equal recipes after the first; of a
        recipe that was scored on some of the items only the others are evaluated.
        `together` makes one work unit of all, for one worker. With `gradients` all items are evaluated.
        """
        jobs = []
        for proposal, recipe in group:
            whole = (recipe.id, items.id, bool(gradients))
            if self._journal.will_tell(proposal, items.id):
                self._promised.add(whole)  # a copy further on shares its result, as it would have without the cut
            if whole in self._promised or self._cache.get(recipe.id, items, gradients=bool(gradients)) is not None:
                continue
            part = self._parts.setdefault(whole, items if gradients else self._cache.missing(recipe.id, items))
            key = (recipe.id, part.id, bool(gradients))
            if key in self._finished.waiting and not self._fits(self._finished.waiting[key], part, gradients):
                self._finished.take(key)
            if key in self._running or key in self._finished.waiting:
                continue
            self._running.add(key)
            jobs.append(Job(proposal, rung, recipe, part, gradients))
        for unit in [jobs] if together else alike(jobs):
            if unit:
                self._executor.submit(WorkUnit(self._units, tuple(unit)))
                self._units += 1

    def commit(
        self, proposal: int, recipe: Recipe, items: ItemSet, *, rung: int = 0, gradients: Differentiated = ()
    ) -> Evaluation:
        """The result of one submitted proposal, once it is in the journal. Raises Interrupted."""
        asked = bool(gradients)
        known = self._cache.get(recipe.id, items, gradients=asked)
        part = items if asked else self._cache.missing(recipe.id, items)
        if known is None:
            self.evaluated += part.count * (1 + GRADIENT_PRICE * asked)
        if self._journal.replaying:
            e = self._replayed(proposal, items, gradients)
            self._cache.add(recipe.id, items, e, gradients=asked)
            self._finished.take((recipe.id, part.id, asked))
            return e
        if known is not None:
            return self._told(proposal, items, known, rung, gradients, cached=True)
        part = self._parts.pop((recipe.id, items.id, asked), part)
        e = self._result((recipe.id, part.id, asked))
        if e.scores is not None and not asked:
            self._cache.add(recipe.id, part, e)
            e = self._cache.get(recipe.id, items) or e
        self._cache.add(recipe.id, items, e, gradients=asked)
        self._told(proposal, items, e, rung, gradients)
        self._finished.sweep()
        return e

    def close(self) -> None:
        """Close `finished.jsonl`."""
        self._finished.close()

    def _result(self, key: _Key) -> Evaluation:
        """Wait for one result; others that arrive meanwhile are kept."""
        while True:
            if (e := self._finished.take(key)) is not None:
                self._running.discard(key)
                return e
            if self._interrupted():
                raise Interrupted
            if key not in self._running:
                raise AssertionError("a result is awaited that was never submitted")
            found: Evaluation | None = None
            for job, e, telemetry in self._executor.wait(WAIT_SECONDS):
                here = (job.recipe.id, job.items.id, bool(job.gradients))
                self._running.discard(here)
                if here == key:
                    found = e
                else:
                    self._finished.keep(here, e)
                self._rundir.telemetry(job.proposal, job.items.name, telemetry)
            if found is not None:
                return found

    def _told(
        self,
        proposal: int,
        items: ItemSet,
        e: Evaluation,
        rung: int,
        gradients: Differentiated,
        *,
        cached: bool = False,
    ) -> Evaluation:
        extra = {"cached": True} if cached else {}
        self._journal.record("told", id=proposal, rung=rung, items=items.id, **_to_json(e, bool(gradients)), **extra)
        return e

    def _replayed(self, proposal: int, items: ItemSet, gradients: Differentiated) -> Evaluation:
        event = self._journal.take("told")
        if event.get("id") != proposal or event.get("items") != items.id:
            raise RunError(
                f"{self._journal.path} event {event['seq']}: the journal has results of candidate {event.get('id')} "
                f"where the replay has {proposal}; was it written by another version?"
            )
        try:
            e = _from_json(event)
        except (KeyError, TypeError, ValueError, AttributeError):
            e = None
        if e is None or not self._fits(e, items, gradients):
            raise UserError(f"{self._journal.path} event {event['seq']}: holds no result on these items")
        return e

    def _fits(self, e: Evaluation, items: ItemSet, gradients: Differentiated) -> bool:
        found = e.gradients or {}
        if {*found} != {task for task, _ in gradients if e.ok}:
            return False
        if not all(g.shape == self._gradient_shape and np.isfinite(g).all() for g in found.values()):
            return False
        return whole(e.status, e.scores, {t: len(at) for t, at in items.tasks.items()}, self._metrics)


_Key = tuple[str, str, bool]
"""Recipe id, item set id, and whether gradients are asked for."""


def alike(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs cut into units: one a unit, but routes that have at least half of their path in common stand together.

    A worker computes what neighbours in a unit have in common once. Units are small, so that many workers have some.
    """
    units: list[list[Job]] = []
    for job in sorted(jobs, key=lambda j: repr(j.recipe.path)):  # a stable sort: without routes, the order given
        path = job.recipe.path
        before = units[-1][-1].recipe.path if units else ()
        if path and before and len(units[-1]) < TOGETHER and 2 * in_common(path, before) >= min(len(path), len(before)):
            units[-1].append(job)
        else:
            units.append([job])
    return units


class _Finished:
    """Results that arrived before their turn; sealed lines, never fsynced."""

    def __init__(self, path: Path) -> None:
        self.waiting: dict[_Key, Evaluation] = {}
        events, good = read_sealed(path)
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # lines that `keep` did not write
            self.waiting = {(str(e["recipe_id"]), str(e["items"]), "gradients" in e): _from_json(e) for e in events}
        self._lines = Lines(path, good)
        self.sweep()

    def keep(self, key: _Key, e: Evaluation) -> None:
        self.waiting[key] = e
        self._lines.append(seal({"recipe_id": key[0], "items": key[1], **_to_json(e, key[2])}))

    def take(self, key: _Key) -> Evaluation | None:
        return self.waiting.pop(key, None)

    def sweep(self) -> None:
        if self._lines.size and not self.waiting:
            self._lines.clear()

    def close(self) -> None:
        self._lines.close()


def _to_json(e: Evaluation, asked: bool) -> Event:
    """With gradients where they were asked for, null where the job failed."""
    gradients = {"gradients": gradients_to_json(e.gradients)} if asked else {}
    return {"status": e.status, "reason": e.reason, "scores": scores_to_json(e.scores), **gradients}


def _from_json(event: Event) -> Evaluation:
    gradients = gradients_from_json(event.get("gradients"))
    return Evaluation(str(event["status"]), scores_from_json(event["scores"]), str(event["reason"]), gradients)
