"""The page of one run: verdict, scores, progress, coefficients, cost, and the commands that repeat it.

Reads what `History` reads, so it works on a live run as well. Its size is bounded: of a long run it shows every
improvement and every finalist, and an even selection of the other candidates.
"""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.config import AdaptiveItems, fitness_of
from evomerge.errors import UserError
from evomerge.files import replace_file
from evomerge.history import Entry, History
from evomerge.manifest import Manifest
from evomerge.pareto import Losses
from evomerge.proposal import Scores
from evomerge.recipe import Recipe
from evomerge.report import figures, html
from evomerge.report.archive import Elite, archive, cells_of, elites, growth, has_archive
from evomerge.report.coefficients import by_block, coefficient_maps, merged_blocks
from evomerge.report.front import front, progress
from evomerge.report.results import MEAN, Comparison, Results, Score, cells, comparable, p_text, results, spread
from evomerge.report.routes import route_figure, route_of, route_text
from evomerge.report.status import candidate, candidate_text, sampled_text, status_of
from evomerge.rundir import EXPERIMENT, TELEMETRY, read_telemetry
from evomerge.search.archive import Grid
from evomerge.tasks.base import SPLITS, Direction

NAME = "report.html"
BEST = "best so far"
MAX_POINTS = 4000
MAX_SCORES = 100_000
"""Scores in the details of candidates: with many tasks fewer candidates are shown."""
MAX_COEFFICIENTS = 120_000
MAX_HOPS = 20_000
MAX_RECIPES = 400
MAX_ANCESTORS = 300
MAX_TEXT = 200_000
"""Characters of a recipe's or experiment's YAML."""
MAX_PAIRS = 10
"""Pictures of two objectives each: those of five."""
MAX_ELITES = 200
"""Rows of the archive's table."""
RASTER = 100
"""Points along each side of the picture of a Voronoi archive."""
HOVERED_TASKS = 6
MAX_WORDS = 400
"""Characters of a route in a table."""


def write_page(history: History, target: Path | None = None) -> Path:
    """Write the page beside the journal, or to `target`. Raises RunError where it cannot be written."""
    target = target or history.path / NAME
    replace_file(target, run_page(history))
    return target


def run_page(history: History) -> str:
    """The whole document."""
    state = status_of(history)
    # Before the end only the search split has scores, and only the baselines are compared there.
    split = next((s for s in ("report", "select", "search") if results(history, s).table), "search")
    r = results(history, split)
    chosen = history.winner_id if history.winner_id is not None else state["best"]
    losses: dict[str, dict[int, Losses]] = {s: {} for s in SPLITS}
    for e in history.entries.values():
        for s in e.results:
            losses[s][e.id] = history.losses(e, s)
    sections = [
        html.section("", *_opening(history, r, state)),
        html.section("Scores", *_scores(history, r, split, chosen)),
        *([html.section("Front", *_front(history, losses["select"]))] if len(history.goals) > 1 else []),
        *([html.section("Archive", *_archive(history))] if has_archive(history) else []),
        html.section("Progress", *_progress(history, losses["search"], losses["select"], chosen)),
        *([html.section("Route", *route)] if (route := _route(history, chosen)) else []),
        html.section("Coefficients", *_coefficients(history, chosen)),
        html.section("Search, select, report", *_by_split(history)),
        html.section("Items", *_items(history, state)),
        html.section("Failures", *_failures(history)),
        html.section("Cost", *_cost(history, state)),
    ]
    if lineage := _lineage(history, losses["search"], chosen):
        sections.append(html.section("Lineage", *lineage))
    sections += [
        html.section("Recipe", *_recipe(history, chosen)),
        html.section("Commands", *_commands(history)),
        html.section("Experiment", *_experiment(history)),
    ]
    return html.page(f"{history.experiment.name}: evomerge run", sections)


# -- verdict and setting --------------------------------------------------------------------------------------


def _opening(history: History, r: Results, state: Mapping[str, Any]) -> list[str]:
    experiment = history.experiment
    parts = [html.lead(verdict(history, r, state))]
    if experiment.description:
        parts.append(html.text(experiment.description))
    parts += [html.warning(w) for w in _cautions(history, state)]
    algorithms = dict.fromkeys(experiment.algorithm_of(s)[0] for s in experiment.stages)
    budget = ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in state["budget"].items())
    tasks = [f"{t.name} ({t.metric})" for t in experiment.tasks]
    rows = [
        ("models", _models(history.manifest)),
        ("search space", _space(history)),
        ("search", f"{', '.join(algorithms)}, seed {experiment.search.seed}, budget {budget}"),
        ("tasks", f"{_listed(tasks)}; the metric that the search optimises in brackets"),
        ("precision", f"{history.dtype} on {state['numerics'].get('device', 'an unknown device')}"),
        ("when", _when(history)),
    ]
    return [*parts, html.facts([row for row in rows if row[1]])]


