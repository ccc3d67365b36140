"""A disk that fills up: the run ends with one line, the journal with a whole one, and resuming loses nothing."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import evomerge
from evomerge.errors import RunError
from evomerge.journal import Journal, Lines, read
from evomerge.run import run

With = Callable[..., Any]


class FullDisk(io.FileIO):
    """Takes `room` bytes in all, then a part of a line, then nothing."""

    room = 0

    def write(self, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = bytes(data)[: self.room]
        self.room -= len(part)
        return super().write(part)


def filled(lines: Lines, room: int) -> None:
    """Put a nearly full disk under an open file."""
    lines._file.close()
    file = FullDisk(lines.path, "ab")
    file.room = room
    lines._file = file  # type: ignore[assignment]


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    """A journal line that a full disk takes in part leaves the file as it was; later the same line fits."""
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.record("run", a=1)
        before = path.read_bytes()
        filled(journal._lines, 20)

        with pytest.raises(RunError, match=r"journal\.jsonl: cannot be written \(No space left on device\); mend"):
            journal.record("stop", reason="budget")
        assert path.read_bytes() == before
        filled(journal._lines, 1000)
        journal.record("stop", reason="budget")
    assert [e["kind"] for e in read(path)[0]] == ["run", "stop"]


@pytest.mark.parametrize("name", ["journal.jsonl", "telemetry.jsonl"])
@pytest.mark.parametrize("room", [10, 3000])
def test_a_run_on_a_full_disk(
    room: int, name: str, experiment_with: With, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file meets the end of the disk: RunError, whole lines, and the same journal after resuming."""
    append = Lines.append

    def nearly_full(self: Lines, line: bytes, *, sync: bool = False) -> None:
        if self.path.name == name and not isinstance(self._file, FullDisk):
            filled(self, room)
        append(self, line, sync=sync)

    monkeypatch.setattr(Lines, "append", nearly_full)
    with pytest.raises(RunError, match=rf"{name}: cannot be written \(No space left on device\); mend that"):
        run(experiment_with(), tmp_path / "out")
    monkeypatch.undo()
    cut = (tmp_path / "out" / "journal.jsonl").read_bytes()
    run(experiment_with(), tmp_path / "out")

    assert cut == b"" or cut.endswith(b"\n")
    whole = (finished_run / "journal.jsonl").read_bytes()
    assert whole.startswith(cut)
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == whole


def test_a_disk_that_is_full_from_the_start(
    experiment_with: With, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not even the experiment can be written the run ends with one line, and the same command goes on."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"experiment\.yaml: cannot be written \(No space left on device\)"):
        run(experiment_with(), tmp_path / "out")
    monkeypatch.undo()

    assert run(experiment_with(), tmp_path / "out").stopped


# -- a real file system ---------------------------------------------------------------------------------------

Mount = Callable[[int], Path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mount]:
    """mounted(kilobytes) -> a file system of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = []

    def mount(kilobytes: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        made.append(folder)
        return folder

    yield mount
    for path in made:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kilobytes", "count"), [(8, 1), (72, 1), (132, 2), (104, 2), (1024, 2)])
def test_a_full_file_system(
    kilobytes: int, count: int, mounted: Mount, small_experiment: Path, experiment_with: With, tmp_path: Path
) -> None:
    """A real run with real workers on a file system that fills up, and the same one after it was enlarged."""
    evaluations = 60 if kilobytes < 1000 else 600
    run(experiment_with(**{"search.budget": {"evaluations": evaluations}}), tmp_path / "whole")
    whole = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    disk = mounted(kilobytes)
    out = disk / "out"
    command = [sys.executable, "-m", "evomerge", "run", str(small_experiment), "--out", str(out)]
    for change in (f"search.budget={{evaluations: {evaluations}}}", "workers.backend=local", f"workers.count={count}"):
        command += ["--set", change]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(evomerge.__file__).parents[1])}
    full = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    path = out / "journal.jsonl"
    cut = path.read_bytes() if path.exists() else b""
    subprocess.run(["mount", "-o", "remount,size=64M", str(disk)], check=True)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    last = full.stderr.rstrip().splitlines()[-1]
    assert last.startswith(f"evomerge: {out}/")
    assert "cannot be written (No space left on device)" in last
    assert cut == b"" or cut.endswith(b"\n")
    assert whole.startswith(cut)
    assert again.returncode == 0, again.stderr
    assert path.read_bytes() == whole
    print(f"\n{kilobytes} KiB: full after {len(cut)} of {len(whole)} journal bytes ({last})")
