"""Surrogates: exact quadratics come back, left-out errors are those of real refits, and the front is the true one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evomerge.pareto import undominated
from evomerge.search import surrogate
from evomerge.search.surrogate import LINKS, Link, _derivatives, _features, farthest, fit, front_of, unknowns

Array = np.ndarray[Any, Any]


def points(n: int, axes: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).random((n, axes))


def quadratic(x: Array, seed: int = 2) -> Array:
    """A random quadratic with coefficients about 1."""
    return _features(x) @ np.random.default_rng(seed).normal(size=unknowns(x.shape[1]))


def slopes(x: Array, link: Link) -> Array:
    """Of the linked quadratic by every gene from 0 to 1, by central differences."""
    step = 1e-5 * np.eye(x.shape[1])
    return np.column_stack([(link.value(quadratic(x + h)) - link.value(quadratic(x - h))) / 2e-5 for h in step])


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


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
@pytest.mark.parametrize("axes", [1, 3, 6])
def test_with_slopes_few_points_are_enough(link: Link, axes: int) -> None:
    """Behind every link: the coefficients come back from n + 1 points, where they would have taken (n+1)(n+2)/2; with
    one more, left-out candidates tell which link it was."""
    x, elsewhere = points(axes + 2, axes), points(200, axes, 3)
    y, dy = link.value(quadratic(x)), slopes(x, link)

    enough = surrogate._fit(x[:-1], y[:-1], link, 1e-14, dy[:-1])
    found = fit(x, y, dy)

    wanted = np.random.default_rng(2).normal(size=unknowns(axes))
    assert enough.coefficients == pytest.approx(wanted, abs=1e-4)
    assert found.link == link
    assert found.r2 > 1 - 1e-6
    inside = np.clip(elsewhere, found.low, found.high)
    assert found.predict(elsewhere) == pytest.approx(link.value(quadratic(inside)), abs=1e-4)


@pytest.mark.parametrize("axes", [1, 2, 3, 6])
def test_slopes_tell_some_things_twice(axes: int) -> None:
    """P points with slopes determine 1 + n P - (P - 1)(P - 2)/2 coefficients, and so all of them from n + 1 on; n
    points leave one open, although they have more equations than there are unknowns."""
    for count in range(1, axes + 2):
        x = points(count, axes)
        rows = np.vstack([_features(x), _derivatives(x).reshape(-1, unknowns(axes))])

        assert np.linalg.matrix_rank(rows) == 1 + axes * count - (count - 1) * (count - 2) // 2
    assert np.linalg.matrix_rank(rows) == unknowns(axes)
    assert surrogate.least_points(axes, slopes=True) == axes + 1


def test_slopes_help_against_misfit() -> None:
    """Of a loss that is no quadratic the same candidates tell more with slopes than without."""
    x, elsewhere = points(28, 6), points(300, 6, 3)

    def loss(u: Array) -> Array:
        return quadratic(u) + 2 * np.sin(3 * u).sum(axis=1)

    dy = np.column_stack([(loss(x + h) - loss(x - h)) / 2e-5 for h in 1e-5 * np.eye(6)])
    found, plain = fit(x, loss(x), dy), fit(x, loss(x))

    off = [np.mean((f.predict(elsewhere) - loss(elsewhere)) ** 2) for f in (found, plain)]
    assert off[0] < 0.9 * off[1]


def test_a_point_may_have_no_slopes() -> None:
    """Rows of NaN say nothing: with nothing else the fit is the one without slopes, and mixed ones are exact too."""
    x, elsewhere = points(24, 3), points(50, 3, 3)
    y, dy = LINKS[2].value(quadratic(x)), slopes(x, LINKS[2])
    dy[8:] = np.nan

    mixed, without = fit(x, y, dy), fit(x, y + 0.01 * np.sin(40 * x[:, 0]))
    again = fit(x, y + 0.01 * np.sin(40 * x[:, 0]), np.full((24, 3), np.nan))

    inside = np.clip(elsewhere, mixed.low, mixed.high)
    assert mixed.predict(elsewhere) == pytest.approx(LINKS[2].value(quadratic(inside)), abs=1e-5)
    assert again.coefficients == pytest.approx(without.coefficients, rel=1e-6)
    assert again.r2 == pytest.approx(without.r2)


def test_links_stay_within_their_bounds() -> None:
    """Whatever the quadratic says: losses within the bounds, derivatives that are them, an inverse that is one."""
    q = np.linspace(-4, 4, 41)
    for link in LINKS:
        assert link.value(10 * q).min() >= link.low
        assert link.value(10 * q).max() <= link.high
        assert (link.value(q + 1e-5) - link.value(q - 1e-5)) / 2e-5 == pytest.approx(link.slope(q), abs=1e-8)
        assert (link.slope(q + 1e-5) - link.slope(q - 1e-5)) / 2e-5 == pytest.approx(link.bend(q), abs=1e-8)
        assert link.inverse(link.value(q)) == pytest.approx(q, abs=1e-9)


def test_noise_is_told() -> None:
    """Of noise nothing is predicted where it was not fitted; of a signal with noise most, but not all."""
    x, noise = points(40, 3), np.random.default_rng(5).normal(size=40)

    assert fit(x, noise).r2 < 0.3
    assert 0.8 < fit(x, quadratic(x) + 0.2 * noise).r2 < 0.999


def test_too_few_points_are_refused() -> None:
    """A quadratic of three axes has ten unknowns, or four points with slopes."""
    assert unknowns(3) == 10
    with pytest.raises(ValueError, match="10 unknowns, got 9 points"):
        fit(points(9, 3), np.ones(9))
    dy = np.ones((9, 3))
    dy[3:] = np.nan
    with pytest.raises(ValueError, match="10 unknowns, got 9 points, 3 of them with slopes"):
        fit(points(9, 3), np.ones(9), dy)


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
@pytest.mark.parametrize("with_slopes", [False, True])
def test_left_out_errors_are_those_of_refits(ridge: float, with_slopes: bool) -> None:
    """The identity's are exact; those of other links are near what refits say, to which a point's slopes are left out
    with its value."""
    n = 10 if with_slopes else 24
    x = points(n, 3)
    noise = 0.05 * np.random.default_rng(7).normal(size=(n, 4))
    for link, tolerance in ((LINKS[0], 1e-6), (LINKS[2], 0.15)):
        y = np.clip(link.value(0.5 * quadratic(x)) + noise[:, 0], link.low, link.high)
        dy = 0.5 * slopes(x, link) + noise[:, 1:] if with_slopes else np.full((n, 3), np.nan)
        whole = surrogate._fit(x, y, link, ridge, dy)
        real = []
        for i in range(n):
            rest = np.arange(n) != i
            again = surrogate._fit(x[rest], y[rest], link, ridge, dy[rest])
            # In the units of the whole fit, whose penalty and scale are those of all losses.
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
