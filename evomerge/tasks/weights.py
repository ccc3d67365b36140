"""Distance of the merged weights from the base: no items and no benchmark, but a term that an objective may have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from evomerge.tasks.base import SPLITS, Direction, Item, TaskSpec


class WeightsSpec(TaskSpec):
    """`distance` is ||theta - theta_0|| / ||theta_0|| over all weights (`score/weights.py`); the base has 0."""

    metrics: ClassVar[Mapping[str, Direction]] = {"distance": "lower"}
    benchmark: ClassVar[bool] = False

    kind: Literal["weights"]
    metric: str = Field("distance", description="what the search optimises")
    report_metric: str = Field("distance", description="what is shown of a candidate")

    @model_validator(mode="after")
    def _no_items(self) -> WeightsSpec:
        if self.data is not None or any(isinstance(v, str) for v in self.splits.values()):
            raise ValueError("kind weights looks at no items; remove data and splits")
        return self

    @property
    def needs_data(self) -> bool:
        """There are no files."""
        return False

    def load(self, folder: Path) -> tuple[Item, ...]:
        """One item a split, which stands for the weights."""
        return tuple(Item(s, s, self.name, s, None) for s in SPLITS)
