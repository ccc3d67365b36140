from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from evomerge.report.html import code, details, figure, page, section, table, text

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)",
    "<!--<script>",
    "]]></pre></style>",
    '<a href="https://example.org">x</a>',
)


class Tags(HTMLParser):
    """Elements with attributes, and the text of each, as a browser would find them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data


def parsed(markup: str) -> Tags:
    tags = Tags()
    tags.feed(markup)
    tags.close()
    return tags


def blocks(markup: str) -> list[Any]:
    tags = parsed(markup)
    found = zip(tags.tags, tags.texts, strict=True)
    return [json.loads(t) for (n, a), t in found if n == "script" and a.get("type") == "application/json"]


def everything(name: str) -> str:
    fig = {
        "data": [{"type": "scatter", "x": [name], "y": [1.0], "name": name, "text": [name]}],
        "layout": {"title": {"text": name}},
    }
    return page(
        name,
        [
            section(
                name,
                text(name),
                table([name, name], [[name, name]]),
                code(name),
                figure(fig, details=name),
                details(name, [name], {name: [name]}, [name], [({"data": [{"y": [name]}]}, {name: [1.0]})]),
            )
        ],
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    """No name adds an element or an attribute: the page has those of the page with a harmless name."""
    harmless, hostile = parsed(everything("name")), parsed(everything(name))

    assert [(n, sorted(a)) for n, a in hostile.tags] == [(n, sorted(a)) for n, a in harmless.tags]
    assert name in hostile.texts  # as it was, in at least one place


@pytest.mark.parametrize("name", HOSTILE)
def test_plotly_reads_no_markup_in_names(name: str) -> None:
    """Plotly draws tags and links of texts; in a figure's names they are escaped, in our own templates they work."""
    template = "%{x}<br>%{y}<extra></extra>"
    (fig,) = blocks(figure({"data": [{"name": name, "hovertemplate": template}], "layout": {}}))

    assert "<" not in fig["data"][0]["name"]
    assert fig["data"][0]["hovertemplate"] == template


def test_what_is_not_finite_is_a_gap() -> None:
    (fig,) = blocks(figure({"data": [{"y": (1.0, float("nan"), float("inf"), -float("inf"))}], "layout": {}}))

    assert fig["data"][0]["y"] == [1.0, None, None, None]


def test_only_own_scripts_run_and_nothing_is_loaded() -> None:
    """The policy allows two scripts, by the hashes of what the page holds, and no address of any kind."""
    markup = page("title", [section("heading", text("text"))])
    tags = parsed(markup)
    (policy,) = [a["content"] or "" for n, a in tags.tags if n == "meta" and a.get("http-equiv")]
    scripts = re.findall(r"<script>(.*?)</script>", markup, re.DOTALL)

    assert len(scripts) == 2
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert re.findall(r"sha256-([^']+)", policy) == hashes
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    assert not [a for _, a in tags.tags if (a.get("src") or a.get("href") or "data:,") != "data:,"]


def test_numbers_stand_right() -> None:
    """A column of numbers, intervals included, is set to the right with its heading; one of words is not."""
    markup = table(
        ["model", "mean", "why"], [["base", "0.512 [0.41, 0.61]", "3"], ["one", "-1,204.5", "since 3 of them"]]
    )

    assert parsed(markup).tags.count(("td", {"class": "number"})) == 2
    assert '<th scope="col" class="number">mean</th>' in markup
    assert "<td>3</td>" in markup
