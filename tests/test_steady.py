"""Steady state: a fixed lag between asking and knowing, whoever works and whenever it is cut off."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.check import check
from evomerge.errors import UserError
from evomerge.journal import read
from evomerge.run import run

With = Callable[..., Any]
LAGS = (1, 2, 5)
EVALUATIONS = 11


def steady(lag: int, **more: Any) -> dict[str, Any]:
    return {
        "search.algorithm": "random",
        "search.lag": lag,
        "search.budget": {"evaluations": EVALUATIONS},
        "search.probes": False,
        **more,
    }


@pytest.fixture(scope="module")
def whole(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """lag -> the run directory of an uninterrupted inline run. Read only."""
    from evomerge.config import load

    out = {}
    for lag in LAGS:
        out[lag] = tmp_path_factory.mktemp("steady") / str(lag)
        run(load(small_experiment, steady(lag)), out[lag])
    return out


def journal_of(out: Path) -> bytes:
    return (out / "journal.jsonl").read_bytes()


@pytest.mark.parametrize("lag", LAGS)
def test_what_a_proposal_sees(lag: int, whole: dict[int, Path]) -> None:
    """Proposal k is asked directly behind the told of proposal k - lag; the first lag of them behind none."""
    events, _ = read(whole[lag] / "journal.jsonl")
    [begin] = [i for i, e in enumerate(events) if e["kind"] == "stage"]
    [items] = [e["id"] for e in events if e["kind"] == "items" and e["name"] == "search"]
    search = [e for e in events[begin:] if e["kind"] in ("asked", "told") and e.get("items", items) == items]
    first = search[0]["id"]

    order = [(e["kind"], e["id"] - first) for e in search]
    expected = [("asked", k) for k in range(lag)]
    for k in range(EVALUATIONS):
        expected.append(("told", k))
        if k + lag < EVALUATIONS:
            expected.append(("asked", k + lag))
    assert order == expected


@pytest.mark.parametrize("lag", [1, pytest.param(2, marks=pytest.mark.slow), 5])
def test_cut_anywhere(lag: int, whole: dict[int, Path], experiment_with: With, tmp_path: Path) -> None:
    """Between and inside any two events a run with a lag is completed to the same bytes."""
    out = Path(shutil.copytree(whole[lag], tmp_path / "out"))
    journal = journal_of(out)
    ends = [i + 1 for i, b in enumerate(journal) if b == ord("\n")]

    for cut in (ends[14], ends[17] - 5, ends[22], ends[-8] + 40):
        (out / "journal.jsonl").write_bytes(journal[:cut])
        run(experiment_with(**steady(lag)), out)
        assert journal_of(out) == journal


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("lag", LAGS)
def test_any_workers(lag: int, count: int, whole: dict[int, Path], experiment_with: With, tmp_path: Path) -> None:
    """Every lag with one and two processes, from the start and from the middle."""
    experiment = experiment_with(**steady(lag, **{"workers.backend": "local", "workers.count": count}))
    out = tmp_path / "out"
    run(experiment, out)
    first = journal_of(out)
    (out / "journal.jsonl").write_bytes(first[: len(first) * 3 // 5])
    run(experiment, out)

    assert first == journal_of(out) == journal_of(whole[lag])


def test_a_budget_smaller_than_the_lag(experiment_with: With, tmp_path: Path) -> None:
    """The budget is kept where the lag would allow more."""
    history = run(experiment_with(**{**steady(5), "search.budget": {"evaluations": 3}}), tmp_path / "out")

    assert sum(e.role == "search" for e in history.entries.values()) == 3


def test_algorithms_of_whole_generations_refuse_a_lag(experiment_with: With, tmp_path: Path) -> None:
    """CMA-ES learns from generations: check and run say so by name, in any stage, and nothing is written."""
    text = r"^search\.lag: cma-es learns from whole generations"
    space = {"axes": {"weight": {"low": -0.5, "high": 1.5, "default": "uniform"}}}
    staged = {
        "search.algorithm": "random",
        "search_space": {
            "stages": [{"space": space, "share": 0.5}, {"space": space, "share": 0.5, "algorithm": "cma-es"}]
        },
    }

    for change in ({}, staged):
        experiment = experiment_with(**{"search.lag": 2, **change})
        with pytest.raises(UserError, match=text):
            check(experiment)
        with pytest.raises(UserError, match=text):
            run(experiment, tmp_path / "out")
    assert not (tmp_path / "out").exists()
