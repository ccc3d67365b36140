"""The gradient by the genome, from backward pass to chain rule, against finite differences in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge import evaluate as evaluating
from evomerge.config import fitness_of, load
from evomerge.merge import gradient as module
from evomerge.merge.live import load_tokenizer
from evomerge.objective import differentiated, products
from evomerge.prepare import Prepared, prepare
from evomerge.proposal import Differentiated, Evaluation, Genome, ItemSet, Job, WorkUnit, frozen_genome
from evomerge.recipe import Recipe
from evomerge.space import RuleSpace

from .conftest import fine_tuned, small_items, write_items

STORY = "Once upon a time, there was a little girl named Lily. She had a big red ball and a dog. "
EXACT = ("gpt2", "gpt_neox")
"""Families whose stock code computes in float64 throughout where the weights are; others norm in float32, and finite
differences of those need a longer step."""
TA = {"method": "task_arithmetic", "axes": {"lambda": {"low": -0.5, "high": 1.5}}}
LINEAR = {"method": "linear", "axes": {}}
BOTH = (("choices", "cross_entropy"), ("texts", "loss"))
PLAIN = ("cross_entropy", "loss")
WEIGHT = {"low": -0.5, "high": 1.5, "default": "uniform"}
Space = dict[str, Any]


@pytest.fixture(scope="module")
def make(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Prepared]:
    """make(space, arch, tied, prefix, dtype) -> a prepared experiment: two experts, a task of choices, one of texts."""

    def prepared(
        space: Space, arch: str, tied: bool, prefix: str, dtype: str = "float32", metrics: tuple[str, str] = PLAIN
    ) -> Prepared:
        folder = tmp_path_factory.mktemp("gradients")
        base = tiny_model(arch, 0, tied=tied)
        files = {}
        for at, split in ((0, "search"), (6, "select"), (8, "report")):
            files[split] = str(write_items(folder / f"{split}.jsonl", small_items("words", at, 6 if at == 0 else 2)))
        texts = {s: str(folder / f"{s}-texts.jsonl") for s in files}
        for n, path in enumerate(texts.values()):
            rows = [{"text": f"{n} " + t * (n + 1)} for t in ("The dog sat on the mat. ", "x y z ", STORY)]
            Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))
        tasks = [
            {"name": "choices", "splits": files, "metric": metrics[0], "prefix": prefix, "weight": 3.0},
            {"name": "texts", "kind": "perplexity", "splits": texts, "metric": metrics[1], "window": 32},
        ]
        axes = {"weight": WEIGHT, **space["axes"]}
        return prepare(
            load(
                {
                    "name": "gradients",
                    "models": {
                        "base": str(base),
                        "experts": {n: str(fine_tuned(base, folder / n, i)) for i, n in enumerate(("one", "two"), 14)},
                        "dtype": dtype,
                    },
                    "search_space": {"groups": "layer-modules", **space, "axes": axes},
                    "fitness": {"tasks": tasks},
                    "search": {"algorithm": "adam", "budget": {"evaluations": 4}},
                    "workers": {"backend": "inline", "device": "cpu"},
                }
            )
        )

    return prepared


class Reference:
    """The same loss by other means: stock model, weights and softmax in float64, one row a choice or a text."""

    def __init__(self, p: Prepared) -> None:
        from transformers import AutoModelForCausalLM

        self.p = p
        self.tokenizer = load_tokenizer(p.folders["base"])
        models = {n: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for n, f in p.folders.items()}
        self.weights = {n: {k: t.clone() for k, t in m.state_dict().items()} for n, m in models.items()}
        self.model = models["base"].eval()
        self.items = {t.name: [i for i in t.load(Path.cwd()) if i.split == "search"] for t in p.experiment.tasks}

    @torch.inference_mode()
    def loss(self, g: Genome) -> float:
        """0.75 of the mean of the choices' metric and 0.25 of that of the texts, as something to minimise."""
        space = self.p.spaces[0]
        rules = space.decode(g, self.p.manifest).blocks
        place = self.model.state_dict(keep_vars=True)
        for t in self.p.manifest.tensors:
            base, rule = self.weights["base"][t.name], rules.get(t.block)
            built = base
            if rule is not None:
                each = [(c["weight"], self.weights[s][t.name]) for s, c in rule.sources.items()]
                if rule.method == "task_arithmetic":
                    built = base + rule.params["lambda"] * sum(w * (x - base) for w, x in each)
                else:
                    built = sum(w * x for w, x in each) / (sum(w for w, _ in each) if rule.params["normalize"] else 1)
            place[t.name].copy_(built)
        return 0.75 * self._choices() + 0.25 * self._texts()

    def _log_p(self, ids: list[int]) -> torch.Tensor:
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]]

    def _choices(self) -> float:
        task: Any = self.p.experiment.tasks[0]
        total = 0.0
        for item in self.items["choices"]:
            context = task.prefix + item.content.prompt
            start = len(self.tokenizer(context)["input_ids"])
            sums = [
                self._log_p(self.tokenizer(context + c)["input_ids"])[start - 1 :].sum() for c in item.content.choices
            ]
            log_p = float(torch.log_softmax(torch.stack(sums), 0)[item.content.gold])
            right = self.tokenizer(context + item.content.choices[item.content.gold])["input_ids"]
            per_token = -float(sums[item.content.gold]) / (len(right) - start)
            total += {"cross_entropy": -log_p, "answer_loss": per_token}.get(task.metric, -np.exp(log_p))
        return total / len(self.items["choices"])

    def _texts(self) -> float:
        total = 0.0
        for item in self.items["texts"]:
            ids = self.tokenizer(item.content.text, add_special_tokens=False)["input_ids"]
            assert len(ids) < 3 * 32
            nats = [
                -self._log_p([self.tokenizer.bos_token_id, *ids][max(0, i + 1 - (i % 32 + 1)) :][: i % 32 + 2])[-1]
                for i in range(len(ids))
            ]
            nats_of_text = float(torch.stack(nats).sum())
            size = len(item.content.text.encode()) * np.log(2)
            total += nats_of_text / (len(nats) if self.p.experiment.tasks[1].metric == "loss" else size)
        return total / len(self.items["texts"])


