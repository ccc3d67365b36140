"""Write tests/goldens/archives.json: what pyribs' archives hold after known candidates were added one by one.

Grids and a centroidal Voronoi tessellation. Measures lie on and beyond edges too, and losses are few enough that cells
see ties. Run it in the oracle environment:

    .venv-oracle/bin/python tests/oracle/make_archive_goldens.py
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ribs.archives import CVTArchive, GridArchive

ROOT = Path(__file__).resolve().parents[2]
OFFSET = -1.0
"""Of pyribs' QD score: an elite counts by its objective, -loss, above this."""


def candidates(seed: int, n: int, ranges: list[list[float]], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Measures on a lattice of `steps` to each range and half a range beyond both ends, and losses of 40 kinds."""
    rng = np.random.Generator(np.random.PCG64(seed))
    low, high = np.array(ranges).T
    share = rng.integers(-steps // 2, steps + steps // 2 + 1, (n, len(ranges))) / steps
    return low + share * (high - low), rng.integers(0, 40, n) / 40


def contents(archive: Any, measures: np.ndarray, losses: np.ndarray) -> dict[str, Any]:
    """Cell -> number of the candidate in it, and the archive's own statistics."""
    for i, (m, loss) in enumerate(zip(measures, losses, strict=True)):
        archive.add_single([float(i)], -loss, m)
    data = archive.data(["index", "solution"])
    return {
        "measures": measures.tolist(),
        "losses": losses.tolist(),
        "elites": {str(int(c)): int(s[0]) for c, s in zip(data["index"], data["solution"], strict=True)},
        "cells": int(archive.cells),
        "coverage": float(archive.stats.coverage),
        "qd_score": float(archive.stats.qd_score),
    }


def grid(seed: int, n: int, dims: list[int], ranges: list[list[float]], steps: int) -> dict[str, Any]:
    archive = GridArchive(solution_dim=1, dims=dims, ranges=[tuple(r) for r in ranges], qd_score_offset=OFFSET)
    return {"dims": dims, "ranges": ranges, **contents(archive, *candidates(seed, n, ranges, steps))}


def cvt(seed: int, n: int, cells: int) -> dict[str, Any]:
    ranges = [[0.0, 1.0], [0.0, 1.0]]
    archive = CVTArchive(solution_dim=1, centroids=cells, ranges=[(0, 1), (0, 1)], qd_score_offset=OFFSET, seed=seed)
    rng = np.random.Generator(np.random.PCG64(seed))
    measures, losses = rng.random((n, 2)).round(6), rng.integers(0, 40, n) / 40
    return {"centroids": archive.centroids.tolist(), "ranges": ranges, **contents(archive, measures, losses)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "goldens" / "archives.json")
    out = parser.parse_args().out
    data = {
        "meta": {
            "command": "tests/oracle/make_archive_goldens.py",
            "versions": {n: version(n) for n in ("ribs", "numpy", "scikit-learn")},
            "offset": OFFSET,
        },
        "grid-2": grid(1, 400, [10, 8], [[0.0, 1.0], [-2.0, 6.0]], 80),
        "grid-100": grid(2, 300, [100], [[0.0, 1.0]], 100),
        "grid-3": grid(3, 500, [4, 5, 6], [[0.0, 1.0], [0.0, 0.3], [10.0, 16.0]], 60),
        "cvt": cvt(4, 400, 40),
    }
    out.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
