"""Perplexity: the numbers of plain transformers and of lm-eval's rolling log-likelihood."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.architectures import ARCHITECTURES
from evomerge.errors import UserError
from evomerge.merge.live import load_tokenizer
from evomerge.schema import validated
from evomerge.score import perplexity as module
from evomerge.score.model import NonFinite
from evomerge.score.perplexity import Perplexity, PerplexityPlan, rolling
from evomerge.score.plan import PlanShape, Scorable, Target
from evomerge.tasks.base import Item
from evomerge.tasks.perplexity import Document, PerplexitySpec
from evomerge.tasks.rows import Row

TESTS = Path(__file__).parents[1]
GOLDENS = json.loads((TESTS / "goldens" / "tasks.json").read_text(encoding="utf-8"))["numbers"]
TEXTS = (
    "The dog sat on the mat.",
    "Once upon a time there was a little girl named Lily. " * 6,
    "x",
    "Zürich 漢字 🙂 " * 5,
    "She had a big red ball. " * 3,
)


def stock(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def items(texts: tuple[str, ...]) -> tuple[Item, ...]:
    return tuple(Item(str(n), "search", f"x.jsonl:{n}", str(n), Document(t)) for n, t in enumerate(texts))


def spec(**keys: Any) -> PerplexitySpec:
    return validated(PerplexitySpec, {"name": "t", "kind": "perplexity", "data": "x.jsonl", **keys}, "task")


def compiled(tokenizer: Any, texts: tuple[str, ...] = TEXTS, batch_tokens: int = 128, **keys: Any) -> PerplexityPlan:
    target = Target(tokenizer, 256, PlanShape(batch_tokens))
    return Perplexity().compile(spec(**keys), items(texts), target)


@torch.inference_mode()
def plain(model: Any, tokenizer: Any, text: str, window: int, context: int = 1) -> tuple[float, int]:
    """Nats and tokens of one text: every token on its own, from the longest input that its window allows."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = [tokenizer.bos_token_id, *ids]
    nats, done = 0.0, 0
    while done < len(ids):
        end = min(done + (window if done == 0 else window - context + 1), len(ids))
        given = whole[max(end - window, 0) : end]
        log_p = torch.log_softmax(model(torch.tensor([given]), use_cache=False).logits[0].double(), -1)
        for n in range(done, end):
            nats -= float(log_p[n - end, ids[n]])
        done = end
    return nats, len(ids)


CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    *((arch, 16, 9, {}) for arch in sorted(ARCHITECTURES)),
    ("llama", 256, 1, {}),
    ("llama", 16, 1, {}),
    ("llama", 7, 7, {}),
    ("mistral", 64, 1, {"sliding_window": 5}),
]


