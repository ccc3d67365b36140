"""Layers with large task vectors get axes of their own; the choice is made once and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from evomerge.config import fitness_of, load
from evomerge.errors import UserError
from evomerge.history import load_resolved
from evomerge.importance import OUTSIDE, REST, important_groups, layer_sensitivities, layer_sizes
from evomerge.merge.geometry import FlatGeometry
from evomerge.objective import differentiated
from evomerge.pool import ModelPool
from evomerge.prepare import prepare
from evomerge.proposal import Job, WorkUnit
from evomerge.recipe import Recipe
from evomerge.run import run
from evomerge.space import SpaceSpec

With = Callable[..., Any]
AXIS = {"low": 0.0, "high": 1.0, "default": "uniform"}
SPEC = SpaceSpec.model_validate({"groups": {"important": 1}, "axes": {"weight": AXIS}})


@pytest.fixture
def moved(tiny_model: Any) -> tuple[Path, dict[str, Path]]:
    """A base and two experts that differ from it in layer 1 most."""
    base = tiny_model("llama", num_hidden_layers=3)
    experts = {}
    for n, factor in (("one", 1.0), ("two", 2.0)):
        experts[n] = tiny_model("llama", name=n, num_hidden_layers=3)
        tensors = load_file(base / "model.safetensors")
        for name in tensors:
            step = {"0": 0.001, "1": 0.01, "2": 0.002}.get(name.split(".")[2] if ".layers." in name else "", 0.05)
            tensors[name] = tensors[name] + step * factor
        save_file(tensors, experts[n] / "model.safetensors", {"format": "pt"})
    return base, experts


def test_sizes_are_norms_of_task_vectors(moved: tuple[Path, dict[str, Path]]) -> None:
    """Against the norms computed tensor by tensor; what is in no layer does not count."""
    base, experts = moved
    pool = ModelPool.open(base, experts)
    manifest = pool.manifest()
    origin = load_file(base / "model.safetensors")

    expected = np.zeros(3)
    for path in experts.values():
        tau = {n: (t - origin[n]).double() for n, t in load_file(path / "model.safetensors").items()}
        for layer in range(3):
            squares = [float((x * x).sum()) for n, x in tau.items() if f".layers.{layer}." in n]
            expected[layer] += np.sqrt(sum(squares))
    assert layer_sizes(FlatGeometry(pool, manifest), manifest) == pytest.approx(expected, rel=1e-6)


def test_groups_cover_every_block_once(moved: tuple[Path, dict[str, Path]]) -> None:
    """The largest layers alone, then the other layers, then what is in none."""
    pool = ModelPool.open(*moved)
    manifest = pool.manifest()

    for n, names in ((1, ["layers.1", REST]), (2, ["layers.1", "layers.2", REST])):
        spec = SPEC.model_copy(update={"groups": SPEC.groups.model_copy(update={"important": n})})  # type: ignore[union-attr]
        groups = important_groups(spec, np.array([1.0, 9.0, 2.0]), manifest).groups
        assert [g.name for g in groups] == [*names, OUTSIDE]  # type: ignore[union-attr]
    everything = SPEC.model_copy(update={"groups": SPEC.groups.model_copy(update={"important": 9})})  # type: ignore[union-attr]
    named = important_groups(everything, np.ones(3), manifest).groups
    assert [g.name for g in named] == ["layers.0", "layers.1", "layers.2", OUTSIDE]  # type: ignore[union-attr]


def test_a_run_keeps_its_choice(experiment_with: With, tmp_path: Path) -> None:
    """The groups stand in the run's experiment by name; given again, the same folder goes on."""
    space = {"groups": {"important": 1}, "axes": {"weight": AXIS}}
    change = {"search_space": space, "search.algorithm": "random", "search.budget": {"evaluations": 3}}
    prepared = prepare(experiment_with(**change))
    assert any("there the task vectors are largest" in n for n in prepared.notes)

    run(experiment_with(**change), tmp_path / "out")
    before = (tmp_path / "out" / "journal.jsonl").read_bytes()
    groups = load_resolved(tmp_path / "out").search_space.groups  # type: ignore[union-attr]
    assert [g.name for g in groups][-2:] == [REST, OUTSIDE]
    run(experiment_with(**change), tmp_path / "out")
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == before


