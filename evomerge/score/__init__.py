"""Scorers: one file a kind of task (`evomerge.tasks.KINDS` names them)."""

from __future__ import annotations

import importlib

from evomerge.score.plan import Scorer
from evomerge.tasks import KINDS


def make_scorer(kind: str) -> Scorer:
    """A scorer by its kind (the kinds are checked when a fitness file is read)."""
    module, _, name = KINDS[kind].scorer.partition(":")
    return getattr(importlib.import_module(module), name)()  # type: ignore[no-any-return]
