"""What a candidate's score on all items may be told from its scores on a few: item response theory and regression.

`python experiments/irt/irt.py RUN ...` reads finished runs of the quickstart that scored every candidate in full
(`make seeds` writes them: runs/quickstart-seed-N), and writes results.json and table.md beside this file. Nothing is
searched: candidates of generations that were scored in full are scored on a sample of the items again, on paper.

What is estimated is the mean over tasks, from n items that a generation has in common. Parameters are fitted on what
the run itself had scored before: `coarse` in full the baselines and the first stage (59 candidates), `later` these and
five generations of the second one (119); `sampled` the baselines in full, and of the second stage's candidates so far
only the items that their generation was scored on, as a search with adaptive items has them (fitted anew every seven
generations). All later generations are estimated, each on several samples.

- `mean`: the sample's own mean, over tasks; what adaptive items go by.
- `P-IRT`: the sample's mean for the sampled items, fitted probabilities for the others. The ability is the MAP under
  N(0, 1). One dimension with equal slopes (Rasch), one with fitted ones (2PL), or eight (M2PL).
- `MP-IRT`: the same, the ability a mix of those of base and experts (M2PL, K = 4).
- `GP-IRT`, `GMP-IRT`: half way between the sample's mean and P-IRT M2PL, or MP-IRT.
- `ridge`: linear regression of the whole mean on the sampled items' scores; `control`: of what the sample's mean lacks,
  so that a strong penalty leaves the sample's mean. The penalty is chosen by generalised cross-validation.

P-IRT: Polo et al. 2024, "tinyBenchmarks", ICML. MP-IRT and GMP-IRT: MERGE3, arXiv 2502.10436 (ICML 2025), with a prior
N(1/K, 1) on the mix, without which few items leave it undetermined. Items have their weight in the mean over tasks.
Probabilities in place of right and wrong are fitted by the same likelihood (Papke and Wooldridge 1996).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from evomerge.history import History
from evomerge.items import rank_correlation, samples
from evomerge.proposal import ItemSet

HERE = Path(__file__).resolve().parent
Array = NDArray[np.float64]
SIZES = (15, 30, 60, 120)
METRICS = ("accuracy", "probability")
SAMPLES = 2
"""Samples on which each generation is estimated."""
LATER, AGAIN = 5, 7
"""Generations of the second stage that `later` is fitted on; those behind them are estimated. How many of these until
`sampled` is fitted again, at SAMPLED items a generation."""
SAMPLED = (30, 60)


# -- item response theory ---------------------------------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), x within +-30 as in the published code."""
    out: Array = 1.0 / (1.0 + np.exp(-np.clip(x, -30.0, 30.0)))
    return out


@dataclass(frozen=True)
class Items:
    """p = sigmoid(slopes @ ability - difficulty): slopes of shape (n_items, d), difficulty of shape (n_items,)."""

    slopes: Array
    difficulty: Array


