"""Journals that earlier versions wrote: format 1 is read and replayed, others are refused with the reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evomerge.cli import main
from evomerge.errors import UserError
from evomerge.history import History, load_resolved
from evomerge.journal import read, seal
from evomerge.run import run
from evomerge.workers.inline import InlineExecutor

ROOT = Path(__file__).resolve().parents[1]
ASSET = Path(__file__).parent / "assets" / "journal-v1" / "run"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A copy of the run directory of format 1, over the quickstart's models; ROOT stands for this checkout."""
    out = Path(shutil.copytree(ASSET, tmp_path / "run"))
    text = (out / "experiment.yaml").read_text()
    (out / "experiment.yaml").write_text(text.replace("ROOT", str(ROOT)))
    return out


def test_format_1_is_read(old_run: Path) -> None:
    """Candidates, scores, recipes and the winner of an old run."""
    history = History.read(old_run)

    assert history.stopped
    assert [e.role for e in history.entries.values()] == ["baseline"] * 4 + ["search"] * 4 + ["mean"]
    for entry in history.entries.values():
        assert history.recipe(entry.id).id == entry.recipe_id
    assert history.winner_id is not None
    assert history.loss(history.entry(history.winner_id), "select") == min(
        row["loss"] for row in history.evaluations if row["split"] == "select"
    )


def test_format_1_is_replayed(old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming the finished run replays every event of it and evaluates nothing."""

    def refuse(*_: object) -> None:
        raise AssertionError("something was evaluated")

    whole = (old_run / "journal.jsonl").read_bytes()
    monkeypatch.setattr(InlineExecutor, "submit", refuse)
    run(load_resolved(old_run), old_run)

    assert (old_run / "journal.jsonl").read_bytes() == whole


def test_format_1_is_completed(old_run: Path) -> None:
    """A run that was cut off in the old version is finished by this one; what stood there stays."""
    whole = (old_run / "journal.jsonl").read_bytes()
    half = whole[: whole.index(b'"kind":"stage"')]
    half = half[: half.rindex(b"\n") + 1]
    (old_run / "journal.jsonl").write_bytes(half)
    history = run(load_resolved(old_run), old_run)

    assert history.stopped
    assert (old_run / "journal.jsonl").read_bytes().startswith(half)
    assert len(history.entries) == 9


def test_another_format_is_refused(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Format 2 is refused by name, in reading and in resuming, and the file is left alone."""
    events, _ = read(old_run / "journal.jsonl")
    newer = b"".join(seal({**e, "v": 2}) for e in events)
    (old_run / "journal.jsonl").write_bytes(newer)

    with pytest.raises(UserError, match="journal format 2; this version reads format 1"):
        History.read(old_run)
    assert main(["resume", str(old_run)]) == 2
    assert "journal format 2; this version reads format 1" in capsys.readouterr().err
    assert (old_run / "journal.jsonl").read_bytes() == newer
