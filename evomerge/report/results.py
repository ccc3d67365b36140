"""The honest table: scores with 95% intervals, and the winner against every baseline on the same items.

Intervals: Wilson's for shares of right answers, Student's t for other metrics; the mean over tasks is the plain
mean with a stratified normal interval. Differences are paired by item; p-values are McNemar's exact test for
right/wrong metrics and a (stratified) normal test else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from evomerge.history import History, saved_text
from evomerge.proposal import Scores
from evomerge.report.routes import route_of

LEVEL = 0.95
MEAN = "mean"


@dataclass(frozen=True)
class Score:
    """One cell: a model's mean score on a task with its interval over `n` items."""

    model: str
    task: str
    metric: str
    split: str
    score: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """Winner minus a baseline, in the metric's own units, paired by item."""

    model: str
    task: str
    metric: str
    split: str
    difference: float
    low: float
    high: float
    p: float
    n: int


def interval(values: NDArray[np.floating[Any]]) -> tuple[float, float, float]:
    """Mean and 95% interval of per-item scores, shape (n,)."""
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    mean = float(x.mean())
    if _binary(x):
        ci = stats.binomtest(round(float(x.sum())), n).proportion_ci(LEVEL, method="wilson")
        return mean, float(ci.low), float(ci.high)
    half = _half(_variance(x) / n, n - 1)
    return mean, mean - half, mean + half


def spread(low: float, high: float, form: str = ".2f") -> str:
    """An interval as text behind its value; nothing where the items tell of none: a single one, or all alike."""
    return f" [{low:{form}}, {high:{form}}]" if math.isfinite(low) and low < high else ""


def difference(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> tuple[float, float, float, float]:
    """Mean of a - b over the same items, 95% interval and two-sided p-value."""
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n = len(d)
    mean = float(d.mean())
    half = _half(_variance(d) / n, n - 1)
    if _binary(np.asarray(a)) and _binary(np.asarray(b)):
        wins, losses = int((d > 0).sum()), int((d < 0).sum())
        p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    else:
        p = _p(mean, _variance(d) / n)
    return mean, mean - half, mean + half, p


def mean_over_tasks(values: Sequence[NDArray[np.floating[Any]]]) -> tuple[float, float, float, float]:
    """Plain mean of the tasks' means, stratified 95% interval and two-sided p-value against 0."""
    rows = [np.asarray(v, dtype=np.float64) for v in values]
    mean = float(np.mean([r.mean() for r in rows]))
    variance = sum(_variance(r) / len(r) for r in rows) / len(rows) ** 2
    half = float(stats.norm.ppf(0.5 + LEVEL / 2)) * math.sqrt(variance)
    return mean, mean - half, mean + half, _p(mean, variance)


def _binary(x: NDArray[Any]) -> bool:
    return bool(np.isin(x, (0.0, 1.0)).all())


def _variance(x: NDArray[np.float64]) -> float:
    return float(x.var(ddof=1)) if len(x) > 1 else math.inf


def _half(variance_of_mean: float, freedom: int) -> float:
    if freedom < 1:
        return math.inf
    return float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * math.sqrt(variance_of_mean)


def _p(mean: float, variance_of_mean: float) -> float:
    if variance_of_mean == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return float(2 * stats.norm.sf(abs(mean) / math.sqrt(variance_of_mean)))


@dataclass(frozen=True)
class Results:
    """Everything that `evomerge report --json` prints."""

    table: list[Score]
    comparisons: list[Comparison]
    winner: int | None
    optimism: dict[str, float]
    cached: int
    looks: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "table": [asdict(s) for s in self.table],
            "comparisons": [asdict(c) for c in self.comparisons],
            "winner": self.winner,
            "optimism": self.optimism,
            "cached": self.cached,
            "looks": self.looks,
        }


def results(history: History, split: str = "report") -> Results:
    """The table and the paired comparisons of a finished run on one split."""
    models: dict[str, Scores] = {}
    for name, entry in history.baselines.items():
        if (scores := entry.scores(split)) is not None:
            models[name] = scores
    winner = None if history.winner_id is None else history.entry(history.winner_id)
    if winner is not None and (scores := winner.scores(split)) is not None:
        models["winner"] = scores
    table = [cell for name, scores in models.items() for cell in cells(history, name, scores, split)]
    comparisons = []
    if "winner" in models:
        for name in models:
            if name != "winner":
                comparisons += _compare(history, name, models["winner"], models[name], split)
    optimism = {}
    if winner is not None:
        for s in ("search", "select", "report"):
            if (scores := winner.scores(s)) is not None:
                columns = [scores[t.name][t.report_metric] for t in history.experiment.benchmarks]
                if comparable(history):
                    optimism[s] = mean_over_tasks(columns)[0]
    return Results(table, comparisons, history.winner_id, optimism, history.cached, history.looks)


def comparable(history: History) -> bool:
    """Whether the tasks' report metrics have one unit; else a mean over tasks would add what cannot be added."""
    return len({t.unit(t.report_metric) for t in history.experiment.benchmarks}) == 1


