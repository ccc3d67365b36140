"""Prompts as tokens: few-shot text, chat templates of strangers, shared prefixes."""

from __future__ import annotations

from typing import Any

import pytest

from evomerge.errors import UserError
from evomerge.merge.live import load_tokenizer
from evomerge.score.multiple_choice import MultipleChoice
from evomerge.score.plan import PlanShape, Target
from evomerge.score.prompts import DATE, Prompter, shared_prefix
from evomerge.tasks.base import Item
from evomerge.tasks.multiple_choice import Choices, MultipleChoiceSpec
from evomerge.tasks.prompts import FewShot, Shot

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SHOTS = (Shot("2+2=", "4"), Shot("2+3=", "5"))
FEW = FewShot(data="-", count=2, separator=" ; ")


@pytest.fixture
def tokenizer(tiny_model: Any) -> Any:
    return load_tokenizer(tiny_model("llama"))


def spec(**fields: Any) -> MultipleChoiceSpec:
    return MultipleChoiceSpec(name="t", data="x.jsonl", **fields)


def content(prompt: str = "3+3=", shots: tuple[Shot, ...] = ()) -> Choices:
    return Choices(prompt, ("6", "7"), 0, shots)


def test_text_without_a_chat(tokenizer: Any) -> None:
    """Prefix, examples each closed by the separator, prompt; the tokenizer's first token as always."""
    prompter = Prompter(spec(prefix="Sums. ", few_shot=FEW), tokenizer)

    assert prompter.text(content(shots=SHOTS)) == "Sums. 2+2=4 ; 2+3=5 ; 3+3="
    assert prompter.tokens("3+3=") == tokenizer("3+3=")["input_ids"]
    assert prompter.tokens("3+3=")[0] == tokenizer.bos_token_id


def test_a_chat(tokenizer: Any) -> None:
    """Examples are turns, the prefix opens the first user turn, and the first token stands there once."""
    tokenizer.chat_template = TEMPLATE
    prompter = Prompter(spec(chat_template=True, system="Add.", prefix="Sums. ", few_shot=FEW), tokenizer)

    text = prompter.text(content(shots=SHOTS))
    assert text == (
        "<s>[system] Add.\n[user] Sums. 2+2=\n[assistant] 4\n[user] 2+3=\n[assistant] 5\n[user] 3+3=\n[assistant]"
    )
    assert prompter.tokens(text).count(tokenizer.bos_token_id) == 1
    assert prompter.tokens(text) == tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": "Sums. 2+2="},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "2+3="},
            {"role": "assistant", "content": "5"},
            {"role": "user", "content": "3+3="},
        ],
        add_generation_prompt=True,
        return_dict=False,
    )


def test_dates_stand_still(tokenizer: Any) -> None:
    """A template that writes today's date is told a fixed one: scores do not depend on the day."""
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}: {{ messages }}"
    )

    assert Prompter(spec(chat_template=True), tokenizer).text(content()).startswith(f"{DATE}: ")


HOSTILE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% set x = messages.append({}) %}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}",
    "{{ raise_exception('only\ntwo turns') }}",
    "{% for %}",
    "{{ range(10000000) | list }}",
    "{{ 1 / 0 }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_templates_run_in_a_sandbox(tokenizer: Any, template: str) -> None:
    """Reaching for Python's inside, files, imports and mutation, and mere mistakes, are refused in one line."""
    tokenizer.chat_template = template

    with pytest.raises(UserError, match=r"task 't': the chat template does not take these turns") as caught:
        Prompter(spec(chat_template=True), tokenizer).text(content())
    assert "\n" not in str(caught.value)


def test_no_template_and_a_huge_one(tokenizer: Any) -> None:
    """A chat needs a template, of a bounded length."""
    with pytest.raises(UserError, match="chat_template is set, but the base's tokenizer has none"):
        Prompter(spec(chat_template=True), tokenizer)
    tokenizer.chat_template = "x" * 200_001
    with pytest.raises(UserError, match="longer than 200000 characters"):
        Prompter(spec(chat_template=True), tokenizer)


def test_shared_prefix() -> None:
    """The common start, leaving every row a token; nothing where it is short."""
    common = list(range(20))

    assert shared_prefix([[*common, 1, 2], [*common, 3]]) == 20
    assert shared_prefix([[*common, 1], common]) == 19
    assert shared_prefix([common]) == 19
    assert shared_prefix([common[:16], common[:16]]) == 0
    assert shared_prefix([[1, *common], [2, *common]]) == 0


def test_a_plan_is_all_of_it(tiny_model: Any, tokenizer: Any) -> None:
    """Examples, separator, system turn and template each change the plan's id, and few-shot tokens are shared."""
    tokenizer.chat_template = TEMPLATE
    other = load_tokenizer(tiny_model("llama"))
    other.chat_template = TEMPLATE.replace("[user]", "[human]").replace("[{{ m.role }}]", "<{{ m.role }}>")

    def plan(tokenizer: Any = tokenizer, shots: tuple[Shot, ...] = SHOTS, **fields: Any) -> Any:
        items = tuple(
            Item(str(n), "search", str(n), str(n), Choices(f"{n}+{n}=", ("6", "7"), 0, shots)) for n in range(3, 6)
        )
        return MultipleChoice().compile(spec(**fields), items, Target(tokenizer, 256, PlanShape()))

    variants = [
        plan(few_shot=FEW),
        plan(few_shot=FEW, shots=SHOTS[::-1]),
        plan(few_shot=FEW.model_copy(update={"separator": "\n"})),
        plan(few_shot=FEW, chat_template=True),
        plan(few_shot=FEW, chat_template=True, system="Add."),
        plan(other, few_shot=FEW, chat_template=True),
        plan(shots=()),
    ]
    assert len({p.id for p in variants}) == len(variants)
    assert plan(few_shot=FEW).id == variants[0].id
    chat = variants[3]
    shown = tokenizer.decode(chat.prefix)
    assert "[user] 2+2=\n[assistant] 4\n[user] 2+3=\n[assistant] 5\n[user]" in shown
