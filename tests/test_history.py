"""Reading a run directory: finished, live, damaged, or none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import UserError
from evomerge.history import History, load_resolved
from evomerge.journal import Journal, read


def keep_events(run: Path, count: int) -> None:
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (run / "journal.jsonl").write_bytes(b"".join(lines[:count]))


def rewrite(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same events, changed and sealed again: what another version might have written."""
    events, _ = read(run / "journal.jsonl")
    (run / "journal.jsonl").unlink()
    with Journal(run / "journal.jsonl") as journal:
        for e in events:
            body = {k: v for k, v in e.items() if k not in ("v", "seq", "kind")}
            change({"kind": e["kind"], "body": body})
            journal.record(e["kind"], **body)


@pytest.mark.parametrize(("key", "value"), [("role", ["baseline"]), ("name", 3), ("group", "0"), ("id", True)])
def test_events_with_values_of_another_type(run_copy: Path, key: str, value: object) -> None:
    """A sealed event whose role is a list, or whose number is a word, is told in one line."""

    def change(event: dict[str, Any]) -> None:
        if event["kind"] == "asked":
            event["body"][key] = value

    rewrite(run_copy, change)
    with pytest.raises(UserError, match="an event lacks what it should hold"):
        History.read(run_copy)


def test_a_folder_that_is_no_run(tmp_path: Path, run_copy: Path) -> None:
    """Missing folders, missing journals and missing experiments are told apart in one line."""
    with pytest.raises(UserError, match=r"gone: is no run directory \(no journal\.jsonl\)"):
        History.read(tmp_path / "gone")
    with pytest.raises(UserError, match=r"is no run directory \(no experiment\.yaml\)"):
        load_resolved(tmp_path)
    (run_copy / "experiment.yaml").unlink()
    with pytest.raises(UserError, match=r"is no run directory \(no experiment\.yaml\)"):
        History.read(run_copy)


@pytest.mark.parametrize("data", [b"", b'{"v":1,"se'])
def test_a_journal_without_its_first_event(run_copy: Path, data: bytes) -> None:
    """A run that died before its first event holds nothing yet."""
    (run_copy / "journal.jsonl").write_bytes(data)

    with pytest.raises(UserError, match="holds no run yet"):
        History.read(run_copy)


def test_a_live_run_is_readable_at_every_event(run_copy: Path) -> None:
    """After any number of events the history reads, and there is no winner until the final."""
    events, _ = read(run_copy / "journal.jsonl")
    final = [e["kind"] for e in events].index("final")
    for count in range(len(events), 0, -1):
        keep_events(run_copy, count)
        history = History.read(run_copy)

        assert (history.winner_id is None) == (count <= final)
        assert history.stopped == (count == len(events))
        assert len(history.evaluations) == sum(e["kind"] == "told" for e in events[:count])
    with pytest.raises(UserError, match="the run has no winner yet; finish it with `evomerge resume"):
        _ = history.winner


def test_unscored_and_failed_candidates(run_copy: Path) -> None:
    """NaN means not scored there, +inf means failed."""

    def fail(event: dict[str, Any]) -> None:
        if event["kind"] == "told" and event["body"]["id"] == 5:
            event["body"].update(status="failed:oom", scores=None, reason="out of memory")

    rewrite(run_copy, fail)
    history = History.read(run_copy)

    assert history.loss(history.entry(5), "search") == math.inf
    assert math.isnan(history.loss(history.entry(5), "report"))
    [row] = [r for r in history.evaluations if r["id"] == 5]
    assert (row["status"], row["reason"], row["loss"]) == ("failed:oom", "out of memory", math.inf)
    assert "sums.accuracy" not in row


def test_events_of_another_making(run_copy: Path) -> None:
    """An event that lacks a field is refused with the file's name, not with a traceback."""

    def drop(event: dict[str, Any]) -> None:
        if event["kind"] == "told":
            event["body"].pop("items")

    rewrite(run_copy, drop)

    with pytest.raises(UserError, match=r"journal\.jsonl: an event lacks what it should hold"):
        History.read(run_copy)


def test_a_genome_that_was_tampered_with(run_copy: Path) -> None:
    """A candidate whose genome no longer decodes to the recorded recipe is named."""
    genomes = [e["genome"] for e in read(run_copy / "journal.jsonl")[0] if e["kind"] == "asked" and "genome" in e]

    def swap(event: dict[str, Any]) -> None:
        if event["kind"] == "asked" and event["body"]["id"] == 6:
            event["body"]["genome"] = genomes[0]

    rewrite(run_copy, swap)

    with pytest.raises(UserError, match="candidate 6 decodes to another recipe"):
        History.read(run_copy).recipe(6)
