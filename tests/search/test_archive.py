"""Archives: cells, edges and ties; and what pyribs holds after the same candidates (tests/goldens/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.search.archive import Archive, Cells, Dimension, Grid, Voronoi, centroids

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "goldens" / "archives.json").read_text())
OFFSET = GOLDENS["meta"]["offset"]
SQUARE = (Dimension("x", 0.0, 1.0, 4), Dimension("y", -1.0, 1.0, 3))


def cells_of(golden: dict[str, Any]) -> Cells:
    sizes = golden.get("dims", [1] * len(golden["ranges"]))
    dimensions = [Dimension(str(i), *r, n) for i, (r, n) in enumerate(zip(golden["ranges"], sizes, strict=True))]
    return Grid(dimensions) if "dims" in golden else Voronoi(dimensions, np.array(golden["centroids"]))


@pytest.mark.parametrize("name", [n for n in GOLDENS if n != "meta"])
def test_contents_are_those_of_pyribs(name: str) -> None:
    """The same candidates one by one: the same candidate in every cell, the same coverage and QD score."""
    golden = GOLDENS[name]
    archive: Archive[int] = Archive(cells_of(golden))
    for i, (measures, loss) in enumerate(zip(golden["measures"], golden["losses"], strict=True)):
        archive.add(np.array(measures), loss, i)

    assert archive.cells.total == golden["cells"]
    assert {str(cell): i for cell, (_, i) in archive.elites.items()} == golden["elites"]
    assert len(archive.elites) / archive.cells.total == pytest.approx(golden["coverage"])
    assert sum(-loss - OFFSET for loss, _ in archive.elites.values()) == pytest.approx(golden["qd_score"])


def test_cells_are_numbered_row_by_row() -> None:
    """As numpy numbers them; both ends of a range belong to it, and what lies beyond to the outer cells."""
    grid = Grid(SQUARE)

    assert grid.total == 12
    for i, x in enumerate((0.0, 0.25, 0.5, 0.75)):
        for j, y in enumerate((-1.0, -1.0 + 2 / 3, -1.0 + 4 / 3)):
            assert grid.of(np.array([x, y])) == np.ravel_multi_index((i, j), (4, 3))
    assert grid.of(np.array([1.0, 1.0])) == 11
    assert grid.of(np.array([9.0, -9.0])) == 9


def test_shares_lie_where_they_mean_to() -> None:
    """k of n items right is cell k of n, whatever the doubles are."""
    for n in (7, 29, 100, 360):
        grid = Grid([Dimension("accuracy", 0.0, 1.0, n)])

        assert [grid.of(np.array([k / n])) for k in range(n)] == list(range(n))


def test_the_first_of_equals_stays() -> None:
    """A worse one and an equal one change nothing, a better one replaces, and the order of cells is that of filling."""
    archive: Archive[str] = Archive(Grid(SQUARE))
    at = np.array([0.9, 0.9])

    assert [archive.add(at, loss, who) for loss, who in ((1.0, "a"), (2.0, "b"), (1.0, "c"))] == [True, False, False]
    assert archive.elites == {11: (1.0, "a")}
    assert archive.add(np.array([0.0, 0.0]), 5.0, "d")
    assert archive.add(at, 0.5, "e")
    assert list(archive.elites.items()) == [(11, (0.5, "e")), (1, (5.0, "d"))]


@pytest.mark.parametrize("measures", [[0.5, np.nan], [np.inf, 0.0]])
def test_what_lies_nowhere_is_refused(measures: list[float]) -> None:
    """NaN and infinities."""
    archive: Archive[int] = Archive(Grid(SQUARE))

    with pytest.raises(ValueError, match="measures"):
        archive.add(np.array(measures), 0.0, 1)
    assert not archive.elites


def test_centroids_are_spread_evenly() -> None:
    """Always the same, all within the cube, and as near to uniform points as those of pyribs."""
    theirs = np.array(GOLDENS["cvt"]["centroids"])
    ours = centroids(2, len(theirs))
    points = np.random.default_rng(7).random((4000, 2))

    def error(centres: np.ndarray) -> float:
        return float(((points[:, None] - centres[None]) ** 2).sum(axis=2).min(axis=1).mean())

    assert ours.shape == theirs.shape
    assert ours.min() > 0.0
    assert ours.max() < 1.0
    assert error(ours) < 1.05 * error(theirs)
    np.testing.assert_array_equal(ours, centroids(2, len(theirs)))


def test_voronoi_cells_scale_the_measures() -> None:
    """Distances are taken with every measure between its bounds, and beyond them at the bounds."""
    cells = Voronoi((Dimension("a", 0.0, 1000.0, 1), Dimension("b", 0.0, 0.01, 1)), np.array([[0.1, 0.9], [0.9, 0.1]]))

    assert cells.total == 2
    assert cells.of(np.array([100.0, 0.009])) == 0
    assert cells.of(np.array([900.0, 0.001])) == 1
    assert cells.of(np.array([5000.0, 0.004])) == 1
