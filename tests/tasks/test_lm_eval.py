"""lm-eval's documents as items, and what is refused before anything is scored."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import UserError
from evomerge.prepare import load_items
from evomerge.schema import validated
from evomerge.tasks.base import NOTHING, Allowed, Item
from evomerge.tasks.lm_eval import LmEvalSpec

ROWS: list[dict[str, object]] = [
    {"question": f"q{n}", "choices": ["a", f"b{n}"], "gold": n % 2, "topic": f"t{n // 3}"} for n in range(30)
]
OTHERS = [{**row, "question": f"other {n}"} for n, row in enumerate(ROWS)]
Folder = Callable[..., Path]


def spec(folder: Path | None, **fields: Any) -> LmEvalSpec:
    data = {"name": "t", "kind": "lm_eval", "task": "mine", "include_path": folder and str(folder), **fields}
    return validated(LmEvalSpec, data, "task")


def loaded(folder: Path, **fields: Any) -> tuple[Item, ...]:
    return spec(folder, **fields).load(Path())


def message(folder: Path, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        loaded(folder, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- items ----------------------------------------------------------------------------------------------------


def test_documents_are_cut_by_content(lm_eval_task: Folder) -> None:
    """Shares by hash, the same for any order of the documents; names are lm-eval's numbers."""
    forward = loaded(lm_eval_task(ROWS))
    backward = loaded(lm_eval_task(ROWS[::-1]))

    def by_text(items: tuple[Item, ...]) -> dict[str, str]:
        return {i.content.fields["question"]: i.split for i in items}

    assert by_text(forward) == by_text(backward)
    assert Counter(i.split for i in forward).keys() == {"search", "select", "report"}
    assert {i.id: i.content.fields["question"] for i in forward} == {f"doc-{n}": f"q{n}" for n in range(30)}


def test_training_docs_for_the_search(lm_eval_task: Folder) -> None:
    """`data` and named splits are lm-eval's docs, the first `limit` of each."""
    folder = lm_eval_task(ROWS, training=OTHERS)
    items = loaded(folder, data="training", splits={"search": 0.6, "select": 0.4, "report": "test"}, limit=20)

    assert {i.id for i in items if i.split == "report"} == {f"test-{n}" for n in range(20)}
    assert {i.id for i in items if i.split != "report"} == {f"training-{n}" for n in range(20)}
    assert "has no validation docs, only training, test" in message(folder, data="validation")
    assert "splits must be disjoint" in message(
        lm_eval_task(ROWS, training=ROWS), data="training", splits={"search": 0.6, "select": 0.4, "report": "test"}
    )


def test_groups_stay_together(lm_eval_task: Folder) -> None:
    """`group_by` names a field of the documents."""
    folder = lm_eval_task(ROWS)
    items = loaded(folder, group_by="topic", splits={"search": 0.4, "select": 0.3, "report": 0.3})

    assert len({(i.content.fields["topic"], i.split) for i in items}) == 10
    assert "docs have no 'topics'; did you mean 'topic'?" in message(folder, group_by="topics")


# -- permissions ----------------------------------------------------------------------------------------------


def test_own_yamls_may_run_code(lm_eval_task: Folder, tmp_path: Path) -> None:
    """A folder's YAML can name functions: nothing of it is imported without --allow-code."""
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\ndef judge(doc, results):\n    return {{'acc': 1.0}}\n"
    task = spec(lm_eval_task(ROWS, files={"judge.py": code}, process_results="judge.judge"))
    with pytest.raises(UserError, match="runs code that the experiment names; read it, then add --allow-code"):
        load_items([task], NOTHING)

    assert not mark.exists()
    assert len(load_items([task], Allowed(code=True))["t"]) == 30
    assert mark.exists()