def fit(scores: Array, dimensions: int, *, slopes: bool, seed: int = 0) -> tuple[Items, Array]:
    """MAP of items and abilities, the latter of shape (n_models, d), from scores in [0, 1], shape (n_models, n_items).

    Scores that are missing are NaN; every item has some.
    Priors: abilities N(0, 1), difficulties N(0, 2^2), slopes N(1, 0.5^2) in one dimension and N(0, 1) in several;
    without `slopes` all are 1 (Rasch).
    """
    models, items = scores.shape
    centre, width = (1.0, 0.5) if dimensions == 1 else (0.0, 1.0)
    rng = np.random.default_rng(seed)
    known = np.isfinite(scores)
    scores = np.where(known, scores, 0.0)
    share = scores.sum(0) / known.sum(0)
    first = np.concatenate(
        [
            0.1 * rng.standard_normal(models * dimensions),
            np.full(items * dimensions, centre) + (0.1 * rng.standard_normal(items * dimensions) if slopes else 0.0),
            -np.log((share + 0.02) / (1.02 - share)),
        ]
    )
    cuts = np.cumsum([models * dimensions, items * dimensions])

    def parts(x: Array) -> tuple[Array, Array, Array]:
        theta, a, b = np.split(x, cuts)
        return theta.reshape(models, dimensions), a.reshape(items, dimensions), b

    def loss(x: Array) -> tuple[float, Array]:
        theta, a, b = parts(x)
        logit = theta @ a.T - b
        rest = known * (sigmoid(logit) - scores)
        value = np.sum(known * np.logaddexp(0.0, logit) - scores * logit)
        value += 0.5 * (np.sum(theta**2) + np.sum(((a - centre) / width) ** 2) + np.sum((b / 2) ** 2))
        slope = rest.T @ theta + (a - centre) / width**2 if slopes else np.zeros_like(a)
        gradient = np.concatenate([(rest @ a + theta).ravel(), slope.ravel(), b / 4 - rest.sum(0)])
        return float(value), gradient

    found = optimize.minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    theta, a, b = parts(found.x)
    return Items(a, b), theta


def ability(scores: Array, design: Array, difficulty: Array, prior: Array) -> Array:
    """MAP of x in p = sigmoid(design @ x - difficulty) under N(prior, 1) for each model; shape (n_models, d).

    `scores` has the shape (n_models, n_items), `design` (n_items, d). The prior makes it finite where all are right.
    """
    x = np.repeat(prior[None], len(scores), axis=0)
    for _ in range(30):
        p = sigmoid(x @ design.T - difficulty)
        gradient = (scores - p) @ design - (x - prior)
        curvature = np.einsum("mi,ij,ik->mjk", p * (1 - p), design, design) + np.eye(design.shape[1])
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        x = x + step / np.maximum(1.0, np.abs(step).max(axis=1, keepdims=True))
        if np.abs(step).max() < 1e-6:
            break
    return x


# -- regression -------------------------------------------------------------------------------------------------------


def ridge(x: Array, y: Array, new: Array) -> Array:
    """Ridge regression of y on x, the penalty by generalised cross-validation: predictions for the rows of `new`."""
    middle, level = x.mean(0), y.mean()
    u, s, vt = np.linalg.svd(x - middle, full_matrices=False)
    projected = u.T @ (y - level)
    best, shrunk = np.inf, np.zeros_like(s)
    for penalty in np.geomspace(1e-4, 1e3, 29) * s[0] ** 2:
        keep = s**2 / (s**2 + penalty)
        rest = (y - level) - u @ (keep * projected)
        gcv = float(np.mean(rest**2) / (1.0 - (1.0 + keep.sum()) / len(y)) ** 2) if keep.sum() + 1 < len(y) else np.inf
        if gcv < best:
            best, shrunk = gcv, s / (s**2 + penalty)
    out: Array = level + (new - middle) @ (vt.T @ (shrunk * projected))
    return out


# -- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Responses:
    """A run's scores in full: one row a candidate. `coarse` are the rows of the first stage and the baselines, `early`
    of the generations of the second one that nothing is estimated of, `endpoints` of base and experts."""

    scores: Mapping[str, Array]
    weights: Array
    whole: ItemSet
    places: Mapping[str, Array]
    baselines: Array
    coarse: Array
    endpoints: Array
    early: Sequence[Array]
    generations: Sequence[Array]

    def taken(self, size: int, seed: Sequence[int], group: int) -> Array:
        """The columns of a generation's sample of the items."""
        [part] = samples(self.whole, [size], seed, group)
        return np.concatenate([self.places[t][list(at)] for t, at in part.tasks.items()])


