"""A front over three skills: how much of it does each search find with the same item evaluations?

`python experiments/three_objectives/three_objectives.py [SEED ...]` writes results.json and table.md beside this file;
runs that are finished in runs/three-objectives are read, not repeated. The objectives are the quickstart's tasks, each
its probability of the right choice, without a floor. What a search returns is what `evomerge` returns: the
non-dominated finalists on the select split; its hypervolume is taken on the report split above chance (probability 1/4
in every task), with a bootstrap over the report items. The sweep is CMA-ES over three weights, one for each expert,
once for every preference vector of a simplex lattice; its front is that of its winners.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.config import load
from evomerge.history import History
from evomerge.pareto import fronts, hypervolume
from evomerge.run import run
from evomerge.yamlio import load_yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TASKS = ("add", "attr", "count")
CANDIDATES = 300
FINALISTS = 40
CHANCE = 0.25
BOOTSTRAPS = 1000

STAGED = {
    "stages": [
        {"space": "one-weight-per-expert", "share": 0.3, "settings": {"population": 20}},
        {"space": "per-layer", "share": 0.7, "settings": {"population": 40}},
    ]
}
SEARCHES: Mapping[str, tuple[str, Any]] = {
    "nsga-iii, 3 then 18 axes": ("nsga-iii", STAGED),
    "nsga-iii, 3 axes": ("nsga-iii", "one-weight-per-expert"),
    "nsga-iii, 18 axes": ("nsga-iii", "per-layer"),
    "random, 3 axes": ("random", "one-weight-per-expert"),
    "random, 18 axes": ("random", "per-layer"),
}
SWEEPS = {"cma-es sweep, 3 axes, 6 preferences": 2, "cma-es sweep, 3 axes, 15 preferences": 4}
"""Parts that the simplex lattice of preference vectors cuts each weight into."""

Front = list[dict[str, NDArray[np.float32]]]
"""One member after the other: task -> probability of the right choice of each report item."""


def experiment(algorithm: str, space: Any, seed: int, weights: Mapping[str, float] | None, budget: int) -> Any:
    """One search over the quickstart's models: for three objectives, or for their weighted mean."""
    fitness: Any = load_yaml(ROOT / "fitness" / "skills.yaml")
    del fitness["floor"]
    for task in fitness["tasks"]:
        task["data"] = str(ROOT / "fitness" / task["data"])
        task["splits"]["report"] = str(ROOT / "fitness" / task["splits"]["report"])
    if weights is None:
        fitness["objectives"] = [{"name": t, "tasks": [t]} for t in TASKS]
    else:
        fitness["objectives"] = [{"name": "preferred", "tasks": dict(weights)}]
    models = HERE.parent / "quickstart" / "models"
    search: dict[str, Any] = {"algorithm": algorithm, "seed": seed, "budget": {"evaluations": budget}}
    search["finalists"] = FINALISTS if weights is None else 2
    if algorithm == "cma-es":
        search["sigma"] = 0.1
    return load(
        {
            "name": "three-objectives",
            "models": {
                "base": str(models / "skills-base"),
                "experts": {e: str(models / f"skills-{e}") for e in TASKS},
            },
            "search_space": space,
            "fitness": fitness,
            "search": search,
            "workers": {"backend": "inline", "device": "cpu", "threads": 1},
        }
    )


def preferences(cuts: int) -> Iterator[dict[str, float]]:
    """The lattice's preference vectors; a task of weight 0 is left out."""
    for parts in itertools.product(range(cuts + 1), repeat=len(TASKS)):
        if sum(parts) == cuts:
            yield {t: p / cuts for t, p in zip(TASKS, parts, strict=True) if p}


def member(h: History, candidate: int) -> dict[str, NDArray[np.float32]]:
    """A candidate's per-item scores on the report split."""
    scores = h.entry(candidate).scores("report")
    assert scores is not None
    return {t: scores[t]["probability"] for t in TASKS}


