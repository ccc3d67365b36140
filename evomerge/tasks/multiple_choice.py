"""Multiple choice: a prompt, two or more continuations, one of them right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from evomerge.tasks.base import Direction, Parsed, normalised, render
from evomerge.tasks.prompts import Prompted, Shot
from evomerge.tasks.rows import Row


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

    kind: Literal["multiple_choice"] = "multiple_choice"
    metric: str = Field("accuracy", description="what the search optimises")
    report_metric: str = Field("accuracy", description="what tables show")
    choice: str = Field("{choice}", description="template of one choice; carries its own leading blank")
    choices: str = Field("choices", description="field with the list of choices")
    gold: str = Field("gold", description="field with the position of the right choice")
    end_of_text: bool = Field(False, description="close every choice with the end-of-text token")

    def parse(self, row: Row) -> Parsed:
        """Prompt, choices and the right one."""
        choices, gold = row.field(self.choices), row.field(self.gold)
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise row.bad(f"{self.choices!r} should be a list of two or more texts, got {choices!r}"[:200])
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise row.bad(
                f"{self.gold!r} should be the position of the right choice, 0 to {len(choices) - 1}, got {gold!r}"
            )
        prompt = render(self.prompt, row)
        texts = tuple(render(self.choice, row.with_fields(choice=c)) for c in choices)
        if len(set(texts)) < len(texts):
            raise row.bad(f"two of the choices are equal: {list(choices)}")
        # The content that makes two items the same to a reader: prompt and set of choices.
        identity = "\x1f".join([normalised(prompt), *sorted(normalised(c) for c in texts)])
        return Parsed(identity, Choices(prompt, texts, gold))

    def answer_of(self, content: Choices) -> str:
        """The right choice."""
        return content.choices[content.gold]
