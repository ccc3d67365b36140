"""The quickstart over five seeds of the search: `make seeds`, or `python experiments/quickstart/seeds.py [SEED ...]`.

Writes seeds.md beside this file. The seed changes the search alone; models, items and splits stay.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from pathlib import Path

from evomerge.config import load
from evomerge.report.results import results
from evomerge.run import run

HERE = Path(__file__).resolve().parent


def main(seeds: list[int]) -> None:
    """Run every seed into runs/quickstart-seed-N (finished ones are read, not repeated) and write the table."""
    rows = []
    for seed in seeds:
        out = Path("runs") / f"quickstart-seed-{seed}"
        start = time.perf_counter()
        history = run(load(str(HERE.parent / "quickstart.yaml"), {"search.seed": seed}), out)
        seconds = time.perf_counter() - start
        r = results(history)
        score = {(s.model, s.task): s for s in r.table}
        versus = {(c.model, c.task): c for c in r.comparisons}
        experts = history.manifest.experts
        best = max(experts, key=lambda e: score[e, "mean"].score)
        tasks = [t.name for t in history.experiment.tasks]
        gain = versus[best, "mean"]
        worst = min((versus["base", t] for t in tasks), key=lambda c: c.difference)
        cells = [
            str(seed),
            *(f"{score['winner', t].score:.3f}" for t in tasks),
            f"**{score['winner', 'mean'].score:.3f}**",
            f"{gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]",
            f"{worst.task} {worst.difference:+.3f} [{worst.low:+.3f}, {worst.high:+.3f}] p={worst.p:.2g}",
            f"{r.optimism['search'] - r.optimism['report']:+.3f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
        print(f"seed {seed}: {seconds:.0f} s  {rows[-1]}", flush=True)
    base = " / ".join(f"{score['base', t].score:.3f}" for t in tasks)
    single = " / ".join(f"{score[best, t].score:.3f}" for t in tasks)
    n = score["winner", "mean"].n
    mean = {m: f"{score[m, 'mean'].score:.3f}" for m in ("base", best, "uniform")}
    header = ["seed", *tasks, "mean", "winner minus best expert, mean", "lowest task against the base", "optimism"]
    lines = [
        f"# The quickstart over {len(seeds)} seeds",
        "",
        f"Written by `make seeds` (torch {version('torch')}, cma {version('cma')}).",
        f"Accuracy on the report split, {n} items that no search saw; 95% intervals, paired by item.",
        f"Base {base} (mean {mean['base']}), best single expert `{best}` {single} (mean {mean[best]}), "
        f"uniform merge mean {mean['uniform']}.",
        "Optimism is the winner's mean on search items minus that on report items.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
        *rows,
    ]
    text = "\n".join(lines) + "\n"
    (HERE / "seeds.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [1, 2, 3, 4, 5])
