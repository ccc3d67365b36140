"""Scorers by kind of task. A new kind is one file and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from evomerge.score.plan import Scorer

SCORERS: Mapping[str, str] = {
    "multiple_choice": "evomerge.score.multiple_choice:MultipleChoice",
}


def make_scorer(kind: str) -> Scorer:
    """A scorer by its kind (the kinds are checked when a fitness file is read)."""
    module, _, name = SCORERS[kind].partition(":")
    return getattr(importlib.import_module(module), name)()  # type: ignore[no-any-return]
