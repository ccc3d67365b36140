"""Gradients against evolution at equal cost, on the quickstart's models: Adam, Adam and then CMA-ES, CMA-ES.

`python experiments/gradients/gradients.py [SEED ...]` writes results.json and table.md beside this file; runs that are
finished in runs/gradients are read, not repeated. All search one weight for each expert and layer (18 axes) from the
best of seven probes, under one budget of item evaluations. An Adam step costs four for each of its items: one for the
score, three for a forward and a backward pass. There is no floor; the loss is the mean over tasks of the probability of
the right choice.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from evomerge.config import load
from evomerge.history import History
from evomerge.report.results import mean_over_tasks
from evomerge.run import run
from evomerge.yamlio import load_yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUDGETS = (24_000, 48_000)
"""Item evaluations of the search, the probes' 3,948 included; a run of one stage is extended from one to the next."""
SAMPLE = {"policy": "sample", "count": 192}
CMA: dict[str, Any] = {"population": 12, "sigma": 0.1}


THEN: dict[str, Any] = {
    "stages": [
        {"space": "per-layer", "share": 0.6, "algorithm": "adam"},
        {"space": "per-layer", "share": 0.4, "algorithm": "cma-es", "settings": CMA},
    ]
}


ARMS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "adam": ("per-layer", {"algorithm": "adam"}, SAMPLE),
    "adam, then cma-es": (THEN, {}, SAMPLE),
    "cma-es, adaptive": ("per-layer", CMA, {"policy": "adaptive"}),
}
"""Name -> space, settings of the search, policy of items."""
EXTENDED = ("adam", "cma-es, adaptive")


def experiment(arm: str, seed: int, budget: int) -> Any:
    """One search over the quickstart's models."""
    fitness: Any = load_yaml(ROOT / "fitness" / "skills.yaml")
    del fitness["floor"]
    for task in fitness["tasks"]:
        task["data"] = str(ROOT / "fitness" / task["data"])
        task["splits"]["report"] = str(ROOT / "fitness" / task["splits"]["report"])
    models = HERE.parent / "quickstart" / "models"
    space, settings, items = ARMS[arm]
    return load(
        {
            "name": "gradients",
            "models": {
                "base": str(models / "skills-base"),
                "experts": {e: str(models / f"skills-{e}") for e in ("add", "attr", "count")},
            },
            "search_space": space,
            "fitness": fitness,
            "search": {**settings, "seed": seed, "items": items, "budget": {"item_evaluations": budget}},
            "workers": {"backend": "inline", "device": "cpu", "threads": 1},
        }
    )


def row(h: History, arm: str, seed: int, budget: int) -> dict[str, Any]:
    """What a finished run says of its winner, and what it took."""
    assert h.winner_id is not None
    winner = h.entry(h.winner_id)
    means = {s: means_on(h, h.winner_id, s) for s in ("search", "select", "report")}
    return {
        "arm": arm,
        "seed": seed,
        "budget": budget,
        "evaluated": sum(h.evaluated.values()),
        "search_evaluated": h.evaluated["search"],
        "candidates": sum(e.role == "search" for e in h.entries.values()),
        "winner": h.winner_id,
        "role": winner.role,
        "stage": winner.stage,
        **means["report"],
        "gap": means["search"]["probability"] - means["report"]["probability"],
    }


def means_on(h: History, candidate: int, split: str) -> dict[str, float]:
    """A candidate's means over tasks of probability and accuracy."""
    scores = h.entry(candidate).scores(split)
    assert scores is not None
    return {m: mean_over_tasks([scores[t.name][m] for t in h.experiment.tasks])[0] for m in ("probability", "accuracy")}


def main(seeds: list[int]) -> None:
    """Run what is missing; the files are whole after every run."""
    file = HERE / "results.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for budget in BUDGETS:
        for seed in seeds:
            for arm in ARMS if budget == BUDGETS[0] else EXTENDED:
                if any((r["arm"], r["seed"], r["budget"]) == (arm, seed, budget) for r in rows):
                    continue
                out = Path("runs") / "gradients" / f"{'-'.join(arm.replace(',', '').split())}-{seed}"
                rows.append(row(run(experiment(arm, seed, budget), out), arm, seed, budget))
                file.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n", encoding="utf-8")
                (HERE / "table.md").write_text(table(rows), encoding="utf-8")
                print(budget, seed, arm, rows[-1]["evaluated"], f"{rows[-1]['probability']:.4f}", flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Held-out quality by arm and budget: mean over seeds, and each seed's."""
    header = [
        "search",
        "budget",
        "evaluated in all",
        "candidates",
        "held-out probability",
        "seeds",
        "held-out accuracy",
        "seeds",
    ]
    header += ["search minus report"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for budget, arm in itertools.product(BUDGETS, ARMS):
        own = sorted((r for r in rows if (r["arm"], r["budget"]) == (arm, budget)), key=lambda r: r["seed"])
        if not own:
            continue
        cells = [
            arm,
            f"{budget:,}",
            f"{mean(r['evaluated'] for r in own):,.0f}",
            f"{mean(r['candidates'] for r in own):,.0f}",
            *_over_seeds([r["probability"] for r in own]),
            *_over_seeds([r["accuracy"] for r in own]),
            f"{mean(r['gap'] for r in own):+.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _over_seeds(values: list[float]) -> tuple[str, str]:
    spread = f" (sd {stdev(values):.3f})" if len(values) > 1 else ""
    return f"**{mean(values):.3f}**{spread}", " / ".join(f"{x:.3f}" for x in values)


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [1, 2, 3])
