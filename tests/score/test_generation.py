"""Generation: the tokens of transformers' generate on one item at a time, whatever the batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.errors import UserError
from evomerge.merge.live import end_tokens, load_tokenizer
from evomerge.score import generation
from evomerge.score.generation import ROW_SHARE, Generation, GenerationPlan, Written, batches
from evomerge.score.model import NonFinite
from evomerge.score.plan import PlanShape, Scorable, Target
from evomerge.score.prompts import MIN_PREFIX
from evomerge.tasks.base import Item
from evomerge.tasks.generation import GenerationSpec, Question

STORY = "Once upon a time, there was a little girl named Lily. She had a big red ball and a dog. "
PROMPTS = (
    "The dog sat on the",
    "7+8=",
    "A",
    "Lily and Tom went to the park to play with the ball. They were very",
    "",
    "x " * 30 + "y",
    "Look: bird dad dad bird. How many dad? There are",
    "Once upon a time",
    "B",
)
ROUNDING = 1e-4
"""Logits of tiny models in fp32: a smaller gap between the first two tokens is a tie."""


def stock(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def candidate(folder: Path) -> Scorable:
    return Scorable(stock(folder), load_tokenizer(folder), lambda: 0.0)


def item(prompt: str, target: str = "?", name: str = "") -> Item:
    return Item(name or prompt, "search", f"items.jsonl:{name or prompt[:12]}", "", Question(prompt, (target,)))


def compiled(
    folder: Path,
    prompts: Sequence[str] = PROMPTS,
    batch_tokens: int = 4096,
    tokenizer: Any = None,
    ends: tuple[int, ...] | None = None,
    **fields: Any,
) -> GenerationPlan:
    tokenizer = tokenizer or load_tokenizer(folder)
    found = end_tokens(folder, tokenizer) if ends is None else ends
    spec = GenerationSpec(kind="generation", name="t", data="x.jsonl", **{"max_tokens": 16, **fields})
    target = Target(tokenizer, 256, PlanShape(batch_tokens), found)
    return Generation().compile(spec, tuple(item(p, name=str(n)) for n, p in enumerate(prompts)), target)


def write(made: Scorable, plan: GenerationPlan) -> list[Written]:
    return Generation().write(made, plan, tuple(range(len(plan.prompts))))


@torch.inference_mode()
def generated(made: Scorable, plan: GenerationPlan, n: int) -> list[int]:
    """transformers' generate on one item: batch 1, no padding, greedy. Without the closing end-of-text token."""
    ids = torch.tensor([[*plan.prefix.tolist(), *plan.prompts[n].tolist()]])
    more = {"stop_strings": list(plan.stop), "tokenizer": made.tokenizer} if plan.stop else {}
    out = made.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=plan.max_tokens,
        eos_token_id=list(plan.ends) or None,
        pad_token_id=0,
        **more,
    )[0, ids.shape[1] :].tolist()
    return out[:-1] if out and out[-1] in plan.ends else out


def assert_equal(
    made: Scorable, plan: GenerationPlan, ours: list[Written], alone: list[list[int]] | None = None
) -> None:
    """The same tokens as one at a time; where one differs, the likeliest two there must be equal within rounding."""
    ties = 0
    alone = alone or [generated(made, plan, n) for n in range(len(ours))]
    for n, (written, theirs) in enumerate(zip(ours, alone, strict=True)):
        mine = [*written.tokens]
        if mine == theirs:
            continue
        at = next(i for i in range(plan.max_tokens) if mine[i : i + 1] != theirs[i : i + 1])
        front = [*plan.prefix.tolist(), *plan.prompts[n].tolist(), *mine[:at]]
        with torch.inference_mode():
            top = made.model(torch.tensor([front])).logits[0, -1].topk(2).values
        assert float(top[0] - top[1]) < ROUNDING, (n, at, mine, theirs)
        ties += 1
    assert ties <= 1, "ties are rare"


ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": 24}),
    ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("gpt2", {}),
    ("gpt_neox", {}),
    ("phi", {}),
    ("mamba", {}),
    ("bloom", {}),
]
"""Model types with settings; a new architecture is a line here."""


