"""Multiple choice, compiled: the numbers of one plain forward pass per choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.architectures import ARCHITECTURES
from evomerge.errors import UserError
from evomerge.merge.live import load_tokenizer
from evomerge.score.model import NonFinite
from evomerge.score.multiple_choice import ChoicePlan, ChoiceTree, MultipleChoice, columns
from evomerge.score.plan import PlanShape, Scorable, Target
from evomerge.score.prompts import MIN_PREFIX
from evomerge.tasks.base import Item, load_items
from evomerge.tasks.multiple_choice import Choices, MultipleChoiceSpec

TESTS = Path(__file__).parents[1]
GOLDENS = json.loads((TESTS / "goldens" / "scoring.json").read_text())
STORY = "Once upon a time, there was a little girl named Lily. She had a big red ball and a dog. "
TOLERANCE = 1e-5
"""Per token, fp32."""


def item(prompt: str, choices: Sequence[str], gold: int = 0, name: str = "") -> Item:
    content = Choices(prompt, tuple(choices), gold)
    return Item(name or prompt, "search", f"items.jsonl:{name or prompt[:12]}", "", content)


ITEMS = (
    item("The dog sat on the", [" mat", " table and the chair", " sun"], 1),
    item("7+8=", ["15", "16", "5", "150"], 0),
    item("He said: ", ["yes", "no, not today my friend", "I do not know"], 2),  # the blank belongs to the choice
    item("A", [" b", " c"], 1),
    item("", ["Once upon a time", "Then"], 0),
    item("Lily and Tom went to the park to play with the ball. They were very", [" happy", " sad", " big"], 0),
    item("x " * 30 + "y", [" z", " zz zz zz zz", " a", " b", " c", " d"], 5),
)


def stock(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def scorable(model: Any) -> Scorable:
    return Scorable(model, None, lambda: 0.0)


def spec(**fields: Any) -> MultipleChoiceSpec:
    return MultipleChoiceSpec(name="t", data="x.jsonl", **fields)


def compiled(folder: Path, items: tuple[Item, ...] = ITEMS, batch_tokens: int = 4096, **fields: Any) -> ChoicePlan:
    return MultipleChoice().compile(spec(**fields), items, Target(load_tokenizer(folder), 256, PlanShape(batch_tokens)))


@torch.inference_mode()
def plain(model: Any, folder: Path, items: Sequence[Item], prefix: str = "", end_of_text: bool = False) -> list[Any]:
    """Per item (log-probabilities, tokens) of every choice: batch 1, no padding, no cache, float64 softmax."""
    tokenizer = load_tokenizer(folder)
    out = []
    for i in items:
        context = prefix + i.content.prompt
        start = tokenizer(context.rstrip())["input_ids"]
        rows = []
        for choice in i.content.choices:
            whole = tokenizer(context + choice)["input_ids"] + [tokenizer.eos_token_id] * end_of_text
            log_p = torch.log_softmax(model(torch.tensor([whole]), use_cache=False).logits[0].double(), -1)
            at = range(len(start), len(whole))
            rows.append((sum(float(log_p[n - 1, whole[n]]) for n in at), len(at)))
        out.append(rows)
    return out


def assert_equal(ours: list[Any], theirs: list[Any], tolerance: float = TOLERANCE) -> None:
    assert len(ours) == len(theirs)
    for i, (mine, rows) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.shape == (len(rows),)
        for c, (value, tokens) in enumerate(rows):
            assert abs(mine[c] - value) < tolerance * tokens, (i, c, mine[c], value)


# -- against plain transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "end_of_text"), [("", False), (STORY, True)], ids=["bare open", "prefixed closed"])
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "mamba", "opt", "bloom", "qwen2_moe"])
def test_scores_are_those_of_plain_transformers(tiny_model: Any, arch: str, prefix: str, end_of_text: bool) -> None:
    """Every choice of every item, with and without a shared prefix, within 1e-5 per token in fp32."""
    folder = tiny_model(arch)
    model = stock(folder)
    plan = compiled(folder, prefix=prefix, end_of_text=end_of_text)
    ours = MultipleChoice().choice_logprobs(model, plan, tuple(range(len(ITEMS))))

    assert (len(plan.prefix) >= MIN_PREFIX) == bool(prefix)
    assert_equal(ours, plain(model, folder, ITEMS, prefix, end_of_text))


@pytest.mark.parametrize("prefix", ["", STORY], ids=["bare", "prefixed"])
def test_tied_models(tiny_model: Any, prefix: str) -> None:
    """The head's hook also works where the head shares the embedding."""
    folder = tiny_model("qwen3", tied=True)
    model = stock(folder)
    ours = MultipleChoice().choice_logprobs(model, compiled(folder, prefix=prefix), tuple(range(len(ITEMS))))

    assert_equal(ours, plain(model, folder, ITEMS, prefix))


WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": 24}),
    ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}),
    ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen3", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen2", {"sliding_window": 5, "use_sliding_window": False}),
    ("phi3", {"sliding_window": 5}),
    ("gemma2", {"sliding_window": 5}),
    ("gemma3_text", {"sliding_window": 5}),
    ("gemma3_text", {"sliding_window": 5, "layer_types": ["sliding_attention", "sliding_attention"]}),
]


@pytest.mark.parametrize("prefix", ["", STORY], ids=["bare", "prefixed"])
@pytest.mark.parametrize(("arch", "config"), WINDOWS, ids=str)
def test_sliding_windows(tiny_model: Any, arch: str, config: dict[str, Any], prefix: str) -> None:
    """A window smaller than the sequence, on all layers or on some, gives plain transformers' numbers."""
    folder = tiny_model(arch, **config)
    model = stock(folder)
    ours = MultipleChoice().choice_logprobs(model, compiled(folder, prefix=prefix), tuple(range(len(ITEMS))))
    theirs = plain(model, folder, ITEMS, prefix)
    full = plain(stock(tiny_model(arch)), folder, ITEMS, prefix)

    if config.get("use_sliding_window") is not False and config["sliding_window"] == 5:
        assert abs(theirs[5][0][0] - full[5][0][0]) > 1e-3, "the window matters here"
    assert_equal(ours, theirs)


@pytest.mark.parametrize("task", ["skill_add", "skill_attr", "skill_count"])
@pytest.mark.parametrize("name", ["skills-base", "skills-add"])
def test_real_models_score_as_recorded(quickstart: Path, name: str, task: str) -> None:
    """The quickstart's models on its items: plain transformers' and lm-eval's numbers, open and closed."""
    folder = quickstart / "models" / name
    rows = GOLDENS["models"][name][task]
    splits = {"search": f"{task}.jsonl", "select": f"{task}_cal.jsonl", "report": "other.jsonl"}
    items = []
    for n, line in enumerate((quickstart / "data" / splits["search"]).read_text().splitlines()[: len(rows)]):
        data = json.loads(line)
        items.append(item(data["question"], data["choices"], data["gold"], f"{n}"))
    model = stock(folder)

    for variant, closed in (("open", False), ("closed", True)):
        plan = compiled(folder, tuple(items), end_of_text=closed)
        ours = MultipleChoice().choice_logprobs(model, plan, tuple(range(len(items))))
        theirs = [list(zip(r[variant]["log_prob"], r[variant]["tokens"], strict=True)) for r in rows]
        assert_equal(ours, theirs, 2e-5)
        if not closed:
            harness = [list(zip(r["lm_eval"]["log_prob"], r["open"]["tokens"], strict=True)) for r in rows]
            assert_equal(ours, harness, 2e-5)
        assert [t.gold for t in plan.trees] == [r["gold"] for r in rows]


# -- batches and subsets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", STORY], ids=["bare", "prefixed"])
def test_batch_shape_changes_the_last_bits_at_most(tiny_model: Any, prefix: str) -> None:
    """64 and 4096 tokens a batch give the same log-probabilities within 1e-5."""
    folder = tiny_model("llama")
    model = stock(folder)
    everything = tuple(range(len(ITEMS)))
    narrow, wide = (
        MultipleChoice().choice_logprobs(model, compiled(folder, batch_tokens=n, prefix=prefix), everything)
        for n in (64, 4096)
    )

    for a, b in zip(narrow, wide, strict=True):
        assert np.abs(a - b).max() < 1e-5


