"""Non-dominated sets of loss vectors. Plain numpy; every objective is minimised."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]
"""Loss vectors, shape (n, n_objectives); of one candidate, shape (n_objectives,)."""


def fronts(losses: Losses) -> NDArray[np.int64]:
    """Rank of the front that each vector lies on, shape (n,): 0 is dominated by none, 1 only by rank 0, and so on.

    a dominates b where it is nowhere larger and somewhere smaller, so equal vectors share a front. Non-dominated
    sorting as in NSGA-II (Deb et al. 2002, section III-A).
    """
    n = len(losses)
    rank = np.full(n, -1, dtype=np.int64)
    left = np.arange(n)
    level = 0
    while len(left):
        here = left[undominated(losses[left])]
        rank[here] = level
        left = left[rank[left] < 0]
        level += 1
    return rank


def undominated(losses: Losses) -> NDArray[np.bool_]:
    """True where no other row dominates; rows are tried against the survivors so far, best sums first."""
    kept = np.ones(len(losses), dtype=bool)
    for i in np.argsort(losses.sum(axis=1), kind="stable"):
        if kept[i]:
            worse = (losses >= losses[i]).all(axis=1) & (losses > losses[i]).any(axis=1)
            kept &= ~worse
    return kept


def crowding(losses: Losses) -> NDArray[np.float64]:
    """Crowding distance of each member of one front, shape (n,): +inf at the ends of every objective.

    Deb et al. 2002, section III-B.
    """
    n, m = losses.shape
    out = np.zeros(n)
    for j in range(m):
        order = np.argsort(losses[:, j], kind="stable")
        x = losses[order, j]
        out[order[[0, -1]]] = np.inf
        span = x[-1] - x[0]
        if n > 2 and span > 0:
            out[order[1:-1]] += (x[2:] - x[:-2]) / span
    return out


def compromise(losses: Losses) -> int:
    """Position of the member nearest to the ideal point, every objective scaled to [0, 1] over the given vectors."""
    low, high = losses.min(axis=0), losses.max(axis=0)
    scaled = (losses - low) / np.where(high > low, high - low, 1.0)
    return int(np.argmin(np.sqrt((scaled**2).sum(axis=1))))


def order(losses: Losses, violations: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """Positions from best to worst, stable: by loss where there is one objective, else by front, and within a front
    by crowding distance, so that the first few are spread over the front. Whoever violates constraints comes behind
    all who do not, by how much (Deb et al. 2002, section VI)."""
    if violations is not None and violations.any():
        kept, broken = np.flatnonzero(violations <= 0), np.flatnonzero(violations > 0)
        behind = broken[np.argsort(violations[broken], kind="stable")]
        return np.concatenate([kept[order(losses[kept])], behind]) if len(kept) else behind
    if losses.shape[1] == 1:
        return np.argsort(losses[:, 0], kind="stable")
    rank = fronts(losses)
    spread = np.zeros(len(losses))
    for level in np.unique(rank):
        here = rank == level
        spread[here] = crowding(losses[here])
    return np.lexsort((np.arange(len(losses)), -spread, rank))


def hypervolume(losses: Losses, reference: NDArray[np.float64]) -> float:
    """Volume that is dominated by the vectors and lies below the reference point.

    By slicing along the last objective (While et al. 2006): exact; meant for fronts of up to a few hundred members
    and few objectives.
    """
    inside = losses[(losses < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    front = np.unique(inside[undominated(inside)], axis=0)
    if losses.shape[1] == 1:
        return float(reference[0] - front[:, 0].min())
    if losses.shape[1] == 2:  # sorted by the first objective, so the second falls
        steps = np.append(front[1:, 0], reference[0]) - front[:, 0]
        return float((steps * (reference[1] - front[:, 1])).sum())
    front = front[np.argsort(front[:, -1], kind="stable")]
    edges = np.append(front[:, -1], reference[-1])
    volume = 0.0
    for k in range(len(front)):
        depth = edges[k + 1] - edges[k]
        if depth > 0:
            volume += depth * hypervolume(front[: k + 1, :-1], reference[:-1])
    return float(volume)
