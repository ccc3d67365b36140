"""What the loop in `run.py` carries along: candidates so far, and how one is asked and scored."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from evomerge.canonical import decode_array, encode_array
from evomerge.commit import Committer
from evomerge.config import fitness_of
from evomerge.errors import UserError
from evomerge.items import taken
from evomerge.journal import Journal
from evomerge.objective import Objective
from evomerge.pareto import Losses, order
from evomerge.prepare import Prepared
from evomerge.progress import Progress
from evomerge.proposal import Differentiated, Evaluation, ItemSet, Proposal, Result, Scores, frozen_genome
from evomerge.recipe import Recipe

References = tuple[Scores, Mapping[str, Scores]]
"""Scores of the base, and of the other baselines by name, on the same items."""


@dataclass(frozen=True)
class Candidate:
    """A proposal with its canonical recipe and its losses on the search split (+inf where it failed).

    `whole` says whether they are over all items: others are compared within their generation only.
    """

    proposal: Proposal
    recipe: Recipe
    role: str
    name: str = ""
    losses: Losses = field(default_factory=lambda: np.array([np.inf]))
    violation: float = 0.0
    whole: bool = True

    @property
    def id(self) -> int:
        """The proposal's number."""
        return self.proposal.id


@dataclass
class Session:
    """One pass through a journal."""

    prepared: Prepared
    journal: Journal
    committer: Committer
    progress: Progress
    ids: Iterator[int] = field(default_factory=itertools.count)
    candidates: dict[int, Candidate] = field(default_factory=dict)
    references: References | None = None
    """The baselines' scores on the search split."""
    spent: int = 0
    """Item evaluations of the search so far, without baselines, given recipes and what is scored again in full."""

    def __post_init__(self) -> None:
        self.whole = self.prepared.items["search"]
        self.spaces = list(self.prepared.spaces)
        """The stages' search spaces; one that builds on what was found before is put in its place when it begins."""
        self._announced = {i.id for i in self.prepared.items.values()}
        self._objectives: dict[str, Objective] = {}

    def ask(self, p: Proposal, *, stage: int, role: str, name: str = "") -> Candidate:
        """Journal one proposal. Where the journal already has it, its genome is the one that counts."""
        manifest = self.prepared.manifest
        space = self.spaces[stage] if stage >= 0 else None
        if p.recipe is not None:
            recipe = p.recipe
            body = {"recipe": recipe.to_json()}
        else:
            assert p.genome is not None
            assert space is not None
            recipe = space.decode(p.genome, manifest)
            body = {"genome": encode_array(p.genome)}
        event = self.journal.record(
            "asked",
            id=p.id,
            stage=stage,
            group=p.group,
            role=role,
            name=name,
            recipe_id=recipe.id,
            parents=list(p.parents),
            **body,
        )
        if "genome" in event and event["genome"] != body["genome"]:
            assert space is not None
            try:
                p = replace(p, genome=frozen_genome(decode_array(event["genome"])))
                assert p.genome is not None
                recipe = space.decode(p.genome, manifest)
            except ValueError:
                raise UserError(f"{self.journal.path} event {event['seq']}: no genome of this space") from None
        return Candidate(p, recipe, role, name)

    def submit(
        self,
        group: Sequence[Candidate],
        items: ItemSet,
        *,
        rung: int = 0,
        together: bool = False,
        gradients: Differentiated = (),
    ) -> None:
        """Hand candidates out for evaluation; `together` on one worker, and so on one device."""
        if group and items.id not in self._announced:
            self.journal.record("items", id=items.id, name=items.name, ids=self.prepared.item_ids(items))
            self._announced.add(items.id)
        pairs = [(c.id, c.recipe) for c in group]
        self.committer.submit(pairs, items, rung=rung, together=together, gradients=gradients)

    def commit(self, c: Candidate, items: ItemSet, *, rung: int = 0, gradients: Differentiated = ()) -> Evaluation:
        """The result of one submitted candidate; it is in the journal before it is returned."""
        e = self.committer.commit(c.id, c.recipe, items, rung=rung, gradients=gradients)
        self.progress.scored(c.role, items, e)
        return e

    def score(
        self, group: Sequence[Candidate], items: ItemSet, *, together: bool = False
    ) -> list[tuple[Candidate, Evaluation]]:
        """Submit and commit a whole group, in candidate order."""
        self.submit(group, items, together=together)
        return [(c, self.commit(c, items)) for c in group]

    def keep(self, c: Candidate, e: Evaluation, items: ItemSet) -> Result:
        """Add a candidate scored on items of the search split; returns what its optimizer is told.

        One that was scored on all items before keeps those losses, else the latest count.
        """
        objective = self.objective_on(items)
        losses, violation = objective.failed, 0.0
        measures = np.full(len(objective.spec.measures), np.nan)
        if e.scores is not None:
            losses, violation = objective.losses(e.scores), objective.violation(e.scores)
            measures = objective.measures(e.scores)
        whole = items.id == self.whole.id
        if whole or not (c.id in self.candidates and self.candidates[c.id].whole):
            self.candidates[c.id] = replace(c, losses=losses, violation=violation, whole=whole)
        self.progress.kept(c.id, c.role, losses, e, whole=whole)
        return Result(losses, e.status, e.scores or {}, violation, measures)

    def objective_on(self, items: ItemSet) -> Objective:
        """The objective with its references on items of the search split, which all baselines were scored on."""
        if items.id not in self._objectives:
            if len(self._objectives) > 64:  # halves and generations that are over
                self._objectives = {}
            assert self.references is not None
            base, others = self.references
            if items.id != self.whole.id:
                base = taken(base, self.whole, items)
                others = {n: taken(s, self.whole, items) for n, s in others.items()}
            self._objectives[items.id] = Objective.bind(fitness_of(self.prepared.experiment), base, others)
        return self._objectives[items.id]

    def losses_on(self, items: ItemSet) -> Callable[[Scores], Losses]:
        """Scores on items of the search split -> losses."""
        return self.objective_on(items).losses

    def bind(self, scored: Iterable[tuple[Candidate, Evaluation]]) -> Objective | None:
        """The objective with its references taken from the baselines' scores; None where the base failed."""
        found = references_of(scored)
        return None if found is None else Objective.bind(fitness_of(self.prepared.experiment), *found)

    def ranked(self) -> list[Candidate]:
        """Distinct recipes scored on the whole split, best on search first (see `pareto.order`); ties by number."""
        distinct: dict[str, Candidate] = {}
        for c in self.candidates.values():
            if c.whole and np.isfinite(c.losses).all():
                distinct.setdefault(c.recipe.id, c)
        group = sorted(distinct.values(), key=lambda c: c.id)
        if not group:
            return []
        violations = np.array([c.violation for c in group])
        return [group[i] for i in order(np.array([c.losses for c in group]), violations)]


def references_of(scored: Iterable[tuple[Candidate, Evaluation]]) -> References | None:
    """The base's scores, and those of the other baselines by name; None where the base failed."""
    base: Scores | None = None
    others: dict[str, Scores] = {}
    for c, e in scored:
        if c.role == "baseline" and e.scores is not None:
            if base is None and not c.recipe.blocks and c.recipe.route is None:
                base = e.scores
            else:
                others[c.name] = e.scores
    return None if base is None else (base, others)