def test_any_subset_in_any_order(tiny_model: Any) -> None:
    """Items come back in the caller's order, whatever the batches; asking again gives the same bits."""
    folder = tiny_model("llama")
    model = stock(folder)
    plan = compiled(folder, batch_tokens=64, prefix=STORY)
    scorer = MultipleChoice()
    whole = scorer.choice_logprobs(model, plan, tuple(range(len(ITEMS))))

    for odd in ((5, 0, 3), (6,), (3, 2, 1, 0), (2, 5, 6, 4, 0, 1, 3)):
        part = scorer.choice_logprobs(model, plan, odd)
        for got, i in zip(part, odd, strict=True):
            assert np.abs(got - whole[i]).max() < 1e-5
        again = scorer.choice_logprobs(model, plan, odd)
        assert all(np.array_equal(a, b) for a, b in zip(part, again, strict=True))


def test_prepared_batches_do_not_outlive_their_plan(tiny_model: Any) -> None:
    """Many different subsets, more than are kept prepared, still give right answers."""
    folder = tiny_model("llama")
    model = stock(folder)
    plan = compiled(folder)
    scorer = MultipleChoice()
    first = scorer.choice_logprobs(model, plan, (0, 1))
    for n in range(40):
        scorer.choice_logprobs(model, plan, (n % 7, (n + 1 + n // 7) % 7))

    again = scorer.choice_logprobs(model, plan, (0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_weights_may_change_under_a_scorer(tiny_model: Any) -> None:
    """Nothing that depends on weights is kept between candidates, the prefix's keys and values included."""
    folders = [tiny_model("llama", seed) for seed in (0, 1)]
    model, other = map(stock, folders)
    plan = compiled(folders[0], prefix=STORY)
    scorer = MultipleChoice()
    scorer.score(scorable(model), plan, (0, 1))
    model.load_state_dict(other.state_dict())

    fresh = MultipleChoice().score(scorable(other), plan, (0, 1))
    assert all(np.array_equal(scorer.score(scorable(model), plan, (0, 1))[m], column) for m, column in fresh.items())


# -- columns --------------------------------------------------------------------------------------------------


def test_columns_are_what_they_say() -> None:
    """All five metrics against a straightforward computation."""
    rng = np.random.default_rng(0)
    sums, trees = [], []
    for i in range(50):
        n = 2 + i % 4
        tokens = rng.integers(1, 5, n)
        owners = np.repeat(np.arange(n, dtype=np.int32), tokens)
        empty = np.zeros(0, np.int32)
        lengths = tuple(int(x) for x in rng.integers(1, 12, n))
        trees.append(ChoiceTree(empty, empty, empty, owners, owners, owners, lengths, int(rng.integers(n))))
        sums.append(-rng.exponential(3.0, n) * tokens)
    got = columns(sums, trees)

    for i, (s, t) in enumerate(zip(sums, trees, strict=True)):
        p = np.exp(s) / np.exp(s).sum()
        tokens_of_gold = int((t.owners == t.gold).sum())
        expected = {
            "accuracy": float(max(range(len(s)), key=lambda c: s[c]) == t.gold),
            "accuracy_norm": float(max(range(len(s)), key=lambda c: s[c] / t.lengths[c]) == t.gold),
            "probability": p[t.gold],
            "cross_entropy": -np.log(p[t.gold]),
            "answer_loss": -s[t.gold] / tokens_of_gold,
        }
        assert {m: c[i] for m, c in got.items()} == pytest.approx(expected, rel=1e-6)
    assert all(c.dtype == np.float32 and c.shape == (50,) for c in got.values())


def test_the_first_choice_wins_a_tie() -> None:
    """Equal log-probabilities count as the first one, so an indifferent model is right where gold is 0 only."""
    empty = np.zeros(0, np.int32)
    trees = [ChoiceTree(empty, empty, empty, empty, empty, np.array([0, 1]), (3, 3), gold) for gold in (0, 1)]
    got = columns([np.array([-2.0, -2.0])] * 2, trees)

    assert got["accuracy"].tolist() == [1.0, 0.0]
    assert got["probability"].tolist() == [0.5, 0.5]


def test_very_unlikely_answers_stay_finite() -> None:
    """Log-probabilities of -1e4 give a finite cross-entropy, not a division of zero by zero."""
    empty = np.zeros(0, np.int32)
    tree = ChoiceTree(empty, empty, empty, empty, empty, np.array([0, 1]), (1, 1), 1)
    got = columns([np.array([-10_000.0, -20_000.0])], [tree])

    assert got["cross_entropy"].tolist() == [10_000.0]
    assert got["probability"].tolist() == [0.0]


# -- refusals -------------------------------------------------------------------------------------------------


def test_nan_weights_are_a_failure_of_their_own(tiny_model: Any) -> None:
    """NaN logits raise NonFinite naming the task."""
    folder = tiny_model("llama")
    model = stock(folder)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")

    with pytest.raises(NonFinite, match="'t'"):
        MultipleChoice().score(scorable(model), compiled(folder), (0, 1, 2))


def test_items_beyond_the_context_are_named(tiny_model: Any) -> None:
    """An item longer than the model takes is refused with its place, its length and the limit."""
    folder = tiny_model("llama")
    long = item("a b c " * 200, [" d", " e"], name="17")

    with pytest.raises(UserError, match=r"1 of 8 items .* 256 tokens .*; the first, items\.jsonl:17, has \d{3,} with"):
        compiled(folder, (*ITEMS, long))


class NoStart:
    """A tokenizer that puts nothing in front, as Qwen's."""

    def __init__(self, folder: Path, bos: int | None, eos: int | None) -> None:
        self.tokenizer, self.bos_token_id, self.eos_token_id = load_tokenizer(folder), bos, eos

    def __call__(self, text: str) -> Any:
        return self.tokenizer(text, add_special_tokens=False)


@pytest.mark.parametrize(("bos", "eos", "first"), [(None, 2, 2), (1, 2, 1)])
def test_empty_prompts_stand_behind_the_prefix_token(tiny_model: Any, bos: int | None, eos: int, first: int) -> None:
    """Where prompt and tokenizer put nothing in front, BOS or else end-of-text does: the numbers of plain
    transformers behind that token."""
    folder = tiny_model("qwen2")
    model, tokenizer = stock(folder), NoStart(folder, bos, eos)
    plan = MultipleChoice().compile(spec(), (ITEMS[4],), Target(tokenizer, 256, PlanShape()))
    ours = MultipleChoice().choice_logprobs(model, plan, (0,))[0]

    for c, choice in enumerate(ITEMS[4].content.choices):
        ids = [first, *tokenizer(choice)["input_ids"]]
        with torch.inference_mode():
            log_p = torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0].double(), -1)
        wanted = sum(float(log_p[n - 1, ids[n]]) for n in range(1, len(ids)))
        assert abs(ours[c] - wanted) < TOLERANCE * len(ids)


def test_the_prefix_token_stands_once(tiny_model: Any) -> None:
    """A choice that begins with the prefix token itself gets no second one, as in lm-eval."""
    folder = tiny_model("llama")
    tokenizer = NoStart(folder, 1, 2)
    with_start = item("", ["<s>Once upon", "<s>Then"], 0)
    plan = MultipleChoice().compile(spec(), (with_start,), Target(tokenizer, 256, PlanShape()))

    assert tokenizer("<s>Once")["input_ids"][0] == 1
    assert plan.trees[0].tokens.tolist().count(1) == 1


def test_empty_prompts_need_a_first_token(tiny_model: Any) -> None:
    """An empty prompt is refused where the tokenizer has no token to begin with."""
    target = Target(NoStart(tiny_model("llama"), None, None), 256, PlanShape())

    with pytest.raises(UserError, match=r"items\.jsonl:.*: the prompt is empty"):
        MultipleChoice().compile(spec(), (ITEMS[4],), target)


def test_pairs_are_scored_as_by_lm_eval(quickstart: Path) -> None:
    """Whole sentences behind an empty prompt (BLiMP): lm-eval's log-likelihoods on a real model."""
    folder = quickstart / "models" / "skills-base"
    goldens = json.loads((TESTS / "goldens" / "tasks.json").read_text(encoding="utf-8"))
    pairs = [(row["choices"], n) for n, row in enumerate(goldens["prompts"]["blimp"])]
    items = tuple(item("", choices, 0, str(n)) for choices, n in pairs)
    plan = compiled(folder, items)
    ours = MultipleChoice().choice_logprobs(stock(folder), plan, tuple(range(len(items))))

    np.testing.assert_allclose(np.array(ours), goldens["numbers"]["blimp"], rtol=2e-6)


def test_closing_needs_an_end_of_text_token(tiny_model: Any) -> None:
    """end_of_text with a tokenizer that has none is refused."""
    tokenizer = load_tokenizer(tiny_model("llama"))
    tokenizer.eos_token = None

    with pytest.raises(UserError, match="no end-of-text token"):
        MultipleChoice().compile(spec(end_of_text=True), ITEMS, Target(tokenizer, 256, PlanShape()))


def test_a_choice_that_adds_no_token_is_named(tiny_model: Any) -> None:
    """A choice that the tokenizer swallows cannot be scored and is named."""
    real = load_tokenizer(tiny_model("llama"))

    class Swallows:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text: str) -> Any:
            return real(text.removesuffix("#"))

    with pytest.raises(UserError, match="the choice '#' adds no token"):
        MultipleChoice().compile(spec(), (item("Hello", ["#", " a"]),), Target(Swallows(), 256, PlanShape()))


# -- plans ----------------------------------------------------------------------------------------------------


def test_shared_tokens_are_computed_once(tiny_model: Any) -> None:
    """Prefix once, each context once, a choice's last token never: the plan's own count."""
    folder = tiny_model("llama")
    tokenizer = load_tokenizer(folder)
    plan = compiled(folder, prefix=STORY)

    contexts = [tokenizer((STORY + i.content.prompt).rstrip())["input_ids"] for i in ITEMS]
    choices = [
        sum(len(tokenizer(STORY + i.content.prompt + c)["input_ids"]) - len(context) - 1 for c in i.content.choices)
        for i, context in zip(ITEMS, contexts, strict=True)
    ]
    shared = len(plan.prefix)
    assert shared == len(tokenizer(STORY.rstrip())["input_ids"]) - 1, "one item's prompt is the prefix alone"
    expected = shared + sum(len(c) - shared for c in contexts) + sum(choices)
    assert plan.tokens(range(len(ITEMS))) == expected


def test_plan_id_sees_every_token_and_the_shape(tiny_model: Any) -> None:
    """Equal plans have equal ids; another text, gold, shape or closing gives another id."""
    folder = tiny_model("llama")
    other = (item(ITEMS[0].content.prompt, ITEMS[0].content.choices, 2, ITEMS[0].id), *ITEMS[1:])
    word = (item(ITEMS[0].content.prompt, [" mat", " table", " sun"], 1, ITEMS[0].id), *ITEMS[1:])
    plans = [
        compiled(folder),
        compiled(folder, other),
        compiled(folder, word),
        compiled(folder, batch_tokens=64),
        compiled(folder, end_of_text=True),
        compiled(folder, prefix=STORY),
    ]

    assert len({p.id for p in plans}) == len(plans)
    assert compiled(folder).id == plans[0].id


def test_splits_are_positions_in_the_plan(tiny_model: Any, quickstart: Path) -> None:
    """A plan keeps every item's name and split in the order in which the items were read."""
    fields = {"search": 0.7, "select": 0.3, "report": str(quickstart / "data" / "skill_add.jsonl")}
    task = MultipleChoiceSpec(name="add", data=str(quickstart / "data" / "skill_add_cal.jsonl"), splits=fields)
    items = load_items(task, Path())
    plan = MultipleChoice().compile(task, items, Target(load_tokenizer(tiny_model("llama")), 256, PlanShape()))

    assert plan.item_ids == tuple(i.id for i in items)
    for split, at in plan.splits.items():
        assert [items[n].split for n in at] == [split] * len(at)
    assert sorted(n for at in plan.splits.values() for n in at) == list(range(len(items)))
