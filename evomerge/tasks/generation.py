"""Generation: the model writes an answer, greedily, and what it wrote is compared with the accepted answers.

An answer is judged in this order: the text before the first stop string; the part that `extract` takes out of it; both
sides normalised; equal to one of the accepted answers, as numbers within the tolerance or as text.

Patterns come from experiment files and run over what a model wrote. Their length is bounded, so is the number of
characters that they may look at, recursion is refused, and matching is cut off after `PATTERN_SECONDS`. A cut-off
raises `SlowPattern`: a silent 0 would depend on the machine's speed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from evomerge.errors import RunError
from evomerge.tasks.base import Direction, Item, Parsed, normalised, render
from evomerge.tasks.prompts import Prompted, Shot
from evomerge.tasks.rows import Row

MAX_PATTERN = 500
"""Characters of a regular expression."""
MAX_REPEATS = 10_000
"""Product of a pattern's `{n}` repeats, which the regex package lays out in memory."""
MAX_TEXT = 100_000
"""Characters of an answer that are looked at: its last ones."""
LOOKED_AT = 100
"""Items whose targets are compared with the pattern beforehand."""
PATTERN_SECONDS = 1.0
"""For one answer. Patterns without nested repeats take microseconds."""


class SlowPattern(RunError):
    """A regular expression backtracks without end."""


@dataclass(frozen=True)
class Question:
    """A rendered prompt, the accepted answers (the first one is the one that few-shot examples show)."""

    prompt: str
    targets: tuple[str, ...]
    shots: tuple[Shot, ...] = ()


class Extract(BaseModel):
    """Which part of the text is the answer: what a pattern matches, or a number, or a number in what it matches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    regex: str | None = Field(
        None, max_length=MAX_PATTERN, description="the first group, or the whole match where it has none"
    )
    number: bool = Field(False, description="answers are numbers: signs, decimals, grouped digits, any script's digits")
    take: Literal["first", "last"] = Field("last", description="which match, where there are several")
    decimal: Literal[".", ","] = Field(".", description="the decimal mark; the other one groups thousands")
    tolerance: float = Field(
        1e-6, ge=0, allow_inf_nan=False, description="largest difference of equal numbers; 0 for exact"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"number": True} if data == "number" else data

    @field_validator("regex")
    @classmethod
    def _bounded(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        if re.search(r"\(\?(?:R|\d|&|P>|[+-]\d)", pattern):
            raise ValueError("recursive patterns are not supported")
        repeats = 1
        for n in re.findall(r"\{(\d+)", pattern):
            repeats *= max(int(n), 1)
        if repeats > MAX_REPEATS:
            raise ValueError(f"the repeats in braces multiply to {repeats}, at most {MAX_REPEATS} are supported")
        _compiled(pattern)
        return pattern

    @model_validator(mode="after")
    def _something(self) -> Extract:
        if self.regex is None and not self.number:
            raise ValueError("extract: give a regex, or number: true, or both")
        return self

    def answer(self, text: str) -> str | None:
        """The part of `text` that is the answer, or None where there is none. Raises SlowPattern."""
        pick = -1 if self.take == "last" else 0
        if self.regex is not None:
            found = _matches(self.regex, text)
            if not found:
                return None
            text = found[pick]
        if not self.number:
            return text
        figures = list(numbers(text, self.decimal))
        return figures[pick] if figures else None


Normalise = Literal["strip", "spaces", "case", "punctuation", "unicode"]


class GenerationSpec(Prompted):
    """Scored by what the model writes behind the prompt, token by token the likeliest (`score/generation.py`)."""

    metrics: ClassVar[Mapping[str, Direction]] = {
        "exact_match": "higher",
        "tokens": "lower",
        "stopped": "higher",
        "extracted": "higher",
    }
    shares: ClassVar[frozenset[str]] = frozenset({"exact_match", "stopped", "extracted"})

    kind: Literal["generation"]
    metric: str = Field("exact_match", description="what the search optimises")
    report_metric: str = Field("exact_match", description="what tables show")
    target: str = Field("target", description="field with the answer: a text, a number, or a list of accepted ones")
    max_tokens: int = Field(256, ge=1, le=32_768, description="longest answer")
    stop: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(
        (), max_length=16, description="texts that end an answer, themselves no part of it"
    )
    extract: Extract | None = Field(None, description="the part that counts: `number`, or a regex and more")
    normalise: tuple[Normalise, ...] = Field(
        ("strip",), description="both sides, before they are compared: white space at the ends, runs of it, and so on"
    )

    def parse(self, row: Row) -> Parsed:
        """The prompt and the accepted answers."""
        value = row.field(self.target)
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, str | int | float) and not isinstance(v, bool) for v in values):
            raise row.bad(f"{self.target!r} should be a text, a number or a list of them, got {value!r}"[:200])
        targets = tuple(str(v) for v in values)
        for target in targets:
            self._acceptable(target, row)
        prompt = render(self.prompt, row)
        return Parsed(normalised(prompt), Question(prompt, targets))

    def _acceptable(self, target: str, row: Row) -> None:
        if self.extract is not None and self.extract.number:
            if len(list(numbers(target, self.extract.decimal))) != 1:
                raise row.bad(f"{self.target!r} should be one number (extract: number), got {target!r}"[:200])
        elif not tidy(target, self.normalise):
            raise row.bad(f"{self.target!r} is empty once normalised, got {target!r}"[:200])

    def answer_of(self, content: Question) -> str:
        """The first accepted answer."""
        return content.targets[0]

    def remarks(self, items: tuple[Item, ...]) -> list[str]:
        """Where the pattern matches nothing that the items show: the examples' answers, or else the targets."""
        if self.extract is None or self.extract.regex is None:
            return []
        shown = [s.answer for s in items[0].content.shots]
        texts = shown or [t for i in items[:LOOKED_AT] for t in i.content.targets]
        if any(self.extract.answer(t) is not None for t in texts):
            return []
        what = f"the pattern {self.extract.regex!r} matches no {'few-shot answer' if shown else 'target'}, such as"
        if shown:
            return [f"{what} {texts[0][:60]!r}: a model that answers like them scores 0; see few_shot.answer"]
        return [f"{what} {texts[0][:60]!r}: only answers that it matches can be right, so the prompt must ask for them"]


