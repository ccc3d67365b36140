"""Perplexity: how well a model predicts given texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from evomerge.tasks.base import PLACE, Direction, Parsed, TaskSpec, normalised, render
from evomerge.tasks.rows import Row


@dataclass(frozen=True)
class Document:
    """One rendered text."""

    text: str


class PerplexitySpec(TaskSpec):
    """Scored by the log-likelihood of whole texts, in windows where they are long (`score/perplexity.py`)."""

    metrics: ClassVar[Mapping[str, Direction]] = {"bits_per_byte": "lower", "loss": "lower"}
    smooth: ClassVar[Mapping[str, str]] = {"bits_per_byte": "bits_per_byte", "loss": "loss"}

    kind: Literal["perplexity"]
    metric: str = Field("bits_per_byte", description="what the search optimises")
    report_metric: str = Field("bits_per_byte", description="what tables show")
    text: str = Field("{text}", description="template over the item's fields")
    window: int | None = Field(None, ge=2, description="longest input in tokens; default what the model takes")
    context: int = Field(
        1, ge=1, description="tokens in front of what is scored, in all windows but a text's first; more is dearer"
    )

    @field_validator("text")
    @classmethod
    def _a_template(cls, text: str) -> str:
        if not PLACE.search(text):
            raise ValueError(f"expected a template with a field in braces, such as {{text}}, got {text[:80]!r}")
        return text

    @model_validator(mode="after")
    def _room(self) -> PerplexitySpec:
        if self.window is not None and self.context > self.window:
            raise ValueError(f"context: at most the window of {self.window} tokens, got {self.context}")
        return self

    def parse(self, row: Row) -> Parsed:
        """The text."""
        text = render(self.text, row)
        if not text.strip():
            raise row.bad("the text is empty")
        return Parsed(normalised(text), Document(text))
