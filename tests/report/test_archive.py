"""Archives of runs: every cell's elite, filling over time, text and command; on a made-up run with many candidates."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.cli import main
from evomerge.config import load
from evomerge.errors import UserError
from evomerge.history import History
from evomerge.prepare import Prepared
from evomerge.report.archive import archive, archive_text, cells_of, elites, growth, has_archive, reference
from evomerge.report.page import RASTER, run_page
from evomerge.run import run
from evomerge.workers.fake import FakeEvaluator

SUMS = {"name": "sums", "tasks": ["sums"], "metric": "accuracy", "low": 0.3, "high": 0.7, "cells": 5}
WORDS = {"name": "words", "tasks": ["words"], "metric": "accuracy", "low": 0.3, "high": 0.7, "cells": 4}
Made = Callable[..., History]


@pytest.fixture(scope="module")
def made(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(measures, **search) -> a finished run of 40 candidates with made-up scores."""

    def make(measures: list[dict[str, Any]], **search: Any) -> History:
        settings = {"algorithm": "map-elites", "budget": {"evaluations": 40}, "startup": 12, "finalists": 3}
        overrides = {"fitness.measures": measures, "search": settings | search}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Prepared, "evaluator", lambda _: partial(FakeEvaluator, metrics=("accuracy", "cross_entropy"))
            )
            return run(load(small_experiment, overrides), tmp_path_factory.mktemp("archive") / "run")

    return make


@pytest.fixture(scope="module")
def history(made: Made) -> History:
    return made([SUMS, WORDS])


def by_hand(history: History) -> dict[tuple[int, ...], int]:
    """Column and row -> the candidate of least loss there, the first of equals."""
    best: dict[tuple[int, ...], tuple[float, int]] = {}
    for e in history.entries.values():
        scores = e.scores("search")
        assert scores is not None
        at = [np.mean(scores[t]["accuracy"], dtype=np.float64) for t in ("sums", "words")]
        place = tuple(int(np.clip((x - 0.3) / 0.4 * n, 0, n - 1)) for x, n in zip(at, (5, 4), strict=True))
        best[place] = min(best.get(place, (np.inf, -1)), (history.loss(e, "search"), e.id))
    return {place: i for place, (_, i) in best.items()}


def test_elites_are_the_best_of_their_cells(history: History) -> None:
    """Among all that was scored on the search split, in the order of the cells."""
    expected = {int(np.ravel_multi_index(p, (5, 4))): i for p, i in by_hand(history).items()}

    assert {e.cell: e.id for e in elites(history)} == expected
    assert [e.cell for e in elites(history)] == sorted(expected)
    assert len(expected) > 8


