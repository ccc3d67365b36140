"""Plain plotly figures of a run from plain data; `html.figure` puts them into a page.

Colours: Okabe and Ito's palette, which readers with any colour vision tell apart; marks differ in shape too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINNER = "#D55E00"
GREY = "#8A939C"
PALETTE = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B6BB1", "#7A6A4F", "#B8A900")
SYMBOLS = ("square", "diamond", "triangle-up", "triangle-down", "cross", "pentagon", "hexagon", "star-diamond")
DIVERGING = [
    [0.0, "#2166AC"],
    [0.25, "#92C5DE"],
    [0.5, "#F7F7F7"],
    [0.75, "#F4A582"],
    [1.0, "#B2182B"],
]
"""ColorBrewer's RdBu: negative blue, 0 near white, positive red."""
SEQUENTIAL = [[0.0, "#F7FBFF"], [0.5, "#6BAED6"], [1.0, "#08306B"]]

Figure = dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """One estimate with its interval."""

    model: str
    task: str
    value: float
    low: float
    high: float
    hover: str = ""


def styles(models: Sequence[str], chosen: str) -> dict[str, tuple[str, str]]:
    """Colour and symbol by model: `chosen` in vermilion, the first (the base) grey, the others by the palette."""
    out = {chosen: (WINNER, "circle")}
    for i, model in enumerate(m for m in models if m != chosen):
        j = (i - 1) % len(PALETTE)
        # Beyond eight models the colours repeat with other symbols.
        symbol = SYMBOLS[(j + 3 * ((i - 1) // len(PALETTE))) % len(SYMBOLS)]
        out[model] = (PALETTE[j], symbol) if i else (GREY, "circle")
    return out


def intervals(marks: Sequence[Mark], title: str, style: Mapping[str, tuple[str, str]], *, zero: bool = False) -> Figure:
    """Estimates with intervals, tasks below each other, one row a model; `zero` draws the line of no difference."""
    models, tasks = list(dict.fromkeys(m.model for m in marks)), list(dict.fromkeys(m.task for m in marks))
    group = len(models) + 1
    row = {(m, t): i * group + j for i, t in enumerate(tasks) for j, m in enumerate(models)}
    pitch = min(15.0, max(6.0, 2000 / (group * len(tasks))))
    size = min(9.0, pitch * 0.8)
    data = []
    for model in models:
        mine = [m for m in marks if m.model == model]
        colour, symbol = style[model]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": clipped(model),
                "x": [m.value for m in mine],
                "y": [row[m.model, m.task] for m in mine],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [m.high - m.value for m in mine],
                    "arrayminus": [m.value - m.low for m in mine],
                    "thickness": 2.5 if colour == WINNER else 1.5,
                    "width": 0,
                },
                "marker": {"color": colour, "symbol": symbol, "size": size + (2 if colour == WINNER else 0)},
                "customdata": [[model, m.task, m.hover] for m in mine],
                "hovertemplate": "<b>%{customdata[0]}</b>, %{customdata[1]}<br>%{customdata[2]}<extra></extra>",
            }
        )
    middle = (len(models) - 1) / 2
    lines = [_line("y", i * group - 1) for i in range(1, len(tasks))]
    return {
        "data": data,
        "layout": {
            "height": round(pitch * group * len(tasks)) + 60 + 30 * legend_rows(models) + 40,
            "xaxis": {"title": {"text": title}, "zeroline": zero, "zerolinewidth": 2},
            "yaxis": {
                "tickvals": [i * group + middle for i in range(len(tasks))],
                "ticktext": [clipped(t, 28) for t in tasks],
                "range": [group * len(tasks) - 0.5, -1.5],
                "showgrid": False,
                "zeroline": False,
            },
            "shapes": lines,
            "showlegend": True,
            "legend": {"itemsizing": "constant"},
            "margin": {"t": 20},
        },
    }


def legend_rows(models: Sequence[str]) -> int:
    """Lines that a legend of these names takes on a page of the usual width."""
    return 1 + sum(len(clipped(m)) + 6 for m in models) // 110


def _line(axis: str, at: float) -> Figure:
    across = "x" if axis == "y" else "y"
    style = {"color": GREY, "width": 0.6, "dash": "dot"}
    return {
        "type": "line",
        "layer": "below",
        f"{axis}0": at,
        f"{axis}1": at,
        f"{across}ref": "paper",
        f"{across}0": 0,
        f"{across}1": 1,
        "line": style,
    }


