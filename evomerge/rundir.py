"""The run directory: who may write into it, and the telemetry beside the journal."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from evomerge.errors import RunError, UserError
from evomerge.journal import Event, Lines, read
from evomerge.proposal import Telemetry

JOURNAL = "journal.jsonl"
TELEMETRY = "telemetry.jsonl"
FINISHED = "finished.jsonl"
EXPERIMENT = "experiment.yaml"
LOCK = ".lock"


class RunDirectory:
    """An open run directory, locked against a second process. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Create or open. Raises UserError where the folder is something else or in use."""
        self.path = path
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; choose a folder with --out")
        self.resumed = (path / JOURNAL).exists()
        if path.is_dir() and not self.resumed and any(p.name != LOCK for p in path.iterdir()):
            raise UserError(f"{path}: is not empty and no run directory; choose another folder with --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[bytes] = (path / LOCK).open("ab")
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror}); choose another --out") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(
                f"{path}: another evomerge process is running here; stop it or choose another --out"
            ) from None
        self._telemetry: Lines | None = None
        self._before = _seconds_before(path / TELEMETRY)
        self._start = time.monotonic()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        if self._telemetry is not None:
            self._telemetry.close()
        self._lock.close()

    @property
    def seconds(self) -> float:
        """Running time so far, earlier sittings included."""
        return self._before + time.monotonic() - self._start

    def write_experiment(self, text: str) -> None:
        """Write the resolved experiment once, whole or not at all."""
        target = self.path / EXPERIMENT
        temporary = target.with_suffix(".tmp")
        try:
            with temporary.open("w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(target)
        except OSError as e:
            raise RunError(f"{target}: cannot be written ({e.strerror}); mend that, then run it again") from None

    def telemetry(self, proposal: int, items: str, t: Telemetry) -> None:
        """Add one line; losing it loses no result."""
        self._write({"proposal": proposal, "items": items, **asdict(t)})

    def drift(self, seq: int, size: float) -> None:
        """Note that event `seq` was asked with a genome that differs from the journalled one by `size`."""
        self._write({"note": "drift", "seq": seq, "size": size})

    def _write(self, data: dict[str, Any]) -> None:
        if self._telemetry is None:
            path = self.path / TELEMETRY
            self._telemetry = Lines(path, path.stat().st_size if path.exists() else 0)
        line = json.dumps({"at": round(time.time(), 3), "run_seconds": round(self.seconds, 3), **data}) + "\n"
        self._telemetry.append(line.encode())


@dataclass(frozen=True)
class Before:
    """What an existing journal says of its run: the `run` event, its budgets in turn, whether it is finished."""

    facts: Event
    budgets: tuple[dict[str, Any], ...]
    finished: bool


def before(path: Path) -> Before | None:
    """The run that a folder holds, or None where there is none yet. Raises UserError for a damaged journal."""
    if not (path / JOURNAL).exists():
        return None
    events, _ = read(path / JOURNAL)
    if not events:
        return None
    budgets = [e["budget"] for e in events if e["kind"] in ("run", "extended")]
    return Before(events[0], tuple(budgets), events[-1]["kind"] == "stop")


def read_telemetry(path: Path) -> list[dict[str, Any]]:
    """All whole lines; torn or foreign ones are left out."""
    out = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                data = json.loads(line)
            except ValueError:
                continue
            if isinstance(data, dict):
                out.append(data)
    return out


def _seconds_before(path: Path) -> float:
    seconds = [line.get("run_seconds") for line in read_telemetry(path)[-1:]]
    return float(seconds[0]) if seconds and isinstance(seconds[0], int | float) else 0.0
