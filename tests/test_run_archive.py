"""A run by MAP-Elites: measures from scores, cut off and resumed, steady; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.check import check
from evomerge.cli import main
from evomerge.errors import UserError
from evomerge.export.verify import verify
from evomerge.history import History
from evomerge.report.archive import archive
from evomerge.run import run

With = Callable[..., Any]
MEASURES = [
    {"name": "sums", "tasks": ["sums"], "metric": "accuracy", "low": 0.0, "high": 1.0, "cells": 6},
    {"name": "words", "tasks": ["words"], "metric": "probability", "low": 0.2, "high": 0.6, "cells": 4},
]
SEARCH = {"algorithm": "map-elites", "seed": 5, "population": 4, "startup": 6, "finalists": 3, "probes": False}
ELITES: dict[str, Any] = {"fitness.measures": MEASURES, "search": {**SEARCH, "budget": {"evaluations": 14}}}


@pytest.fixture(scope="module")
def whole(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    from evomerge.config import load

    out = tmp_path_factory.mktemp("elites") / "out"
    run(load(small_experiment, ELITES), out)
    return out


def test_children_have_elites_as_parents(whole: Path) -> None:
    """From the seventh on candidates name their parents, who were told before; their cells are those of the scores."""
    history = History.read(whole)
    search = [e for e in history.entries.values() if e.role == "search"]

    assert len(search) == 14
    assert [bool(e.parents) for e in search] == [False] * 6 + [True] * 8
    assert all(max(e.parents) < e.id - e.id % 4 for e in search[6:])
    [sums, words] = [archive(history)["elites"][0]["measures"][n] for n in ("sums", "words")]
    best = history.entry(archive(history)["elites"][0]["id"]).scores("search")
    assert best is not None
    assert sums == pytest.approx(np.mean(best["sums"]["accuracy"], dtype=np.float64))
    assert words == pytest.approx(np.mean(best["words"]["probability"], dtype=np.float64))


def test_cut_anywhere(whole: Path, experiment_with: With, tmp_path: Path) -> None:
    """Between and inside any two events the run is completed to the same bytes."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    journal = (out / "journal.jsonl").read_bytes()
    ends = [i + 1 for i, b in enumerate(journal) if b == ord("\n")]

    for cut in (ends[14], ends[24] - 7, ends[31], ends[-4]):
        (out / "journal.jsonl").write_bytes(journal[:cut])
        run(experiment_with(**ELITES), out)
        assert (out / "journal.jsonl").read_bytes() == journal


