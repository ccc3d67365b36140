"""M2N2's published digits experiment: `python experiments/m2n2_digits/run.py` (needs scikit-learn for the digits).

arXiv 2508.16204, section 4.1; the paper's "MNIST" is scikit-learn's `load_digits`. Competition, attraction, SLERP and
the archive are those of `evomerge/search/niches.py`; members are dense vectors here, as mutation makes them.
Curves go to results.json as they come; combinations that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cma
import numpy as np
import torch
from cma.sigma_adaptation import CMAAdaptSigmaCSA

from evomerge.search.niches import Archive, arc, choose_parents

HERE = Path(__file__).parent
PIXELS, HIDDEN, DIGITS = 64, 256, 10
PARAMETERS = (PIXELS + 1) * HIDDEN + (HIDDEN + 1) * DIGITS
SPREAD = 0.01
"""Standard deviation of random weights, of mutation, and CMA-ES's first step."""
POPULATION = 20
EVERY = 100
"""Steps between two points of a curve."""
Vector = Any


@dataclass(frozen=True)
class Method:
    """A row of the table; without a crossover a child is its first parent, mutated."""

    name: str
    alpha: float = 1.0
    attraction: bool = True
    split: bool = True
    crossover: bool = True


M2N2 = {
    m.name: m
    for m in (
        Method("m2n2"),
        Method("no_attraction", attraction=False),
        Method("no_split", split=False),
        Method("no_crossover", attraction=False, crossover=False),
        Method("ga", alpha=0.0, attraction=False),
    )
}
RUNS = [
    *(("scratch", m) for m in ("m2n2", "ga")),
    *(("pretrained", m) for m in ("m2n2", "no_split", "ga", "no_attraction")),
    *(("scratch", m) for m in ("cma_es", "no_attraction", "no_split", "no_crossover")),
]
"""CMA-ES has no pre-trained variant, as in the paper; without a mutation neither has the one without crossover."""


