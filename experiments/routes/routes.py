"""Layer routes on trained models: does a search through layers end above the best single model?

`python experiments/routes/routes.py skills|deep [SEED ...]` writes results-NAME.json and table-NAME.md beside itself;
runs that are finished in runs/routes are read, not repeated. `skills` are the quickstart's models of 5 layers, `deep`
those of 12 that `python experiments/routes/train_pair.py` trains. The fitness is the quickstart's without its floor, on
fresh common samples of the search items; the mean over tasks of the probability of the right choice. What a search
returns is what `evomerge` returns: the best finalist on the select split, looked at once on the report split. There it
is compared with the best single model (base or expert, chosen on select, too), with a bootstrap over the items of each
task. `scales 1` is the ablation of the paper: the winner once more with every scale and gain set to 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.config import load
from evomerge.history import History
from evomerge.prepare import Prepared, prepare
from evomerge.proposal import Job, WorkUnit
from evomerge.recipe import Recipe
from evomerge.run import run
from evomerge.yamlio import load_yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
POOLS: Mapping[str, tuple[Path, tuple[str, ...]]] = {
    "skills": (HERE.parent / "quickstart" / "models", ("skills-base", "skills-add", "skills-attr", "skills-count")),
    "deep": (Path("runs") / "route-models", ("base", "add", "attr")),
}
CANDIDATES = 240
ITEMS = 192
BOOTSTRAPS = 2000
REPETITIONS = {"skills": 1, "deep": 2}
"""Of the array of layers: 20 slots, and 72."""
FROM = ["add", "experts", "base"]
"""Model A of the indicators is the best single one; the genetic algorithm begins with the paths of all."""
SEARCHES: Mapping[str, tuple[str, Any]] = {
    "weights per layer": ("cma-es", "per-layer"),
    "routes, indicators": ("cma-es", {"encoding": "indicator", "models": FROM}),
    "routes, indicators without scales": ("cma-es", {"encoding": "indicator", "models": FROM, "scales": "none"}),
    "routes, scales of one path": ("cma-es", {"encoding": "scales", "models": FROM[:1]}),
    "routes, route-ga": ("route-ga", None),
    "hybrid": ("cma-es", "hybrid"),
}
DEEP = ("weights per layer", "routes, indicators", "routes, route-ga", "hybrid")
"""Those that are run on the deep models, which take twice the time."""

Scores = Mapping[str, Mapping[str, NDArray[np.float32]]]


def experiment(pool: str, algorithm: str, space: Any, seed: int) -> Any:
    """One search over a pool of models."""
    folder, (base, *experts) = POOLS[pool]
    if isinstance(space, dict):
        repetitions = {"repetitions": REPETITIONS[pool]} if space["encoding"] == "indicator" else {}
        space = {"route": {**space, **repetitions}}
    fitness: Any = load_yaml(ROOT / "fitness" / "skills.yaml")
    del fitness["floor"]
    for task in fitness["tasks"]:
        task["data"] = str(ROOT / "fitness" / task["data"])
        task["splits"]["report"] = str(ROOT / "fitness" / task["splits"]["report"])
    return load(
        {
            "name": f"routes-{pool}",
            "models": {
                "base": str(folder / base),
                "experts": {e.removeprefix("skills-"): str(folder / e) for e in experts},
            },
            **({} if space is None else {"search_space": space}),
            "fitness": fitness,
            "search": {
                "algorithm": algorithm,
                "seed": seed,
                "budget": {"evaluations": CANDIDATES},
                "items": {"policy": "sample", "count": ITEMS},
            },
            "workers": {"backend": "inline", "device": "cpu", "threads": 1},
        }
    )


def best_single(h: History) -> str:
    """The base or the expert with the smallest loss on the select split."""
    singles = {n: e for n, e in h.baselines.items() if n != "uniform"}
    return min(singles, key=lambda n: h.loss(singles[n], "select"))


def without_scales(prepared: Prepared, recipe: Recipe) -> Scores | None:
    """Report scores of a winner's path with every scale and gain at 1; None where it has no route."""
    if recipe.route is None:
        return None
    hops = [{"from": h.from_, "layer": h.layer} for h in recipe.route.hops]
    data = recipe.to_json()
    data["route"]["hops"] = hops
    plain = Recipe.model_validate(data).canonical(prepared.manifest)
    [(evaluation, _)] = prepared.evaluator()().evaluate(WorkUnit(0, (Job(0, 0, plain, prepared.items["report"]),)))
    return evaluation.scores


def means(scores: Scores, metric: str, picks: Mapping[str, NDArray[np.int64]] | None = None) -> float:
    """Mean over tasks of a metric's mean over items, or over a resample of each task's."""
    return mean(float((m[metric] if picks is None else m[metric][picks[t]]).mean()) for t, m in scores.items())


