"""Two runs side by side: settings that differ, scores, work."""

from __future__ import annotations

from typing import Any

from evomerge.history import History
from evomerge.report.results import results, spread
from evomerge.report.status import status

SHORT = 60
"""Characters of a setting that are printed; `--json` has all."""


def compare(a: History, b: History, split: str) -> dict[str, Any]:
    """Plain data: what differs in the experiments, each model's mean scores, candidates, items and seconds."""
    left, right = (_flat(h.experiment.model_dump(mode="json", exclude_defaults=True)) for h in (a, b))
    scores = []
    tables = [{(s.model, s.task): s for s in results(h, split).table} for h in (a, b)]
    for key in dict.fromkeys([*tables[0], *tables[1]]):
        cells = [t.get(key) for t in tables]
        scores.append(
            {
                "model": key[0],
                "task": key[1],
                "scores": [None if c is None else c.score for c in cells],
                "low": [None if c is None else c.low for c in cells],
                "high": [None if c is None else c.high for c in cells],
            }
        )
    states = [status(h.path) for h in (a, b)]
    return {
        "runs": [str(a.path), str(b.path)],
        "split": split,
        "differences": {k: [left.get(k), right.get(k)] for k in sorted({*left, *right}) if left.get(k) != right.get(k)},
        "scores": scores,
        "work": {k: [s[k] for s in states] for k in ("phase", "scored", "items", "cached", "run_seconds", "looks")},
    }


def _flat(data: Any, path: str = "") -> dict[str, Any]:
    if path == "search.warm_start":
        return {path: f"{len(data)} recipes"}
    if isinstance(data, dict):
        return {k: v for key, inner in data.items() for k, v in _flat(inner, f"{path}.{key}" if path else key).items()}
    if isinstance(data, list):
        return {k: v for i, inner in enumerate(data) for k, v in _flat(inner, f"{path}[{i}]").items()}
    return {path: data}


def compare_text(c: dict[str, Any]) -> str:
    """For people: scores, work, then the settings that differ."""
    lines = [f"A  {c['runs'][0]}", f"B  {c['runs'][1]}", "", f"{'model':<12} {'task':<12} {'A':>24} {'B':>24}"]
    for row in c["scores"]:
        cells = [
            "-" if s is None else f"{s:.3f}{spread(low, high)}"
            for s, low, high in zip(row["scores"], row["low"], row["high"], strict=True)
        ]
        lines.append(f"{row['model']:<12} {row['task']:<12} {cells[0]:>24} {cells[1]:>24}")
    lines += [""] + [f"{k:<12} {a!s:>12} {b!s:>12}" for k, (a, b) in c["work"].items()]
    if not c["differences"]:
        return "\n".join([*lines, "", "the experiments are the same"])
    lines += ["", f"{len(c['differences'])} settings differ"]
    return "\n".join([*lines, *(f"{k}: {_short(a)} | {_short(b)}" for k, (a, b) in c["differences"].items())])


def _short(value: Any) -> str:
    """A setting in one cell: the end of a long one, for paths differ there."""
    text = "-" if value is None else repr(value)
    return text if len(text) <= SHORT else f"...{text[-SHORT + 3 :]}"
