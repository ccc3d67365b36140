"""Quadratic surrogates of losses, and the front of several of them: what the MAP algorithms share. Plain numpy, scipy.

Near the base a metric is by Taylor's theorem a quadratic in merge coefficients; where the metric is bounded, a link
keeps its surrogate within bounds: MAP, "Low-Compute Model Merging with Amortized Pareto Fronts via Quadratic
Approximation", arXiv 2406.07529, section 3. How far a surrogate can be trusted is told by candidates that were left
out of its fit. That is also how the link and the strength of regularisation are chosen.

Slopes of a loss may be told beside its values, an equation more for each axis. They are not all new: two points say the
change between them twice, three the same second derivative twice. What they leave open is a quadratic's restriction to
the directions that no two points differ in, so n + 1 points in general position are needed for n axes, not the
unknowns over n + 1 (the exception of quadrics in Alexander and Hirschowitz 1995, "Polynomial interpolation in several
variables").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evomerge.pareto import Losses, crowding, undominated

Points = NDArray[np.float64]
"""Points of the unit cube, shape (n, n_axes)."""
Values = NDArray[np.float64]
"""One loss each, shape (n,)."""


class Link(NamedTuple):
    """A loss as a function of the quadratic; `inverse` is clipped to where it is finite."""

    name: str
    low: float
    high: float
    """Bounds of the losses that it can express."""
    value: Callable[[Values], Values]
    slope: Callable[[Values], Values]
    bend: Callable[[Values], Values]
    """Its first and second derivative."""
    inverse: Callable[[Values], Values]


def _sigmoid(x: Values) -> Values:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _bump(x: Values) -> Values:
    """The sigmoid's derivative."""
    return _sigmoid(x) * _sigmoid(-x)


def _logit(y: Values) -> Values:
    y = np.clip(y, 0.01, 0.99)
    return np.log(y / (1.0 - y))


def _softplus_inverse(y: Values) -> Values:
    y = np.maximum(y, 0.01)
    return y + np.log1p(-np.exp(-y))


def _logistic(low: float) -> Link:
    return Link(
        f"sigmoid from {low:g} to {low + 1:g}",
        low,
        low + 1.0,
        lambda q: low + _sigmoid(q),
        _bump,
        lambda q: _bump(q) * (_sigmoid(-q) - _sigmoid(q)),
        lambda y: _logit(y - low),
    )


LINKS = (
    Link("identity", -np.inf, np.inf, lambda q: q, np.ones_like, np.zeros_like, lambda y: y),
    Link("softplus", 0.0, np.inf, lambda q: np.logaddexp(0.0, q), _sigmoid, _bump, _softplus_inverse),
    _logistic(-1.0),
    _logistic(0.0),
)
"""For all losses, for those bounded below, and for shares: a score in [0, 1] is minimised as a loss in [-1, 0]."""

RIDGES = (1e-8, 1e-2, 0.1, 1.0, 10.0)
"""Strengths of the penalty on squared coefficients but the constant, each taken as what it changes the loss by, where
the loss is at its mean, in standard deviations."""


SLOPE_WEIGHT = 42**-0.5
"""Of a slope's residual beside a value's, genes from -1 to 1. The first that a quadratic cannot express is a cubic, and
of the Legendre polynomial P3 the mean square is 1/7, that of its derivative 6: so weighted, a point's slopes count in
the misfit as much as its value does."""


def unknowns(axes: int) -> int:
    """Coefficients of a quadratic: (n + 1)(n + 2)/2 for n axes."""
    return (axes + 1) * (axes + 2) // 2


def least_points(axes: int, *, slopes: bool) -> int:
    """Points that determine a quadratic: as many as it has unknowns, or n + 1 where slopes are told."""
    return axes + 1 if slopes else unknowns(axes)


@dataclass(frozen=True)
class Surrogate:
    """A fitted loss. `r2` is that of candidates left out of the fit: 1 is perfect, 0 no better than their mean."""

    link: Link
    ridge: float
    coefficients: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    """The box of the points that it was fitted to, shapes (n_axes,)."""
    errors: NDArray[np.float64]
    """By how much each point is missed by a fit without it, in standard deviations of the losses, shape (n,)."""
    r2: float

    def predict(self, points: Points) -> Values:
        """Losses at `points`; beyond the box of the fit those at its nearest point."""
        return self.link.value(_features(np.clip(points, self.low, self.high)) @ self.coefficients)