# -- judging --------------------------------------------------------------------------------------------------


def counted(text: str, extract: Extract | None) -> str | None:
    """The part of a written text that is the answer, None where there is none. Raises SlowPattern."""
    text = text[-MAX_TEXT:]
    return text if extract is None else extract.answer(text)


def right(text: str, targets: Sequence[str], extract: Extract | None, normalise: Sequence[Normalise]) -> bool:
    """Whether a written text, already cut at its stop string, answers the item. Raises SlowPattern."""
    answer = counted(text, extract)
    if answer is None:
        return False
    if extract is not None and extract.number:
        wanted = (next(numbers(t, extract.decimal)) for t in targets)
        return any(abs(Decimal(answer) - Decimal(w)) <= Decimal(extract.tolerance) for w in wanted)
    return tidy(answer, normalise) in {tidy(t, normalise) for t in targets}


def tidy(text: str, how: Sequence[Normalise]) -> str:
    """A text normalised: unicode (NFKC), case, punctuation left out, runs of white space, ends; in this order."""
    if "unicode" in how:
        text = unicodedata.normalize("NFKC", text)
    if "case" in how:
        text = text.casefold()
    if "punctuation" in how:
        text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    if "spaces" in how:
        text = re.sub(r"\s+", " ", text)
    return text.strip() if "strip" in how else text


CURRENCY = "$€£¥₹₩"
MARKS = str.maketrans(
    "\u2212\uff0d\uff0e\uff0c\uff04\uffe5\u066b\u066c\u2019\u00a0\u202f",
    "--.,$\u00a5.,'''",
)
"""Minus sign, full-width and Arabic marks as ASCII; blanks that do not break as apostrophes: both group digits."""


def numbers(text: str, decimal: str = ".") -> Iterator[str]:
    """All numbers of a text, in order, as Decimal takes them.

    Digits of any script, full width included; groups of three digits behind an apostrophe, a blank that does not break
    or the mark that is not the decimal one; decimals; exponents; a minus that follows no letter, digit or closing
    bracket, also in front of a currency sign.
    """
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text.translate(MARKS))
    for match in _number(decimal).finditer(text):
        digits = re.sub(r"[^0-9]", "", match["whole"] or "0")
        yield f"{'-' if match['minus'] else ''}{digits}.{match['part'] or '0'}e{match['power'] or '0'}"


@cache
def _number(decimal: str) -> re.Pattern[str]:
    mark, group = (r"\.", ",") if decimal == "." else (",", r"\.")
    return re.compile(
        rf"(?:(?<![\w)\]])(?P<minus>-)[{CURRENCY}]?)?"
        rf"(?:(?P<whole>\d{{1,3}}(?P<by>[{group}'])\d{{3}}(?:(?P=by)\d{{3}})*(?!\d)|\d+)|(?<!\d)(?={mark}\d))"
        rf"(?:{mark}(?P<part>\d+))?(?:[eE](?P<power>[-+]?\d{{1,3}})(?!\w))?"
    )


@cache
def _compiled(pattern: str) -> Any:
    import regex

    try:
        return regex.compile(pattern)
    except (regex.error, MemoryError, RecursionError, OverflowError, ValueError) as e:
        raise ValueError(f"is no regular expression ({e or type(e).__name__})") from None


def _matches(pattern: str, text: str) -> list[str]:
    """All that a pattern matches: its first group where it has one, else the whole. Raises SlowPattern."""
    try:
        found = list(_compiled(pattern).finditer(text, timeout=PATTERN_SECONDS))
    except TimeoutError:
        raise SlowPattern(
            f"the pattern {pattern!r} took longer than {PATTERN_SECONDS:g} s on an answer of {len(text)} characters; "
            "write it without repeats inside repeats"
        ) from None
    groups = [m[1] if m.re.groups else m[0] for m in found]
    return [g for g in groups if g is not None]
