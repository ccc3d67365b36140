"""A user's Python function: called with the live candidate, held to its contract, and kept from changing the model."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.check import check
from evomerge.config import load
from evomerge.errors import RunError, UserError
from evomerge.merge.live import load_tokenizer
from evomerge.prepare import Prepared, needed_metrics, prepare
from evomerge.proposal import Evaluation, Job, WorkUnit
from evomerge.recipe import Recipe
from evomerge.run import run
from evomerge.schema import validated
from evomerge.score.function import Function, FunctionPlan, changes, state
from evomerge.score.model import Altered
from evomerge.score.plan import PlanShape, Scorable, Target
from evomerge.tasks.base import Allowed
from evomerge.tasks.function import FunctionSpec

ALLOWED = Allowed(code=True)
LENGTHS = "def score(model, tokenizer, items):\n    return {'length': [len(i['text']) for i in items]}\n"
Task = Callable[..., FunctionSpec]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """task(code) -> a spec over forty rows, its function in judge.py."""

    def make(code: str = LENGTHS, function: str = "judge.py:score", **fields: Any) -> FunctionSpec:
        (tmp_path / "judge.py").write_text(code, encoding="utf-8")
        rows = [{"id": n, "text": "x" * (n + 1), "tags": [n]} for n in range(40)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        data = {"name": "t", "kind": "python", "function": function, "data": "rows.jsonl", **fields}
        spec = validated(FunctionSpec, {"metrics": {"length": "lower"}, **data}, "task").resolved(tmp_path)
        assert isinstance(spec, FunctionSpec)
        return spec

    return make


@pytest.fixture
def candidate(tiny_model: Any) -> Scorable:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model()).eval().requires_grad_(False)
    return Scorable(model, load_tokenizer(tiny_model()), lambda: 0.0)


def compiled(spec: FunctionSpec) -> FunctionPlan:
    return Function().compile(spec, spec.load(Path()), Target(None, 256, PlanShape()))


def scored(spec: FunctionSpec, candidate: Scorable, positions: tuple[int, ...] = (3, 0)) -> Any:
    return Function().score(candidate, compiled(spec), positions)


# -- the contract -------------------------------------------------------------------------------------------


def test_rows_in_numbers_out(task: Task, candidate: Scorable) -> None:
    """The asked rows arrive as dicts in order, with model and tokenizer; each metric is a float32 column."""
    code = """
import torch
def score(model, tokenizer, items):
    assert not model.training and torch.is_inference_mode_enabled()
    tokenizer.pad_token = "</s>"  # a copy of its own
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    best = model(ids).logits[0, -1].argmax().item()
    return {"length": [len(i.pop("text")) for i in items], "best": torch.full((len(items),), best), "more": []}
