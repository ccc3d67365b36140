"""Layer routes for readers: in one line of words, and as a picture of the source layer of every hop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from evomerge.errors import UserError
from evomerge.history import History
from evomerge.manifest import Manifest
from evomerge.recipe import MERGED, Hop, Recipe, Route, taken_whole
from evomerge.report.figures import DIVERGING, GREY, Figure, clipped, legend_rows, styles

ENDS = ("embed", "final_norm", "head")
FACTORS = {"scale": "scale in", "attn_gain": "attention gain", "mlp_gain": "mlp gain"}
"""Fields of a hop -> what their rows in the picture are called."""


# -- words ------------------------------------------------------------------------------------------------------


def route_of(history: History, candidate: int, most: int | None = None) -> str | None:
    """`route_text` of a candidate; None where it has no route, or where its recipe cannot be told."""
    try:
        recipe = history.recipe(candidate)
    except UserError:  # a run that accepted drift
        return None
    return None if recipe.route is None else route_text(recipe, history.manifest, most)


def route_text(recipe: Recipe, manifest: Manifest, most: int | None = None) -> str:
    """One line on the route of a canonical recipe: `9 hops: math 0-4, base 6-9 (x0.8 in); skips layer 5 of 10`.

    Skipped is a layer that no hop goes through in any source of the base's depth. `most` stretches are written out.
    """
    assert recipe.route is not None
    hops = recipe.route.hops
    parts = [f"{len(hops)} {'hop' if len(hops) == 1 else 'hops'}: {path_text(recipe.route, most)}"]
    if missing := skipped(recipe.route, manifest):
        layers = "layer" if len(missing) == 1 else "layers"
        parts.append(f"skips {layers} {_ranges(missing)} of {manifest.layers[manifest.base]}")
    again: dict[str, list[int]] = {}
    for (source, layer), times in Counter((h.from_, h.layer) for h in hops).items():
        if times > 1:
            again.setdefault(source, []).append(layer)
    if again:
        parts.append("repeats " + ", ".join(f"{_name(s)} {_ranges(sorted(found))}" for s, found in again.items()))
    return "; ".join([*parts, *_ends(recipe, manifest)])


def path_text(route: Route, most: int | None = None) -> str:
    """The hops of a route in words: stretches of neighbouring layers, with their scales and gains in brackets.

    `x0.8 in` scales what enters the stretch, `x0.8 in each` what enters each of its layers, `x0.8 to x1.1 in` what
    enters them by factors between these.
    """
    runs = _runs(route.hops)
    shown = runs if most is None else runs[:most]
    out = []
    for i, run in enumerate(shown):
        name = "" if i and run[0].from_ == runs[i - 1][0].from_ else f"{_name(run[0].from_)} "
        last = "" if run[-1].layer == run[0].layer else f"-{run[-1].layer}"
        factors = _factors(run)
        out.append(f"{name}{run[0].layer}{last}" + (f" ({', '.join(factors)})" if factors else ""))
    if left := sum(map(len, runs[len(shown) :])):
        out.append(f"and {left} more")
    return ", ".join(out)


def skipped(route: Route, manifest: Manifest) -> list[int]:
    """Layers of the base's depth that no hop goes through, in no source of that depth."""
    seen = {h.layer for h in route.hops if h.from_ not in manifest.layouts}
    return [n for n in range(manifest.layers[manifest.base]) if n not in seen]


def _runs(hops: Sequence[Hop]) -> list[list[Hop]]:
    """Stretches of one source: layers that follow one another, or one layer again and again."""
    runs: list[list[Hop]] = []
    for hop in hops:
        run = runs[-1] if runs else []
        step = hop.layer - run[-1].layer if run and run[-1].from_ == hop.from_ else None
        if step in (0, 1) and (len(run) == 1 or step == run[-1].layer - run[-2].layer):
            run.append(hop)
        else:
            runs.append([hop])
    return runs


