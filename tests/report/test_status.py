"""How far a run is, and one candidate in full."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from evomerge.cli import main
from evomerge.history import History
from evomerge.pareto import fronts
from evomerge.recipe import Recipe
from evomerge.report.status import candidate, candidate_text, status, status_text


def keep_events(run: Path, count: int) -> None:
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (run / "journal.jsonl").write_bytes(b"".join(lines[:count]))


def test_status_of_a_finished_run(finished_run: Path) -> None:
    """Counts, the best on search and the winner agree with the history."""
    s = status(finished_run)
    history = History.read(finished_run)
    losses = {r["id"]: r["loss"] for r in history.evaluations if r["split"] == "search"}

    assert (s["name"], s["phase"], s["candidates"], s["scored"]) == ("small", "finished", 12, 12)
    assert s["budget"] == {"evaluations": 12}
    assert s["best"] == min(losses, key=lambda i: (losses[i], i))
    assert s["best_loss"] == losses[s["best"]]
    assert s["winner"] == history.winner_id
    assert s["failures"] == {}
    sizes = {"search": 24, "select": 12, "report": 16}
    assert s["items"] == sum(sizes[r["split"]] for r in history.evaluations)
    assert s["run_seconds"] > 0
    assert s["peak_mb"] > 0
    json.dumps(s)


def test_status_follows_a_live_run(run_copy: Path) -> None:
    """Baselines, searching, final, finished: each phase shows at its events, without telemetry too."""
    (run_copy / "telemetry.jsonl").unlink()
    total = len((run_copy / "journal.jsonl").read_bytes().splitlines())
    phases = []
    for count in range(total, 0, -1):
        keep_events(run_copy, count)
        s = status(run_copy)
        phases.append(s["phase"])

        assert s["scored"] <= s["candidates"]
        assert status_text(s).startswith("small: ")
    assert list(dict.fromkeys(reversed(phases))) == ["baselines", "searching", "final", "finished"]
    assert s["best"] is None
    assert s["seconds_per_candidate"] is None


def test_failures_are_counted_by_kind() -> None:
    """The text names each kind of failure with its number."""
    s = {
        "name": "x",
        "phase": "searching",
        "budget": {"evaluations": 5},
        "candidates": 4,
        "scored": 4,
        "items": 1234,
        "failures": {"failed:nan": 2, "failed:oom": 1},
        "best": 3,
        "best_loss": 0.5,
        "winner": None,
        "route": None,
        "ended_by": None,
        "run_seconds": 61.0,
        "seconds_per_candidate": 0.25,
        "peak_mb": 300.0,
        "seconds_left": 12.0,
        "cached": 2,
        "looks": 0,
        "front": None,
        "sampled": None,
        "workers": [],
    }

    text = status_text(s)
    assert "failures: failed:nan 2, failed:oom 1" in text
    assert "1,234 item evaluations in 61 s" in text
    assert "best on search: candidate 3, loss 0.5000" in text
    assert "winner" not in text


def test_recipes_count_once_on_a_front(front_run: History) -> None:
    """Candidates of one recipe, such as a probe that repeats a baseline, are one member."""
    scored = [e for e in front_run.entries.values() if e.scores("search") is not None]
    ranks = fronts(np.array([front_run.losses(e, "search") for e in scored]))
    members = [e.recipe_id for e, rank in zip(scored, ranks, strict=True) if rank == 0]

    assert len({*members}) < len(members)
    assert status(front_run.path)["front"] == len({*members})
    assert len({front_run.entry(i).recipe_id for i in front_run.front}) == len(front_run.front)


@pytest.mark.parametrize("number", [0, 3, 7, 16])
def test_candidate_in_full(finished_run: Path, number: int) -> None:
    """Baselines, searched candidates and means show their role, recipe and scores by split."""
    history = History.read(finished_run)
    data = candidate(history, number)
    entry = history.entry(number)

    assert (data["id"], data["role"], data["recipe_id"]) == (number, entry.role, entry.recipe_id)
    assert set(data["splits"]) == set(entry.results)
    assert data["splits"]["search"]["losses"] == {"loss": history.loss(entry, "search")}
    assert 0 <= data["splits"]["search"]["scores"]["sums"]["probability"] <= 1
    assert data["winner"] == (number == history.winner_id)
    json.dumps(data)


def test_shown_text_is_a_recipe_for_merge(finished_run: Path, tmp_path: Path) -> None:
    """What `show` prints is YAML that loads as the candidate's recipe, with the folders of its sources."""
    history = History.read(finished_run)
    text = candidate_text(history, candidate(history, 9))
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = Recipe.load(tmp_path / "recipe.yaml")

    assert text.startswith("# candidate 9 (search), stage 0, generation 1\n")
    assert recipe.canonical(history.manifest).id == history.entry(9).recipe_id
    assert {n: s.path for n, s in recipe.sources.items()} == {n: str(p) for n, p in history.source_paths().items()}


def test_follow_waits_for_the_run(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the folder is there it says once that it waits; then it prints the run's progress."""
    folder, naps = tmp_path / "later", []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            shutil.copytree(finished_run, folder)

    monkeypatch.setattr("evomerge.cli.time.sleep", nap)

    assert main(["status", str(folder), "--follow"]) == 0
    out, err = capsys.readouterr()
    assert err.count(f"waiting for a run in {folder}") == 1
    assert len(naps) == 3
    assert "small: finished" in out
    assert main(["status", str(tmp_path / "none")]) == 2
