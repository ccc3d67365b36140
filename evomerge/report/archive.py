"""The archive of a run whose fitness has measures: the best candidate of every cell, and how the cells were filled.

Any algorithm's run has one, and every candidate counts that was scored on the whole search split and keeps the
constraints: baselines and probes too, which the archive inside a search may lack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.config import fitness_of
from evomerge.errors import UserError
from evomerge.history import Entry, History
from evomerge.report.results import interval
from evomerge.search.archive import Archive, Cells, Grid


@dataclass(frozen=True)
class Elite:
    """Who is best in a cell, by its loss on the search split."""

    cell: int
    id: int
    loss: float
    measures: tuple[float, ...]


def has_archive(history: History) -> bool:
    """Whether there are measures to lay candidates out by, and one loss to choose by."""
    return bool(fitness_of(history.experiment).measures) and len(history.goals) == 1


def cells_of(history: History) -> Cells:
    """The cells of the run's last stage that keeps an archive; else the grid of the measures' own cells."""
    dimensions = fitness_of(history.experiment).dimensions
    for stage in reversed(history.experiment.stages):
        name, options = history.experiment.algorithm_of(stage)
        if name == "map-elites":
            cells: Cells = options.cells_of(dimensions)
            return cells
    return Grid(dimensions)


def elites(history: History) -> list[Elite]:
    """The elites in the order of the cells. Raises UserError where there can be none."""
    if not fitness_of(history.experiment).measures:
        raise UserError(f"{history.path}: its fitness has no measures to lay an archive out by")
    if len(history.goals) > 1:
        raise UserError(f"{history.path}: an archive is for one objective, the fitness has {len(history.goals)}")
    archive: Archive[Elite] = Archive(cells_of(history))
    for elite in _scored(history, archive.cells):
        if elite is not None:
            archive.add(np.array(elite.measures), elite.loss, elite)
    return [archive.elites[cell][1] for cell in sorted(archive.elites)]


def _scored(history: History, cells: Cells) -> Iterator[Elite | None]:
    """Every candidate with a result on the search split, in order; None for those that may be no elite."""
    objective = history.objectives.get("search")
    for e in history.entries.values():
        if "search" not in e.results:
            continue
        scores = e.scores("search")
        if objective is None or scores is None or objective.violation(scores) > 0.0:
            yield None
            continue
        measures = objective.measures(scores)
        yield Elite(cells.of(measures), e.id, history.loss(e, "search"), tuple(measures.tolist()))


def reference(history: History) -> float | None:
    """The worst loss of any baseline on the search split: what an elite's part of the QD score is counted from."""
    losses = [history.loss(e, "search") for e in history.baselines.values() if e.scores("search") is not None]
    return max(losses, default=None)


def growth(history: History, points: int = 100) -> list[tuple[int, int, float]]:
    """(candidates scored, cells filled, QD score), at most `points` of them; empty before the baselines are scored.

    The QD score (Pugh, Soros and Stanley 2016) sums over the filled cells by how much their elites' losses lie below
    the worst baseline's, where they do; so it never falls, and runs of one experiment compare.
    """
    worst = reference(history)
    if worst is None:
        return []
    best: dict[int, float] = {}
    score, curve = 0.0, []
    for n, elite in enumerate(_scored(history, cells_of(history)), 1):
        if elite is not None:
            known = best.get(elite.cell, np.inf)
            best[elite.cell] = min(known, elite.loss)
            score += max(worst - best[elite.cell], 0.0) - max(worst - known, 0.0)
        curve.append((n, len(best), score))
    at = np.unique(np.linspace(0, len(curve) - 1, min(points, len(curve))).astype(int))
    return [curve[i] for i in at]


def archive(history: History) -> dict[str, Any]:
    """Plain data: the measures, how full the archive is, and each cell's elite with scores on the search split."""
    found = elites(history)
    dimensions = fitness_of(history.experiment).dimensions
    total = cells_of(history).total
    curve = growth(history)
    rows = []
    for elite in found:
        entry = history.entry(elite.id)
        rows.append(
            {
                "cell": elite.cell,
                "id": elite.id,
                "role": entry.role,
                "name": entry.name,
                "winner": elite.id == history.winner_id,
                "loss": elite.loss,
                "measures": dict(zip((d.name for d in dimensions), elite.measures, strict=True)),
                "scores": _scores(history, entry),
            }
        )
    return {
        "measures": [{"name": d.name, "low": d.low, "high": d.high, "cells": d.cells} for d in dimensions],
        "cells": total,
        "filled": len(found),
        "coverage": len(found) / total,
        "qd_score": curve[-1][2] if curve else None,
        "reference": reference(history),
        "elites": rows,
    }


def _scores(history: History, entry: Entry) -> dict[str, Any]:
    """task -> mean with its interval on the search split."""
    found = entry.scores("search")
    assert found is not None
    return {
        t.name: dict(
            zip(("score", "low", "high"), interval(found[t.name][t.report_metric]), strict=True),
            metric=t.report_metric,
            n=len(found[t.name][t.report_metric]),
        )
        for t in history.experiment.tasks
    }


def archive_text(data: Mapping[str, Any]) -> str:
    """For people: one line a cell."""
    score = "" if data["qd_score"] is None else f", QD score {data['qd_score']:.3f}"
    lines = [
        f"{data['filled']} of {data['cells']} cells filled ({data['coverage']:.0%}){score}; the best of each by its "
        "loss on the search split, whose scores flatter it"
    ]
    for e in data["elites"]:
        measures = "  ".join(f"{name} {x:.3f}" for name, x in e["measures"].items())
        scores = "  ".join(f"{t} {s['score']:.3f} [{s['low']:.2f}, {s['high']:.2f}]" for t, s in e["scores"].items())
        who = f"{e['id']}{'*' if e['winner'] else ' '}{' ' + e['name'] if e['role'] == 'baseline' else ''}"
        lines.append(f"{who:>14}  loss {e['loss']:.4f}  |  {measures}  |  {scores}")
    if any(e["winner"] for e in data["elites"]):
        lines.append("* the winner; `evomerge show DIR ID` and `evomerge export DIR ID --to PATH` take any of these")
    else:
        lines.append("`evomerge show DIR ID` and `evomerge export DIR ID --to PATH` take any of these")
    return "\n".join(lines)
