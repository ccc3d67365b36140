"""Runs that follow gradients: what the journal holds, that cuts and workers change nothing, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.canonical import decode_array, encode_array
from evomerge.check import check, text
from evomerge.config import fitness_of, load
from evomerge.errors import UserError
from evomerge.evaluate import MergeEvaluator
from evomerge.history import History
from evomerge.journal import read, seal
from evomerge.objective import Objective, differentiated, products
from evomerge.prepare import prepare
from evomerge.proposal import Job, WorkUnit, frozen_genome
from evomerge.report.page import run_page
from evomerge.report.results import text_table
from evomerge.report.status import status, status_text
from evomerge.run import run
from evomerge.space import RuleSpace

With = Callable[..., Any]
SPACE = {"method": "task_arithmetic", "axes": {"weight": {"low": -0.5, "high": 1.5, "default": "uniform"}}}
FINE = {**SPACE, "groups": "layers"}
ADAM: dict[str, Any] = {
    "search.algorithm": "adam",
    "search.population": None,
    "search.items": {"policy": "sample", "count": 8},
    "search.budget": {"evaluations": 9},
}
STAGED: dict[str, Any] = {
    "search_space": {
        "stages": [
            {"space": SPACE, "share": 0.4, "algorithm": "adam", "settings": {"learning_rate": 0.05}},
            {"space": FINE, "share": 0.6, "algorithm": "cma-es", "settings": {"population": 4}},
        ]
    },
    "search.items": {"policy": "sample", "count": 8},
    "search.budget": {"item_evaluations": 400},
}


@pytest.fixture
def plain(small_experiment: Path) -> Callable[..., Any]:
    """plain(**overrides) -> the small experiment without settings of its algorithm."""

    def make(**overrides: Any) -> Any:
        data = json.loads(small_experiment.read_text())
        del data["search"]["population"]
        for task in data["fitness"]["tasks"]:
            task["splits"] = {s: str(small_experiment.parent / f) for s, f in task["splits"].items()}
        return load(data, {k: v for k, v in overrides.items() if v is not None})

    return make


def events_of(out: Path) -> list[dict[str, Any]]:
    return read(out / "journal.jsonl")[0]


@pytest.fixture
def finished(plain: With, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    """The run directory of the staged search; made once, read only."""
    cached = request.config.cache_of_gradients = getattr(request.config, "cache_of_gradients", {})
    if "out" not in cached:
        cached["out"] = tmp_path_factory.mktemp("gradients") / "staged"
        run(plain(**STAGED), cached["out"])
    return Path(cached["out"])


def test_the_journal_has_what_was_asked_for(finished: Path) -> None:
    """Gradients of both tasks stand with the results of Adam's proposals on their samples, and nowhere else."""
    events = events_of(finished)
    asked = {e["id"]: e for e in events if e["kind"] == "asked"}
    name = {e["id"]: e["name"] for e in events if e["kind"] == "items"}
    told = [e for e in events if e["kind"] == "told"]
    manifest = History.read(finished).manifest

    with_gradients = [e for e in told if "gradients" in e]
    steps = [e for e in told if name[e["items"]].startswith("search 0.")]
    assert with_gradients == steps
    assert len(steps) >= 3
    for e in with_gradients:
        assert asked[e["id"]]["stage"] == 0
        assert {*e["gradients"]} == {"sums", "words"}
        for data in e["gradients"].values():
            array = decode_array(data)
            assert array.shape == (len(manifest.blocks), 3)
            assert array.dtype == np.float32
            assert np.abs(array).max() > 0


