"""A merge first, then routes through it: one journal, cut off in either stage, by any number of workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.commit import TOGETHER, alike
from evomerge.config import load
from evomerge.errors import RunError, UserError
from evomerge.export.hf import write_hf
from evomerge.export.verify import verify
from evomerge.export.write import write_export
from evomerge.fitness import FitnessSpec
from evomerge.history import History
from evomerge.merge.pipeline import BuildError
from evomerge.merge.route import check_routable
from evomerge.pool import ModelPool
from evomerge.prepare import open_pool, prepare
from evomerge.proposal import ItemSet, Job
from evomerge.recipe import MERGED, Recipe, in_common
from evomerge.report.results import Results, warnings_on
from evomerge.run import run
from evomerge.standalone import score_recipe

With = Callable[..., Any]
WEIGHTS = {"method": "task_arithmetic", "axes": {"weight": {"low": -0.5, "high": 1.5, "default": "uniform"}}}
ROUTES = {"route": {"encoding": "slices", "models": ["merged", "experts"]}}
STAGES = [{"space": WEIGHTS, "share": 0.5}, {"space": ROUTES, "share": 0.5, "algorithm": "random"}]
HYBRID = {
    "search_space": {"stages": STAGES},
    "search": {"algorithm": "cma-es", "seed": 3, "budget": {"evaluations": 16}, "population": 4, "probes": False},
}


@pytest.fixture(scope="module")
def hybrid(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of both stages."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("hybrid") / "out"
    run(load(small_experiment, HYBRID), out)
    return out


def routed(history: History) -> list[tuple[int, Recipe]]:
    found = [(e.id, history.recipe(e.id)) for e in history.entries.values() if e.stage == 1]
    return [(i, r) for i, r in found if r.route is not None]


def test_routes_go_through_the_best_merge(hybrid: Path) -> None:
    """The second stage begins with the best merge of the first, and its routes' merged layers are just that merge's."""
    history = History.read(hybrid)
    first = [e for e in history.entries.values() if history.recipe(e.id).route is None and e.scores("search")]
    before = [e for e in first if e.stage < 1]
    best = min(before, key=lambda e: (history.loss(e, "search"), e.id))
    merged = history.recipe(history.merged[1])

    assert history.merged == {1: best.id}
    through = [r for _, r in routed(history) if any(h.from_ == MERGED for h in r.route.hops)]  # type: ignore[union-attr]
    assert through
    for recipe in through:
        for name, rule in recipe.blocks.items():
            if name.startswith("layers."):
                assert rule == merged.blocks[name]


def test_a_merge_that_wins_over_routes_is_pointed_out(hybrid: Path) -> None:
    """The table says where no route was taken, and only there."""
    history = History.read(hybrid)
    plain = next(e.id for e in history.entries.values() if e.role == "search" and e.stage == 0)
    said = "the winner goes through its layers in their own order: no route did better on the select split"

    for number, expected in ((plain, True), (routed(history)[0][0], False)):
        found = Results([], [], number, {}, 0, 1)
        assert (said in warnings_on(history, found)) == expected


def test_cut_in_either_stage(hybrid: Path, experiment_with: With, tmp_path: Path) -> None:
    """Between and inside events, before, at and behind the second stage's start: completed to the same bytes."""
    out = Path(shutil.copytree(hybrid, tmp_path / "out"))
    journal = (out / "journal.jsonl").read_bytes()
    lines = journal.splitlines(keepends=True)
    second = next(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "stage" and b'"merged"' in line)

    for cut in (second - 4, second, second + 1, second + 7):
        kept = b"".join(lines[:cut])
        (out / "journal.jsonl").write_bytes(kept[:-3] if cut == second + 7 else kept)
        run(experiment_with(**HYBRID), out)
        assert (out / "journal.jsonl").read_bytes() == journal


def test_two_workers_write_the_same_journal(hybrid: Path, experiment_with: With, tmp_path: Path) -> None:
    """Units of routes are formed without regard to who works on them."""
    two = {**HYBRID, "workers": {"backend": "local", "count": 2, "device": "cpu"}}
    run(experiment_with(**two), tmp_path / "out")

    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == (hybrid / "journal.jsonl").read_bytes()


def test_a_route_through_the_merge_leaves_as_a_model(hybrid: Path, tmp_path: Path) -> None:
    """It is exported with the merge's weights inside, and a rebuild gives the same tensors and scores."""
    number, _ = next((i, r) for i, r in routed(History.read(hybrid)) if any(h.from_ == MERGED for h in r.route.hops))  # type: ignore[union-attr]
    write_export(History.read(hybrid), number, "hf", tmp_path / "model")

    v = verify(tmp_path / "model")
    assert (v.ok, v.problems) == (True, ())


# -- units ---------------------------------------------------------------------------------------------------------


def jobs(*paths: list[tuple[str, int]]) -> list[Job]:
    items = ItemSet("search", {"sums": (0,)})
    out = []
    for i, path in enumerate(paths):
        hops = [{"from": source, "layer": layer} for source, layer in path]
        recipe = Recipe.model_validate({"merge": [], "route": {"hops": hops}} if path else {"merge": []})
        out.append(Job(i, 0, recipe, items))
    return out


