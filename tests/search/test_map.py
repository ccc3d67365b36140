"""MAP: what it asks, that it finds fronts, that bad surrogates are refused aloud, and that a run of it resumes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.progress import Silent
from evomerge.proposal import Proposal, Result, frozen_genome
from evomerge.run import run
from evomerge.search import make_optimizer, make_options
from evomerge.search.base import Optimizer, Selective, Start
from evomerge.search.bayesian_map import Bins
from evomerge.space import Axis

Array = np.ndarray[Any, Any]
Losses = Callable[[Array], Sequence[float]]
EACH = pytest.mark.parametrize("algorithm", ["map", "bayesian-map"])
A, B = np.array([0.2, 0.3, 0.9]), np.array([0.8, 0.6, 0.4])


def bowls(u: Array) -> Sequence[float]:
    """Two objectives whose Pareto set is the straight line from A to B."""
    return [float(((u - c) ** 2).sum()) for c in (A, B)]


def rugged(u: Array) -> Sequence[float]:
    """Many local optima, which no quadratic knows of."""
    return [float((1 - np.cos(40 * (u - c))).sum() + ((u - c) ** 2).sum()) for c in (A, B)]


def optimizer(
    algorithm: str, axes: Sequence[Axis], notes: list[str] | None = None, seed: int = 1, **settings: float
) -> Optimizer:
    start = Start(frozen_genome(np.full(len(axes), 0.35)), 2, note=(notes if notes is not None else []).append)
    rng = np.random.default_rng(seed)
    return make_optimizer(algorithm, axes, start, rng, itertools.count(), make_options(algorithm, settings))


FLOATS = tuple(Axis(f"x{i}") for i in range(3))


def search(opt: Optimizer, budget: int, losses: Losses) -> list[Proposal]:
    done: list[Proposal] = []
    while len(done) < budget:
        for p in opt.ask(budget - len(done)):
            assert p.genome is not None
            opt.tell(p, Result(np.array(losses(p.genome))))
            done.append(p)
    return done


def genomes(done: list[Proposal]) -> Array:
    return np.array([p.genome for p in done])


def off_the_front(u: Array) -> Array:
    """Distance of points from the line from A to B."""
    along = np.clip((u - A) @ (B - A) / ((B - A) @ (B - A)), 0, 1)
    return np.linalg.norm(u - A - along[:, None] * (B - A), axis=1)


def search_with_slopes(opt: Optimizer, budget: int, losses: Losses) -> tuple[list[Proposal], list[bool]]:
    """As `search`, and which proposals were told gradients."""
    assert isinstance(opt, Selective)
    done: list[Proposal] = []
    asked: list[bool] = []
    while len(done) < budget:
        with_slopes = opt.differentiates
        for p in opt.ask(budget - len(done)):
            assert p.genome is not None
            slopes = None
            if with_slopes:
                steps = 1e-6 * np.eye(len(p.genome))
                ends = [np.array(losses(p.genome + h)) - np.array(losses(p.genome - h)) for h in steps]
                slopes = np.array(ends).T / 2e-6
            opt.tell(p, Result(np.array(losses(p.genome)), gradient=slopes))
            done.append(p)
            asked.append(with_slopes)
    return done, asked


@EACH
def test_with_gradients_a_small_design_is_enough(algorithm: str) -> None:
    """Exact quadratics of three axes: gradients are asked for at twice n + 1 points, what follows lies on the
    true front, or by it where so few points leave the box that is searched narrow."""
    notes: list[str] = []
    opt = optimizer(algorithm, FLOATS, notes, gradients=True)
    done, asked = search_with_slopes(opt, 28, bowls)

    assert asked == [True] * 8 + [False] * 20
    assert np.median(off_the_front(genomes(done)[8:])) < 0.03
    assert np.median(off_the_front(genomes(done)[:8])) > 0.2
    assert notes == []


def test_a_design_in_slices_is_told_all_its_gradients() -> None:
    """Asked one by one, gradients are asked for until the last of the design is told; failures are made up for."""
    opt = optimizer("map", FLOATS, gradients=True)
    assert isinstance(opt, Selective)
    for n in range(10):
        assert opt.differentiates
        [p] = opt.ask(1)
        assert p.genome is not None
        failed = n in (0, 5)
        told = Result(np.full(2, np.inf)) if failed else Result(np.array(bowls(p.genome)), gradient=np.ones((2, 3)))
        opt.tell(p, told)

    assert not opt.differentiates


def test_a_design_without_its_gradients_is_refused() -> None:
    """A score alone is no row of a slope; the proposal still waits."""
    opt = optimizer("map", FLOATS, gradients=True)
    p = opt.ask(1)[0]

    with pytest.raises(ValueError, match="proposal 0 was told without its gradient"):
        opt.tell(p, Result(np.ones(2)))
    opt.tell(p, Result(np.ones(2), gradient=np.ones((2, 3))))


def test_refused_surrogates_ask_no_more_gradients() -> None:
    """NSGA-II needs none, and is told none."""
    notes: list[str] = []
    done, asked = search_with_slopes(optimizer("map", FLOATS, notes, gradients=True), 40, rugged)

    assert "8 candidates do not predict others" in notes[0]
    assert len(done) == 40
    assert asked == [True] * 8 + [False] * 32


@EACH
def test_the_design_has_the_start_and_the_corners(algorithm: str) -> None:
    """Twice the ten unknowns: the start, each gene alone, and points that lie on nobody's front."""
    design = genomes(search(optimizer(algorithm, FLOATS), 20, bowls))

    assert design[0].tolist() == [0.35] * 3
    for corner in np.eye(3):
        assert (design == corner).all(axis=1).sum() == 1
    assert len(np.unique(design, axis=0)) == 20
    assert np.median(off_the_front(design)) > 0.2


