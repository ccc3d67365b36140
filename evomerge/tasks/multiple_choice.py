"""Multiple choice: a prompt, two or more continuations, one of them right."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from evomerge.tasks.base import Direction, Parsed, normalised, render
from evomerge.tasks.prompts import Prompted, Shot
from evomerge.tasks.rows import Row

LETTERS = {letter: n for n, letter in enumerate(string.ascii_uppercase)}


def _letter(n: int) -> str:
    """A, B, ..., and behind Z numbers."""
    return string.ascii_uppercase[n] if n < len(LETTERS) else str(n + 1)


@dataclass(frozen=True)
class Choices:
    """Rendered texts, the position of the right choice, and the task's few-shot examples."""

    prompt: str
    choices: tuple[str, ...]
    gold: int
    shots: tuple[Shot, ...] = ()


class MultipleChoiceSpec(Prompted):
    """Scored by the log-likelihood of every choice behind the prompt (`score/multiple_choice.py`)."""

    metrics: ClassVar[Mapping[str, Direction]] = {
        "accuracy": "higher",
        "accuracy_norm": "higher",
        "probability": "higher",
        "cross_entropy": "lower",
        "answer_loss": "lower",
    }
    shares: ClassVar[frozenset[str]] = frozenset({"accuracy", "accuracy_norm", "probability"})
    smooth: ClassVar[Mapping[str, str]] = {
        "accuracy": "probability",
        "accuracy_norm": "probability",
        "probability": "probability",
        "cross_entropy": "cross_entropy",
        "answer_loss": "answer_loss",
    }

    kind: Literal["multiple_choice"] = "multiple_choice"
    metric: str = Field("accuracy", description="what the search optimises")
    report_metric: str = Field("accuracy", description="what tables show")
    prompt: str = Field(
        "{question}", description="template over the item's fields; {lettered} are the choices as lines A. ..., B. ..."
    )
    choice: str = Field(
        "{choice}", description="template of one choice; carries its own leading blank; {letter} is A, B, ..."
    )
    choices: str | tuple[str, ...] = Field(
        "choices", description="field with the list of choices, or the fields that hold one each"
    )
    gold: str | Annotated[int, Field(ge=0, strict=True)] = Field(
        "gold",
        description="field with the position of the right choice, a number from 0 or a letter from A; or the position "
        "itself where it is always the same",
    )
    gold_label: str | None = Field(
        None, description="field with the right choice's label; stands in for `gold` in rows that have it"
    )
    labels: str | None = Field(
        None, description="field with the list of labels; where a row has none they are A, B, ... or 1, 2, ..."
    )
    gold_text: str | None = Field(
        None, description="field with the right choice's text; stands in for `gold` in rows that have it"
    )
    end_of_text: bool = Field(False, description="close every choice with the end-of-text token")

    def parse(self, row: Row) -> Parsed:
        """Prompt, choices and the right one."""
        choices = self._choices(row)
        gold = self._gold(row, choices)
        lettered = "\n".join(f"{_letter(n)}. {c}" for n, c in enumerate(choices))
        prompt = render(self.prompt, row.with_fields(lettered=lettered))
        texts = tuple(render(self.choice, row.with_fields(choice=c, letter=_letter(n))) for n, c in enumerate(choices))
        if len(set(texts)) < len(texts):
            raise row.bad(f"two of the choices are equal: {list(choices)}"[:200])
        # The content that makes two items the same to a reader: prompt and set of choices, whatever their letters.
        asked = normalised(render(self.prompt, row.with_fields(lettered="")))
        offered = texts if "{letter}" not in self.choice else choices
        identity = "\x1f".join([asked, *sorted(normalised(c) for c in offered)])
        return Parsed(identity, Choices(prompt, texts, gold))

    def answer_of(self, content: Choices) -> str:
        """The right choice."""
        return content.choices[content.gold]

    def _choices(self, row: Row) -> list[str]:
        found: Any = row.field(self.choices) if isinstance(self.choices, str) else [row.field(c) for c in self.choices]
        if not isinstance(found, list) or len(found) < 2 or not all(isinstance(c, str) and c for c in found):
            raise row.bad(
                f"{self.choices!r} should be a list of two or more texts, got {found!r}"[:200]
                + "; fields that hold one choice each are named as `choices: [A, B]`"
            )
        return found

    def _gold(self, row: Row, choices: list[str]) -> int:
        """The position of the right choice."""
        if self.gold_label is not None and row.has(self.gold_label):
            return self._labelled(row, self.gold_label, len(choices))
        if self.gold_text is not None and row.has(self.gold_text):
            text = row.field(self.gold_text)
            if text not in choices:
                raise row.bad(f"{self.gold_text!r} should be one of the choices {choices}, got {text!r}"[:200])
            return choices.index(text)
        gold = row.field(self.gold) if isinstance(self.gold, str) else self.gold
        position = gold
        if isinstance(gold, str):  # .csv has nothing but text
            position = int(gold) if re.fullmatch("[0-9]{1,4}", gold) else LETTERS.get(gold)
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < len(choices):
            raise row.bad(
                f"{self.gold!r} should be the position of the right choice, 0 to {len(choices) - 1} "
                f"or A to {_letter(len(choices) - 1)}, got {gold!r}"[:200]
            )
        return position

    def _labelled(self, row: Row, name: str, count: int) -> int:
        label = row.field(name)
        if self.labels is not None and row.has(self.labels):
            known = [row.field(self.labels)]
            if not isinstance(known[0], list) or len(known[0]) != count:
                raise row.bad(f"{self.labels!r} should be a list of {count} labels, got {known[0]!r}"[:200])
        else:
            known = [[_letter(n) for n in range(count)], [str(n + 1) for n in range(count)]]
        for labels in known:
            if label in labels:
                return int(labels.index(label))
        raise row.bad(f"{name!r} should be one of the labels {known[0]}, got {label!r}"[:200])
