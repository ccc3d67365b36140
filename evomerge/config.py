"""Experiment: the typed, validated YAML. Everything it names is found and checked before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evomerge.canonical import digest
from evomerge.errors import UserError, nearest
from evomerge.fitness import FitnessSpec, resolve_fitness
from evomerge.hub import named
from evomerge.library import find
from evomerge.manifest import RESERVED
from evomerge.mergekit_evolve import is_genome_file
from evomerge.recipe import Recipe
from evomerge.schema import validated
from evomerge.search import ALGORITHMS, make_options, needs_of
from evomerge.search.auto import AUTO
from evomerge.space import SpaceSpec
from evomerge.tasks import Task
from evomerge.yamlio import dump_yaml, load_yaml, parse_yaml


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Models(_Part):
    """The pool: folders, relative to the experiment's file, or hub ids such as org/name or org/name@revision."""

    base: str
    experts: Mapping[str, str] = Field(min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: as the base is stored")

    @model_validator(mode="after")
    def _names(self) -> Models:
        for name in self.experts:
            if not name.replace("-", "").replace("_", "").isalnum() or name in RESERVED:
                raise ValueError(
                    f"experts: the name {name!r} is reserved or has other signs than letters, digits, - and _"
                )
        return self


class Stage(_Part):
    """One stage of a staged search; the first starts at the space's default, others at the best so far."""

    space: str | SpaceSpec
    share: float = Field(gt=0, le=1, description="of the budget")
    algorithm: str | None = None
    settings: Mapping[str, bool | int | float | str] = Field(
        default_factory=dict, description="override those of `search`"
    )


class StagedSpec(_Part):
    """Search spaces one after the other, coarse to fine."""

    description: str = ""
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _whole(self) -> StagedSpec:
        total = sum(s.share for s in self.stages)
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"stages: shares must sum to 1, got {total:g}")
        return self


