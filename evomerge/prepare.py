"""Experiment -> everything a run needs, checked: pool, manifest, spaces, plans. No candidate is built here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.budget import Allowance
from evomerge.config import Budget, Experiment, Stage, StagedSpec, Workers, fitness_of
from evomerge.errors import UserError
from evomerge.importance import important_groups, layer_sensitivities, layer_sizes
from evomerge.items import make_policy, samples
from evomerge.layer_swap import LayerSwapSpace
from evomerge.manifest import Manifest
from evomerge.proposal import ItemSet
from evomerge.recipe import Hop, Match, Recipe, Route, Rule
from evomerge.refusals import (
    at_stage,
    check_algorithms,
    check_axes,
    check_designs,
    check_distances,
    check_gradients,
    check_one_objective,
    check_populations,
    check_routes,
    check_tasks_for_gradients,
    check_units,
    remarks_on,
)
from evomerge.route_space import RouteSpace
from evomerge.schema import validated
from evomerge.score.plan import Plan, PlanShape, Target, item_sets
from evomerge.search import ALGORITHMS, needs_of, settings_of
from evomerge.search.auto import AUTO, Problem, choose
from evomerge.search.base import Column, Geometry
from evomerge.space import Important, RuleSpace, SearchSpace, SpaceSpec
from evomerge.tasks import Task
from evomerge.tasks.base import NOTHING, Allowed, Item
from evomerge.workers import Executor, MakeEvaluator

CPU_BATCH_TOKENS = 1024
"""Measured best on small CPU cores: activations of a batch stay in the cache (`make bench`, scoring)."""
GPU_BATCH_TOKENS = 16384
SENSITIVITY_ITEMS = 256
"""Search items that `groups: {by: sensitivity}` looks at."""


@dataclass(frozen=True)
class Prepared:
    """What the loop in `run.py` works on."""

    experiment: Experiment
    manifest: Manifest
    dtype: str
    plans: Mapping[str, Plan]
    spaces: tuple[SearchSpace, ...]
    device: str
    notes: tuple[str, ...]
    folders: Mapping[str, Path]
    """Where the base and the experts lie, by name."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The search's stages; `spaces` has one space for each."""
        return self.experiment.stages

    @property
    def items(self) -> dict[str, ItemSet]:
        """The full item set of every split."""
        return item_sets(self.plans)

    def item_ids(self, items: ItemSet) -> dict[str, list[str]]:
        """task -> the names of the items."""
        return {t: [self.plans[t].item_ids[i] for i in at] for t, at in items.tasks.items()}

    @property
    def experiment_id(self) -> str:
        """What determines the results (`Experiment.identity`)."""
        return self.experiment.identity(self.manifest.hashes, {t: p.id for t, p in self.plans.items()}, self.dtype)

    @property
    def plan_shape(self) -> PlanShape:
        """The batch shape that all plans share."""
        return next(iter(self.plans.values())).shape

    def numerics(self) -> dict[str, Any]:
        """The software and hardware that last bits depend on."""
        return numerics(self.device, self.experiment.workers.threads)

    def evaluator(self) -> MakeEvaluator:
        """A picklable maker of evaluators for workers."""
        return evaluator_of(self.experiment, self.manifest, self.dtype, self.plans, self.device)

    def baselines(self) -> dict[str, Recipe]:
        """Name -> canonical recipe: the base, each expert alone, all experts that can be merged in equal parts."""
        return baselines(self.manifest, self.dtype)

    def geometry(self) -> Geometry:
        """The sources' inner products, read from their files as they are asked for."""
        from evomerge.merge.geometry import FlatGeometry

        return FlatGeometry(open_pool(self.experiment), self.manifest)

    def columns(self) -> tuple[Column, ...]:
        """The per-item scores that make up the only objective."""
        fitness = fitness_of(self.experiment)
        [goal] = fitness.goals
        columns = []
        for task, share in fitness.weights_of(goal):
            metric = goal.metric or task.metric
            columns.append(Column(task.name, metric, task.directions[metric] == "higher", share))
        return tuple(columns)

    def given_recipes(self) -> list[Recipe]:
        """The recipes of `search.warm_start`, canonical, in this run's dtype. Raises UserError."""
        out = []
        for i, data in enumerate(self.experiment.search.given, 1):
            where = f"search.warm_start, recipe {i}"
            recipe = validated(Recipe, dict(data), where)
            out.append(recipe.model_copy(update={"dtype": self.dtype}).canonical(self.manifest, where))
        return out