@dataclass(frozen=True)
class Point:
    """One candidate in the picture of progress; a loss that is not finite marks a failure."""

    id: int
    kind: str
    loss: float
    hover: Sequence[str] = ()


KINDS: Mapping[str, tuple[str, str, float, float]] = {
    "candidate": ("#56B4E9", "circle", 6, 0.55),
    "finalist": ("#0072B2", "circle-open", 9, 1.0),
    "front": ("#0072B2", "circle", 9, 1.0),
    "probe": ("#009E73", "diamond", 8, 0.9),
    "stage's mean": ("#E69F00", "square", 8, 0.9),
    "given": ("#CC79A7", "triangle-up", 9, 0.9),
    "baseline": (GREY, "diamond-open", 9, 1.0),
    "winner": (WINNER, "star", 15, 1.0),
}
"""Colour, symbol, size and opacity by kind of point, in the order of drawing."""


def samples(generations: Sequence[tuple[int, int, float]], threshold: float | None) -> Figure:
    """Items by generation (stage, items, split-half rank correlation), the correlation below on an axis of its own."""
    x = list(range(1, len(generations) + 1))
    items, rho = [n for _, n, _ in generations], [r if math.isfinite(r) else None for _, _, r in generations]
    hover = [[f"stage {stage + 1}"] for stage, _, _ in generations]
    template = "generation %{x}, %{customdata[0]}<br>%{y}<extra></extra>"
    common = {"type": "scatter", "mode": "lines+markers", "x": x, "customdata": hover, "hovertemplate": template}
    data = [
        {**common, "name": "items", "y": items, "line": {"color": PALETTE[0], "shape": "hv"}},
        {**common, "name": "split-half rank correlation", "y": rho, "yaxis": "y2", "line": {"color": PALETTE[1]}},
    ]
    level = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y2", "y0": threshold, "y1": threshold}
    line = {"color": GREY, "width": 1, "dash": "dot"}
    return {
        "data": data,
        "layout": {
            "height": 380,
            "xaxis": {"title": {"text": "generation"}, "anchor": "y2"},
            "yaxis": {"title": {"text": "items"}, "domain": [0.54, 1], "rangemode": "tozero"},
            "yaxis2": {"title": {"text": "correlation"}, "domain": [0, 0.46], "range": [-1.05, 1.05]},
            "shapes": [] if threshold is None else [{**level, "line": line}],
            "showlegend": True,
        },
    }


def _marks(
    name: str, points: Sequence[Point], x: Sequence[float], y: Sequence[float], marker: Figure, **more: Any
) -> Figure:
    """Candidates as marks that a click opens."""
    lines = max((len(p.hover) for p in points), default=0)
    # Hovers come from the run, so their lines are data, and the breaks between them are the template's.
    template = "<b>candidate %{customdata[0]}</b>" + "".join(f"<br>%{{customdata[{i + 1}]}}" for i in range(lines))
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "customdata": [[p.id, *p.hover, *[""] * (lines - len(p.hover))] for p in points],
        "hovertemplate": template + "<extra></extra>",
        "marker": marker,
        **more,
    }


def _by_kind(points: Sequence[Point]) -> list[tuple[str, list[Point], Figure]]:
    """Kind, its points and their marker, for the kinds that there are, in the order of drawing."""
    out = []
    for kind, (colour, symbol, size, opacity) in KINDS.items():
        if some := [p for p in points if p.kind == kind]:
            out.append((kind, some, {"color": colour, "symbol": symbol, "size": size, "opacity": opacity}))
    return out


def front(
    points: Sequence[Point], at: Mapping[int, tuple[float, float]], titles: tuple[str, str], line: Sequence[int] = ()
) -> Figure:
    """Candidates by two of their losses, `at` by number; `line` are the members of a front between which to step."""
    data = [
        _marks(k, some, [at[p.id][0] for p in some], [at[p.id][1] for p in some], m) for k, some, m in _by_kind(points)
    ]
    if line:
        ordered = sorted(at[i] for i in line)
        data.insert(
            0,
            {
                "type": "scatter",
                "mode": "lines",
                "name": "dominated beyond",
                "x": [x for x, _ in ordered],
                "y": [y for _, y in ordered],
                "line": {"color": GREY, "width": 1, "dash": "dot", "shape": "hv"},
                "hoverinfo": "skip",
            },
        )
    return {
        "data": data,
        "layout": {
            "height": 440,
            "xaxis": {"title": {"text": titles[0]}, "zeroline": False},
            "yaxis": {"title": {"text": titles[1]}, "zeroline": False},
            "showlegend": True,
            "margin": {"t": 40},
        },
    }


