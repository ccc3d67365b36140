"""What the page of a run says and draws, against the run itself; no browser (test_browser.py has one)."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evomerge.history import History
from evomerge.proposal import Evaluation
from evomerge.report.coefficients import coefficient_maps
from evomerge.report.front import progress as front_progress
from evomerge.report.page import MAX_POINTS, run_page, verdict, write_page
from evomerge.report.results import Comparison, Results, Score, results
from evomerge.report.routes import route_figure, route_of
from evomerge.report.status import status_of

HOSTILE = "</script><img src=x onerror=alert(1)>\"'<b>"


class Page(HTMLParser):
    """Figures, panels of details, tags and the visible text of a page."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.figures: list[dict[str, Any]] = []
        self.details: list[dict[str, Any]] = []
        self.tags: list[str] = []
        self.text = ""
        self._into: list[dict[str, Any]] | None = None
        self._hidden = False
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        kind = dict(attrs).get("class")
        if kind in ("figure", "details"):
            self._into = self.figures if kind == "figure" else self.details
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if self._hidden and self._into is not None and data.startswith("{"):
            self._into.append(json.loads(data))
            self._into = None
        elif not self._hidden:
            self.text += data

    def axis(self, title: str) -> dict[str, Any]:
        """The one figure whose x axis has this title."""
        (found,) = [f for f in self.figures if title in f["layout"]["xaxis"].get("title", {}).get("text", "")]
        return found


@pytest.fixture(scope="module")
def finished(finished_run: Path) -> History:
    return History.read(finished_run)


@pytest.fixture(scope="module")
def page(finished: History) -> Page:
    return Page(run_page(finished))


def points(figure: dict[str, Any]) -> dict[int, float]:
    return {
        c[0]: y for t in figure["data"] if t["mode"] == "markers" for c, y in zip(t["customdata"], t["y"], strict=True)
    }


def test_scores_are_those_of_the_table(finished: History, page: Page) -> None:
    """The figure of scores has every cell of the table, with its interval."""
    drawn = {}
    for t in page.axis("is better)")["data"]:
        for x, up, down, (model, task, _) in zip(
            t["x"], t["error_x"]["array"], t["error_x"]["arrayminus"], t["customdata"], strict=True
        ):
            drawn[model, task] = (x, x - down, x + up)

    assert drawn == {(s.model, s.task): pytest.approx((s.score, s.low, s.high)) for s in results(finished).table}


def test_differences_are_those_of_the_comparisons(finished: History, page: Page) -> None:
    drawn = {
        (model, task): x
        for t in page.axis("difference in")["data"]
        for x, (model, task, _) in zip(t["x"], t["customdata"], strict=True)
    }

    assert drawn == {(c.model, c.task): pytest.approx(c.difference) for c in results(finished).comparisons}


def test_progress_has_every_candidate(finished: History, page: Page) -> None:
    """All candidates with their losses, and a best so far that only falls and ends at the best."""
    figure = page.axis("in the order they were asked")
    losses = {r["id"]: r["loss"] for r in finished.evaluations if r["split"] == "search"}
    (best,) = [t["y"] for t in figure["data"] if t["mode"] == "lines"]

    assert points(figure) == pytest.approx(losses)
    assert best == sorted(best, reverse=True)
    assert best[-1] == min(x for i, x in losses.items() if finished.entry(i).role != "baseline")
    assert [t["name"] for t in figure["data"] if t["name"] == "winner"] == ["winner"]


def test_details_open_every_point(finished: History, page: Page) -> None:
    """Each point has a record, commands with its number, and the coefficients of its recipe."""
    (panel,) = page.details
    ((picture),) = panel["pictures"]
    number = max(finished.entries)

    assert {int(i) for i in panel["rows"]} == set(points(page.axis("in the order they were asked")))
    assert panel["commands"][0] == f"evomerge show {finished.path} {{}}"
    (only,) = coefficient_maps({number: finished.recipe(number)}, finished.manifest)[:1]
    assert picture["values"][str(number)] == pytest.approx([x for row in only.values[number] for x in row], rel=5e-3)


def test_the_recipe_and_the_commands_are_whole(finished: History, page: Page) -> None:
    assert finished.winner_id is not None
    assert f"# candidate {finished.winner_id} (" in page.text
    for words in ("run", "resume", "show", "export", "verify", "report", "status"):
        assert f"evomerge {words} " in page.text
    assert f"evomerge run {finished.path}/experiment.yaml" in page.text


