"""Known test sets: a packaged list of digests of benchmark questions that nobody should search on.

A question is known by what it says, not by its file: the digest is taken over its letters and digits alone (NFKC,
case-folded), so a copy with other blanks, punctuation or width is found, in whatever field it stands. A rewritten or
translated question is not. The list is written by `experiments/test_sets.py`, which also says what it holds.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".txt")
DIGITS = 12
"""Hex digits of a digest: with some thousands of entries one row in 10^10 is mistaken for a test question."""


def question_digest(text: str) -> str | None:
    """The digest of a question; None for a text without letters and digits."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    key = "".join(c for c in folded if c.isalnum())
    return hashlib.sha256(key.encode()).hexdigest()[:DIGITS] if key else None


@cache
def known() -> dict[str, str]:
    """Digest -> the benchmark that it is of. The file: a line `# benchmark`, then its digests, one a line."""
    out: dict[str, str] = {}
    benchmark = ""
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            benchmark = line[2:]
        else:
            out[line] = benchmark
    return out


def test_set_of(values: Iterable[Any]) -> str | None:
    """The benchmark of whose test set one of these fields is a question, else None."""
    for value in values:
        if isinstance(value, str) and (digest := question_digest(value)) in known():
            return known()[digest]  # type: ignore[index]
    return None