def hypervolume(curve: Sequence[tuple[int, float]]) -> Figure:
    """The share of the box that the front so far dominates, by how many candidates were scored."""
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [n for n, _ in curve],
                "y": [v for _, v in curve],
                "line": {"color": "#0072B2", "width": 2},
                "marker": {"size": 5},
                "hovertemplate": "after %{x} candidates: %{y:.4f}<extra></extra>",
            }
        ],
        "layout": {
            "height": 300,
            "xaxis": {"title": {"text": "candidates scored"}, "zeroline": False},
            "yaxis": {"title": {"text": "hypervolume on the search split"}, "rangemode": "tozero"},
            "showlegend": False,
        },
    }


@dataclass(frozen=True)
class Tile:
    """One cell of an archive of two measures as the picture's corner points to it, with who is best there."""

    id: int
    loss: float
    hover: Sequence[str] = ()


def archive(
    edges: tuple[Sequence[float], Sequence[float]],
    tiles: Sequence[Sequence[Tile | None]],
    titles: tuple[str, str, str],
    chosen: tuple[float, float] | None = None,
    dots: Sequence[tuple[float, float]] = (),
) -> Figure:
    """Losses by two measures: `tiles[row][column]` lies between the edges of the second and the first measure.

    `titles` are those of the measures and of the loss; `chosen` is where the winner lies, `dots` are where elites do.
    Dark is better.
    """
    lines = max((len(t.hover) for row in tiles for t in row if t is not None), default=0)
    losses = [t.loss for row in tiles for t in row if t is not None]
    best, worst = min(losses, default=0.0), max(losses, default=1.0)
    template = "<b>candidate %{customdata[0]}</b>" + "".join(f"<br>%{{customdata[{i + 1}]}}" for i in range(lines))
    data: list[Figure] = [
        {
            "type": "heatmap",
            "x": list(edges[0]),
            "y": list(edges[1]),
            "z": [[None if t is None else t.loss for t in row] for row in tiles],
            "customdata": [
                [None if t is None else [t.id, *t.hover, *[""] * (lines - len(t.hover))] for t in row] for row in tiles
            ],
            "colorscale": SEQUENTIAL,
            "reversescale": True,
            "zmin": best,
            "zmax": worst + 0.25 * ((worst - best) or 1.0),  # the worst is still told from an empty cell
            "xgap": 1 if len(edges[0]) <= 60 else 0,
            "ygap": 1 if len(edges[1]) <= 60 else 0,
            "hoverongaps": False,
            "hovertemplate": template + "<extra></extra>",
            "texttemplate": "%{z:.2f}" if len(edges[0]) <= 14 else "",
            "colorbar": {
                "title": {"text": titles[2], "side": "top", "font": {"size": 13}},
                "thickness": 12,
                "outlinewidth": 0,
            },
        }
    ]
    if dots:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "elites",
                "x": [x for x, _ in dots],
                "y": [y for _, y in dots],
                "marker": {"color": "white", "size": 6, "line": {"color": "#08306B", "width": 1}},
                "hoverinfo": "skip",
            }
        )
    if chosen is not None:
        colour, symbol, size, _ = KINDS["winner"]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "winner",
                "x": [chosen[0]],
                "y": [chosen[1]],
                "marker": {"color": colour, "symbol": symbol, "size": size, "line": {"color": "white", "width": 1}},
                "hoverinfo": "skip",
            }
        )
    return {
        "data": data,
        "layout": {
            "height": 480,
            "xaxis": {"title": {"text": titles[0]}, "range": [edges[0][0], edges[0][-1]], "zeroline": False},
            "yaxis": {"title": {"text": titles[1]}, "range": [edges[1][0], edges[1][-1]], "zeroline": False},
            "showlegend": len(data) > 1,
            "margin": {"t": 40},
        },
    }