def cells(history: History, model: str, scores: Scores, split: str) -> list[Score]:
    """A model's row of the table: a cell for each task, then that of their mean where there is one."""
    out, columns = [], []
    for t in history.experiment.benchmarks:
        column = scores[t.name][t.report_metric]
        columns.append(column)
        out.append(Score(model, t.name, t.report_metric, split, *interval(column), len(column)))
    if not comparable(history):
        return out
    return [
        *out,
        Score(model, MEAN, _metric(history), split, *mean_over_tasks(columns)[:3], sum(map(len, columns))),
    ]


def _compare(history: History, model: str, winner: Scores, other: Scores, split: str) -> list[Comparison]:
    out, columns = [], []
    for t in history.experiment.benchmarks:
        a, b = winner[t.name][t.report_metric], other[t.name][t.report_metric]
        columns.append(a.astype(np.float64) - b.astype(np.float64))
        out.append(Comparison(model, t.name, t.report_metric, split, *difference(a, b), len(a)))
    if not comparable(history):
        return out
    mean, low, high, p = mean_over_tasks(columns)
    return [*out, Comparison(model, MEAN, _metric(history), split, mean, low, high, p, sum(map(len, columns)))]


def _metric(history: History) -> str:
    return "+".join(sorted({t.report_metric for t in history.experiment.benchmarks}))


def text_table(history: History, split: str = "report") -> str:
    """The table for people, with the paired comparisons below."""
    r = results(history, split)
    if not r.table:
        return f"nothing is scored on the {split} split yet"
    tasks = [*(t.name for t in history.experiment.benchmarks), *([MEAN] if comparable(history) else [])]
    lower = {t.name for t in history.experiment.benchmarks if t.sign(t.report_metric) > 0}
    names = list(dict.fromkeys(s.model for s in r.table))
    cell = {(s.model, s.task): f"{s.score:.3f}{spread(s.low, s.high)}" for s in r.table}
    n = {s.task: s.n for s in r.table}
    lines = [f"{_metric(history)} on the {split} split, 95% intervals"]
    lines += _grid(
        ["model", *(f"{t} (n={n[t]}{', lower is better' if t in lower else ''})" for t in tasks)],
        [[m, *(cell[m, t] for t in tasks)] for m in names],
    )
    if r.comparisons:
        rows = []
        for model in dict.fromkeys(c.model for c in r.comparisons):
            row = [f"- {model}"]
            for task in tasks:
                c = next(c for c in r.comparisons if (c.model, c.task) == (model, task))
                row.append(f"{c.difference:+.3f}{spread(c.low, c.high, '+.2f')} {p_text(c.p)}")
            rows.append(row)
        lines += ["", "winner minus each, paired by item"]
        lines += _grid(["winner", *tasks], rows)
    if len(r.optimism) == 3:
        o = r.optimism
        lines += [
            "",
            f"winner is candidate {r.winner}: mean {o['search']:.3f} on search, {o['select']:.3f} on select, "
            f"{o['report']:.3f} on report (optimism {o['search'] - o['report']:+.3f})",
        ]
    if r.winner is not None and (route := route_of(history, r.winner)) is not None:
        lines += ["", f"the winner's route: {route}"]
    if history.generations:
        lines.append(saved_text(history.evaluated["search"], history.in_full, gradients=history.gradients))
    lines += warnings_on(history, r)
    if r.looks > 1:
        lines.append(f"the report split was looked at {r.looks} times, once for each budget")
    if r.cached:
        lines.append(f"{r.cached} candidates were answered from earlier scores")
    return "\n".join(lines)


def warnings_on(history: History, r: Results) -> list[str]:
    """What a reader should not overlook: a winner that was there before, or that another model beats here."""
    out = []
    for t in history.experiment.benchmarks:
        own = [s.score for s in r.table if s.task == t.name]
        if own and not any(own) and t.sign(t.report_metric) < 0:
            out.append(f"every model scores 0 on {t.name!r}: look at its prompt, what is extracted and what is right")
    if r.winner is None:
        return out
    winner = history.entry(r.winner)
    if winner.role == "baseline":
        return [*out, f"the search found nothing better than {winner.name!r}, which was there before"]
    if history.recipe(r.winner).route is None and any("route" in space.describe() for space in history.spaces):
        out.append("the winner goes through its layers in their own order: no route did better on the select split")
    if not comparable(history):
        return [*out, "the tasks' metrics have different units, so there is no mean over them"]
    sign = history.experiment.benchmarks[0].sign(history.experiment.benchmarks[0].report_metric)
    mean = {s.model: s.score for s in r.table if s.task == MEAN}
    better = [m for m in mean if m != "winner" and sign * mean[m] < sign * mean.get("winner", -sign * math.inf)]
    if not better:
        return out
    best = min(better, key=lambda m: sign * mean[m])
    more = "higher" if sign < 0 else "lower"
    return [
        *out,
        f"{best!r} has a {more} mean {_metric(history)} ({mean[best]:.3f}) than the winner: the search was too short, "
        "or its objective (the fitness's metrics, weights and floor) wants something else",
    ]


def p_text(p: float) -> str:
    """A p-value with as many digits as say something."""
    return "p<0.001" if p < 0.001 else f"p={p:.3f}" if p < 0.1 else f"p={p:.1f}"


def _grid(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [header, *rows]]
