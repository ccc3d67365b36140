"""MAP against NSGA-III and random search on the quickstart's models: three objectives, equal numbers of candidates.

`python experiments/map/map.py [SEED ...]` writes results.json and table.md beside this file; runs that are finished in
runs/map are read, not repeated. The objectives are the three tasks' mean probabilities of the right choice, without a
floor; the space is one weight for each expert, within two boxes. What
counts is the front that `evomerge` returns (the non-dominated finalists on the select split), on the report split: the
volume between the origin and the three probabilities that its members dominate. Baselines are finalists of every run,
so their own front is the least that any run can return but for the noise of the select split.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from evomerge.config import load
from evomerge.history import History
from evomerge.pareto import hypervolume
from evomerge.progress import Silent
from evomerge.run import run
from evomerge.yamlio import load_yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TASKS = ("add", "attr", "count")
BUDGET = 48
BOXES = {"0 to 1": (0.0, 1.0), "-0.5 to 1.5": (-0.5, 1.5)}
"""Bounds of the weights: MAP's own, and those of the library's `one-weight-per-expert`."""
ALGORITHMS: dict[str, dict[str, Any]] = {
    "map": {},
    "bayesian-map": {},
    "nsga-iii": {"population": 12, "divisions": 3},
    "random": {"population": 12},
}


def experiment(box: str, algorithm: str, seed: int) -> Any:
    """One search over the quickstart's models."""
    fitness: Any = load_yaml(ROOT / "fitness" / "skills.yaml")
    del fitness["floor"]
    for task in fitness["tasks"]:
        task["data"] = str(ROOT / "fitness" / task["data"])
        task["splits"]["report"] = str(ROOT / "fitness" / task["splits"]["report"])
    fitness["objectives"] = [{"name": t, "tasks": [t]} for t in TASKS]
    models = HERE.parent / "quickstart" / "models"
    low, high = BOXES[box]
    return load(
        {
            "name": algorithm,
            "models": {
                "base": str(models / "skills-base"),
                "experts": {e: str(models / f"skills-{e}") for e in TASKS},
            },
            "search_space": {"axes": {"weight": {"low": low, "high": high, "default": "uniform"}}},
            "fitness": fitness,
            "search": {
                "algorithm": algorithm,
                **ALGORITHMS[algorithm],
                "seed": seed,
                "finalists": 16,
                "probes": False,
                "budget": {"evaluations": BUDGET},
            },
            "workers": {"backend": "inline", "device": "cpu", "threads": 1},
        }
    )


class Noted(Silent):
    """Keeps what the algorithm tells its user."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def volume(h: History, candidates: Iterable[int], split: str) -> float:
    """Of the unit cube of the tasks' mean probabilities, the share that candidates dominate on a split."""
    losses = []
    for i in candidates:
        scores = h.entry(i).scores(split)
        assert scores is not None
        losses.append([-float(scores[t]["probability"].mean(dtype=np.float64)) for t in TASKS])
    return hypervolume(np.array(losses), np.zeros(len(TASKS)))


def row(h: History, box: str, algorithm: str, seed: int, notes: list[str]) -> dict[str, Any]:
    """What a finished run says of its front."""
    searched = [i for i, e in h.entries.items() if e.role == "search"]
    baselines = [i for i, e in h.entries.items() if e.role == "baseline"]
    assert h.front is not None
    return {
        "box": box,
        "algorithm": algorithm,
        "seed": seed,
        "candidates": len(searched),
        "front": len(h.front),
        "report": volume(h, h.front, "report"),
        "search": volume(h, [*searched, *baselines], "search"),
        "baselines": volume(h, baselines, "report"),
        "notes": notes,
    }


def main(seeds: list[int]) -> None:
    """Run what is missing; the files are whole after every run."""
    file = HERE / "results.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for key in product(BOXES, seeds, ALGORITHMS):
        box, seed, algorithm = key
        if any((r["box"], r["seed"], r["algorithm"]) == key for r in rows):
            continue
        noted = Noted()
        out = Path("runs") / "map" / f"{algorithm}-{list(BOXES).index(box)}-{seed}"
        rows.append(row(run(experiment(box, algorithm, seed), out, noted), box, algorithm, seed, noted.notes))
        file.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n", encoding="utf-8")
        (HERE / "table.md").write_text(table(rows), encoding="utf-8")
        print(*key, f"{rows[-1]['report']:.4f}", f"{rows[-1]['search']:.4f}", *noted.notes, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Volumes by algorithm: mean over seeds, and each seed's."""
    header = [
        "weights",
        "algorithm",
        "report split, returned front",
        "by seed",
        "members",
        "search split, all candidates",
        "seeds",
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for box, algorithm in product(BOXES, ALGORITHMS):
        own = sorted((r for r in rows if (r["box"], r["algorithm"]) == (box, algorithm)), key=lambda r: r["seed"])
        if not own:
            continue
        cells = [box, f"`{algorithm}`"]
        for key in ("report", "search"):
            cells += [f"**{mean(r[key] for r in own):.4f}**", " / ".join(f"{r[key]:.4f}" for r in own)]
            if key == "report":
                cells.append(" / ".join(str(r["front"]) for r in own))
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"\nThe baselines' own front: {rows[0]['baselines']:.4f} on the report split.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [1, 2, 3])