def test_a_gradient_has_its_price(finished: Path, plain: With) -> None:
    """An Adam step takes four item evaluations an item from the budget, and the history counts the same."""
    events = events_of(finished)
    h = History.read(finished)
    search = [e for e in events if e["kind"] == "asked" and e["role"] == "search" and e["name"] != "probe"]
    adam, cma = ([e for e in search if e["stage"] == n] for n in (0, 1))
    probes = sum(e["role"] == "search" for e in events if e["kind"] == "asked") - len(search)
    left = 400 * 0.4 - probes * 24

    assert len(adam) == int(left // 32) + (left % 32 > 0 and False)
    assert len(cma) == (400 - probes * 24 - len(adam) * 32) // 8
    scored_in_full = sum(e["kind"] == "told" and h.entry(e["id"]).stage >= -1 for e in events)
    assert scored_in_full
    assert h.evaluated["search"] >= probes * 24 + len(adam) * 32 + len(cma) * 8


def test_reports_say_what_a_gradient_counts(finished: Path) -> None:
    """Table, status and page compare the fourfold price with scoring that asks for no gradients, and say so."""
    h = History.read(finished)
    used, full = h.evaluated["search"], h.in_full
    line = (
        f"sampled items: {used:,} item evaluations on search, an item of a gradient step counted 4 times, against "
        f"{full:,} of scoring its candidates on all items without gradients ({used / full:.0%})"
    )

    assert line in text_table(h)
    assert line in status_text(status(finished))
    assert line[1:] in run_page(h)


def test_adam_minimises(plain: With, tmp_path: Path) -> None:
    """On all items, with a budget of candidates, the loss falls at every step from its start."""
    settings = {"search.items": None, "search_space": FINE, "search.learning_rate": 0.01}
    run(plain(**{**ADAM, **settings}), tmp_path / "out")
    h = History.read(tmp_path / "out")
    objective = h.objective("search")
    assert objective is not None
    steps = [e for e in h.entries.values() if e.role in ("search", "mean") and e.stage == 0 and e.name != "probe"]
    losses = [float(objective.losses(s)[0]) for e in steps if (s := e.scores("search")) is not None]

    assert len(losses) >= 4
    assert all(b < a for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("share", [0.35, 0.45, 0.55, 0.8])
def test_a_cut_run_ends_as_a_whole_one(share: float, finished: Path, plain: With, tmp_path: Path) -> None:
    """Cut off within either stage, resumed: the same journal to the byte, gradients included."""
    whole = (finished / "journal.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "journal.jsonl").write_bytes(b"".join(lines[: int(len(lines) * share)]) + b'{"torn')
    run(plain(**STAGED), tmp_path / "out")

    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == whole


def test_nothing_is_evaluated_again(finished: Path, plain: With, tmp_path: Path, monkeypatch: Any) -> None:
    """A finished run is replayed from its journal alone, gradients included."""
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr(MergeEvaluator, "evaluate", None)
    run(plain(**STAGED), tmp_path / "out")

    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == (finished / "journal.jsonl").read_bytes()


@pytest.mark.slow
def test_two_workers_write_the_same(finished: Path, plain: With, tmp_path: Path) -> None:
    """Two processes instead of the driver itself: the same journal to the byte."""
    run(plain(**STAGED, **{"workers.backend": "local", "workers.count": 2}), tmp_path / "out")

    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == (finished / "journal.jsonl").read_bytes()


MAP: dict[str, Any] = {
    "search": {"algorithm": "map", "gradients": True, "population": 4, "r2": -1e9, "probes": False, "seed": 3},
    "search.budget": {"item_evaluations": 24 * 37},
    "search.finalists": 3,
    "fitness.objectives": [{"name": "sums", "tasks": ["sums"]}, {"name": "all", "tasks": {"sums": 1, "words": 2}}],
}


@pytest.fixture
def mapped(plain: With, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    """The run directory of a MAP with gradients; made once, read only."""
    cached = request.config.cache_of_gradients = getattr(request.config, "cache_of_gradients", {})
    if "map" not in cached:
        cached["map"] = tmp_path_factory.mktemp("gradients") / "map"
        run(plain(**MAP), cached["map"])
    return Path(cached["map"])


def test_a_design_has_its_price_and_a_front_its_own(mapped: Path) -> None:
    """Two axes: six candidates with the gradients of both tasks, which count as four each, then plain ones."""
    events = events_of(mapped)
    search = [e["id"] for e in events if e["kind"] == "asked" and e["role"] == "search"]
    told = {e["id"]: e for e in events if e["kind"] == "told" and e["id"] in search and not e.get("cached")}
    h = History.read(mapped)

    assert ["gradients" in told[i] for i in search[:6]] == [True] * 6
    assert not any("gradients" in e for i, e in told.items() if i not in search[:6])
    assert all({*told[i]["gradients"]} == {"sums", "words"} for i in search[:6])
    assert len(search) == 6 + 37 - 6 * 4
    baselines = [e for e in h.entries.values() if e.role == "baseline"]
    assert h.evaluated["search"] == 24 * (37 + len(baselines))


def test_gradients_are_the_slopes_of_the_losses(mapped: Path) -> None:
    """From the journal: the change of each objective between two near points is what the gradients there say."""
    h = History.read(mapped)
    prepared = prepare(h.experiment)
    fitness, evaluator, space = fitness_of(prepared.experiment), prepared.evaluator()(), prepared.spaces[0]
    assert isinstance(space, RuleSpace)
    objective = Objective(fitness, {}, {})
    [told] = [e for e in events_of(mapped) if "gradients" in e][2:3]
    genome = frozen_genome(decode_array(next(e["genome"] for e in events_of(mapped) if e.get("id") == told["id"])))
    genome = frozen_genome(np.clip(genome, 0.1, 0.9))

    def losses(g: Any) -> tuple[Any, Any]:
        job = Job(0, 0, space.decode(frozen_genome(g), h.manifest), prepared.items["search"], differentiated(fitness))
        [(e, _)] = evaluator.evaluate(WorkUnit(0, (job,)))
        assert e.scores is not None
        assert e.gradients is not None
        by_goal = [space.gradient(frozen_genome(g), b, h.manifest) for b in products(fitness, e.gradients)]
        return objective.losses(e.scores), np.array(by_goal)

    for step in 0.01 * np.eye(2):
        (a, _), (b, _), (_, slopes) = losses(genome - step), losses(genome + step), losses(genome)
        assert slopes.shape == (2, 2)
        assert (b - a) / 0.02 == pytest.approx(slopes @ step / 0.01, rel=0.05, abs=0.02 * np.abs(slopes).max())


@pytest.mark.slow
def test_two_workers_make_the_same_map(mapped: Path, plain: With, tmp_path: Path) -> None:
    """Two processes instead of the driver itself: the same journal to the byte."""
    run(plain(**MAP, **{"workers.backend": "local", "workers.count": 2}), tmp_path / "out")

    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == (mapped / "journal.jsonl").read_bytes()


def test_check_says_what_a_design_counts_as(plain: With) -> None:
    """With gradients and without, so that nobody pays for what fewer axes do not repay."""
    said = text(check(plain(**MAP)))

    assert "a candidate of map's design counts as 4 item evaluations for each of its items" in said
    assert "the 6 candidates of its design count as 24, a design without gradients has 12" in said


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "task", "text"])
def test_damaged_gradients_are_refused(damage: str, finished: Path, plain: With, tmp_path: Path) -> None:
    """A journal whose gradients do not fit the run is refused with the event's number."""
    shutil.copytree(finished, tmp_path / "out")
    events = events_of(finished)
    [first] = [e for e in events if "gradients" in e][:1]
    array = decode_array(first["gradients"]["sums"])
    if damage == "missing":
        del first["gradients"]["sums"]
    elif damage == "task":
        first["gradients"]["others"] = first["gradients"]["sums"]
    elif damage == "text":
        first["gradients"]["sums"] = "?"
    else:
        first["gradients"]["sums"] = encode_array(array[:1] if damage == "shape" else array * np.float32("nan"))
    (tmp_path / "out" / "journal.jsonl").write_bytes(b"".join(seal(e) for e in events))

    with pytest.raises(UserError, match=rf"event {first['seq']}: holds no result on these items"):
        run(plain(**STAGED), tmp_path / "out")


def test_the_page_of_such_a_run(finished: Path) -> None:
    """Samples of one candidate each have no correlation; the page says what it has."""
    page = run_page(History.read(finished))

    assert "adam" in page
    assert "item evaluations" in page


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"search_space.method": "ties"},
        "adam needs gradients, but ties is not linear in its coefficients; use linear or task_arithmetic",
    ),
    ({"search_space.method": ["linear", "task_arithmetic"]}, "the categorical axis 'method' has no derivative; fix it"),
    ({"search_space": {"layer_swap": {}}}, "adam needs gradients, but layer swapping has no derivative"),
    (
        {"fitness.objectives": [{"name": "a", "tasks": ["sums"]}, {"name": "b", "tasks": ["words"]}]},
        "adam minimises one loss, the fitness has 2 objectives",
    ),
    ({"search.items": {"policy": "adaptive"}}, "search.items: adam compares no candidates"),
    ({"search.lag": 2, "search.items": None}, "adam learns from whole generations and has no steady state"),
    ({"search.learning_rate": 0}, "learning_rate: `0 < learning_rate <= 1` must hold, but got 0"),
    ({"search.beta1": 1.0}, "beta1: `0 <= beta1 < 1` must hold, but got 1.0"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_refused_before_anything_is_spent(overrides: dict[str, Any], message: str, plain: With) -> None:
    """In one line, by `check`."""
    with pytest.raises(UserError) as caught:
        check(plain(**{**ADAM, **overrides}))

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tasks_without_gradient_are_refused(plain: With, small_experiment: Path) -> None:
    """A kind that has no derivative is named with the kinds that have one; outside the objective it may stay."""
    rows = small_experiment.parent / "written.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i}+1=", "target": str(i + 1)}) + "\n" for i in range(40)))
    experiment = plain(**ADAM)
    spec = experiment.fitness.model_dump(mode="json", exclude_defaults=True)
    spec["tasks"] = [*spec["tasks"], {"name": "written", "kind": "generation", "data": str(rows), "max_tokens": 2}]

    with pytest.raises(
        UserError, match="'written' of kind generation has none; search on tasks of kind multiple_choice or perplexity"
    ):
        check(plain(**ADAM, fitness=spec))
    spec["objectives"] = [{"name": "skills", "tasks": ["sums"]}]
    assert check(plain(**ADAM, fitness=spec)).name == "small"


def test_check_says_what_is_followed(plain: With) -> None:
    """A floor is no part of what Adam minimises, and the check says so."""
    assert "adam follows the weighted mean of the tasks' metrics" in text(
        check(plain(**ADAM, **{"fitness.floor": {"penalty": 2.0}}))
    )
    assert "adam follows" not in text(check(plain(**ADAM)))
