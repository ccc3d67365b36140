"""Progress: what a person reads while it runs."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evomerge import progress
from evomerge.progress import Silent, Terminal
from evomerge.proposal import Evaluation, ItemSet

ITEMS = ItemSet("search", {"t": tuple(range(10))})
OK = Evaluation("ok", {"t": {"accuracy": np.array([1.0, 0.0, 1.0, 1.0], np.float32)}})


class Stream(io.StringIO):
    def __init__(self, live: bool) -> None:
        super().__init__()
        self._is_live = live

    def isatty(self) -> bool:
        return self._is_live


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands until it is moved."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def prepared(notes: tuple[str, ...] = ()) -> Any:
    """What `begin` reads of a prepared experiment."""
    benchmarks = [SimpleNamespace(name="t", report_metric="accuracy")]
    return SimpleNamespace(
        experiment=SimpleNamespace(name="my-merge", benchmarks=benchmarks, axes_of=lambda stage, n: f"{n} axes"),
        stages=(1, 2),
        spaces=[SimpleNamespace(axes=(1, 2, 3)), SimpleNamespace(axes=(1,) * 18)],
        manifest=SimpleNamespace(parameters=1_234_567, experts=("a", "b")),
        items={"search": ITEMS},
        notes=notes,
    )


def allowance(total: int | None = 8, minutes: float | None = None) -> Any:
    return SimpleNamespace(total=total, budget=SimpleNamespace(minutes=minutes))


def candidate(t: Terminal, number: int, loss: float = -0.5, e: Evaluation = OK) -> None:
    t.scored("search", ITEMS, e)
    t.kept(number, "search", np.array([loss]), e)


def test_first_line_says_what_will_be_done(clock: Any) -> None:
    """The beginning names the experiment, its size, the axes of each stage, items and budget, and the pool's notes."""
    out = Stream(False)

    Terminal(out).begin(prepared(("a note",)), allowance())

    assert out.getvalue().splitlines() == [
        "a note",
        "my-merge: 1,234,567 parameters, 2 experts, 3 axes, 18 axes, 10 search items, 8 candidates",
    ]


def test_lines_have_best_counts_and_time_left(clock: Any) -> None:
    """A line has the best candidate with its scores, evaluations, items, failures, time gone and left."""
    out = Stream(False)
    t = Terminal(out)
    t.begin(prepared(), allowance())
    for n, loss in enumerate([-0.5, -0.75, -0.25, -0.1]):
        clock.seconds += 10
        candidate(t, n, loss)
    clock.seconds += 10
    candidate(t, 4, math.inf, Evaluation("failed:nan"))
    t.end()

    last = out.getvalue().splitlines()[-1]
    assert "5/8 candidates" in last
    assert "50 items" in last
    assert "best #1 loss -0.7500 (accuracy: t 0.75)" in last
    assert "1 failed" in last
    assert "0:50 gone, 0:30 left" in last


def test_no_terminal_no_escapes(clock: Any) -> None:
    """Into a file go whole lines, now and then, without control characters."""
    out = Stream(False)
    t = Terminal(out)
    t.begin(prepared(), allowance(total=100))
    for n in range(100):
        clock.seconds += 1
        candidate(t, n)
    t.end()

    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()
    assert 9 <= len(out.getvalue().splitlines()) <= 13


def test_a_terminal_has_one_live_line(clock: Any) -> None:
    """On a terminal the line is redrawn in place; notes stand on lines of their own, and the end closes the line."""
    out = Stream(True)
    t = Terminal(out)
    t.begin(prepared(), allowance())
    for n in range(5):
        clock.seconds += 1
        candidate(t, n)
    t.note("by the way")
    t.end()

    text = out.getvalue()
    assert text.count("\r\x1b[K") >= 6
    assert "\r\x1b[Kby the way\n" in text
    assert text.endswith("left\n")


def test_time_budgets_count_down(clock: Any) -> None:
    """Under a time budget what is left is the rest of the time, never below zero."""
    out = Stream(False)
    t = Terminal(out)
    t.begin(prepared(), allowance(total=None, minutes=2))
    assert "2 minutes" in out.getvalue()
    for seconds, left in ((30, "1:30 left"), (500, "0:00 left")):
        clock.seconds = seconds
        candidate(t, 0)
        t.end()
        assert out.getvalue().splitlines()[-1].endswith(left)


def test_failures_are_no_best(clock: Any) -> None:
    """Where everything failed there is no best."""
    out = Stream(False)
    t = Terminal(out)
    t.begin(prepared(), allowance())
    candidate(t, 0, math.inf, Evaluation("failed:oom"))
    t.end()

    assert "best -" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (7325, "2:02:05")]
)
def test_clock(seconds: float, text: str) -> None:
    """Times are minutes and seconds, with hours where there are any."""
    assert progress._clock(seconds) == text


def test_silent_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """The silent progress prints nothing."""
    s = Silent()
    s.begin(prepared(), allowance())
    s.scored("search", ITEMS, OK)
    s.kept(0, "search", np.zeros(1), OK)
    s.note("x")
    s.end()

    assert capsys.readouterr() == ("", "")