def test_coefficients_of_blocks(made_history: Any) -> None:
    """The heat map has the winner's coefficients: every block and expert, a column each, or shared where equal."""
    history = made_history(layers=3, experts=("code", "math"), method="ties")
    winner = history.recipe(history.winner_id)
    weight, density, lam = coefficient_maps({0: winner}, history.manifest)

    assert (weight.name, density.name, lam.name, lam.constant) == ("weight", "density", "lambda", 1.0)
    assert weight.rows == ("code", "math")
    assert weight.columns[:4] == ("embed", "attention 0", "attention 1", "attention 2")
    assert weight.columns[-2:] == ("final norm", "head")
    for j, name in ((1, "layers.0.attention"), (6, "layers.2.mlp"), (len(weight.columns) - 1, "head")):
        rule = winner.blocks[name]
        for i, source in enumerate(weight.rows):
            assert weight.values[0][i][j] == rule.sources[source]["weight"]
            assert density.values[0][i][j] == rule.sources[source]["density"]


@pytest.mark.parametrize(
    ("groups", "columns"),
    [("all", ("all blocks",)), ("layers", ("embed", "layer 0", "layer 1", "layer 2", "final norm, head"))],
)
def test_equal_neighbours_share_a_column(made_history: Any, groups: str, columns: tuple[str, ...]) -> None:
    history = made_history(layers=3, groups=groups)
    (weight, _) = coefficient_maps({0: history.recipe(history.winner_id)}, history.manifest)

    assert weight.columns == columns


# -- the verdict ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "low", "high", "words"),
    [
        ("accuracy", 0.01, 0.09, "beats the best baseline, 'add'"),
        ("accuracy", -0.01, 0.09, "is not told apart from the best baseline, 'add'"),
        ("accuracy", -0.09, -0.01, "is worse than the best baseline, 'add'"),
        ("accuracy", -math.inf, math.inf, "has too few items to be compared with the best baseline, 'add'"),
        ("cross_entropy", -0.09, -0.01, "beats the best baseline, 'base'"),
        ("cross_entropy", 0.01, 0.09, "is worse than the best baseline, 'base'"),
    ],
)
def test_the_verdict_follows_the_interval(finished: History, metric: str, low: float, high: float, words: str) -> None:
    """The best baseline is the one with the best mean in the metric's direction; only clear intervals are a win."""
    tasks = [t.model_copy(update={"report_metric": metric}) for t in finished.experiment.tasks]
    fitness = finished.experiment.fitness.model_copy(update={"tasks": tuple(tasks)})
    history = replace(finished, experiment=finished.experiment.model_copy(update={"fitness": fitness}))
    means = {"base": 0.3, "add": 0.5, "winner": 0.6}
    table = [Score(m, "mean", metric, "report", x, x - 0.1, x + 0.1, 9) for m, x in means.items()]
    rivals = [Comparison(m, "mean", metric, "report", (low + high) / 2, low, high, 0.5, 9) for m in ("base", "add")]
    number = max(finished.entries)

    said = verdict(history, Results(table, rivals, number, {}, 0, 1), status_of(history))

    assert said.startswith(f"The winner, candidate {number}, {words}: mean {metric} 0.600 against")


def test_a_winner_that_was_there_before(finished: History) -> None:
    """No baseline is sold as a find."""
    assert finished.final is not None
    history = replace(finished, final={**finished.final, "winner": 1})

    assert "found nothing better than 'one', which was there before" in Page(run_page(history)).text


# -- runs that are not whole ------------------------------------------------------------------------------------


def test_a_live_run_at_every_event(run_copy: Path) -> None:
    """The page of a run that was cut off anywhere is drawn, and says that it is not finished."""
    journal = run_copy / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    unfinished = 0
    for n in range(1, len(lines), 3):
        journal.write_bytes(b"".join(lines[:n]))
        history = History.read(run_copy)
        text = Page(run_page(history)).text
        if history.winner_id is None:
            unfinished += 1
            assert "This run is not finished" in text
            assert "evomerge resume" in text
        else:
            assert "The run goes on (final)" in text
    assert unfinished > 5


def test_best_so_far_is_beside_the_baselines(made_history: Any) -> None:
    """A live run compares its best candidate on the search split, and warns that these items chose it."""
    page = Page(run_page(made_history(finished=False)))

    assert {t["name"] for t in page.axis("is better)")["data"]} == {"base", "code", "math", "uniform", "best so far"}
    assert "chosen by these very items" in page.text


