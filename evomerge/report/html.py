"""One self-contained HTML page: headings, tables, code to copy and plotly figures; it never asks the network.

What a run holds (names, reasons, recipes) is untrusted. Every string is escaped, figures travel as JSON in data
blocks that nothing executes, and the content security policy lets only this module's own two scripts run, by their
hashes: markup that slipped through would stay inert.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evomerge.errors import RunError

TEMPLATED = frozenset({"hovertemplate", "texttemplate"})
"""Keys of a figure whose text is ours: plotly's markup (<br>, <extra>) works there, and nowhere else."""

_NUMBER = re.compile(r"[-+\u2212]?\d[\d.,e+\-]*( ?[%A-Za-z]{1,8}(/[a-z]+)?)?( \[.*\])?")


def page(title: str, sections: Sequence[str]) -> str:
    """A whole HTML document of `section`s. Raises RunError where the plotly package is not whole."""
    scripts = (_plotly(), _asset("page.js"))
    allowed = " ".join(_source(s) for s in scripts)
    # Plotly sets style attributes and hands heat maps to the browser as data: images; files to save are blobs.
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>",
            f"<header><h1>{html.escape(title)}</h1></header>\n<nav></nav>\n<main>",
            *sections,
            "</main>",
            *(f"<script>{s}</script>" for s in scripts),
            "</body>\n</html>\n",
        )
    )


def section(heading: str, *parts: str) -> str:
    """One section; `parts` are what the other functions here return. An empty heading has no place in the menu."""
    title = f"<h2>{html.escape(heading)}</h2>\n" if heading else ""
    return f"<section>\n{title}{chr(10).join(parts)}\n</section>"


def subheading(content: str) -> str:
    """A heading within a section."""
    return f"<h3>{html.escape(content)}</h3>"


def text(content: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(content)}</p>"


def note(content: str) -> str:
    """A small paragraph: how to read a figure, what was left out."""
    return f'<p class="note">{html.escape(content)}</p>'


def warning(content: str) -> str:
    """A paragraph that must not be overlooked."""
    return f'<p class="warning">{html.escape(content)}</p>'


def lead(content: str) -> str:
    """The one sentence to read first."""
    return f'<p class="lead">{html.escape(content)}</p>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, the first column being the rows' names; columns of numbers are set to the right."""
    number = [i > 0 and bool(rows) and all(_NUMBER.fullmatch(r[i] or "0") for r in rows) for i in range(len(header))]
    cells = ['<td class="number">{}</td>' if n else "<td>{}</td>" for n in number]
    heads = ['<th scope="col" class="number">{}</th>' if n else '<th scope="col">{}</th>' for n in number]
    cells[0] = '<th scope="row">{}</th>'
    head = "".join(h.format(html.escape(c)) for h, c in zip(heads, header, strict=True))
    body = "\n".join(
        f"<tr>{''.join(cell.format(html.escape(c)) for cell, c in zip(cells, row, strict=True))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """A table of names and what is to be said of each."""
    body = "\n".join(f'<tr><th scope="row">{html.escape(k)}</th><td>{html.escape(v)}</td></tr>' for k, v in rows)
    return f'<div class="scroll"><table class="facts"><tbody>\n{body}\n</tbody></table></div>'


def code(content: str) -> str:
    """Text in a typewriter face with a button that copies it."""
    return f'<div class="code"><button type="button">copy</button><pre>{html.escape(content)}</pre></div>'


def figure(fig: Mapping[str, Any], *, details: str = "") -> str:
    """A plotly figure, `{"data": [...], "layout": {...}}`; NaN and infinities become null (a gap).

    Colours of text, axes and background follow the reader's light or dark theme. With `details`, a click on a point
    opens the record of that name's `details` whose key is the point's first `customdata`.
    """
    return f'<div class="figure" data-details="{html.escape(details)}">{_data(_shown(fig))}</div>'


def details(
    name: str,
    fields: Sequence[str],
    rows: Mapping[str, Sequence[Any]],
    commands: Sequence[str] = (),
    pictures: Sequence[tuple[Mapping[str, Any], Mapping[str, Sequence[float | None]]]] = (),
    drawings: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """A panel for one record at a time, opened by a click on a point of a `figure`.

    `rows` has the values of `fields` by key, and `{}` in a command stands for the key. A picture is a heat map
    without its z, and by key its values row by row; records without values have no picture. `drawings` are whole
    figures by key, which come first.
    """
    data = {
        "fields": fields,
        "rows": rows,
        "commands": commands,
        "pictures": [{"figure": _shown(fig), "values": values} for fig, values in pictures],
        "drawings": {key: _shown(fig) for key, fig in (drawings or {}).items()},
    }
    hint = "Click a point to see that candidate here."
    return f'<div class="details" data-name="{html.escape(name)}"><p class="note">{hint}</p>{_data(data)}</div>'


def _shown(data: Any, key: str = "") -> Any:
    """A figure in which markup of untrusted text is text: plotly reads some tags, and links, in what it draws."""
    if isinstance(data, str):
        return data if key in TEMPLATED else html.escape(data, quote=False)
    if isinstance(data, Mapping):
        return {k: _shown(v, k) for k, v in data.items()}
    if isinstance(data, Sequence):
        return [_shown(v, key) for v in data]
    return data


def _data(data: Any) -> str:
    """JSON that ends no script element and opens no comment."""
    dumped = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    safe = dumped.replace("<", "\\u003c").replace(">", "\\u003e")
    return f'<script type="application/json">{safe}</script>'


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(k): _finite(v) for k, v in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [_finite(v) for v in data]
    return data


def _source(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _asset(name: str) -> str:
    return files("evomerge.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """plotly.js as the plotly package ships it; the package itself is not imported."""
    spec = find_spec("plotly")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder) / "package_data" / "plotly.min.js"
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise RunError("the page needs plotly.js from the plotly package; install it with `pip install plotly`")