@pytest.mark.parametrize("prefix", ["", STORY], ids=["bare", "prefixed"])
@pytest.mark.parametrize(("arch", "config"), ARCHITECTURES, ids=str)
def test_tokens_are_those_of_generate(tiny_model: Any, arch: str, config: dict[str, Any], prefix: str) -> None:
    """Every item of a ragged batch, with and without a shared prefix, in narrow batches and wide ones."""
    made = candidate(tiny_model(arch, **config))
    folder = Path(made.tokenizer.name_or_path)
    wide = compiled(folder, prefix=prefix, ends=())
    ours = write(made, wide)

    assert (len(wide.prefix) >= MIN_PREFIX) == bool(prefix)
    assert len({w.tokens for w in ours}) > len(PROMPTS) // 2, "prompts matter"
    alone = [generated(made, wide, n) for n in range(len(PROMPTS))]
    assert_equal(made, wide, ours, alone)
    narrow = compiled(folder, prefix=prefix, batch_tokens=70, ends=())
    assert len(list(batches(narrow, range(len(PROMPTS))))) > 1
    assert_equal(made, narrow, write(made, narrow), alone)


@pytest.mark.parametrize("slow", [range(4, 16), range(2, len(PROMPTS) - 1)], ids=["dropped", "kept for their number"])
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_rows_that_end_leave_the_others_alone(
    tiny_model: Any, arch: str, slow: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many end tokens rows end at different steps, the first one at once; the others go on as if alone."""
    monkeypatch.setattr(generation, "SLOW_ROWS", slow)
    folder = tiny_model(arch, **({"sliding_window": 7} if arch == "mistral" else {}))
    made = candidate(folder)
    endless = write(made, compiled(folder, ends=()))
    ends = tuple({endless[0].tokens[0], endless[3].tokens[5], endless[6].tokens[12]})
    plan = compiled(folder, ends=ends)
    ours = write(made, plan)

    assert len({len(w.tokens) for w in ours}) >= 3
    assert ours[0] == Written((), "", True)
    assert_equal(made, plan, ours)
    for w, e in zip(ours, endless, strict=True):
        at = next((i for i, t in enumerate(e.tokens) if t in ends), len(e.tokens))
        assert w.tokens == e.tokens[:at]
        assert w.stopped == (at < len(e.tokens))


@pytest.mark.parametrize("name", ["skills-base", "skills-add", "stories260K"])
def test_trained_models(quickstart: Path, name: str) -> None:
    """Trained weights on the quickstart's items, some of which end by themselves: the tokens of generate, no ties."""
    folder = quickstart / "models" / name
    made = candidate(folder)
    prompts = []
    for task in ("add", "attr", "rev"):
        lines = (quickstart / "data" / f"skill_{task}.jsonl").read_text().splitlines()
        prompts += [json.loads(line)["question"] for line in lines[:8]]
    plan = compiled(folder, prompts, batch_tokens=128, max_tokens=20)

    ours = write(made, plan)
    assert [list(w.tokens) for w in ours] == [generated(made, plan, n) for n in range(len(prompts))]
    assert any(w.stopped for w in ours) == (name != "stories260K")


STOPS = [(".",), ("!", ". "), ("park", "e t"), ("ily",), ("\n", "\u00e9\u4e2d"), ("time, ", " dog")]


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_stop_strings(quickstart: Path, stop: tuple[str, ...]) -> None:
    """Rows end where generate's stop_strings end them; the text is cut in front of the first one."""
    folder = quickstart / "models" / "stories260K"
    made = candidate(folder)
    prompts = ("Once upon", "Lily went to the", "One day a", "He said", "Tom and the dog")
    plan = compiled(folder, prompts, max_tokens=32, stop=stop)
    ours, free = write(made, plan), write(made, compiled(folder, prompts, max_tokens=32))

    assert any(w.stopped for w in ours) or stop[0] == "\n"
    for n, (w, f) in enumerate(zip(ours, free, strict=True)):
        assert list(w.tokens) == generated(made, plan, n)
        assert not any(s in w.text for s in stop)
        assert f.text.startswith(w.text)
        assert w.stopped == any(s in f.text for s in stop)


def test_stop_strings_look_at_what_is_written(quickstart: Path) -> None:
    """A stop string in the prompt, or one that begins there, does not count."""
    folder = quickstart / "models" / "stories260K"
    made = candidate(folder)
    free = write(made, compiled(folder, ["Once upon a time"]))[0]
    stopped = write(made, compiled(folder, ["Once upon a time"], stop=("upon", "time" + free.text[:2])))[0]

    assert stopped == free


def test_text_keeps_its_first_blank(quickstart: Path) -> None:
    """What is written joins the prompt as the tokenizer decodes them together."""
    folder = quickstart / "models" / "stories260K"
    made = candidate(folder)
    plan = compiled(folder, ["Lily and Tom", "7+8="])
    for n, w in enumerate(write(made, plan)):
        prompt = plan.prompts[n].tolist()
        assert made.tokenizer.decode(prompt + list(w.tokens)) == made.tokenizer.decode(prompt) + w.text


def test_chats(tiny_model: Any) -> None:
    """Prompts in a chat template: generate's tokens behind the template's own."""
    folder = tiny_model("llama")
    made = candidate(folder)
    made.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    )
    plan = compiled(folder, PROMPTS, tokenizer=made.tokenizer, chat_template=True, system="Be kind and brief, please.")

    assert len(plan.prefix) >= MIN_PREFIX
    assert_equal(made, plan, write(made, plan))


