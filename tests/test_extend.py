"""Raising the budget of a finished run: it goes on where it stopped, and what stands stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.cli import main
from evomerge.errors import UserError
from evomerge.history import History, load_resolved
from evomerge.journal import read, seal
from evomerge.report.status import status, status_text
from evomerge.run import run
from evomerge.workers.inline import InlineExecutor

With = Callable[..., Any]


def budget(evaluations: int) -> dict[str, Any]:
    return {"search.budget": {"evaluations": evaluations}}


def journal(out: Path) -> bytes:
    return (out / "journal.jsonl").read_bytes()


def test_a_finished_run_goes_on(run_copy: Path, experiment_with: With) -> None:
    """12 candidates, then 20: the old bytes, then an `extended` event, eight more, a second choice and look."""
    old = journal(run_copy)
    history = run(experiment_with(**budget(20)), run_copy)
    events, _ = read(run_copy / "journal.jsonl")
    added = events[old.count(b"\n") :]

    assert journal(run_copy).startswith(old)
    assert (added[0]["kind"], added[0]["budget"]) == ("extended", {"evaluations": 20})
    assert [e["role"] for e in added if e["kind"] == "asked"] == ["search"] * 8 + ["mean"]
    assert [e["kind"] for e in added[-2:]] == ["told", "stop"]
    assert sum(e.role == "search" for e in history.entries.values()) == 20
    assert history.looks == 2
    assert history.stopped
    assert load_resolved(run_copy).search.budget.evaluations == 20
    told = [(e["id"], e["items"]) for e in events if e["kind"] == "told" and not e.get("cached")]
    recipes = {e["id"]: e["recipe_id"] for e in events if e["kind"] == "asked"}
    assert len({(recipes[i], items) for i, items in told}) == len(told), "a recipe was scored twice on the same items"


def test_looks_are_counted_and_shown(run_copy: Path, experiment_with: With) -> None:
    """One look at the report split by a run, two by an extended one, and status says so."""
    before = status(run_copy)
    run(experiment_with(**budget(16)), run_copy)
    after = status(run_copy)

    assert (before["looks"], after["looks"]) == (1, 2)
    assert "looked at" not in status_text(before)
    assert "the report split was looked at 2 times" in status_text(after)


def test_a_cut_extension_is_completed(run_copy: Path, experiment_with: With) -> None:
    """Wherever an extension was cut off, at any event of it, the same command completes it to the same bytes."""
    old = journal(run_copy)
    run(experiment_with(**budget(16)), run_copy)
    whole = journal(run_copy)
    ends = [i + 1 for i, b in enumerate(whole) if b == ord("\n") and i + 1 >= len(old)]

    for cut in (ends[0], ends[0] + 9, ends[1], ends[4], ends[8] - 3, ends[-4], ends[-2]):
        (run_copy / "journal.jsonl").write_bytes(whole[:cut])
        run(load_resolved(run_copy), run_copy)
        assert journal(run_copy) == whole


def test_extending_twice(run_copy: Path, experiment_with: With, monkeypatch: pytest.MonkeyPatch) -> None:
    """12, 14, then 20: each a continuation, and at the end a resume replays all and evaluates nothing."""
    sizes = [len(journal(run_copy))]
    for n in (14, 20):
        before = journal(run_copy)
        history = run(experiment_with(**budget(n)), run_copy)
        assert journal(run_copy).startswith(before)
        sizes.append(len(journal(run_copy)))
    whole = journal(run_copy)

    def refuse(*_: object) -> None:
        raise AssertionError("something was evaluated")

    monkeypatch.setattr(InlineExecutor, "submit", refuse)
    run(experiment_with(**budget(20)), run_copy)
    assert sizes == sorted(set(sizes))
    assert journal(run_copy) == whole
    assert history.looks == 3
    assert sum(e.role == "search" for e in history.entries.values()) == 20


def test_from_the_middle_of_a_generation(experiment_with: With, tmp_path: Path) -> None:
    """A budget that ended within a generation of four is raised: the generation is completed first."""
    out = tmp_path / "out"
    run(experiment_with(**budget(6)), out)
    history = run(experiment_with(**budget(12)), out)
    groups = [e.group for e in history.entries.values() if e.role == "search"]

    assert groups == [0] * 4 + [1] * 4 + [2] * 4


def test_two_stages(experiment_with: With, tmp_path: Path) -> None:
    """What is added belongs to the last stage."""
    axes = {"weight": {"low": -0.5, "high": 1.5, "default": "uniform"}}
    stages = [
        {"space": {"axes": axes}, "share": 0.5},
        {"space": {"groups": "layers", "axes": axes}, "share": 0.5},
    ]
    space = {"search_space": {"stages": stages}}
    out = tmp_path / "out"
    run(experiment_with(**budget(8), **space), out)
    history = run(experiment_with(**budget(12), **space), out)

    searched = [e.stage for e in history.entries.values() if e.role == "search"]
    assert searched == [0] * 4 + [1] * 8


def test_what_is_refused(run_copy: Path, experiment_with: With) -> None:
    """A lower budget, another kind, and raising what is not finished are refused, and nothing is touched."""
    run(experiment_with(**budget(16)), run_copy)
    whole = journal(run_copy)
    for change in (budget(12), budget(15), {"search.budget": {"item_evaluations": 10_000}}):
        with pytest.raises(UserError, match=r"its budget is \{'evaluations': 16\}; it can only be raised"):
            run(experiment_with(**change), run_copy)
    assert journal(run_copy) == whole
    cut = whole[: whole.rindex(b"\n", 0, -1) + 1]
    (run_copy / "journal.jsonl").write_bytes(cut)
    with pytest.raises(UserError, match=r"finish it with its budget of \{'evaluations': 16\} before raising that"):
        run(experiment_with(**budget(20)), run_copy)
    assert journal(run_copy) == cut
    assert load_resolved(run_copy).search.budget.evaluations == 16


def test_on_the_command_line(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`evomerge resume DIR --set search.budget.evaluations=14` extends; a lower number is bad input."""
    assert main(["resume", str(run_copy), "--set", "search.budget.evaluations=14"]) == 0
    assert main(["resume", str(run_copy), "--set", "search.budget.evaluations=13"]) == 2
    assert "it can only be raised" in capsys.readouterr().err
    assert History.read(run_copy).looks == 2