def _factors(run: Sequence[Hop]) -> list[str]:
    """What stands in the brackets behind a stretch."""
    out = [f"{len(run)} times"] if len(run) > 1 and run[0].layer == run[1].layer else []
    scales = [h.scale for h in run]
    if scales[0] != 1.0 and all(s == 1.0 for s in scales[1:]):
        out.append(f"x{scales[0]:.4g} in")
    elif any(s != 1.0 for s in scales):
        out.append(f"{_span(scales)} in{' each' if len({*scales}) == 1 else ''}")
    gains = {"attn": [h.attn_gain for h in run], "mlp": [h.mlp_gain for h in run]}
    return out + [f"{name} {_span(values)}" for name, values in gains.items() if any(v != 1.0 for v in values)]


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"x{low:.4g}" if low == high else f"x{low:.4g} to x{high:.4g}"


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as 0-2, 5, 7-9."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] + 1 == n:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _ends(recipe: Recipe, manifest: Manifest) -> list[str]:
    """Whose embedding, final norm and head the routed model has, where they are not the base's."""
    found: dict[str, list[str]] = {}
    for end in ENDS:
        if end not in manifest.blocks:  # a tied head
            continue
        if recipe.segments is not None:
            source = MERGED
        elif (rule := recipe.blocks.get(end)) is None:
            continue
        else:
            source = taken_whole(rule) or MERGED
        found.setdefault(source, []).append(end.replace("_", " "))
    return [f"{', '.join(ends)} of {_name(source)}" for source, ends in found.items()]


def _name(source: str) -> str:
    """A journal's manifest may hold any name: no line breaks, no escapes for terminals."""
    return source if source.isprintable() else repr(source)


# -- picture ----------------------------------------------------------------------------------------------------


def route_figure(recipe: Recipe, manifest: Manifest) -> Figure:
    """The route of a canonical recipe: hops (x) by layer of their source (y), a colour and a shape for each source.

    Layers that are skipped are drawn faintly where the path passes them; rings mark layers that it went through
    before. Below, where a hop is not as its source has it, a row for each kind of factor, with gaps for 1.
    """
    assert recipe.route is not None
    hops = recipe.route.hops
    depth, count = manifest.layers[manifest.base], len(hops)
    style = styles([manifest.base, *manifest.experts, *sorted(manifest.layouts)], MERGED)
    rows = max(depth, *(h.layer + 1 for h in hops))
    pitch = min(28.0, max(7.0, 340 / rows))
    size = min(11.0, 0.7 * pitch, max(4.0, 700 / count))
    data: list[Figure] = [
        _curve("layers in order", [1, depth], [0, depth - 1], {"color": GREY, "width": 1, "dash": "dot"}),
        {
            **_curve("path", list(range(1, count + 1)), [h.layer for h in hops], {"color": GREY, "width": 1}),
            "showlegend": False,
        },
    ]
    at_once = list(zip(range(1, count + 1), hops, recipe.route.gains(), _times(hops), strict=True))
    for source in (MERGED, *(s for s in style if s != MERGED)):
        mine = [row for row in at_once if row[1].from_ == source]
        if not mine:
            continue
        colour, symbol = style[source]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": clipped(source),
                "x": [n for n, _, _, _ in mine],
                "y": [h.layer for _, h, _, _ in mine],
                "customdata": [
                    [h.scale, h.attn_gain, h.mlp_gain, float(f"{a:.4g}"), float(f"{m:.4g}"), time]
                    for _, h, (a, m), time in mine
                ],
                "marker": {"color": colour, "symbol": symbol, "size": size},
                "hovertemplate": (
                    "<b>hop %{x}: %{fullData.name}, layer %{y}</b>%{customdata[5]}"
                    "<br>scale in %{customdata[0]}, attention gain %{customdata[1]}, mlp gain %{customdata[2]}"
                    "<br>in effect: attention times %{customdata[3]}, mlp times %{customdata[4]}<extra></extra>"
                ),
            }
        )
    if again := [(n, h.layer) for n, h, _, time in at_once if time]:
        ring = {"color": GREY, "symbol": "circle-open", "size": size + 6, "line": {"width": 1.2}}
        data.append(_marks("repeated", again, ring))
    if passed := [(_passed_at(hops, layer), layer) for layer in skipped(recipe.route, manifest)]:
        faint = {
            "color": GREY,
            "symbol": "x-thin",
            "size": 0.7 * size,
            "opacity": 0.6,
            "line": {"color": GREY, "width": 1.5},
        }
        data.append(_marks("skipped", passed, faint))
    factors = {title: [float(getattr(h, field)) for h in hops] for field, title in FACTORS.items()}
    shown = {title: row for title, row in factors.items() if any(x != 1.0 for x in row)}
    below = 30.0 * len(shown) + (24 if shown else 0)
    above = max(pitch * rows, 140.0)
    share = below / (above + below)
    layout: Figure = {
        "height": round(above + below) + 90 + 26 * legend_rows([d["name"] for d in data]),
        "xaxis": {
            "title": {"text": "hop: depth in the routed model"},
            "range": [0.3, count + 0.7],
            "zeroline": False,
            "showgrid": False,
            **({"dtick": 1} if count <= 30 else {}),
        },
        "yaxis": {
            "title": {"text": "layer of its source"},
            "range": [-0.7, rows - 0.3],
            "zeroline": False,
            "domain": [share, 1],
            **({"dtick": 1} if rows <= 16 else {}),
        },
        "showlegend": True,
        "legend": {"itemsizing": "constant"},
        "margin": {"t": 20},
    }
    if shown:
        data.append(_strip(shown))
        layout["xaxis"]["anchor"] = "y2"
        layout["yaxis2"] = {
            "domain": [0, share * (below - 24) / below],
            "autorange": "reversed",
            "showgrid": False,
            "automargin": True,
        }
    return {"data": data, "layout": layout}