# -- batches and columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cache", "rows"), [(200, 64), (32_768, 2), (200, 4), (1, 4)])
def test_batches_keep_within_bounds(tiny_model: Any, monkeypatch: pytest.MonkeyPatch, cache: int, rows: int) -> None:
    """Every item once, like lengths together, rows and columns bounded; a huge item goes alone."""
    monkeypatch.setattr(generation, "CACHE_TOKENS", cache)
    plan = compiled(tiny_model("llama"), batch_tokens=rows * ROW_SHARE)
    found = list(batches(plan, range(len(PROMPTS))))

    assert sorted(n for b in found for n in b) == list(range(len(PROMPTS)))
    lengths = [len(plan.prompts[n]) for b in found for n in b]
    assert lengths == sorted(lengths)
    for b in found:
        assert len(b) <= rows
        assert len(b) == 1 or len(b) * (len(plan.prompts[b[-1]]) + plan.max_tokens) <= cache
    assert (max(map(len, found)) > 1) == (cache > 1)


def test_any_subset_in_any_order(tiny_model: Any) -> None:
    """Answers come back in the caller's order; asking again gives the same."""
    folder = tiny_model("llama")
    made, plan = candidate(folder), compiled(folder, batch_tokens=70, prefix=STORY)
    whole = write(made, plan)

    for part in ((5, 0, 3), (6,), (8, 7, 6, 5, 4, 3, 2, 1, 0)):
        assert Generation().write(made, plan, part) == [whole[i] for i in part]


