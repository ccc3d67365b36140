"""Warm starts: a new run with a grown pool begins from an old run's winners."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from evomerge.canonical import decode_array
from evomerge.cli import main
from evomerge.config import load
from evomerge.errors import UserError
from evomerge.history import History
from evomerge.journal import read
from evomerge.recipe import Recipe
from evomerge.run import run
from evomerge.warm import finalists_of, given_by

With = Callable[..., Any]


@pytest.fixture(scope="module")
def three(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Overrides that add a third expert to the small experiment."""
    one = Path(load(small_experiment).models.experts["one"])
    folder = tmp_path_factory.mktemp("third") / "three"
    shutil.copytree(one, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t * 1.01 for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return {"models.experts.three": str(folder), "search.budget": {"evaluations": 4}}


def test_a_grown_pool_begins_at_the_old_winners(
    three: dict[str, Any], experiment_with: With, finished_run: Path, tmp_path: Path
) -> None:
    """Finalists of the old run that are no baselines come first, best first, and the search starts at the best."""
    old = History.read(finished_run)
    given = finalists_of(finished_run, experiment_with(**three))
    out = tmp_path / "out"
    history = run(experiment_with(**three, **{"search.warm_start": given}), out)
    entries = [e for e in history.entries.values() if e.role == "given"]
    assert old.final is not None
    losses = old.final["losses"]
    finalists = sorted(old.final["finalists"], key=lambda i: (losses[str(i)], i))
    expected = [old.recipe(i) for i in finalists if old.entry(i).role != "baseline"]

    assert len(entries) == len(expected) > 0
    assert [e.id for e in entries] == list(range(5, 5 + len(expected))), "right behind five baselines"
    for entry, recipe in zip(entries, expected, strict=True):
        assert {b: r.sources for b, r in history.recipe(entry.id).blocks.items()} == {
            b: r.sources for b, r in recipe.blocks.items()
        }
        a, b = entry.scores("search"), next(e for e in old.entries.values() if e.recipe_id == recipe.id)
        assert a is not None
        assert json.dumps({t: [float(x) for x in m["cross_entropy"]] for t, m in a.items()}) == json.dumps(
            {t: [float(x) for x in m["cross_entropy"]] for t, m in (b.scores("search") or {}).items()}
        )
    [stage] = [e for e in read(out / "journal.jsonl")[0] if e["kind"] == "stage"]
    begun = history.spaces[0].decode(decode_array(stage["inputs"]["start"]), history.manifest)
    before = [e for e in history.entries.values() if e.role in ("baseline", "given")]
    expressible = [e for e in before if e.role == "given"]
    best = min(expressible, key=lambda e: (history.loss(e, "search"), e.id))
    assert begun.blocks == history.recipe(best.id).blocks


def test_another_name_for_the_same_expert(
    experiment_with: With, small_experiment: Path, finished_run: Path, tmp_path: Path
) -> None:
    """Sources are matched by content: an expert that is called otherwise now is the same expert."""
    models = load(small_experiment).models
    renamed = {"models.experts": {"uno": models.experts["one"], "two": models.experts["two"]}}
    given = finalists_of(finished_run, experiment_with(**renamed))
    change = {**renamed, "search.warm_start": given, "search.algorithm": "random", "search.budget": {"evaluations": 1}}
    history = run(experiment_with(**change), tmp_path / "out")
    used = {s for e in history.entries.values() if e.role == "given" for s in history.recipe(e.id).sources}

    assert used == {"base", "uno", "two"}


def test_a_missing_source_is_refused(
    three: dict[str, Any], experiment_with: With, finished_run: Path, small_experiment: Path
) -> None:
    """A pool that lacks an expert of the old winners cannot begin there, and the message names it."""
    experts = {"two": load(small_experiment).models.experts["two"], "three": three["models.experts.three"]}

    with pytest.raises(
        UserError,
        match=r"its source 'one' is not in the new pool \(sha256 \w{12}\); name that checkpoint under models, or leave",
    ):
        finalists_of(finished_run, experiment_with(**{"models.experts": experts}))


def test_an_unfinished_run_is_refused(run_copy: Path, experiment_with: With, tmp_path: Path) -> None:
    """A run without finalists, and a folder that is no run, give nothing to begin with."""
    lines = (run_copy / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (run_copy / "journal.jsonl").write_bytes(b"".join(lines[:12]))

    with pytest.raises(UserError, match="has no finalists yet"):
        finalists_of(run_copy, experiment_with())
    with pytest.raises(UserError, match="is no run directory"):
        finalists_of(tmp_path / "nothing", experiment_with())


def test_on_the_command_line(
    three: dict[str, Any],
    small_experiment: Path,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`evomerge run --warm-start DIR`, then `resume` without it: the recipes are part of the experiment."""
    out = tmp_path / "out"
    command = ["run", str(small_experiment), "--out", str(out), "--warm-start", str(finished_run), "--json"]
    for key, value in three.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    assert main(command) == 0
    whole = (out / "journal.jsonl").read_bytes()
    (out / "journal.jsonl").write_bytes(whole[: len(whole) // 2])

    assert main(["resume", str(out)]) == 0
    assert (out / "journal.jsonl").read_bytes() == whole
    assert any(e.role == "given" for e in History.read(out).entries.values())
    capsys.readouterr()


RECIPE = {
    "recipe": 1,
    "base": "base",
    "merge": [{"method": "task_arithmetic", "sources": {"one": {"weight": 0.6}, "two": {"weight": 0.3}}}],
}


def test_a_recipe_file_is_a_place_to_begin(experiment_with: With, small_experiment: Path, tmp_path: Path) -> None:
    """Coefficients that something else prepared, as a recipe file: in the experiment, or on the command line."""
    file = tmp_path / "prepared.yaml"
    file.write_text(json.dumps(RECIPE))
    change = {"search.algorithm": "random", "search.budget": {"evaluations": 1}}
    wanted = Recipe.model_validate(RECIPE)

    named = run(experiment_with(**change, **{"search.warm_start": [str(file)]}), tmp_path / "named")
    given = ["--warm-start", str(file), "--out", str(tmp_path / "given")]
    sets = [f"--set={k}={json.dumps(v)}" for k, v in change.items()]
    assert main(["run", str(small_experiment), *given, *sets]) == 0
    for history in (named, History.read(tmp_path / "given")):
        [entry] = [e for e in history.entries.values() if e.role == "given"]
        assert entry.recipe_id == wanted.model_copy(update={"dtype": history.dtype}).canonical(history.manifest).id


def test_a_recipe_file_of_another_pool_is_refused(experiment_with: With, tmp_path: Path) -> None:
    """By the name of the source that is missing, or by its hash."""
    file = tmp_path / "prepared.yaml"
    file.write_text(json.dumps(RECIPE | {"sources": {"one": {}, "two": {"sha256": "0" * 64}, "base": {}}}))

    with pytest.raises(
        UserError,
        match=r"its source 'two' is not in the new pool, which has other weights by that name \(sha256 0{12}\); "
        "name that checkpoint under models, drop the sha256 from the file to take 'two' as it is now, or leave out",
    ):
        given_by(file, experiment_with())
    file.write_text(json.dumps(RECIPE | {"merge": [{"method": "linear", "sources": {"three": {"weight": 1.0}}}]}))
    with pytest.raises(UserError, match=r"search\.warm_start, recipe 1.*'three'"):
        run(experiment_with(**{"search.warm_start": [str(file)]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_route_under_other_names(
    experiment_with: With, small_experiment: Path, finished_run: Path, tmp_path: Path
) -> None:
    """Hops and ends of a recipe follow the models to their names in the new pool; merged stays merged."""
    hops = [{"from": n, "layer": i} for n, i in (("one", 0), ("merged", 1), ("base", 1), ("two", 1))]
    rule = {"method": "linear", "sources": {"one": {}, "two": {}}}
    data = {"base": "base", "merge": [rule], "route": {"embed": "two", "hops": hops}}
    manifest = History.read(finished_run).manifest
    data["sources"] = {n: {"sha256": h} for n, h in manifest.hashes.items()}
    file = tmp_path / "route.yaml"
    file.write_text(json.dumps(data), encoding="utf-8")
    models = load(small_experiment).models
    renamed = experiment_with(**{"models.experts": {"uno": models.experts["one"], "due": models.experts["two"]}})

    (given,) = given_by(file, renamed)

    assert [h["from"] for h in given["route"]["hops"]] == ["uno", "merged", "base", "due"]
    assert given["route"]["embed"] == "due"
    assert set(given["sources"]) == {"base", "uno", "due"}