def filling(curve: Sequence[tuple[int, int, float]], total: int) -> Figure:
    """The QD score by how many candidates were scored, and below it the share of the `total` cells that are filled."""
    x = [n for n, _, _ in curve]
    common = {"type": "scatter", "mode": "lines+markers", "x": x, "marker": {"size": 4}}
    template = "after %{x} candidates: %{y:.4g}<extra></extra>"
    line = {"width": 2, "shape": "hv"}
    return {
        "data": [
            {**common, "y": [q for _, _, q in curve], "line": {"color": "#0072B2", **line}, "hovertemplate": template},
            {
                **common,
                "y": [filled / total for _, filled, _ in curve],
                "yaxis": "y2",
                "line": {"color": "#009E73", **line},
                "customdata": [filled for _, filled, _ in curve],
                "hovertemplate": "after %{x} candidates: %{customdata} cells<extra></extra>",
            },
        ],
        "layout": {
            "height": 420,
            "xaxis": {"title": {"text": "candidates scored"}, "anchor": "y2", "zeroline": False},
            "yaxis": {"title": {"text": "QD score"}, "domain": [0.54, 1], "rangemode": "tozero"},
            "yaxis2": {"title": {"text": "coverage"}, "domain": [0, 0.46], "tickformat": ".0%", "rangemode": "tozero"},
            "showlegend": False,
        },
    }


LOSS = "loss on the search split"


def progress(
    points: Sequence[Point],
    best: Sequence[tuple[int, float]],
    stages: Sequence[tuple[int, str]],
    title: str = LOSS,
) -> Figure:
    """Losses by candidate: `best` are the improvements (id, loss) of the best so far, `stages` where each begins."""
    ok = [p for p in points if math.isfinite(p.loss)]
    failed = [p for p in points if not math.isfinite(p.loss)]
    data = [_marks(k, some, [p.id for p in some], [p.loss for p in some], m) for k, some, m in _by_kind(ok)]
    if best:
        last = max(p.id for p in points)
        data.insert(
            0,
            {
                "type": "scatter",
                "mode": "lines",
                "name": "best so far",
                "x": [*(i for i, _ in best), last],
                "y": [*(x for _, x in best), best[-1][1]],
                "line": {"color": "#0072B2", "width": 2, "shape": "hv"},
                "hoverinfo": "skip",
            },
        )
    if failed:
        marker = {"color": "#B2182B", "symbol": "x", "size": 8}
        data.append(_marks("failed", failed, [p.id for p in failed], [0] * len(failed), marker, yaxis="y2"))
    layout: Figure = {
        "height": 460,
        "xaxis": {"title": {"text": "candidate, in the order they were asked"}, "zeroline": False},
        "yaxis": {
            "title": {"text": f"{title} (lower is better)"},
            "range": loss_range(ok),
            "zeroline": False,
            "domain": [0, 0.92 if failed else 1],
        },
        "showlegend": True,
        "shapes": [_line("x", at - 0.5) for at, _ in stages],
        "annotations": [
            {
                "x": at - 0.5,
                "y": 0.0,
                "xref": "x",
                "yref": "paper",
                "text": clipped(name),
                "showarrow": False,
                "xanchor": "left",
                "yanchor": "bottom",
                "font": {"color": GREY, "size": 12},
            }
            for at, name in stages
        ],
        "margin": {"t": 40},
    }
    if failed:
        layout["yaxis2"] = {"domain": [0.94, 1], "range": [-1, 1], "visible": False, "fixedrange": True}
    return {"data": data, "layout": layout}


def loss_range(points: Sequence[Point]) -> list[float] | None:
    """The losses worth looking at: from the best to most candidates and half of the baselines, not every outlier."""
    losses = sorted(p.loss for p in points)
    if not losses:
        return None
    usual = sorted(p.loss for p in points if p.kind != "baseline") or losses
    top = max(usual[int(0.95 * (len(usual) - 1))], losses[0])
    base = [p.loss for p in points if p.kind == "baseline"]
    if base:
        top = max(top, min(base))
    pad = 0.06 * (top - losses[0]) or 0.05 * max(abs(top), 1e-3)
    return [losses[0] - pad, top + pad]