def test_with_a_lag(experiment_with: With, tmp_path: Path) -> None:
    """Three under way at once, over Voronoi cells, cut off in the middle: the same bytes."""
    steady = {
        "fitness.measures": MEASURES,
        "search": {**SEARCH, "budget": {"evaluations": 12}, "lag": 3, "archive": "cvt", "cells": 12},
    }
    run(experiment_with(**steady), tmp_path / "out")
    journal = tmp_path / "out" / "journal.jsonl"
    first = journal.read_bytes()
    journal.write_bytes(first[: len(first) * 2 // 3])
    run(experiment_with(**steady), tmp_path / "out")

    assert journal.read_bytes() == first
    assert archive(History.read(tmp_path / "out"))["cells"] == 12


@pytest.mark.parametrize(("mutation", "method"), [("singular", "spectral"), ("coefficients", "linear")])
def test_cycleqd_mixes_experts(mutation: str, method: str, experiment_with: With, tmp_path: Path) -> None:
    """Experts cost nothing, a child is exported and verifies to the bit, and a cut run ends in the same bytes."""
    cycleqd = {"algorithm": "cycleqd", "mutation": mutation, "population": 4}
    search = {**cycleqd, "seed": 5, "budget": {"evaluations": 10}, "probes": False}
    cycle = {"fitness.measures": MEASURES, "search": search}
    out = tmp_path / "out"
    history = run(experiment_with(**cycle), out)
    journal = (out / "journal.jsonl").read_bytes()
    children = [e for e in history.entries.values() if e.parents]

    assert (history.cached, len(children)) == (2, 8)
    assert {r.method for e in children for r in history.recipe(e.id).blocks.values()} == {method}
    assert main(["export", str(out), str(children[-1].id), "--to", str(tmp_path / "model")]) == 0
    v = verify(tmp_path / "model")
    assert (v.ok, v.problems, max(v.scores.values())) == (True, (), 0.0)
    (out / "journal.jsonl").write_bytes(journal[: len(journal) * 2 // 3])
    run(experiment_with(**cycle), out)
    assert (out / "journal.jsonl").read_bytes() == journal


@pytest.mark.slow
def test_two_workers(whole: Path, experiment_with: With, tmp_path: Path) -> None:
    """Two processes write the bytes of one."""
    run(experiment_with(**ELITES, **{"workers.backend": "local", "workers.count": 2}), tmp_path / "out")

    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == (whole / "journal.jsonl").read_bytes()


def test_an_elite_leaves_as_a_model(whole: Path, tmp_path: Path) -> None:
    """A cell's elite, no winner, is exported and verifies."""
    elite = next(e for e in archive(History.read(whole))["elites"] if e["role"] == "search" and not e["winner"])

    assert main(["export", str(whole), str(elite["id"]), "--to", str(tmp_path / "model")]) == 0
    assert main(["verify", str(tmp_path / "model")]) == 0


def test_other_algorithms_ignore_measures(experiment_with: With, tmp_path: Path) -> None:
    """The same candidates with and without; with them there is an archive of the run as well."""
    tasks = {"search.algorithm": "ga", "search.population": 6}
    without = run(experiment_with(**tasks), tmp_path / "without")
    history = run(experiment_with(**tasks, **{"fitness.measures": MEASURES}), tmp_path / "with")

    assert [e.recipe_id for e in history.entries.values()] == [e.recipe_id for e in without.entries.values()]
    assert archive(history)["filled"] > 0
    assert main(["archive", str(without.path)]) == 2


def test_weights_may_be_measured(experiment_with: With, tmp_path: Path) -> None:
    """The distance from the base is a measure like others; the base has 0."""
    tasks = [t.model_dump(exclude_defaults=True) for t in experiment_with().tasks]
    fitness = {
        "tasks": [*json.loads(json.dumps(tasks)), {"name": "near", "kind": "weights"}],
        "objectives": [{"name": "skills", "tasks": ["sums", "words"]}],
        "measures": [{"name": "distance", "tasks": ["near"], "low": 0.0, "high": 0.4, "cells": 5}],
    }
    search = {**SEARCH, "budget": {"evaluations": 8}}
    history = run(experiment_with(fitness=fitness, search=search), tmp_path / "out")
    [base] = [e for e in archive(history)["elites"] if e["cell"] == 0 and e["name"] == "base"] or [None]

    assert base is None or base["measures"]["distance"] == 0.0
    assert archive(history)["filled"] >= 2


def test_without_measures_it_is_refused(experiment_with: With, tmp_path: Path) -> None:
    """check and run say how measures are written; nothing is written."""
    search = {**SEARCH, "budget": {"evaluations": 8}}
    for do in (check, lambda e: run(e, tmp_path / "out")):
        with pytest.raises(UserError, match=r"map-elites needs measures.*name: sums, tasks: \[sums\], metric: cross"):
            do(experiment_with(search=search))
    one = {"fitness.measures": MEASURES[:1], "search": {"algorithm": "cycleqd", "budget": {"evaluations": 8}}}
    with pytest.raises(UserError, match="cycleqd needs 2 measures or more to lay its archive out by"):
        check(experiment_with(**one))
    assert not (tmp_path / "out").exists()


def test_several_objectives_are_refused(experiment_with: With) -> None:
    goals = [{"name": "sums", "tasks": ["sums"]}, {"name": "words", "tasks": ["words"]}]

    with pytest.raises(UserError, match="map-elites minimises one loss"):
        check(experiment_with(**ELITES, **{"fitness.objectives": goals}))
