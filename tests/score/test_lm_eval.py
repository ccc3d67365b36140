"""lm-eval on the live candidate: its own numbers, document by document; and ours, and plain transformers'."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from evomerge.config import load
from evomerge.errors import RunError, UserError
from evomerge.merge.live import load_tokenizer
from evomerge.prepare import prepare
from evomerge.proposal import Job, WorkUnit
from evomerge.run import run
from evomerge.schema import validated
from evomerge.score.lm_eval import LmEval, LmEvalPlan
from evomerge.score.model import NonFinite
from evomerge.score.multiple_choice import MultipleChoice
from evomerge.score.plan import PlanShape, Scorable, Target
from evomerge.standalone import score_folder
from evomerge.tasks.base import Allowed
from evomerge.tasks.lm_eval import LmEvalSpec
from evomerge.tasks.multiple_choice import MultipleChoiceSpec

Folder = Callable[..., Path]


def stock(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def scorable(folder: Path) -> Scorable:
    return Scorable(stock(folder), load_tokenizer(folder), lambda: 0.0)


def spec(folder: Path, **fields: Any) -> LmEvalSpec:
    data = {"name": "t", "kind": "lm_eval", "task": "mine", "include_path": str(folder), **fields}
    return validated(LmEvalSpec, data, "task")


def compiled(task: LmEvalSpec, model: Path, limit: int = 512) -> LmEvalPlan:
    target = Target(load_tokenizer(model), limit, PlanShape())
    return LmEval().compile(task, task.load(Path()), target)


def rows_of(path: Path, count: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def reference(folder: Path, model: Path, **settings: Any) -> dict[int, dict[str, Any]]:
    """Document -> what lm-eval's own evaluation of the whole task logs for it."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(pretrained=stock(model), tokenizer=load_tokenizer(model), batch_size=16)
    with mock.patch("lm_eval.evaluator.add_env_info"):  # asks pip and the compiler for their versions, for seconds
        found = simple_evaluate(lm, tasks=["mine"], task_manager=manager, bootstrap_iters=0, **settings)
    return {s["doc_id"]: s for s in found["samples"]["mine"]}


def place(plan: LmEvalPlan) -> list[int]:
    """lm-eval's document number of every item."""
    return [int(name.rpartition("-")[2]) for name in plan.item_ids]


# -- the same task three ways --------------------------------------------------------------------------------


def plainly(model: Any, tokenizer: Any, prompt: str, choices: list[str]) -> list[float]:
    """Summed log-probability of each choice: the usual way, rows padded on the right, all logits, in float64."""
    start = len(tokenizer(prompt)["input_ids"])
    rows = [tokenizer(prompt + choice)["input_ids"] for choice in choices]
    width = max(map(len, rows))
    with torch.no_grad():
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])
        seen = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows])
        log_p = model(padded, attention_mask=seen).logits.double().log_softmax(-1)
    return [sum(float(log_p[c, at - 1, ids[at]]) for at in range(start, len(ids))) for c, ids in enumerate(rows)]