def test_what_ended_a_run(finished_run: Path, experiment_with: With, tmp_path: Path) -> None:
    """The budget, or the algorithm by its own reasons; journals that say budget of every end go on as they are."""
    soup = {"search": {"algorithm": "greedy-soup", "finalists": 2, "budget": {"evaluations": 10}}}
    out = tmp_path / "out"
    history = run(experiment_with(**soup), out)
    own = "greedy-soup (experts_in_the_soup "

    assert sum(e.role == "search" for e in history.entries.values()) < 10
    assert history.ended_by is not None
    assert history.ended_by.startswith(own)
    assert f"ended by itself, not by its budget: {own}" in status_text(status(out))
    assert History.read(finished_run).ended_by is None
    assert "by itself" not in status_text(status(finished_run))

    *events, stop = read(out / "journal.jsonl")[0]
    assert stop["reason"] == history.ended_by
    old = b"".join(map(seal, [*events, {**stop, "reason": "budget"}]))
    (out / "journal.jsonl").write_bytes(old)
    assert run(experiment_with(**soup), out).ended_by is None
    assert journal(out) == old
    soup["search"]["budget"] = {"evaluations": 12}
    assert run(experiment_with(**soup), out).ended_by == stop["reason"]
    assert journal(out).startswith(old)


def test_auto_does_not_choose_again(experiment_with: With, tmp_path: Path) -> None:
    """The same file with a larger budget, or a resume, goes on with what was picked for the first one."""
    search = {"algorithm": "auto", "seed": 3, "finalists": 2, "budget": {"evaluations": 8}}
    run(experiment_with(search=search), tmp_path / "run")
    first = load_resolved(tmp_path / "run").search
    history = run(experiment_with(search=search | {"budget": {"evaluations": 18}}), tmp_path / "run")

    assert (first.algorithm, first.settings) == ("random", {"population": 8})
    assert load_resolved(tmp_path / "run").search.model_copy(update={"budget": first.budget}) == first
    assert sum(e.role == "search" for e in history.entries.values()) == 18
    assert main(["resume", str(tmp_path / "run"), "--set", "search.budget.evaluations=20"]) == 0