"""
    spec = task(code, metrics={"length": "lower", "best": "higher"})
    plan = compiled(spec)
    out = Function().score(candidate, plan, (3, 0))
    ids = torch.tensor([candidate.tokenizer("hello")["input_ids"]])

    assert set(out) == {"length", "best"}
    assert out["length"].dtype == np.float32
    assert out["length"].tolist() == [len(plan.rows[i]["text"]) for i in (3, 0)]
    assert out["best"].tolist() == [candidate.model(ids).logits[0, -1].argmax().item()] * 2
    assert candidate.tokenizer.pad_token == load_tokenizer(Path(candidate.model.name_or_path)).pad_token
    assert (spec.metric, spec.report_metric, spec.sign("length")) == ("length", "length", 1.0)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return [1.0, 2.0]", "should return a dict of metrics, got list"),
        ("return {'lenght': [1.0, 2.0]}", "gave no 'length'; did you mean 'lenght'?"),
        ("return {'length': [1.0]}", "'length' should have one number for each of 2 items, got shape (1,)"),
        ("return {'length': ['a', 'b']}", "'length' should be a list of numbers"),
        ("return {'length': [1.0, float('nan')]}", "'length' is nan at position 1"),
        ("return {'length': [items[9], 1.0]}", "raised IndexError: list index out of range (judge.py line 2)"),
    ],
)
def test_a_broken_answer_says_how(task: Task, candidate: Scorable, body: str, reason: str) -> None:
    """Wrong type, name, length or value, and exceptions with their line."""
    with pytest.raises(RunError) as caught:
        scored(task(f"def score(model, tokenizer, items):\n    {body}\n"), candidate)

    assert str(caught.value).startswith("task 't': the function")
    assert reason in str(caught.value)


# -- the model stays as it was --------------------------------------------------------------------------------

CHANGES = {
    "adds to a weight": "model.lm_head.weight.add_(1e-3)",
    "adds behind autograd's back": "model.model.norm.weight.data[3] += 1e-3",
    "swaps two rows": "w = model.lm_head.weight.data; w[[0, 1]] = w[[1, 0]]",
    "replaces a weight": "model.model.norm.weight.data = model.model.norm.weight.data.clone()",
    "casts": "model.half()",
    "replaces a layer": "model.lm_head = __import__('torch').nn.Linear(32, 512, bias=False)",
    "trains": "model.train()",
    "hooks": "model.lm_head.register_forward_hook(lambda *a: None)",
    "changes, then raises": "model.lm_head.weight.zero_(); 1 / 0",
}


@pytest.mark.parametrize("line", CHANGES.values(), ids=CHANGES)
def test_a_function_that_changes_the_model_is_caught(task: Task, candidate: Scorable, line: str) -> None:
    """Whatever it does to weights, modes or hooks."""
    code = f"def score(model, tokenizer, items):\n    {line}\n    return {{'length': [1.0] * len(items)}}\n"

    with pytest.raises(Altered, match="the function changed the model"):
        scored(task(code), candidate)


def test_generating_changes_nothing(candidate: Scorable) -> None:
    """What functions usually do is no false alarm, and every weight is looked at."""
    before = state(candidate.model)
    with torch.inference_mode():
        candidate.model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=2)

    assert changes(before, state(candidate.model)) == ""
    for name, p in candidate.model.named_parameters():
        kept = p.data.clone()
        p.data.view(-1)[-1] *= 1.5
        assert changes(before, state(candidate.model)) == f"weights of {name}"
        p.data.copy_(kept)


def test_the_next_candidate_is_clean(task: Task, experiment_with: Callable[..., Any], tmp_path: Path) -> None:
    """A function that spoils the first candidate's shared weights: it fails, those after it score as if it were not."""
    code = f"""
from pathlib import Path
def score(model, tokenizer, items):
    mark = Path({str(tmp_path / "mark")!r})
    if not mark.exists():
        mark.touch()
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.clone()
    return {{"length": [float(model.lm_head.weight.abs().sum() + model.model.embed_tokens.weight.sum())] * len(items)}}
"""
    prepared = prepare(experiment_with(fitness={"tasks": [task(code).model_dump()]}), allow=ALLOWED)
    one, two = (prepared.baselines()[n] for n in ("one", "two"))
    spoilt = prepared.evaluator()()
    results = [evaluated(prepared, spoilt, r) for r in (one, one, two, one)]
    clean = prepared.evaluator()()
    expected = [evaluated(prepared, clean, r).scores for r in (one, two, one)]

    assert results[0].status == "failed:error"
    assert "changed the model (weights of " in results[0].reason
    assert [r.scores["t"]["length"].tolist() for r in results[1:]] == [e["t"]["length"].tolist() for e in expected]
    assert expected[0]["t"]["length"][0] != expected[1]["t"]["length"][0]


def evaluated(prepared: Prepared, evaluator: Any, recipe: Recipe) -> Evaluation:
    [(result, _)] = evaluator.evaluate(WorkUnit(0, (Job(0, 0, recipe, prepared.items["report"]),)))
    return result


# -- loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        ("other.py:score", "", "there is no file .*other.py"),
        ("judge.py:scored", LENGTHS, "judge.py has no 'scored'; did you mean 'score'?"),
        ("judge.py:LIMIT", "LIMIT = 3", "judge.py:LIMIT is no function"),
        ("judge.py:score", "import nothing_of_the_kind", "cannot be imported .ModuleNotFoundError: No module named"),
        ("judge.py:score", "raise SystemExit(3)", "cannot be imported .SystemExit: 3"),
        ("nothing.of.the.kind:score", "", "nothing.of.the.kind cannot be imported .ModuleNotFoundError"),
        ("sys:exit", "", "sys has no source file"),
    ],
)
def test_check_finds_what_is_missing(task: Task, function: str, code: str, message: str) -> None:
    """Without calling anything: file, module, function."""
    with pytest.raises(UserError, match=f"^task 't': .*{message}"):
        compiled(task(code, function))