def test_failures(made_history: Any) -> None:
    """Failed candidates are counted by reason, drawn apart, and open like others."""
    history = made_history(fails=lambda i: "no memory for 7 GiB" if i % 4 == 1 else None)
    page = Page(run_page(history))
    failed = [e.id for e in history.entries.values() if e.scores("search") is None]
    (drawn,) = [t for t in page.axis("in the order they were asked")["data"] if t["name"] == "failed"]

    assert drawn["x"] == failed
    assert re.search(rf"no memory for 7 GiB\s*search\s*{len(failed)}", page.text)
    assert f"{len(failed)} evaluations failed" in page.text
    assert "failed:error no memory for 7 GiB" in page.details[0]["rows"][str(failed[0])]


def test_all_candidates_failed(made_history: Any) -> None:
    history = made_history(finished=False, fails=lambda i: "broken" if i > 3 else None)

    assert "40 evaluations failed" in Page(run_page(history)).text

    failed = Evaluation("failed:oom", None, "no memory")
    entries = {i: replace(e, results={"search": failed}) for i, e in history.entries.items()}
    assert "44 evaluations failed" in Page(run_page(replace(history, entries=entries))).text


def test_lineage_where_there_are_parents(made_history: Any) -> None:
    """The winner's ancestors and nobody else, with an edge from each parent."""
    history = made_history(parents=lambda i: (i - 3, i - 5) if i > 20 else ())
    page = Page(run_page(history))
    lines, nodes = page.figures[-1]["data"]
    ancestors, todo = set(), [history.winner_id]
    while todo:
        i = todo.pop()
        if i not in ancestors:
            ancestors.add(i)
            todo += history.entry(i).parents

    assert set(nodes["x"]) == ancestors
    edges = {(a, b) for a, b in zip(lines["x"][::3], lines["x"][1::3], strict=True)}
    assert edges == {(p, i) for i in ancestors for p in history.entry(i).parents}
    assert "Lineage" not in Page(run_page(made_history())).text


def test_recipes_that_cannot_be_told(finished: History) -> None:
    """A genome that does not decode to its recipe, as after accepted drift, costs its coefficients only."""
    number = finished.winner_id
    assert number is not None
    entries = {**finished.entries, number: replace(finished.entries[number], recipe_id="0" * 64)}
    page = Page(run_page(replace(finished, entries=entries)))
    ((picture),) = page.details[0]["pictures"]

    assert page.text.count(f"candidate {number} decodes to another recipe than the journal names") == 2
    assert str(number) in page.details[0]["rows"]
    assert str(number) not in picture["values"]
    assert len(picture["values"]) > 10


# -- strangers' names, long runs ----------------------------------------------------------------------------------


def test_hostile_names_stay_text(made_history: Any) -> None:
    """Descriptions, names, reasons and software versions from files and workers add no element to the page."""

    def page_with(word: str) -> Page:
        history = made_history(description=word, fails={6: word}.get)
        entries = {i: replace(e, name=word if i == 7 else e.name) for i, e in history.entries.items()}
        facts = {**history.facts, "numerics": {"device": word, "torch": word}}
        return Page(run_page(replace(history, entries=entries, facts=facts)))

    plain, hostile = page_with("word"), page_with(HOSTILE)

    assert hostile.tags == plain.tags
    assert hostile.text.count(HOSTILE) >= 4
    for figure in hostile.figures:
        assert "<img" not in json.dumps(figure)


@pytest.mark.parametrize(
    ("candidates", "tasks", "layers", "experts", "method"),
    [
        (20_000, 3, 2, 2, "task_arithmetic"),
        pytest.param(3_000, 40, 32, 8, "ties", marks=pytest.mark.slow),
    ],
)
def test_long_runs_make_no_huge_pages(
    made_history: Any, candidates: int, tasks: int, layers: int, experts: int, method: str, tmp_path: Path
) -> None:
    """Below 8 MB; improvements, baselines and the winner are always among the points."""
    history = made_history(candidates, tasks, layers, tuple(f"expert-{i}" for i in range(experts)), method=method)
    target = write_page(history, tmp_path / "page.html")
    page = Page(target.read_text(encoding="utf-8"))
    figure = page.axis("in the order they were asked")
    shown = points(figure)
    (best,) = [t["x"] for t in figure["data"] if t["mode"] == "lines"]

    assert target.stat().st_size < 8e6
    assert 1000 < len(shown) <= MAX_POINTS
    assert {*best[:-1], history.winner_id, *(e.id for e in history.baselines.values())} <= set(shown)
    assert f"of {len(history.entries):,} candidates" in page.text