@pytest.mark.parametrize(("arch", "window", "context", "config"), CASES)
def test_numbers_are_those_of_plain_transformers(
    tiny_model: Any, arch: str, window: int, context: int, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both columns, short and long texts, in small batches and with logits in pieces, within 1e-5 per token."""
    monkeypatch.setattr(module, "MAX_LOGITS", 512 * 10)
    folder = tiny_model(arch, **config)
    model, tokenizer = stock(folder), load_tokenizer(folder)
    plan = compiled(tokenizer, window=window, context=context)
    order = (3, 1, 0, 4, 2)
    got = Perplexity().score(Scorable(model, tokenizer, lambda: 0.0), plan, order)

    for n, i in enumerate(order):
        nats, tokens = plain(model, tokenizer, TEXTS[i], window, context)
        assert got["loss"][n] == pytest.approx(nats / tokens, abs=1e-5)
        assert got["bits_per_byte"][n] == pytest.approx(nats / math.log(2) / len(TEXTS[i].encode()), rel=1e-5)
    assert got["loss"].dtype == np.float32


@pytest.mark.parametrize("window", sorted(GOLDENS["rolling"], key=int))
def test_numbers_are_lm_evals(quickstart: Path, window: str) -> None:
    """lm-eval's loglikelihood_rolling on a real model, to the seventh digit."""
    folder = quickstart / "models" / "skills-base"
    plan = compiled(load_tokenizer(folder), tuple(GOLDENS["texts"]), window=int(window))
    nats = Perplexity().nats(stock(folder), plan, tuple(range(len(GOLDENS["texts"]))))

    np.testing.assert_allclose(-nats, GOLDENS["rolling"][window], rtol=2e-6)


@given(
    count=st.integers(1, 60),
    window=st.integers(1, 20),
    data=st.data(),
)
def test_windows_predict_every_token_once(count: int, window: int, data: Any) -> None:
    """Whatever the lengths: all tokens in order, each behind what stands in front of it, with enough context."""
    context = data.draw(st.integers(1, window))
    ids = list(range(100, 100 + count))
    windows = list(rolling(ids, 1, window, context))

    assert [t for w in windows for t in w.targets.tolist()] == ids
    for n, w in enumerate(windows):
        assert len(w.tokens) <= window
        assert w.tokens.tolist()[-len(w.targets) :] == [t - 1 if t > 100 else 1 for t in w.targets.tolist()]
        if n:
            assert len(w.tokens) == window
            assert len(w.tokens) - len(w.targets) >= context - 1


def test_texts_begin_behind_the_prefix_token(tiny_model: Any) -> None:
    """BOS stands in front once; without one, end-of-text does; a tokenizer with neither is refused."""
    tokenizer = load_tokenizer(tiny_model("llama"))
    assert compiled(tokenizer).windows[0][0].tokens[:2].tolist()[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in compiled(tokenizer).windows[0][0].tokens[1:]
    tokenizer.bos_token = None
    assert compiled(tokenizer).windows[0][0].tokens[0] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has neither a BOS nor an end-of-text token"):
        compiled(tokenizer)


def test_plans_differ_by_what_matters(tiny_model: Any) -> None:
    """The plan's id follows texts and windows; its work is the sum of its inputs."""
    tokenizer = load_tokenizer(tiny_model("llama"))
    plan = compiled(tokenizer)

    assert plan.id == compiled(tokenizer).id
    others = [compiled(tokenizer, window=16), compiled(tokenizer, window=16, context=4), compiled(tokenizer, TEXTS[:4])]
    assert len({plan.id, *(p.id for p in others)}) == 4
    assert plan.tokens((0, 2)) == sum(len(plan.windows[i][0].tokens) for i in (0, 2))


def test_bad_weights_are_non_finite(tiny_model: Any) -> None:
    """NaN logits are a failure of the candidate, not a score."""
    folder = tiny_model("llama")
    model = stock(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    tokenizer = load_tokenizer(folder)

    with pytest.raises(NonFinite, match="task 't'"):
        Perplexity().score(Scorable(model, tokenizer, lambda: 0.0), compiled(tokenizer), (0,))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"window": 8, "context": 9}, "context: at most the window of 8 tokens, got 9"),
        ({"window": 1}, "window"),
        ({"window": 300}, "window is 300 tokens; the model takes 256"),
        ({"context": 300}, "context is 300 tokens; the model takes 256"),
    ],
)
def test_windows_must_fit(tiny_model: Any, keys: dict[str, Any], words: str) -> None:
    """A window fits the model, a context the window."""
    with pytest.raises(UserError) as caught:
        compiled(load_tokenizer(tiny_model("llama")), **keys)

    assert words in str(caught.value)


def test_texts_are_templates() -> None:
    """The text is put together from the item's fields; an empty one is refused."""
    row = Row({"title": "A", "body": "b c"}, "x:1", "x line 1")

    assert spec(text="{title}\n{body}").parse(row).content == Document("A\nb c")
    with pytest.raises(UserError, match="x line 1: the text is empty"):
        spec(text="{body}").parse(row.with_fields(body=" \n"))