def verdict(history: History, r: Results, state: Mapping[str, Any]) -> str:
    """One sentence: the winner against the best baseline, or how far the run is."""
    if r.winner is None:
        best = "" if state["best"] is None else f"; best so far is candidate {state['best']}"
        if state["front"] is not None:
            best = f", {state['front']:,} of them and the baselines on the front so far"
        left = "" if state["seconds_left"] is None else f", about {_clock(state['seconds_left'])} to go"
        return (
            f"This run is not finished ({state['phase']}): {state['scored']:,} candidates are scored{left}{best}. "
            "There is no winner yet, and scores on the search split flatter what the search chose."
        )
    if len(history.goals) > 1:
        return _front_verdict(history)
    entry = history.entry(r.winner)
    if entry.role == "baseline":
        return f"The search found nothing better than {entry.name!r}, which was there before."
    name = f"The winner, candidate {r.winner},"
    means = {s.model: s for s in r.table if s.task == MEAN}
    rivals = {c.model: c for c in r.comparisons if c.task == MEAN}
    directions = {*_directions(history).values()}
    if len(directions) > 1 or not rivals:
        return f"{name} is compared with every baseline below; the tasks' metrics have no common unit."
    sign = 1.0 if directions == {"higher"} else -1.0
    best = max(rivals, key=lambda m: sign * means[m].score)
    c = rivals[best]
    if not math.isfinite(c.low) or not math.isfinite(c.high):
        result = "has too few items to be compared with"
    elif min(sign * c.low, sign * c.high) > 0:
        result = "beats"
    elif max(sign * c.low, sign * c.high) < 0:
        result = "is worse than"
    else:
        result = "is not told apart from"
    return (
        f"{name} {result} the best baseline, {best!r}: mean {c.metric} {_number(means['winner'].score)} against "
        f"{_number(means[best].score)} on the {c.split} split, a difference of {c.difference:+.3f} "
        f"(95% interval {c.low:+.3f} to {c.high:+.3f}, {p_text(c.p)})."
    )


def _front_verdict(history: History) -> str:
    """With several objectives: how large the front is, and what it leaves behind."""
    members, baselines = history.front, history.baselines
    at = {e.id: history.losses(e, "select") for e in (*baselines.values(), *map(history.entry, members))}
    beaten = [n for n, b in baselines.items() if any(_dominates(at[i], at[b.id]) for i in members)]
    kept = [n for n, b in baselines.items() if b.id in members]
    found = len(members) - len(kept)
    goals = _listed([repr(g) for g in history.goals])
    parts = [
        f"The front on the select split has {len(members)} {'member' if len(members) == 1 else 'members'}, of which "
        f"the search found {found}: candidates that no other finalist matches on all of {goals} "
        "and beats on one."
    ]
    if kept:
        parts.append(f"{_listed(kept)} {'was' if len(kept) == 1 else 'were'} there before.")
    if beaten:
        parts.append(f"It dominates {_listed(beaten)}.")
    first = history.entry(members[0])
    name = repr(first.name) if first.role == "baseline" else f"candidate {first.id}"
    parts.append(f"Nearest to the ideal point lies {name}, which the tables call the winner.")
    return " ".join(parts)


def _dominates(a: Losses, b: Losses) -> bool:
    return bool((a <= b).all() and (a < b).any())


def _cautions(history: History, state: Mapping[str, Any]) -> list[str]:
    out = []
    if history.winner_id is not None and state["phase"] != "finished":
        out.append(f"The run goes on ({state['phase']}); the winner is that of an earlier, smaller budget.")
    if history.looks > 1:
        out.append(
            f"The report split was looked at {history.looks} times, once for each budget: its scores are less "
            "of a surprise with every look."
        )
    failed = sum(state["failures"].values())
    if failed:
        out.append(f"{failed:,} evaluations failed; see Failures.")
    return out


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _models(manifest: Manifest) -> str:
    """Base and experts, and the sources of another depth, which only routes go through."""
    names = " and ".join(x for x in (manifest.base, _listed(manifest.experts)) if x)
    others = [f"{n} of {manifest.layers[n]} layers" for n in sorted(manifest.layouts)]
    deeper = f"; for routes also {_listed(others)}" if others else ""
    return f"{names}; {manifest.parameters:,} parameters each{deeper}"


def _space(history: History) -> str:
    out = []
    for stage, space in zip(history.experiment.stages, history.spaces, strict=True):
        axes = history.experiment.axes_of(stage, len(space.axes))
        out.append(axes if axes == "no axes" else f"{space.describe()['method']} with {len(space.axes):,} coefficients")
    return ", then ".join(out)