def test_data_and_text(history: History, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints every elite with measures and scores; JSON has the same."""
    data = archive(history)
    text = archive_text(data)

    assert (data["cells"], data["filled"]) == (20, len(data["elites"]))
    assert data["coverage"] == data["filled"] / 20
    assert f"{data['filled']} of 20 cells filled" in text
    assert len(text.splitlines()) == data["filled"] + 2
    assert main(["archive", str(history.path)]) == 0
    assert capsys.readouterr().out.rstrip() == text
    assert main(["archive", str(history.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["elites"] == json.loads(json.dumps(data["elites"]))


def test_filling_is_counted_from_the_worst_baseline(history: History) -> None:
    """The curve only rises and ends at the sum over the elites, written out; with few points its ends stay."""
    worst = max(history.loss(e, "search") for e in history.baselines.values())
    curve = growth(history)

    assert reference(history) == worst
    assert len(curve) == len(history.entries)
    assert all(b[1] >= a[1] and b[2] >= a[2] for a, b in itertools.pairwise(curve))
    n, filled, score = curve[-1]
    assert (n, filled) == (len(history.entries), len(elites(history)))
    assert score == pytest.approx(sum(max(worst - e.loss, 0.0) for e in elites(history)))
    assert archive(history)["qd_score"] == score
    assert growth(history, 3)[0] == curve[0]
    assert growth(history, 3)[-1] == curve[-1]


def test_violations_are_no_elites(history: History, tmp_path: Path) -> None:
    """Who misses a constraint is in no cell, however low the loss."""
    limit = {"name": "kept", "tasks": ["sums"], "metric": "accuracy", "at_least": 0.5}
    experiment = load(history.path / "experiment.yaml", {"fitness.constraints": [limit]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prepared, "evaluator", lambda _: partial(FakeEvaluator, metrics=("accuracy", "cross_entropy")))
        bound = run(experiment, tmp_path / "run")

    assert elites(bound)
    assert all(e.measures[0] >= 0.5 for e in elites(bound))
    assert any(e.measures[0] < 0.5 for e in elites(history))


def figure(page: str, title: str) -> dict[str, Any]:
    figures = [json.loads(t) for t in re.findall(r'<script type="application/json">(\{"data".*?)</script>', page)]
    [found] = [f for f in figures if f["layout"].get("xaxis", {}).get("title", {}).get("text") == title]
    return dict(found)


def test_the_map_shows_every_cell(history: History) -> None:
    """Two measures: each tile lies where its cell is, empty ones are gaps, and a click finds the candidate's record."""
    page = run_page(history)
    tiles = figure(page, "sums (accuracy)")["data"][0]
    expected = by_hand(history)

    assert (len(tiles["x"]), len(tiles["y"])) == (6, 5)
    for column in range(5):
        for row in range(4):
            found = tiles["customdata"][row][column]
            assert (None if found is None else found[0]) == expected.get((column, row))
            assert (tiles["z"][row][column] is None) == ((column, row) not in expected)
    details = next(t for t in re.findall(r'<script type="application/json">(.*?)</script>', page) if '"fields"' in t)
    assert {str(i) for i in expected.values()} <= set(json.loads(details)["rows"])
    assert f"evomerge archive {history.path}" in page
    assert figure(page, "candidates scored")["data"][1]["customdata"][-1] == len(expected)


def test_voronoi_cells_are_drawn_by_points(made: Made) -> None:
    """A raster, every point of which belongs to the nearest centre; all elites within the bounds are seen."""
    history = made([SUMS, WORDS], archive="cvt", cells=30)
    tiles = figure(run_page(history), "sums (accuracy)")["data"][0]

    assert len(tiles["z"]) == len(tiles["z"][0]) == RASTER
    drawn = {c[0] for row in tiles["customdata"] for c in row if c is not None}
    assert drawn == {e.id for e in elites(history)}
    assert cells_of(history).total == archive(history)["cells"] == 30


@pytest.mark.parametrize("count", [1, 3])
def test_other_numbers_of_measures_are_a_table(made: Made, count: int) -> None:
    """One measure, or three: a row for every elite, best first."""
    entropy = {"name": "entropy", "metric": "cross_entropy", "low": 0.2, "high": 0.8, "cells": 3}
    history = made([SUMS, WORDS, entropy][:count], population=8)
    page = run_page(history)
    section = page[page.index("<h2>Archive</h2>") : page.index("<h2>Progress</h2>")]

    rows = re.findall(r'<tr><th scope="row">(\d+)', section)
    assert sorted(map(int, rows)) == sorted(e.id for e in elites(history))
    losses = {e.id: e.loss for e in elites(history)}
    assert [losses[int(i)] for i in rows] == sorted(losses.values())


def test_runs_without_measures_have_none(finished_run: Path, front_run: History) -> None:
    """Told in one line by the command, left out of the page; so too for several objectives."""
    assert not has_archive(History.read(finished_run))
    assert not has_archive(front_run)
    with pytest.raises(UserError, match="its fitness has no measures"):
        archive(History.read(finished_run))
    assert "<h2>Archive</h2>" not in run_page(History.read(finished_run))
