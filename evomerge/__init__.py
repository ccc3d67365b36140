"""evomerge: evolutionary merge-recipe optimizer for language models.

import evomerge
history = evomerge.run("quickstart")
history.winner                   # the winning recipe
history.evaluations              # one row per candidate and split
"""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.history import History

__version__ = version("evomerge")
__all__ = ["__version__", "run"]


def run(
    experiment: str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> History:
    """Run an experiment: a file, a library name, or plain data. Resumes where `out` holds the same one.

    Raises ValueError (one line) for bad input, RuntimeError where nothing could be scored.
    """
    from evomerge.config import load
    from evomerge.run import run as go

    loaded = load(experiment, overrides)
    return go(loaded, Path(out) if out is not None else Path("runs") / loaded.name)


class _Package(types.ModuleType):
    """Keeps `evomerge.run` the function: importing the module of that name would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "run" and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
