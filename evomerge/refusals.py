"""What an experiment cannot ask for together, refused with the way out, and what deserves a note.

Nothing here opens a model: the experiment, its items and its bound spaces are enough.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evomerge.budget import Allowance
from evomerge.config import AdaptiveItems, Experiment, Stage, fitness_of
from evomerge.errors import UserError
from evomerge.fitness import FitnessSpec
from evomerge.items import POLICIES
from evomerge.proposal import GRADIENT_PRICE
from evomerge.route_space import RouteSpace
from evomerge.search import ALGORITHMS, needs_of
from evomerge.search.cmaes import default_population
from evomerge.space import RuleSpace, SearchSpace
from evomerge.tasks import KINDS
from evomerge.tasks.base import Item


def check_algorithms(experiment: Experiment) -> None:
    """Raises UserError where an algorithm cannot have the number of objectives, a lag, or the policy of items.

    `auto` picks one that can.
    """
    for stage in experiment.stages:
        if not experiment.is_auto(stage):
            check_algorithm(experiment, *experiment.algorithm_of(stage))


def check_algorithm(
    experiment: Experiment, name: str, options: Any = None, others: Collection[str] = ALGORITHMS
) -> None:
    """The same of one algorithm; `others` are those that the error may name, if they pass themselves."""
    needs, fitness = needs_of(name, options), fitness_of(experiment)
    goals = [g.name for g in fitness.goals]
    if experiment.search.lag is not None and not needs.steady:
        raise UserError(f"search.lag: {name} learns from whole generations and has no steady state; drop lag")
    check_items(experiment, name, others)
    if needs.objectives == "one" and len(goals) > 1:
        raise UserError(
            f"search: {name} minimises one loss, the fitness has {len(goals)} objectives ({', '.join(goals)}); "
            f"use {' or '.join(_able(experiment, others))}, or one objective over all tasks"
        )
    if needs.objectives == "several" and len(goals) == 1:
        raise UserError(
            f"search: {name} is for several objectives, the fitness has one; "
            f"use {' or '.join(_able(experiment, others))}, or name several under fitness.objectives"
        )
    if needs.measures > len(fitness.measures):
        task = experiment.benchmarks[0]
        count = "measures" if needs.measures == 1 else f"{needs.measures} measures or more"
        raise UserError(
            f"search: {name} needs {count} to lay its archive out by; name some under fitness.measures, such as "
            f"{{name: {task.name}, tasks: [{task.name}], metric: {task.metric}, low: 0, high: 1, cells: 10}}"
        )
    if needs.design is not None and fitness.constraints:
        raise UserError(
            f"search: {name} models the objectives and knows no constraints; use nsga-ii or nsga-iii, or make "
            "each constraint an objective"
        )
    if needs.gradients and needs.design is None:
        check_tasks_for_gradients(experiment, f"search: {name} follows gradients", "use cma-es")
    elif needs.gradients:
        check_tasks_for_gradients(experiment, f"search: {name} fits gradients", NO_GRADIENTS)
        check_slopes(fitness, f"search: {name} fits values and slopes of the same losses")
    if needs.per_item_scores:
        for goal in fitness.goals:
            for task, _ in fitness.weights_of(goal):
                if not task.benchmark:
                    raise UserError(
                        f"search: {name} compares models item by item, but task {task.name!r} scores a model as "
                        "a whole; leave it out of the objective"
                    )


def _able(experiment: Experiment, others: Collection[str]) -> list[str]:
    """Those that the experiment could have in place of an algorithm and as it stands else."""

    def passes(name: str) -> bool:
        try:
            check_algorithm(experiment, name, others=())
        except UserError:
            return False
        return True

    return [name for name in others if passes(name)]


def check_items(experiment: Experiment, algorithm: str, others: Collection[str] = ALGORITHMS) -> None:
    """Raises UserError where the losses that a policy of items gives are no use to an algorithm."""
    items, scope = experiment.search.items, needs_of(algorithm).scope
    policy = items if isinstance(items, str) else items.policy
    if policy != "full" and experiment.search.lag is not None:
        raise UserError(f"search.lag: {policy} items are common to a generation, steady state has none; drop one")
    if policy not in POLICIES[scope]:
        why = f"compares candidates across generations, which {policy} items do not allow"
        if scope == "none":
            why = f"compares no candidates, which {policy} items go by"
        able = "".join(f" or {name}" for name in _able(experiment, others))
        raise UserError(
            f"search.items: {algorithm} {why}; use items: {' or '.join(POLICIES[scope])}{',' * bool(able)}{able}"
        )


def check_one_objective(experiment: Experiment, who: str, instead: str) -> None:
    """Raises UserError where there are several objectives."""
    count = len(fitness_of(experiment).goals)
    if count > 1:
        raise UserError(f"{who}, but the fitness has {count} objectives; {instead}, or name one objective")


def check_tasks_for_gradients(experiment: Experiment, who: str, instead: str) -> None:
    """Raises UserError where a task of the objectives has no gradient."""
    fitness = fitness_of(experiment)
    for goal in fitness.goals:
        for task, _ in fitness.weights_of(goal):
            if not task.smooth:
                able = " or ".join(name for name, kind in KINDS.items() if kind.spec.smooth)
                raise UserError(
                    f"{who}, but task {task.name!r} of kind {task.kind} has none; search on tasks of kind {able}, "
                    f"or {instead}"
                )


NO_GRADIENTS = "leave `gradients` out"


def check_slopes(fitness: FitnessSpec, who: str) -> None:
    """Raises UserError where gradients, which are of weighted means of smooth metrics, are not those of the losses."""
    if fitness.floor is not None:
        raise UserError(f"{who}, and fitness.floor has a kink at the base; drop the floor, or {NO_GRADIENTS}")
    differentiated: dict[str, str] = {}
    for goal in fitness.goals:
        if goal.kind != "weighted_mean":
            raise UserError(
                f"{who}, and {goal.name} is of kind {goal.kind}, which has kinks; use weighted_mean, or {NO_GRADIENTS}"
            )
        for task, _ in fitness.weights_of(goal):
            metric = goal.metric or task.metric
            if task.smooth[metric] != metric:
                able = " or ".join(m for m, smooth in task.smooth.items() if m == smooth)
                raise UserError(
                    f"{who}, and {metric} of task {task.name!r} is a count without slope; use metric: {able}, "
                    f"or {NO_GRADIENTS}"
                )
            if differentiated.setdefault(task.name, metric) != metric:
                raise UserError(
                    f"{who}, and a task is differentiated once, task {task.name!r} stands for "
                    f"{differentiated[task.name]} and for {metric}; name one of them, or {NO_GRADIENTS}"
                )


def check_units(fitness: FitnessSpec) -> None:
    """Raises UserError where forgetting would add what is lost in one unit to what is lost in another.

    Tasks with weights of their own in the objective say what one unit is worth in the other.
    """
    for goal in (*fitness.goals, *fitness.constraints):
        if goal.kind == "forgetting" and (listed := fitness.units_added_by(goal)):
            weights = ", ".join(f"{t.name}: 1" for t, _ in fitness.weights_of(goal))
            raise UserError(
                f"fitness: {goal.name} would add up losses in different units ({listed}); name tasks of one unit "
                f"under its `tasks`, or say what a unit of each is worth: tasks: {{{weights}}}"
            )


def check_gradients(experiment: Experiment, spaces: Sequence[SearchSpace]) -> list[str]:
    """Notes for stages that are told gradients: what one costs, and where it is of something else than the objective.

    Raises UserError where a stage needs gradients that its space does not have.
    """
    notes = []
    fitness = fitness_of(experiment)
    for n, (stage, space) in enumerate(zip(experiment.stages, spaces, strict=True)):
        name, options = experiment.algorithm_of(stage)
        needs = needs_of(name, options)
        if not needs.gradients:
            continue
        what = "layer routes have" if isinstance(space, RouteSpace) else "layer swapping has"
        why = space.why_no_gradient() if isinstance(space, RuleSpace) else f"{what} no derivative"
        if why is not None:
            raise UserError(f"search: {at_stage(n, experiment.stages)}{name} needs gradients, but {why}")
        designed = "" if needs.design is None else "'s design"
        notes.append(
            f"{at_stage(n, experiment.stages)}a candidate of {name}{designed} counts as {1 + GRADIENT_PRICE} item "
            "evaluations for each of its items: the score, a forward and a backward pass"
        )
        if needs.design is not None:
            size, without = (needs.design(len(space.axes), o) for o in (options, replace(options, gradients=False)))
            notes.append(
                f"{at_stage(n, experiment.stages)}the {size} candidates of its design count as "
                f"{size * (1 + GRADIENT_PRICE)}, a design without gradients has {without}"
            )
        elif fitness.floor or fitness.constraints or fitness.goals[0].kind != "weighted_mean":
            notes.append(
                f"{at_stage(n, experiment.stages)}{name} follows the weighted mean of the tasks' metrics; floor, "
                "constraints and kind of the objective count where candidates are ranked"
            )
    return notes


def check_axes(experiment: Experiment, spaces: Sequence[SearchSpace]) -> None:
    """Raises UserError where a stage has axes of a kind, or more of them, than its algorithm can search."""
    for n, (stage, space) in enumerate(zip(experiment.stages, spaces, strict=True)):
        name, _ = experiment.algorithm_of(stage)
        needs = needs_of(name)
        if needs.proposes == "recipes":
            continue
        for axis in space.axes:
            if axis.kind not in needs.axis_kinds:
                raise UserError(
                    f"search: {at_stage(n, experiment.stages)}{name} cannot search the {axis.kind} axis {axis.name!r}; "
                    "fix it in the space, or use algorithm: auto"
                )
        if needs.most_axes is not None and len(space.axes) > needs.most_axes:
            raise UserError(
                f"search: {at_stage(n, experiment.stages)}{name} is for at most {needs.most_axes} axes, the space has "
                f"{len(space.axes)}; search fewer (groups: all), or use map or algorithm: auto"
            )


def check_routes(experiment: Experiment, spaces: Sequence[SearchSpace]) -> None:
    """Raises UserError where layer routes meet an algorithm that mixes whole models, or a task that looks at weights
    beside the base's."""
    for n, (stage, space) in enumerate(zip(experiment.stages, spaces, strict=True)):
        name, _ = experiment.algorithm_of(stage)
        needs, routed = needs_of(name), isinstance(space, RouteSpace)
        at = at_stage(n, experiment.stages)
        if routed and needs.routes:
            raise UserError(
                f"search: {at}{name} makes its paths itself and would not see this search space; drop search_space, or "
                "use algorithm: auto"
            )
        if routed and needs.proposes == "recipes":
            raise UserError(
                f"search: {at}{name} mixes the models itself and knows no layer routes; use algorithm: auto, or drop "
                "route"
            )
        if isinstance(space, RuleSpace) and not space.axes and not needs.routes:
            raise UserError(
                f"search: {at}{name} merges, but no expert has as many layers as the base; use a space with route, or "
                "route-ga"
            )
        if n == 0 and isinstance(space, RouteSpace) and space.waits_for_merge:
            raise UserError(
                "search_space: route.models names `merged`, but nothing is merged before; name the base, add merge "
                "axes such as weight, or let a stage of merges come first"
            )
        if routed or needs.routes:
            check_distances(experiment)