def searched(pool: str, name: str, seed: int, runs: Path) -> dict[str, Any]:
    """What one search returns, beside the best single model."""
    algorithm, space = SEARCHES[name]
    spec = experiment(pool, algorithm, space, seed)
    h = run(spec, runs / f"{pool}-{name}-{seed}".replace(", ", "-").replace(" ", "-"))
    assert h.winner_id is not None
    winner, single = h.entry(h.winner_id), best_single(h)
    ours, theirs = winner.scores("report"), h.baselines[single].scores("report")
    assert ours is not None
    assert theirs is not None
    rng = np.random.Generator(np.random.PCG64(0))
    sizes = {t: len(m["accuracy"]) for t, m in ours.items()}
    resamples = [{t: rng.integers(n, size=n) for t, n in sizes.items()} for _ in range(BOOTSTRAPS)]
    ahead = [means(ours, "accuracy", p) - means(theirs, "accuracy", p) for p in resamples]
    recipe = h.winner
    plain = without_scales(prepare(spec), recipe)
    scored = [e for e in h.entries.values() if e.role == "search"]
    return {
        "search": name,
        "seed": seed,
        "accuracy": means(ours, "accuracy"),
        "probability": means(ours, "probability"),
        "best_single": single,
        "best_single_accuracy": means(theirs, "accuracy"),
        "ahead": means(ours, "accuracy") - means(theirs, "accuracy"),
        "ahead_interval": [float(x) for x in np.quantile(ahead, [0.025, 0.975])],
        "scales_1_accuracy": None if plain is None else means(plain, "accuracy"),
        "hops": None if recipe.route is None else len(recipe.route.hops),
        "distinct": len({e.recipe_id for e in scored}),
        "evaluated": h.evaluated["search"],
        "path": None if recipe.route is None else [[x.from_, x.layer, x.scale] for x in recipe.route.hops],
        "merged_accuracy": merged_accuracy(h),
    }


def merged_accuracy(h: History) -> float | None:
    """Report accuracy of what a hybrid's first stage ended with, where it was looked at there."""
    if not h.merged:
        return None
    prepared = prepare(h.experiment)
    job = Job(0, 0, h.recipe(max(h.merged.values())), prepared.items["report"])
    [(evaluation, _)] = prepared.evaluator()().evaluate(WorkUnit(0, (job,)))
    assert evaluation.scores is not None
    return means(evaluation.scores, "accuracy")


def main(pool: str, seeds: list[int]) -> None:
    """Run what is missing; the files are whole after every search."""
    if not (POOLS[pool][0] / POOLS[pool][1][0]).is_dir():
        raise SystemExit(f"{POOLS[pool][0]}: no models; train them first: python experiments/routes/train_pair.py")
    rows = []
    for seed in seeds:
        for name in SEARCHES if pool == "skills" else DEEP:
            rows.append(searched(pool, name, seed, Path("runs") / "routes"))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "path"}), flush=True)
            lines = ",\n".join(json.dumps(r) for r in rows)
            (HERE / f"results-{pool}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
            (HERE / f"table-{pool}.md").write_text(table(rows), encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Each search by seed: accuracy on the report split, and how far ahead of the best single model."""
    header = ["search", "accuracy, by seed", "mean", "ahead of the best single model", "scales 1", "hops", "distinct"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name in dict.fromkeys(r["search"] for r in rows):
        own = [r for r in rows if r["search"] == name]
        ahead = [f"{r['ahead']:+.3f} [{r['ahead_interval'][0]:+.3f}, {r['ahead_interval'][1]:+.3f}]" for r in own]
        cells = [
            name,
            " / ".join(f"{r['accuracy']:.3f}" for r in own),
            f"**{mean(r['accuracy'] for r in own):.3f}**",
            "; ".join(ahead),
            " / ".join("-" if r["scales_1_accuracy"] is None else f"{r['scales_1_accuracy']:.3f}" for r in own),
            " / ".join("-" if r["hops"] is None else str(r["hops"]) for r in own),
            " / ".join(str(r["distinct"]) for r in own),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first = rows[0]
    stage = [r for r in rows if r["merged_accuracy"] is not None]
    lines += ["", f"Best single model: {first['best_single']}, {first['best_single_accuracy']:.3f}."]
    if stage:
        lines.append(
            "The merge that a hybrid's routes go through: "
            + " / ".join(f"{r['merged_accuracy']:.3f}" for r in stage)
            + "."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1], [int(s) for s in sys.argv[2:]] or [1, 2, 3])
