"""Runs with sampled items: what is scored on what, what the winner is chosen by, and that workers change nothing."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.check import check
from evomerge.config import load
from evomerge.errors import UserError
from evomerge.evaluate import MergeEvaluator
from evomerge.history import History
from evomerge.items import samples
from evomerge.journal import read
from evomerge.proposal import ItemSet
from evomerge.report.page import run_page
from evomerge.report.results import text_table
from evomerge.report.status import candidate, candidate_text, status, status_text
from evomerge.run import run

With = Callable[..., Any]
ADAPTIVE: dict[str, Any] = {
    "search.items": {"policy": "adaptive", "start": 4, "grow": 2.0},
    "search.budget": {"evaluations": 14},
}
ADAPTIVE["search.probes"] = False
HALVING = {"search.items": {"policy": "halving", "rungs": [4, 100], "keep": 0.5}}


@pytest.fixture(scope="module")
def evaluated() -> Counter[str]:
    """Items that were really scored in `adaptive_run`, by item set."""
    return Counter()


@pytest.fixture(scope="module")
def adaptive_run(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory, evaluated: Counter[str]) -> Path:
    out = tmp_path_factory.mktemp("items") / "adaptive"
    evaluate = MergeEvaluator.evaluate

    def counted(self: MergeEvaluator, unit: Any) -> Any:
        for job in unit.jobs:
            evaluated[job.items.name] += job.items.count
        return evaluate(self, unit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MergeEvaluator, "evaluate", counted)
        run(load(small_experiment, ADAPTIVE), out)
    return out


@pytest.fixture(scope="module")
def halving_run(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("items") / "halving"
    run(load(small_experiment, HALVING), out)
    return out


def told(out: Path) -> list[tuple[str, int, int]]:
    """(item set, rung, candidate) in the order of the journal."""
    events = read(out / "journal.jsonl")[0]
    name = {e["id"]: e["name"] for e in events if e["kind"] == "items"}
    return [(name[e["items"]], e["rung"], e["id"]) for e in events if e["kind"] == "told"]


def test_generations_share_fresh_items(adaptive_run: Path) -> None:
    """Four candidates a generation on one sample; baselines, the best of the last generation and the mean on all."""
    at = told(adaptive_run)

    assert at[:4] == [("search", 0, i) for i in range(4)]
    sampled = [(n, i) for n, _, i in at if n.startswith("search ")]
    assert [i for _, i in sampled] == list(range(4, 18))
    assert [n for n, _ in sampled] == [f"search 0.{(i - 4) // 4}.0" for i in range(4, 18)]
    later = [i for n, _, i in at[4:] if n == "search"]
    # The budget cut the last generation to two, so the best come from the whole one before it.
    assert len(later) == 4
    assert {*later[:3]} <= {12, 13, 14, 15}
    assert later[3] == 20  # 18 and 19 are what the cut generation had left
    entries = History.read(adaptive_run).entries
    assert [i for i, e in entries.items() if e.role == "mean"] == [20]


def test_the_winner_was_scored_in_full(adaptive_run: Path) -> None:
    """Finalists have all items of search and select; nobody is one for its score on a sample."""
    h = History.read(adaptive_run)
    assert h.final is not None

    for i in h.final["finalists"]:
        entry = h.entry(i)
        assert {"search", "select"} <= {*entry.results}
        scores = entry.scores("search")
        assert scores is not None
        assert {t: len(c["accuracy"]) for t, c in scores.items()} == {"sums": 12, "words": 12}
    assert {*h.final["finalists"]} >= {0, 1, 2, 3, 20}


def test_a_sample_is_a_part_of_the_whole(adaptive_run: Path) -> None:
    """Who was scored on a sample and then in full has the same scores on the sample's items, to rounding."""
    h = History.read(adaptive_run)
    both = [e for e in h.entries.values() if e.samples and "search" in e.results]

    assert len(both) == 3
    for e in both:
        [(name, sampled)] = e.samples.items()
        whole = e.scores("search")
        assert whole is not None
        assert sampled.scores is not None
        for task, at in h.samples[name].tasks.items():
            expected = whole[task]["cross_entropy"][list(at)]
            assert np.array_equal(sampled.scores[task]["cross_entropy"], expected)


def test_items_are_counted_as_they_are_evaluated(adaptive_run: Path, evaluated: Counter[str]) -> None:
    """What the history counts is what the evaluator did."""
    h = History.read(adaptive_run)

    assert sum(h.evaluated.values()) == sum(evaluated.values())
    assert h.evaluated["select"] == evaluated["select"]
    assert h.in_full == 24 * 19
    assert h.evaluated["search"] < h.in_full


