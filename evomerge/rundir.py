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
TEMPORARY = "experiment.tmp"
LOCK = ".lock"
BUDGET = "budget"
"""Why a run stopped whose algorithm did not end by itself."""


class RunDirectory:
    """An open run directory, locked against a second process. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Create or open. Raises UserError where the folder is something else or in use."""
        self.path = path
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; choose a folder with --out")
        for name in (JOURNAL, TELEMETRY, FINISHED, EXPERIMENT, TEMPORARY, LOCK, "exports"):
            if (path / name).is_symlink():
                raise UserError(f"{path / name}: is a link; a run directory may not write outside itself")
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
            raise UserError(f"{path}: another evomerge process is running here; stop it first") from None
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
        temporary = self.path / TEMPORARY
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
    try:
        facts = {k: events[0][k] for k in ("experiment_id", "plan_shape", "numerics", "budget")}
        budgets = [e["budget"] for e in events if e["kind"] in ("run", "extended")]
        if events[0]["kind"] != "run" or not all(isinstance(x, dict) for x in (*budgets, *[*facts.values()][1:])):
            raise TypeError
    except (KeyError, TypeError):
        raise UserError(f"{path / JOURNAL}: does not begin like the journal of a run") from None
    return Before(events[0], tuple(budgets), events[-1]["kind"] == "stop")


def read_telemetry(path: Path) -> list[dict[str, Any]]:
    """All whole lines; torn or foreign ones are left out."""
    out = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                data = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(data, dict) and _is_telemetry(data):
                out.append(data)
    return out


def _is_telemetry(data: dict[str, Any]) -> bool:
    numbers = ["run_seconds"]
    if "proposal" in data:
        numbers += ["build_seconds", "score_seconds", "peak_mb", "attempts"]
        if not isinstance(data.get("worker"), str) or not isinstance(data.get("device"), str):
            return False
    return all(isinstance(data.get(n), int | float) for n in numbers)


def _seconds_before(path: Path) -> float:
    lines = read_telemetry(path)
    return float(lines[-1]["run_seconds"]) if lines else 0.0