class Budget(_Part):
    """When to stop; exactly one kind. Baselines and the re-scoring of finalists come on top."""

    evaluations: int | None = Field(None, gt=0)
    minutes: float | None = Field(None, gt=0)
    item_evaluations: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [n for n in ("evaluations", "minutes", "item_evaluations") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of evaluations, minutes, item_evaluations is needed, got {given or 'none'}")
        return self

    def exceeds(self, other: Budget) -> bool:
        """True for a larger budget of the same kind."""
        for name in ("evaluations", "minutes", "item_evaluations"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None:
                return bool(mine > theirs)
        return False


class SampleItems(_Part):
    """Fresh common items for each generation, always as many."""

    policy: Literal["sample"]
    count: int = Field(192, ge=2, description="items of a generation, over all tasks")


class AdaptiveItems(_Part):
    """Fresh common items for each generation, as many as rank its members alike by either half of them."""

    policy: Literal["adaptive"]
    start: int = Field(25, ge=2, description="items of the first generation, over all tasks; never fewer")
    threshold: float = Field(0.4, gt=0, lt=1, description="split-half rank correlation below which items are added")
    grow: float = Field(1.3, gt=1, description="factor on the next generation's items where it was below")
    shrink: float = Field(1.15, ge=1, description="divisor of the next generation's items where it was not")


class HalvingItems(_Part):
    """Successive halving: a generation's best on few items go on to more."""

    policy: Literal["halving"]
    rungs: tuple[int, ...] = Field((60, 500), min_length=2, description="items of each rung; beyond all means all")
    keep: float = Field(0.4, gt=0, lt=1, description="share of a rung's members that goes on")

    @model_validator(mode="after")
    def _rising(self) -> HalvingItems:
        if self.rungs[0] < 2 or any(b <= a for a, b in itertools.pairwise(self.rungs)):
            raise ValueError(f"rungs: each must have more items than the one before, the first 2, got {self.rungs}")
        return self


ItemsSpec = Literal["full"] | Annotated[SampleItems | AdaptiveItems | HalvingItems, Field(discriminator="policy")]


class Search(BaseModel):
    """Algorithm, budget and seed; every other key is a setting of the algorithm."""

    model_config = ConfigDict(frozen=True, extra="allow")

    algorithm: str = "cma-es"
    budget: Budget
    seed: int = Field(0, ge=0)
    lag: int | None = Field(
        None,
        ge=1,
        description="steady state: proposal k is asked when exactly the results up to k - lag are known, which keeps "
        "lag workers busy; for algorithms that can, in place of whole generations",
    )
    items: ItemsSpec = Field(
        "full",
        description="what candidates are scored on while the search runs; baselines, probes, each stage's answers and "
        "finalists are scored in full",
    )
    warm_start: tuple[str | Mapping[str, Any], ...] = Field(
        (), description="recipes to score first and to begin from: files, or inline"
    )
    probes: bool = Field(
        True,
        description="begin where the default or one expert alone does best; skipped where these few candidates "
        "would take more than a quarter of the first stage",
    )
    finalists: int = Field(8, ge=1, description="best candidates that are re-scored on the select split")

    @property
    def given(self) -> tuple[Mapping[str, Any], ...]:
        """The recipes of `warm_start`, once `load` has read those that are files."""
        return tuple(r for r in self.warm_start if not isinstance(r, str))

    @property
    def settings(self) -> dict[str, Any]:
        """What the algorithm is set to."""
        return dict(self.model_extra or {})


class Workers(_Part):
    """Who evaluates. None of it changes results, but threads and device may in the last bits."""

    backend: Literal["inline", "local", "ray"] = "local"
    count: int = Field(1, ge=1, le=1024)
    address: str | None = Field(None, description="ray: a running cluster, auto or a URL; else one is started here")
    gpus_per_worker: float | None = Field(None, gt=0, description="ray: share of a GPU; default 1 on CUDA, else none")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int = Field(1, ge=1, description="CPU threads per worker; part of the numerics")
    timeout_seconds: float = Field(600.0, gt=0, description="per candidate")
    memory_gb: float | None = Field(None, gt=0, description="resident size at which a worker is stopped")


class Export(_Part):
    """What to write when the run ends."""

    format: Literal["hf", "mergekit"] | None = None


UNUSED_SPACE = "one-weight-per-expert"
"""The space of algorithms that propose recipes: they search no axes, so any will do."""


class Experiment(_Part):
    """One experiment file, as resolved: library entries inlined, paths absolute."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")
    description: str = ""
    models: Models
    search_space: str | StagedSpec | SpaceSpec = Field(
        UNUSED_SPACE, description="needed but for algorithms that mix the models themselves"
    )
    fitness: str | FitnessSpec
    search: Search
    workers: Workers = Workers()
    export: Export = Export()

    # -- after `load` these are resolved ------------------------------------------------------------------

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages; one for a plain space."""
        if isinstance(self.search_space, StagedSpec):
            return self.search_space.stages
        return (Stage(space=self.search_space, share=1.0),)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of the fitness."""
        assert isinstance(self.fitness, FitnessSpec)
        return self.fitness.tasks

    @property
    def benchmarks(self) -> tuple[Task, ...]:
        """The tasks of the fitness that tables show."""
        assert isinstance(self.fitness, FitnessSpec)
        return self.fitness.benchmarks

    def is_auto(self, stage: Stage) -> bool:
        """Whether a stage's algorithm is still to be chosen; no longer after `prepare`."""
        return (stage.algorithm or self.search.algorithm) == AUTO

    def algorithm_of(self, stage: Stage) -> tuple[str, Any]:
        """Name and options of a stage's algorithm. Raises UserError for wrong settings."""
        name = stage.algorithm or self.search.algorithm
        return name, make_options(name, {**self.search.settings, **stage.settings}, beside=Search.model_fields)

    def identity(self, hashes: Mapping[str, str], plans: Mapping[str, str], dtype: str) -> str:
        """experiment.id: what determines results. Without budget, workers, export, name, texts and paths."""
        return digest(
            {
                "models": dict(hashes),
                "dtype": dtype,
                "plans": dict(plans),
                "stages": [
                    [_without_text(s.space), s.share, *_plain_algorithm(*self.algorithm_of(s))] for s in self.stages
                ],
                "fitness": _without_text(self.fitness),
                "seed": self.search.seed,
                "lag": self.search.lag,
                "warm_start": [dict(r) for r in self.search.given],
                "finalists": self.search.finalists,
                "probes": self.search.probes,
                # Not there in runs that began before the key was.
                **({} if isinstance(self.search.items, str) else {"items": self.search.items.model_dump(mode="json")}),
            }
        )

    def axes_of(self, stage: Stage, count: int) -> str:
        """What a stage searches, in words: its space's axes, or none where the algorithm mixes the models itself."""
        return "no axes" if needs_of(self.algorithm_of(stage)[0]).proposes == "recipes" else f"{count} axes"

    def to_yaml(self) -> str:
        """The resolved experiment, readable by `load`."""
        return dump_yaml(self.model_dump(mode="json", exclude_defaults=True))


def _plain_algorithm(name: str, options: Any) -> list[Any]:
    given = vars(options)
    return [name, {k: v for k, v in given.items() if k not in LATER_KEYS or v != getattr(type(options), k)}]


LATER_KEYS = frozenset(
    {"expert", "objectives", "constraints", "measures", "few_shot", "chat_template", "system"}
    | {"preset", "columns", "values", "edits", "gold_label", "gold_text", "labels"}
    | {"gradients"}
)
"""Keys of fitness, spaces and algorithms that came after journals of format 1; at their defaults they are no part of
the identity, so that runs which began before them go on."""


def _without_text(part: Any) -> Any:
    data = _without_later_keys(part.model_dump(mode="json"), part.model_dump(mode="json", exclude_defaults=True))
    data.pop("description", None)
    for task in data.get("tasks", ()):
        # Items and code are in the plans' ids; where they lie does not matter.
        for key in ("data", "splits", "include_path", "function"):
            task.pop(key, None)
        if task.get("few_shot"):
            task["few_shot"].pop("data")
    return data


def _without_later_keys(data: Any, given: Any) -> Any:
    if isinstance(data, dict):
        given = given if isinstance(given, dict) else {}
        kept = [k for k in data if k in given or k not in LATER_KEYS]
        return {k: _without_later_keys(data[k], given.get(k)) for k in kept}
    if isinstance(data, list):
        rows = given if isinstance(given, list) else [None] * len(data)
        return [_without_later_keys(d, g) for d, g in zip(data, rows, strict=True)]
    return data


def load(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Read an experiment: a file, a library name, or plain data (paths then relative to the working folder).

    `overrides` are dotted keys to values, as of `--set search.seed=2`. Raises UserError in one line.
    """
    if isinstance(source, Mapping):
        data, where, folder = dict(source), "experiment", Path.cwd()
    else:
        path = find("experiments", str(source), Path.cwd())
        data, where, folder = load_yaml(path), str(path), path.resolve().parent
        if not isinstance(data, dict):
            raise UserError(f"{path}: expected a mapping of keys, got {type(data).__name__}")
        if is_genome_file(data):
            raise UserError(
                f"{path}: is a genome file of mergekit-evolve; make it an experiment first: "
                f"evomerge import {path} --to experiment.yaml"
            )
    for key, value in (overrides or {}).items():
        data = _set(data, key.split("."), value, key)
    if isinstance(data.get("search_space"), dict) and "stages" in data["search_space"]:
        validated(StagedSpec, data["search_space"], f"{where}: search_space")
    elif isinstance(data.get("search_space"), dict):
        validated(SpaceSpec, data["search_space"], f"{where}: search_space")
    experiment = validated(Experiment, data, where)
    if experiment.search.algorithm not in (AUTO, *ALGORITHMS):
        raise UserError(
            f"{where}: search.algorithm: unknown algorithm {experiment.search.algorithm!r}"
            f"{nearest(experiment.search.algorithm, (AUTO, *ALGORITHMS))}"
        )
    algorithm = experiment.search.algorithm
    if "search_space" not in data and (algorithm == AUTO or needs_of(algorithm).proposes == "genomes"):
        raise UserError(
            f"{where}: the key 'search_space' is missing; name one of `evomerge list spaces`, or write one inline"
        )
    resolved = experiment.model_copy(
        update={
            "models": _resolved_models(experiment.models, folder),
            "search_space": resolve_space(experiment.search_space, folder),
            "fitness": resolve_fitness(experiment.fitness, folder),
            "search": experiment.search.model_copy(
                update={"warm_start": tuple(_recipe(r, folder) for r in experiment.search.warm_start)}
            ),
        }
    )
    for stage in resolved.stages:
        if not resolved.is_auto(stage):
            resolved.algorithm_of(stage)
    return resolved


def _set(data: Mapping[str, Any], keys: list[str], value: Any, whole: str) -> dict[str, Any]:
    """A copy of nested mappings with one value replaced."""
    out = dict(data)
    if len(keys) == 1:
        out[keys[0]] = value
        return out
    inner = out.get(keys[0], {})
    if not isinstance(inner, Mapping):
        raise UserError(f"--set {whole}: {keys[0]!r} is no mapping in this experiment")
    out[keys[0]] = _set(inner, keys[1:], value, whole)
    return out


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`key=value` texts, values read as YAML. Raises UserError."""
    out = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise UserError(f"--set {pair}: expected key=value, for example search.seed=2")
        out[key] = parse_yaml(value, f"--set {key}")
    return out


def _resolved_models(models: Models, folder: Path) -> Models:
    return models.model_copy(
        update={
            "base": named(folder, models.base),
            "experts": {n: named(folder, p) for n, p in models.experts.items()},
        }
    )


def _recipe(given: str | Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A recipe's data; of a file without the paths of its sources, which the experiment's pool has."""
    if not isinstance(given, str):
        return given
    recipe = Recipe.load(folder / given)
    sources = {n: s.model_copy(update={"path": None}) for n, s in recipe.sources.items()}
    return recipe.model_copy(update={"sources": sources}).to_json()


def resolve_space(spec: str | StagedSpec | SpaceSpec, folder: Path) -> StagedSpec | SpaceSpec:
    """Library names and paths to specs; the spaces of stages too. Raises UserError."""
    if isinstance(spec, str):
        spec, folder = _read_space(spec, folder)
    if isinstance(spec, StagedSpec):
        stages = []
        for stage in spec.stages:
            space = _read_space(stage.space, folder)[0] if isinstance(stage.space, str) else stage.space
            if isinstance(space, StagedSpec):
                raise UserError("search_space: a stage cannot be staged itself")
            stages.append(stage.model_copy(update={"space": space}))
        return spec.model_copy(update={"stages": tuple(stages)})
    return spec


def _read_space(name: str, folder: Path) -> tuple[StagedSpec | SpaceSpec, Path]:
    """A library entry or file as it stands, and the folder that its own paths are relative to."""
    path = find("search_spaces", name, folder)
    data = load_yaml(path)
    if isinstance(data, dict) and "stages" in data:
        return validated(StagedSpec, data, str(path)), path.parent
    return validated(SpaceSpec, data, str(path)), path.parent


def is_experiment(path: Path) -> bool:
    """True for a YAML file that has a fitness among its keys, as experiments do."""
    if not path.is_file():
        return False
    data = load_yaml(path)
    return isinstance(data, dict) and "fitness" in data


def fitness_of(experiment: Experiment) -> FitnessSpec:
    """The resolved fitness."""
    assert isinstance(experiment.fitness, FitnessSpec)
    return experiment.fitness
