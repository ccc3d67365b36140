"""What `evomerge inspect` found, as tables for a terminal and as a page with heat maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from evomerge.inspect_pool import TOP, Finding, Inspection, Sums
from evomerge.report import html

Table = tuple[str, list[str], list[list[str]]]
"""Heading, header, rows."""
MODULES = ("attention", "mlp", "norm")
DIVERGING = [[0.0, "#2166AC"], [0.25, "#92C5DE"], [0.5, "#F7F7F7"], [0.75, "#F4A582"], [1.0, "#B2182B"]]
"""ColorBrewer's RdBu: low blue, the middle near white, high red."""
SEQUENTIAL = [[0.0, "#F7FBFF"], [0.5, "#6BAED6"], [1.0, "#08306B"]]


def pool_text(i: Inspection) -> str:
    """For people at a terminal."""
    lines = [_summary(i)]
    for heading, header, rows in _tables(i):
        lines += ["", heading, *_grid(header, rows)]
    found = [f"{f.severity:<8} {f.model + ': ' if f.model else ''}{_described(f)}" for f in i.findings]
    lines += ["", *(found or ["nothing stands in the way of a merge"])]
    # Names may be a stranger's; nothing of them steers the terminal.
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def pool_page(i: Inspection) -> str:
    """One HTML page: findings, tables, and heat maps of delta norms, cosines and sign conflicts."""
    rows = [[f.severity, f.model or "the pool", f.kind.replace("_", " "), f.text] for f in i.findings]
    found = html.table(["severity", "model", "about", "finding"], rows)
    sections = [
        html.section("", html.lead(_summary(i))),
        html.section("Findings", found if rows else html.text("Nothing stands in the way of a merge.")),
    ]
    norms, layers, *pairs = _tables(i)
    inside = [s for block, s in i.blocks.items() if block.startswith("layers.")]
    limit = max((float(x) for s in inside for x in s.relative if math.isfinite(x)), default=1.0)
    maps = [html.text(name) + html.figure(_norm_map(i, k, limit or 1.0)) for k, name in enumerate(i.experts)]
    sections.append(
        html.section(
            "Delta norms",
            html.note("Length of expert minus base as a share of the base's length; one colour scale for all experts."),
            html.table(norms[1], norms[2]),
            *maps,
            html.table(layers[1], layers[2]),
        )
    )
    if pairs:
        cosine = _heat_map("cosine", i.experts, i.experts, _matrix(i.total.cosines), -1.0, 1.0)
        conflict = _heat_map("sign conflicts", i.experts, i.experts, _matrix(i.total.conflicts), 0.0, 1.0)
        names = [f"{i.experts[a]}, {i.experts[b]}" for a, b in i.pairs()]
        sections.append(
            html.section(
                "Pairs of task vectors",
                html.table(pairs[0][1], pairs[0][2]),
                html.text("Cosine: 0 is what independent trainings have; near 1 the experts went the same way."),
                html.figure(cosine),
                html.figure(_by_layer("cosine", i, names, lambda s: s.cosines, -1.0, 1.0)),
                html.text(
                    f"Sign conflicts: of the entries among the largest {TOP:.0%} of both, the share that oppose; "
                    "0.5 is what unrelated experts have, near 0 they agree."
                ),
                html.figure(conflict),
                html.figure(_by_layer("sign conflicts", i, names, lambda s: s.conflicts, 0.0, 1.0)),
            )
        )
    return html.page(f"Pool on {i.base}", sections)


def _summary(i: Inspection) -> str:
    return (
        f"{i.base}: {i.parameters:,} parameters, {len(i.by_layer)} layers, {i.dtypes[i.base]}; "
        f"{len(i.experts)} experts compared"
    )


def _tables(i: Inspection) -> list[Table]:
    total, modules, layers = i.total, i.by_module, i.by_layer
    rows = []
    for k, name in enumerate(i.experts):
        lengths = [_number(s.relative[k]) for s in (total, *modules.values())]
        changed = f"{total.changed[k] / total.size:.1%}"
        rows.append([name, *lengths, changed, i.dtypes[name], i.licences[name].id])
    out: list[Table] = [
        ("delta norm / base norm", ["expert", "overall", *modules, "changed", "dtype", "licence"], rows),
        (
            "the same by layer",
            ["layer", *i.experts],
            [[str(n), *(_number(x) for x in s.relative)] for n, s in layers.items()],
        ),
    ]
    pairs = []
    for a, b in i.pairs():
        by_layer = [s.cosines[a, b] for s in layers.values()]
        span = f"{_number(min(by_layer), '+')} to {_number(max(by_layer), '+')}"
        figures = [_number(total.conflicts[a, b]), _number(total.overlaps[a, b])]
        pairs.append([f"{i.experts[a]}, {i.experts[b]}", _number(total.cosines[a, b], "+"), span, *figures])
    if pairs:
        heading = f"pairs of task vectors; sign conflicts and overlap are of the largest {TOP:.0%} of each tensor"
        out.append((heading, ["pair", "cosine", "by layer", "sign conflicts", "overlap"], pairs))
    return out


def _number(x: float, sign: str = "") -> str:
    return f"{x:{sign}.3f}" if math.isfinite(x) else "-"


def _described(f: Finding) -> str:
    """The text, behind its kind where it does not name it itself."""
    return f"{f.kind.replace('_', ' ')}: {f.text}" if f.kind in ("tokenizer", "generation_config", "config") else f.text


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [header, *rows]]


# -- pictures -------------------------------------------------------------------------------------------------


def _norm_map(i: Inspection, expert: int, limit: float) -> dict[str, Any]:
    def value(block: str) -> float:
        return float(i.blocks[block].relative[expert]) if block in i.blocks else math.nan

    z = [[value(f"layers.{n}.{m}") for n in i.by_layer] for m in MODULES]
    return _heat_map("delta norm", [str(n) for n in i.by_layer], MODULES, z, 0.0, limit, SEQUENTIAL, "layer")


def _by_layer(
    title: str, i: Inspection, names: Sequence[str], value: Callable[[Sums], Any], low: float, high: float
) -> dict[str, Any]:
    z = [[float(value(s)[a, b]) for s in i.by_layer.values()] for a, b in i.pairs()]
    return _heat_map(title, [str(n) for n in i.by_layer], names, z, low, high, axis="layer")


def _matrix(values: Any) -> list[list[float]]:
    """A matrix without its diagonal, which says nothing."""
    return [[math.nan if a == b else float(x) for b, x in enumerate(row)] for a, row in enumerate(values)]


def _heat_map(
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    z: Sequence[Sequence[float]],
    low: float,
    high: float,
    scale: Sequence[Any] = DIVERGING,
    axis: str = "",
) -> dict[str, Any]:
    return {
        "data": [
            {
                "type": "heatmap",
                "x": list(columns),
                "y": list(rows),
                "z": z,
                "colorscale": scale,
                "zmin": low,
                "zmax": high,
                "xgap": 1,
                "ygap": 1,
                "hoverongaps": False,
                "hovertemplate": f"%{{y}}, {axis} %{{x}}<br>{title} %{{z:.4g}}<extra></extra>",
                "texttemplate": "%{z:.2f}" if len(columns) <= 14 else "",
                "colorbar": {"title": {"text": title, "side": "right"}, "thickness": 12, "outlinewidth": 0},
            }
        ],
        "layout": {
            "height": 170 + 34 * len(rows),
            "xaxis": {"type": "category", "showgrid": False, "title": {"text": axis}},
            "yaxis": {"type": "category", "showgrid": False, "autorange": "reversed"},
            "margin": {"t": 34},
        },
    }