def test_sizes_follow_the_correlation(adaptive_run: Path) -> None:
    """The next generation's items are those that the policy makes of this one's correlation, read from the journal."""
    h = History.read(adaptive_run)
    whole = ItemSet("search", {t: tuple(range(len(ids))) for t, ids in h.item_ids["search"].items()})
    size = 4.0

    assert [g.members for g in h.generations] == [(4,), (4,), (4,), (2,)]
    for g, after in zip(h.generations, h.generations[1:], strict=False):
        size = min(max(size / 1.15 if g.correlation >= 0.4 else size * 2.0, 4.0), 24.0)
        assert after.items == (samples(whole, [round(size)], (3, 0), after.group)[0].count,)


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_a_cut_run_ends_as_a_whole_one(share: float, adaptive_run: Path, experiment_with: With, tmp_path: Path) -> None:
    """Cut off within a generation, resumed: the same journal to the byte."""
    whole = (adaptive_run / "journal.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    shutil.copytree(adaptive_run, tmp_path / "out")
    (tmp_path / "out" / "journal.jsonl").write_bytes(b"".join(lines[: int(len(lines) * share)]) + b'{"torn')
    run(experiment_with(**ADAPTIVE), tmp_path / "out")

    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_two_workers_write_the_same(adaptive_run: Path, experiment_with: With, tmp_path: Path) -> None:
    """Two processes instead of the driver itself: the same journal to the byte."""
    run(experiment_with(**ADAPTIVE, **{"workers.backend": "local", "workers.count": 2}), tmp_path / "out")

    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == (adaptive_run / "journal.jsonl").read_bytes()


def test_a_halving_run(halving_run: Path, experiment_with: With, tmp_path: Path) -> None:
    """Half of each generation goes on to all items; a cut between the rungs changes nothing."""
    at = told(halving_run)
    search = [(n, r, i) for n, r, i in at if n.startswith("search") and i >= 4]

    # At the end one of the three best that stopped on the first rung is scored in full, and the mean.
    assert [r for _, r, _ in search] == ([0] * 4 + [1] * 2) * 3 + [0, 0]
    for g in range(3):
        first, second = search[6 * g : 6 * g + 4], search[6 * g + 4 : 6 * g + 6]
        assert {n for n, _, _ in first} == {f"search 0.{g}.0"}
        assert {n for n, _, _ in second} == {"search"}
        assert {i for *_, i in second} < {i for *_, i in first}
    h = History.read(halving_run)
    assert h.evaluated["search"] == 24 * 4 + 3 * (4 * 4 + 2 * 20) + 20 + 24
    whole = (halving_run / "journal.jsonl").read_bytes()
    cut = whole.index(b'"rung":1')
    shutil.copytree(halving_run, tmp_path / "out")
    (tmp_path / "out" / "journal.jsonl").write_bytes(whole[: whole.rindex(b"\n", 0, cut) + 1])
    run(experiment_with(**HALVING), tmp_path / "out")
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == whole


@pytest.mark.parametrize("budget", [60, 150])
def test_a_budget_of_items_is_kept(budget: int, experiment_with: With, tmp_path: Path) -> None:
    """The search spends about its item evaluations, beside baselines and what is scored in full at the end."""
    settings = {**ADAPTIVE, "search.budget": {"item_evaluations": budget}}
    h = run(experiment_with(**settings), tmp_path / "out")
    spent = sum(i * m for g in h.generations for i, m in zip(g.items, g.members, strict=True))

    assert spent <= budget
    assert spent > budget - 2 * 24
    s = status(tmp_path / "out")
    assert s["sampled"]["used"] == h.evaluated["search"]


def test_a_raised_budget_goes_on(adaptive_run: Path, experiment_with: With, tmp_path: Path) -> None:
    """More candidates behind the end: the cut generation is completed on its own items."""
    shutil.copytree(adaptive_run, tmp_path / "out")
    h = run(experiment_with(**{**ADAPTIVE, "search.budget": {"evaluations": 20}}), tmp_path / "out")

    assert [g.members for g in h.generations] == [(4,)] * 5
    assert h.looks == 2


def test_reports_tell_what_was_saved(adaptive_run: Path) -> None:
    """Status, table, page and one candidate's text."""
    h = History.read(adaptive_run)
    share = f"({h.evaluated['search'] / h.in_full:.0%})"

    assert f"of the 456 item evaluations of full scoring on search {share}" in status_text(status(adaptive_run))
    assert f"of the 456 item evaluations of full scoring on search {share}" in text_table(h)
    page = run_page(h)
    assert "split-half rank correlation" in page
    assert "456 item evaluations of full scoring" in page
    assert "# search 0.0.0 " in candidate_text(h, candidate(h, 4))


def test_sampled_items_are_another_experiment(experiment_with: With, adaptive_run: Path) -> None:
    """The policy is a part of the identity; `full`, said or not, is none, so that old runs go on."""
    from evomerge.prepare import prepare

    def identity(**more: Any) -> str:
        return prepare(experiment_with(**more)).experiment_id

    assert identity() == identity(**{"search.items": "full"})
    assert identity() != identity(**ADAPTIVE)
    assert identity(**ADAPTIVE) == History.read(adaptive_run).facts["experiment_id"]


def test_check_says_that_items_are_sampled(experiment_with: With) -> None:
    """No time is promised for work that is not known, and no number of candidates under a budget of items."""
    c = check(experiment_with(**ADAPTIVE))
    assert (c.candidates, c.seconds_at_least) == (14, None)
    assert any("a candidate takes about 4 of the 24 at first" in n for n in c.notes)
    c = check(experiment_with(**{**ADAPTIVE, "search.budget": {"item_evaluations": 100}}))
    assert c.candidates is None
    with pytest.raises(UserError, match=r"stage 1 gets no candidate \(one takes 4 item evaluations\)"):
        check(experiment_with(**{**ADAPTIVE, "search.budget": {"item_evaluations": 3}}))
