"""Folders and files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evomerge.errors import RunError, UserError
from evomerge.files import new_file, new_folder


def test_folder_appears_whole(tmp_path: Path) -> None:
    """The target exists only at the end, with everything in it and nothing beside it; parents are made."""
    target = tmp_path / "deep" / "out"

    with new_folder(target) as f:
        (f / "sub").mkdir()
        (f / "sub" / "a.txt").write_text("a")
        assert not target.exists()
        assert f.parent == target.parent, "on the same file system"

    assert (target / "sub" / "a.txt").read_text() == "a"
    assert os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    """Whatever goes wrong inside, neither the target nor a temporary folder remains, and the error goes on."""

    def fail() -> None:
        with new_folder(tmp_path / "out") as f:
            (f / "a.txt").write_text("a")
            raise error

    with pytest.raises(error):
        fail()

    assert os.listdir(tmp_path) == []


def test_a_failing_rename_leaves_nothing(tmp_path: Path) -> None:
    """Where the target filled up meanwhile, it is left alone and the temporary folder goes."""
    target = tmp_path / "out"

    def write() -> None:
        with new_folder(target) as f:
            (f / "a.txt").write_text("a")
            target.mkdir()
            (target / "theirs.txt").write_text("theirs")

    with pytest.raises(RunError, match="out: cannot be written"):
        write()

    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(target) == ["theirs.txt"]


def test_non_empty_targets_are_refused(tmp_path: Path) -> None:
    """A folder with anything in it, and a file, are refused before anything is written; what is there stays."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "theirs.txt").write_text("theirs")
    (tmp_path / "file").write_text("theirs")

    for name in ("full", "file"):
        with pytest.raises(UserError, match="exists and is not empty"), new_folder(tmp_path / name):
            pass
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]
    assert (tmp_path / "full" / "theirs.txt").read_text() == "theirs"
    assert (tmp_path / "file").read_text() == "theirs"


def test_an_empty_target_is_taken(tmp_path: Path) -> None:
    """An empty folder that somebody made is filled."""
    (tmp_path / "out").mkdir()

    with new_folder(tmp_path / "out") as f:
        (f / "a.txt").write_text("a")

    assert os.listdir(tmp_path / "out") == ["a.txt"]


def test_leftovers_of_a_crash_do_not_matter(tmp_path: Path) -> None:
    """A temporary folder that a killed process of this number left is replaced, not mixed in."""
    left = tmp_path / f".out.{os.getpid()}.tmp"
    left.mkdir()
    (left / "old.txt").write_text("old")

    with new_folder(tmp_path / "out") as f:
        (f / "new.txt").write_text("new")

    assert os.listdir(tmp_path / "out") == ["new.txt"]


def test_new_file(tmp_path: Path) -> None:
    """A file is written whole with its parents; one that exists is refused and left alone."""
    target = tmp_path / "deep" / "a.yaml"
    new_file(target, "é: 1\n")

    assert target.read_bytes() == "é: 1\n".encode()
    assert os.listdir(target.parent) == ["a.yaml"]
    with pytest.raises(UserError, match="exists"):
        new_file(target, "other")
    assert target.read_bytes() == "é: 1\n".encode()


def test_new_file_leaves_nothing_on_failure(tmp_path: Path) -> None:
    """Text that cannot be written leaves neither the file nor a temporary one."""
    with pytest.raises(UnicodeEncodeError):
        new_file(tmp_path / "a.yaml", "\ud800")

    assert os.listdir(tmp_path) == []


def test_leftovers_of_killed_exports_go(tmp_path: Path) -> None:
    """The hidden folder of a process that is gone is removed by the next export there; others' are left alone."""
    gone = 2**22 + 7  # above the largest process id of Linux
    for name in (f".out.{gone}.tmp", f".out.{os.getppid()}.tmp", f".other.{gone}.tmp"):
        (tmp_path / name).mkdir()

    with new_folder(tmp_path / "out"):
        pass

    assert sorted(os.listdir(tmp_path)) == sorted(["out", f".out.{os.getppid()}.tmp", f".other.{gone}.tmp"])
