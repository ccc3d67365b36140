"""CMA-ES: covariance matrix adaptation evolution strategy, on pycma.

Hansen 2016, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772; restarts with doubled population
after Auger and Hansen 2005 (IPOP); separable form after Ros and Hansen 2008.

What is ours and why:
- pycma draws from the generator that is passed in (its `randn` option, with `seed` nan), so that a run
  replays exactly and numpy's global generator is not touched;
- bounds are pycma's smooth BoundTransform of the unit cube, so genomes never pile up on the boundary;
- integer and categorical axes are cut into equal levels; a lower bound on their standard deviation keeps the
  distribution from freezing inside one level. pycma's own `integer_variables` uses the global generator;
- failed candidates are +inf, which ranks them last; a generation without a finite loss teaches nothing and is
  not told to pycma (it would move the mean at random).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.proposal import Proposal, Result, frozen_genome
from evomerge.search.base import Ids, Needs, Start, check_told
from evomerge.space import Axis

FULL_COVARIANCE_AXES = 200
"""Above this many axes the covariance is diagonal: the full update costs n^3 and learns too slowly."""

LAST_BITS = 1e-6
"""Largest difference per gene that counts as the same genome on another host (as in the journal)."""


def default_population(n: int) -> int:
    """Candidates per generation for n axes: 4 + floor(3 ln n) (tutorial, eq. 48)."""
    return 4 + int(3 * math.log(n))


@dataclass(frozen=True)
class Options:
    """Settings of the experiment file. Lengths are in units of the unit cube."""

    sigma: float = 1 / 6
    """Initial standard deviation of every gene."""
    population: int | None = None
    """Candidates per generation; default `default_population`."""
    restarts: int = 9
    """How often to restart with a doubled population once pycma has converged."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 1:
            raise ValueError(f"sigma: `0 < sigma <= 1` must hold, but got {self.sigma}")
        if self.population is not None and self.population < 4:
            raise ValueError(f"population: CMA-ES needs at least 4, got {self.population}")
        if self.restarts < 0:
            raise ValueError(f"restarts: `restarts >= 0` must hold, but got {self.restarts}")


class CmaEs:
    """Ask whole generations, tell them in order; learns when a generation is complete."""

    needs = Needs()

    def __init__(
        self,
        axes: Sequence[Axis],
        start: Start,
        rng: np.random.Generator,
        ids: Ids,
        options: Options | None = None,
    ) -> None:
        self._axes = tuple(axes)
        self._options = options or Options()
        self._rng = rng
        self._ids = ids
        n = len(self._axes)
        if start.genome.shape != (n,):
            raise ValueError(f"the start has {start.genome.shape[0]} genes, the space {n} axes")
        self._population = self._options.population or default_population(n)
        self._restarts = 0
        self._group = -1
        self._asked: list[Any] = []  # pycma's own vectors: it looks them up again by value
        self._queue: list[Proposal] = []
        self._order: list[int] = []
        self._losses: dict[int, float] = {}
        self._best: tuple[float, Proposal] | None = None
        self._stopped: dict[str, float] = {}
        self._es = self._new(start.genome)

    # One axis is doubled inside: pycma refuses one-dimensional problems.
    @property
    def _doubled(self) -> bool:
        return len(self._axes) == 1

    def _new(self, x0: np.ndarray[Any, Any]) -> Any:
        cma = import_cma()
        n = len(self._axes)
        # Half a level: below it, integer and categorical genes would stop changing.
        minstd = [0.0 if a.levels is None else min(0.25, 0.5 / a.levels) for a in self._axes]
        x = np.repeat(x0, 2) if self._doubled else np.array(x0)
        options = {
            "bounds": [[0.0] * len(x), [1.0] * len(x)],
            "popsize": self._population,
            "CMA_diagonal": n > FULL_COVARIANCE_AXES,
            "randn": lambda *shape: self._rng.standard_normal(shape),
            "seed": np.nan,
            "minstd": minstd * 2 if self._doubled else minstd,
            "maxiter": np.inf,
            "tolfunhist": 1e-12,
            "verbose": -9,
            "verb_log": 0,
        }
        return cma.CMAEvolutionStrategy(x, self._options.sigma, options)

    def _genome(self, x: Any) -> np.ndarray[Any, Any]:
        # BoundTransform may exceed the cube by rounding.
        return np.clip(np.asarray(x, dtype=np.float64), 0.0, 1.0)[: len(self._axes)]

    def ask(self, n: int) -> list[Proposal]:
        """Up to n proposals of the current generation; [] while its tells are awaited."""
        if not self._queue:
            if len(self._losses) < len(self._order) or self._stopped:
                return []
            self._group += 1
            self._asked = self._es.ask()
            self._queue = [
                Proposal(next(self._ids), self._group, genome=frozen_genome(self._genome(x))) for x in self._asked
            ]
            self._order = [p.id for p in self._queue]
            self._losses = {}
        out, self._queue = self._queue[:n], self._queue[n:]
        return out

    def tell(self, p: Proposal, r: Result) -> None:
        """Report one result; the distribution moves with the generation's last one.

        Raises ValueError for a proposal of another generation, told twice, or a NaN loss.
        """
        check_told(p, r, {*self._order} - self._losses.keys())
        loss = r.loss
        self._losses[p.id] = loss
        if p.genome is not None:
            # On another host the journalled genome may differ in the last bits. Then pycma is told its own vector:
            # a foreign one loses the preimage outside the bounds that it was drawn from, and the search would jump.
            at = self._order.index(p.id)
            if np.max(np.abs(p.genome - self._genome(self._asked[at]))) > LAST_BITS:
                self._asked[at] = np.repeat(p.genome, 2) if self._doubled else np.array(p.genome)
        if math.isfinite(loss) and (self._best is None or loss < self._best[0]):
            self._best = (loss, p)
        if len(self._losses) == len(self._order):
            self._learn([self._losses[i] for i in self._order])

    def _learn(self, losses: list[float]) -> None:
        if not any(math.isfinite(x) for x in losses):
            return
        with warnings.catch_warnings():
            # pycma warns of solutions it has not sent: genomes taken from a journal of another host.
            warnings.simplefilter("ignore")
            self._es.tell(self._asked, losses)
        reasons = self._es.stop()
        if not reasons:
            return
        if self._restarts == self._options.restarts:
            self._stopped = {f"cma:{k}": _number(v) for k, v in reasons.items()}
            return
        self._restarts += 1
        self._population *= 2
        self._es = self._new(self._rng.random(len(self._axes)))

    def stop(self) -> Mapping[str, float]:
        """pycma's reasons (prefixed cma:) after the last restart; empty while running."""
        return dict(self._stopped)

    def recommend(self, k: int) -> list[Proposal]:
        """The distribution's mean: under noise a better answer than the best seen (tutorial, B.3)."""
        if k < 1 or self._best is None:
            return []
        mean = self._es.gp.pheno(self._es.mean, into_bounds=self._es.boundary_handler.repair)
        return [Proposal(next(self._ids), self._group, genome=frozen_genome(self._genome(mean)))]


def _number(value: Any) -> float:
    try:
        return float(np.max(value))
    except (TypeError, ValueError):
        return 1.0


def import_cma() -> Any:
    """pycma, without its warning that matplotlib, which we do not use, is missing. Takes 1.5 s the first time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cma
    return cma
