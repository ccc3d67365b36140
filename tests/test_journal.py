"""The journal: what was acknowledged is never lost or changed in silence; replay agrees or says why not."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import journal as module
from evomerge.canonical import canonical_json, encode_array
from evomerge.errors import RunError, UserError
from evomerge.journal import Event, Journal, read, scores_from_json, scores_to_json
from evomerge.proposal import frozen_genome

GENOME = frozen_genome([0.1, 0.5, 1.0])


def asked(number: int, genome: Any = GENOME, **other: Any) -> dict[str, Any]:
    return {"id": number, "genome": encode_array(np.asarray(genome)), "recipe_id": f"r{number}", "parents": [], **other}


def write(path: Path, events: int = 4) -> bytes:
    """A journal of `run`, then pairs of asked and told."""
    with Journal(path) as j:
        j.record("run", experiment_id="e")
        for i in range(1, events):
            if i % 2:
                j.record("asked", **asked(i))
            else:
                j.record("told", id=i - 1, scores=scores_to_json({"t": {"accuracy": np.array([1.0, 0.5, np.nan])}}))
    return path.read_bytes()


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return write(tmp_path_factory.mktemp("journal") / "j").splitlines(keepends=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def sealed(event: Event) -> bytes:
    """A line with a right checksum, whatever it says."""
    crc = zlib.crc32(canonical_json(event).encode())
    return (canonical_json({**event, "crc": crc}) + "\n").encode()


# -- writing and reading ----------------------------------------------------------------------------------


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    """Events come back in order, numbered, with the format's version and their payload, without the checksum."""
    write(tmp_path / "j")

    events, size = read(tmp_path / "j")

    assert size == (tmp_path / "j").stat().st_size
    assert [(e["v"], e["seq"], e["kind"]) for e in events] == [
        (1, 0, "run"),
        (1, 1, "asked"),
        (1, 2, "told"),
        (1, 3, "asked"),
    ]
    assert {k: v for k, v in events[1].items() if k not in ("v", "seq", "kind")} == asked(1)


def test_lines_are_canonical(lines: list[bytes]) -> None:
    """Each line is canonical JSON with a checksum over the rest of it, and ends in a newline."""
    for line in lines:
        event = json.loads(line)
        assert line == (canonical_json(event) + "\n").encode()
        crc = event.pop("crc")
        assert crc == zlib.crc32(canonical_json(event).encode())


def test_equal_events_give_equal_bytes(tmp_path: Path) -> None:
    """Two journals of the same events are identical files: no clock, host or process in them."""
    assert write(tmp_path / "a", 9) == write(tmp_path / "b", 9)


def test_known_bytes(tmp_path: Path) -> None:
    """The format of version 1 does not drift: one line is pinned byte for byte."""
    with Journal(tmp_path / "j") as j:
        j.record("asked", id=0, genome=encode_array(np.array([0.5])), name="é")

    assert (tmp_path / "j").read_bytes() == (
        b'{"crc":3197863147,"genome":{"b64":"AAAAAAAA4D8=","dtype":"<f8","shape":[1]},'
        b'"id":0,"kind":"asked","name":"\\u00e9","seq":0,"v":1}\n'
    )


def test_every_record_is_in_the_file_at_once(tmp_path: Path) -> None:
    """After record() returns the line can be read by another process, before the journal is closed."""
    with Journal(tmp_path / "j") as j:
        for i in range(3):
            j.record("asked", **asked(i))
            assert len(read(tmp_path / "j")[0]) == i + 1


def test_nothing_that_is_no_json_is_written(tmp_path: Path) -> None:
    """NaN outside an array is an error, and leaves the file as it was."""
    before = write(tmp_path / "j")

    with Journal(tmp_path / "j") as j:
        for _ in range(4):
            j.take(j.next_event["kind"])
        with pytest.raises(ValueError, match="JSON"):
            j.record("told", loss=math.nan)

    assert (tmp_path / "j").read_bytes() == before


def test_missing_file(tmp_path: Path) -> None:
    """Reading a journal that is not there, or a folder, is one line."""
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read(path)


# -- torn tails and damage --------------------------------------------------------------------------------


def test_torn_at_every_byte(tmp_path: Path, lines: list[bytes]) -> None:
    """Cut anywhere within its last line, a journal is its other lines; the next event starts on its own line."""
    path, head, last = tmp_path / "j", b"".join(lines[:-1]), lines[-1]

    for cut in range(len(last)):
        path.write_bytes(head + last[:cut])
        events, good = read(path)
        assert len(events) == len(lines) - 1
        assert good == len(head)

        with Journal(path) as j:
            for _ in events:
                j.take(j.next_event["kind"])
            assert not j.replaying
            j.record("asked", **asked(3))
        assert path.read_bytes() == head + last


