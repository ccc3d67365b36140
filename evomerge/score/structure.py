"""Size and speed of a candidate, which for a layer route are those of the plain model that it would be exported as.

Columns, the same value for every item:
  depth       layers, a layer that the route goes over repeatedly counted each time
  parameters  weights in millions (10^6), repeated layers counted each time, a tied head not
  latency     seconds of a forward pass over one sequence of fixed tokens: the median of several behind a first one
              that is not counted; only where the task is about it
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.architectures import ARCHITECTURES
from evomerge.errors import UserError
from evomerge.score.plan import Plan, Scorable, Target, places
from evomerge.tasks.base import Item
from evomerge.tasks.structure import StructureSpec


@dataclass(frozen=True)
class StructurePlan(Plan):
    """One item a split; `length` of the sequence that is timed, and how often: 0 where nothing is."""

    length: int
    repetitions: int

    def content(self) -> list[Any]:
        """How latency is measured."""
        return [self.length, self.repetitions]

    def tokens(self, positions: Sequence[int]) -> int:
        """Tokens of all timed passes and the first one; none where nothing is timed."""
        return (self.repetitions + 1) * self.length if self.repetitions and positions else 0


class Structure:
    """Scorer of the kind `structure`."""

    # A pass that begins behind the hidden states of another candidate would be too short.
    stateless = False

    def compile(self, spec: StructureSpec, items: tuple[Item, ...], target: Target) -> StructurePlan:
        """The plan. Raises UserError where the timed sequence is longer than the model takes."""
        if spec.timed and spec.tokens > target.limit:
            raise UserError(f"task {spec.name!r}: tokens is {spec.tokens}; the model takes {target.limit}")
        length, repetitions = (spec.tokens, spec.repetitions) if spec.timed else (0, 0)
        return StructurePlan(**places(spec, items, target.shape), length=length, repetitions=repetitions)

    def score(
        self, candidate: Scorable, plan: StructurePlan, positions: tuple[int, ...]
    ) -> Mapping[str, NDArray[np.float32]]:
        """The columns; `latency` only where it is timed."""
        model = candidate.model
        values = {"depth": model.config.num_hidden_layers, "parameters": weights_of(model) / 1e6}
        if plan.repetitions:
            values["latency"] = seconds_of(model, plan.length, plan.repetitions)
        return {metric: np.full(len(positions), value, dtype=np.float32) for metric, value in values.items()}


def weights_of(model: Any) -> int:
    """Number of weights in a plain copy of a live model, in which layers that share weights have their own."""
    row = ARCHITECTURES.get(model.config.model_type)
    layers = [] if row is None else model.get_submodule(row.stack)
    within = [p for layer in layers for p in layer.parameters()]
    places = {id(p) for p in within}
    return sum(p.numel() for p in within) + sum(p.numel() for p in model.parameters() if id(p) not in places)


def seconds_of(model: Any, length: int, repetitions: int) -> float:
    """Median time of a forward pass over one sequence of `length` tokens, behind one pass that is not counted."""
    embedding = model.get_input_embeddings()
    tokens = (torch.arange(length, device=embedding.weight.device) % embedding.num_embeddings)[None]
    seconds = []
    with torch.inference_mode():
        for _ in range(repetitions + 1):
            _synchronise(tokens.device)
            start = time.perf_counter()
            model(tokens, use_cache=False)
            _synchronise(tokens.device)
            seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def _synchronise(device: torch.device) -> None:
    """Wait for what is queued on a GPU, which calls return before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
