"""Search algorithms. One algorithm, one file, beside its paper; a new one is that file and one line here."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np

from evomerge.errors import UserError, nearest
from evomerge.search.base import Ids, Needs, Optimizer, Start
from evomerge.space import Axis


class Algorithm(NamedTuple):
    """Where an algorithm is (module:class; its `Options` stand beside it) and one line about it."""

    where: str
    about: str


ALGORITHMS: Mapping[str, Algorithm] = {
    "cma-es": Algorithm(
        "evomerge.search.cmaes:CmaEs", "covariance matrix adaptation, restarts with doubled population"
    ),
    "adam": Algorithm("evomerge.search.adam:Adam", "gradient descent on the coefficients, through the merged model"),
    "ga": Algorithm("evomerge.search.ga:Ga", "tournaments, blend crossover, mutation: a plain baseline"),
    "route-ga": Algorithm(
        "evomerge.search.route_ga:RouteGa", "layer routes: paths through layers of all models, varied hop by hop"
    ),
    "greedy-soup": Algorithm("evomerge.search.greedy_soup:GreedySoup", "experts join a plain mean where that helps"),
    "frank-wolfe": Algorithm("evomerge.search.frank_wolfe:FrankWolfe", "steps towards the expert that helps most"),
    "map-elites": Algorithm(
        "evomerge.search.map_elites:MapElites", "quality-diversity: the best for every cell of the fitness's measures"
    ),
    "cycleqd": Algorithm(
        "evomerge.search.cycleqd:CycleQd",
        "each measure in turn is the quality; mixes of experts by bands of singular values",
    ),
    "niches": Algorithm("evomerge.search.niches:Niches", "M2N2: members share out items, mates add what is missing"),
    "nsga-ii": Algorithm("evomerge.search.nsga2:Nsga2", "Pareto front by crowding distance, for two objectives"),
    "nsga-iii": Algorithm("evomerge.search.nsga3:Nsga3", "Pareto front by reference directions, for three and more"),
    "map": Algorithm("evomerge.search.map:Map", "Pareto front of quadratic surrogates: few evaluations, few axes"),
    "bayesian-map": Algorithm(
        "evomerge.search.bayesian_map:BayesianMap", "MAP whose design goes where its surrogates err, for up to 6 axes"
    ),
    "nested-map": Algorithm(
        "evomerge.search.nested_map:NestedMap", "MAP over two models at a time until one is left, for many experts"
    ),
    "tpe": Algorithm("evomerge.search.tpe:Tpe", "tree-structured Parzen estimators: mixed and conditional axes"),
    "gp": Algorithm("evomerge.search.gp:Gp", "Gaussian process: fewest evaluations where axes are few"),
    "random": Algorithm("evomerge.search.random_search:RandomSearch", "uniform points: the baseline to beat"),
}


def _module(algorithm: str) -> Any:
    if algorithm not in ALGORITHMS:
        raise UserError(f"unknown algorithm {algorithm!r}{nearest(algorithm, ALGORITHMS)}")
    return importlib.import_module(ALGORITHMS[algorithm].where.partition(":")[0])


def _class(algorithm: str) -> Any:
    return getattr(_module(algorithm), ALGORITHMS[algorithm].where.partition(":")[2])


def needs_of(algorithm: str, options: Any = None) -> Needs:
    """What an algorithm asks of the driver, with these options. Raises UserError for an unknown name."""
    needs: Needs = _class(algorithm).needs
    return dataclasses.replace(needs, gradients=getattr(options, "gradients", needs.gradients))


def settings_of(algorithm: str) -> frozenset[str]:
    """Names of an algorithm's settings. Raises UserError for an unknown name."""
    return frozenset(f.name for f in dataclasses.fields(_module(algorithm).Options))


def make_options(algorithm: str, settings: Mapping[str, Any], beside: Iterable[str] = ()) -> Any:
    """The algorithm's options from the experiment's settings. Raises UserError for unknown or wrong ones.

    `beside` are keys that may stand beside the settings; a misspelt one is told from a misspelt setting.
    """
    options = _module(algorithm).Options
    fields = {f.name: f for f in dataclasses.fields(options)}
    for name, value in settings.items():
        if name not in fields:
            raise UserError(f"search: {algorithm} has no setting {name!r}{nearest(name, {*fields, *beside})}")
        hint = get_type_hints(options)[name]
        if get_origin(hint) is Literal:
            wanted, fits = " or ".join(get_args(hint)), value in get_args(hint)
        elif hint is bool:
            wanted, fits = "true or false", isinstance(value, bool)
        elif hint is float:
            wanted, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
        else:  # int, and int | None
            wanted, fits = "a whole number", isinstance(value, int) and not isinstance(value, bool)
        if not fits:
            raise UserError(f"search: {name} should be {wanted}, got {value!r}")
    try:
        return options(**settings)
    except ValueError as e:
        raise UserError(f"search: {e}") from None


def make_optimizer(
    algorithm: str, axes: Sequence[Axis], start: Start, rng: np.random.Generator, ids: Ids, options: Any
) -> Optimizer:
    """An optimizer by name. Raises UserError for an unknown name or axes that it cannot search."""
    cls = _class(algorithm)
    for axis in axes:
        if axis.kind not in cls.needs.axis_kinds:
            raise UserError(f"search: {algorithm} cannot search the {axis.kind} axis {axis.name!r}")
    return cls(axes, start, rng, ids, options)  # type: ignore[no-any-return]
