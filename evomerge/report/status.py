"""How far a run is, and one candidate in full."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.history import History, saved_text
from evomerge.pareto import Losses, fronts, order
from evomerge.report.routes import route_of, route_text
from evomerge.rundir import TELEMETRY, read_telemetry
from evomerge.yamlio import dump_yaml

STRETCHES = 12
"""Stretches of a route that the status writes out."""
SLOW = 2.0
"""A worker whose median evaluation takes this many times the fastest worker's is warned about."""


def status(path: Path) -> dict[str, Any]:
    """Progress of a run directory, finished or live. Raises UserError where it is none."""
    return status_of(History.read(path))


def status_of(h: History) -> dict[str, Any]:
    """Progress of a run that was read already."""
    searched = [e for e in h.entries.values() if e.role == "search"]
    results = [r for e in h.entries.values() for r in (*e.results.values(), *e.samples.values())]
    failures: dict[str, int] = {}
    for r in results:
        if not r.ok:
            failures[r.status] = failures.get(r.status, 0) + 1
    losses = {e.id: h.losses(e, "search") for e in h.entries.values() if e.scores("search") is not None}
    losses = {i: x for i, x in losses.items() if np.isfinite(x).all()}
    best = list(losses)[int(order(np.array(list(losses.values())))[0])] if losses else None
    lines = [t for t in read_telemetry(h.path / TELEMETRY) if "proposal" in t]
    chosen = h.winner_id if h.winner_id is not None else best if len(h.goals) == 1 else None
    phase = "finished" if h.stopped else "final" if h.final else "searching" if searched else "baselines"
    return {
        "name": h.experiment.name,
        "phase": phase,
        "budget": h.experiment.search.budget.model_dump(exclude_none=True),
        "candidates": len(searched),
        "scored": sum("search" in e.results or bool(e.samples) for e in searched),
        "items": sum(h.evaluated.values()),
        "sampled": _sampled(h),
        "failures": failures,
        "best": best,
        "best_loss": None if best is None or len(h.goals) > 1 else float(losses[best][0]),
        "front": None if len(h.goals) == 1 else _members_so_far(h, losses),
        "winner": h.winner_id,
        "route": None if chosen is None else route_of(h, chosen, STRETCHES),
        "ended_by": h.ended_by,
        "run_seconds": lines[-1]["run_seconds"] if lines else 0.0,
        "seconds_left": _left(h, len(searched), lines),
        "seconds_per_candidate": (
            float(np.mean([t["build_seconds"] + t["score_seconds"] for t in lines])) if lines else None
        ),
        "peak_mb": max((t["peak_mb"] for t in lines), default=None),
        "cached": h.cached,
        "looks": h.looks,
        "workers": _workers(lines),
        "numerics": h.facts["numerics"],
    }


def _members_so_far(h: History, losses: Mapping[int, Losses]) -> int:
    """Distinct recipes on the front: a probe may repeat a baseline."""
    distinct = {h.entries[i].recipe_id: x for i, x in losses.items()}
    return int(sum(fronts(np.array([*distinct.values()])) == 0)) if distinct else 0


def _sampled(h: History) -> dict[str, Any] | None:
    """Items used on the search split against full scoring, and the last generation; None where all are scored."""
    if not h.generations:
        return None
    last = h.generations[-1]
    return {
        "used": h.evaluated["search"],
        "in_full": h.in_full,
        "gradients": h.gradients,
        "generations": len(h.generations),
        "items": last.items[0],
        "correlation": last.correlation if math.isfinite(last.correlation) else None,
    }


def sampled_text(s: dict[str, Any]) -> str:
    """One line for people."""
    rho = "" if s["correlation"] is None else f" with a split-half rank correlation of {s['correlation']:.2f}"
    saved = saved_text(s["used"], s["in_full"], gradients=s["gradients"])
    return f"{saved}; the last of {s['generations']} generations had {s['items']}{rho}"


def _left(h: History, scored: int, lines: list[dict[str, Any]]) -> float | None:
    """Seconds to the end of the budget at the pace so far; None where there is no pace yet."""
    if not lines or not scored:
        return None
    gone = float(lines[-1]["run_seconds"])
    budget = h.experiment.search.budget
    if budget.minutes is not None:
        return max(0.0, budget.minutes * 60 - float(gone))
    if h.generations and budget.item_evaluations is not None:
        return max(0.0, gone * (budget.item_evaluations / max(h.evaluated["search"], 1) - 1))
    per_candidate = sum(len(ids) for ids in h.item_ids.get("search", {}).values())
    total = budget.evaluations or (budget.item_evaluations or 0) // max(per_candidate, 1)
    return max(0.0, gone / scored * (total - scored))


