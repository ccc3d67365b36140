"""The README keeps what it says: its Python runs, its YAML is read, its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from evomerge.cli import _parser
from evomerge.config import Experiment, fitness_of
from evomerge.fitness import FitnessSpec
from evomerge.recipe import Recipe
from evomerge.schema import validated
from evomerge.space import SpaceSpec
from evomerge.yamlio import parse_yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_run_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The first Python block, as it stands: a run, its table, its rows, an export that transformers loads."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}

    exec(blocks("python")[0], space)

    assert "winner" in capsys.readouterr().out
    assert space["best"] == (space["run"].winner_id,)
    assert {"id", "split", "loss"} <= set(space["rows"][0])
    assert (tmp_path / "runs" / "python-merged" / "model.safetensors").is_file()


def test_an_optimizer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """The second Python block, as it stands: the loop ends at the optimum."""
    exec(blocks("python")[1], {})

    x, y = (float(v) for v in re.findall(r"[-+0-9.e]+", capsys.readouterr().out))
    assert (x, y) == pytest.approx((0.3, 0.3), abs=1e-3)


def test_yaml_is_read() -> None:
    """Experiments, fitness, spaces and recipes of the README are valid."""
    read = [parse_yaml(b.replace("[...]", "[]"), "README") for b in blocks("yaml")]
    experiment, fitness, space, routes, size, recipe, path = read

    assert validated(Experiment, experiment, "experiment").tasks[2].kind == "generation"
    tasks = [{"name": "sums", "kind": "generation", "max_tokens": 8, "data": "x"}, {"name": "facts", "data": "x"}]
    spec = validated(FitnessSpec, {**fitness["fitness"], "tasks": tasks}, "fitness")
    assert [g.name for g in spec.goals] == ["skills", "forgetting", "length"]
    assert validated(SpaceSpec, space, "space").method == "ties"
    found = validated(SpaceSpec, routes["search_space"], "space").route
    assert found is not None
    assert found.encoding == "indicator"
    trade = validated(
        Experiment, {**size, "name": "size", "models": {"base": "x", "experts": {"y": "y"}}}, "experiment"
    )
    assert [g.name for g in fitness_of(trade).goals] == ["skills", "depth"]
    assert len(validated(Recipe, recipe, "recipe").merge or ()) == 2
    whole = validated(Recipe, {**recipe, **path}, "recipe")
    assert whole.route is not None
    assert [h.from_ for h in whole.route.hops] == ["merged", "math", "merged"]


def test_commands_exist() -> None:
    """Every command line of the README is one that the program takes."""
    lines = [x for b in blocks("") for x in b.splitlines() if re.match(r"(\.venv/bin/)?evomerge \w", x)]
    for line in lines:
        arguments = re.sub(r"\s+#.*", "", line).split()[1:]
        _parser().parse_args([a.strip('"') for a in arguments])
    named = set(re.findall(r"`evomerge (\w+)", README))
    assert len(lines) + len(named) > 15
    for command in named:
        with pytest.raises(SystemExit, match="0"):
            _parser().parse_args([command, "--help"])


def test_the_tree_names_every_module() -> None:
    """The file tree knows every module and folder of the package, and nothing that is gone."""
    tree = README[README.index("## Files") : README.index("## Tests and figures")]
    named = set(re.findall(r"[a-z_]+\.py\b|[a-z_]+/", tree))
    package = {p.name for p in (ROOT / "evomerge").glob("*.py") if not p.name.startswith("__")}
    folders = {f"{p.name}/" for p in (ROOT / "evomerge").iterdir() if (p / "__init__.py").exists()}

    assert package | folders <= named
    own = {n for n in named if n.endswith(".py")}
    assert own <= package