@EACH
def test_the_front_is_asked_after_the_design(algorithm: str) -> None:
    """Exact quadratics: all that follows lies on the true front and is spread over it; nothing is noted."""
    notes: list[str] = []
    done = search(optimizer(algorithm, FLOATS, notes), 40, bowls)
    front = genomes(done)[20:]

    assert off_the_front(front).max() < 0.05
    along = np.sort((front - A) @ (B - A) / ((B - A) @ (B - A)))
    assert along[0] < 0.1
    assert along[-1] > 0.9
    assert np.diff(along).max() < 0.2
    assert len({g.tobytes() for g in genomes(done)}) == 40
    assert [p.group for p in done] == sorted(p.group for p in done)
    assert notes == []


@EACH
def test_bad_surrogates_are_refused_aloud(algorithm: str) -> None:
    """A line says which objective and how bad; NSGA-II goes on from the best of the design, numbered on."""
    notes: list[str] = []
    done = search(optimizer(algorithm, FLOATS, notes), 80, rugged)

    [note] = notes
    assert "20 candidates do not predict others" in note
    assert "0.5 is needed): NSGA-II goes on" in note
    assert [p.id for p in done] == list(range(80))
    sizes = [len(list(g)) for _, g in itertools.groupby(p.group for p in done)]
    assert set(sizes[-6:]) == {10}
    children = genomes(done)[20:30]
    inherited = np.isclose(children[:, None], genomes(done)[:20]).any(axis=(1, 2))
    assert inherited.mean() > 0.5, "most children share a gene with a member of the design"


def test_a_lower_r2_accepts_them() -> None:
    """The threshold is a setting."""
    notes: list[str] = []
    search(optimizer("map", FLOATS, notes, r2=-1e9), 40, rugged)

    assert notes == []


@EACH
def test_failed_members_of_the_design_are_replaced(algorithm: str) -> None:
    """The first fit has as many candidates as it should, however many failed."""
    done = search(
        optimizer(algorithm, FLOATS), 60, lambda u: bowls(u) if u[0] < 0.6 or u[2] > 0.6 else [np.inf, np.inf]
    )
    failed = [bool(p.genome[0] >= 0.6 and p.genome[2] <= 0.6) for p in done if p.genome is not None]
    first = int(np.flatnonzero(np.cumsum(~np.array(failed)) == 20)[0]) + 1

    assert 0 < sum(failed[:first]) < 20
    front = np.array(list(failed[first:]))
    assert np.median(off_the_front(genomes(done)[first:][~front])) < 0.05