def _curve(name: str, x: list[int], y: list[int], line: Figure) -> Figure:
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line, "hoverinfo": "skip"}


def _marks(name: str, at: Sequence[tuple[float, int]], marker: Figure) -> Figure:
    x, y = [x for x, _ in at], [y for _, y in at]
    return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "marker": marker, "hoverinfo": "skip"}


def _strip(rows: dict[str, list[float]]) -> Figure:
    """Factors by hop other than 1; colours over the same distance on both sides of it."""
    limit = max(abs(x - 1.0) for row in rows.values() for x in row)
    return {
        "type": "heatmap",
        "name": "factors",
        "x": list(range(1, 1 + len(next(iter(rows.values()))))),
        "y": list(rows),
        "z": [[None if x == 1.0 else x for x in row] for row in rows.values()],
        "hoverongaps": False,
        "yaxis": "y2",
        "colorscale": DIVERGING,
        "zmin": 1.0 - limit,
        "zmax": 1.0 + limit,
        "xgap": 1,
        "ygap": 2,
        "hovertemplate": "hop %{x}: %{y} %{z:.4g}<extra></extra>",
        "colorbar": {"title": {"text": "factor", "side": "top", "font": {"size": 13}}, "thickness": 12}
        | {"outlinewidth": 0},
    }


def _times(hops: Sequence[Hop]) -> list[str]:
    """Behind each hop's layer: for the how-manieth time it is gone through; nothing for the first time."""
    seen: Counter[tuple[str, int]] = Counter()
    out = []
    for hop in hops:
        seen[hop.from_, hop.layer] += 1
        n = seen[hop.from_, hop.layer]
        out.append("" if n == 1 else f", time {n}")
    return out


def _passed_at(hops: Sequence[Hop], layer: int) -> float:
    """Where along the path a skipped layer is passed: between two hops around it, else before or behind the path."""
    for n, (a, b) in enumerate(pairwise(hops), 1):
        if min(a.layer, b.layer) < layer < max(a.layer, b.layer):
            return n + 0.5
    return 0.5 if layer < hops[0].layer else len(hops) + 0.5
