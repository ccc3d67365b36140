"""What the algorithms on Optuna's samplers share: a study in memory behind our ask and tell.

Optuna's own storages are not used: the journal is the truth, and resuming asks and tells again, which repeats
a seeded sampler exactly (tested for each). Axes are the unit cube: floats are floats, int and categorical axes are
distributions over their levels, so that a sampler sees them as what they are. Failed candidates are told as failed
trials, which no sampler learns from.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evomerge.pareto import Losses
from evomerge.proposal import Genome, Proposal, Result, frozen_genome
from evomerge.search.base import Ids, Start, check_renewed, check_told
from evomerge.space import Axis

LAST_BITS = 1e-6
"""Largest difference per gene that counts as the same genome on another host (as in the journal)."""


def import_optuna() -> Any:
    """Optuna, quiet. Takes a second the first time."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def made(build: Callable[[Any], Any]) -> Any:
    """What `build(optuna)` makes, without Optuna's warnings that parts of it may change in later versions."""
    optuna = import_optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return build(optuna)


def renewing(sampler: type, renewed: Mapping[int, Any]) -> Any:
    """A class of Optuna's genetic samplers whose parents may have new results: trial number -> the trial as it is now.

    A finished trial of a study cannot change. Who survives and who mates is chosen among what
    `get_parent_population` returns, so that is where new results take the place of the old ones.
    """

    class Renewing(sampler):  # type: ignore[misc]
        def get_parent_population(self, study: Any, generation: int) -> list[Any]:
            return [renewed.get(t.number, t) for t in super().get_parent_population(study, generation)]

    return Renewing


class Trials:
    """A study over the axes: trials asked, told and waiting."""

    def __init__(
        self, axes: Sequence[Axis], start: Start, ids: Ids, sampler: Any, objectives: int, *, others: int = 0
    ) -> None:
        """The start and at most `others` more of its points are asked first."""
        self._optuna = import_optuna()
        self._axes = tuple(axes)
        self._ids = ids
        self._objectives = objectives
        self._given = [start.genome, *start.others[:others]]
        self._recall = start.recall
        self._constrained = start.constrained
        if start.genome.shape != (len(axes),):
            raise ValueError(f"the start has {start.genome.shape[0]} genes, the space {len(axes)} axes")
        self._distributions = {a.name: self._distribution(a) for a in axes}
        self.study = self._optuna.create_study(sampler=sampler, directions=["minimize"] * objectives)
        self._waiting: dict[int, tuple[Any, Genome]] = {}
        self._told: dict[int, int] = {}
        """Trial number -> proposal, of those that did not fail."""

    def _distribution(self, axis: Axis) -> Any:
        d = self._optuna.distributions
        if axis.kind == "float":
            return d.FloatDistribution(0.0, 1.0)
        assert axis.levels is not None
        if axis.kind == "int":
            return d.IntDistribution(0, axis.levels - 1)
        return d.CategoricalDistribution(tuple(range(axis.levels)))

    def _params(self, genome: Genome) -> dict[str, float | int]:
        return {
            a.name: float(u) if a.levels is None else min(int(u * a.levels), a.levels - 1)
            for a, u in zip(self._axes, genome, strict=True)
        }

    def _genome(self, params: Mapping[str, Any]) -> Genome:
        return frozen_genome(
            [params[a.name] if a.levels is None else (params[a.name] + 0.5) / a.levels for a in self._axes]
        )

    @property
    def waiting(self) -> int:
        """How many trials were asked and not told."""
        return len(self._waiting)

    def ask(self, group: int, sampler: Any = None) -> Proposal:
        """One trial of the study's sampler, or of one made for this ask, which a recalled genome spares."""
        number = next(self._ids)
        known = self._given.pop(0) if self._given else None
        if sampler is not None:
            recalled = self._recall(number)
            if recalled is not None:
                known, sampler = recalled, self._optuna.samplers.RandomSampler(seed=0)
            self.study.sampler = sampler
        if known is not None:
            self.study.enqueue_trial(self._params(known))
        trial = self.study.ask(self._distributions)
        if known is not None:
            # A trial with given parameters asks its sampler nothing, which would leave it outside of every generation:
            # NSGA would drop the start and fill a second generation with uniform points.
            _ = trial.relative_params
        genome = self._genome(trial.params)
        self._waiting[number] = (trial, genome)
        return Proposal(number, group, genome=genome)

    def add(self, genome: Genome, losses: Losses) -> None:
        """A candidate of the first generation that was scored already; the start is not asked then."""
        self._given = []
        self.study.enqueue_trial(self._params(genome))
        trial = self.study.ask(self._distributions)
        _ = trial.relative_params  # as in `ask`
        self.study.tell(trial, losses.tolist())

    def tell(self, p: Proposal, r: Result) -> bool:
        """Report one result; False where it failed. Raises ValueError for a stranger and for NaN losses."""
        check_told(p, r, self._waiting, self._objectives)
        trial, asked = self._waiting.pop(p.id)
        state = self._optuna.trial.TrialState
        if not np.isfinite(r.losses).all():
            self.study.tell(trial, state=state.FAIL)
            return False
        assert p.genome is not None
        if np.max(np.abs(p.genome - asked)) > LAST_BITS:
            # A journal of another host, accepted all the same: the point that was scored is the one to learn from.
            attributes = dict(trial.system_attrs)
            self.study.tell(trial, state=state.FAIL)
            trial = self._optuna.trial.create_trial(
                params=self._params(p.genome),
                distributions=self._distributions,
                values=r.losses.tolist(),
                system_attrs=attributes,
            )
            self.study.add_trial(trial)
            self._told[self.study.get_trials(deepcopy=False)[-1].number] = p.id
            return True
        if self._constrained:
            trial.set_constraint("fitness", r.violation)
        self.study.tell(trial, r.losses.tolist())
        self._told[trial.number] = p.id
        return True

    def parents(self, generation: int) -> dict[int, Any]:
        """Proposal -> trial of those that survived to be a generation's parents; for genetic samplers.

        They are chosen at the first look, when the generation before must be told.
        """
        return {self._told[t.number]: t for t in self.study.sampler.get_parent_population(self.study, generation)}

    def with_results(self, trials: Mapping[int, Any], results: Mapping[int, Result]) -> dict[int, Any]:
        """Trial number -> copy of the trial with a new result. Raises ValueError for strangers and for NaN losses."""
        check_renewed(results, trials)
        out = {}
        for i, r in results.items():
            trial = out[trials[i].number] = copy.copy(trials[i])
            trial.values = r.losses.tolist()
            if self._constrained:
                trial.system_attrs = {k: v for k, v in trial.system_attrs.items() if not k.startswith("constraints:")}
                trial.set_constraint("fitness", r.violation)
        return out
