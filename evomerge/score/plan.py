"""What a scorer compiles a task into, once per run. Plain arrays, picklable, no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from evomerge.canonical import digest
from evomerge.proposal import ItemSet
from evomerge.tasks.base import SPLITS, Item, TaskSpec


@dataclass(frozen=True)
class PlanShape:
    """Batch shape, chosen once and journalled: on a GPU or in bf16 the last bits of a score depend on it."""

    batch_tokens: int = 4096
    """Padded tokens in one forward pass."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"batch_tokens": self.batch_tokens}


@dataclass(frozen=True)
class Target:
    """What tasks are compiled for: the base's tokenizer, its context length in tokens, and the batch shape.

    `ends` are the tokens that end what the model writes.
    """

    tokenizer: Any
    limit: int
    shape: PlanShape
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scorable:
    """One candidate, built: a stock transformers model, its tokenizer, and how far its weights are from the base.

    `distance()` is the relative distance ||theta - theta_0|| / ||theta_0|| over all weights.
    """

    model: Any
    tokenizer: Any
    distance: Callable[[], float]


@dataclass(frozen=True)
class Plan(ABC):
    """A compiled task; each kind adds what it scores. `item_ids` and `splits` are in the order of the items."""

    task: str
    kind: str
    shape: PlanShape
    item_ids: tuple[str, ...]
    splits: Mapping[str, tuple[int, ...]]

    @cached_property
    def id(self) -> str:
        """Hash of all that scores depend on: equal ids mean equal scores. Part of the score cache's key."""
        return digest([self.task, self.kind, self.shape.to_json(), *self.content(), self.item_ids])

    @abstractmethod
    def content(self) -> Sequence[Any]:
        """Plain data of what is scored and how, for `id`."""

    @abstractmethod
    def tokens(self, positions: Sequence[int]) -> int:
        """Tokens that the model computes for these items, padding apart; an upper bound where that is not known."""

    def least_tokens(self, positions: Sequence[int]) -> int:
        """The same from below."""
        return self.tokens(positions)


def places(spec: TaskSpec, items: Sequence[Item], shape: PlanShape) -> dict[str, Any]:
    """The fields that all plans share, from a task's items."""
    return {
        "task": spec.name,
        "kind": spec.kind,
        "shape": shape,
        "item_ids": tuple(i.id for i in items),
        "splits": {s: tuple(n for n, i in enumerate(items) if i.split == s) for s in SPLITS},
    }


class Scorer(Protocol):
    """One kind of task: compile once, score many models."""

    stateless: bool
    """Whether it makes the same passes through every model, each for its output alone (see `merge.route`)."""

    def compile(self, spec: Any, items: tuple[Item, ...], target: Target) -> Plan:
        """Tokenise and lay out every item. Raises UserError for items that do not fit the model."""
        ...

    def score(self, candidate: Scorable, plan: Any, positions: tuple[int, ...]) -> Mapping[str, NDArray[Any]]:
        """metric -> one float32 score per item, in the order of `positions`. Raises NonFinite on NaN logits."""
        ...


@runtime_checkable
class Differentiable(Protocol):
    """A scorer whose kind has metrics that can be differentiated (`TaskSpec.smooth` names them)."""

    def mean_in_parts(self, candidate: Scorable, plan: Any, positions: tuple[int, ...], metric: str) -> Iterator[Any]:
        """Scalar tensors, one a batch, whose sum is the mean of a metric over the items.

        The caller takes a batch's derivative before it asks for the next one, so that activations of one batch are
        in memory at a time. Raises NonFinite on NaN logits.
        """
        ...


def item_sets(plans: Mapping[str, Plan]) -> dict[str, ItemSet]:
    """The full item set of every split."""
    splits = next(iter(plans.values())).splits
    return {s: ItemSet(s, {t: p.splits[s] for t, p in plans.items()}) for s in splits}
