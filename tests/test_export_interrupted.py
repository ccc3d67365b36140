"""Exports that are cut off: the target is a whole checkpoint or not there at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evomerge
from evomerge.cli import main
from evomerge.errors import UserError
from evomerge.export import hf
from evomerge.export.verify import verify
from evomerge.pool import Checkpoint


class Stop(BaseException):
    """Stands for Ctrl-C, a full disk and everything else that ends an export in the middle."""


def test_an_exception_at_every_write(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever write of an export fails, or what comes after the last, nothing is left; the next try succeeds."""
    target = tmp_path / "exports" / "model"
    places: list[tuple[Any, str]] = [
        (hf, "save_file"),
        (hf, "_write"),
        (shutil, "copyfile"),
        (os, "fsync"),
        (Path, "rename"),
        (Path, "chmod"),
    ]
    writes = 0
    stop_at: tuple[int, bool] = (-1, False)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            nonlocal writes
            number, writes = writes, writes + 1
            if stop_at == (number, False):
                raise Stop
            result = call(*args, **kwargs)
            if stop_at == (number, True):
                raise Stop
            return result

        return inner

    for holder, name in places:
        monkeypatch.setattr(holder, name, counted(getattr(holder, name)))
    command = ["export", str(finished_run), "--to", str(target)]
    assert main(command) == 0
    total = writes
    shutil.rmtree(target)
    complete = 0
    # What lies there before a write is what the one before it left.
    for place in [*((number, False) for number in range(total)), (total - 1, True)]:
        writes, stop_at = 0, place
        with pytest.raises(Stop):
            main(command)
        if target.exists():  # the rename was done: then it is whole
            complete += 1
            assert Checkpoint(target).tensors
            assert (target / "evomerge.json").is_file()
            shutil.rmtree(target)
        assert list(target.parent.iterdir()) == []
    stop_at = (-1, False)

    assert total > 10
    assert 0 < complete < total
    assert main(command) == 0
    monkeypatch.undo()
    assert verify(target).ok
    capsys.readouterr()


def test_a_mergekit_file_is_written_whole(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration that cannot be written in full is not there."""
    target = tmp_path / "merge.yml"

    def stop(*_: object) -> None:
        raise Stop

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(Stop):
        main(["export", str(finished_run), "--format", "mergekit", "--to", str(target)])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert main(["export", str(finished_run), "--format", "mergekit", "--to", str(target)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["merge.yml"]
    capsys.readouterr()


@pytest.mark.parametrize("form", ["hf", "mergekit"])
def test_a_full_disk_is_one_line(
    form: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export that finds the disk full ends with status 1, one line, and nothing left."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    target = tmp_path / "target"
    assert main(["export", str(finished_run), "--format", form, "--to", str(target)]) == 1
    assert capsys.readouterr().err == f"evomerge: {target}: cannot be written (No space left on device)\n"
    assert list(tmp_path.iterdir()) == []


NURSERY = """
import json, os, random, signal, sys, time
import safetensors.torch, torch
import evomerge.evaluate, evomerge.export.hf, evomerge.export.mergekit, evomerge.export.verify, evomerge.run
from evomerge.cli import main

run, parent, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
rng = random.Random(11)
seconds = None
for n in range(kills + 1):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(["export", run, "--to", os.path.join(parent, str(n))]))
    begun = time.monotonic()
    if n > 0:
        time.sleep(rng.uniform(0.0, seconds))
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if n == 0:
        seconds = time.monotonic() - begun
    elif code == 0:  # done before its kill: the first one was slow, later ones are aimed at sooner
        seconds *= 0.85
    print(json.dumps([n, code]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_kills(finished_run: Path, tmp_path: Path) -> None:
    """`evomerge export` killed with -9 at 50 random moments never leaves a target that is not whole."""
    parent = tmp_path / "exports"
    parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NURSERY, str(finished_run), str(parent), "50"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(evomerge.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    codes = dict(json.loads(line) for line in done.stdout.splitlines())
    killed = [n for n, code in codes.items() if code == -signal.SIGKILL]
    whole = [n for n in codes if (parent / str(n)).exists()]
    begun = [p for p in parent.iterdir() if p.name.endswith(".tmp")]
    for n in whole:
        assert verify(parent / str(n)).ok
    halves = 0
    for folder in begun:
        # What is left is hidden; of it only a file of all weights can be opened.
        try:
            found = Checkpoint(folder)
        except UserError:
            halves += 1
            continue
        assert {*found.tensors} == {*Checkpoint(parent / "0").tensors}

    print(
        f"\n{len(killed)} exports killed: {len(whole)} whole targets of {len(codes)}, {len(begun)} hidden leftovers, "
        f"{halves} of them not loadable"
    )
    assert {*codes.values()} <= {0, -signal.SIGKILL}
    assert len(killed) >= 40
    assert {n for n, code in codes.items() if code == 0} <= {*whole}
    assert main(["export", str(finished_run), "--to", str(parent / "again")]) == 0
