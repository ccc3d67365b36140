"""The Python interface: run an experiment, look at what it found, write it out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.config import load
from evomerge.errors import RunError
from evomerge.history import History
from evomerge.run import run as run_loop
from evomerge.tasks.base import NOTHING, Allowed


class Run(History):
    """A run directory, finished or live: `Run.read("runs/quickstart")`, or what `run` returns.

    `winner` is the winning recipe, `winner_id` its number, `front` the numbers of the non-dominated candidates
    (the winner first), `evaluations` one row per candidate and split, ready for a data frame.
    """

    def export(self, to: str | Path, candidate: int | None = None, format: str = "hf") -> Path:
        """Write a candidate (default the winner) as a checkpoint folder (`hf`) or a configuration (`mergekit`).

        Returns the path. Raises UserError where there is no such candidate, or something stands at `to`.
        """
        from evomerge.export.write import write_export

        if candidate is None:
            self.winner  # noqa: B018 (raises the error that says what to do)
            candidate = self.winner_id
        assert candidate is not None
        return write_export(self, candidate, format, Path(to))

    def report(self, to: str | Path | None = None) -> Path:
        """Write the run's page, by default as report.html in its directory; returns the path."""
        from evomerge.report.page import write_page

        return write_page(self, None if to is None else Path(to))

    def table(self, split: str = "report") -> str:
        """Scores with intervals and the winner against every baseline, as text."""
        from evomerge.report.results import text_table

        return text_table(self, split)


def run(
    experiment: str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    allow: Allowed = NOTHING,
) -> Run:
    """Run an experiment: a file, a library name, or plain data. Resumes where `out` holds the same one.

    `overrides` are dotted keys to values, such as {"search.seed": 2}. `allow` permits what an experiment may not do
    by itself: `evomerge.Allowed(code=True, test_sets=True)`. Leaves what `evomerge run` leaves, the page among it; a
    page that cannot be written is a warning. Raises ValueError (one line) for bad input, RuntimeError where nothing
    could be scored.
    """
    from evomerge.export.write import write_asked

    loaded = load(experiment, overrides)
    path = Path(out) if out is not None else Path("runs") / loaded.name
    run_loop(loaded, path, allow=allow)
    done = Run.read(path)
    write_asked(done, loaded.export.format)
    try:
        done.report()
    except RunError as e:
        warnings.warn(f"no page: {e}; make one with report(to)", stacklevel=2)
    return done