def _workers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per worker: evaluations, seconds per item, share of its time spent idle, and whether it is much slower.

    Idle is counted from a worker's first result to its last; a resume in between counts as idle.
    """
    out = []
    for name in sorted({t["worker"] for t in lines if t["worker"]}):
        mine = [t for t in lines if t["worker"] == name and t["build_seconds"] + t["score_seconds"] > 0]
        if not mine:
            continue
        busy = [t["build_seconds"] + t["score_seconds"] for t in mine]
        wall = mine[-1]["run_seconds"] - mine[0]["run_seconds"]
        out.append(
            {
                "worker": name,
                "device": mine[-1].get("device", ""),
                "evaluations": len(mine),
                "seconds_each": float(np.median(busy)),
                "idle": max(0.0, 1.0 - sum(busy[1:]) / wall) if wall > 0 else None,
                "attempts_lost": sum(t["attempts"] - 1 for t in mine),
            }
        )
    fastest = min((w["seconds_each"] for w in out), default=0.0)
    for w in out:
        w["slow"] = w["evaluations"] >= 5 and w["seconds_each"] > SLOW * fastest
    return out


def status_text(s: dict[str, Any]) -> str:
    """For people."""
    budget = ", ".join(f"{v} {k}" for k, v in s["budget"].items())
    lines = [
        f"{s['name']}: {s['phase']}; {s['scored']} of {s['candidates']} asked candidates scored (budget {budget})",
        f"{s['items']:,} item evaluations in {s['run_seconds']:.0f} s",
    ]
    if s["sampled"] is not None:
        lines.append(sampled_text(s["sampled"]))
    if s["front"] is not None:
        lines.append(f"{s['front']} candidates on the front of the search split")
    elif s["best"] is not None:
        lines.append(f"best on search: candidate {s['best']}, loss {s['best_loss']:.4f}")
    if s["winner"] is not None:
        lines.append(f"winner: candidate {s['winner']}")
    if s["route"] is not None:
        lines.append(f"its route: {s['route']}")
    if s["ended_by"] is not None:
        lines.append(f"the search ended by itself, not by its budget: {s['ended_by']}")
    if s["failures"]:
        lines.append("failures: " + ", ".join(f"{k} {n}" for k, n in s["failures"].items()))
    if s["seconds_per_candidate"] is not None:
        lines.append(f"{s['seconds_per_candidate']:.3f} s per candidate, worker peak {s['peak_mb']:.0f} MiB")
    if s["seconds_left"] is not None and s["phase"] != "finished":
        lines.append(f"about {s['seconds_left']:.0f} s left")
    if s["cached"]:
        lines.append(f"{s['cached']} candidates answered from earlier scores")
    if s["looks"] > 1:
        lines.append(f"the report split was looked at {s['looks']} times")
    for w in s["workers"]:
        idle = "" if w["idle"] is None else f", idle {w['idle']:.0%}"
        slow = "  <- much slower than the others" if w["slow"] else ""
        lines.append(f"  {w['worker']} ({w['device']}): {w['evaluations']} x {w['seconds_each']:.3f} s{idle}{slow}")
    return "\n".join(lines)


def candidate(history: History, number: int) -> dict[str, Any]:
    """One candidate: recipe, losses and mean scores by split."""
    entry = history.entry(number)
    splits = {}
    for split, result in {**entry.samples, **entry.results}.items():
        losses = history.losses(entry, split).tolist()
        means: dict[str, Any] = {}
        if result.scores is not None:
            means = {
                t: {m: float(np.mean(c, dtype=np.float64)) for m, c in ms.items()} for t, ms in result.scores.items()
            }
        splits[split] = {
            "status": result.status,
            "reason": result.reason,
            "losses": {g: x if math.isfinite(x) else None for g, x in zip(history.goals, losses, strict=True)},
            "scores": means,
        }
    recipe = history.recipe(number)
    return {
        "id": number,
        "role": entry.role,
        "name": entry.name,
        "stage": entry.stage,
        "group": entry.group,
        "winner": number == history.winner_id,
        "recipe_id": recipe.id,
        "route": None if recipe.route is None else route_text(recipe, history.manifest),
        "recipe": recipe.to_json(),
        "splits": splits,
    }


def candidate_text(history: History, data: dict[str, Any]) -> str:
    """For people: scores as comments, then the recipe with its folders, ready for `evomerge merge`."""
    what = f"{data['role']} {data['name']}".strip() + (", the winner" if data["winner"] else "")
    lines = [f"# candidate {data['id']} ({what}), stage {data['stage']}, generation {data['group']}"]
    for split, s in data["splits"].items():
        if s["status"] != "ok":
            lines.append(f"# {split}: {s['status']} {s['reason']}")
            continue
        means = "  ".join(f"{t.name} {s['scores'][t.name][t.report_metric]:.3f}" for t in history.experiment.tasks)
        losses = "  ".join(f"{g} {x:.4f}" for g, x in s["losses"].items() if x is not None)
        prefix = "" if len(history.goals) == 1 else "losses: "
        lines.append(f"# {split:<7} {prefix}{losses}  {means}")
    if data["route"] is not None:
        lines.append(f"# route of {data['route']}")
    recipe = history.recipe(data["id"]).grouped().to_json()
    paths = history.source_paths()
    recipe["sources"] = {n: {**s, "path": str(paths[n])} for n, s in recipe.get("sources", {}).items()}
    return "\n".join(lines) + "\n" + dump_yaml(recipe).rstrip()
