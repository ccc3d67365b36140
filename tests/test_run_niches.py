"""A run by natural niches: steady, cut off and resumed, reported, exported, verified; and what it is refused for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.check import check
from evomerge.cli import main
from evomerge.errors import UserError
from evomerge.export.hf import build_weights
from evomerge.export.verify import open_recipe_pool, verify
from evomerge.history import History
from evomerge.report.coefficients import coefficient_maps
from evomerge.report.page import _coefficients
from evomerge.run import run
from evomerge.search.niches import Niches
from evomerge.warm import finalists_of

With = Callable[..., Any]
NICHES: dict[str, Any] = {
    "search": {"algorithm": "niches", "seed": 5, "budget": {"evaluations": 12}, "population": 5, "probes": False},
}


@pytest.fixture(scope="module")
def whole(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without a lag."""
    from evomerge.config import load

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("niches") / "out"
    run(load(small_experiment, NICHES), out)
    return out


def test_seeds_cost_nothing(whole: Path) -> None:
    """Base and experts are answered from the baselines' scores; children are new, with parents among the members."""
    history = History.read(whole)
    search = [e for e in history.entries.values() if e.role == "search"]
    baselines = {e.recipe_id for e in history.entries.values() if e.role == "baseline"}

    assert len(search) == 12
    assert [e.recipe_id in baselines for e in search] == [True] * 3 + [False] * 9
    assert history.cached == 3
    assert all(len(set(e.parents)) == 2 and max(e.parents) < e.id for e in search[3:])
    assert all(history.recipe(e.id).segments is not None for e in search[3:])


def test_cut_anywhere(whole: Path, experiment_with: With, tmp_path: Path) -> None:
    """Between and inside any two events the run is completed to the same bytes."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    journal = (out / "journal.jsonl").read_bytes()
    ends = [i + 1 for i, b in enumerate(journal) if b == ord("\n")]

    for cut in (ends[12], ends[16] - 7, ends[21], ends[-4]):
        (out / "journal.jsonl").write_bytes(journal[:cut])
        run(experiment_with(**NICHES), out)
        assert (out / "journal.jsonl").read_bytes() == journal


def test_with_a_lag(experiment_with: With, tmp_path: Path) -> None:
    """Three under way at once, cut off in the middle: the same bytes."""
    steady = {**NICHES, "search.lag": 3}
    run(experiment_with(**steady), tmp_path / "out")
    journal = tmp_path / "out" / "journal.jsonl"
    first = journal.read_bytes()
    journal.write_bytes(first[: len(first) * 2 // 3])
    run(experiment_with(**steady), tmp_path / "out")

    assert journal.read_bytes() == first


def test_a_member_leaves_as_a_model(whole: Path, experiment_with: With, tmp_path: Path) -> None:
    """A child is exported, loads in stock transformers, verifies to the bit; its recipe rebuilds it and starts runs."""
    from transformers import AutoModelForCausalLM

    history = History.read(whole)
    child = max(e.id for e in history.entries.values() if e.role == "search")
    assert main(["export", str(whole), str(child), "--to", str(tmp_path / "model")]) == 0

    v = verify(tmp_path / "model")
    assert (v.ok, v.problems) == (True, ())
    assert max(v.scores.values()) == 0.0
    recipe = history.recipe(child)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    pool, manifest = open_recipe_pool(recipe, {n: history.source_paths()[n] for n in recipe.sources})
    for name, tensor in build_weights(recipe.canonical(manifest), pool, manifest).items():
        assert torch.equal(loaded[name], tensor)
    record = json.loads((tmp_path / "model" / "evomerge.json").read_text())
    assert record["mergekit"].startswith("not expressible: mergekit has one weight for a whole tensor")
    assert "Piecewise" in (tmp_path / "model" / "README.md").read_text()

    again = main(["merge", str(tmp_path / "model" / "recipe.yaml"), "--to", str(tmp_path / "again")])
    assert again == 0
    one, two = (tmp_path / n / "model.safetensors" for n in ("model", "again"))
    assert one.read_bytes() == two.read_bytes()
    assert any("segments" in r for r in finalists_of(whole, experiment_with()))


def test_the_page_shows_segments(whole: Path) -> None:
    """The page is written; of segments it has the mean weights over the blocks."""
    history = History.read(whole)
    child = max(e.id for e in history.entries.values() if e.role == "search")
    recipe = history.recipe(child)
    assert recipe.segments is not None
    assert main(["report", str(whole)]) == 0

    assert f"linear mixes of {len(recipe.segments.cuts)} segments" in "".join(_coefficients(history, child))
    [weights] = coefficient_maps({child: recipe}, history.manifest)
    means = dict.fromkeys(weights.rows, 0.0)
    block = next(iter(history.manifest.blocks.values()))
    for start, stop, parts in recipe.segments.within(block.start, block.stop):
        for n, w in parts.items():
            means[n] += w * (stop - start) / (block.stop - block.start)
    assert [row[0] for row in weights.values[child]] == pytest.approx(list(means.values()))


def test_what_has_no_items_is_refused(experiment_with: With, tmp_path: Path) -> None:
    """An objective with the distance from the base is no competition for items; nothing is written."""
    tasks = json.loads(json.dumps([t.model_dump(exclude_defaults=True) for t in experiment_with().tasks]))
    experiment = experiment_with(**NICHES, **{"fitness.tasks": [*tasks, {"name": "near", "kind": "weights"}]})

    for do in (lambda: check(experiment), lambda: run(experiment, tmp_path / "out")):
        with pytest.raises(UserError, match="niches compares models item by item, but task 'near' scores a model as"):
            do()
    assert not (tmp_path / "out").exists()


def test_no_probes_where_axes_are_unused(
    experiment_with: With, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Algorithms that propose recipes score none; a run that has them from an earlier version goes on with them."""
    probing = {**NICHES, "search": {**NICHES["search"], "probes": True, "budget": {"evaluations": 20}}}
    plain = run(experiment_with(**probing), tmp_path / "plain")
    with monkeypatch.context() as earlier:
        earlier.setattr(Niches, "needs", replace(Niches.needs, proposes="genomes"))
        old = run(experiment_with(**probing), tmp_path / "old")
    journal = (tmp_path / "old" / "journal.jsonl").read_bytes()
    (tmp_path / "old" / "journal.jsonl").write_bytes(journal[: len(journal) // 2])
    run(experiment_with(**probing), tmp_path / "old")

    assert not any(e.name == "probe" for e in plain.entries.values())
    assert any(e.name == "probe" for e in old.entries.values())
    assert (tmp_path / "old" / "journal.jsonl").read_bytes() == journal