def test_buffers_grow(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers longer than a block of columns are those of large blocks."""
    folder = tiny_model("llama")
    made, plan = candidate(folder), compiled(folder, prefix=STORY)
    whole = write(made, plan)
    monkeypatch.setattr(generation, "BLOCK", 3)

    assert write(made, plan) == whole


def test_weights_may_change_under_a_scorer(tiny_model: Any) -> None:
    """Nothing that depends on weights is kept between candidates."""
    folders = [tiny_model("llama", seed) for seed in (0, 1)]
    made, other = map(candidate, folders)
    plan, scorer = compiled(folders[0], prefix=STORY), Generation()
    positions = tuple(range(len(PROMPTS)))
    before = scorer.write(made, plan, positions)
    made.model.load_state_dict(other.model.state_dict())

    assert scorer.write(made, plan, positions) == Generation().write(other, plan, positions) != before


def test_columns_are_what_they_say(quickstart: Path) -> None:
    """A trained model adds; exact match, tokens written and whether it ended by itself, one float per item."""
    folder = quickstart / "models" / "skills-add"
    made = candidate(folder)
    lines = (quickstart / "data" / "skill_add.jsonl").read_text().splitlines()[:20]
    items = tuple(item(d["question"], d["target"], d["id"]) for d in map(json.loads, lines))
    target = Target(made.tokenizer, 256, PlanShape(), end_tokens(folder, made.tokenizer))
    plan = Generation().compile(GenerationSpec(kind="generation", name="t", data="x", max_tokens=8), items, target)
    positions = tuple(range(len(items)))
    columns = Generation().score(made, plan, positions)

    assert set(columns) == set(GenerationSpec.metrics)
    assert all(c.dtype == np.float32 and c.shape == (20,) for c in columns.values())
    written = Generation().write(made, plan, positions)
    assert columns["exact_match"].tolist() == [
        w.text.strip() == i.content.targets[0] for w, i in zip(written, items, strict=True)
    ]
    assert columns["exact_match"].mean() > 0.8, "the expert for sums"
    assert columns["tokens"].tolist() == [len(w.tokens) for w in written]
    assert columns["stopped"].tolist() == [w.stopped for w in written]
    assert columns["extracted"].all(), "without a pattern the whole text counts"


def test_the_id_is_all_that_scores_depend_on(tiny_model: Any) -> None:
    """Length, stops, ends, extraction, normalisation, targets and tokens each change the plan's id."""
    folder = tiny_model("llama")
    ids = [
        compiled(folder, **fields).id
        for fields in (
            {},
            {"max_tokens": 25},
            {"stop": ["x"]},
            {"ends": (3,)},
            {"extract": "number"},
            {"extract": {"regex": "(.)"}},
            {"normalise": ["case"]},
            {"prefix": "B"},
            {"prompts": PROMPTS[1:]},
        )
    ]
    assert len(set(ids)) == len(ids)
    assert compiled(folder).id == ids[0]
    item_plan = [
        Generation().compile(
            GenerationSpec(kind="generation", name="t", data="x"),
            (item("a", target),),
            Target(load_tokenizer(folder), 512, PlanShape()),
        )
        for target in ("b", "c")
    ]
    assert item_plan[0].id != item_plan[1].id


def test_tokens_are_counted_from_both_sides(tiny_model: Any) -> None:
    """The work of a plan lies between prompts alone and every answer as long as it may be."""
    plan = compiled(tiny_model("llama"), prefix=STORY)
    prompts = len(plan.prefix) + sum(len(plan.prompts[i]) for i in (0, 3))

    assert plan.least_tokens((0, 3)) == prompts
    assert plan.tokens((0, 3)) == prompts + 2 * 15


# -- refusals -------------------------------------------------------------------------------------------------


def test_nan_weights_are_a_failure_of_their_own(tiny_model: Any) -> None:
    """NaN logits raise NonFinite naming the task."""
    folder = tiny_model("llama")
    made = candidate(folder)
    with torch.no_grad():
        made.model.model.norm.weight[3] = float("nan")

    with pytest.raises(NonFinite, match="'t'"):
        write(made, compiled(folder))


def test_items_without_room_are_named(tiny_model: Any) -> None:
    """A prompt that leaves no room for max_tokens is refused with its place and the numbers."""
    folder = tiny_model("llama")

    assert compiled(folder, PROMPTS, max_tokens=256 - 65)
    with pytest.raises(
        UserError, match=r"1 of 10 items .* 256 tokens .*; the first, items\.jsonl:9, has \d+ of prompt .* 16\)"
    ):
        compiled(folder, [*PROMPTS, "a b c " * 200])


def test_empty_prompts_need_a_first_token(tiny_model: Any) -> None:
    """An empty prompt is continued behind the tokenizer's first token, and refused where it adds none."""
    folder = tiny_model("llama")
    bare = load_tokenizer(folder)

    class NoStart:
        def __call__(self, text: str) -> Any:
            return {"input_ids": bare(text, add_special_tokens=False)["input_ids"]}

    with pytest.raises(UserError, match=r"items\.jsonl:.*: the prompt is empty"):
        compiled(folder, [""], tokenizer=NoStart(), ends=())


# -- end tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (2,)),
        ({"generation_config.json": {"eos_token_id": [7, 5, 7]}}, (5, 7)),
        ({"generation_config.json": {"eos_token_id": 9}, "config.json": {"eos_token_id": 3}}, (9,)),
        ({"generation_config.json": None, "config.json": {"eos_token_id": [4]}}, (4,)),
        ({"generation_config.json": None, "config.json": {"eos_token_id": None}}, (2,)),
    ],
)
def test_end_tokens(tiny_model: Any, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    """generation_config.json's, else config.json's, else the tokenizer's."""
    folder = tiny_model("llama", name="ends")
    for name, change in files.items():
        if change is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **change}))

    assert end_tokens(folder, load_tokenizer(folder)) == expected


@pytest.mark.parametrize("text", ["{", "[1]", '{"eos_token_id": ["a"]}', '{"eos_token_id": {"a": 1}}'])
def test_bad_generation_configs_are_refused(tiny_model: Any, text: str) -> None:
    """An unreadable file, or end tokens that are none, in one line."""
    folder = tiny_model("llama", name="bad")
    (folder / "generation_config.json").write_text(text)

    with pytest.raises(UserError, match=str(folder)) as caught:
        end_tokens(folder, load_tokenizer(folder))
    assert "\n" not in str(caught.value)