def test_written_whole_in_place_of_a_link(finished: History, tmp_path: Path) -> None:
    """The page replaces an older one, or a link, and never writes through a link."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious", encoding="utf-8")
    target = tmp_path / "page.html"
    target.symlink_to(elsewhere)

    assert write_page(finished, target) == target
    assert elsewhere.read_text(encoding="utf-8") == "precious"
    assert not target.is_symlink()
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_a_result_without_scores_is_no_score(finished: History) -> None:
    """A winner that failed on report leaves the table of baselines, and the page stands."""
    assert finished.winner_id is not None
    entries = dict(finished.entries)
    winner = entries[finished.winner_id]
    entries[winner.id] = replace(winner, results={**winner.results, "report": Evaluation("failed:oom", None, "x")})

    text = Page(run_page(replace(finished, entries=entries))).text

    assert "failed:oom" in text


def test_several_objectives(front_run: History) -> None:
    """The front by its losses on select, every objective's progress, the hypervolume, and a verdict on the front."""
    page = Page(run_page(front_run))
    scatter, growth = page.axis("loss of first"), page.axis("candidates scored")
    progress = [
        f for f in page.figures if "the order they were asked" in f["layout"]["xaxis"].get("title", {}).get("text", "")
    ]
    members = {i: tuple(front_run.losses(front_run.entry(i), "select")) for i in front_run.front}

    marks = [t for t in scatter["data"] if t["mode"] == "markers"]
    at = {c[0]: (x, y) for t in marks for c, x, y in zip(t["customdata"], t["x"], t["y"], strict=True)}
    assert {i: at[i] for i in members} == members
    assert set(at) == {e.id for e in front_run.entries.values() if "select" in e.results}
    [step] = [t for t in scatter["data"] if t["mode"] == "lines"]
    assert list(zip(step["x"], step["y"], strict=True)) == sorted(members.values())
    assert list(zip(growth["data"][0]["x"], growth["data"][0]["y"], strict=True)) == front_progress(front_run)
    assert len(progress) == 2
    for j, figure in enumerate(progress):
        assert points(figure) == {e.id: front_run.losses(e, "search")[j] for e in front_run.entries.values()}
    said = verdict(front_run, results(front_run, "report"), status_of(front_run))
    assert said.startswith(f"The front on the select split has {len(members)} members")
    assert f"candidate {front_run.winner_id}, which the tables call the winner" in said


def test_the_page_of_a_route(routed_run: History) -> None:
    """Picture and words of the winner's route, its merged part as coefficients, and every route in the details."""
    around, through = (e.id for e in routed_run.entries.values() if e.role == "given")
    words = {i: route_of(routed_run, i) or "" for i in (around, through)}
    page = Page(run_page(routed_run))
    picture = page.axis("depth in the routed model")
    (panel,) = page.details

    assert picture == json.loads(json.dumps(route_figure(routed_run.recipe(through), routed_run.manifest)))
    assert f"{words[through]}." in page.text
    assert "those that its route goes through as 'merged'" in page.text
    assert all(w in page.text for w in words.values())
    assert set(panel["drawings"]) == {str(around), str(through)}
    assert panel["drawings"][str(through)] == picture
    maps = [p["values"] for p in panel["pictures"]]
    assert any(str(through) in values for values in maps)
    assert not any(str(around) in values for values in maps)

    other = Page(run_page(replace(routed_run, final={**(routed_run.final or {}), "winner": around})))
    assert "goes through no merged layer: it has no coefficients" in other.text
    assert other.axis("depth in the routed model")["data"][1]["y"] == [0, 0, 1]


def test_pages_without_routes_have_no_section_for_them(page: Page) -> None:
    assert "Route" not in page.text
    assert page.details[0]["drawings"] == {}


def test_sources_of_another_depth_are_named(made_history: Any, manifest_of: Any) -> None:
    """Models that only routes go through stand beside those that are merged, with their depth."""
    history = made_history()
    manifest = replace(
        history.manifest,
        layers={**history.manifest.layers, "deep": 4},
        hashes={**history.manifest.hashes, "deep": "f" * 64},
        layouts={"deep": manifest_of(4).tensors},
    )

    assert "base and code, math;" in Page(run_page(history)).text
    assert "for routes also deep of 4 layers" in Page(run_page(replace(history, manifest=manifest))).text
