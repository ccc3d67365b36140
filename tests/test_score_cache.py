"""The score cache: results by recipe and item, put together where they were scored in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.commit import Committer, ScoreCache
from evomerge.journal import Journal, read
from evomerge.proposal import Evaluation, ItemSet
from evomerge.recipe import Recipe
from evomerge.rundir import RunDirectory
from evomerge.workers.fake import FakeEvaluator
from evomerge.workers.inline import InlineExecutor

ALL = ItemSet("all", {"a": (0, 1, 2, 3), "b": (7, 5)})
PARTS = (ItemSet("first", {"a": (3, 0), "b": (5,)}), ItemSet("second", {"a": (2, 1), "b": (7,)}))
RECIPES = [Recipe.model_validate({"base": f"base-{i}", "merge": []}) for i in range(3)]


def scored(items: ItemSet, factor: float = 1.0) -> Evaluation:
    return Evaluation("ok", {t: {"m": np.array(at, np.float32) * factor} for t, at in items.tasks.items()})


def same(a: Evaluation | None, b: Evaluation) -> bool:
    assert a is not None
    assert a.scores is not None
    assert b.scores is not None
    pairs = [(a.scores[t][m], b.scores[t][m]) for t in b.scores for m in b.scores[t]]
    return a.status == b.status and {*a.scores} == {*b.scores} and all(np.array_equal(x, y) for x, y in pairs)


def test_parts_make_a_whole() -> None:
    """Items scored in two parts answer for all of them, in the order that is asked for; one part alone does not."""
    cache = ScoreCache()
    cache.add("r", PARTS[0], scored(PARTS[0]))

    assert cache.get("r", ALL) is None
    cache.add("r", PARTS[1], scored(PARTS[1]))
    assert same(cache.get("r", ALL), scored(ALL))
    assert same(cache.get("r", PARTS[0]), scored(PARTS[0]))
    assert cache.get("another", ALL) is None


def test_parts_by_task() -> None:
    """Parts that hold different tasks make a whole too."""
    cache = ScoreCache()
    for task in ("a", "b"):
        part = ItemSet(task, {task: ALL.tasks[task]})
        cache.add("r", part, scored(part))

    assert same(cache.get("r", ALL), scored(ALL))


def test_a_subset_of_what_is_known() -> None:
    """A smaller set is answered from a larger one."""
    cache = ScoreCache()
    cache.add("r", ALL, scored(ALL))

    assert same(cache.get("r", PARTS[1]), scored(PARTS[1]))


def test_failures_answer_for_their_own_items_only() -> None:
    """A failure is remembered for the same items; on others the recipe is tried anew."""
    cache = ScoreCache()
    cache.add("r", PARTS[0], Evaluation("failed:nan", reason="no"))

    known = cache.get("r", PARTS[0])
    assert known is not None
    assert known.status == "failed:nan"
    assert cache.get("r", PARTS[1]) is None
    cache.add("r", PARTS[1], scored(PARTS[1]))
    assert cache.get("r", ALL) is None


class Counting(FakeEvaluator):
    """Remembers what it evaluated."""

    seen: list[tuple[int, str]]

    def evaluate(self, unit: Any) -> Any:
        Counting.seen += [(j.proposal, j.items.name) for j in unit.jobs]
        return super().evaluate(unit)


Open = Callable[[], Committer]


@pytest.fixture
def committer(tmp_path: Path) -> Iterator[Open]:
    """committer() -> a committer over the journal so far, as a new process would open it."""
    Counting.seen = []
    with ExitStack() as opened:

        def make() -> Committer:
            opened.close()
            rundir = opened.enter_context(RunDirectory(tmp_path / "run"))
            journal = opened.enter_context(Journal(tmp_path / "run" / "journal.jsonl"))
            return opened.enter_context(closing(Committer(journal, InlineExecutor(Counting), rundir, lambda: False)))

        yield make


def commit(c: Committer, proposal: int, recipe: Recipe, items: ItemSet) -> Evaluation:
    c.submit([(proposal, recipe)], items)
    return c.commit(proposal, recipe, items)


def test_duplicates_are_answered_from_the_journal(committer: Open, tmp_path: Path) -> None:
    """The same recipe again, in parts and as a whole, before and after a resume: evaluated once, told as cached."""
    c = committer()
    first = commit(c, 0, RECIPES[0], PARTS[0])
    again = commit(c, 1, RECIPES[0], PARTS[0])
    c = committer()  # a resume: replays both, then goes on
    assert same(commit(c, 0, RECIPES[0], PARTS[0]), first)
    commit(c, 1, RECIPES[0], PARTS[0])
    commit(c, 2, RECIPES[0], PARTS[0])
    commit(c, 3, RECIPES[0], PARTS[1])
    whole = commit(c, 4, RECIPES[0], ALL)
    events, _ = read(tmp_path / "run" / "journal.jsonl")

    assert same(again, first)
    assert Counting.seen == [(0, "first"), (3, "second")]
    assert [e.get("cached", False) for e in events] == [False, True, True, False, True]
    assert whole.scores is not None
    assert {t: len(c["accuracy"]) for t, c in whole.scores.items()} == {"a": 4, "b": 2}


def test_only_missing_items_are_evaluated(committer: Open, tmp_path: Path) -> None:
    """All items behind some of them: the others alone go out, also after a resume, and the result is whole."""
    c = committer()
    part = commit(c, 0, RECIPES[0], PARTS[0])
    whole = commit(c, 0, RECIPES[0], ALL)
    assert (c.evaluated, Counting.seen) == (6, [(0, "first"), (0, "all")])
    events, _ = read(tmp_path / "run" / "journal.jsonl")
    c = committer()

    assert part.scores is not None
    assert whole.scores is not None
    assert same(commit(c, 0, RECIPES[0], PARTS[0]), part)
    assert same(commit(c, 0, RECIPES[0], ALL), whole)
    assert (c.evaluated, len(Counting.seen)) == (6, 2)
    place = [ALL.tasks["a"].index(p) for p in PARTS[0].tasks["a"]]
    assert np.array_equal(whole.scores["a"]["accuracy"][place], part.scores["a"]["accuracy"])
    assert [e["items"] for e in events] == [PARTS[0].id, ALL.id]


def test_missing_items_are_counted_by_scores() -> None:
    """Nothing is known: all; a part is: the rest, in order; a failure: all."""
    cache = ScoreCache()

    assert cache.missing("r", ALL) is ALL
    cache.add("r", PARTS[1], Evaluation("failed:nan", reason="no"))
    assert cache.missing("r", ALL) is ALL
    cache.add("r", PARTS[0], scored(PARTS[0]))
    assert cache.missing("r", ALL).tasks == {"a": (1, 2), "b": (7,)}
    cache.add("r", ALL, scored(ALL))
    assert cache.missing("r", ALL).count == 0


def test_equal_recipes_of_one_group(committer: Open) -> None:
    """Of equal recipes in one group the first is evaluated, the others are answered from it."""
    c = committer()
    group = [(0, RECIPES[0]), (1, RECIPES[1]), (2, RECIPES[0])]
    c.submit(group, ALL)
    results = [c.commit(i, r, ALL) for i, r in group]

    assert same(results[2], results[0])
    assert not same(results[1], results[0])
    assert Counting.seen == [(0, "all"), (1, "all")]


# -- gradients --------------------------------------------------------------------------------------------------

ASKED = (("a", "accuracy"), ("b", "accuracy"))


def test_a_gradient_is_answered_by_a_gradient_only() -> None:
    """Scores answer no question for a gradient, one on other items neither; a gradient's result answers for scores."""
    cache = ScoreCache()
    cache.add("r", ALL, scored(ALL))
    gradients = {t: np.ones((2, 3), np.float32) for t in ALL.tasks}
    assert cache.get("r", ALL, gradients=True) is None

    e = replace(scored(PARTS[0]), gradients=gradients)
    cache.add("s", PARTS[0], e, gradients=True)
    assert cache.get("s", PARTS[0], gradients=True) is e
    assert cache.get("s", PARTS[1], gradients=True) is None
    plain = cache.get("s", PARTS[0])
    assert same(plain, e)
    assert plain is not None
    assert plain.gradients is None
    cache.add("s", PARTS[1], scored(PARTS[1]))
    assert same(cache.get("s", ALL), scored(ALL))