def responses(run: Path) -> Responses:
    """Read a run of two stages that scored everything in full."""
    h = History.read(run)
    sizes = {t: len(ids) for t, ids in h.item_ids["search"].items()}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    entries = [e for e in h.entries.values() if e.role in ("baseline", "search") and e.scores("search") is not None]
    scores = {
        m: np.array([np.concatenate([e.scores("search")[t][m] for t in sizes]) for e in entries], dtype=np.float64)  # type: ignore[index]
        for m in METRICS
    }
    at: dict[tuple[int, int], list[int]] = {}
    for i, e in enumerate(entries):
        at.setdefault((e.stage, e.group), []).append(i)
    groups = [np.array(at[g]) for g in sorted(at) if g[0] == 1]
    return Responses(
        scores,
        np.concatenate([np.full(n, 1 / n / len(sizes)) for n in sizes.values()]),
        ItemSet("search", {t: tuple(range(n)) for t, n in sizes.items()}),
        {t: np.arange(n) + starts[t] for t, n in sizes.items()},
        np.array([i for i, e in enumerate(entries) if e.role == "baseline"]),
        np.array([i for i, e in enumerate(entries) if e.stage < 1]),
        np.array([i for i, e in enumerate(entries) if e.role == "baseline" and e.name != "uniform"]),
        groups[:LATER],
        [g for g in groups[LATER:] if len(g) > 2],
    )


def estimates(y: Array, train: Array, taken: Array, w: Array, irt: Mapping[str, Any], ends: Array) -> dict[str, Array]:
    """Estimator -> the whole mean of each row of y, shape (n_models,), from the columns `taken` alone.

    `train` holds the rows that everything was fitted on, `ends` the abilities of base and experts; regressions need
    rows without a gap.
    """
    rest = np.setdiff1d(np.arange(len(w)), taken)
    share = w[taken].sum()
    own = w[taken] / share
    plain: Array = y[:, taken] @ own
    out = {"mean": plain}

    def filled(items: Items, theta: Array) -> Array:
        p = sigmoid(theta @ items.slopes[rest].T - items.difficulty[rest])
        return share * plain + p @ w[rest]

    for name, items in irt.items():
        theta = ability(y[:, taken], items.slopes[taken], items.difficulty[taken], np.zeros(items.slopes.shape[1]))
        out[f"P-IRT {name}"] = filled(items, theta)
    items = irt["M2PL"]
    even = np.full(len(ends), 1 / len(ends))
    mix = ability(y[:, taken], items.slopes[taken] @ ends.T, items.difficulty[taken], even)
    out["MP-IRT"] = filled(items, mix @ ends)
    out["GP-IRT"] = 0.5 * plain + 0.5 * out["P-IRT M2PL"]
    out["GMP-IRT"] = 0.5 * plain + 0.5 * out["MP-IRT"]
    if np.isfinite(train).all():
        x, full = train[:, taken] * own, train @ w
        out["ridge"] = ridge(x, full, y[:, taken] * own)
        out["control"] = plain + ridge(x, full - x.sum(1), y[:, taken] * own)
    return out


def measured(run: Path, seed: int) -> list[dict[str, Any]]:
    """One row for each metric, set that was fitted on, sample size and estimator."""
    r = responses(run)
    later = np.concatenate([r.coarse, *r.early])
    rows = []
    for metric in METRICS:
        y = r.scores[metric]
        for name, before in (("coarse", r.coarse), ("later", later)):
            one, two = (fit(y[before], 1, slopes=slopes)[0] for slopes in (False, True))
            many, theta = fit(y[before], 8, slopes=True)
            irt = {"Rasch": one, "2PL": two, "M2PL": many}
            ends = theta[np.searchsorted(before, r.endpoints)]
            for size in SIZES:
                found = Found(run.name, metric, name, size)
                for g, members in enumerate(r.generations):
                    for k in range(SAMPLES):
                        taken = r.taken(size, (seed, k), g + LATER)
                        found.add(estimates(y[members], y[before], taken, r.weights, irt, ends), y[members] @ r.weights)
                rows += found.rows()
        for size in SAMPLED:
            found = Found(run.name, metric, "sampled", size)
            seen = [r.baselines]
            scores = np.full_like(y, np.nan)
            scores[r.baselines] = y[r.baselines]
            for g, members in enumerate([*r.early, *r.generations]):
                if g >= LATER and (g - LATER) % AGAIN == 0:
                    before = np.concatenate(seen)
                    many, theta = fit(scores[before], 8, slopes=True)
                    ends = theta[np.searchsorted(before, r.endpoints)]
                for k in range(SAMPLES) if g >= LATER else ():
                    taken = r.taken(size, (seed, k), g)
                    x = estimates(y[members], scores[before], taken, r.weights, {"M2PL": many}, ends)
                    found.add(x, y[members] @ r.weights)
                scores[np.ix_(members, r.taken(size, (seed, 0), g))] = y[np.ix_(members, r.taken(size, (seed, 0), g))]
                seen.append(members)
            rows += found.rows()
    return rows


