"""What a scorer compiles a task into, once per run. Plain arrays, picklable, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.canonical import digest
from evomerge.proposal import ItemSet
from evomerge.score.tasks import Item, TaskSpec


@dataclass(frozen=True)
class PlanShape:
    """Batch shape, chosen once and journalled: on a GPU or in bf16 the last bits of a score depend on it."""

    batch_tokens: int = 4096
    """Padded tokens in one forward pass."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"batch_tokens": self.batch_tokens}


@dataclass(frozen=True)
class ChoiceTree:
    """One item as a tree: the context once, every choice as a branch of its last token.

    `tokens`, `positions`, `segments` have one entry per input token, shape (L,): segment 0 is the context
    behind the shared prefix, segment c + 1 the branch of choice c. Scored are `targets` at `rows` (indices
    into the input tokens) for choice `owners`; a choice's log-probability is the sum over its targets.
    `lengths` are the choices' characters, by which `accuracy_norm` divides.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    segments: NDArray[np.int32]
    rows: NDArray[np.int32]
    targets: NDArray[np.int32]
    owners: NDArray[np.int32]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class Plan:
    """A compiled multiple-choice task. `prefix` holds the tokens that all contexts share, shape (P,)."""

    task: str
    kind: str
    shape: PlanShape
    prefix: NDArray[np.int32]
    trees: tuple[ChoiceTree, ...]
    item_ids: tuple[str, ...]
    splits: Mapping[str, tuple[int, ...]]

    @cached_property
    def id(self) -> str:
        """Hash of every token and the shape: equal ids mean equal scores. Part of the score cache's key."""
        rows = [
            [t.tokens.tolist(), t.segments.tolist(), t.rows.tolist(), t.targets.tolist(), t.lengths, t.gold]
            for t in self.trees
        ]
        return digest([self.task, self.kind, self.shape.to_json(), self.prefix.tolist(), rows, self.item_ids])

    @property
    def input_tokens(self) -> int:
        """Tokens computed for all items, the prefix once."""
        return len(self.prefix) + sum(len(t.tokens) for t in self.trees)


class Scorer(Protocol):
    """One kind of task: compile once, score many models."""

    def compile(self, spec: TaskSpec, items: tuple[Item, ...], tokenizer: Any, limit: int, shape: PlanShape) -> Plan:
        """Tokenise and lay out every item. Raises UserError for items that do not fit the model."""
        ...

    def score(self, model: Any, plan: Plan, positions: tuple[int, ...]) -> Mapping[str, NDArray[np.float32]]:
        """metric -> one score per item, in the order of `positions`."""
        ...


def item_sets(plans: Mapping[str, Plan]) -> dict[str, ItemSet]:
    """The full item set of every split."""
    splits = next(iter(plans.values())).splits
    return {s: ItemSet(s, {t: p.splits[s] for t, p in plans.items()}) for s in splits}