def fit(points: Points, losses: Values, slopes: Points | None = None) -> Surrogate:
    """The surrogate whose left-out errors are least, over `RIDGES` and those `LINKS` that can express the losses.

    `slopes` are d(loss)/d(gene), shape (n, n_axes), rows of NaN where they are not known. Raises ValueError where
    there are fewer points than determine a quadratic.
    """
    n, axes = points.shape
    told = 0 if slopes is None else int(np.isfinite(slopes).all(axis=1).sum())
    if n < unknowns(axes) and told < least_points(axes, slopes=True):
        also = f", {told} of them with slopes" if told else ""
        raise ValueError(f"a quadratic of {axes} axes has {unknowns(axes)} unknowns, got {n} points{also}")
    able = [link for link in LINKS if link.low <= losses.min() and losses.max() <= link.high]
    return max((_fit(points, losses, link, ridge, slopes) for link in able for ridge in RIDGES), key=lambda s: s.r2)


def _fit(points: Points, losses: Values, link: Link, ridge: float, slopes: Points | None = None) -> Surrogate:
    """Regularised non-linear least squares from the fit of the linked losses.

    A point's equations are left out together. The left-out errors are those of the model made linear at the solution,
    which are exact for the identity (Allen 1974, PRESS) and one Newton step otherwise.
    """
    from scipy.optimize import least_squares

    x = _features(points)
    n, unknown = x.shape
    slopes = np.full_like(points, np.nan) if slopes is None else slopes
    sloped = np.flatnonzero(np.isfinite(slopes).all(axis=1))
    known = slopes[sloped] / 2  # by genes from -1 to 1
    by_axis = SLOPE_WEIGHT * _derivatives(points[sloped])
    scale = float(losses.std()) or 1.0
    effect = float(link.slope(link.inverse(losses.mean(keepdims=True)))[0]) / scale
    penalty = np.sqrt(ridge) * effect * np.eye(unknown)[1:]

    def residual(c: Values) -> Values:
        q = x @ c
        off = link.slope(q[sloped])[:, None] * (by_axis @ c) - SLOPE_WEIGHT * known
        return np.concatenate([(link.value(q) - losses) / scale, off.ravel() / scale, penalty @ c])

    def jacobian(c: Values) -> NDArray[np.float64]:
        q = x @ c
        slope, bend = link.slope(q), (link.bend(q[sloped])[:, None] * (by_axis @ c))[:, :, None]
        off = slope[sloped, None, None] * by_axis + bend * x[sloped, None]
        return np.vstack([slope[:, None] * x / scale, off.reshape(-1, unknown) / scale, penalty])

    linked = link.inverse(losses)
    rates = SLOPE_WEIGHT * known / link.slope(linked[sloped])[:, None]
    first = np.linalg.lstsq(
        np.vstack([x, by_axis.reshape(-1, unknown), penalty]),
        np.concatenate([linked, rates.ravel(), np.zeros(unknown - 1)]),
    )[0]
    c = least_squares(residual, first, jacobian, method="lm", ftol=1e-12, xtol=1e-12, gtol=1e-12).x
    q, off = np.linalg.qr(jacobian(c))[0], residual(c)
    alone, rows = np.arange(n)[:, None], n + np.arange(known.size).reshape(known.shape)
    errors = _left_out(q[alone], off[alone])[:, 0]
    if sloped.size:
        rows = np.hstack([alone[sloped], rows])
        errors[sloped] = _left_out(q[rows], off[rows])[:, 0]
    # Against the mean of the others, which leaves the same point out.
    by_mean = (losses - losses.mean()) / scale * n / (n - 1)
    r2 = 1.0 - float((errors**2).sum() / (by_mean**2).sum()) if by_mean.any() else 1.0
    return Surrogate(link, ridge, c, points.min(axis=0), points.max(axis=0), errors, r2)