class Task:
    """Digits of 8 by 8 raw pixels (0 to 16): the first 80% to search on, the rest to test; an MLP with one layer."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        pixels, self.labels = load_digits(return_X_y=True)
        self.pixels = pixels.astype(np.float32)
        self.cut = int(len(self.labels) * 0.8)

    def right(self, theta: Vector, part: slice) -> Vector:
        """1 for every digit that is told right, else 0."""
        w, b, v, c = unpacked(theta)
        hidden = np.maximum(self.pixels[part] @ w + b, 0.0)
        return (np.argmax(hidden @ v + c, axis=1) == self.labels[part]).astype(np.float64)

    def train(self, theta: Vector) -> Vector:
        return self.right(theta, slice(None, self.cut))

    def test(self, theta: Vector) -> float:
        return float(self.right(theta, slice(self.cut, None)).mean())


def unpacked(theta: Any) -> tuple[Any, Any, Any, Any]:
    """Weights and biases of both layers, in the flattening order of the published code."""
    w, b, v, c = np.cumsum([PIXELS * HIDDEN, HIDDEN, HIDDEN * DIGITS, DIGITS]).tolist()
    return theta[:w].reshape(PIXELS, HIDDEN), theta[w:b], theta[b:v].reshape(HIDDEN, DIGITS), theta[v:c]


def random_vector(rng: np.random.Generator) -> Vector:
    return (SPREAD * rng.standard_normal(PARAMETERS)).astype(np.float32)


def pretrained(task: Task, rng: np.random.Generator) -> list[Vector]:
    """Two models after 10 full-batch steps of Adam, one on the digits 0 to 4, one on 5 to 9."""
    out = []
    for few in (task.labels[: task.cut] < 5, task.labels[: task.cut] >= 5):
        x, y = torch.from_numpy(task.pixels[: task.cut][few]), torch.from_numpy(task.labels[: task.cut][few])
        theta = torch.from_numpy(random_vector(rng)).requires_grad_()
        adam = torch.optim.Adam([theta], lr=0.003)
        for _ in range(10):
            adam.zero_grad()
            w, b, v, c = unpacked(theta)
            torch.nn.functional.cross_entropy(torch.relu(x @ w + b) @ v + c, y).backward()
            adam.step()
        out.append(theta.detach().numpy())
    return out


def merge(a: Vector, b: Vector, rng: np.random.Generator, *, split: bool) -> Vector:
    """SLERP with one angle over the whole vector; the share is w before the split point and 1 - w behind it."""
    w = float(rng.random())
    at = int(rng.integers(PARAMETERS)) if split else PARAMETERS
    products = float(a @ a), float(a @ b), float(b @ b)
    child = np.empty_like(a)
    for part, t in ((slice(None, at), w), (slice(at, None), 1.0 - w)):
        p, q = arc(t, *products)
        child[part] = np.float32(p) * a[part] + np.float32(q) * b[part]
    return child


def evolve(task: Task, method: Method, setting: str, steps: int, seed: int) -> Iterator[tuple[int, float, float]]:
    """(steps so far, training accuracy, test accuracy) of the member that is best in training."""
    rng = np.random.default_rng([seed, 0])  # the same seeds for all methods
    seeds = pretrained(task, rng) if setting == "pretrained" else [random_vector(rng) for _ in range(2)]
    rng = np.random.default_rng([seed, 1])
    archive: Archive[Vector] = Archive(POPULATION, method.alpha)
    for theta in seeds:
        archive.add(theta, task.train(theta))
    for step in range(1, steps + 1):
        first, second = choose_parents(archive.scores, rng, method.alpha, attracted=method.attraction)
        child = archive.members[first]
        if method.crossover:
            child = merge(child, archive.members[second], rng, split=method.split)
        if setting == "scratch":
            child = child + random_vector(rng)
        archive.add(child, task.train(child))
        if step % EVERY == 0:
            accuracies = archive.scores.mean(axis=1)
            best = int(np.argmax(accuracies))
            yield step, float(accuracies[best]), task.test(archive.members[best])


def cma_es(task: Task, steps: int, seed: int) -> Iterator[tuple[int, float, float]]:
    """The best so far of CMA-ES on raw weights, without what the covariance matrix would learn.

    A full matrix has 3 GB here and learns at a rate of about 2/n^2 = 5e-9: it stays the identity. A diagonal one learns
    n/3 times as fast, which is another algorithm. The step size is adapted by CSA; with TPA, which pycma 4.5 takes in
    so many dimensions, the search stagnates (README.md).
    """
    start = random_vector(np.random.default_rng([seed, 0]))
    options = {
        "popsize": POPULATION,
        "seed": seed + 1,
        "CMA_diagonal": True,
        "CMA_on": 0,
        "AdaptSigma": CMAAdaptSigmaCSA,
        "verbose": -9,
        "maxfevals": steps + 1,
    }
    search = cma.CMAEvolutionStrategy(start, SPREAD, options)
    top: tuple[float, Vector] = (-1.0, start)
    for step in range(POPULATION, steps + 1, POPULATION):
        group = search.ask()
        accuracies = [float(task.train(np.float32(x)).mean()) for x in group]
        search.tell(group, [-a for a in accuracies])
        best = int(np.argmax(accuracies))
        top = max(top, (accuracies[best], np.float32(group[best])), key=lambda pair: pair[0])
        if step % EVERY == 0:
            yield step, top[0], task.test(top[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=[*M2N2, "cma_es"], default=[*M2N2, "cma_es"])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = Task()
    done = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    have = {(r["setting"], r["method"], r["seed"]) for r in done}
    for seed in args.seeds:
        for setting, name in RUNS:
            if (setting, name, seed) in have or name not in args.methods:
                continue
            began = time.perf_counter()
            if name == "cma_es":
                curve = list(cma_es(task, args.steps, seed))
            else:
                curve = list(evolve(task, M2N2[name], setting, args.steps, seed))
            columns = {k: [round(p[i], 4) for p in curve] for i, k in ((1, "train"), (2, "test"))}
            done.append({"setting": setting, "method": name, "seed": seed, "every": EVERY, **columns})
            args.out.write_text("[\n" + ",\n".join(json.dumps(r) for r in done) + "\n]\n", encoding="utf-8")
            print(
                f"{setting:<11}{name:<14}{seed}  {columns['test'][-1]:.3f}  {time.perf_counter() - began:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