def test_a_torn_first_line_is_an_empty_journal(tmp_path: Path, lines: list[bytes]) -> None:
    """A crash during the very first write leaves a journal without events that starts afresh."""
    path = tmp_path / "j"
    path.write_bytes(lines[0][:10])

    assert read(path) == ([], 0)
    assert write(path) == b"".join(lines)


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("how", ["cut", "byte", "empty", "swapped", "twice", "missing"])
def test_damage_before_the_last_line_is_refused(tmp_path: Path, lines: list[bytes], line: int, how: str) -> None:
    """Anything wrong in front of the last line is no crash: refused, naming the file and the line."""
    path = tmp_path / "j"
    bad = list(lines)
    where = line + 1
    if how == "cut":
        bad[line] = bad[line][:-5] + b"\n"
    elif how == "byte":
        bad[line] = bad[line].replace(b'"kind"', b'"kinb"')
    elif how == "empty":
        bad.insert(line, b"\n")
    elif how == "swapped":
        bad[line], bad[line + 1] = bad[line + 1], bad[line]
    elif how == "twice":
        bad.insert(line, bad[line])
        where = line + 2
    else:
        del bad[line]
        bad.append(sealed({"v": 1, "seq": 4, "kind": "stop"}))
    before = b"".join(bad)
    path.write_bytes(before)

    for attempt in (read, Journal):
        with pytest.raises(UserError) as caught:
            attempt(path)
        assert f"{path} line {where}: damaged" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before, "a damaged journal is left as it is"


@pytest.mark.parametrize("last", [True, False])
def test_another_format_is_refused(tmp_path: Path, lines: list[bytes], last: bool) -> None:
    """A journal of another version is refused as such, also where it is the last line, and never cut."""
    path = tmp_path / "j"
    other = sealed({"v": 2, "seq": 1, "kind": "asked"})
    path.write_bytes(lines[0] + other + (b"" if last else lines[2]))

    with pytest.raises(UserError, match="journal format 2; this version reads format 1"):
        Journal(path)

    assert path.read_bytes().startswith(lines[0] + other)


@pytest.mark.parametrize(
    "event", [{"v": 1, "seq": 7, "kind": "asked"}, {"v": 1, "kind": "asked"}, {"v": 1, "seq": 1, "kind": 3}, [1], 5]
)
def test_lines_that_are_no_next_event(tmp_path: Path, lines: list[bytes], event: Any) -> None:
    """A wrong number, a missing kind or no object at all is damage, although the JSON is fine."""
    line = sealed(event) if isinstance(event, dict) else (json.dumps(event) + "\n").encode()
    (tmp_path / "j").write_bytes(lines[0] + line + lines[2])

    with pytest.raises(UserError, match="line 2: damaged"):
        read(tmp_path / "j")


