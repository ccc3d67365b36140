"""Verification: an export is what its record says, or it is told what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.cli import main
from evomerge.errors import UserError
from evomerge.export.hf import write_hf
from evomerge.export.record import scores_for_record
from evomerge.export.verify import is_recipe, open_recipe_pool, recipe_paths, verify
from evomerge.history import History
from evomerge.pool import ModelPool
from evomerge.recipe import Recipe


@pytest.fixture
def export(finished_run: Path, tmp_path: Path) -> Path:
    """The finished run's winner as a folder."""
    assert main(["export", str(finished_run), "--to", str(tmp_path / "export")]) == 0
    return tmp_path / "export"


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_an_export_verifies(export: Path, finished_run: Path) -> None:
    """Every tensor is rebuilt to the same bits and every recorded score comes out again."""
    history = History.read(finished_run)
    v = verify(export)

    assert v.ok
    assert v.tensors == len(history.manifest.tensors)
    assert (v.differing, v.problems) == ((), ())
    assert len(v.scores) == 3 * 2 * 5, "splits, tasks, metrics"
    assert max(v.scores.values()) == 0.0


def test_the_record_has_the_journals_scores(finished_run: Path) -> None:
    """Means by split, task and metric, and a fitness with absolute paths that scores the same items."""
    history = History.read(finished_run)
    assert history.winner_id is not None
    scores, fitness = scores_for_record(history, history.winner_id)

    recorded = history.entry(history.winner_id).scores("report")
    assert recorded is not None
    assert scores["report"]["sums"]["accuracy"] == float(recorded["sums"]["accuracy"].mean())
    assert set(scores) == {"search", "select", "report"}
    assert all(Path(p).is_file() for t in fitness["tasks"] for p in t["splits"].values())
    json.dumps([scores, fitness])


def test_a_flipped_bit_is_found(export: Path) -> None:
    """One bit of one weight makes the export differ from its rebuild, by name."""

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[3, 4] ^= 1

    edit(export / "model.safetensors", flip)
    v = verify(export)

    assert not v.ok
    assert v.differing == ("model.layers.1.mlp.up_proj.weight",)
    assert v.problems == ("1 tensors differ from a rebuild, the first is model.layers.1.mlp.up_proj.weight",)


def test_missing_and_surplus_tensors_are_found(export: Path) -> None:
    """Tensors that only one side has differ too, and a model that cannot be scored is one more problem."""
    edit(export / "model.safetensors", lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
    v = verify(export)

    assert not v.ok
    assert v.differing == ("model.layers.0.mlp.up_proj.weight",)


def test_nan_in_the_export_is_a_problem_not_a_traceback(export: Path) -> None:
    """An export whose weights became NaN is told apart, although it can no longer be scored."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][0] = float("nan")

    edit(export / "model.safetensors", spoil)
    v = verify(export)

    assert not v.ok
    assert v.differing == ("model.norm.weight",)
    assert any("cannot be scored" in p for p in v.problems)


def test_a_changed_recipe_is_found(export: Path) -> None:
    """Another coefficient in recipe.yaml disagrees with the record's id and with the tensors."""
    recipe = Recipe.load(export / "recipe.yaml")
    first, *rest = recipe.merge or ()
    name = next(iter(first.sources))
    changed = first.model_copy(update={"sources": {**first.sources, name: {"weight": 0.123}}})
    (export / "recipe.yaml").write_text(recipe.model_copy(update={"merge": (changed, *rest)}).to_yaml())
    v = verify(export)

    assert not v.ok
    assert any("recipe.yaml has id" in p for p in v.problems)
    assert v.differing


def test_a_changed_record_is_found(export: Path) -> None:
    """A tensor hash or a score that was edited in the record disagrees."""
    record = json.loads((export / "evomerge.json").read_text())
    record["tensors"]["model.norm.weight"] = "0" * 64
    record["scores"]["report"]["sums"]["accuracy"] += 0.01
    (export / "evomerge.json").write_text(json.dumps(record))
    v = verify(export)

    assert not v.ok
    assert "1 tensors differ from the record, the first is model.norm.weight" in v.problems
    assert "report.sums.accuracy differs by 0.01" in v.problems


def test_a_changed_source_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    """Where a source is not what the recipe names, rebuilding makes no sense and says which."""
    expert = tiny_model("llama", 1, name="expert")
    pool = ModelPool.open(tiny_model("llama"), {"x": expert})
    recipe = Recipe.model_validate({"merge": [{"method": "linear", "sources": {"x": {}}}]})
    write_hf(tmp_path / "out", recipe.canonical(pool.manifest()), pool, pool.manifest())
    assert verify(tmp_path / "out").ok

    edit(expert / "model.safetensors", lambda t: t["model.norm.weight"].mul_(2))
    with pytest.raises(UserError, match="source 'x' should have sha256"):
        verify(tmp_path / "out")
    (expert / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("text", [None, "{", "[]", '{"format": 2}', '{"format": 1, "sources": [], "tensors": {}}'])
def test_folders_without_a_record(export: Path, text: str | None) -> None:
    """A folder that evomerge did not export, or whose record is damaged, is refused in one line."""
    if text is None:
        (export / "evomerge.json").unlink()
    else:
        (export / "evomerge.json").write_text(text)

    with pytest.raises(UserError, match=r"evomerge\.json: (cannot be read|is not an export record)"):
        verify(export)


def test_recipes_need_folders_for_their_sources(tmp_path: Path) -> None:
    """A recipe without paths, or without one for its base, says which source lacks it."""
    plain = Recipe.model_validate(
        {"sources": {"base": {}, "x": {}}, "merge": [{"method": "ties", "sources": {"x": {}}}]}
    )
    halves = Recipe.model_validate({"sources": {"base": {"path": "b"}, "x": {}}})

    with pytest.raises(UserError, match="source 'base': the recipe gives no folder"):
        recipe_paths(plain)
    with pytest.raises(UserError, match="source 'x': the recipe gives no folder"):
        recipe_paths(halves)
    with pytest.raises(UserError, match="no folder for its base"):
        recipe_paths(Recipe.model_validate({}))
    with pytest.raises(UserError, match=r"no folder \(path\) for source 'x'"):
        open_recipe_pool(plain, {"base": tmp_path})


def test_what_counts_as_a_recipe_file(tmp_path: Path) -> None:
    """YAML files with a mapping are recipes; folders and other files are not."""
    (tmp_path / "r.yaml").write_text("recipe: 1\n")
    (tmp_path / "list.yml").write_text("- 1\n")
    (tmp_path / "r.json").write_text("{}")

    assert is_recipe(tmp_path / "r.yaml")
    assert not any(is_recipe(tmp_path / n) for n in ("list.yml", "r.json", "gone.yaml", "."))
