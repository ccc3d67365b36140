"""MAP with and without gradients at equal item evaluations, on the quickstart's models: three axes and nine.

`python experiments/map/gradients.py [SEED ...]` writes gradients.json beside this file, row by row. As in map.py the
objectives are the three tasks' mean probabilities of the right choice, weights lie within 0 and 1; an eighth of the
calibration items. A candidate with gradients counts as four. Of each search: how well the
surrogates of its design predict 40 uniform points that no search looked at (R2, by objective), and the hypervolume of
all its candidates on the items that were searched. Nothing is journalled: this is the search's loop alone.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from map import TASKS, experiment

from evomerge.config import fitness_of, load
from evomerge.objective import Objective, differentiated, products
from evomerge.pareto import hypervolume
from evomerge.prepare import prepare
from evomerge.proposal import GRADIENT_PRICE, Genome, Job, Result, WorkUnit, frozen_genome
from evomerge.search import make_optimizer, make_options
from evomerge.search.base import Selective, Start
from evomerge.search.surrogate import fit, unknowns

SPACES: dict[str, tuple[Any, int]] = {"all": ("all", 48), "buckets": ({"buckets": 2}, 128)}
"""Groups of blocks, and the budget in candidates without gradients: a design of theirs (20, 110) and a rest."""
SHARE = 0.125
HELD_OUT = 40


class Problem:
    """A space over the quickstart's models, and what its points score."""

    def __init__(self, groups: Any) -> None:
        data = experiment("0 to 1", "map", 0).model_dump(mode="json", exclude_defaults=True)
        data["search_space"]["groups"] = groups
        data["search"]["budget"] = {"evaluations": 1000}
        for task in data["fitness"]["tasks"]:
            task["splits"]["search"] = SHARE
        self.prepared = prepare(load(data))
        self.space: Any = self.prepared.spaces[0]
        self.fitness = fitness_of(self.prepared.experiment)
        self.evaluator = self.prepared.evaluator()()

    def told(self, g: Genome, gradients: bool = False) -> Result:
        """Losses at a point, with their gradients where they are asked for."""
        p = self.prepared
        asked = differentiated(self.fitness) if gradients else ()
        job = Job(0, 0, self.space.decode(g, p.manifest), p.items["search"], asked)
        [(e, _)] = self.evaluator.evaluate(WorkUnit(0, (job,)))
        assert e.scores is not None, e.reason
        slopes = None
        if e.gradients is not None:
            slopes = np.array([self.space.gradient(g, b, p.manifest) for b in products(self.fitness, e.gradients)])
        return Result(Objective(self.fitness, {}, {}).losses(e.scores), gradient=slopes)


def variants(axes: int) -> tuple[dict[str, Any], ...]:
    """Settings: without gradients, with them, and with them in a design that costs what the one without does."""
    dear = 2.0 * unknowns(axes) / (1 + GRADIENT_PRICE) / (axes + 1)
    return {}, {"gradients": True}, {"gradients": True, "design": dear}


def search(problem: Problem, budget: int, seed: int, settings: dict[str, Any], held: tuple[Any, Any]) -> dict[str, Any]:
    """One search to its budget, and what it found."""
    axes, notes = problem.space.axes, list[str]()
    options = make_options("map", settings)
    gradients: bool = options.gradients
    start = Start(problem.space.default, len(TASKS), note=notes.append)
    opt = make_optimizer("map", axes, start, np.random.default_rng(seed), itertools.count(), options)
    assert isinstance(opt, Selective)
    spent, genomes, results = 0, list[Genome](), list[Result]()
    while room := (budget - spent) // (price := 1 + GRADIENT_PRICE * opt.differentiates):
        asked = opt.differentiates
        for p in opt.ask(room):
            assert p.genome is not None
            r = problem.told(p.genome, asked)
            opt.tell(p, r)
            genomes.append(p.genome)
            results.append(r)
            spent += price
    size = options.evaluations(len(axes))
    x, losses = np.array(genomes[:size]), np.array([r.losses for r in results])
    slopes = np.array([r.gradient for r in results[:size]]) if gradients else None
    fits = [fit(x, y[:size], None if slopes is None else slopes[:, i]) for i, y in enumerate(losses.T)]
    points, truth = held
    off = [((f.predict(points) - y) ** 2).mean() / y.var() for f, y in zip(fits, truth.T, strict=True)]
    return {
        "axes": len(axes),
        "seed": seed,
        "gradients": gradients,
        "design": size,
        "spent": spent,
        "candidates": len(genomes),
        "held_out_r2": [round(1 - float(v), 4) for v in off],
        "left_out_r2": [round(f.r2, 4) for f in fits],
        "volume": round(hypervolume(losses, np.zeros(len(TASKS))), 4),
        "notes": notes,
    }


def main(seeds: list[int]) -> None:
    """Both spaces, every seed, with and without."""
    rows: list[dict[str, Any]] = []
    for groups, budget in SPACES.values():
        problem = Problem(groups)
        rng = np.random.default_rng(99)
        points = [frozen_genome(g) for g in rng.random((HELD_OUT, len(problem.space.axes)))]
        held = np.array(points), np.array([problem.told(g).losses for g in points])
        for seed, settings in itertools.product(seeds, variants(len(problem.space.axes))):
            rows.append(search(problem, budget, seed, settings, held))
            text = "[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n"
            (Path(__file__).parent / "gradients.json").write_text(text, encoding="utf-8")
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [1, 2])