@pytest.mark.parametrize("function", ["score", "judge.py", "judge.py:", "a b:score", "judge.py:a.b", "../x:score"])
def test_a_reference_has_two_parts(task: Task, function: str) -> None:
    """A file ending in .py or a dotted module, a colon, a name."""
    with pytest.raises(UserError, match=r"function: expected path/to/file\.py:function or module:function"):
        task(function=function)


def test_an_installed_module_is_found_by_name(task: Task, candidate: Scorable) -> None:
    """`module:function` is imported as Python finds it."""
    plan = compiled(task(function="evomerge.score.function:columns"))

    assert plan.function == "evomerge.score.function:columns"
    assert len(plan.sha256) == 64


def test_helpers_beside_the_file_and_a_clean_path(task: Task, candidate: Scorable, tmp_path: Path) -> None:
    """Imports beside the file work while it is imported; sys.path is left as it was."""
    (tmp_path / "helper_of_judge.py").write_text("UNIT = 2.0\n")
    before = list(sys.path)
    code = "from helper_of_judge import UNIT\n" + LENGTHS.replace("len(", "UNIT * len(", 1)
    try:
        out = scored(task(code), candidate)
    finally:
        sys.modules.pop("helper_of_judge", None)

    assert sys.path == before
    assert all(v % 2 == 0 for v in out["length"])


def test_the_code_is_part_of_the_plan(task: Task, candidate: Scorable, tmp_path: Path) -> None:
    """Another text is another plan; a file that changed under a running search is an error, not a mix."""
    plan, again = compiled(task()), compiled(task())
    other = compiled(task(LENGTHS + "# changed\n"))

    assert plan.id == again.id != other.id
    assert pickle.loads(pickle.dumps(plan)).id == plan.id
    with pytest.raises(RunError, match=r"judge\.py:score changed since the run began"):
        Function().score(candidate, plan, (0,))


# -- permission, and the documented example -------------------------------------------------------------------


def test_nothing_runs_without_permission(task: Task, experiment_with: Callable[..., Any], tmp_path: Path) -> None:
    """Not even the import; with it, check names the work that it cannot know."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{LENGTHS}"
    experiment = experiment_with(fitness={"tasks": [task(code).model_dump()]})
    with pytest.raises(UserError, match="task 't' runs code that the experiment names; read it, then add --allow-code"):
        prepare(experiment)

    assert not (tmp_path / "ran").exists()
    assert check(experiment, ALLOWED).notes[0] == "task 't': what it computes is not known and not counted"
    assert (tmp_path / "ran").exists()


def test_the_same_experiment_elsewhere(task: Task, experiment_with: Callable[..., Any], tmp_path: Path) -> None:
    """A resume may find the function in another folder; its text counts, not its place."""
    spec = task()
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "judge.py").write_text(LENGTHS)
    there = spec.model_copy(update={"function": f"{moved / 'judge.py'}:score"})
    ids = [
        prepare(experiment_with(fitness={"tasks": [s.model_dump()]}), allow=ALLOWED).experiment_id
        for s in (spec, there)
    ]

    assert ids[0] == ids[1]


def test_the_example_counts_exact_sums(quickstart: Path) -> None:
    """fitness/exact_sums.py on the addition expert and on the base: the expert adds, and stops by itself."""
    from transformers import AutoModelForCausalLM

    spec = load("exact-sums").tasks[0]
    plan = Function().compile(spec, spec.load(Path()), Target(None, 512, PlanShape()))
    some = plan.splits["report"][:20]
    out = {}
    for name in ("skills-base", "skills-add"):
        folder = quickstart / "models" / name
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        scorable = Scorable(model, load_tokenizer(folder), lambda: 0.0)
        out[name] = Function().score(scorable, plan, some)
        alone = [Function().score(scorable, plan, (i,))["exact"][0] for i in some[:5]]
        assert alone == out[name]["exact"][:5].tolist()

    assert out["skills-add"]["exact"].mean() > 0.8 > 0.3 > out["skills-base"]["exact"].mean()
    assert out["skills-add"]["tokens"].max() <= 6


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    """A short search with a worker process, beside a multiple-choice task."""
    experiment = load("exact-sums", {"search.budget": {"evaluations": 6}})
    history = run(experiment, tmp_path / "run", allow=ALLOWED)

    assert {e["status"] for e in history.evaluations} == {"ok"}
    assert needed_metrics(experiment)["sums"] == ("exact",)
    assert history.winner is not None