def test_merges_stay_alone_and_in_order() -> None:
    """Without routes every job is a unit, as it was given."""
    assert [[j.proposal for j in unit] for unit in alike(jobs([], [], []))] == [[0], [1], [2]]


def test_routes_that_begin_alike_stand_together() -> None:
    """Half of the path decides; whoever is alone stays so; units do not grow beyond a few."""
    a = [("x", i) for i in range(6)]
    units = alike(jobs(a, [("y", 0), *a], [*a[:3], ("y", 3)], [], [*a, ("y", 1)]))

    assert sorted(sorted(j.proposal for j in unit) for unit in units) == [[0, 2, 4], [1], [3]]
    for unit in units:
        for first, second in pairwise(unit):
            assert in_common(first.recipe.path, second.recipe.path) >= 3
    many = alike(jobs(*[[*a, ("y", i)] for i in range(2 * TOGETHER + 1)]))
    assert [len(unit) for unit in many] == [TOGETHER, TOGETHER, 1]


# -- refusals ------------------------------------------------------------------------------------------------------

PATH = {"recipe": 1, "route": {"hops": [{"from": "one", "layer": 1}, {"from": "two", "layer": 0}]}}
FAR = {"name": "far", "kind": "weights", "weight": 0.1}


def test_a_given_route_is_no_distance_away(experiment_with: With, small_experiment: Path) -> None:
    """A route among the recipes to begin with, and a task that compares weights: refused before anything is scored."""
    tasks = [*json.loads(small_experiment.read_text())["fitness"]["tasks"]]
    for task in tasks:
        task["splits"] = {s: str(small_experiment.parent / f) for s, f in task["splits"].items()}
    experiment = experiment_with(**{"search.warm_start": [PATH], "fitness.tasks": [*tasks, FAR]})

    with pytest.raises(UserError, match="task 'far' of kind weights compares a model with the base weight by weight"):
        prepare(experiment)
    found = {t.name: t for t in experiment.tasks}["far"]
    pool = open_pool(experiment)
    with pytest.raises(RunError, match="a layer route has no distance from the base"):
        score_recipe(Recipe.model_validate(PATH), pool, FitnessSpec.model_construct(tasks=(found,)), splits=("select",))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"search_space": ROUTES}, "route.models names `merged`, but nothing is merged before"),
        (
            {"search_space": {"route": {"encoding": "slices"}}, "search.algorithm": "route-ga"},
            "route-ga makes its paths itself and would not see this search space",
        ),
    ],
)
def test_routes_that_come_to_nothing_are_refused(overrides: Any, words: str, experiment_with: With) -> None:
    """A merged model that nobody builds, and a space that nobody looks at."""
    with pytest.raises(UserError, match=words):
        prepare(experiment_with(**overrides))


@pytest.mark.parametrize("algorithm", ["cma-es", "niches"])
def test_nothing_to_merge(algorithm: str, experiment_with: With, tiny_model: Any) -> None:
    """In a pool whose only expert has another depth, a stage of merges could find the base alone."""
    stages = [{"space": WEIGHTS, "share": 0.5}, {"space": {"route": {"encoding": "slices"}}, "share": 0.5}]
    stages[0] |= {"algorithm": algorithm}
    deep = {"models.experts": {"deep": str(tiny_model("llama", 1, num_hidden_layers=3))}}

    with pytest.raises(UserError, match=f"{algorithm} merges, but no expert has as many layers as the base"):
        prepare(experiment_with(**deep, search_space={"stages": stages}))


def test_types_of_layers_in_another_order_are_refused(tiny_model: Any) -> None:
    """As a merge, the natural path through such an expert would have the base's windows."""
    types = ["sliding_attention", "full_attention"]
    one, other = (tiny_model("gemma3_text", 1, layer_types=t) for t in (types, types[::-1]))

    with pytest.raises(UserError, match=r"expert 'other'.*layer_types is .*models of as many layers must agree in it"):
        check_routable(ModelPool.open(one, {"other": other}))


@pytest.mark.parametrize("spoil", [float("nan"), 6e4])
def test_exports_of_routes_are_finite(spoil: float, tiny_model: Any, tmp_path: Path) -> None:
    """A NaN in a source's layer, and a weight that a gain takes beyond float16, are told and nothing is written."""
    sick = tiny_model("llama", 1, name="sick", dtype="float16")
    tensors = load_file(sick / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = spoil
    save_file(tensors, sick / "model.safetensors", {"format": "pt"})
    pool = ModelPool.open(tiny_model("llama", dtype="float16"), {"sick": sick})
    manifest = pool.manifest()
    hops = [{"from": "base", "layer": 0}, {"from": "sick", "layer": 1, "mlp_gain": 2.0}]
    recipe = Recipe.model_validate({"dtype": "float16", "route": {"hops": hops}}).canonical(manifest)

    with pytest.raises(BuildError, match=r"NaN or infinite weights in mlp.down_proj.weight of hop 2, layer 1 of sick"):
        write_hf(tmp_path / "out", recipe, pool, manifest)
    assert not (tmp_path / "out").exists()
