"""Table and plot of results.json: `python experiments/m2n2_digits/summary.py` writes results.md and curves.png.

The plot needs Chromium, as the quickstart's picture does.
"""

from __future__ import annotations

import json
import runpy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

HERE = Path(__file__).resolve().parent
picture = runpy.run_path(str(HERE.parent / "quickstart" / "picture.py"))["main"]
NAMES = {
    "m2n2": "M2N2",
    "no_attraction": "no attraction",
    "no_split": "no split point",
    "no_crossover": "no crossover",
    "ga": "GA (alpha 0)",
    "cma_es": "CMA-ES",
}
COLOURS = ("#1b6ca8", "#4aa564", "#e08e0b", "#8c6bb1", "#c0392b", "#555555")
SETTINGS = {"scratch": "from scratch", "pretrained": "pre-trained"}


def read() -> dict[tuple[str, str], dict[int, Any]]:
    """(setting, method) -> seed -> test accuracy by point of the curve."""
    out: dict[tuple[str, str], dict[int, Any]] = {}
    for r in json.loads((HERE / "results.json").read_text(encoding="utf-8")):
        out.setdefault((r["setting"], r["method"]), {})[r["seed"]] = np.array(r["test"])
    return out


def table(curves: dict[tuple[str, str], dict[int, Any]]) -> str:
    """Test accuracy in percent after 10,000 steps."""
    lines = ["| setting | method | seeds | mean | standard error | minus M2N2, paired | each seed |"]
    lines.append("|---|---|---|---|---|---|---|")
    for setting, title in SETTINGS.items():
        for method, name in NAMES.items():
            if (setting, method) not in curves:
                continue
            last = {s: 100 * c[-1] for s, c in sorted(curves[setting, method].items())}
            values = np.array(list(last.values()))
            gaps = np.array([v - 100 * curves[setting, "m2n2"][s][-1] for s, v in last.items()])
            gap = "" if method == "m2n2" else f"{gaps.mean():+.1f} ± {error(gaps):.1f}"
            each = " ".join(f"{v:.1f}" for v in values)
            cells = [title, name, str(len(values)), f"{values.mean():.1f}", f"{error(values):.1f}", gap, each]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(["# Test accuracy in percent after 10,000 steps", "", *lines, ""])


def error(x: Any) -> float:
    return float(np.std(x, ddof=1) / np.sqrt(len(x)))


def plot(curves: dict[tuple[str, str], dict[int, Any]], png: Path) -> None:
    """Mean over seeds with a band of one standard error."""
    figure = make_subplots(cols=2, shared_yaxes=True, subplot_titles=list(SETTINGS.values()), horizontal_spacing=0.04)
    for column, setting in enumerate(SETTINGS, 1):
        for (method, name), colour in zip(NAMES.items(), COLOURS, strict=True):
            if (setting, method) not in curves:
                continue
            y = 100 * np.array(list(curves[setting, method].values()))
            steps = 100 * np.arange(1, y.shape[1] + 1)
            mean, band = y.mean(axis=0), y.std(axis=0, ddof=1) / np.sqrt(len(y))
            shared = {"legendgroup": name, "x": steps, "mode": "lines"}
            show = (setting, method) == ("scratch", method)
            figure.add_trace(
                go.Scatter(**shared, y=mean, name=name, line={"color": colour, "width": 2}, showlegend=show), 1, column
            )
            both = {**shared, "x": [*steps, *steps[::-1]], "y": [*(mean + band), *(mean - band)[::-1]]}
            figure.add_trace(
                go.Scatter(**both, fill="toself", fillcolor=colour, opacity=0.15, line_width=0, showlegend=False),
                1,
                column,
            )
    figure.update_xaxes(title="models evaluated")
    figure.update_yaxes(title="test accuracy, %", col=1)
    figure.update_layout(template="plotly_white", width=1000, height=440, margin={"t": 40, "b": 50, "l": 60, "r": 10})
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "curves.html"
        figure.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
        picture(page, png, width=1020, height=460)


if __name__ == "__main__":
    found = read()
    (HERE / "results.md").write_text(table(found), encoding="utf-8")
    plot(found, HERE / "curves.png")