def _left_out(q: NDArray[np.float64], residuals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Residuals of points that are left out of a linear fit, shape (n, rows): (I - H)^-1 r, H a point's block of Q Q'.

    `q` are the rows of Q by point, shape (n, rows, unknowns). Where the others leave a direction open, 1e-9 stands in.
    """
    rest, turn = np.linalg.eigh(np.eye(q.shape[1]) - (q[:, :, None] * q[:, None]).sum(axis=3))
    turned = np.einsum("nij,ni->nj", turn, residuals) / np.maximum(rest, 1e-9)
    return np.einsum("nij,nj->ni", turn, turned)  # type: ignore[no-any-return]


def _features(points: Points) -> NDArray[np.float64]:
    """1, every gene, every product of two: shape (n, unknowns). Genes are taken from -1 to 1."""
    u = 2.0 * points - 1.0
    i, j = np.triu_indices(u.shape[1])
    return np.hstack([np.ones((len(u), 1)), u, u[:, i] * u[:, j]])


def _derivatives(points: Points) -> NDArray[np.float64]:
    """Of the features by every gene from -1 to 1, shape (n, n_axes, unknowns)."""
    u = 2.0 * points - 1.0
    n, axes = u.shape
    i, j = np.triu_indices(axes)
    one = np.eye(axes)
    products = u[:, None, i] * one[:, j] + one[:, i] * u[:, None, j]
    return np.concatenate([np.zeros((n, axes, 1)), np.broadcast_to(one, (n, axes, axes)), products], axis=2)


# -- the front of surrogates ----------------------------------------------------------------------------------

FRONT = 100
"""Members of a front that are kept."""
CHILDREN = 200
"""Of the evolutionary loop, per generation."""
GENERATIONS = 10
"""Of the evolutionary loop, for each axis."""


def front_of(losses_at: Callable[[Points], Losses], begin: Points, rng: np.random.Generator) -> tuple[Points, Losses]:
    """Non-dominated points of the unit cube and their losses, at most FRONT, spread by crowding distance.

    An archive of what is not dominated, whose members have children by blend crossover and Gaussian mutation (see
    `ga.py`) of smaller and smaller steps. `begin` are the first members. For three bowls of three axes this took 0.3 s,
    25 generations of 100 of Optuna's NSGA-III 5 s for a smaller hypervolume.
    """
    points, axes = begin, begin.shape[1]
    losses = losses_at(points)
    for sigma in np.geomspace(0.3, 0.003, GENERATIONS * axes):
        a, b = (points[rng.integers(len(points), size=CHILDREN)] for _ in range(2))
        mutated = rng.random(a.shape) < 1 / axes
        children = a + rng.uniform(-0.3, 1.3, (CHILDREN, 1)) * (b - a) + sigma * mutated * rng.normal(size=a.shape)
        children = np.clip(children, 0.0, 1.0)
        points, losses = np.vstack([points, children]), np.vstack([losses, losses_at(children)])
        points, at = np.unique(points, axis=0, return_index=True)
        losses = losses[at]
        kept = np.flatnonzero(undominated(losses))
        if len(kept) > FRONT:
            kept = kept[np.argsort(-crowding(losses[kept]), kind="stable")[:FRONT]]
        points, losses = points[kept], losses[kept]
    return points, losses


def farthest(losses: Losses, known: Losses, k: int) -> list[int]:
    """Positions of up to k loss vectors, each the farthest from all known ones and from those before it.

    Every objective is scaled to its range over `losses`; those that coincide with a known one are left out.
    """
    span = np.ptp(losses, axis=0)
    scaled, seen = (x / np.where(span > 0, span, 1.0) for x in (losses, known))
    distance = np.min(np.linalg.norm(scaled[:, None] - seen, axis=2), axis=1)
    out: list[int] = []
    while len(out) < k and distance.max() > 1e-9:
        out.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(scaled - scaled[out[-1]], axis=1))
    return out


def losses_of(surrogates: Sequence[Surrogate], points: Points) -> Losses:
    """What surrogates of several objectives say of `points`, shape (n, n_objectives)."""
    return np.column_stack([s.predict(points) for s in surrogates])