class Found:
    """What one estimator after the other achieves on one generation after the other."""

    def __init__(self, run: str, metric: str, fitted: str, size: int) -> None:
        self._about = {"run": run, "metric": metric, "fitted": fitted, "n": size}
        self._errors: dict[str, list[float]] = {}
        self._ranks: dict[str, list[float]] = {}

    def add(self, estimated: Mapping[str, Array], truth: Array) -> None:
        """One sample of one generation."""
        for e, x in estimated.items():
            self._errors.setdefault(e, []).append(float(np.mean(np.abs(x - truth))))
            self._ranks.setdefault(e, []).append(rank_correlation(x, truth))

    def rows(self) -> list[dict[str, Any]]:
        """Means over generations and samples."""
        return [
            {**self._about, "estimator": e, "error": round(mean(x), 5), "rank": round(mean(self._ranks[e]), 5)}
            for e, x in self._errors.items()
        ]


# -- the table --------------------------------------------------------------------------------------------------------


def over_runs(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval (Student's t)."""
    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return mean(values), float(half)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """By metric and fit: of each estimator the error and the rank correlation, and both paired with the mean's."""
    runs = sorted({r["run"] for r in rows})
    value = {(r["metric"], r["fitted"], r["n"], r["estimator"], r["run"]): r for r in rows}
    names = list(dict.fromkeys(r["estimator"] for r in rows))
    out = []
    for metric, fitted in ((m, f) for m in METRICS for f in ("coarse", "later", "sampled")):
        sizes = SAMPLED if fitted == "sampled" else SIZES
        for what, title in (("rank", "rank correlation within generations"), ("error", "mean absolute error")):
            out += [f"{title}, {metric}, fitted on `{fitted}`", ""]
            out += ["| estimator | " + " | ".join(f"n = {n}" for n in sizes) + " |", "|" + " --- |" * (len(sizes) + 1)]
            for e in names:
                cells = []
                for n in sizes:
                    if (metric, fitted, n, e, runs[0]) not in value:
                        continue
                    own = [value[metric, fitted, n, e, run][what] for run in runs]
                    if e == "mean":
                        cells.append("{:.3f} +-{:.3f}".format(*over_runs(own)))
                        continue
                    base = [value[metric, fitted, n, "mean", run][what] for run in runs]
                    difference = over_runs([a - b for a, b in zip(own, base, strict=True)])
                    cells.append("{:.3f} ({:+.3f} +-{:.3f})".format(mean(own), *difference))
                if cells:
                    out.append(f"| {e} | " + " | ".join(cells) + " |")
            out.append("")
    return "\n".join(out)


def main(runs: Sequence[Path]) -> None:
    """Measure every run."""
    rows: list[dict[str, Any]] = []
    for seed, run in enumerate(runs):
        begin = time.perf_counter()
        rows += measured(run, seed)
        print(run, f"{time.perf_counter() - begin:.0f} s", flush=True)
        (HERE / "results.json").write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n", encoding="utf-8")
    (HERE / "table.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main([Path(a) for a in sys.argv[1:]] or sorted(Path("runs").glob("quickstart-seed-*")))
