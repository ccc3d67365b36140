"""Bad input from the command line: one line that says what to do, status 2, nothing written, nothing expensive done."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from evomerge.cli import main

Data = dict[str, Any]
TinyModel = Callable[..., Path]
Spoil = Callable[[Data, Path, TinyModel], None]
"""Changes a good experiment, or the files of its own folder."""


@pytest.fixture
def good(small_experiment: Path, tmp_path: Path) -> tuple[Data, Path]:
    """The small experiment as data, in a folder of its own with its own copies of models and items."""
    folder = tmp_path / "experiment"
    shutil.copytree(small_experiment.parent, folder)
    data = json.loads(small_experiment.read_text())
    shutil.copytree(data["models"]["base"], folder / "base")
    data["models"] = {"base": "base", "experts": {"one": "one", "two": "two"}}
    for task in data["fitness"]["tasks"]:
        task["splits"] = {s: str(folder / p) for s, p in task["splits"].items()}
    return data, folder


def expert_of(arch: str, **config: Any) -> Spoil:
    def spoil(data: Data, folder: Path, make: TinyModel) -> None:
        data["models"]["experts"]["one"] = str(make(arch, 1, **config))

    return spoil


def keys(**changes: Any) -> Spoil:
    def spoil(data: Data, folder: Path, make: TinyModel) -> None:
        for key, value in changes.items():
            *path, last = key.split("__")
            here: Any = data
            for part in path:
                here = here[int(part) if part.isdigit() else part]
            here[int(last) if last.isdigit() else last] = value

    return spoil


def gone(data: Data, folder: Path, make: TinyModel) -> None:
    shutil.rmtree(folder / "two")


def pickled(data: Data, folder: Path, make: TinyModel) -> None:
    (folder / "two" / "model.safetensors").unlink()
    (folder / "two" / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def truncated(data: Data, folder: Path, make: TinyModel) -> None:
    file = folder / "two" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def other_tokens(data: Data, folder: Path, make: TinyModel) -> None:
    file = folder / "two" / "tokenizer.json"
    tokenizer = json.loads((folder / "base" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(tokenizer))


def items(*rows: Data, name: str = "rows.jsonl") -> Spoil:
    def spoil(data: Data, folder: Path, make: TinyModel) -> None:
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        data["fitness"]["tasks"][0]["splits"]["search"] = str(folder / name)

    return spoil


def code(data: Data, folder: Path, make: TinyModel) -> None:
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\ndef f(model, tokenizer, items): ...\n")
    task = {"name": "mine", "kind": "python", "function": "mine.py:f", "metrics": {"x": "higher"}}
    data["fitness"]["tasks"][0] = {**task, "splits": data["fitness"]["tasks"][0]["splits"]}


def known_question(data: Data, folder: Path, make: TinyModel) -> None:
    rows = (Path(__file__).parent / "assets" / "eval" / "arc.jsonl").read_text().splitlines()
    splits = {}
    for split, row in zip(("search", "select", "report"), rows, strict=False):
        splits[split] = str(folder / f"arc_{split}.jsonl")
        Path(splits[split]).write_text(row + "\n")
    data["fitness"]["tasks"][0] = {"name": "arc", "preset": "arc", "splits": splits}


def long_items(data: Data, folder: Path, make: TinyModel) -> None:
    items({"question": "a b c " * 200, "choices": ["1", "2"], "gold": 0})(data, folder, make)


def plain_text(data: Data, folder: Path, make: TinyModel) -> None:
    splits = data["fitness"]["tasks"][0]["splits"]
    data["fitness"]["tasks"][0] = {"name": "texts", "kind": "perplexity", "splits": splits, "text": "question"}


def other_units(data: Data, folder: Path, make: TinyModel) -> None:
    texts = {"name": "texts", "kind": "perplexity", "text": "{question}", "data": "sums_search.jsonl"}
    data["fitness"]["tasks"].append(texts)
    data["fitness"]["constraints"] = [{"name": "kept", "kind": "forgetting", "at_most": 0.02}]


TASK = "fitness__tasks__0__"
CASES: dict[str, tuple[Spoil, str]] = {
    "missing model folder": (gone, "two: no such model folder"),
    "pickled checkpoint": (pickled, "which can run code and are not read; convert them to safetensors first"),
    "truncated safetensors": (truncated, "not a whole safetensors file"),
    "another architecture": (expert_of("gpt2"), "expert 'one'"),
    "another width": (expert_of("llama", hidden_size=48), "expert 'one'"),
    "another number of layers": (expert_of("llama", num_hidden_layers=3), "3 layers, but the base has 2"),
    "token with another id": (other_tokens, "another tokenizer: token"),
    "a way out of that": (other_tokens, "take the base that this expert was trained from, or leave the expert out"),
    "folder that is not there": (keys(models__base="models/nope"), "experiment/models/nope, and HF_HUB_OFFLINE is set"),
    "experts as a list": (keys(models__experts=["one"]), "models.experts: expected a mapping, such as {name: value}"),
    "no experts": (keys(models__experts={}), "models.experts: expected 1 or more entries, got an empty mapping"),
    "budget in words": (
        keys(search__budget="lots"),
        "search.budget: expected a mapping with keys such as evaluations, minutes, item_evaluations, got 'lots'",
    ),
    "task in words": (
        keys(fitness__tasks=["sums"]),
        "fitness.tasks.0: expected a mapping with keys such as name, kind",
    ),
    "encoder-decoder": (keys(models__base="t5"), "t5"),
    "misspelt key": (keys(serach={}), "unknown key 'serach'; did you mean 'search'?"),
    "unknown algorithm": (keys(search__algorithm="cma"), "unknown algorithm 'cma'; did you mean 'cma-es'?"),
    "unknown space": (keys(search_space="per-layr"), "unknown search space 'per-layr'; did you mean 'per-layer'?"),
    "unknown method": (keys(search_space__method="dare"), "unknown method 'dare'"),
    "reversed bounds": (keys(search_space__axes__weight={"low": 1, "high": 0}), "`low < high` must hold"),
    "budget of zero": (keys(search__budget={"evaluations": 0}), "search.budget.evaluations"),
    "unknown kind of task": (keys(**{f"{TASK}kind": "generative"}), "kind: should be one of multiple_choice"),
    "unknown metric": (keys(**{f"{TASK}metric": "acuracy"}), "unknown metric 'acuracy'; did you mean 'accuracy'?"),
    "unknown preset": (keys(**{f"{TASK}preset": "gsm9k"}), "gsm8k"),
    "preset without its language": (
        keys(**{f"{TASK}preset": "mgsm"}),
        "preset 'mgsm' needs a language; choose one of mgsm-bn, mgsm-de",
    ),
    "text of perplexity without a field": (plain_text, "expected a template with a field in braces, such as {text}"),
    "items beyond the model": (long_items, "task 'sums': 1 of 15 items have more than the 256 tokens"),
    "forgetting over several units": (
        other_units,
        "kept would add up losses in different units (cross_entropy of sums, cross_entropy of words, bits_per_byte of",
    ),
    "generation without a target": (
        keys(**{TASK[:-2]: {"name": "sums", "kind": "generation", "max_tokens": 4, "data": "sums_search.jsonl"}}),
        "the field 'target'",
    ),
    "empty task file": (items(), "holds no items"),
    "item without choices": (items({"question": "a", "gold": 0}), "rows.jsonl line 1: the field 'choices'"),
    "data of an unknown format": (items({"question": "a"}, name="rows.xlsx"), "rows.xlsx"),
    "code without permission": (code, "read it, then add --allow-code"),
    "test set in the search": (known_question, "--allow-test-set"),
    "several objectives for a scalar search": (
        keys(fitness__objectives=[{"name": "a", "tasks": ["sums"]}, {"name": "b", "tasks": ["words"]}]),
        "cma-es minimises one loss, the fitness has 2 objectives (a, b); use nsga-ii",
    ),
    "one objective for a Pareto search": (keys(search__algorithm="nsga-ii"), "the fitness has one; use cma-es"),
    "an objective over no task": (keys(fitness__objectives=[{"name": "a", "tasks": ["sum"]}]), "did you mean 'sums'?"),
    "layers past the last": (
        keys(search_space__groups=[{"name": "a", "match": {"layers": [1, 7]}}]),
        "layers",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(
    case: str,
    good: tuple[Data, Path],
    tiny_model: TinyModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Status 2, one line on stderr with the reason, nothing on stdout, no run directory."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    data, folder = good
    spoil, words = CASES[case]
    spoil(data, folder, tiny_model)
    (folder / "bad.yaml").write_text(json.dumps(data))

    status = main(["run", str(folder / "bad.yaml"), "--out", str(tmp_path / "out")])

    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("evomerge: ")]
    assert (status, out, len(said)) == (2, "", 1), err
    assert words in said[0]
    assert len(said[0]) < 500
    assert not (tmp_path / "out").exists()
    assert not (folder / "ran").exists()


def test_the_good_one_is_good(good: tuple[Data, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """What all cases spoil is fine before."""
    data, folder = good
    (folder / "good.yaml").write_text(json.dumps(data))

    assert main(["check", str(folder / "good.yaml")]) == 0
    assert "fits together" in capsys.readouterr().out
