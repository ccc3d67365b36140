"""Surrogates: exact quadratics come back, left-out errors are those of real refits, and the front is the true one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evomerge.pareto import undominated
from evomerge.search import surrogate
from evomerge.search.surrogate import LINKS, Link, _features, farthest, fit, front_of, unknowns

Array = np.ndarray[Any, Any]


def points(n: int, axes: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).random((n, axes))


def quadratic(x: Array, seed: int = 2) -> Array:
    """A random quadratic with coefficients about 1."""
    return _features(x) @ np.random.default_rng(seed).normal(size=unknowns(x.shape[1]))


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
@pytest.mark.parametrize("axes", [1, 3])
def test_exact_quadratics_come_back(link: Link, axes: int) -> None:
    """From twice the unknowns, behind every link: predictions elsewhere are right to 1e-6, and R2 says so."""
    x, elsewhere = points(2 * unknowns(axes), axes), points(200, axes, 3)

    found = fit(x, link.value(quadratic(x)))

    inside = np.clip(elsewhere, x.min(axis=0), x.max(axis=0))
    assert found.predict(elsewhere) == pytest.approx(link.value(quadratic(inside)), abs=1e-6)
    assert found.r2 > 1 - 1e-9
    assert found.link == link


def test_links_stay_within_their_bounds() -> None:
    """Whatever the quadratic says: losses within the bounds, a slope that is the derivative, an inverse that is one."""
    q = np.linspace(-4, 4, 41)
    for link in LINKS:
        assert link.value(10 * q).min() >= link.low
        assert link.value(10 * q).max() <= link.high
        assert (link.value(q + 1e-5) - link.value(q - 1e-5)) / 2e-5 == pytest.approx(link.slope(q), abs=1e-8)
        assert link.inverse(link.value(q)) == pytest.approx(q, abs=1e-9)


def test_noise_is_told() -> None:
    """Of noise nothing is predicted where it was not fitted; of a signal with noise most, but not all."""
    x, noise = points(40, 3), np.random.default_rng(5).normal(size=40)

    assert fit(x, noise).r2 < 0.3
    assert 0.8 < fit(x, quadratic(x) + 0.2 * noise).r2 < 0.999


def test_too_few_points_are_refused() -> None:
    """A quadratic of three axes has ten unknowns."""
    assert unknowns(3) == 10
    with pytest.raises(ValueError, match="10 unknowns, got 9 points"):
        fit(points(9, 3), np.ones(9))


def test_equal_losses_are_no_failure() -> None:
    """A loss that never changes is predicted exactly."""
    found = fit(points(20, 3), np.full(20, -0.25))

    assert found.r2 == 1.0
    assert found.predict(points(5, 3, 4)) == pytest.approx(-0.25)


def test_beyond_the_box_nothing_is_extrapolated() -> None:
    """Outside of the points that were fitted the surrogate says what it says at the nearest point inside."""
    x = 0.2 + 0.5 * points(30, 2)
    found = fit(x, quadratic(x))

    outside = np.array([[0.0, 0.45], [1.0, 1.0]])
    nearest = np.array([[x[:, 0].min(), 0.45], [x[:, 0].max(), x[:, 1].max()]])
    assert found.predict(outside).tolist() == found.predict(nearest).tolist()


@pytest.mark.parametrize("ridge", [1e-8, 1e-2])
def test_left_out_errors_are_those_of_refits(ridge: float) -> None:
    """The identity's are exact; those of other links are near what 24 refits say."""
    x = points(24, 3)
    noise = 0.05 * np.random.default_rng(7).normal(size=24)
    for link, tolerance in ((LINKS[0], 1e-6), (LINKS[2], 0.15)):
        y = np.clip(link.value(0.5 * quadratic(x)) + noise, link.low, link.high)
        whole = surrogate._fit(x, y, link, ridge)
        real = []
        for i in range(24):
            rest = np.arange(24) != i
            again = surrogate._fit(x[rest], y[rest], link, ridge)
            real.append((link.value(_features(x[[i]]) @ again.coefficients)[0] - y[i]) / y.std())

        assert np.linalg.norm(whole.errors - real) < tolerance * np.linalg.norm(real)


def test_agrees_with_scipy_and_scikit_learn() -> None:
    """With the identity and hardly a penalty: the same fit as curve_fit and polynomial regression, on noisy losses."""
    from scipy.optimize import curve_fit

    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    x, elsewhere = points(40, 3), 0.1 + 0.8 * points(50, 3, 8)
    y = 3.0 * quadratic(x) + np.random.default_rng(9).normal(size=40)

    found = surrogate._fit(x, y, LINKS[0], 1e-8)

    coefficients, _ = curve_fit(lambda x, *c: _features(x.T) @ np.array(c), x.T, y, p0=np.ones(10))
    inside = np.clip(elsewhere, found.low, found.high)
    assert found.coefficients == pytest.approx(coefficients, abs=1e-5)
    poly = preprocessing.PolynomialFeatures(2)
    other = linear_model.LinearRegression().fit(poly.fit_transform(x), y)
    assert found.predict(elsewhere) == pytest.approx(other.predict(poly.transform(inside)), abs=1e-5)


def test_the_front_of_two_bowls_is_the_line_between_them() -> None:
    """Losses |x - a|^2 and |x - b|^2: their Pareto set is the straight line from a to b, covered from end to end."""
    a, b = np.array([0.2, 0.3, 0.9]), np.array([0.8, 0.6, 0.4])

    found, losses = front_of(
        lambda x: np.column_stack([((x - c) ** 2).sum(axis=1) for c in (a, b)]), points(5, 3), np.random.default_rng(1)
    )

    along = (found - a) @ (b - a) / ((b - a) @ (b - a))
    off = np.linalg.norm(found - a - along[:, None] * (b - a), axis=1)
    assert undominated(losses).all()
    assert len(found) == surrogate.FRONT
    assert np.median(off) < 0.02
    assert along.min() < 0.05
    assert along.max() > 0.95
    assert np.diff(np.sort(along)).max() < 0.1


def test_farthest_fills_the_gaps() -> None:
    """Ends of a front first where only its middle is known, then quarters; what is known is left out."""
    t = np.linspace(0, 1, 9)
    losses = np.column_stack([t, 10 * (1 - t)])

    assert farthest(losses, losses[[4]], 4) == [0, 8, 2, 6]
    assert farthest(losses, losses, 4) == []
    assert farthest(losses[[3, 3]], losses[[4]], 4) == [0]
    assert farthest(np.array([[1.0, 0.0], [0.0, 10.0], [0.0, 8.0]]), np.zeros((1, 2)), 2) == [0, 1], "ranges count"
