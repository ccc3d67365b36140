"""A run over what models write: a generation task with few-shot examples, checked, cut off, resumed and reported."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.check import check, text
from evomerge.config import load
from evomerge.history import History
from evomerge.progress import Terminal
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


NEVER = {"regex": "#### (.+)"}


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"name": "add", "extract": NEVER}, "task 'add': the pattern '#### (.+)' matches no target, such as"),
        ({"name": "rev", "extract": NEVER}, "task 'rev': the pattern '#### (.+)' matches no few-shot answer, such as"),
        ({"name": "rev", "extract": {"regex": r"(\w+)"}}, None),
    ],
)
def test_patterns_that_match_nothing_are_noted(experiment: Any, task: dict[str, Any], words: str | None) -> None:
    """Without a model: by the few-shot answers where there are some, else by the targets."""
    data = experiment.model_dump(mode="json", exclude_defaults=True)
    [mine] = [t for t in data["fitness"]["tasks"] if t["name"] == task["name"]]
    mine |= task
    notes = [n for n in check(load(data)).notes if "pattern" in n]

    assert len(notes) == (words is not None)
    assert words is None or notes[0].startswith(words)


def test_tasks_that_no_baseline_solves_are_named_at_once(experiment: Any, tmp_path: Path) -> None:
    """Behind the baselines, before the search; a task that one of them solves is not."""
    data = experiment.model_dump(mode="json", exclude_defaults=True)
    data["fitness"]["tasks"][1]["extract"] = NEVER
    out = io.StringIO()
    run(load(data), tmp_path / "run", Terminal(out))
    said = [line for line in out.getvalue().splitlines() if line.startswith("every baseline scores 0")]

    assert len(said) == 1
    assert "0 on 'rev'" in said[0]
    assert f"{tmp_path / 'run' / 'experiment.yaml'} --split search" in said[0]
