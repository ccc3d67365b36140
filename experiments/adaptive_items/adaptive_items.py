"""Sampled items against full scoring on the quickstart's models, at several budgets of item evaluations.

`python experiments/adaptive_items/adaptive_items.py [SEED ...]` writes results.json and table.md beside this file; what
stands in results.json is not run again. CMA-ES searches one weight for each expert and layer
from the best of a coarse search (one weight for each expert, in full) that all runs share. Each run is extended from
budget to budget, and at each one the winner that `evomerge` would return is looked at on the report split. There is no
floor: the fitness is the plain mean over tasks of the graded metric (probability of the right choice) or of the 0/1 one
(accuracy); held-out quality is shown in both.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from evomerge.config import load
from evomerge.history import History
from evomerge.proposal import Scores
from evomerge.report.results import mean_over_tasks, results
from evomerge.run import run
from evomerge.warm import finalists_of
from evomerge.yamlio import load_yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ITEMS: dict[str, Any] = {
    "full": "full",
    "adaptive": {"policy": "adaptive"},
    "halving": {"policy": "halving", "rungs": [60, 500]},
}
BUDGETS = {
    "full": (25_200, 50_400),
    "adaptive": (8_400, 16_800),
    "halving": (8_400, 16_800, 25_200, 50_400),
}
"""Item evaluations of the search: 44 and 89 candidates in full, and a third of that for adaptive items."""
COARSE = 20_160
SEARCHES = (
    ("full", "probability"),
    ("adaptive", "probability"),
    ("halving", "probability"),
    ("full", "accuracy"),
    ("adaptive", "accuracy"),
)
"""Policy of items and metric of the search; the first one is what the others are compared with."""


def experiment(policy: str, metric: str, seed: int, budget: int, start: Any = ()) -> Any:
    """One search over the quickstart's models; without a recipe to start from, the coarse one."""
    fitness: Any = load_yaml(ROOT / "fitness" / "skills.yaml")
    if start:
        del fitness["floor"]
    for task in fitness["tasks"]:
        task["metric"] = metric
        task["data"] = str(ROOT / "fitness" / task["data"])
        task["splits"]["report"] = str(ROOT / "fitness" / task["splits"]["report"])
    models = HERE.parent / "quickstart" / "models"
    return load(
        {
            "name": f"{policy}-{metric}",
            "models": {
                "base": str(models / "skills-base"),
                "experts": {e: str(models / f"skills-{e}") for e in ("add", "attr", "count")},
            },
            "search_space": "per-layer" if start else "one-weight-per-expert",
            "fitness": fitness,
            "search": {
                "algorithm": "cma-es",
                "seed": seed,
                "population": 12,
                "sigma": 0.1,
                "finalists": 2,
                "warm_start": list(start),
                "probes": not start,
                "items": ITEMS[policy],
                "budget": {"item_evaluations": budget},
            },
            "workers": {"backend": "inline", "device": "cpu", "threads": 1},
        }
    )


def row(h: History, policy: str, metric: str, seed: int, budget: int) -> dict[str, Any]:
    """What a finished run says of its winner, and what it took."""
    r = results(h)
    assert r.winner is not None
    return {
        "policy": policy,
        "metric": metric,
        "seed": seed,
        "budget": budget,
        "evaluated": sum(h.evaluated.values()),
        "candidates": sum(e.role == "search" for e in h.entries.values()),
        "winner": r.winner,
        "role": h.entry(r.winner).role,
        **held_out(h, r.winner),
        "optimism": r.optimism["search"] - r.optimism["report"],
        "items": [g.items[0] for g in h.generations],
        "correlation": [round(g.correlation, 3) for g in h.generations],
    }


def paired(ours: Scores, theirs: Scores, metric: str) -> list[float]:
    """Mean over tasks of the difference on the report items, and its 95% interval, paired by item."""
    return list(mean_over_tasks([ours[t][metric] - theirs[t][metric] for t in sorted(ours)])[:3])


