"""Distance of a candidate's weights from the base; the model is not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.score.plan import Plan, Scorable, Target, places
from evomerge.tasks.base import Item
from evomerge.tasks.weights import WeightsSpec


@dataclass(frozen=True)
class WeightsPlan(Plan):
    """Nothing to prepare: one item a split."""

    def content(self) -> list[Any]:
        """Nothing beyond the kind."""
        return []

    def tokens(self, positions: Sequence[int]) -> int:
        """No tokens are computed."""
        return 0


class Weights:
    """Scorer of the kind `weights`."""

    stateless = False

    def compile(self, spec: WeightsSpec, items: tuple[Item, ...], target: Target) -> WeightsPlan:
        """The plan."""
        return WeightsPlan(**places(spec, items, target.shape))

    def score(
        self, candidate: Scorable, plan: WeightsPlan, positions: tuple[int, ...]
    ) -> Mapping[str, NDArray[np.float32]]:
        """The relative distance, the same for every item."""
        return {"distance": np.full(len(positions), candidate.distance(), dtype=np.float32)}
