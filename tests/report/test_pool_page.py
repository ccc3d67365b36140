"""Tables and page of `evomerge inspect`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from evomerge.cli import main
from evomerge.inspect_pool import Inspection, inspect_pool
from evomerge.report.pool_page import pool_page, pool_text

Capsys = pytest.CaptureFixture[str]
EXPERTS = ("skills-add", "skills-attr", "skills-count")


@pytest.fixture(scope="module")
def models(quickstart: Path) -> Path:
    return quickstart / "models"


@pytest.fixture(scope="module")
def inspection(models: Path) -> Inspection:
    return inspect_pool(("skills-base", models / "skills-base"), {n: models / n for n in EXPERTS})


def figures(page: str) -> list[dict[str, Any]]:
    found = re.findall(r'<div class="figure"[^>]*><script type="application/json">(.*?)</script>', page, re.DOTALL)
    return [json.loads(f) for f in found]


def test_text_has_every_figure(inspection: Inspection) -> None:
    """Norms by expert and layer, pairs with their range over layers, and a word where nothing is wrong."""
    lines = pool_text(inspection).splitlines()

    assert lines[0] == "skills-base: 260,032 parameters, 5 layers, F32; 3 experts compared"
    norms = next(line for line in lines if line.startswith("skills-add ")).split()
    assert norms[1] == f"{inspection.total.relative[0]:.3f}"
    assert norms[-3:] == ["100.0%", "F32", "mit"]
    pair = next(line for line in lines if line.startswith("skills-add, skills-count"))
    assert f"{inspection.total.cosines[0, 2]:+.3f}" in pair
    assert f"{inspection.total.conflicts[0, 2]:.3f}" in pair
    assert lines[-1] == "nothing stands in the way of a merge"


def test_page_draws_what_was_measured(inspection: Inspection) -> None:
    """A heat map of layers and modules for each expert, then cosines and conflicts, overall and by layer."""
    norms = figures(pool_page(inspection))
    cosine, by_layer, conflict, _ = norms[3:]

    assert len(norms) == 7
    first = norms[0]["data"][0]
    assert first["y"] == ["attention", "mlp", "norm"]
    assert first["x"] == ["0", "1", "2", "3", "4"]
    assert first["z"][1][3] == pytest.approx(inspection.blocks["layers.3.mlp"].relative[0])
    assert {f["data"][0]["zmax"] for f in norms[:3]} == {first["zmax"]}
    assert cosine["data"][0]["z"][0][2] == pytest.approx(inspection.total.cosines[0, 2])
    assert cosine["data"][0]["z"][1][1] is None
    assert conflict["data"][0]["z"][2][1] == pytest.approx(inspection.total.conflicts[1, 2])
    assert by_layer["data"][0]["z"][0][4] == pytest.approx(inspection.by_layer[4].cosines[0, 1])


def test_one_expert_and_none(models: Path, tiny_model: Any) -> None:
    """Without pairs there are no tables or pictures of pairs; without experts only findings."""
    base = ("b", models / "skills-base")
    one = inspect_pool(base, {"x": models / "skills-add"})
    none = inspect_pool(base, {"<b>x</b>": tiny_model("llama", 1)})

    assert "pairs of task vectors" not in pool_text(one)
    assert len(figures(pool_page(one))) == 1
    assert pool_text(none).splitlines()[-1].startswith(("error", "note"))
    assert "\x1b" not in pool_text(inspect_pool(base, {"\x1b[31mred": models / "skills-add"}))
    page = pool_page(none)
    assert figures(page) == []
    assert "<b>x</b>" not in page


def test_command_on_an_experiment_a_recipe_and_folders(models: Path, tmp_path: Path, capsys: Capsys) -> None:
    """The three ways to name a pool give the same figures; --html writes a page and never over another file."""
    recipe = tmp_path / "recipe.yaml"
    sources = {n.removeprefix("skills-"): {"path": str(models / n)} for n in ("skills-base", *EXPERTS)}
    recipe.write_text(json.dumps({"recipe": 1, "sources": sources, "merge": []}))
    folders = [str(models / n) for n in ("skills-base", *EXPERTS)]
    page = tmp_path / "pool.html"
    overall = []
    for words in (["quickstart"], [str(recipe)], folders, [*folders, "--html", str(page)]):
        assert main(["inspect", *words, "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        overall.append(data["overall"])

    assert all(o == overall[0] for o in overall)
    assert data["experts"] == list(EXPERTS)
    assert page.read_text().startswith("<!doctype html>")
    before = page.read_bytes()
    assert main(["inspect", "quickstart", "--html", str(page)]) == 2
    assert "exists; choose another --html" in capsys.readouterr().err
    assert page.read_bytes() == before


@pytest.mark.parametrize("words", [["nope"], ["{base}"], ["/nowhere", "{base}"], ["{base}", "{base}/config.json"]])
def test_bad_input_is_one_line(words: list[str], models: Path, capsys: Capsys) -> None:
    """Unknown names, a base without experts, and a base that is not there are exit 2; a bad expert is a finding."""
    status = main(["inspect", *(w.format(base=models / "skills-base") for w in words)])
    out, err = capsys.readouterr()

    if "config.json" in words[-1]:
        assert (status, err) == (0, "")
        assert "no such model folder" in out
    else:
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1


def test_folders_of_one_name(models: Path, tmp_path: Path, capsys: Capsys) -> None:
    """Experts in folders of the same name are told apart by a number."""
    other = tmp_path / "skills-add"
    shutil.copytree(models / "skills-attr", other)
    assert main(["inspect", str(models / "skills-base"), str(models / "skills-add"), str(other), "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["experts"] == ["skills-add", "skills-add-2"]