def test_oversized_lines(tmp_path: Path, lines: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line beyond the cap is damage; it is never read whole."""
    path = tmp_path / "j"
    monkeypatch.setattr(module, "MAX_LINE", max(map(len, lines)))
    path.write_bytes(b"".join(lines))
    assert len(read(path)[0]) == len(lines)

    path.write_bytes(lines[0] + sealed({"v": 1, "seq": 1, "kind": "x" * 1000}) + lines[2])
    with pytest.raises(UserError, match="line 2: damaged"):
        read(path)


def test_deeply_nested_lines(tmp_path: Path, lines: list[bytes]) -> None:
    """A line that nests beyond the parser's limit is refused, not a crash."""
    (tmp_path / "j").write_bytes(lines[0] + b"[" * 200_000 + b"\n")

    with pytest.raises(UserError, match="line 2: damaged"):
        read(tmp_path / "j")


@settings(max_examples=400, deadline=None)
@given(at=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_flipped_bytes_never_change_events_in_silence(folder: Path, lines: list[bytes], at: int, bits: int) -> None:
    """Whichever byte is flipped: the file is refused, or what is read is a whole beginning of what was written."""
    raw = bytearray(b"".join(lines))
    raw[at % len(raw)] ^= bits
    path = folder / "flipped"
    path.write_bytes(raw)
    original = []
    for line in lines:
        event = json.loads(line)
        del event["crc"]
        original.append(event)

    try:
        events = read(path)[0]
    except UserError:
        events = []
    assert events == original[: len(events)]


@settings(max_examples=100, deadline=None)
@given(junk=st.binary(max_size=60))
def test_junk_files_are_refused_or_empty(folder: Path, junk: bytes) -> None:
    """A file that never was a journal gives no events, or one line of refusal."""
    path = folder / "junk"
    path.write_bytes(junk)

    try:
        events = read(path)[0]
    except UserError as e:
        events = [] if "\n" not in str(e) else [{}]
    assert events == []


# -- replay -----------------------------------------------------------------------------------------------


def test_replay_writes_nothing(tmp_path: Path) -> None:
    """Recording the same events again compares instead of writing, then appends behind the end."""
    before = write(tmp_path / "j")

    with Journal(tmp_path / "j") as j:
        assert j.replaying
        j.record("run", experiment_id="e")
        j.record("asked", **asked(1))
        assert j.take(j.next_event["kind"])["kind"] == "told"
        j.record("asked", **asked(3))
        assert not j.replaying
        assert (tmp_path / "j").read_bytes() == before
        j.record("stop", reason="budget")

    assert (tmp_path / "j").read_bytes() == before + sealed({"v": 1, "seq": 4, "kind": "stop", "reason": "budget"})


def test_the_next_event_and_what_will_be_told(tmp_path: Path) -> None:
    """While replaying, the event at the cursor can be seen, and which results stand in the journal."""
    with Journal(tmp_path / "j") as j:
        j.record("asked", id=3)
        j.record("told", id=3, items="s")

    with Journal(tmp_path / "j") as j:
        assert j.next_event["kind"] == "asked"
        assert j.will_tell(3, "s")
        assert not j.will_tell(3, "t")
        with pytest.raises(RunError, match="'asked' where the replay has 'told'"):
            j.take("told")


@pytest.mark.parametrize(
    ("kind", "payload", "words"),
    [
        ("told", {"id": 1}, "the journal has 'asked' where the replay has 'told'"),
        ("asked", asked(2), "differs in id, recipe_id"),
        ("asked", {**asked(1), "parents": [0]}, "differs in parents"),
        ("asked", {**asked(1), "more": 1}, "differs in more"),
        ("asked", {"id": 1}, "differs in genome, parents, recipe_id"),
        ("asked", {**asked(1), "recipe_id": "other"}, "differs in recipe_id"),
        ("asked", asked(1, [0.1, 0.5]), "differs from the journalled one by inf"),
    ],
)
def test_a_replay_that_departs_is_refused(tmp_path: Path, kind: str, payload: Event, words: str) -> None:
    """Another kind, another payload or a genome of another length ends the replay, naming event and fields."""
    before = write(tmp_path / "j")

    with Journal(tmp_path / "j") as j:
        j.record("run", experiment_id="e")
        with pytest.raises(RunError) as caught:
            j.record(kind, **payload)

    assert "event 1" in str(caught.value)
    assert words in str(caught.value)
    assert (tmp_path / "j").read_bytes() == before


def drifted(path: Path, shift: float, *, accept: bool = False) -> tuple[Event, list[tuple[int, float]]]:
    """Replay the asked event with a genome that is off by `shift`."""
    notes: list[tuple[int, float]] = []
    with Journal(path, accept_drift=accept, on_drift=lambda seq, size: notes.append((seq, size))) as j:
        j.record("run", experiment_id="e")
        genome = np.array(GENOME)
        genome[1] += shift
        return j.record("asked", **asked(1, genome)), notes


def test_an_exact_genome_is_silent(tmp_path: Path) -> None:
    """An equal genome is no drift."""
    write(tmp_path / "j")

    assert drifted(tmp_path / "j", 0.0)[1] == []


@pytest.mark.parametrize("shift", [1e-15, -1e-9, 9.9e-7])
def test_small_drift_is_noted(tmp_path: Path, shift: float) -> None:
    """Within 1e-6 the drift is noted with the event's number and size; the journalled genome is what comes back."""
    before = write(tmp_path / "j")

    event, notes = drifted(tmp_path / "j", shift)

    assert notes == [(1, pytest.approx(abs(shift), rel=1e-2))]
    assert event["genome"] == encode_array(GENOME)
    assert (tmp_path / "j").read_bytes() == before


def test_large_drift_needs_acceptance(tmp_path: Path) -> None:
    """Beyond 1e-6 the replay is refused, unless drift is accepted; then it is noted and goes on."""
    write(tmp_path / "j")

    with pytest.raises(RunError, match=r"by 2.00e-06 .* --accept-drift"):
        drifted(tmp_path / "j", 2e-6)
    event, notes = drifted(tmp_path / "j", 0.25, accept=True)

    assert notes == [(1, pytest.approx(0.25))]
    assert event["genome"] == encode_array(GENOME)


def test_drift_covers_the_recipe_id_only(tmp_path: Path) -> None:
    """With the genome its recipe's id may differ, but nothing else."""
    write(tmp_path / "j")
    genome = np.array(GENOME) + 1e-9 * np.array([1, 0, 0])

    with Journal(tmp_path / "j") as j:
        j.record("run", experiment_id="e")
        with pytest.raises(RunError, match="differs in parents"):
            j.record("asked", **asked(1, genome, parents=[3]))
    with Journal(tmp_path / "j") as j:
        j.record("run", experiment_id="e")
        assert j.record("asked", **{**asked(1, genome), "recipe_id": "other"})["recipe_id"] == "r1"


# -- scores -----------------------------------------------------------------------------------------------


def test_scores_are_exact() -> None:
    """Scores survive JSON to the bit, NaN and infinities included; None stays None."""
    column = np.array([0.1, -0.0, np.nan, np.inf, -np.inf, 1e-45], np.float32)

    back = scores_from_json(json.loads(canonical_json(scores_to_json({"t": {"m": column}}))))

    assert back is not None
    assert back["t"]["m"].tobytes() == column.tobytes()
    assert back["t"]["m"].dtype == np.float32
    assert scores_from_json(scores_to_json(None)) is None