def baselines(manifest: Manifest, dtype: str) -> dict[str, Recipe]:
    """Name -> canonical recipe of what every search is compared with."""

    def equal_parts(experts: tuple[str, ...]) -> Recipe:
        rule = Rule(match=Match(), method="linear", sources={e: {"weight": 1.0} for e in experts})
        recipe = Recipe.model_validate({"base": manifest.base, "dtype": dtype, "merge": [rule] if experts else []})
        return recipe.canonical(manifest)

    def all_layers(source: str) -> Recipe:
        hops = tuple(Hop(from_=source, layer=i) for i in range(manifest.layers[source]))
        route = Route(embed=source, final_norm=source, head=source, hops=hops)
        return Recipe.model_validate({"base": manifest.base, "dtype": dtype, "route": route}).canonical(manifest)

    # Models of another depth cannot be merged, but a path goes through all their layers.
    out = {manifest.base: equal_parts(()), **{n: all_layers(n) for n in sorted(manifest.layouts)}}
    out |= {e: equal_parts((e,)) for e in manifest.experts}
    if len(manifest.experts) > 1:
        out["uniform"] = equal_parts(manifest.experts)
    return out


def evaluator_of(
    experiment: Experiment, manifest: Manifest, dtype: str, plans: Mapping[str, Plan], device: str
) -> MakeEvaluator:
    """A picklable maker of evaluators of a pool and its tasks."""
    from evomerge.evaluate import EvaluatorSpec, MergeEvaluator

    models = experiment.models
    spec = EvaluatorSpec(
        base=models.base,
        experts=models.experts,
        manifest=manifest,
        dtype=dtype,
        plans=plans,
        device=device,
        threads=experiment.workers.threads,
    )
    return partial(MergeEvaluator, spec)


