"""Progress on stderr: one live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import IO, TYPE_CHECKING, Protocol

import numpy as np

from evomerge.pareto import Losses
from evomerge.proposal import Evaluation, ItemSet

if TYPE_CHECKING:
    from evomerge.budget import Allowance
    from evomerge.prepare import Prepared

EVERY_SECONDS = 10.0


class Progress(Protocol):
    """What the loop tells while it runs."""

    def begin(self, prepared: Prepared, allowance: Allowance) -> None:
        """Everything is checked; work starts."""
        ...

    def scored(self, role: str, items: ItemSet, e: Evaluation) -> None:
        """One evaluation is in the journal."""
        ...

    def kept(self, proposal: int, role: str, losses: Losses, e: Evaluation, *, whole: bool = True) -> None:
        """One candidate of the search split has its losses, over all items or (not `whole`) a sample of them."""
        ...

    def note(self, text: str) -> None:
        """Something the user should know."""
        ...

    def end(self) -> None:
        """The run is over."""
        ...


class Silent:
    """No progress: for tests and the Python interface."""

    def begin(self, prepared: Prepared, allowance: Allowance) -> None:
        """Nothing."""

    def scored(self, role: str, items: ItemSet, e: Evaluation) -> None:
        """Nothing."""

    def kept(self, proposal: int, role: str, losses: Losses, e: Evaluation, *, whole: bool = True) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class Terminal:
    """Best so far, evaluations, items, time left."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        """Write to `stream`, by default stderr."""
        self._out = stream or sys.stderr
        self._live = self._out.isatty()
        self._total: int | None = None
        self._minutes: float | None = None
        self._searched = 0
        self._known: set[int] = set()
        """Candidates that were counted: with sampled items some are scored more than once."""
        self._items = 0
        self._failed = 0
        self._best = math.inf
        self._best_text = "-"
        self._front: list[Losses] = []
        self._phase = "baselines"
        self._start = self._first = self._last = time.monotonic()
        self._report_metrics: dict[str, str] = {}

    def begin(self, prepared: Prepared, allowance: Allowance) -> None:
        """Print what will be done."""
        self._total = allowance.total
        self._minutes = allowance.budget.minutes
        self._report_metrics = {t.name: t.report_metric for t in prepared.experiment.benchmarks}
        both = zip(prepared.stages, prepared.spaces, strict=True)
        stages = ", ".join(prepared.experiment.axes_of(stage, len(space.axes)) for stage, space in both)
        if self._minutes is not None:
            budget = f"{self._minutes:g} minutes"
        elif self._total is not None:
            budget = f"{self._total} candidates"
        else:
            budget = f"{allowance.budget.item_evaluations:,} item evaluations"
        for text in prepared.notes:
            self.note(text)
        self.note(
            f"{prepared.experiment.name}: {prepared.manifest.parameters:,} parameters, "
            f"{len(prepared.manifest.experts)} experts, {stages}, "
            f"{prepared.items['search'].count} search items, {budget}"
        )
        self._start = self._first = time.monotonic()

    def scored(self, role: str, items: ItemSet, e: Evaluation) -> None:
        """Count items; the line is drawn when the loss is known."""
        self._items += items.count
        if not e.ok:
            self._failed += 1
        if items.name in ("select", "report"):
            self._phase = items.name
            self._draw()

    def kept(self, proposal: int, role: str, losses: Losses, e: Evaluation, *, whole: bool = True) -> None:
        """Follow the best candidate of those that were scored on all items."""
        if role == "search" and proposal not in self._known:
            if self._searched == 0:
                self._first = time.monotonic()
            self._searched += 1
            self._known.add(proposal)
        self._phase = role
        if not whole:
            pass
        elif len(losses) > 1:
            self._follow_front(losses)
        elif losses[0] < self._best and e.scores is not None:
            self._best = float(losses[0])
            means = {t: float(e.scores[t][m].mean()) for t, m in self._report_metrics.items()}
            names = "/".join(dict.fromkeys(self._report_metrics.values()))
            parts = f"{names}: " + " ".join(f"{t} {x:.2f}" for t, x in means.items())
            self._best_text = f"#{proposal} loss {self._best:.4f} ({parts})"
        self._draw()

    def _follow_front(self, losses: Losses) -> None:
        """With several objectives there is no best one: how many are non-dominated, and the least of each loss."""
        if not np.isfinite(losses).all() or any((x <= losses).all() for x in self._front):
            return
        self._front = [x for x in self._front if not (losses <= x).all()] + [losses]
        least = " ".join(f"{x:.3f}" for x in np.min(self._front, axis=0))
        self._best_text = f"front of {len(self._front)}, least losses {least}"

    def note(self, text: str) -> None:
        """One line of its own."""
        if self._live:
            self._out.write("\r\x1b[K")
        print(text, file=self._out, flush=True)

    def end(self) -> None:
        """Close the live line."""
        self._draw(force=True)
        if self._live:
            self._out.write("\n")
            self._out.flush()

    def _left(self) -> str:
        now = time.monotonic()
        if self._minutes is not None:
            return _clock(max(0.0, self._minutes * 60 - (now - self._start)))
        if self._total is None or self._searched < 4:
            return "--:--"
        per = (now - self._first) / max(1, self._searched - 1)
        return _clock(per * (self._total - self._searched))

    def _draw(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._last < (0.2 if self._live else EVERY_SECONDS):
            return
        self._last = now
        of = f"/{self._total}" if self._total is not None else ""
        failed = f" | {self._failed} failed" if self._failed else ""
        line = (
            f"{self._phase:<9} {self._searched}{of} candidates | {self._items:,} items | best {self._best_text}"
            f"{failed} | {_clock(now - self._start)} gone, {self._left()} left"
        )
        if self._live:
            self._out.write("\r\x1b[K" + line)
        else:
            self._out.write(line + "\n")
        self._out.flush()


def _clock(seconds: float) -> str:
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"
