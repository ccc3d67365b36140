"""Writing whole folders or nothing: temporary folder beside the target, fsync, rename."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evomerge.errors import RunError, UserError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` at the end, or vanishes on an exception.

    Raises UserError where the target exists and is not an empty folder, RunError where the disk is full or gone.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not empty; choose another --to")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)  # of an export that was killed
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
            _sync(path)
        _sync(temporary)
        temporary.rename(target)  # replaces an empty folder
        _sync(target.parent)
    except BaseException as e:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(e, OSError):
            raise RunError(f"{target}: cannot be written ({e.strerror or e})") from None
        raise


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def new_file(target: Path, text: str) -> None:
    """Write a new text file, whole or not at all. Raises UserError where it exists, RunError where it cannot be."""
    target = Path(os.path.abspath(target))
    if target.exists():
        raise UserError(f"{target}: exists; choose another --to")
    replace_file(target, text)


def replace_file(target: Path, text: str) -> None:
    """Write a text file, whole or not at all, in the place of an older one or of a link.

    Raises RunError where it cannot be written.
    """
    target = Path(os.path.abspath(target))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("x", encoding="utf-8") as f:  # a new file: no link is followed
            f.write(text)
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    except BaseException as e:
        with suppress(OSError):  # the folder may be none
            temporary.unlink()
        if isinstance(e, OSError):
            raise RunError(f"{target}: cannot be written ({e.strerror or e})") from None
        raise