def numerics(device: str, threads: int) -> dict[str, Any]:
    """Versions and hardware classes, no host names."""
    import torch

    return {
        **{name: version(name) for name in ("torch", "transformers", "numpy", "scipy", "cma", "optuna")},
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def open_pool(experiment: Experiment) -> Any:
    """The pool of an experiment; models of the hub are fetched. Raises UserError."""
    from evomerge.hub import folder_of
    from evomerge.pool import ModelPool

    models = experiment.models
    return ModelPool.open(folder_of(models.base), {n: folder_of(p) for n, p in models.experts.items()})


def with_commits(experiment: Experiment) -> Experiment:
    """The experiment with hub ids pinned to commits, so that a resume and other hosts read the same bytes."""
    from evomerge.hub import pinned

    models = experiment.models
    update = {"base": pinned(models.base), "experts": {n: pinned(p) for n, p in models.experts.items()}}
    return experiment.model_copy(update={"models": models.model_copy(update=update)})


def prepare(
    experiment: Experiment,
    shape: PlanShape | None = None,
    allow: Allowed = NOTHING,
    began_with: Budget | None = None,
) -> Prepared:
    """Open and check everything. Raises UserError before any expensive work.

    `shape` is the journalled batch shape of a run that is resumed; else it is chosen by device. `began_with` is the
    first budget of such a run: what it chose by stays chosen when the budget is raised.
    """
    from evomerge.evaluate import pick_device

    check_algorithms(experiment)
    if began_with is None:
        check_units(fitness_of(experiment))
    items = load_items(experiment.tasks, allow)
    experiment = with_commits(experiment)
    pool = open_pool(experiment)
    check_depths(experiment, pool)
    device = pick_device(experiment.workers.device)
    if experiment.workers.backend != "ray":  # a cluster's devices are not the driver's
        check_device(device)
    if shape is None:
        shape = PlanShape(GPU_BATCH_TOKENS if device.startswith("cuda") else CPU_BATCH_TOKENS)
    plans = compile_plans(experiment.tasks, items, pool.checkpoints[pool.base], shape)
    manifest = pool.manifest()
    dtype = pool.stored_dtype if experiment.models.dtype == "auto" else experiment.models.dtype

    @lru_cache
    def importance(by: str) -> NDArray[np.float64]:
        from evomerge.merge.geometry import FlatGeometry

        if by == "size":
            return layer_sizes(FlatGeometry(pool, manifest), manifest)
        check_one_objective(experiment, "groups: sensitivity is a gradient", "take by: size")
        check_tasks_for_gradients(experiment, "groups: sensitivity is a gradient", "take by: size")
        make = evaluator_of(experiment, manifest, dtype, plans, device)
        mean = [*baselines(manifest, dtype).values()][-1]
        sample = samples(item_sets(plans)["search"], [SENSITIVITY_ITEMS], (experiment.search.seed, 0), 0)[0]
        return layer_sensitivities(fitness_of(experiment), make, mean, sample, manifest)

    experiment, grouped = with_groups(experiment, manifest, importance)
    spaces = bind_spaces(experiment, manifest, dtype)
    budget = began_with or experiment.search.budget
    allowance = allowance_of(budget, experiment, item_sets(plans)["search"])
    experiment, picked = with_algorithms(experiment, spaces, allowance)
    picked = [*grouped, *picked]
    check_algorithms(experiment)  # what auto picked
    picked = [*picked, *check_gradients(experiment, spaces)]
    check_axes(experiment, spaces)
    check_routes(experiment, spaces)
    if began_with is None:
        picked = [*picked, *check_populations(experiment, spaces, allowance), *remarks_on(experiment, items)]
        check_designs(experiment, spaces, manifest.experts, allowance)
    folders = {n: c.path for n, c in pool.checkpoints.items()}
    prepared = Prepared(experiment, manifest, dtype, plans, spaces, device, (*picked, *pool.notes()), folders)
    if any(r.route is not None for r in prepared.given_recipes()):
        check_routes_fit(pool)
        check_distances(experiment)
    return prepared


def check_depths(experiment: Experiment, pool: Any) -> None:
    """Raises UserError for models of different depth where only merges are searched, and for a pool whose layers cannot
    follow one another where routes are."""
    named = [experiment.algorithm_of(s)[0] for s in experiment.stages if not experiment.is_auto(s)]
    spaces = [s.space for s in experiment.stages if isinstance(s.space, SpaceSpec)]
    if any(needs_of(a).routes for a in named) or any(s.route is not None for s in spaces):
        check_routes_fit(pool)
    else:
        pool.check_mergeable()


def check_routes_fit(pool: Any) -> None:
    """Raises UserError for a pool whose layers cannot follow one another."""
    from evomerge.merge.route import check_routable

    check_routable(pool)


def with_groups(
    experiment: Experiment, manifest: Manifest, sizes: Callable[[str], NDArray[np.float64]]
) -> tuple[Experiment, list[str]]:
    """The experiment with `important` layers named as groups, and a line for each stage that says which.

    `sizes(by)` is how important each layer is.
    """
    stages, notes = list(experiment.stages), []
    for n, stage in enumerate(stages):
        if not isinstance(stage.space, SpaceSpec) or not isinstance(stage.space.groups, Important):
            continue
        by = stage.space.groups.by
        space = important_groups(stage.space, sizes(by), manifest)
        stages[n] = stage.model_copy(update={"space": space})
        assert isinstance(space.groups, tuple)
        own = [g.name for g in space.groups if g.name.startswith("layers.")]
        wanted, layers = stage.space.groups.important, manifest.layers[manifest.base]
        if wanted < layers:
            why = "the task vectors are largest" if by == "size" else "the objective changes most"
            told = f"{', '.join(own)}: there {why}"
        else:  # a library space asks for as many as suit a large model
            told = f"each of the {layers} layers, which are no more than {{important: {wanted}}} asks for"
        notes.append(f"{at_stage(n, stages)}axes of their own for {told}")
    if not notes:
        return experiment, []
    if not isinstance(experiment.search_space, StagedSpec):
        return experiment.model_copy(update={"search_space": stages[0].space}), notes
    staged = experiment.search_space.model_copy(update={"stages": tuple(stages)})
    return experiment.model_copy(update={"search_space": staged}), notes


def with_algorithms(
    experiment: Experiment, spaces: Sequence[SearchSpace], allowance: Allowance
) -> tuple[Experiment, list[str]]:
    """The experiment with `auto` replaced by what it picks, stage by stage, and a line for each that says why.

    Settings of `search` stay as they are given. Those of a stage, which library spaces have for one algorithm, are
    left out where they are another one's, and the line says so. Raises UserError for other settings that the picked
    algorithm does not have.
    """
    search, picked = experiment.search, []
    stages = list(experiment.stages)
    for n, (stage, space) in enumerate(zip(experiment.stages, spaces, strict=True)):
        if not experiment.is_auto(stage):
            continue
        choice = choose(
            Problem(space.axes, len(fitness_of(experiment).goals), allowance.of_stage(n), search.lag is not None)
        )
        others = frozenset[str]().union(*map(settings_of, ALGORITHMS)) - settings_of(choice.algorithm)
        own = {k: v for k, v in stage.settings.items() if k not in others}
        settings = {**choice.settings, **search.settings, **own}
        stages[n] = stage.model_copy(update={"algorithm": choice.algorithm, "settings": settings})
        left_out = "".join(f"; {k} of the stage is left out" for k in stage.settings if k not in own)
        picked.append(f"{at_stage(n, stages)}auto picked {choice.why}{left_out}")
        try:
            experiment.algorithm_of(stages[n])
        except UserError as e:
            raise UserError(f"{e}; {picked[-1]}; drop the setting, or name an algorithm") from None
    if not picked:
        return experiment, []
    if not isinstance(experiment.search_space, StagedSpec):
        update = {"algorithm": stages[0].algorithm, **stages[0].settings}
        return experiment.model_copy(update={"search": search.model_copy(update=update)}), picked
    staged = experiment.search_space.model_copy(update={"stages": tuple(stages)})
    if search.algorithm == AUTO:  # every stage names its own by now
        search = search.model_copy(update={"algorithm": stages[-1].algorithm})
    return experiment.model_copy(update={"search_space": staged, "search": search}), picked


def allowance_of(budget: Budget, experiment: Experiment, whole: ItemSet) -> Allowance:
    """A budget cut into the stages of an experiment, `whole` being all items of the search split.

    Raises UserError where a stage could not begin.
    """
    spec = experiment.search.items
    price = make_policy(spec, whole, (0, 0), lambda _: lambda _: np.zeros(1)).price
    named = [experiment.algorithm_of(s) for s in experiment.stages if not experiment.is_auto(s)]
    sampled = spec != "full" or any(needs_of(*a).gradients for a in named)
    return Allowance.of(budget, experiment.stages, price, sampled=sampled)


def load_items(tasks: Sequence[Task], allow: Allowed) -> dict[str, tuple[Item, ...]]:
    """task -> its items, split. Raises UserError naming file and line, and for what is not allowed."""
    for t in tasks:
        if t.runs_code and not allow.code:
            raise UserError(f"task {t.name!r} runs code that the experiment names; read it, then add --allow-code")
        if t.test_set is not None and not allow.test_sets:
            raise UserError(
                f"task {t.name!r} would search on {t.test_set}, where papers compare models; search on training items "
                "(for lm_eval `data: training`), or add --allow-test-set"
            )
    items = {t.name: t.load(Path.cwd()) for t in tasks}
    if not allow.test_sets:
        for name, mine in items.items():
            _refuse_test_sets(name, mine)
    return items


def _refuse_test_sets(task: str, items: Sequence[Item]) -> None:
    """Raises UserError for items of known test sets in the splits that choose; the report split may hold them."""
    found = [i for i in items if i.test_set is not None and i.split != "report"]
    if found:
        benchmarks = ", ".join(dict.fromkeys(str(i.test_set) for i in found))
        raise UserError(
            f"task {task!r}: {len(found)} of its search and select items are test questions of {benchmarks} "
            f"(the first: {found[0].where}); give their file to splits.report only, or allow it with --allow-test-set"
        )


def compile_plans(
    tasks: Sequence[Task], items: Mapping[str, tuple[Item, ...]], base: Any, shape: PlanShape
) -> dict[str, Plan]:
    """Tokenise and lay out all tasks with the base's tokenizer. Raises UserError for items that do not fit."""
    from evomerge.merge.live import end_tokens, load_tokenizer
    from evomerge.score import make_scorer

    tokenizer = load_tokenizer(base.path)
    target = Target(tokenizer, base.context_length, shape, end_tokens(base.path, tokenizer))
    return {t.name: make_scorer(t.kind).compile(t, items[t.name], target) for t in tasks}


def check_device(device: str) -> None:
    """Raises UserError for a CUDA device that is not there."""
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"workers.device is {device!r}, but torch sees no CUDA device; use cpu or auto")
    index = int(device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise UserError(f"workers.device is {device!r}, but there are {torch.cuda.device_count()} CUDA devices")


def bind_space(spec: SpaceSpec, manifest: Manifest, dtype: Any) -> SearchSpace:
    """The space that a spec means over a pool. Raises UserError where it does not fit the pool."""
    if spec.layer_swap is not None:
        return LayerSwapSpace(spec, manifest, dtype)
    if spec.route is not None:
        return RouteSpace(spec, manifest, dtype)
    return RuleSpace(spec, manifest, dtype)


def bind_spaces(experiment: Experiment, manifest: Manifest, dtype: Any) -> tuple[SearchSpace, ...]:
    """One bound space a stage. Raises UserError where a stage cannot express what the one before may find."""
    spaces = []
    for stage in experiment.stages:
        assert isinstance(stage.space, SpaceSpec)
        spaces.append(bind_space(stage.space, manifest, dtype))
    for n, (coarse, fine) in enumerate(itertools.pairwise(spaces), 1):
        for corner in (0.0, 1.0):
            point = coarse.default * 0.0 + corner
            try:
                found = coarse.decode(point, manifest)
                fine.around(found).encode(found, manifest)
            except ValueError as e:
                mend = "give it the same method and bounds at least as wide"
                if isinstance(fine, RouteSpace):
                    mend = "name `merged` under route.models, the first of all"
                raise UserError(
                    f"search_space: stage {n + 1} cannot start from all that stage {n} may find ({e}); {mend}"
                ) from None
    return tuple(spaces)


def make_executor(make: MakeEvaluator, workers: Workers, device: str) -> Executor:
    """The executor of a backend."""
    if workers.backend == "inline":
        from evomerge.workers.inline import InlineExecutor

        return InlineExecutor(make)
    if workers.backend == "ray":
        from evomerge.workers.ray import RayExecutor

        cuda = device.startswith("cuda")
        return RayExecutor(
            make,
            count=workers.count,
            timeout_seconds=workers.timeout_seconds,
            gpus=workers.gpus_per_worker or (1.0 if cuda else 0.0),
            address=workers.address,
        )
    from evomerge.workers.local import LocalExecutor

    return LocalExecutor(
        make, count=workers.count, timeout_seconds=workers.timeout_seconds, memory_gb=workers.memory_gb
    )


def gradient_shape(manifest: Manifest) -> tuple[int, int]:
    """(n_blocks, 1 + n_experts), the shape of a task's gradient (see `proposal.Gradients`)."""
    return len(manifest.blocks), 1 + len(manifest.experts)


def needed_metrics(experiment: Experiment) -> dict[str, tuple[str, ...]]:
    """task -> the metrics that the objectives and the tables read."""
    return {t.name: fitness_of(experiment).metrics_of(t) for t in experiment.tasks}