def searched(name: str, seed: int, runs: Path) -> tuple[Front, int]:
    """The front that one search returns, and the item evaluations of its search."""
    algorithm, space = SEARCHES[name]
    h = run(experiment(algorithm, space, seed, None, CANDIDATES), runs / f"{name}-{seed}".replace(", ", "-"))
    return [member(h, i) for i in h.front], h.evaluated["search"]


def swept(cuts: int, seed: int, runs: Path) -> tuple[Front, int]:
    """The non-dominated winners (on select) of the sweep, and the item evaluations of all its searches."""
    vectors = list(preferences(cuts))
    losses, members, spent = [], [], 0
    for i, weights in enumerate(vectors):
        budget = CANDIDATES // len(vectors)
        h = run(
            experiment("cma-es", "one-weight-per-expert", seed, weights, budget),
            runs / f"sweep-{len(vectors)}-{seed}-{i}",
        )
        assert h.winner_id is not None
        select = h.entry(h.winner_id).scores("select")
        assert select is not None
        losses.append([-float(select[t]["probability"].mean()) for t in TASKS])
        members.append(member(h, h.winner_id))
        # Baselines are the same in every search of the sweep: they count once, as they do for the others.
        spent += h.evaluated["search"] - (len(h.baselines) * _items(h) if i else 0)
    return [m for m, rank in zip(members, fronts(np.array(losses)), strict=True) if rank == 0], spent


def _items(h: History) -> int:
    return sum(len(ids) for ids in h.item_ids["search"].values())


def volume(front: Front, picks: Mapping[str, NDArray[np.int64]] | None = None) -> float:
    """Hypervolume of mean probabilities above chance, over all report items or over a resample of each task's."""
    means = [[float((x[t] if picks is None else x[t][picks[t]]).mean()) for t in TASKS] for x in front]
    return hypervolume(-np.array(means), np.full(len(TASKS), -CHANCE))


def main(seeds: list[int]) -> None:
    """Run what is missing; the files are whole after every search."""
    runs = Path("runs") / "three-objectives"
    found: dict[tuple[str, int], tuple[Front, int]] = {}
    for seed in seeds:
        for name in (*SEARCHES, *SWEEPS):
            found[name, seed] = swept(SWEEPS[name], seed, runs) if name in SWEEPS else searched(name, seed, runs)
            print(name, seed, f"{volume(found[name, seed][0]):.4f}", len(found[name, seed][0]), flush=True)
    rows = []
    rng = np.random.Generator(np.random.PCG64(0))
    first = next(iter(found.values()))[0][0]
    resamples = [{t: rng.integers(len(first[t]), size=len(first[t])) for t in TASKS} for _ in range(BOOTSTRAPS)]
    best = next(iter(SEARCHES))
    for (name, seed), (front, spent) in found.items():
        ours = found[best, seed][0]
        ahead = np.array([volume(ours, picks) - volume(front, picks) for picks in resamples])
        rows.append(
            {
                "search": name,
                "seed": seed,
                "hypervolume": volume(front),
                "members": len(front),
                "evaluated": spent,
                "ahead": volume(ours) - volume(front),
                "ahead_interval": [float(x) for x in np.quantile(ahead, [0.025, 0.975])],
            }
        )
    (HERE / "results.json").write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n", encoding="utf-8")
    (HERE / "table.md").write_text(table(rows), encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Hypervolume of each search by seed, and how far the first one is ahead of it."""
    header = ["search", "hypervolume, by seed", "mean", "members", "item evaluations", "the first one is ahead by"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name in dict.fromkeys(r["search"] for r in rows):
        own = [r for r in rows if r["search"] == name]
        ahead = [f"{r['ahead']:+.4f} [{r['ahead_interval'][0]:+.4f}, {r['ahead_interval'][1]:+.4f}]" for r in own]
        cells = [
            name,
            " / ".join(f"{r['hypervolume']:.4f}" for r in own),
            f"**{mean(r['hypervolume'] for r in own):.4f}**",
            " / ".join(str(r["members"]) for r in own),
            " / ".join(f"{r['evaluated']:,}" for r in own),
            "-" if name == rows[0]["search"] else "; ".join(ahead),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [1, 2, 3])
