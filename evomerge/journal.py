"""The journal: append-only, checksummed JSON lines, the only truth of a run.

While a journal is replayed, `record` compares with what stands there instead of writing; behind its end
it appends. So the loop in `run.py` is written once, and resuming is running it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.canonical import canonical_json, decode_array, encode_array
from evomerge.errors import RunError, UserError

VERSION = 1
MAX_LINE = 64_000_000
"""Bytes. A longer line is not ours: about 3 million scored items in one event."""
DURABLE = frozenset({"told", "stage", "final", "stop"})
TOLERANCE = 1e-6
"""Largest difference per gene between an asked genome and the journalled one (another BLAS, another host)."""

Event = dict[str, Any]


def seal(event: Event) -> bytes:
    """One checksummed line."""
    body = canonical_json(event)
    crc = zlib.crc32(body.encode("ascii"))
    return (canonical_json({**event, "crc": crc}) + "\n").encode("ascii")


def read_sealed(path: Path) -> tuple[list[Event], int]:
    """The whole lines at the head of a file that `seal` wrote, and their bytes; what is torn or damaged is left out."""
    out: list[Event] = []
    good = 0
    if path.exists():
        with path.open("rb") as f:
            while line := f.readline(MAX_LINE + 1):
                try:
                    if not line.endswith(b"\n"):
                        raise ValueError("torn")
                    out.append(_opened(line))
                except (ValueError, RecursionError):
                    break
                good += len(line)
    return out, good


def _opened(line: bytes) -> Event:
    """Raises ValueError for a line that `seal` did not write."""
    if len(line) > MAX_LINE:
        raise ValueError(f"a line of {len(line)} bytes")
    event = json.loads(line)
    if not isinstance(event, dict):
        raise ValueError("not an event")
    crc = event.pop("crc", None)
    if crc != zlib.crc32(canonical_json(event).encode("ascii")):
        raise ValueError("wrong checksum")
    return event


def _unseal(line: bytes, seq: int) -> Event:
    """Raises ValueError for anything that `seal` did not write as event number `seq`."""
    event = _opened(line)
    if not isinstance(event.get("kind"), str):
        raise ValueError("not an event")
    if event.get("v") != VERSION:
        raise UserError(f"journal format {event.get('v')!r}; this version reads format {VERSION}")
    if event.get("seq") != seq:
        raise ValueError(f"event {event.get('seq')!r} where {seq} was expected")
    return event


def read(path: Path) -> tuple[list[Event], int]:
    """All whole events and the number of bytes they take. A torn last line (without its newline) is left out.

    Raises UserError where any whole line is damaged: that is no interrupted write.
    """
    events: list[Event] = []
    good = 0
    try:
        with path.open("rb") as f:
            while line := f.readline(MAX_LINE + 1):
                try:
                    if not line.endswith(b"\n") and len(line) <= MAX_LINE:
                        raise ValueError("torn")
                    events.append(_unseal(line, len(events)))
                except (ValueError, RecursionError) as e:
                    if not line.endswith(b"\n") and f.read(1) == b"":
                        return events, good  # the write that a crash cut short; its newline goes last
                    reason = str(e).splitlines()[0]
                    if isinstance(e, UserError):
                        raise UserError(f"{path}: {reason}") from None
                    raise UserError(
                        f"{path} line {len(events) + 1}: damaged ({reason}); restore the file from a copy"
                    ) from None
                good += len(line)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    return events, good


class Lines:
    """A file that grows by whole lines: what a full disk takes of a line is taken back. Raises RunError."""

    def __init__(self, path: Path, size: int) -> None:
        """Open or create, and cut off what stands behind the first `size` bytes."""
        self.path = path
        self._size = size
        with self._complaining():
            # Unbuffered: what a failed write leaves in a buffer would be written again on closing.
            self._file = path.open("ab", buffering=0)
            self._file.truncate(size)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._size

    def append(self, line: bytes, *, sync: bool = False) -> None:
        """Write one whole line or nothing."""
        with self._complaining():
            try:
                written = self._file.write(line)
                if written != len(line):  # a nearly full disk takes a part and complains at the next write
                    self._file.write(line[written:])
                if sync:
                    os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                raise
        self._size += len(line)

    def clear(self) -> None:
        """Remove all lines."""
        with self._complaining():
            self._file.truncate(0)
        self._size = 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextlib.contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise RunError(f"{self.path}: cannot be written ({e.strerror}); mend that, then resume the run") from None


class Journal:
    """An open journal with a replay cursor. Use as a context manager."""

    def __init__(self, path: Path, *, accept_drift: bool = False, on_drift: Callable[[int, float], None] | None = None):
        """Open or create; a torn tail is cut off so that the next event starts on a line of its own."""
        self.path = path
        self.events: list[Event] = []
        self._cursor = 0
        self._accept_drift = accept_drift
        self._on_drift = on_drift
        size = 0
        if path.exists():
            self.events, size = read(path)
        told = [(e.get("id"), e.get("items")) for e in self.events if e["kind"] == "told"]
        self._told = {(i, items) for i, items in told if isinstance(i, int) and isinstance(items, str)}
        self._lines = Lines(path, size)
        self._ahead: dict[int, str] | None = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    @property
    def replaying(self) -> bool:
        """True while recorded events are still ahead of the cursor."""
        return self._cursor < len(self.events)

    def will_tell(self, proposal: int, items: str) -> bool:
        """True where the recorded events hold a result of this proposal on this item set."""
        return (proposal, items) in self._told

    def asked_as(self, name: str) -> bool:
        """True where the recorded events have proposals of this name."""
        return any(e["kind"] == "asked" and e.get("name") == name for e in self.events)

    def asked(self, proposal: int) -> NDArray[np.float64] | None:
        """The genome of a proposal that recorded events ahead of the cursor have, else None."""
        if self._ahead is None:
            self._ahead = {e["id"]: e["genome"] for e in self.events if e["kind"] == "asked" and "genome" in e}
        if not self.replaying or proposal not in self._ahead:
            return None
        try:
            return decode_array(self._ahead[proposal])
        except ValueError as e:
            raise UserError(f"{self.path}: the genome of candidate {proposal} cannot be read ({e})") from None

    @property
    def next_event(self) -> Event:
        """The recorded event at the cursor; only while replaying."""
        return self.events[self._cursor]

    def record(self, kind: str, /, **payload: Any) -> Event:
        """Append one event, or replay it: then what the journal says is returned, and it must agree.

        A `genome` may differ from the journalled one by TOLERANCE per gene: the journalled one counts.
        Raises RunError where the replay departs from the journal.
        """
        event = {"v": VERSION, "seq": self._cursor, "kind": kind, **payload}
        if self.replaying:
            recorded = self.events[self._cursor]
            self._agree(recorded, event)
        else:
            recorded = event
            self._lines.append(seal(event), sync=kind in DURABLE)
        self._cursor += 1
        return recorded

    def take(self, kind: str) -> Event:
        """Step over the next recorded event, which must be of this kind; its content is the truth."""
        event = self.events[self._cursor]
        if event["kind"] != kind:
            self._agree(event, {"kind": kind, "seq": self._cursor})
        self._cursor += 1
        return event

    def _agree(self, recorded: Event, event: Event) -> None:
        if recorded["kind"] != event["kind"]:
            raise RunError(
                f"{self.path} event {event['seq']}: the journal has {recorded['kind']!r} where the replay "
                f"has {event['kind']!r}; was it written by another version or another experiment?"
            )
        differing = sorted(k for k in {*recorded, *event} if recorded.get(k) != event.get(k))
        drift = 0.0
        if "genome" in recorded and "genome" in event and recorded["genome"] != event["genome"]:
            try:
                a, b = decode_array(recorded["genome"]), decode_array(event["genome"])
            except ValueError as e:
                raise UserError(f"{self.path} event {event['seq']}: its genome cannot be read ({e})") from None
            drift = float(np.max(np.abs(a - b))) if a.shape == b.shape else np.inf
            # The recipe's id follows from the genome, so it may differ with it.
            differing = [k for k in differing if k not in ("genome", "recipe_id")]
        if differing:
            raise RunError(
                f"{self.path} event {event['seq']} ({event['kind']}): the replay differs in {', '.join(differing)}; "
                "the experiment or its inputs changed since"
            )
        if not drift <= TOLERANCE and not self._accept_drift:
            raise RunError(
                f"{self.path} event {event['seq']}: the asked genome differs from the journalled one by {drift:.2e} "
                f"(more than {TOLERANCE:g}); resume on the software that wrote it, or pass --accept-drift"
            )
        if drift > 0.0 and self._on_drift is not None:
            self._on_drift(int(event["seq"]), drift)


# -- scores as JSON -----------------------------------------------------------------------------------------


def scores_to_json(scores: Mapping[str, Mapping[str, Any]] | None) -> Any:
    """task -> metric -> array, as JSON; None stays None."""
    if scores is None:
        return None
    return {t: {m: encode_array(np.asarray(a, dtype=np.float32)) for m, a in ms.items()} for t, ms in scores.items()}


def scores_from_json(data: Any) -> dict[str, dict[str, Any]] | None:
    """The inverse of `scores_to_json`. Raises ValueError on malformed data."""
    if data is None:
        return None
    return {t: {m: decode_array(a) for m, a in ms.items()} for t, ms in data.items()}


def gradients_to_json(gradients: Mapping[str, Any] | None) -> Any:
    """task -> array, as JSON; None stays None."""
    return None if gradients is None else {t: encode_array(np.asarray(g, np.float32)) for t, g in gradients.items()}


def gradients_from_json(data: Any) -> dict[str, Any] | None:
    """The inverse of `gradients_to_json`. Raises ValueError on malformed data."""
    return None if data is None else {t: decode_array(g) for t, g in data.items()}


def whole(status: str, scores: Any, counts: Mapping[str, int], metrics: Mapping[str, Collection[str]]) -> bool:
    """Whether a result from a file has one score per item of every task and metric, or none at all where it failed."""
    if scores is None or status != "ok":
        return scores is None and status.startswith("failed:")
    return all(
        scores.get(t) and {*metrics.get(t, ())} <= {*scores[t]} and all(c.shape == (n,) for c in scores[t].values())
        for t, n in counts.items()
    )
