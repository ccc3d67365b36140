"""Two runs side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.cli import main
from evomerge.history import History
from evomerge.report.compare import compare, compare_text
from evomerge.report.results import results
from evomerge.run import run

With = Callable[..., Any]


@pytest.fixture(scope="module")
def other_run(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small experiment with random search, another seed and another budget."""
    from evomerge.config import load

    out = tmp_path_factory.mktemp("compare") / "other"
    change = {"search.algorithm": "random", "search.seed": 9, "search.budget": {"evaluations": 3}}
    run(load(small_experiment, change), out)
    return out


def test_a_run_with_itself(finished_run: Path) -> None:
    """Nothing differs, and both columns are the same."""
    h = History.read(finished_run)
    c = compare(h, h, "report")

    assert c["differences"] == {}
    assert all(a == b for a, b in (row["scores"] for row in c["scores"]))
    assert "the experiments are the same" in compare_text(c)


@pytest.mark.parametrize("split", ["search", "select", "report"])
def test_differences_and_scores(split: str, finished_run: Path, other_run: Path) -> None:
    """Settings that differ stand with both values; scores are those of each run's own table."""
    a, b = History.read(finished_run), History.read(other_run)
    c = compare(a, b, split)

    # The algorithm and the seed of the first run are written in its file, so both have a value.
    assert c["differences"]["search.seed"] == [3, 9]
    assert c["differences"]["search.budget.evaluations"] == [12, 3]
    assert {k for k in c["differences"] if not k.startswith("search.")} == set()
    tables = [{(s.model, s.task): s.score for s in results(h, split).table} for h in (a, b)]
    for row in c["scores"]:
        assert row["scores"] == [t.get((row["model"], row["task"])) for t in tables]
    models = {row["model"] for row in c["scores"]}
    assert {"base", "one", "two", "uniform"} <= models
    assert c["work"]["scored"] == [12, 3]
    assert c["work"]["phase"] == ["finished", "finished"]
    text = compare_text(c)
    assert "search.seed: 3 | 9" in text
    assert str(finished_run) in text


def test_on_the_command_line(finished_run: Path, other_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text for people, JSON on request, status 2 for a folder that is no run."""
    assert main(["compare", str(finished_run), str(other_run)]) == 0
    text = capsys.readouterr().out
    assert main(["compare", str(finished_run), str(other_run), "--json", "--split", "select"]) == 0
    import json

    data = json.loads(capsys.readouterr().out)
    assert "search.seed: 3 | 9" in text
    assert data["split"] == "select"
    assert main(["compare", str(finished_run), str(finished_run.parent)]) == 2


def test_scores_come_first_and_long_settings_are_cut() -> None:
    """The table, then the work, then what differs, each value in one short cell."""
    cell = {"model": "base", "task": "t", "scores": [0.5, None], "low": [0.25, None], "high": [0.75, None]}
    long = "x" * 500
    differences = {"data": [long, 3], "seed": [1, None]}
    text = compare_text({"runs": ["a", "b"], "scores": [cell], "work": {"looks": [1, 1]}, "differences": differences})
    lines = text.splitlines()

    assert lines.index("2 settings differ") > next(n for n, line in enumerate(lines) if line.startswith("looks"))
    assert next(n for n, line in enumerate(lines) if "0.500 [0.25, 0.75]" in line) < lines.index("2 settings differ")
    assert max(map(len, lines)) < 100
    assert lines[-1] == "seed: 1 | -"
