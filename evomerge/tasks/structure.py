"""Size and speed of the merged model: no items and no benchmark, but objectives that trade accuracy for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from evomerge.tasks.base import SPLITS, Direction, Item, TaskSpec


class StructureSpec(TaskSpec):
    """What a candidate would be as an exported model (`score/structure.py`): of interest where layer routes are
    searched, as merges all have their base's structure.

    `depth` in layers, `parameters` in millions of weights, repeated layers counted each time, and `latency` in
    seconds, which is measured where it is the task's metric or report_metric, and only there: it differs from one
    measurement to the next. What was recorded counts, so that a run resumes exactly; a fresh run may go another way.
    """

    metrics: ClassVar[Mapping[str, Direction]] = {"depth": "lower", "parameters": "lower", "latency": "lower"}
    benchmark: ClassVar[bool] = False
    measured: ClassVar[frozenset[str]] = frozenset({"latency"})

    kind: Literal["structure"]
    metric: str = Field("depth", description="what the search optimises: depth, parameters or latency")
    report_metric: str = Field("depth", description="what is shown of a candidate")
    tokens: int = Field(128, ge=1, le=1 << 20, description="of latency: length of the one sequence in a forward pass")
    repetitions: int = Field(
        5, ge=1, le=1000, description="of latency: passes after a first one that is not counted; their median is taken"
    )

    @model_validator(mode="after")
    def _no_items(self) -> StructureSpec:
        if self.data is not None or any(isinstance(v, str) for v in self.splits.values()):
            raise ValueError("kind structure looks at no items; remove data and splits")
        return self

    @property
    def needs_data(self) -> bool:
        """There are no files."""
        return False

    @property
    def timed(self) -> bool:
        """Whether latency is measured."""
        return "latency" in (self.metric, self.report_metric)

    @property
    def directions(self) -> Mapping[str, Direction]:
        """Lower is better; latency is among them where it is measured."""
        return {m: way for m, way in self.metrics.items() if m != "latency" or self.timed}

    def remarks(self, items: tuple[Item, ...]) -> list[str]:
        """Measured values are no function of the recipe."""
        if not self.timed:
            return []
        return [
            "latency is measured, so a fresh run with the same seed may differ (a resumed one goes on exactly); other "
            "work on the machine disturbs it, that of further workers too: take workers.count 1"
        ]

    def load(self, folder: Path) -> tuple[Item, ...]:
        """One item a split, which stands for the model."""
        return tuple(Item(s, s, self.name, s, None) for s in SPLITS)