def _when(history: History) -> str:
    at = [t.get("at") for t in read_telemetry(history.path / TELEMETRY)]
    times = [float(t) for t in at if isinstance(t, int | float) and 0 < t < 1e11]
    if not times:
        return ""
    first, last = (datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d %H:%M") for t in (min(times), max(times)))
    return f"{first} to {last} UTC"


# -- scores ---------------------------------------------------------------------------------------------------


def _scores(history: History, r: Results, split: str, chosen: int | None) -> list[str]:
    if not r.table:
        return [html.text("Nothing is scored yet.")]
    rows, what = r.table, f"Means on the {split} split with 95% intervals over its items."
    if chosen is not None and r.winner is None and (scores := history.entry(chosen).scores(split)) is not None:
        rows = [*rows, *cells(history, BEST, scores, split)]
        what += f" {BEST!r} is candidate {chosen}, which was chosen by these very items: its scores flatter it."
    tasks = list(dict.fromkeys(s.task for s in rows))
    models = list(dict.fromkeys(s.model for s in rows))
    cell = {(s.model, s.task): s for s in rows}
    directions = _directions(history)
    style = figures.styles(models, "winner" if r.winner is not None else BEST)
    sized = {t: f"{t} (n={cell[models[0], t].n:,})" for t in tasks}
    parts = [html.note(what), _crossed("", models, sized, {k: _interval(s) for k, s in cell.items()})]
    for metric, own in _by_metric(rows, directions):
        marks = [figures.Mark(s.model, s.task, s.score, s.low, s.high, _interval(s)) for s in own]
        parts.append(html.figure(figures.intervals(marks, f"{metric} ({directions[metric]} is better)", style)))
    if r.comparisons:
        parts += [
            html.subheading("Winner minus each baseline, paired by item"),
            _crossed(
                "winner minus",
                list(dict.fromkeys(c.model for c in r.comparisons)),
                dict(zip(tasks, tasks, strict=True)),
                {(c.model, c.task): _difference(c) for c in r.comparisons},
            ),
        ]
        for metric, own in _by_metric(r.comparisons, directions):
            marks = [figures.Mark(c.model, c.task, c.difference, c.low, c.high, _difference(c)) for c in own]
            side = "right" if directions[metric] == "higher" else "left"
            title = f"difference in {metric} (the winner is better on the {side})"
            parts.append(html.figure(figures.intervals(marks, title, style, zero=True)))
        parts.append(
            html.note(
                "p-values: McNemar's exact test for right or wrong answers, a normal test else; they are not "
                "corrected for the number of comparisons."
            )
        )
    return parts


def _crossed(corner: str, models: Sequence[str], tasks: Mapping[str, str], cell: Mapping[tuple[str, str], str]) -> str:
    """A table with a row a model, or with a row a task where there are many of them."""
    if len(tasks) > max(8, len(models)):
        return html.table([corner, *models], [[title, *(cell[m, t] for m in models)] for t, title in tasks.items()])
    return html.table([corner, *tasks.values()], [[m, *(cell[m, t] for t in tasks)] for m in models])


def _by_metric(rows: Sequence[Any], directions: Mapping[str, Direction]) -> list[tuple[str, list[Any]]]:
    """Rows of one metric each have an axis of their own; a mean over different metrics stays in the table."""
    metrics = [m for m in dict.fromkeys(r.metric for r in rows) if m in directions]
    return [(m, [r for r in rows if r.metric == m]) for m in metrics]


def _directions(history: History) -> dict[str, Direction]:
    """Which way is good, of every metric that the tables show."""
    return {t.report_metric: t.directions[t.report_metric] for t in history.experiment.tasks}


def _interval(s: Score) -> str:
    return f"{_number(s.score)}{spread(s.low, s.high)}"


def _difference(c: Comparison) -> str:
    return f"{c.difference:+.3f}{spread(c.low, c.high, '+.2f')} {p_text(c.p)}".replace(" ", "\u00a0")


def _number(x: float) -> str:
    return f"{x:.3f}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {s:02d} s" if minutes else f"{s} s"


# -- several objectives ---------------------------------------------------------------------------------------


def _front(history: History, select: Mapping[int, Losses]) -> list[str]:
    """Finalists by their losses on the select split, the members' scores, and how the front grew."""
    parts: list[str] = []
    if history.front:
        ok = [history.entries[i] for i, x in sorted(select.items()) if np.isfinite(x).all()]
        points = [figures.Point(e.id, _kind(history, e), 0.0, _hover(history, e, "select")) for e in ok]
        pairs = list(combinations(range(len(history.goals)), 2))
        parts.append(
            html.note("All that was scored on the select split, by losses there: lower and further left is better.")
        )
        for a, b in pairs[:MAX_PAIRS]:
            at = {e.id: (float(select[e.id][a]), float(select[e.id][b])) for e in ok}
            titles = (f"loss of {history.goals[a]}", f"loss of {history.goals[b]}")
            line = history.front if len(history.goals) == 2 else ()
            parts.append(html.figure(figures.front(points, at, titles, line), details="candidates"))
        if len(pairs) > MAX_PAIRS:
            parts.append(html.note(f"Shown are {MAX_PAIRS} of {len(pairs)} pairs of objectives."))
        parts += _members(history)
    else:
        parts.append(html.text("The front is chosen on the select split when the run ends."))
    if curve := progress(history):
        parts += [
            html.subheading("How the front grew"),
            html.figure(figures.hypervolume(curve)),
            html.note(
                "The share of a box that the front so far dominates, on the search split: from the worst baseline's "
                "loss of every objective to the best of any candidate."
            ),
        ]
    return parts


def _members(history: History) -> list[str]:
    """The front's members in the order of the first objective, with scores on the report split."""
    data = front(history)
    tasks = [t.name for t in history.experiment.tasks]
    rows = []
    for m in data["members"]:
        entry = history.entry(m["id"])
        scores = m["scores"].get("report", m["scores"]["select"])
        cell = [f"{_number(s['score'])} [{s['low']:.2f}, {s['high']:.2f}]" for s in (scores[t] for t in tasks)]
        name = f"{m['id']} {entry.name}".strip() + (", the winner" if m["winner"] else "")
        rows.append([name, *(_number(x) for x in m["losses"].values()), *cell])
    titles = [f"loss of {g}" for g in data["objectives"]]
    routes = [m["route"] for m in data["members"]]
    if any(routes):
        tasks.append("route")
        rows = [[*row, figures.clipped(route or "", MAX_WORDS)] for row, route in zip(rows, routes, strict=True)]
    return [
        html.subheading("Members of the front"),
        html.table(["candidate", *titles, *tasks], rows),
        html.note("Losses on the select split, scores with 95% intervals on the report split where they are there."),
    ]


# -- the archive ----------------------------------------------------------------------------------------------


def _archive(history: History) -> list[str]:
    """Who is best in every cell: a picture for two measures, a table for others; and how the cells were filled."""
    data = archive(history)
    if not data["elites"]:
        return [html.text("No cell is filled yet.")]
    score = "" if data["qd_score"] is None else f"; QD score {_number(data['qd_score'])}"
    parts = [html.text(f"{data['filled']:,} of {data['cells']:,} cells are filled ({data['coverage']:.0%}){score}.")]
    if len(data["measures"]) == 2:
        parts += [
            html.note(
                "The best candidate of every cell by its loss on the search split; dark is better. The same scores "
                "chose it, so they flatter it. A click on a cell shows its candidate below Progress, with the command "
                "that exports it."
            ),
            html.figure(_archive_map(history), details="candidates"),
        ]
    else:
        parts += _elites(data)
    if curve := growth(history):
        parts += [
            html.subheading("How the archive was filled"),
            html.figure(figures.filling(curve, data["cells"])),
            html.note(
                "QD score: by how much the elites' losses lie below the worst baseline's, summed over the cells; those "
                "above it add nothing. Coverage: the share of the cells that have an elite."
            ),
        ]
    return parts


def _archive_map(history: History) -> figures.Figure:
    first, second = fitness_of(history.experiment).dimensions
    cells, found = cells_of(history), {e.cell: e for e in elites(history)}
    grid = isinstance(cells, Grid)
    columns, rows = (first.cells, second.cells) if grid else (RASTER, RASTER)
    x, y = np.linspace(first.low, first.high, columns + 1), np.linspace(second.low, second.high, rows + 1)
    tile = {c: figures.Tile(e.id, e.loss, _elite_hover(history, e)) for c, e in found.items()}
    middles = [(x[:-1] + x[1:]) / 2, (y[:-1] + y[1:]) / 2]
    tiles = [[tile.get(cells.of(np.array([a, b]))) for a in middles[0]] for b in middles[1]]
    at = {
        e.id: (min(max(e.measures[0], first.low), first.high), min(max(e.measures[1], second.low), second.high))
        for e in found.values()
    }
    titles = (_measured(history, 0), _measured(history, 1), "loss")
    chosen = None if history.winner_id is None else at.get(history.winner_id)
    return figures.archive((x.tolist(), y.tolist()), tiles, titles, chosen, [] if grid else list(at.values()))


def _measured(history: History, n: int) -> str:
    """A measure's name with what it is of."""
    fitness = fitness_of(history.experiment)
    measure = fitness.measures[n]
    if measure.kind != "weighted_mean":
        return f"{measure.name} ({measure.kind.replace('_', ' ')})"
    metrics = dict.fromkeys(measure.metric or t.metric for t, _ in fitness.weights_of(measure))
    return f"{measure.name} ({', '.join(metrics)})"


def _elite_hover(history: History, e: Elite) -> list[str]:
    names = [d.name for d in fitness_of(history.experiment).dimensions]
    measured = ", ".join(f"{n} {x:.4g}" for n, x in zip(names, e.measures, strict=True))
    return [f"loss {e.loss:.4f} at {measured}", *_hover(history, history.entry(e.id), "search")]


def _elites(data: Mapping[str, Any]) -> list[str]:
    best = sorted(data["elites"], key=lambda e: (e["loss"], e["cell"]))
    rows = []
    for e in best[:MAX_ELITES]:
        scores = [f"{_number(s['score'])} [{s['low']:.2f}, {s['high']:.2f}]" for s in e["scores"].values()]
        name = f"{e['id']} {e['name']}".strip() + (", the winner" if e["winner"] else "")
        rows.append([name, _number(e["loss"]), *(_number(x) for x in e["measures"].values()), *scores])
    titles = ["candidate", "loss", *(m["name"] for m in data["measures"]), *(f"{t}, search" for t in best[0]["scores"])]
    more = f" Shown are the best {MAX_ELITES:,} of {len(best):,}." if len(best) > MAX_ELITES else ""
    note = "The best candidate of every filled cell, best first. Its scores chose it, so they flatter it."
    return [html.table(titles, rows), html.note(note + more)]


# -- progress -------------------------------------------------------------------------------------------------


def _progress(
    history: History, losses: Mapping[int, Losses], select: Mapping[int, Losses], chosen: int | None
) -> list[str]:
    """Losses on the search split by candidate, +inf where it failed; those not scored there yet are missing."""
    scored = [history.entries[i] for i in sorted(losses)]
    if not scored:
        return [html.text("No candidate is scored yet.")]
    improvements = [_improvements(scored, losses, j) for j in range(len(history.goals))]
    best = {e.id for e in elites(history)} if has_archive(history) else set()
    shown = _selection(history, scored, best.union(i for own in improvements for i, _ in own))
    kinds = {e.id: _kind(history, e) for e in shown}
    hovers = {e.id: _hover(history, e, "search") for e in shown}
    stages = [(next(stage).id, f"stage {n}") for n, stage in groupby(_searched(scored), key=lambda e: e.stage)]
    parts, notes = [], []
    for j, title in enumerate(_loss_titles(history)):
        points = [figures.Point(e.id, kinds[e.id], float(losses[e.id][j]), hovers[e.id]) for e in shown]
        figure = figures.progress(
            points,
            improvements[j],
            stages if len(history.experiment.stages) > 1 else [],
            f"{title} on the search split",
        )
        parts.append(html.figure(figure, details="candidates"))
        _, top = figure["layout"]["yaxis"]["range"] or (0.0, math.inf)
        if above := sum(top < p.loss < math.inf for p in points):
            of = f" of the {title}" if len(history.goals) > 1 else ""
            notes.append(f"{above:,} of the shown candidates lie above the view{of}; a double click shows them.")
    parts.append(_details(history, shown, losses, select, chosen))
    if len(shown) < len(scored):
        notes.append(f"Shown are {len(shown):,} of {len(scored):,} candidates: all improvements, the others evenly.")
    return [*parts, html.note(" ".join(notes))] if notes else parts


def _searched(scored: Iterable[Entry]) -> Iterable[Entry]:
    return (e for e in scored if e.role in ("search", "mean"))


def _loss_titles(history: History) -> list[str]:
    """What the losses are called, in their order."""
    return ["loss"] if len(history.goals) == 1 else [f"loss of {g}" for g in history.goals]


def _improvements(scored: Iterable[Entry], losses: Mapping[int, Losses], goal: int) -> list[tuple[int, float]]:
    """(id, loss) of each candidate of the search that was better than all before, by one objective."""
    out: list[tuple[int, float]] = []
    for e in scored:
        loss = float(losses[e.id][goal])
        if e.role != "baseline" and loss < (out[-1][1] if out else math.inf):
            out.append((e.id, loss))
    return out


def _selection(history: History, scored: Sequence[Entry], wanted: set[int]) -> list[Entry]:
    """All candidates, or of a long run those that matter and an even selection of the others."""
    room = min(MAX_POINTS, max(500, MAX_SCORES // len(history.experiment.tasks)))
    if len(scored) <= room:
        return list(scored)
    named = {e.id for e in scored if e.role in ("baseline", "given", "mean") or "select" in e.results}
    keep = [e for e in scored if e.id in named][:room] + [e for e in scored if e.id in wanted - named]
    keep = keep[:room]
    kept = {e.id for e in keep}
    others = [e for e in scored if e.id not in kept]
    picked = np.linspace(0, len(others) - 1, room - len(keep)).astype(int)
    return sorted([*keep, *(others[i] for i in dict.fromkeys(picked.tolist()))], key=lambda e: e.id)


def _kind(history: History, e: Entry) -> str:
    if e.id == history.winner_id:
        return "winner"
    if e.role in ("baseline", "given"):
        return e.role
    if len(history.goals) > 1 and e.id in history.front:
        return "front"
    if e.role == "mean":
        return "stage's mean"
    if e.name == "probe":
        return "probe"
    return "finalist" if "select" in e.results else "candidate"


def _hover(history: History, e: Entry, split: str) -> list[str]:
    what = " ".join(x for x in (e.role, e.name) if x)
    at = f", stage {e.stage}, generation {e.group}" if e.stage >= 0 else ""
    result = e.results[split]
    if result.scores is None:
        return [what + at, f"{result.status} {result.reason[:80]}".strip()]
    means = _means(history, result.scores)
    more = len(means) - HOVERED_TASKS
    lines = [f"{t}: {_number(x)}" for t, x in list(means.items())[:HOVERED_TASKS]]
    return [what + at, *lines, *([f"and {more} more tasks"] if more > 0 else [])]


def _means(history: History, scores: Scores) -> dict[str, float]:
    """`task metric` -> mean score."""
    tasks = history.experiment.tasks
    return {f"{t.name} {t.report_metric}": float(np.mean(scores[t.name][t.report_metric])) for t in tasks}


def _details(
    history: History,
    shown: Sequence[Entry],
    losses: Mapping[int, Losses],
    select: Mapping[int, Losses],
    chosen: int | None,
) -> str:
    tasks = [f"{t.name} {t.report_metric}, search" for t in history.experiment.tasks]
    titles = [f"{t} on {split}" for split in ("search", "select") for t in _loss_titles(history)]
    fields = ["what", "stage", "generation", "parents", *titles, "result", *tasks]
    missing = [None] * len(history.goals)
    rows = {}
    for e in shown:
        result = e.results["search"]
        means = [] if result.scores is None else [_number(x) for x in _means(history, result.scores).values()]
        rows[str(e.id)] = [
            _kind(history, e) + (f" {e.name}" if e.role == "baseline" else ""),
            e.stage if e.stage >= 0 else None,
            e.group if e.stage >= 0 else None,
            ", ".join(map(str, e.parents[:20])) or None,
            *map(_loss, losses[e.id]),
            *map(_loss, select.get(e.id, missing)),
            None if result.ok else f"{result.status} {result.reason[:200]}",
            *means,
        ]
    commands = [f"evomerge show {_at(history)} {{}}", f"evomerge export {_at(history)} {{}} --to candidate-{{}}"]
    recipes = _recipes(history, _first(shown, losses, chosen))
    maps = coefficient_maps(recipes, history.manifest)
    pictures = [
        (m.figure(), {str(i): [_short(x) for row in z for x in row] for i, z in m.values.items()})
        for m in maps
        if m.constant is None
    ]
    return html.details("candidates", fields, rows, commands, pictures, _routes(recipes, history.manifest))


def _routes(recipes: Mapping[int, Recipe], manifest: Manifest) -> dict[str, figures.Figure]:
    """Pictures of the first routes by number, as many as there is room for their hops."""
    out: dict[str, figures.Figure] = {}
    room = MAX_HOPS
    for i, recipe in recipes.items():
        if recipe.route is None:
            continue
        room -= 30 + len(recipe.route.hops)  # a figure without hops takes the room of some thirty
        if room < 0:
            break
        out[str(i)] = route_figure(recipe, manifest)
    return out


def _recipes(history: History, wanted: Sequence[Entry]) -> dict[int, Recipe]:
    """The recipes of the first candidates, as many as there is room for their coefficients."""
    out: dict[int, Recipe] = {}
    room = MAX_COEFFICIENTS
    for e in wanted[:MAX_RECIPES]:
        try:
            recipe = by_block(history.recipe(e.id), history.manifest)
        except UserError:  # a run that accepted drift; the chosen one's section says why
            continue
        room -= sum(len(c) for r in recipe.blocks.values() for c in (r.params, *r.sources.values()))
        if room < 0:
            break
        out[e.id] = recipe
    return out


def _first(shown: Sequence[Entry], losses: Mapping[int, Losses], chosen: int | None) -> list[Entry]:
    """Candidates in the order in which their coefficients are worth their room: chosen, finalists, then by loss."""
    return sorted(shown, key=lambda e: (e.id != chosen, "select" not in e.results, float(losses[e.id].sum()), e.id))


def _loss(x: float | None) -> str | None:
    return None if x is None else f"{x:.5f}" if math.isfinite(x) else "failed"


def _short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.3g}")


# -- route ----------------------------------------------------------------------------------------------------


def _route(history: History, chosen: int | None) -> list[str]:
    """The chosen candidate's path through layers; nothing where it has none."""
    if chosen is None or route_of(history, chosen) is None:
        return []
    recipe = history.recipe(chosen)
    note = (
        f"{_who(history, chosen)}: which layer of which source its tokens go through at every hop. The dotted line is "
        "a model as it is, layer by layer; a ring marks a layer that the path has gone through before, a faint mark "
        "one that it passes by. A scale multiplies what enters a hop; gains multiply what the hop's attention and mlp "
        "add. Hovering shows what both amount to in effect, which is also what an export has in its weights."
    )
    return [
        html.note(note),
        html.figure(route_figure(recipe, history.manifest)),
        html.text(f"{route_text(recipe, history.manifest)}."),
    ]


# -- coefficients ---------------------------------------------------------------------------------------------


def _coefficients(history: History, chosen: int | None) -> list[str]:
    if chosen is None:
        return [html.text("No candidate is scored yet.")]
    try:
        recipe = history.recipe(chosen)
    except UserError as e:
        return [html.warning(str(e))]
    if not merged_blocks(recipe, history.manifest):
        return [html.text(f"The route of candidate {chosen} goes through no merged layer: it has no coefficients.")]
    if recipe.segments is None and not recipe.blocks:
        return [html.text(f"Candidate {chosen} is the base: it has no coefficients.")]
    if recipe.segments is not None:
        method = f"linear mixes of {len(recipe.segments.cuts)} segments, of which blocks show their mean weights"
    else:
        method = ", ".join(sorted({r.method for r in recipe.blocks.values()}))
    parts = [
        html.note(
            f"{_who(history, chosen)}, merged by {method}. Neighbouring blocks with the same coefficients share a "
            "column; a gap means that the block has no such coefficient."
        )
    ]
    if recipe.route is not None:
        parts.append(html.note("Of the layers, there are those that its route goes through as 'merged'."))
    maps = coefficient_maps({chosen: recipe}, history.manifest)
    parts += [html.figure(m.figure(chosen)) for m in maps if m.constant is None]
    return parts + [html.text(f"{m.name} is {m.constant:g} everywhere.") for m in maps if m.constant is not None]


def _who(history: History, chosen: int) -> str:
    return f"Candidate {chosen}, {'the winner' if chosen == history.winner_id else 'the best on search so far'}"


# -- the optimism gap -----------------------------------------------------------------------------------------


def _by_split(history: History) -> list[str]:
    """Means from split to split: what the search chose by its scores loses some on items that it has not seen."""
    models: dict[str, Entry] = dict(history.baselines)
    if history.winner_id is not None:
        models["winner"] = history.entry(history.winner_id)
    splits = [s for s in SPLITS if any(s in e.results for e in models.values())]
    if len(splits) < 2:
        return [html.text("Only the search split is scored so far.")]
    if not comparable(history):
        return [html.text("The tasks' metrics have different units, so there is no mean to follow between splits.")]
    marks: dict[str, list[figures.Mark | None]] = {}
    for name, e in models.items():
        means = [None if (x := e.scores(s)) is None else cells(history, name, x, s)[-1] for s in splits]
        marks[name] = [
            None if m is None else figures.Mark(name, MEAN, m.score, m.low, m.high, _interval(m)) for m in means
        ]
    metric = "+".join(sorted({t.report_metric for t in history.experiment.tasks}))
    note = (
        "The search chose among candidates by the search split, the winner was chosen among finalists by the select "
        "split, and nothing was chosen by the report split: only its scores are unbiased. Baselines were not chosen, "
        "so they show how much the splits differ by themselves."
    )
    rows = []
    for name, own in marks.items():
        score = {s: m for s, m in zip(splits, own, strict=True) if m is not None}
        gap = score["search"].value - score["report"].value if {"search", "report"} <= set(score) else None
        rows.append([name, *(m.hover if m else "" for m in own), "" if gap is None else f"{gap:+.3f}"])
    return [
        html.note(note),
        html.figure(figures.by_split(splits, marks, f"mean {metric}", figures.styles(list(models), "winner"))),
        html.table(["model", *splits, "search minus report"], rows),
    ]


# -- work -----------------------------------------------------------------------------------------------------


def _items(history: History, state: Mapping[str, Any]) -> list[str]:
    splits = [s for s in SPLITS if s in history.item_ids]
    sizes = {s: {t: len(ids) for t, ids in history.item_ids[s].items()} for s in splits}
    done = {
        s: sum(s in e.results or (s == "search" and bool(e.samples)) for e in history.entries.values()) for s in splits
    }
    rows = [[t.name, *(f"{sizes[s].get(t.name, 0):,}" for s in splits)] for t in history.experiment.tasks]
    totals = {s: sum(sizes[s].values()) for s in splits}
    rows += [
        ["all tasks", *(f"{totals[s]:,}" for s in splits)],
        ["candidates scored", *(f"{done[s]:,}" for s in splits)],
        ["item evaluations", *(f"{history.evaluated[s]:,}" for s in splits)],
    ]
    text = f"{state['items']:,} item evaluations in all."
    if history.cached:
        text += f" {history.cached:,} candidates were answered from earlier scores, without an evaluation."
    parts = [html.table(["items", *splits], rows), html.text(text)]
    if state["sampled"] is None:
        return parts
    line = sampled_text(state["sampled"])
    note = (
        "The split-half rank correlation says how far two halves of a generation's items agree on the order of its "
        "members: near 0 the search learns from noise. Losses on samples compare within their generation only, so "
        "the progress above shows those candidates alone that were scored on all items."
    )
    spec = history.experiment.search.items
    threshold = spec.threshold if isinstance(spec, AdaptiveItems) else None
    figure = figures.samples([(g.stage, g.items[0], g.correlation) for g in history.generations], threshold)
    return [*parts, html.text(f"{line[0].upper()}{line[1:]}."), html.figure(figure), html.note(note)]


def _failures(history: History) -> list[str]:
    failed = [(r, s, e.id) for e in history.entries.values() for s, r in e.results.items() if not r.ok]
    if not failed:
        return [html.text("No evaluation failed.")]
    kinds = Counter((r.status, r.reason[:200], s) for r, s, _ in failed)
    rows = []
    for (status, reason, split), n in kinds.most_common(20):
        ids = [i for r, s, i in failed if (r.status, r.reason[:200], s) == (status, reason, split)]
        rows.append([status, reason, split, f"{n:,}", _listed([str(i) for i in ids], 6)])
    more = [html.note(f"and {len(kinds) - 20} other reasons")] if len(kinds) > 20 else []
    return [html.table(["status", "reason", "split", "times", "candidates"], rows), *more]


def _cost(history: History, state: Mapping[str, Any]) -> list[str]:
    lines = [t for t in read_telemetry(history.path / TELEMETRY) if "proposal" in t]
    if not lines:
        return [html.text("There is no telemetry of this run.")]
    wall = float(state["run_seconds"])
    build, score = (sum(float(t[k]) for t in lines) for k in ("build_seconds", "score_seconds"))
    busy = build + score
    shares = f", of which {build / busy:.1%} building and {score / busy:.1%} scoring" if busy > 0 else ""
    pace = f", {60 * len(lines) / wall:,.1f} a minute" if wall > 0 else ""
    rows = [
        ("wall time", _clock(wall)),
        ("worker time", _clock(busy) + shares),
        ("evaluations", f"{len(lines):,}{pace}"),
        ("peak memory of a worker", f"{state['peak_mb']:,.0f} MiB"),
        ("attempts lost with a worker", f"{sum(int(t['attempts']) - 1 for t in lines):,}"),
    ]
    workers = [
        [
            w["worker"] or "inline",
            w["device"],
            f"{w['evaluations']:,}",
            f"{w['seconds_each']:.3f} s",
            "" if w["idle"] is None else f"{w['idle']:.0%}",
        ]
        for w in state["workers"]
    ]
    header = ["worker", "device", "evaluations", "median seconds each", "idle"]
    note = "From the run's telemetry, which may lack what a killed run did last; earlier sittings are included."
    return [html.facts(rows), html.table(header, workers), html.note(note)]


# -- lineage --------------------------------------------------------------------------------------------------


def _lineage(history: History, losses: Mapping[int, Losses], chosen: int | None) -> list[str]:
    """The chosen candidate's ancestors, where the search says who the parents were."""
    if chosen is None or not history.entry(chosen).parents:
        return []
    edges: list[tuple[int, int]] = []
    todo, seen = [chosen], {chosen}
    while todo and len(seen) < MAX_ANCESTORS:
        child = todo.pop(0)  # the nearest first
        for parent in history.entry(child).parents:
            if parent in history.entries:
                edges.append((parent, child))
                if parent not in seen:
                    seen.add(parent)
                    todo.append(parent)
    title = f"{_loss_titles(history)[0]} on the search split"
    nodes = [(i, float(losses[i][0])) for i in sorted(seen) if i in losses and np.isfinite(losses[i]).all()]
    parts = [
        html.note(f"{_who(history, chosen)}, with {len(seen) - 1} ancestors, by their {title}."),
        html.figure(figures.ancestry(nodes, edges, chosen, title), details="candidates"),
    ]
    if todo:
        parts.append(html.note(f"Only the nearest {MAX_ANCESTORS} are shown."))
    return parts


# -- to repeat it ---------------------------------------------------------------------------------------------


def _recipe(history: History, chosen: int | None) -> list[str]:
    if chosen is None:
        return [html.text("No candidate is scored yet.")]
    try:
        text = candidate_text(history, candidate(history, chosen))
    except UserError as e:
        return [html.warning(str(e))]
    return [html.note(f"{_who(history, chosen)}. `evomerge merge` builds this file."), *_bounded(text)]


def _commands(history: History) -> list[str]:
    at, search = _at(history), history.experiment.search
    commands = [f"evomerge run {_at(history, EXPERIMENT)} --out {_at(history)}-again   # the same search again"]
    if history.stopped:
        (kind, size), *_ = search.budget.model_dump(exclude_none=True).items()
        commands.append(f"evomerge resume {at} --set search.budget.{kind}={2 * size}   # go on with a larger budget")
    else:
        commands.append(f"evomerge resume {at}   # go on where it stopped")
    if history.winner_id is not None:
        name = shlex.quote(f"{history.experiment.name}-winner")
        commands += [
            f"evomerge show {at}   # the winner's recipe and scores",
            f"evomerge export {at} --to {name}   # the winner as a checkpoint",
            f"evomerge verify {name}   # rebuild it, compare tensors and scores",
        ]
    if len(history.goals) > 1 and history.front:
        commands.append(
            f"evomerge front {at} --knee   # another member of the front, also by --prefer or --best --where"
        )
    if has_archive(history):
        commands.append(f"evomerge archive {at}   # the best candidate of every cell")
    commands += [f"evomerge report {at}   # this page again, and the table", f"evomerge status {at}"]
    parts = [html.code("\n".join(commands))]
    if not history.path.is_absolute():
        parts.append(html.note(f"Paths are relative to {os.getcwd()}."))
    numerics = {"evomerge": version("evomerge"), **history.facts["numerics"]}
    rows = [(str(k), figures.clipped(str(v), 120)) for k, v in numerics.items()]
    rows.append(("experiment", str(history.facts["experiment_id"])))
    return [
        *parts,
        html.note("Scores repeat to the last bit on the same software and hardware:"),
        html.facts(rows),
    ]


def _experiment(history: History) -> list[str]:
    note = "As it was run: defaults that matter filled in, library entries written out, paths absolute."
    return [html.note(note), *_bounded((history.path / EXPERIMENT).read_text(encoding="utf-8"))]


def _bounded(content: str) -> list[str]:
    if len(content) <= MAX_TEXT:
        return [html.code(content)]
    return [html.code(content[:MAX_TEXT]), html.warning(f"Only the first {MAX_TEXT:,} characters are shown.")]


def _at(history: History, *parts: str) -> str:
    return shlex.quote(str(history.path.joinpath(*parts)))