@EACH
def test_whole_numbers(algorithm: str) -> None:
    """Int axes are asked in the middle of their levels, and on them the best levels are found."""
    axes = (FLOATS[0], Axis("n", "int", 0, 4), FLOATS[2])
    done = genomes(search(optimizer(algorithm, axes), 40, bowls))

    assert set(np.round(done[:, 1] * 10)) == {1, 3, 5, 7, 9}
    assert set(np.round(done[20:30, 1] * 10)) == {3, 5}  # from 0.3 to 0.6


@pytest.mark.parametrize("axes", [1, 2, 3, 4, 6])
def test_directions_lie_in_their_bins(axes: int) -> None:
    """4 parts of each angle below four axes, else 2; every bin gives unit vectors of the positive orthant in it."""
    bins = Bins(axes)
    assert bins.count == (4 if axes < 4 else 2) ** (axes - 1)
    drawn = np.repeat(np.arange(bins.count), 5)

    found = bins.directions(drawn, np.random.default_rng(1))

    assert found.shape == (len(drawn), axes)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0)
    assert found.min() >= 0.0
    assert (bins.of(found) == drawn).all()
    assert (bins.of(0.3 * found) == drawn).all(), "lengths do not matter"


def test_bins_without_candidates_score_as_the_worst() -> None:
    """Errors 0.1 in the first bin and 0.5 in the last of four: the two empty ones count as the last."""
    points = np.array([[1.0, 0.1]] * 6 + [[0.1, 1.0]] * 6)
    errors = np.array([0.1] * 6 + [0.5] * 6)

    scores = Bins(2).scores(points, errors, np.random.default_rng(1))

    assert scores == pytest.approx([0.1, 0.5, 0.5, 0.5])


def test_candidates_go_where_the_surrogates_err() -> None:
    """A loss that is rough near one corner only: the adaptive part of the design looks there more than MAP's does."""

    def rough(u: Array) -> Sequence[float]:
        near = u[0] > 2 * u[1]
        return [float(((u - 0.5) ** 2).sum() + near * np.cos(30 * u[0])), float((u**2).sum())]

    counts = {}
    for algorithm in ("map", "bayesian-map"):
        late = [genomes(search(optimizer(algorithm, FLOATS[:2], seed=s, design=4), 24, rough))[15:] for s in range(8)]
        counts[algorithm] = np.mean([(g[:, 0] > 2 * g[:, 1]).mean() for g in late])

    assert counts["bayesian-map"] > counts["map"] + 0.1


TWO = {"fitness.objectives": [{"name": "sums", "tasks": ["sums"]}, {"name": "words", "tasks": ["words"]}]}


class Noted(Silent):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("algorithm", "settings", "refused"),
    [
        ("map", {"population": 4}, 0),
        ("map", {"population": 4, "r2": 0.999999}, 1),
        pytest.param("bayesian-map", {"population": 4}, 0, marks=pytest.mark.slow),
        ("map", {"population": 4, "gradients": True, "r2": -1e9}, 0),
        ("nested-map", {"samples": 17}, 0),
    ],
)
def test_a_cut_run_is_completed_exactly(
    algorithm: str, settings: dict[str, Any], refused: int, experiment_with: Callable[..., Any], tmp_path: Path
) -> None:
    """Real models: a journal that ends within the front (or NSGA-II) or the design is completed byte by byte."""
    search = {"algorithm": algorithm, **settings, "finalists": 3, "probes": False, "seed": 3}
    experiment = experiment_with(search={**search, "budget": {"evaluations": 20}}, **TWO)
    noted = Noted()
    history = run(experiment, tmp_path / "whole", noted)
    whole = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    assert sum(e.role == "search" for e in history.entries.values()) == 20
    assert sum("NSGA-II goes on" in n for n in noted.notes) == refused

    for share in (0.5, 0.7):
        cut = tmp_path / f"cut-{share}"
        cut.mkdir()
        (cut / "experiment.yaml").write_bytes((tmp_path / "whole" / "experiment.yaml").read_bytes())
        (cut / "journal.jsonl").write_bytes(b"".join(lines[: int(len(lines) * share)]))
        run(experiment, cut)
        assert (cut / "journal.jsonl").read_bytes() == whole
