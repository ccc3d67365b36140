"""What algorithms that propose recipes share: a queue of mixes of whole experts, asked and told in order."""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.manifest import Manifest
from evomerge.proposal import Proposal, Result
from evomerge.recipe import Match, Recipe, Rule
from evomerge.search.base import Ids, Start, check_told

Mix = Mapping[str, float]
"""Source -> its share; shares sum to 1, and what is missing is the base's."""


def mixture(mix: Mix, manifest: Manifest, dtype: str) -> Recipe:
    """The canonical recipe of a weighted mean of whole models. Shares within 1e-6 of 0 are left out."""
    sources = {n: {"weight": w} for n, w in mix.items() if abs(w) >= 1e-6}
    rule = Rule(match=Match(), method="linear", sources=sources)
    return Recipe.model_validate({"base": manifest.base, "dtype": dtype, "merge": [rule]}).canonical(manifest)


def arithmetic(weights: Mix, manifest: Manifest, dtype: str) -> Recipe:
    """The canonical recipe of base + sum of weight times (expert - base). Weights below 1e-6 are left out."""
    sources = {n: {"weight": w} for n, w in weights.items() if w >= 1e-6}
    rule = Rule(match=Match(), method="task_arithmetic", sources=sources)
    return Recipe.model_validate({"base": manifest.base, "dtype": dtype, "merge": [rule]}).canonical(manifest)


class Mixes:
    """Rounds of mixes: one round is asked and told before the next begins."""

    def __init__(self, start: Start, ids: Ids) -> None:
        assert start.manifest is not None
        self.manifest = start.manifest
        self._dtype = start.dtype
        self._ids = ids
        self._round = -1
        self._queue: list[Mix] = []
        self._waiting: dict[int, Mix] = {}
        self._told: list[tuple[float, Mix]] = []

    def begin(self, mixes: list[Mix]) -> None:
        """Queue a round."""
        self._round += 1
        self._queue, self._told = list(mixes), []

    @property
    def done(self) -> bool:
        """True where nothing is queued and nothing waits."""
        return not self._queue and not self._waiting

    def ask(self, n: int) -> list[Proposal]:
        """Up to n of the round."""
        out = []
        for mix in self._queue[:n]:
            p = Proposal(next(self._ids), self._round, recipe=mixture(mix, self.manifest, self._dtype))
            self._waiting[p.id] = mix
            out.append(p)
        self._queue = self._queue[n:]
        return out

    def tell(self, p: Proposal, r: Result) -> list[tuple[float, Mix]] | None:
        """Report one result; with the round's last one, its losses and mixes in the order of telling, else None.

        Raises ValueError for a stranger, told twice, or a NaN loss.
        """
        check_told(p, r, self._waiting)
        self._told.append((r.loss, self._waiting.pop(p.id)))
        return self._told if self.done else None