@pytest.mark.parametrize(("count", "shots"), [(60, 0), (40, 2)])
def test_plan_lm_eval_and_plain_transformers_agree(
    quickstart: Path, lm_eval_task: Folder, count: int, shots: int
) -> None:
    """Items of a skill: equal accuracy, log-probabilities within 1e-4, with and without few-shot examples."""
    model = quickstart / "models" / "skills-attr"
    rows = rows_of(quickstart / "data" / "skill_attr.jsonl", count)
    examples = rows_of(quickstart / "data" / "skill_attr_cal.jsonl", shots)
    folder = lm_eval_task(
        rows, num_fewshot=shots, fewshot_config={"sampler": "first_n", "samples": examples} if shots else {}
    )
    theirs = compiled(spec(folder), model)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    prefix = "".join(f"{e['question']}{e['choices'][e['gold']]}\n\n" for e in examples)
    ours = validated(MultipleChoiceSpec, {"name": "t", "data": str(data), "prefix": prefix}, "task")
    target = Target(load_tokenizer(model), 512, PlanShape())
    plan = MultipleChoice().compile(ours, ours.load(Path()), target)
    candidate, everything = scorable(model), tuple(range(len(rows)))

    sums = {
        int(name.rpartition("-")[2]): s
        for name, s in zip(
            plan.item_ids, MultipleChoice().choice_logprobs(candidate.model, plan, everything), strict=True
        )
    }
    logged = reference(folder, model)
    mine = LmEval().score(candidate, theirs, everything)["acc"]
    accuracy = MultipleChoice().score(candidate, plan, everything)["accuracy"]
    right = 0
    for n, row in enumerate(rows):
        plain = plainly(candidate.model, candidate.tokenizer, prefix + row["question"], row["choices"])
        right += int(np.argmax(plain)) == row["gold"]
        np.testing.assert_allclose(sums[n], plain, atol=1e-4)
        np.testing.assert_allclose([r[0] for r in logged[n]["filtered_resps"]], plain, atol=1e-4)

    assert len(theirs.item_ids) == len(plan.item_ids) == len(logged) == count
    assert dict(zip(place(theirs), mine, strict=True)) == {n: s["acc"] for n, s in logged.items()}
    assert mine.sum() == accuracy.sum() == right
    assert 0.3 * count < right < count


# -- few-shot examples, filters, generation -----------------------------------------------------------------

ROWS = [{"question": f"{n}+{n + 3}=", "choices": [str(2 * n + 3), str(n)], "gold": n % 2} for n in range(30)]


def test_an_item_does_not_depend_on_its_company(tiny_model: Any, lm_eval_task: Folder) -> None:
    """Random few-shot examples are those of lm-eval over the whole task, whichever items are asked for."""
    folder = lm_eval_task(ROWS, training=ROWS[20:], num_fewshot=2, metrics=("acc", "acc_norm"))
    task = spec(folder, metric="acc_norm", report_metric="acc", limit=20)
    plan = compiled(task, tiny_model())
    candidate = scorable(tiny_model())
    whole = LmEval().score(candidate, plan, tuple(range(20)))
    some = LmEval().score(candidate, plan, (7, 3, 11))
    logged = reference(folder, tiny_model())

    for metric in ("acc", "acc_norm"):
        assert [whole[metric][i] for i in (7, 3, 11)] == some[metric].tolist()
        assert whole[metric].tolist() == [logged[n][metric] for n in place(plan)]
    for at, n in enumerate(place(plan)):
        assert [r[1][0] for r in plan.requests[at]] == [a[0] for a in logged[n]["arguments"]]
    assert len({plan.requests[at][0][1][0].split("\n\n")[0] for at in range(20)}) > 3
    assert 0.0 < whole["acc"].mean() < 1.0


def test_generation_with_a_filter(quickstart: Path, lm_eval_task: Folder) -> None:
    """Greedy answers through one of several filters, and exact match, as lm-eval has them."""
    model = quickstart / "models" / "skills-add"
    rows = rows_of(quickstart / "data" / "skill_add.jsonl", 24)
    digits = {"function": "regex", "regex_pattern": r"^(\d+)"}
    folder = lm_eval_task(
        rows,
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="target",
        metrics=("exact_match",),
        generation_kwargs={"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        filter_list=[
            {"name": "plain", "filter": [{"function": "take_first"}]},
            {"name": "digits", "filter": [digits, {"function": "take_first"}]},
        ],
    )
    with pytest.raises(UserError, match="filters answers in several ways; choose with filter: plain or digits"):
        compiled(spec(folder, metric="exact_match"), model)
    plan = compiled(spec(folder, metric="exact_match", filter="digits"), model)
    candidate = scorable(model)
    mine = LmEval().score(candidate, plan, tuple(range(24)))["exact_match"]
    # Both filters are logged; the last one is `digits`.
    logged = {n: s["exact_match"] for n, s in reference(folder, model).items()}

    assert mine.tolist() == [logged[n] for n in place(plan)]
    assert mine.mean() > 0.5
    assert plan.tokens((0,)) == len(candidate.tokenizer(rows[place(plan)[0]]["question"])["input_ids"]) + 6


