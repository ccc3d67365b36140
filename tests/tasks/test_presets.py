"""Presets: lm-eval's own prompts, from the hub's columns, the plain shape, CSV and parquet."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evomerge.config import load
from evomerge.errors import UserError
from evomerge.fitness import FitnessSpec
from evomerge.schema import validated
from evomerge.tasks import KINDS, TaskSpec
from evomerge.tasks.multiple_choice import MultipleChoiceSpec
from evomerge.tasks.presets import expanded, preset_files, presets

TESTS = Path(__file__).parents[1]
ASSETS = TESTS / "assets" / "eval"
GOLDENS = json.loads((TESTS / "goldens" / "tasks.json").read_text(encoding="utf-8"))["prompts"]
CHOICES = ("arc", "mmlu", "blimp", "xcopa-it", "xcopa-tr", "xcopa-zh")
ANSWERS = ("gsm8k", "mgsm-de", "mgsm-es", "mgsm-zh", "svamp")

Rows = list[dict[str, Any]]


def task(preset: str, **more: Any) -> TaskSpec:
    return validated(FitnessSpec, {"tasks": [{"preset": preset, "data": "x.jsonl", **more}]}, "fitness").tasks[0]


def read(name: str) -> Rows:
    return [json.loads(line) for line in (ASSETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(spec: TaskSpec, path: Path) -> list[Any]:
    return [spec.parse(row).content for row in spec.rows(path, "test")]


def as_csv(path: Path, rows: Rows) -> Path:
    """Rows with lists and mappings spread over columns A, B, C, ..., as only text fits into a cell."""
    flat = []
    for row in rows:
        choices = row.get("choices", [])
        choices = choices["text"] if isinstance(choices, dict) else choices
        plain = {k: v for k, v in row.items() if k != "choices"}
        names = ("choice1", "choice2") if "relation" in row else "ABCDE"
        flat.append({**plain, **dict(zip(names, choices, strict=False))})
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(flat)
    return path


def as_parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", CHOICES)
def test_hub_columns_give_lm_evals_prompts(name: str) -> None:
    """Prompt, choices and the right one of lm-eval's own task file; its blank before the choice ends our prompt."""
    got = contents(task(name), ASSETS / f"{name}.hub.jsonl")

    assert len(got) == len(GOLDENS[name]) > 2
    for mine, theirs in zip(got, GOLDENS[name], strict=True):
        assert mine.prompt == (theirs["prompt"] + " " if theirs["prompt"] else "")
        assert list(mine.choices) == theirs["choices"]
        assert mine.gold == theirs["gold"]


@pytest.mark.parametrize("name", [n for n in ANSWERS if n in GOLDENS])
def test_hub_columns_give_lm_evals_questions(name: str) -> None:
    """The prompt of lm-eval's own task file, and the number that its target ends with."""
    got = contents(task(name), ASSETS / f"{name}.hub.jsonl")

    for mine, theirs in zip(got, GOLDENS[name], strict=True):
        assert mine.prompt == theirs["prompt"]
        assert mine.targets == (theirs["target"].rpartition("#### ")[2],)


def test_svamp_joins_body_and_question() -> None:
    """SVAMP's own columns make the question, its float answers the target."""
    first = contents(task("svamp"), ASSETS / "svamp.hub.jsonl")[0]

    assert first.prompt.endswith("on each pack How much do you have to pay to buy each pack?\nAnswer:")
    assert first.targets == ("51.0",)


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("shape", ["", ".hub"])
@pytest.mark.parametrize("name", CHOICES + ANSWERS)
def test_every_format_reads_alike(name: str, shape: str, form: str, tmp_path: Path) -> None:
    """The plain shape and the hub's, as JSONL, CSV, TSV and parquet, give the same contents."""
    rows = read(name + shape)
    path = tmp_path / f"x.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    elif form == "parquet":
        as_parquet(path, rows)
    else:
        as_csv(path, rows)

    got = contents(task(name), path)

    wanted = contents(task(name), ASSETS / f"{name}.jsonl")
    if name == "svamp":
        assert [float(c.targets[0]) for c in got] == [float(c.targets[0]) for c in wanted]
    else:
        assert got == wanted


