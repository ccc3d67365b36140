"""The run directory: one writer, nothing foreign overwritten, telemetry that may be lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import UserError
from evomerge.journal import Journal
from evomerge.proposal import Telemetry
from evomerge.rundir import EXPERIMENT, JOURNAL, TELEMETRY, RunDirectory, before, read_telemetry

FACTS: dict[str, Any] = {"experiment_id": "e", "plan_shape": {}, "numerics": {}, "budget": {}}

HOLD = """
import fcntl, sys
f = open(sys.argv[1], "ab")
fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """While another process holds the folder it is refused in one line; when that ends it is free again."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another evomerge process is running here"):
            RunDirectory(tmp_path)
        other.communicate("")

    with RunDirectory(tmp_path) as free:
        assert not free.resumed


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    """Two runs of one process cannot write into one folder; a closed one frees it."""
    with RunDirectory(tmp_path), pytest.raises(UserError, match="another evomerge process"):
        RunDirectory(tmp_path)

    with RunDirectory(tmp_path) as again:
        assert again.path == tmp_path


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    """A folder of something else and a file are refused, and nothing is written into them."""
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(UserError, match="is not empty and no run directory"):
        RunDirectory(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_journal_makes_it_a_run(tmp_path: Path) -> None:
    """A new folder is made with its parents; once it has a journal it is resumed."""
    path = tmp_path / "a" / "run"
    with RunDirectory(path) as first:
        assert not first.resumed
        with Journal(path / JOURNAL) as j:
            j.record("run", **FACTS)

    with RunDirectory(path) as second:
        assert second.resumed
    earlier = before(path)
    assert earlier is not None
    assert earlier.facts["experiment_id"] == "e"


def test_before_tells_budgets_and_end(tmp_path: Path) -> None:
    """An existing journal says by which budgets it was run, and whether it came to its end."""
    with Journal(tmp_path / JOURNAL) as j:
        j.record("run", **{**FACTS, "budget": {"evaluations": 3}})
        j.record("stop", reason="budget")
        j.record("extended", budget={"evaluations": 5})

    earlier = before(tmp_path)
    assert earlier is not None
    assert earlier.budgets == ({"evaluations": 3}, {"evaluations": 5})
    assert not earlier.finished


def test_nothing_before_what_is_no_run(tmp_path: Path) -> None:
    """Without a journal, or with one torn in its first line, there is no earlier run."""
    assert before(tmp_path / "none") is None
    (tmp_path / JOURNAL).write_bytes(b'{"kind"')
    assert before(tmp_path) is None


def test_experiment_is_written_whole(tmp_path: Path) -> None:
    """The resolved experiment stands there without a temporary file beside it."""
    with RunDirectory(tmp_path) as run:
        run.write_experiment("name: é\n")

    assert (tmp_path / EXPERIMENT).read_text(encoding="utf-8") == "name: é\n"
    assert {p.name for p in tmp_path.iterdir()} == {EXPERIMENT, ".lock"}


def test_telemetry_lines(tmp_path: Path) -> None:
    """Every evaluation and every drift is one line of JSON with its time in the run."""
    with RunDirectory(tmp_path) as run:
        run.telemetry(3, "search", Telemetry(build_seconds=0.5, worker="w0"))
        run.drift(7, 1e-9)

    one, two = read_telemetry(tmp_path / TELEMETRY)
    assert (one["proposal"], one["items"], one["build_seconds"], one["worker"]) == (3, "search", 0.5, "w0")
    assert (two["note"], two["seq"], two["size"]) == ("drift", 7, 1e-9)
    assert two["run_seconds"] >= one["run_seconds"] >= 0


def test_no_telemetry_no_file(tmp_path: Path) -> None:
    """A sitting without evaluations writes no telemetry."""
    with RunDirectory(tmp_path):
        pass

    assert not (tmp_path / TELEMETRY).exists()
    assert read_telemetry(tmp_path / TELEMETRY) == []


def test_running_time_goes_on(tmp_path: Path) -> None:
    """The seconds of earlier sittings count, as the last whole line of telemetry has them."""
    (tmp_path / JOURNAL).write_bytes(b"")
    lines = [json.dumps({"run_seconds": 100.0}), json.dumps({"run_seconds": 250.5}), '{"run_seconds": 9']
    (tmp_path / TELEMETRY).write_text("\n".join(lines))

    with RunDirectory(tmp_path) as run:
        assert 250.5 <= run.seconds < 1000


@pytest.mark.parametrize(
    "text", ["\xff\x00{", "[]\n3\nnull\n", '{"run_seconds": null}\n', '{"run_seconds": "x"}\n', "{}\n"]
)
def test_damaged_telemetry_is_no_obstacle(tmp_path: Path, text: str) -> None:
    """Torn, foreign or senseless telemetry loses time that was counted, never the run."""
    (tmp_path / JOURNAL).write_bytes(b"")
    (tmp_path / TELEMETRY).write_text(text, encoding="latin-1")

    with RunDirectory(tmp_path) as run:
        assert 0 <= run.seconds < 1000
