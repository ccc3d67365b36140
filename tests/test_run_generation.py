"""A run over what models write: a generation task with few-shot examples, checked, cut off, resumed and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.check import check, text
from evomerge.config import load
from evomerge.history import History
from evomerge.report.results import results
from evomerge.run import run


@pytest.fixture
def experiment(quickstart: Path) -> Any:
    """The quickstart's sums and reversals, written by the model; the expert for sums writes most of its answers."""
    models, data = quickstart / "models", quickstart / "data"
    shares = {"search": 0.15, "select": 0.1, "report": 0.2}
    return load(
        {
            "name": "written",
            "models": {"base": str(models / "skills-base"), "experts": {"add": str(models / "skills-add")}},
            "search_space": "one-weight-per-expert",
            "fitness": {
                "tasks": [
                    {
                        "name": "add",
                        "kind": "generation",
                        "data": str(data / "skill_add_cal.jsonl"),
                        "splits": shares,
                        "max_tokens": 6,
                        "extract": "number",
                    },
                    {
                        "name": "rev",
                        "kind": "generation",
                        "data": str(data / "skill_rev_cal.jsonl"),
                        "splits": shares,
                        "few_shot": {"data": str(data / "skill_rev.jsonl"), "count": 2, "answer": " {target}"},
                        "max_tokens": 12,
                        "stop": ["\n", "."],
                        "normalise": ["strip", "case"],
                    },
                ]
            },
            "search": {"algorithm": "random", "seed": 3, "budget": {"evaluations": 4}, "finalists": 2},
            "workers": {"backend": "inline", "device": "cpu"},
        }
    )


def test_a_run_over_written_answers(experiment: Any, tmp_path: Path) -> None:
    """Work priced from both sides; scores recorded; the same bytes where the run was cut off; the report's table."""
    c = check(experiment)
    assert c.least_tokens_per_candidate < c.tokens_per_candidate
    assert "work     up to " in text(c)

    history = run(experiment, tmp_path / "whole")
    add = next(r for r in results(history).table if (r.model, r.task) == ("add", "add"))
    base = next(r for r in results(history).table if (r.model, r.task) == ("base", "add"))
    assert add.score > 0.8 > base.score

    journal = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    scored = [json.loads(line) for line in journal.splitlines()]
    assert any("exact_match" in json.dumps(e) for e in scored)
    half = tmp_path / "half"
    half.mkdir()
    (half / "journal.jsonl").write_bytes(journal[: len(journal) // 2])
    (half / "experiment.yaml").write_bytes((tmp_path / "whole" / "experiment.yaml").read_bytes())
    run(experiment, half)
    assert (half / "journal.jsonl").read_bytes() == journal
    assert History.read(half).winner_id == history.winner_id