def check_distances(experiment: Experiment) -> None:
    """Raises UserError where a task looks at weights beside the base's, though there are layer routes."""
    for far in (t.name for t in experiment.tasks if t.kind == "weights"):
        raise UserError(
            f"task {far!r} of kind weights compares a model with the base weight by weight, which a layer route leaves "
            "nothing of; drop the task, or use kind structure"
        )


def check_designs(
    experiment: Experiment, spaces: Sequence[SearchSpace], experts: Sequence[str], allowance: Allowance
) -> None:
    """Raises UserError where a budget does not hold the design that an algorithm rests on, and a generation of what it
    learns from it; names the budget that does. Of item evaluations, a candidate's gradient takes its price."""
    for n, (stage, space) in enumerate(zip(experiment.stages, spaces, strict=True)):
        name, options = experiment.algorithm_of(stage)
        needs, budget = needs_of(name, options), allowance.of_stage(n)
        design = needs.design
        if design is None or budget is None:
            continue
        if needs.proposes == "recipes":
            size, what, fewer = len(experts), "experts", "name fewer experts"
            parts = {"of its merges": design(size, options)}
        else:
            size, what, fewer = len(space.axes), "axes", "search fewer axes (groups: all, or buckets)"
            designed, of_design = design(size, options), "of its design"
            if needs.gradients and allowance.budget.item_evaluations is not None:
                of_design = f"for the {designed} of its design with gradients"
                designed *= 1 + GRADIENT_PRICE
            parts = {of_design: designed, "of the front": options.population}
        if n == 0 and experiment.search.probes and (probes := len(space.probes())) <= budget / 4:
            parts["probes"] = probes
        wanted = sum(parts.values())
        if wanted > budget:
            raise UserError(
                f"search: {at_stage(n, experiment.stages)}{name} needs {wanted} candidates for {size} {what} "
                f"({', '.join(f'{k} {part}' for part, k in parts.items())}), the budget is {budget}; raise it, "
                f"{fewer}, or use algorithm: auto"
            )