def test_few_shot_examples_have_columns_too(tmp_path: Path) -> None:
    """Examples are read like the items, here with their rationale as the answer; an item is never its own example."""
    first = (ASSETS / "gsm8k.hub.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "one.jsonl").write_text(first + "\n", encoding="utf-8")
    splits = {
        "search": str(tmp_path / "one.jsonl"),
        "select": str(ASSETS / "mgsm-de.jsonl"),
        "report": str(ASSETS / "mgsm-es.jsonl"),
    }
    few = {"data": str(ASSETS / "gsm8k.hub.jsonl"), "count": 2, "answer": " {answer}"}
    shots = task("gsm8k", splits=splits, few_shot=few).load(tmp_path)[0].content.shots

    assert {s.answer for s in shots} == {" " + r["answer"] for r in read("gsm8k.hub")[1:]}
    assert all(s.prompt.startswith("Question: ") and s.prompt.endswith("\nAnswer:") for s in shots)


def test_every_preset_is_a_task() -> None:
    """All presets are complete tasks of a known kind under their own names, each file with its source."""
    assert {"gsm8k", "svamp", "arc", "mmlu", "blimp", "xcopa-it", "mgsm-de"} <= set(presets())
    for name in presets():
        spec = task(name)
        assert spec.name == name
        assert spec.kind in KINDS
        assert spec.preset is None
    for file, _ in preset_files().values():
        assert "lm-evaluation-harness" in file.description


def test_every_key_can_be_given() -> None:
    """A task's own keys hide the preset's."""
    spec: Any = task("arc", name="mine", prompt="Q: {question} ", metric="cross_entropy")

    assert (spec.name, spec.prompt, spec.metric, spec.choices) == ("mine", "Q: {question} ", "cross_entropy", "options")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"preset": "gsm9k"}, "unknown preset 'gsm9k'; did you mean 'gsm8k'?"),
        ({"preset": 7}, "unknown preset 7"),
        ({"preset": ["arc"]}, "unknown preset ['arc']"),
        ({"preset": "arc", "promt": "x"}, "unknown key 'tasks.0.promt'"),
    ],
)
def test_wrong_presets_are_one_line(data: dict[str, Any], words: str) -> None:
    """Unknown presets, and unknown keys beside known ones, are named."""
    with pytest.raises(UserError) as caught:
        validated(FitnessSpec, {"tasks": [{"data": "x.jsonl", **data}]}, "fitness")

    assert words in str(caught.value)


def test_presets_belong_to_a_fitness() -> None:
    """A task that is read by itself does not pass over its preset."""
    with pytest.raises(UserError, match="preset: is known in a fitness"):
        validated(MultipleChoiceSpec, {"name": "t", "data": "x.jsonl", "preset": "arc"}, "task")


def test_what_is_no_task_is_left_alone() -> None:
    """Data without a preset comes back as it was, to be complained of elsewhere."""
    assert [expanded(x) for x in ({"name": "t"}, 3, None, {"preset": None})] == [
        {"name": "t"},
        3,
        None,
        {"preset": None},
    ]


def test_resolved_experiments_hold_their_presets(small_experiment: Path, tmp_path: Path) -> None:
    """The resolved experiment names no preset any more, and reads back to the same."""
    path = tmp_path / "x.jsonl"
    path.write_text((ASSETS / "mmlu.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    fitness = {"tasks": [{"preset": "mmlu", "data": str(path), "choice": "{choice}"}]}
    resolved = load(small_experiment, {"fitness": fitness})
    text = resolved.to_yaml()
    (tmp_path / "again.yaml").write_text(text, encoding="utf-8")

    assert "preset" not in text
    assert load(tmp_path / "again.yaml") == resolved