def test_a_failed_gradient_says_nothing_about_scores() -> None:
    """What ran out of memory for its gradient may still have scores; what failed for scores is tried for a gradient."""
    cache = ScoreCache()
    cache.add("r", ALL, Evaluation("failed:oom", reason="no"), gradients=True)
    cache.add("s", ALL, Evaluation("failed:nan", reason="no"))

    assert cache.get("r", ALL) is None
    known = cache.get("r", ALL, gradients=True)
    assert known is not None
    assert known.status == "failed:oom"
    assert cache.get("s", ALL, gradients=True) is None


def test_gradients_are_told_as_they_were_asked_for(tmp_path: Path) -> None:
    """With gradient, its duplicate from the cache, without: so they stand in the journal, and so they come back."""
    out = tmp_path / "run"
    results: list[list[Evaluation]] = []
    for _ in range(2):  # the second time from the journal alone
        Counting.seen = []
        with ExitStack() as opened:
            rundir = opened.enter_context(RunDirectory(out))
            journal = opened.enter_context(Journal(out / "journal.jsonl"))
            executor = InlineExecutor(Counting)
            c = opened.enter_context(
                closing(Committer(journal, executor, rundir, lambda: False, gradient_shape=(2, 3)))
            )
            got = []
            for proposal, asked in enumerate((ASKED, ASKED, (), ASKED)):
                items = PARTS[1] if proposal == 3 else ALL
                c.submit([(proposal, RECIPES[0])], items, gradients=asked)
                got.append(c.commit(proposal, RECIPES[0], items, gradients=asked))
            assert c.evaluated == 4 * (ALL.count + PARTS[1].count)
            results.append(got)
    events, _ = read(out / "journal.jsonl")

    assert Counting.seen == []
    assert [("gradients" in e, e.get("cached", False)) for e in events] == [
        (True, False),
        (True, True),
        (False, True),
        (True, False),
    ]
    for first, again in zip(*results, strict=True):
        assert same(again, first)
        assert (first.gradients is None) == (again.gradients is None)
        for t in first.gradients or ():
            assert again.gradients is not None
            assert np.array_equal(first.gradients[t], again.gradients[t])  # type: ignore[index]


def test_a_waiting_gradient_survives_a_kill(tmp_path: Path) -> None:
    """A result that came before its turn is found by the next driver, with its gradient, and not evaluated again."""
    out = tmp_path / "run"

    def committer(opened: ExitStack) -> Committer:
        rundir = opened.enter_context(RunDirectory(out))
        journal = opened.enter_context(Journal(out / "journal.jsonl"))
        executor = InlineExecutor(Counting)
        return opened.enter_context(closing(Committer(journal, executor, rundir, lambda: False, gradient_shape=(2, 3))))

    Counting.seen = []
    with ExitStack() as opened:
        c = committer(opened)
        c.submit([(0, RECIPES[0]), (1, RECIPES[1])], ALL, gradients=ASKED)
        c.commit(1, RECIPES[1], ALL, gradients=ASKED)  # the other arrives meanwhile, and the driver ends
    with ExitStack() as opened:
        c = committer(opened)
        c._journal.take("told")
        c.submit([(0, RECIPES[0])], ALL, gradients=ASKED)
        e = c.commit(0, RECIPES[0], ALL, gradients=ASKED)

    assert Counting.seen == [(0, "all"), (1, "all")]
    assert e.gradients is not None
    assert e.gradients["a"].shape == (2, 3)
