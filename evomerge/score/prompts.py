"""Prompts as tokens: examples and turns joined to one text, the chat template, the tokens that all prompts share.

Chat templates come with checkpoints, from strangers. transformers renders them in jinja's immutable sandbox
(`jinja2.sandbox.ImmutableSandboxedEnvironment`): no attributes with underscores, no writing to what is passed in, no
imports, no files, and everything passed in is plain text. What a sandbox does not bound is time: a template may loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomerge.errors import UserError
from evomerge.tasks.base import Item
from evomerge.tasks.prompts import Prompted

MIN_PREFIX = 16
"""Tokens. A shorter common prefix is cheaper to run with every item than to keep as keys and values."""

MAX_TEMPLATE = 200_000
"""Characters of a chat template."""

DATE = "26 Jul 2024"
"""What templates that write today's date are told, or scores would depend on the day (the default of Llama 3.1's)."""


class Prompter:
    """Renders and tokenises the prompts of one task."""

    def __init__(self, spec: Prompted, tokenizer: Any) -> None:
        """Raises UserError where a chat is asked for and the tokenizer has no template."""
        self.spec, self.tokenizer = spec, tokenizer
        self._template = ""
        if spec.chat_template:
            try:
                self._template = tokenizer.get_chat_template()
            except ValueError:
                raise UserError(
                    f"task {spec.name!r}: chat_template is set, but the base's tokenizer has none; "
                    "remove the key, or use the tokenizer of a chat model as the base's"
                ) from None
            if len(self._template) > MAX_TEMPLATE:
                raise UserError(f"task {spec.name!r}: the chat template is longer than {MAX_TEMPLATE} characters")

    def text(self, content: Any) -> str:
        """All that stands in front of an item's answer. Raises UserError where the template refuses it."""
        spec = self.spec
        if spec.chat_template:
            return self._chat(content)
        separator = spec.few_shot.separator if spec.few_shot else ""
        shots = "".join(s.prompt + s.answer + separator for s in content.shots)
        return spec.prefix + shots + str(content.prompt)

    def _chat(self, content: Any) -> str:
        turns = []
        for shot in content.shots:
            turns += [{"role": "user", "content": shot.prompt}, {"role": "assistant", "content": shot.answer}]
        turns.append({"role": "user", "content": content.prompt})
        turns[0]["content"] = self.spec.prefix + turns[0]["content"]
        if self.spec.system is not None:
            turns.insert(0, {"role": "system", "content": self.spec.system})
        clock = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}"
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=clock + self._template, tokenize=False, add_generation_prompt=True
            )
        except Exception as e:  # a template may raise anything, its own complaints included
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            raise UserError(
                f"task {self.spec.name!r}: the chat template does not take these turns ({reason})"
            ) from None
        return str(text)

    def tokens(self, text: str) -> list[int]:
        """Token ids. In a chat the template's own special tokens count and none are added."""
        if self.spec.chat_template:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(text)["input_ids"])


def check_lengths(task: str, lengths: Sequence[tuple[Item, int]], limit: int, what: str) -> None:
    """Raises UserError where items have more tokens than the model takes: of which task, how many, the first.

    `what` says what the tokens are of, and what to do.
    """
    long = [(item.where, n) for item, n in lengths if n > limit]
    if long:
        raise UserError(
            f"task {task!r}: {len(long)} of {len(lengths)} items have more than the {limit} tokens that the model "
            f"takes; the first, {long[0][0]}, has {long[0][1]} {what}"
        )


def shared_prefix(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with, leaving each at least one; 0 where it is not worth keeping them."""
    first, last = min(rows), max(rows)
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    n = min(n, min(len(r) for r in rows) - 1)
    return n if n >= MIN_PREFIX else 0
