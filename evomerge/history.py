"""A run as its files tell it: candidates, scores, the winner. Reads only; works on finished and on live runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from evomerge.canonical import decode_array
from evomerge.config import Experiment, fitness_of, load
from evomerge.errors import UserError
from evomerge.items import split_half, taken
from evomerge.journal import Event, read, scores_from_json, whole
from evomerge.manifest import Manifest
from evomerge.objective import Objective
from evomerge.pareto import Losses
from evomerge.prepare import bind_spaces, needed_metrics
from evomerge.proposal import GRADIENT_PRICE, Evaluation, ItemSet, Scores, frozen_genome
from evomerge.recipe import Recipe
from evomerge.rundir import BUDGET, EXPERIMENT, JOURNAL
from evomerge.schema import validated
from evomerge.space import SearchSpace
from evomerge.tasks.base import SPLITS


@dataclass
class Entry:
    """One candidate of the journal. `results` has its evaluations by split, `samples` those on some of the search items
    by the name of the item set, `renewed` those of the samples that belong to later generations."""

    id: int
    stage: int
    group: int
    role: str
    name: str
    recipe_id: str
    genome: Any
    recipe_json: Any
    parents: tuple[int, ...] = ()
    results: dict[str, Evaluation] = field(default_factory=dict)
    samples: dict[str, Evaluation] = field(default_factory=dict)
    renewed: set[str] = field(default_factory=set)

    def scores(self, split: str) -> Scores | None:
        """Scores on a split, None where it was not scored there or failed."""
        result = self.results.get(split)
        return None if result is None else result.scores


@dataclass(frozen=True)
class Generation:
    """What a generation was scored on: `items` of each rung, how many `members` began and went on, and the split-half
    rank correlation of its first rung (NaN where there were too few members)."""

    stage: int
    group: int
    items: tuple[int, ...]
    members: tuple[int, ...]
    correlation: float


@dataclass(frozen=True)
class History:
    """A run directory, decoded."""

    path: Path
    experiment: Experiment
    manifest: Manifest
    dtype: Any
    facts: Event
    entries: Mapping[int, Entry]
    item_ids: Mapping[str, Mapping[str, list[str]]]
    final: Event | None
    stopped: bool
    looks: int
    """How often winners were scored on the report split: once, and once more for each extension."""
    cached: int
    """Candidates answered from earlier scores."""
    samples: Mapping[str, ItemSet] = field(default_factory=dict)
    """Name -> positions in the search split's items, of the samples that generations were scored on."""
    evaluated: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    """Split -> item evaluations, samples among those of search; what earlier scores answered is not counted."""
    merged: Mapping[int, int] = field(default_factory=dict)
    """Stage -> the candidate whose merge its routes go through, where an earlier stage found one."""
    gradients: bool = False
    """Whether some of them are those of gradients, which count with their price."""
    ended_by: str | None = None
    """The algorithm that ended the search by itself, with its reasons; None where the budget did, or it goes on."""

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a run directory. Raises UserError where it is none, or damaged."""
        path = Path(path)
        if not (path / JOURNAL).is_file():
            raise UserError(f"{path}: is no run directory (no {JOURNAL}); expected what `evomerge run` wrote")
        experiment = load_resolved(path)
        events, _ = read(path / JOURNAL)
        if not events or events[0]["kind"] != "run":
            raise UserError(f"{path / JOURNAL}: holds no run yet; start it again with the same command")
        try:
            return cls._decoded(path, experiment, events)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            if isinstance(e, UserError):
                raise
            raise UserError(f"{path / JOURNAL}: an event lacks what it should hold ({e!r})") from None

    @classmethod
    def _decoded(cls, path: Path, experiment: Experiment, events: list[Event]) -> Self:
        names: dict[str, str] = {}
        item_ids: dict[str, Any] = {}
        entries: dict[int, Entry] = {}
        metrics = needed_metrics(experiment)
        final = None
        samples: dict[str, ItemSet] = {}
        places: dict[str, dict[str, int]] = {}
        seen: dict[str, dict[str, set[str]]] = {}
        evaluated = dict.fromkeys(SPLITS, 0)
        looks = cached = 0
        merged: dict[int, int] = {}
        gradients = False
        for e in events:
            if e["kind"] == "items":
                name = names[e["id"]] = str(e["name"])
                item_ids[name] = {str(t): [str(i) for i in ids] for t, ids in e["ids"].items()}
                if name == "search":
                    places = {t: {i: n for n, i in enumerate(ids)} for t, ids in item_ids[name].items()}
                elif name not in SPLITS:
                    samples[name] = ItemSet(
                        name, {t: tuple(places[t][i] for i in x) for t, x in item_ids[name].items()}
                    )
            elif e["kind"] == "asked":
                entries[e["id"]] = Entry(
                    _typed(e, "id", int),
                    _typed(e, "stage", int),
                    _typed(e, "group", int),
                    _typed(e, "role", str),
                    _typed(e, "name", str),
                    _typed(e, "recipe_id", str),
                    e.get("genome"),
                    e.get("recipe"),
                    tuple(int(p) for p in e.get("parents", ())),
                )
            elif e["kind"] == "told":
                result = Evaluation(str(e["status"]), scores_from_json(e["scores"]), str(e["reason"]))
                name = names[e["items"]]
                counts = {t: len(ids) for t, ids in item_ids[name].items()}
                if not whole(result.status, result.scores, counts, metrics):
                    raise ValueError(f"candidate {e['id']} has no result on these items")
                entry = entries[e["id"]]
                if name in samples and e["rung"] == 0 and (entry.samples or entry.results):
                    entry.renewed.add(name)  # a candidate begins only once
                (entry.samples if name in samples else entry.results)[name] = result
                cached += bool(e.get("cached")) and name not in ("select", "report")
                gradients |= "gradients" in e
                for task, ids in item_ids[name].items() if not e.get("cached") else ():
                    known = seen.setdefault(entry.recipe_id, {}).setdefault(task, set())
                    price = len(ids) * (1 + GRADIENT_PRICE) if "gradients" in e else len({*ids} - known)
                    evaluated["search" if name in samples else name] += price
                    known.update(ids if result.ok else ())
            elif e["kind"] == "stage" and "merged" in e["inputs"]:
                merged[_typed(e, "n", int)] = _typed(e["inputs"], "merged", int)
            elif e["kind"] == "final":
                final = {**e, "winner": entries[e["winner"]].id, "finalists": [entries[i].id for i in e["finalists"]]}
                if "front" in e:
                    final["front"] = [entries[i].id for i in e["front"]]
                looks += 1
        manifest = Manifest.from_json(events[0]["manifest"])
        stopped = events[-1]["kind"] == "stop"
        return cls(
            path,
            experiment,
            manifest,
            events[0]["dtype"],
            events[0],
            entries,
            {s: ids for s, ids in item_ids.items() if s not in samples},
            final,
            stopped,
            looks,
            cached,
            samples,
            evaluated,
            merged,
            gradients,
            _printable(_typed(events[-1], "reason", str)) if stopped and events[-1]["reason"] != BUDGET else None,
        )

    # -- candidates ---------------------------------------------------------------------------------------

    @cached_property
    def spaces(self) -> tuple[SearchSpace, ...]:
        """The search space of each stage."""
        return bind_spaces(self.experiment, self.manifest, self.dtype)

    def space(self, stage: int) -> SearchSpace:
        """The search space of a stage, around what an earlier stage found where it has routes through that."""
        if stage not in self._spaces_around:
            space, merged = self.spaces[stage], self.merged.get(stage)
            # Only what an earlier stage asked for: a journal from elsewhere must not lead in circles.
            if merged is not None and self.entry(merged).stage < stage:
                space = space.around(self.recipe(merged))
            self._spaces_around[stage] = space
        return self._spaces_around[stage]

    @cached_property
    def _spaces_around(self) -> dict[int, SearchSpace]:
        return {}

    def recipe(self, candidate: int) -> Recipe:
        """The canonical recipe of a candidate. Raises UserError for an unknown number."""
        entry = self.entry(candidate)
        if entry.recipe_json is not None:
            where = f"candidate {candidate}"
            recipe = validated(Recipe, entry.recipe_json, where).canonical(self.manifest, where)
        else:
            try:
                genome = frozen_genome(decode_array(entry.genome))
                recipe = self.space(entry.stage).decode(genome, self.manifest)
            except (ValueError, TypeError, IndexError) as e:
                raise UserError(f"{self.path}: candidate {candidate} has no genome of its space ({_line(e)})") from None
        if recipe.id != entry.recipe_id:
            raise UserError(f"{self.path}: candidate {candidate} decodes to another recipe than the journal names")
        return recipe

    def entry(self, candidate: int) -> Entry:
        """A candidate by number. Raises UserError naming the range."""
        if candidate not in self.entries:
            raise UserError(f"{self.path}: no candidate {candidate}; there are 0 to {max(self.entries, default=0)}")
        return self.entries[candidate]

    @property
    def winner_id(self) -> int | None:
        """Number of the winner, None while the run goes on."""
        return None if self.final is None else int(self.final["winner"])

    @property
    def winner(self) -> Recipe:
        """The winning recipe. Raises UserError while there is none."""
        if self.winner_id is None:
            raise UserError(f"{self.path}: the run has no winner yet; finish it with `evomerge resume {self.path}`")
        return self.recipe(self.winner_id)

    @property
    def baselines(self) -> dict[str, Entry]:
        """Baselines by name."""
        return {e.name: e for e in self.entries.values() if e.role == "baseline"}

    def objective(self, split: str) -> Objective | None:
        """The objective with its references on a split, None before the baselines are scored there."""
        scores = {n: s for n, e in self.baselines.items() if (s := e.scores(split)) is not None}
        base = scores.pop(self.manifest.base, None)
        return None if base is None else Objective.bind(fitness_of(self.experiment), base, scores)

    def losses_on(self, items: ItemSet) -> Callable[[Scores], Losses]:
        """Scores on some of the search split's items -> losses, with the references on the same items."""
        whole = ItemSet("search", {t: tuple(range(len(ids))) for t, ids in self.item_ids["search"].items()})
        scores = {n: taken(s, whole, items) for n, e in self.baselines.items() if (s := e.scores("search")) is not None}
        base = scores.pop(self.manifest.base)
        return Objective.bind(fitness_of(self.experiment), base, scores).losses

    @cached_property
    def generations(self) -> tuple[Generation, ...]:
        """The generations that were scored on samples of the items, in order; none where all are scored in full."""
        out = []
        for (stage, group), rungs in self._sampled().items():
            items, scored = rungs[0]
            scores = [r.scores for r in scored if r.scores is not None]
            rho = split_half(scores, items, (self.experiment.search.seed, stage), group, self.losses_on)
            sizes = tuple(i.count for i, _ in rungs)
            out.append(Generation(stage, group, sizes, tuple(len(r) for _, r in rungs), rho))
        return tuple(out)

    @property
    def in_full(self) -> int:
        """Item evaluations that scoring the search split's candidates in full takes; copies are scored once."""
        size = sum(len(ids) for ids in self.item_ids["search"].values())
        return size * len({e.recipe_id for e in self.entries.values() if e.samples or "search" in e.results})

    def _sampled(self) -> dict[tuple[int, int], list[tuple[ItemSet, list[Evaluation]]]]:
        """(stage, group) -> the item set of each rung with the results on it."""
        out: dict[tuple[int, int], dict[str, list[Evaluation]]] = {}
        for e in self.entries.values():
            for name, result in e.samples.items():
                if name in e.renewed:
                    continue
                out.setdefault((e.stage, e.group), {}).setdefault(name, []).append(result)
        return {at: [(self.samples[n], r) for n, r in rungs.items()] for at, rungs in out.items()}

    @cached_property
    def objectives(self) -> dict[str, Objective | None]:
        """Split -> the objective with its references there."""
        return {s: self.objective(s) for s in self.item_ids}

    @property
    def goals(self) -> tuple[str, ...]:
        """Names of the objectives, in the order of the losses."""
        return tuple(g.name for g in fitness_of(self.experiment).goals)

    def losses(self, entry: Entry, split: str) -> Losses:
        """A candidate's losses on a split or sample, shape (n_objectives,); +inf where failed, NaN where unscored."""
        if split in entry.samples and (sampled := entry.samples[split].scores) is not None:
            return self.losses_on(self.samples[split])(sampled)
        if split not in entry.results and split not in entry.samples:
            return np.full(len(self.goals), math.nan)
        scores, objective = entry.scores(split), self.objectives.get(split)
        return np.full(len(self.goals), math.inf) if scores is None or objective is None else objective.losses(scores)

    def loss(self, entry: Entry, split: str) -> float:
        """A candidate's first loss on a split: its only one where there is one objective."""
        return float(self.losses(entry, split)[0])

    @property
    def front(self) -> tuple[int, ...]:
        """Numbers of the non-dominated finalists on the select split, the winner first; empty while there are none.

        With one objective the winner alone.
        """
        if self.final is None:
            return ()
        winner = int(self.final["winner"])
        return (winner, *(i for i in self.final.get("front", ()) if i != winner))

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """One row per candidate and split: id, role, name, stage, group, split, status, reason, mean scores.

        The losses stand under `loss`, or under `loss.<name>` for each of several objectives.
        """
        titles = ["loss"] if len(self.goals) == 1 else [f"loss.{g}" for g in self.goals]
        rows = []
        for e in self.entries.values():
            for split, result in e.results.items():
                means: dict[str, float] = {}
                if result.scores is not None:
                    means = {
                        f"{t.name}.{t.report_metric}": float(np.mean(result.scores[t.name][t.report_metric]))
                        for t in self.experiment.tasks
                    }
                rows.append(
                    {
                        "id": e.id,
                        "role": e.role,
                        "name": e.name,
                        "stage": e.stage,
                        "group": e.group,
                        "split": split,
                        "status": result.status,
                        "reason": result.reason,
                        **dict(zip(titles, self.losses(e, split).tolist(), strict=True)),
                        **means,
                    }
                )
        return rows

    def source_paths(self) -> dict[str, Path]:
        """Where the sources lie, by name."""
        models = self.experiment.models
        return {self.manifest.base: Path(models.base), **{n: Path(p) for n, p in models.experts.items()}}


def saved_text(used: int, full: int, *, gradients: bool) -> str:
    """What a search on samples of the items took, against full scoring; gradients, which cost more, are told apart."""
    if not gradients:
        return f"sampled items: {used:,} of the {full:,} item evaluations of full scoring on search ({used / full:.0%})"
    return (
        f"sampled items: {used:,} item evaluations on search, an item of a gradient step counted {1 + GRADIENT_PRICE} "
        f"times, against {full:,} of scoring its candidates on all items without gradients ({used / full:.0%})"
    )


def load_resolved(path: Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The resolved experiment of a run directory. Raises UserError."""
    file = path / EXPERIMENT
    if not file.is_file():
        raise UserError(f"{path}: is no run directory (no {EXPERIMENT}); expected what `evomerge run` wrote")
    return load(file, overrides)


def _typed(event: Event, key: str, kind: type) -> Any:
    if type(event[key]) is not kind:
        raise ValueError(f"{key} is {event[key]!r}")
    return event[key]


def _printable(text: str) -> str:
    """A journal may hold any text: no line breaks, no escapes for terminals."""
    return text if text.isprintable() else repr(text)


def _line(e: Exception) -> str:
    return " ".join(str(e).split())