def heat_map(
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    z: Sequence[Sequence[float | None]],
    *,
    limit: float,
    signed: bool,
) -> Figure:
    """Coefficients by block (columns) and expert (rows); colours over [-limit, limit], or [0, limit] where unsigned."""
    cells = len(columns) <= 14
    return {
        "data": [
            {
                "type": "heatmap",
                "x": list(columns),
                "y": [clipped(r, 28) for r in rows],
                "z": [list(r) for r in z],
                "colorscale": DIVERGING if signed else SEQUENTIAL,
                "zmin": -limit if signed else 0.0,
                "zmax": limit,
                "xgap": 1,
                "ygap": 1,
                "hoverongaps": False,
                "hovertemplate": "%{y}, %{x}<br>" + title + " %{z:.4g}<extra></extra>",
                "texttemplate": "%{z:.2f}" if cells else "",
                "colorbar": {
                    "title": {"text": title, "side": "top", "font": {"size": 13}},
                    "thickness": 12,
                    "outlinewidth": 0,
                },
            }
        ],
        "layout": {
            "height": 110 + 34 * len(rows),
            "xaxis": {"type": "category", "showgrid": False},
            "yaxis": {"type": "category", "showgrid": False, "autorange": "reversed"},
            "margin": {"t": 30},
        },
    }


def by_split(
    splits: Sequence[str], models: Mapping[str, Sequence[Mark | None]], title: str, style: Mapping[str, tuple[str, str]]
) -> Figure:
    """Mean scores from split to split, a line a model; a model without a score on a split has a gap there."""
    data = []
    for i, (model, marks) in enumerate(models.items()):
        colour, symbol = style[model]
        # Beside each other, so that intervals do not hide one another.
        shift = 0.3 * (i / max(1, len(models) - 1) - 0.5)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": clipped(model),
                "x": [j + shift for j in range(len(splits))],
                "y": [None if m is None else m.value for m in marks],
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [None if m is None else m.high - m.value for m in marks],
                    "arrayminus": [None if m is None else m.value - m.low for m in marks],
                    "thickness": 1.2,
                    "width": 0,
                },
                "line": {"color": colour, "width": 3 if colour == WINNER else 1.2},
                "marker": {"color": colour, "symbol": symbol, "size": 9 if colour == WINNER else 7},
                "customdata": [[model, s, "" if m is None else m.hover] for s, m in zip(splits, marks, strict=True)],
                "hovertemplate": "<b>%{customdata[0]}</b>, %{customdata[1]}<br>%{customdata[2]}<extra></extra>",
            }
        )
    return {
        "data": data,
        "layout": {
            "height": 350 + 20 * legend_rows(list(models)),
            "xaxis": {
                "tickvals": list(range(len(splits))),
                "ticktext": list(splits),
                "range": [-0.4, len(splits) - 0.6],
                "showgrid": False,
                "zeroline": False,
            },
            "yaxis": {"title": {"text": title}, "zeroline": False},
            "showlegend": True,
            "margin": {"t": 20},
        },
    }


def ancestry(
    nodes: Sequence[tuple[int, float]], edges: Sequence[tuple[int, int]], winner: int, title: str = LOSS
) -> Figure:
    """A candidate's ancestors by number and loss, with a line from every parent to its child."""
    at = dict(nodes)
    edges = [(a, b) for a, b in edges if a in at and b in at]
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines",
                "x": [x for a, b in edges for x in (a, b, None)],
                "y": [y for a, b in edges for y in (at[a], at[b], None)],
                "line": {"color": GREY, "width": 1},
                "hoverinfo": "skip",
            },
            {
                "type": "scatter",
                "mode": "markers",
                "x": [i for i, _ in nodes],
                "y": [x for _, x in nodes],
                "customdata": [[i] for i, _ in nodes],
                "marker": {"size": 8, "color": [WINNER if i == winner else "#0072B2" for i, _ in nodes]},
                "hovertemplate": "<b>candidate %{customdata[0]}</b><br>loss %{y:.4f}<extra></extra>",
            },
        ],
        "layout": {
            "height": 340,
            "xaxis": {"title": {"text": "candidate"}, "zeroline": False},
            "yaxis": {"title": {"text": title}, "zeroline": False},
            "showlegend": False,
        },
    }


def clipped(name: str, length: int = 26) -> str:
    """A name that fits beside a figure: long ones lose their middle, since they tend to differ at the end."""
    keep = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - keep]}…{name[-keep:]}"