def derivative(p: Prepared, g: Genome, evaluator: Any = None) -> tuple[Genome, Evaluation]:
    """The derivative by the genome as a run makes it."""
    space = p.spaces[0]
    assert isinstance(space, RuleSpace)
    evaluator = evaluator or p.evaluator()()
    fitness = fitness_of(p.experiment)
    job = Job(0, 0, space.decode(g, p.manifest), p.items["search"], differentiated(fitness))
    [(e, _)] = evaluator.evaluate(WorkUnit(0, (job,)))
    assert e.status == "ok", e.reason
    assert e.gradients["choices"].shape == (len(p.manifest.blocks), 3)
    assert e.gradients["choices"].dtype == np.float32
    [by_block] = products(fitness, e.gradients)
    return space.gradient(g, by_block, p.manifest), e


def genome(n: int, seed: int = 5) -> Genome:
    """A point with coefficients that are multiples of 1e-4, none of them 0."""
    return frozen_genome(np.random.default_rng(seed).integers(5000, 15000, n) / 20000)


CASES: list[Any] = [
    pytest.param(TA, "gpt_neox", False, "", PLAIN, id="task_arithmetic"),
    pytest.param(
        {**TA, "groups": "all", "experts": ["two"]}, "gpt2", True, STORY, ("probability", "bits_per_byte"), id="one"
    ),
    pytest.param(LINEAR, "gpt2", True, "", ("accuracy", "loss"), id="linear tied"),
    pytest.param(LINEAR, "gpt_neox", False, STORY, ("answer_loss", "loss"), id="linear prefixed"),
    pytest.param({**LINEAR, "params": {"normalize": False}}, "gpt2", True, "", PLAIN, id="linear not normalised"),
    pytest.param(TA, "qwen3", True, STORY, PLAIN, id="qwen"),
    pytest.param(LINEAR, "gemma2", True, STORY, PLAIN, id="gemma"),
    pytest.param({**LINEAR, "params": {"normalize": False}}, "mamba", False, STORY, PLAIN, id="without branches"),
]