def test_more_than_there_are_is_said(experiment_with: With) -> None:
    """A space made for larger models stays usable with two layers; the note says that none shares its axes."""
    space = {"groups": {"important": 99}, "axes": {"weight": AXIS}}
    notes = prepare(experiment_with(search_space=space)).notes

    assert "axes of their own for each of the 2 layers, which are no more than {important: 99} asks for" in notes
    assert not any("largest" in n for n in notes)


def test_none_is_refused(small_experiment: Path) -> None:
    """At least one layer."""
    with pytest.raises(UserError, match="important"):
        load(
            small_experiment, {"search_space": {"groups": {"important": 0}, "axes": {"weight": {"low": 0, "high": 1}}}}
        )


def test_sensitivity_is_the_slope_of_the_objective(experiment_with: With) -> None:
    """Against differences of the real loss where one layer's coefficients move together."""
    experiment = experiment_with(**{"search.algorithm": "random"})
    prepared = prepare(experiment)
    manifest, items, fitness = prepared.manifest, prepared.items["search"], fitness_of(experiment)
    mean = prepared.baselines()["uniform"]
    sizes = layer_sensitivities(fitness, prepared.evaluator(), mean, items, manifest)

    evaluator = prepared.evaluator()()
    layers = manifest.layers[manifest.base]
    expected = np.zeros(layers)
    step = 0.02
    for layer in range(layers):
        for expert in manifest.experts:
            losses = []
            for sign in (1.0, -1.0):
                weights = {e: {"weight": 1 / len(manifest.experts)} for e in manifest.experts}
                moved = {**weights, expert: {"weight": 1 / len(manifest.experts) + sign * step}}
                rules = [
                    {"match": {"layers": [layer, layer]}, "method": "task_arithmetic", "sources": moved},
                    {"match": "all", "method": "task_arithmetic", "sources": weights},
                ]
                data = {"base": manifest.base, "dtype": prepared.dtype, "merge": rules}
                recipe = Recipe.model_validate(data).canonical(manifest)
                [(e, _)] = evaluator.evaluate(WorkUnit(0, (Job(0, 0, recipe, items),)))
                assert e.scores is not None
                share = {t.name: s for t, s in fitness.weights_of(fitness.goals[0])}
                metrics = dict(differentiated(fitness))
                losses.append(sum(share[t] * float(e.scores[t][metrics[t]].mean(dtype=np.float64)) for t in share))
            expected[layer] += abs(losses[0] - losses[1]) / (2 * step)
    assert sizes == pytest.approx(expected, rel=0.05, abs=1e-3)


def test_groups_by_sensitivity(experiment_with: With, tmp_path: Path) -> None:
    """Chosen once, kept in the run's experiment; a task without a gradient is refused with the way out."""
    space = {"groups": {"important": 1, "by": "sensitivity"}, "axes": {"weight": AXIS}}
    change = {"search_space": space, "search.algorithm": "random", "search.budget": {"evaluations": 2}}
    run(experiment_with(**change), tmp_path / "out")
    groups = load_resolved(tmp_path / "out").search_space.groups  # type: ignore[union-attr]

    assert [g.name for g in groups][-2:] == [REST, OUTSIDE]
    goals = [{"name": "a", "tasks": ["sums"]}, {"name": "b", "tasks": ["words"]}]
    with pytest.raises(
        UserError, match="groups: sensitivity is a gradient, but the fitness has 2 objectives; take by: size"
    ):
        prepare(experiment_with(**change, **{"fitness.objectives": goals}))