def test_a_chat_template_makes_the_prompt(tiny_model: Any, lm_eval_task: Folder) -> None:
    """The tokenizer's template is applied as lm-eval applies it; without one it is an error."""
    folder = lm_eval_task(ROWS, training=ROWS[20:], num_fewshot=1)
    with pytest.raises(UserError, match="apply_chat_template is set, but the tokenizer has no chat template"):
        compiled(spec(folder, apply_chat_template=True), tiny_model())
    model = tiny_model(name="chatty")
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    (model / "chat_template.jinja").write_text(template)
    plan = compiled(spec(folder, apply_chat_template=True), model)
    logged = reference(folder, model, apply_chat_template=True)

    assert plan.requests[0][0][1][0].startswith("[user]")
    assert [r[1] for r in plan.requests[0]] == [tuple(a) for a in logged[place(plan)[0]]["arguments"]]


# -- the live model, plans, failures --------------------------------------------------------------------------


def test_the_live_model_is_wrapped_not_copied(tiny_model: Any, lm_eval_task: Folder) -> None:
    """Later candidates are written over the same weights; another model is wrapped anew; nothing is printed."""
    plan = compiled(spec(lm_eval_task(ROWS)), tiny_model())
    scorer, candidate, other = LmEval(), scorable(tiny_model()), scorable(tiny_model(seed=1))
    before = [(p.data_ptr(), p.sum().item()) for p in candidate.model.parameters()]
    first = scorer.score(candidate, plan, tuple(range(30)))["acc"]

    assert [(p.data_ptr(), p.sum().item()) for p in candidate.model.parameters()] == before
    assert candidate.tokenizer.padding_side == load_tokenizer(tiny_model()).padding_side
    second = scorer.score(other, plan, tuple(range(30)))["acc"]
    with torch.no_grad():
        for p, q in zip(candidate.model.parameters(), other.model.parameters(), strict=True):
            p.copy_(q)
    assert scorer.score(candidate, plan, tuple(range(30)))["acc"].tolist() == second.tolist()
    assert first.tolist() != second.tolist()


