"""The front of a run for several objectives: its members with scores, its hypervolume, and picking one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import UserError, nearest
from evomerge.history import History
from evomerge.pareto import Losses, hypervolume
from evomerge.report.results import interval, spread
from evomerge.report.routes import route_of
from evomerge.tasks import Task


def members(history: History) -> tuple[int, ...]:
    """Numbers of the front, in the order of the first objective. Raises UserError while there is none."""
    if not history.front:
        raise UserError(f"{history.path}: has no front yet; finish it with `evomerge resume {history.path}`")
    at = {i: history.losses(history.entry(i), "select") for i in history.front}
    return tuple(sorted(at, key=lambda i: (*at[i], i)))


def front(history: History) -> dict[str, Any]:
    """Plain data: objectives, and for each member its losses on select and its scores on select and report."""
    rows = []
    for number in members(history):
        entry = history.entry(number)
        scores: dict[str, Any] = {}
        for split in ("select", "report"):
            if (found := entry.scores(split)) is not None:
                scores[split] = {t.name: _cell(t, found[t.name][t.report_metric]) for t in history.experiment.tasks}
        losses = dict(zip(history.goals, history.losses(entry, "select").tolist(), strict=True))
        rows.append(
            {
                "id": number,
                "winner": number == history.winner_id,
                "losses": losses,
                "scores": scores,
                "route": route_of(history, number),
            }
        )
    return {"objectives": list(history.goals), "members": rows, "hypervolume": progress(history)[-1:]}


def _cell(task: Task, column: NDArray[Any]) -> dict[str, Any]:
    """A score with its interval; none for what is no benchmark, which is exact."""
    score, low, high = interval(column)
    limits = {"low": low, "high": high} if task.benchmark else {"low": score, "high": score}
    return {"score": score, **limits, "metric": task.report_metric, "n": len(column)}


def front_text(data: Mapping[str, Any]) -> str:
    """For people: one line a member."""
    lines = [f"{len(data['members'])} non-dominated candidates on the select split; scores on report, 95% intervals"]
    for m in data["members"]:
        losses = "  ".join(f"{g} {x:.4f}" for g, x in m["losses"].items())
        shown = m["scores"].get("report") or m["scores"].get("select") or {}
        cells = "  ".join(f"{t} {s['score']:.3f}{spread(s['low'], s['high'])}" for t, s in shown.items())
        lines.append(f"{m['id']:>6}{'*' if m['winner'] else ' '} losses: {losses}  |  {cells}")
        if m["route"] is not None:
            lines.append(f"{'':>7} route: {m['route']}")
    lines.append("* the winner: nearest to the ideal point; pick another with --prefer, --knee or --best ... --where")
    return "\n".join(lines)


# -- picking one ---------------------------------------------------------------------------------------------


def scaled(losses: Losses) -> Losses:
    """Every objective mapped to [0, 1] over the given vectors; a constant one to 0."""
    low, high = losses.min(axis=0), losses.max(axis=0)
    out: Losses = (losses - low) / np.where(high > low, high - low, 1.0)
    return out


def preferred(history: History, weights: Mapping[str, float]) -> int:
    """The member with the least weighted sum of scaled losses. Raises UserError for unknown objectives."""
    for name in weights:
        if name not in history.goals:
            raise UserError(f"--prefer: there is no objective {name!r}{nearest(name, history.goals)}")
    if any(not np.isfinite(w) or w < 0 for w in weights.values()) or not any(weights.values()):
        raise UserError(f"--prefer: weights are 0 or more, one of them above 0, got {dict(weights)}")
    numbers = members(history)
    w = np.array([weights.get(g, 0.0) for g in history.goals])
    return numbers[int(np.argmin(scaled(_losses(history, numbers)) @ w))]


def knee(history: History) -> int:
    """The member farthest below the plane through the front's ends: where giving up little gains most."""
    return preferred(history, dict.fromkeys(history.goals, 1.0))


def best_where(history: History, best: str, conditions: Sequence[str]) -> int:
    """The member that is best on one task among those that meet all conditions such as `code>=0.5`, on select.

    Raises UserError for unknown tasks, unreadable conditions, and where no member meets them.
    """
    tasks = {t.name: t for t in history.experiment.tasks}

    def score(number: int, name: str) -> float:
        if name not in tasks:
            raise UserError(f"--where: there is no task {name!r}{nearest(name, tasks)}; objectives go with --prefer")
        scores = history.entry(number).scores("select")
        assert scores is not None
        return float(np.mean(scores[name][tasks[name].report_metric], dtype=np.float64))

    able = list(members(history))
    for text in conditions:
        found = re.fullmatch(r"\s*([A-Za-z0-9_.-]+)\s*(>=|<=)\s*([-+0-9.eE]+)\s*", text)
        try:
            name, sign, limit = found.groups() if found else ("", "", "x")
            value = float(limit)
        except ValueError:
            raise UserError(f"--where {text}: expected TASK>=NUMBER or TASK<=NUMBER, for example code>=0.5") from None
        able = [i for i in able if (score(i, name) >= value if sign == ">=" else score(i, name) <= value)]
        if not able:
            raise UserError(f"no member of the front has {text.strip()} on the select split")
    if best not in tasks:
        raise UserError(f"--best: there is no task {best!r}{nearest(best, tasks)}; objectives go with --prefer")
    sign_of = tasks[best].sign(tasks[best].report_metric)
    return min(able, key=lambda i: (sign_of * score(i, best), i))


def _losses(history: History, numbers: Sequence[int]) -> Losses:
    return np.array([history.losses(history.entry(i), "select") for i in numbers])


# -- hypervolume over time -----------------------------------------------------------------------------------


def progress(history: History, points: int = 50) -> list[tuple[int, float]]:
    """(candidates scored, hypervolume of the front so far) on the search split, at most `points` of them.

    The reference is the worst loss of every objective over the baselines; losses are scaled by the range between it
    and the best of any candidate, so that 1 is the whole box. Empty where fewer than two baselines have scores.
    """
    entries = [e for e in history.entries.values() if "search" in e.results]
    losses = np.array([history.losses(e, "search") for e in entries])
    finite = np.isfinite(losses).all(axis=1) if len(losses) else np.zeros(0, dtype=bool)
    baselines = np.array([e.role == "baseline" for e in entries], dtype=bool)
    if (baselines & finite).sum() < 2:
        return []
    reference = losses[baselines & finite].max(axis=0)
    ideal = losses[finite].min(axis=0)
    span = np.where(reference > ideal, reference - ideal, 1.0)
    at = np.unique(np.linspace(1, len(losses), min(points, len(losses))).astype(int))
    out = []
    for n in at:
        seen = (losses[:n][finite[:n]] - ideal) / span
        out.append((int(n), hypervolume(seen, np.ones(losses.shape[1]))))
    return out
