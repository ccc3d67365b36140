"""The page in headless Chromium: it draws, answers clicks, asks nobody, and complains of nothing.

Needs Debian's chromium and chromium-driver; skipped where they are missing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from evomerge.config import load
from evomerge.history import History
from evomerge.prepare import Prepared
from evomerge.report.archive import elites
from evomerge.report.page import write_page
from evomerge.run import run
from evomerge.workers.fake import FakeEvaluator

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver (Debian: chromium, chromium-driver)"
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:selenium.*"),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# What a figure shows, by what plotly draws: marks, cells' image, lines and error bars.
DRAWN = """
return [...document.querySelectorAll('.figure')].map((div) => ({
  title: div.closest('section').querySelector('h2').textContent,
  marks: div.querySelectorAll('.scatterlayer .point').length,
  lines: [...div.querySelectorAll('.scatterlayer .js-line')].filter((l) => l.getAttribute('d').length > 4).length,
  cells: [...div.querySelectorAll('.heatmaplayer image')].filter((i) => i.getAttribute('width') > 10).length,
  width: div.querySelector('.main-svg').getBoundingClientRect().width,
  wide: div.scrollWidth > div.clientWidth,
}));
"""


class Browser:
    """A page that is open, with what it logged and asked for."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path) -> None:
        self.driver.get(path.as_uri())
        self.until("return document.querySelectorAll('.figure .main-svg').length > 0")

    def js(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, seconds: float = 20.0) -> Any:
        """The script's value as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.js(script)):
            assert time.monotonic() < end, f"still not so: {script}"
            time.sleep(0.05)
        return value

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]

    def asked(self) -> list[str]:
        """Addresses that were asked for since the last call, but for the browser's own pages and inline data."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [u for u in urls if not u.startswith(("data:", "chrome:", "chrome-extension:"))]

    def click(self, script: str) -> None:
        """Click with the mouse on the middle of the element that the script returns."""
        from selenium.webdriver import ActionChains

        self.js(f"(() => {{ {script} }})().scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.js(
            f"const b = (() => {{ {script} }})().getBoundingClientRect(); return [b.x, b.y, b.width, b.height]"
        )
        x, y = round(box[0] + box[2] / 2), round(box[1] + box[3] / 2)
        chain = ActionChains(self.driver, duration=0)
        chain.w3c_actions.pointer_action.move_to_location(x, y)
        chain.w3c_actions.pointer_action.click()
        chain.perform()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1000"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def checked(browser: Browser, page: Path) -> list[dict[str, Any]]:
    """Open a page: every figure draws something within the page's width, nothing is asked for or complained of."""
    browser.asked()
    browser.open(page)
    drawn: list[dict[str, Any]] = browser.js(DRAWN)

    assert drawn
    for figure in drawn:
        assert figure["marks"] + figure["cells"] > 0, f"an empty figure: {figure}"
        assert figure["width"] > 250
        assert not figure["wide"]
    assert browser.js("return document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    assert browser.complaints() == []
    assert browser.asked() == [page.as_uri()]
    return drawn


def test_a_real_run(browser: Browser, run_copy: Path) -> None:
    """Every figure of a real run draws all its points; clicks on a point, the menu and a copy button do their work."""
    history = History.read(run_copy)
    drawn = checked(browser, write_page(history))

    losses = [r for r in history.evaluations if r["split"] == "search"]
    by_title = {d["title"]: d for d in drawn}
    assert set(by_title) == {"Scores", "Progress", "Coefficients", "Search, select, report"}
    assert by_title["Progress"]["marks"] == len(losses)
    assert by_title["Progress"]["lines"] == 1
    assert by_title["Search, select, report"]["marks"] == 3 * 5

    # The winner's star opens the winner.
    browser.click(
        "return [...document.querySelectorAll('.scatterlayer .trace')]"
        ".find((t) => t.__data__[0].trace.name === 'winner' && t.querySelector('.point')"
        " && t.closest('.figure').dataset.details).querySelector('.point')"
    )
    panel = browser.until(
        "return document.querySelector('.details h3') && document.querySelector('.details').innerText"
    )
    assert panel.startswith(f"Candidate {history.winner_id}\n")
    assert f"evomerge show {run_copy} {history.winner_id}\n" in panel + "\n"
    assert browser.js("return document.querySelectorAll('.details .heatmaplayer image').length") > 0

    browser.js("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
    browser.click("return [...document.querySelectorAll('main > section > .code button')][0]")
    copied = browser.until("return window.copied")
    assert copied.startswith(f"# candidate {history.winner_id} ")
    assert browser.until("return [...document.querySelectorAll('.code button')].some((b) => b.innerText === 'copied')")

    browser.click("return [...document.querySelectorAll('nav a')].at(-1)")
    assert browser.until("return location.hash && scrollY > 500")

    # Hovering shows numbers; the camera saves a vector graphic.
    browser.js("Plotly.Fx.hover(document.querySelector('.figure'), [{curveNumber: 0, pointNumber: 0}])")
    assert "base" in browser.until("return document.querySelector('.figure .hoverlayer').textContent")
    assert browser.complaints() == []
    assert browser.asked() == []


def test_saves_vector_graphics(browser: Browser, run_copy: Path, tmp_path: Path) -> None:
    """The camera writes an SVG file on white, for papers, also from a dark page."""
    browser.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    checked(browser, write_page(History.read(run_copy)))
    browser.click("return document.querySelector('.modebar-btn')")
    end = time.monotonic() + 20
    while not (files := list((tmp_path / "downloads").glob("*.svg"))):
        assert time.monotonic() < end, "no file was saved"
        time.sleep(0.1)

    svg = files[0].read_text(encoding="utf-8")
    assert svg.startswith("<svg")
    assert "fill: rgb(255, 255, 255)" in svg
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [420, 1200, 2200])
def test_window_sizes(browser: Browser, made_history: Callable[..., History], width: int) -> None:
    """Phones, laptops and large screens: the page never runs over the window."""
    browser.driver.set_window_size(width, 900)

    checked(browser, write_page(made_history(fails=lambda i: "reason " * 40 if i % 5 == 1 else None)))


def test_live_run(browser: Browser, made_history: Callable[..., History]) -> None:
    checked(browser, write_page(made_history(finished=False)))


def test_lineage(browser: Browser, made_history: Callable[..., History]) -> None:
    drawn = checked(browser, write_page(made_history(parents=lambda i: (i - 2, i - 3) if i > 15 else ())))

    assert drawn[-1]["title"] == "Lineage"


def test_several_objectives(browser: Browser, front_run: History, tmp_path: Path) -> None:
    """The front is drawn; a click on a member opens it with its recipe and the command that exports it."""
    drawn = checked(browser, write_page(front_run, tmp_path / "front.html"))

    titles = [d["title"] for d in drawn]
    assert titles.count("Front") == 2
    assert titles.count("Progress") == 2
    front = drawn[titles.index("Front")]
    assert front["marks"] == sum("select" in e.results for e in front_run.entries.values())
    assert front["lines"] == 1

    browser.click(
        "return [...document.querySelectorAll('.scatterlayer .trace')]"
        ".find((t) => t.__data__[0].trace.name === 'front').querySelector('.point')"
    )
    panel = browser.until(
        "return document.querySelector('.details h3') && document.querySelector('.details').innerText"
    )
    number = int(panel.split("\n")[0].removeprefix("Candidate "))
    assert number in front_run.front
    assert f"evomerge export {front_run.path} {number} --to candidate-{number}" in panel
    assert "loss of second on select" in panel
    assert browser.complaints() == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_routes(browser: Browser, routed_run: History, tmp_path: Path, theme: str) -> None:
    """The winner's route is drawn with all its marks; opening another member of the front draws that one's."""
    browser.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    drawn = checked(browser, write_page(routed_run, tmp_path / "route.html"))
    route = next(d for d in drawn if d["title"] == "Route")
    # 3 hops and a ring on the repeated one; the path and the dotted line; the picture of the factors.
    assert (route["marks"], route["lines"], route["cells"]) == (4, 2, 1)
    text = browser.js(
        "const f = [...document.querySelectorAll('.figure')].find((d) => d.data.some((t) => t.name === 'factors'));"
        "Plotly.Fx.hover(f, [{curveNumber: 2, pointNumber: 1}]); return f.querySelector('.hoverlayer').textContent"
    )
    assert "hop 3: merged, layer 1, time 2" in text
    assert "in effect: attention times 1, mlp times 1" in text

    other = next(i for i in routed_run.front if i != routed_run.winner_id)
    browser.js(  # another mark may lie above the point
        "document.querySelector('.figure[data-details=candidates]').emit('plotly_click', "
        "{points: [{customdata: [arguments[0]]}]})",
        other,
    )
    panel = browser.until(
        "return document.querySelector('.details h3') && document.querySelector('.details').innerText"
    )
    assert panel.startswith(f"Candidate {other}\n")
    assert browser.js("return document.querySelectorAll('.details .scatterlayer .point').length") == 3
    assert browser.js("return document.querySelector('.details .figure').data[1].y") == [0, 0, 1]
    assert browser.complaints() == []


def test_an_archive(browser: Browser, small_experiment: Path, tmp_path: Path) -> None:
    """A cell of the archive's picture opens its candidate, with the command that exports it, where a reader sees it."""
    measures = [
        {"name": n, "tasks": [n], "metric": "accuracy", "low": 0.3, "high": 0.7, "cells": 4} for n in ("sums", "words")
    ]
    search = {"algorithm": "map-elites", "budget": {"evaluations": 30}, "finalists": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prepared, "evaluator", lambda _: partial(FakeEvaluator, metrics=("accuracy", "cross_entropy")))
        history = run(load(small_experiment, {"fitness.measures": measures, "search": search}), tmp_path / "run")
    drawn = checked(browser, write_page(history))
    assert [d["title"] for d in drawn].count("Archive") == 2

    tile = elites(history)[0]
    column, row = divmod(tile.cell, 4)
    browser.click(
        "const map = [...document.querySelectorAll('.figure')].find((f) => f.data && f.data[0].customdata"
        " && f.data[0].type === 'heatmap');"
        "const [x, y] = [map._fullLayout.xaxis, map._fullLayout.yaxis];"
        "const at = (a, u) => a._offset + a.l2p(0.35 + 0.1 * u);"
        "return {scrollIntoView: (how) => map.scrollIntoView(how), getBoundingClientRect: () => {"
        "const box = map.getBoundingClientRect();"
        f"return {{x: box.x + at(x, {column}), y: box.y + at(y, {row}), width: 0, height: 0}} }} }}"
    )
    panel = browser.until(
        "return document.querySelector('.details h3') && document.querySelector('.details').innerText"
    )
    assert panel.startswith(f"Candidate {tile.id}\n")
    assert f"evomerge export {history.path} {tile.id} --to candidate-{tile.id}" in panel
    assert browser.js("return document.querySelector('.details').getBoundingClientRect().y < innerHeight")
    assert browser.complaints() == []


def test_many_tasks_layers_and_experts(browser: Browser, made_history: Callable[..., History]) -> None:
    """40 tasks, 32 layers of 3 modules, 8 experts, long names, weights and densities."""
    experts = tuple(f"an-expert-with-a-long-name-{i}" for i in range(8))
    drawn = checked(browser, write_page(made_history(600, 40, 32, experts, method="ties")))

    assert sum(d["cells"] for d in drawn) == 2


def test_scripts_of_strangers_do_not_run(browser: Browser, made_history: Callable[..., History]) -> None:
    """Markup in a name stays text; and the policy stops a script that a page would hold all the same."""
    page = write_page(made_history(description="<img src=x onerror='window.hurt = 1'>"))
    checked(browser, page)
    assert browser.js("return window.hurt") is None

    page.write_text(page.read_text(encoding="utf-8").replace("<main>", "<main><script>window.hurt = 1</script>"))
    browser.open(page)
    assert browser.js("return window.hurt") is None
    assert any("Content Security Policy" in c for c in browser.complaints())