def test_benchmarks_are_not_searched_on() -> None:
    """An installed task's scored docs are what papers report; its training docs are free, reports too."""
    with pytest.raises(UserError, match=r"would search on what lm-eval's 'arc_easy' is reported on.*--allow-test-set"):
        load_items([spec(None, task="arc_easy")], NOTHING)
    half = {"search": "training", "select": "validation", "report": "test"}

    assert spec(None, task="arc_easy", splits=half).test_set is not None
    assert spec(None, task="arc_easy", data="training").test_set is None
    assert spec(None, data="training", splits={"search": 0.5, "select": 0.5, "report": "test"}).test_set is None
    assert not spec(None, task="arc_easy").runs_code


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "settings", "expected"),
    [
        ({"task": "mime"}, {}, "lm-eval has no task 'mime'; did you mean 'mine'?"),
        ({"metric": "acc_norm"}, {}, "has no metric 'acc_norm'; did you mean 'acc'?"),
        (
            {},
            {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]},
            "'acc' lower is better; say so with metrics: {acc:",
        ),
        (
            {"metric": "f1"},
            {"metric_list": [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]},
            "aggregates 'f1' by f1_score; only means over docs can be searched by item",
        ),
        ({"filter": "strict"}, {}, "has no filter 'strict'; known: none"),
        ({"num_fewshot": 2}, {"num_fewshot": 0}, "is fixed to num_fewshot: 0 by its own YAML"),
        ({}, {"unsafe_code": True}, "runs the code that the model writes"),
        ({}, {"dataset_path": "nobody/nothing", "dataset_kwargs": None}, "'mine' cannot be loaded ("),
        ({}, {"doc_to_text": "{{ 1 / 0 }}"}, "'mine' cannot be loaded (ZeroDivisionError"),
        (
            {"metric": "exact_match"},
            {
                "output_type": "generate_until",
                "doc_to_choice": None,
                "generation_kwargs": {"do_sample": True, "temperature": 0.7, "until": ["\n"]},
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            },
            "samples its answers, which no run repeats",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    lm_eval_task: Folder, fields: dict[str, Any], settings: dict[str, Any], expected: str
) -> None:
    """Names, metrics, directions, data: found when the task is loaded."""
    assert expected in message(lm_eval_task(ROWS, **settings), **fields)


def test_a_group_names_its_tasks(lm_eval_task: Folder) -> None:
    """Each task is an entry of its own, with its own place in the tables."""
    folder = lm_eval_task(ROWS, tag="both")
    (folder / "all.yaml").write_text("group: everything\ntask: [mine, theirs]\n")

    assert "'everything' is a group; give each of its tasks an entry: mine, theirs" in message(
        folder, task="everything"
    )
    assert "'both' is a group; give each of its tasks an entry: mine" in message(folder, task="both")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"splits": {"search": 0.5, "select": 0.5, "report": "tests.jsonl"}}, "report: expected a share or one of"),
        ({"data": "train"}, "data"),
        ({"num_fewshots": 1}, "did you mean 'num_fewshot'"),
        ({"batch_size": "auto"}, "batch_size"),
        ({"metrics": {"acc": "up"}}, r"metrics\.acc"),
    ],
)
def test_keys_are_checked_without_lm_eval(fields: dict[str, Any], expected: str) -> None:
    """Reading an experiment imports nothing of it."""
    with pytest.raises(UserError, match=expected):
        spec(None, **fields)


def test_directions_and_defaults() -> None:
    """Higher is better unless said otherwise; the reported metric is the searched one."""
    task = spec(None, metric="acc_norm", metrics={"loss": "lower"})

    assert task.report_metric == "acc_norm"
    assert task.directions == {"acc_norm": "higher", "loss": "lower"}


def test_without_lm_eval_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It names the extra."""
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)

    assert "install it with pip install 'evomerge[lm-eval]'" in message(tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    """Named as it was looked for."""
    assert f"include_path: there is no folder {tmp_path / 'gone'}" in message(tmp_path / "gone")


@pytest.mark.slow
def test_an_installed_task_is_found_by_name() -> None:
    """Its folder is remembered relative to lm-eval's own, so that workers skip the index of all tasks."""
    from evomerge.tasks.lm_eval import task_folder

    assert task_folder("arc_easy", None) == "arc"
    with pytest.raises(UserError, match="'mmlu' is a group; give each of its tasks an entry: mmlu_"):
        task_folder("mmlu", None)


def test_a_mistyped_name_is_refused_without_lm_evals_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unparsed files tell that no task has a name, and which file a task is in; its index is not built for that."""
    from evomerge.tasks import lm_eval

    def refuse() -> None:
        raise AssertionError("the index was built")

    monkeypatch.setattr(lm_eval, "_installed", refuse)

    with pytest.raises(UserError, match="lm-eval has no task 'arc_eesy'; did you mean 'arc_easy'"):
        lm_eval.task_folder("arc_eesy", None)
    assert lm_eval.task_folder("arc_challenge", None) == "arc"