def check_populations(experiment: Experiment, spaces: Sequence[SearchSpace], allowance: Allowance) -> list[str]:
    """A note for each stage that ends within its first generation, where the algorithm learns nothing.

    Raises UserError where not even the whole budget would hold that generation.
    """
    notes = []
    for n, (stage, space) in enumerate(zip(experiment.stages, spaces, strict=True)):
        name, options = experiment.algorithm_of(stage)
        budget = allowance.of_stage(n)
        population = getattr(options, "population", None)
        if name == "cma-es" and population is None:
            population = default_population(len(space.axes))
        if budget is None or population is None or needs_of(name).steady or population <= budget:
            continue
        where = at_stage(n, experiment.stages)
        if population > sum(allowance.of_stage(k) or 0 for k in range(len(experiment.stages))):
            raise UserError(
                f"search: {where}the population of {name}, {population}, is larger than the budget of {budget} "
                "candidates, so it would learn nothing; set a smaller population, raise the budget, or use "
                "algorithm: auto"
            )
        notes.append(
            f"{where}{budget} candidates are less than one generation of {name} ({population}): it only samples"
        )
    return notes


def remarks_on(experiment: Experiment, items: Mapping[str, tuple[Item, ...]]) -> list[str]:
    """What is allowed and still deserves a look before a run begins."""
    notes = [f"task {t.name!r}: {note}" for t in experiment.tasks for note in t.remarks(items[t.name])]
    fitness, policy = fitness_of(experiment), experiment.search.items
    for goal in fitness.goals:
        if goal.kind == "weighted_mean" and (listed := fitness.units_added_by(goal)):
            notes.append(
                f"fitness: {goal.name} adds different units ({listed}), so the one of larger numbers decides; give "
                "tasks a weight each, or take objective: recovered_gain, or several objectives"
            )
    if isinstance(policy, AdaptiveItems) and fitness.floor is not None:
        notes.append(
            f"search.items: {policy.start} items of a sample fall below the base by chance, which fitness.floor makes "
            "dear; take a larger start, or items: full"
        )
    return notes


def at_stage(n: int, stages: Sequence[Stage]) -> str:
    """How a line about stage n begins; empty where there is one stage only."""
    return f"stage {n + 1}: " if len(stages) > 1 else ""