@pytest.mark.parametrize(("space", "arch", "tied", "prefix", "metrics"), CASES)
def test_finite_differences(
    make: Any, space: Space, arch: str, tied: bool, prefix: str, metrics: tuple[str, str]
) -> None:
    """By single axes and along random directions, the derivative is the slope of the loss."""
    p = make(space, arch, tied, prefix, metrics=metrics)
    n = len(p.spaces[0].axes)
    g, reference = genome(n), Reference(p)
    ours, _ = derivative(p, g)
    rng = np.random.default_rng(2)
    directions = [*rng.choice([-1.0, 1.0], (2, n)), *np.eye(n)[rng.permutation(n)[:2]]]
    # Coefficients stay multiples of 1e-6, to which recipes round them.
    step, rel = (5e-5, 1e-4) if arch in EXACT else (1e-3, 3e-3)

    assert ours.shape == (n,)
    for d in directions:
        slope = (reference.loss(g + step * d) - reference.loss(g - step * d)) / (2 * step)
        assert ours @ d == pytest.approx(slope, rel=rel, abs=rel / 10 * np.linalg.norm(ours))


def scores_of(p: Prepared, evaluator: Any, recipe: Recipe, gradients: Differentiated = ()) -> Evaluation:
    [(e, _)] = evaluator.evaluate(WorkUnit(0, (Job(0, 0, recipe, p.items["search"], gradients),)))
    return e  # type: ignore[no-any-return]


def same(a: Evaluation, b: Evaluation) -> bool:
    assert a.scores is not None
    assert b.scores is not None
    return all(np.array_equal(a.scores[t][m], b.scores[t][m]) for t in a.scores for m in a.scores[t])


@pytest.fixture(scope="module")
def tied(make: Any) -> Prepared:
    prepared: Prepared = make(TA, "llama", True, STORY)
    return prepared