def held_out(h: History, candidate: int) -> dict[str, float]:
    """A candidate on the report split: mean accuracy and probability of the right choice over tasks."""
    own = h.entry(candidate).scores("report")
    assert own is not None
    means = {m: mean_over_tasks([own[t.name][m] for t in h.experiment.tasks]) for m in ("accuracy", "probability")}
    return {
        **{m: x[0] for m, x in means.items()},
        **{f"{m}_half_interval": (x[2] - x[1]) / 2 for m, x in means.items()},
    }


def main(seeds: list[int]) -> None:
    """Run what is missing, in order; the files are whole after every budget."""
    file = HERE / "results.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    runs = Path("runs") / "adaptive-items"
    coarse = experiment("full", "probability", 1, COARSE)
    run(coarse, runs / "coarse-1")
    start = finalists_of(runs / "coarse-1", coarse)[:1]
    for seed, (policy, metric) in itertools.product(seeds, SEARCHES):
        for budget in BUDGETS[policy]:
            key = (policy, metric, seed, budget)
            if any((r["policy"], r["metric"], r["seed"], r["budget"]) == key for r in rows):
                continue
            history = run(experiment(*key, start), runs / f"{policy}-{metric}-{seed}")
            made = row(history, *key)
            if (policy, metric) != SEARCHES[0]:
                made["against_full"] = against_full(history, made["winner"], rows, runs)
            rows.append(made)
            file.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n", encoding="utf-8")
            (HERE / "table.md").write_text(table(rows), encoding="utf-8")
            print(*key, made["evaluated"], f"{made['accuracy']:.4f}", flush=True)


def against_full(h: History, winner: int, rows: list[dict[str, Any]], runs: Path) -> dict[str, list[float]]:
    """A winner minus that of full scoring with the larger budget and the same seed; see `paired`."""
    policy, metric = SEARCHES[0]
    seed, budget = h.experiment.search.seed, BUDGETS[policy][-1]
    [full] = [r for r in rows if (r["policy"], r["metric"], r["seed"], r["budget"]) == (policy, metric, seed, budget)]
    theirs = History.read(runs / f"{policy}-{metric}-{seed}").entry(full["winner"]).scores("report")
    ours = h.entry(winner).scores("report")
    assert ours is not None
    assert theirs is not None
    return {m: paired(ours, theirs, m) for m in ("probability", "accuracy")}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Held-out quality by policy, metric and budget: mean over seeds, and each seed's."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for r in sorted(rows, key=lambda r: (r["metric"] != "probability", r["policy"] != "full", r["budget"], r["seed"])):
        groups.setdefault((r["policy"], r["metric"], r["budget"]), []).append(r)
    header = ["items", "search metric", "budget", "evaluated in all", "candidates", "held-out probability", "seeds"]
    header += ["held-out accuracy", "seeds", "optimism", "accuracy minus full's of 50,400, seed by seed"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for (policy, metric, budget), own in groups.items():
        cells = [
            policy,
            metric,
            f"{budget:,}",
            f"{mean(r['evaluated'] for r in own):,.0f}",
            f"{mean(r['candidates'] for r in own):,.0f}",
            *_over_seeds([r["probability"] for r in own]),
            *_over_seeds([r["accuracy"] for r in own]),
            f"{mean(r['optimism'] for r in own):+.3f}",
            "; ".join("{:+.3f} [{:+.3f}, {:+.3f}]".format(*r["against_full"]["accuracy"]) for r in own)
            if all("against_full" in r for r in own)
            else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _over_seeds(values: list[float]) -> tuple[str, str]:
    spread = f" (sd {stdev(values):.3f})" if len(values) > 1 else ""
    return f"**{mean(values):.3f}**{spread}", " / ".join(f"{x:.3f}" for x in values)


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [1, 2, 3])
