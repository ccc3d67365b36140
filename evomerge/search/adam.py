"""Adam on the merge coefficients: gradient descent through the merged model.

Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980, algorithm 1; symbols are the
paper's. After AdaMerging (arXiv 2310.02575), which learns merge coefficients by Adam from the entropy of predictions;
here the loss is the tasks' cross-entropy on labelled items.

What is ours and why:
- genomes are projected to the unit cube after every step;
- a step that leads to a failed candidate is halved until one can be scored, without learning from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.proposal import Genome, Proposal, Result, frozen_genome
from evomerge.search.base import Ids, Needs, Start, check_told
from evomerge.space import Axis

EPSILON = 1e-8
"""The paper's epsilon."""


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file. Lengths are in units of the unit cube."""

    learning_rate: float = 0.05
    """alpha: about how far every gene moves in a step."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of their squares."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate: `0 < learning_rate <= 1` must hold, but got {self.learning_rate}")
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: `0 <= {name} < 1` must hold, but got {value}")


class Adam:
    """One proposal a generation: the point that is reached, whose gradient leads to the next."""

    needs = Needs(axis_kinds=frozenset({"float"}), scope="none", gradients=True)

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        self._options = options or Options()
        self._ids = ids
        self._group = -1
        self._theta: Genome = start.genome
        self._m = np.zeros(len(axes))
        self._v = np.zeros(len(axes))
        self._t = 0
        self._waiting: int | None = None
        self._scored: Genome | None = None
        """The last point that could be scored."""

    def ask(self, n: int) -> list[Proposal]:
        """The point that is reached; [] while its tell is awaited."""
        if n < 1 or self._waiting is not None:
            return []
        self._group += 1
        self._waiting = next(self._ids)
        return [Proposal(self._waiting, self._group, genome=self._theta)]

    def tell(self, p: Proposal, r: Result) -> None:
        """Take a step. Raises ValueError for a stranger, told twice, a NaN loss, or a result without its gradient."""
        check_told(p, r, [self._waiting])
        loss = r.loss
        assert p.genome is not None
        if r.gradient is None and math.isfinite(loss):
            raise ValueError(f"proposal {p.id} was told without its gradient")
        self._waiting = None
        if r.gradient is None:
            if self._scored is not None:
                self._theta = frozen_genome((self._scored + p.genome) / 2)
            return
        self._scored = p.genome
        self._t += 1
        o, [g] = self._options, r.gradient
        self._m = o.beta1 * self._m + (1 - o.beta1) * g
        self._v = o.beta2 * self._v + (1 - o.beta2) * g**2
        m_hat = self._m / (1 - o.beta1**self._t)
        v_hat = self._v / (1 - o.beta2**self._t)
        self._theta = frozen_genome(np.clip(p.genome - o.learning_rate * m_hat / (np.sqrt(v_hat) + EPSILON), 0.0, 1.0))

    def stop(self) -> Mapping[str, float]:
        """Never by itself: the budget ends the search."""
        return {}

    def recommend(self, k: int) -> list[Proposal]:
        """Where the last step leads to."""
        if k < 1 or self._scored is None:
            return []
        return [Proposal(next(self._ids), self._group, genome=self._theta)]