def test_nothing_is_left_over(tied: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores before, with and after a gradient have the same bits; the model wants no gradients and has no hooks."""
    monkeypatch.setattr(evaluating, "RECOMPUTE_ABOVE", 0)
    evaluator = tied.evaluator()()
    model = evaluator._candidate.model
    attributes = {n: {*vars(m)} for n, m in model.named_modules()}
    recipes = [tied.spaces[0].decode(genome(len(tied.spaces[0].axes), seed), tied.manifest) for seed in (1, 2)]
    before = [scores_of(tied, evaluator, r) for r in recipes]
    buffer = evaluator._builder.buffer.clone()

    with_gradient = scores_of(tied, evaluator, recipes[1], BOTH)
    assert torch.equal(evaluator._builder.buffer, buffer)
    after = [scores_of(tied, evaluator, r) for r in recipes]

    assert same(with_gradient, before[1])
    assert all(same(a, b) for a, b in zip(before, after, strict=True))
    assert [e.gradients for e in (*before, *after)] == [None] * 4
    assert {n: {*vars(m)} for n, m in model.named_modules()} == attributes
    for p in model.parameters():
        assert not p.requires_grad
        assert p.grad is None
        assert not p._post_accumulate_grad_hooks


def test_one_gradient_at_a_time(tied: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two parameters have their gradient in memory at once; a tied one is counted once, with both its parts."""
    evaluator = tied.evaluator()()
    parameters = list(evaluator._candidate.model.parameters())
    alive: list[int] = []
    shapes: list[torch.Size] = []
    add = module._add

    def counted(row: Any, vectors: Any, tensor: Any) -> None:
        alive.append(sum(p.grad is not None for p in parameters))
        shapes.append(tensor.shape)
        add(row, vectors, tensor)
        alive.append(sum(p.grad is not None for p in parameters))

    monkeypatch.setattr(module, "_add", counted)
    derivative(tied, genome(len(tied.spaces[0].axes)), evaluator)

    batches = len(shapes) // len(parameters)
    assert alive == [1, 0] * len(shapes)
    assert batches * len(parameters) == len(shapes)
    assert shapes.count(torch.Size([512, 32])) == batches


def test_recomputed_layers_give_the_same(tied: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """With activation checkpointing every layer runs twice, and the derivative has the same bits."""
    g = genome(len(tied.spaces[0].axes))
    evaluator = tied.evaluator()()
    layer = evaluator._candidate.model.model.layers[0].self_attn
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    kept, _ = derivative(tied, g, evaluator)
    once = len(calls)
    monkeypatch.setattr(evaluating, "RECOMPUTE_ABOVE", 0)
    again, _ = derivative(tied, g, evaluator)

    assert np.array_equal(kept, again)
    scoring = scores_calls(tied, evaluator, g, calls)
    assert len(calls) - scoring - once == 2 * (once - scoring) + scoring


def scores_calls(p: Prepared, evaluator: Any, g: Genome, calls: list[int]) -> int:
    """How often a layer runs where only scores are asked for."""
    before = len(calls)
    scores_of(p, evaluator, p.spaces[0].decode(g, p.manifest))
    return len(calls) - before


def test_the_rule_of_recomputing(tied: Prepared) -> None:
    """What is kept grows with the tokens of a batch, the bytes of a number, and the widths of the layers' matrices."""
    kept = module.activation_bytes(tied.manifest, 1024, 4)
    widths = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # two layers of width 32: q, o; k, v; the MLP

    assert kept == 1024 * 4 * widths
    assert module.activation_bytes(tied.manifest, 2048, 2) == kept


def test_bfloat16(make: Any) -> None:
    """In bfloat16 the derivative points the same way as in float32."""
    exact, rounded = (make(TA, "llama", False, "", dtype) for dtype in ("float32", "bfloat16"))
    g = genome(len(exact.spaces[0].axes))
    a, b = derivative(exact, g)[0], derivative(rounded, g)[0]

    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99
    assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(a), rel=0.05)


def test_items_make_the_mean(tied: Prepared) -> None:
    """The gradient over all items is the mean of those of its halves, whatever the batches."""
    evaluator, items = tied.evaluator()(), tied.items["search"]
    recipe = tied.spaces[0].decode(genome(len(tied.spaces[0].axes)), tied.manifest)

    def gradient(at: tuple[int, ...]) -> Any:
        job = Job(0, 0, recipe, ItemSet("part", {"choices": at}), BOTH[:1])
        [(e, _)] = evaluator.evaluate(WorkUnit(0, (job,)))
        assert {*e.gradients} == {"choices"}
        return e.gradients["choices"]

    at = items.tasks["choices"]
    whole, first, second = gradient(at), gradient(at[:3]), gradient(at[3:])
    assert np.allclose(whole, (first + second) / 2, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def test_failures_leave_a_usable_model(tied: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is not finite, or runs out of memory, is a recorded failure; the next job scores as ever."""
    evaluator = tied.evaluator()()
    recipe = tied.spaces[0].decode(genome(len(tied.spaces[0].axes)), tied.manifest)
    before = scores_of(tied, evaluator, recipe)
    add = module._add
    with monkeypatch.context() as patch:

        def ruined(row: Any, vectors: Any, tensor: Any) -> None:
            row.fill_(float("nan"))

        patch.setattr(module, "_add", ruined)
        sick = scores_of(tied, evaluator, recipe, BOTH[:1])
    with monkeypatch.context() as patch:

        def full(row: Any, vectors: Any, tensor: Any) -> None:
            raise torch.OutOfMemoryError

        patch.setattr(module, "_add", full)
        short = scores_of(tied, evaluator, recipe, BOTH[:1])

    assert (sick.status, sick.reason) == ("failed:nan", "task 'choices': its gradient is NaN or infinite")
    assert (short.status, short.scores) == ("failed:oom", None)
    assert module._add is add
    assert same(scores_of(tied, evaluator, recipe, BOTH[1:]), before)
    assert not any(p.requires_grad or p.grad is not None for p in evaluator._candidate.model.parameters())
