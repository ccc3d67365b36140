"""Frank-Wolfe-like greedy selection: step by step towards the expert that helps most.

After FW-Merging (arXiv 2503.12649), which asks gradients for the best corner of the simplex of base and experts;
here the corner is found by scoring a step towards each, so it is black box. Steps are 2/(t + 2) (Jaggi 2013,
"Revisiting Frank-Wolfe", algorithm 1), halved while no corner improves. Memory does not grow with the number of
experts beyond what the pool itself takes, and a step costs K + 1 evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.proposal import Proposal, Result
from evomerge.search.base import Ids, Needs, Start
from evomerge.search.recipes import Mix, Mixes
from evomerge.space import Axis


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file."""

    smallest: float = 0.02
    """Step below which the search ends."""

    def __post_init__(self) -> None:
        if not 0 < self.smallest < 1:
            raise ValueError(f"smallest: `0 < smallest < 1` must hold, but got {self.smallest}")


class FrankWolfe:
    """A round scores a step towards every corner; the best of them is the next point where it improves."""

    needs = Needs(proposes="recipes", scope="archive")

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        self._options = options or Options()
        self._mixes = Mixes(start, ids)
        manifest = self._mixes.manifest
        self._corners = (manifest.base, *manifest.experts)
        self._point: Mix = {}
        self._loss = math.inf
        self._moves = 0
        self._step = 1.0
        # The first round is the corners themselves: a step of 1 from anywhere.
        self._mixes.begin([{c: 1.0} for c in self._corners])

    def ask(self, n: int) -> list[Proposal]:
        """Up to n recipes; [] while tells are awaited, and at the end."""
        return self._mixes.ask(n)

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result. Raises ValueError for a stranger, told twice, or a NaN loss."""
        told = self._mixes.tell(p, r)
        if told is None:
            return
        loss, mix = min(told, key=lambda t: t[0])
        if loss < self._loss:
            self._loss, self._point = loss, mix
            self._moves += 1
            self._step = min(self._step, 2 / (self._moves + 2))
        else:
            self._step /= 2
        if self._point and self._step >= self._options.smallest:
            self._mixes.begin([self._towards(c) for c in self._corners])

    def _towards(self, corner: str) -> Mix:
        mix = {name: share * (1 - self._step) for name, share in self._point.items()}
        mix[corner] = mix.get(corner, 0.0) + self._step
        return mix

    def stop(self) -> Mapping[str, float]:
        """When the step is too small to matter, or nothing could be scored."""
        return {"step": self._step} if self._mixes.done else {}

    def recommend(self, k: int) -> list[Proposal]:
        """Nothing that has not been scored already."""
        return []