def test_nothing_is_printed(tiny_model: Any, lm_eval_task: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither bars nor warnings, on either stream."""
    plan = compiled(spec(lm_eval_task(ROWS, training=ROWS[20:], num_fewshot=1)), tiny_model())
    candidate = scorable(tiny_model())
    capfd.readouterr()  # transformers draws a bar while it loads
    LmEval().score(candidate, plan, (0, 1))
    captured = capfd.readouterr()

    assert captured == ("", "")


def test_nan_is_a_failure(tiny_model: Any, lm_eval_task: Folder) -> None:
    """An argmax over NaN would look like an answer."""
    plan = compiled(spec(lm_eval_task(ROWS)), tiny_model())
    candidate = scorable(tiny_model())
    with torch.no_grad():
        candidate.model.model.norm.weight.fill_(float("nan"))

    with pytest.raises(NonFinite, match="NaN or infinite"):
        LmEval().score(candidate, plan, (0, 1))


def test_a_prompt_that_would_be_cut_is_refused(tiny_model: Any, lm_eval_task: Folder) -> None:
    """lm-eval cuts from the left without a word."""
    with pytest.raises(UserError, match=r"task 't': 30 of 30 items .* 4 tokens .* mine doc-\d+, has \d+ with its"):
        compiled(spec(lm_eval_task(ROWS)), tiny_model(), limit=4)


def test_the_plan_travels_and_knows_its_version(tiny_model: Any, lm_eval_task: Folder, tmp_path: Path) -> None:
    """It can be pickled; the folder's code is in its id, the folder's place is not."""
    code = "def judge(doc, results):\n    return {'acc': float(results[0][0] > results[1][0])}\n"
    first = lm_eval_task(ROWS, files={"judge.py": code}, process_results="judge.judge")
    folders = [first, shutil.copytree(first, tmp_path / "same"), shutil.copytree(first, tmp_path / "other")]
    (folders[2] / "judge.py").write_text(code.replace(">", "<"))
    plans = [compiled(spec(folder), tiny_model()) for folder in folders]
    candidate = scorable(tiny_model())
    scores = [LmEval().score(candidate, p, tuple(range(30)))["acc"] for p in plans]

    assert plans[0].folder != plans[1].folder
    assert plans[0].id == plans[1].id != plans[2].id
    assert scores[0].tolist() == scores[1].tolist() == (1 - scores[2]).tolist()
    assert pickle.loads(pickle.dumps(plans[0])).id == plans[0].id


def test_a_result_that_is_no_number_is_a_failure(tiny_model: Any, lm_eval_task: Folder) -> None:
    """What a task's own code gives is looked at."""
    code = "def judge(doc, results):\n    return {'acc': None}\n"
    plan = compiled(spec(lm_eval_task(ROWS, files={"judge.py": code}, process_results="judge.judge")), tiny_model())

    with pytest.raises(RunError, match="lm-eval's 'acc' should be a number for each doc, got None"):
        LmEval().score(scorable(tiny_model()), plan, (0,))


def test_an_item_is_never_its_own_example(tiny_model: Any, lm_eval_task: Folder) -> None:
    """Also where the training docs, from which examples come, are scored."""
    rows = [{**row, "question": f"n{n}:"} for n, row in enumerate(ROWS[:12])]
    tests = [{**row, "question": f"m{n}:"} for n, row in enumerate(ROWS)]
    splits = {"search": 0.5, "select": 0.5, "report": "test"}
    for settings in ({}, {"fewshot_split": None}):
        folder = lm_eval_task(tests, training=rows, num_fewshot=4, **settings)
        plan = compiled(spec(folder, data="training", splits=splits), tiny_model())
        for doc, requests in zip(plan.docs, plan.requests, strict=True):
            prompt = requests[0][1][0]
            assert prompt.count(doc["question"]) == 1
            assert prompt.endswith(doc["question"])
            assert prompt.count("\n\n") == 4


def test_tied_weights_stay_those_that_are_built(quickstart: Path, lm_eval_task: Folder) -> None:
    """An expert's recipe, built after the base's in the same worker, scores as its folder alone."""
    rows = rows_of(quickstart / "data" / "skill_attr.jsonl", 60)
    task = {"name": "mine", "kind": "lm_eval", "task": "mine", "include_path": str(lm_eval_task(rows))}
    prepared = prepare(load("quickstart", {"fitness": {"tasks": [task]}}), allow=Allowed(code=True))
    evaluator, out = prepared.evaluator()(), {}
    for name in ("base", "attr", "base"):
        job = Job(0, 0, prepared.baselines()[name], prepared.items["report"])
        [(result, _)] = evaluator.evaluate(WorkUnit(0, (job,)))
        out[name] = result.scores["mine"]["acc"]
        fitness = prepared.experiment.fitness
        folder = quickstart / "models" / f"skills-{name}"
        alone = score_folder(folder, fitness, splits=("report",), allow=Allowed(code=True))["report"]
        assert np.array_equal(out[name], alone["mine"]["acc"])

    assert out["attr"].mean() != out["base"].mean()


# -- a whole run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["inline", pytest.param("local", marks=pytest.mark.slow)])
def test_a_search_on_an_lm_eval_task(
    small_experiment: Path, lm_eval_task: Folder, tmp_path: Path, backend: str
) -> None:
    """A whole run, also with a worker process; without permission to run the folder's code it is refused."""
    task = {"name": "mine", "kind": "lm_eval", "task": "mine", "include_path": str(lm_eval_task(ROWS))}
    experiment = load(
        small_experiment,
        {"fitness": {"tasks": [task]}, "search.budget": {"evaluations": 4}, "workers.backend": backend},
    )
    with pytest.raises(UserError, match="runs code that the experiment names; read it, then add --allow-code"):
        prepare(experiment)
    history = run(experiment, tmp_path / "run", allow=Allowed(code=True))

    assert {e["status"] for e in history.evaluations} == {"ok"}
    assert history.winner is not None
