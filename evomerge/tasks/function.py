"""A user's Python function as a task: whatever can be measured on a model, in a few lines (`kind: python`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from evomerge.library import located
from evomerge.tasks.base import Direction, Parsed, TaskSpec, normalised
from evomerge.tasks.rows import Row


class FunctionSpec(TaskSpec):
    """Scored by `function(model, tokenizer, items) -> {metric: one number per item}` (`score/function.py`)."""

    kind: Literal["python"]
    function: str = Field(description="path/to/file.py:function, or module:function of what is installed")
    # A key of its own here; kinds whose metrics are fixed keep them in a class variable of this name.
    metrics: Mapping[str, Direction] = Field(  # type: ignore[misc]
        min_length=1, description="what the function gives, and which way is good"
    )
    metric: str = Field(
        default_factory=lambda given: next(iter(given.get("metrics", ())), ""),
        description="what the search optimises; default the first",
    )
    report_metric: str = Field(
        default_factory=lambda given: given.get("metric", ""), description="what tables show; default `metric`"
    )

    @field_validator("function")
    @classmethod
    def _a_place(cls, value: str) -> str:
        where, _, name = value.rpartition(":")
        plain = where.endswith(".py") or all(part.isidentifier() for part in where.split("."))
        if not name.isidentifier() or not plain:
            raise ValueError("expected path/to/file.py:function or module:function")
        return value

    @property
    def runs_code(self) -> bool:
        """Always."""
        return True

    def resolved(self, folder: Path) -> TaskSpec:
        """The same task with absolute files, the function's too."""
        where, _, name = self.function.rpartition(":")
        function = f"{located(folder, where)}:{name}" if where.endswith(".py") else self.function
        return super().resolved(folder).model_copy(update={"function": function})

    def parse(self, row: Row) -> Parsed:
        """All fields, as the function gets them."""
        fields: dict[str, Any] = dict(row.fields)
        try:
            text = json.dumps({k: v for k, v in fields.items() if k != "id"}, sort_keys=True, allow_nan=False)
        except ValueError:
            raise row.bad("holds NaN or an infinity, which is no JSON") from None
        return Parsed(normalised(text), fields)
