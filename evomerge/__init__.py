"""evomerge: evolutionary merge-recipe optimizer for language models.

import evomerge
history = evomerge.run("quickstart")
history.winner                   # the winning recipe
history.evaluations              # one row per candidate and split
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before `def run`: importing the module of that name later would put it in the function's place.
from evomerge import run as _loop
from evomerge.config import load
from evomerge.history import History
from evomerge.tasks.base import NOTHING, Allowed

__version__ = version("evomerge")
__all__ = ["Allowed", "History", "__version__", "run"]


def run(
    experiment: str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    allow: Allowed = NOTHING,
) -> History:
    """Run an experiment: a file, a library name, or plain data. Resumes where `out` holds the same one.

    `allow` permits what an experiment may not do by itself: `evomerge.Allowed(code=True, test_sets=True)`.
    Raises ValueError (one line) for bad input, RuntimeError where nothing could be scored.
    """
    loaded = load(experiment, overrides)
    return _loop.run(loaded, Path(out) if out is not None else Path("runs") / loaded.name, allow=allow)
