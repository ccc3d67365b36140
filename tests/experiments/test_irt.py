"""The item response study: its fits recover what made the data, and its estimators behave at the edges."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize

FILE = Path(__file__).resolve().parents[2] / "experiments" / "irt" / "irt.py"


@pytest.fixture(scope="module")
def irt() -> Any:
    spec = importlib.util.spec_from_file_location("irt", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def world(seed: int, models: int, items: int, dimensions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True abilities, slopes and difficulties."""
    rng = np.random.default_rng(seed)
    a = rng.normal(1.0, 0.4, (items, 1)) if dimensions == 1 else rng.standard_normal((items, dimensions))
    return rng.standard_normal((models, dimensions)), a, 1.5 * rng.standard_normal(items)


def answers(theta: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and right or wrong drawn from them."""
    p = 1 / (1 + np.exp(-(theta @ a.T - b)))
    return p, (np.random.default_rng(9).random(p.shape) < p).astype(float)


@pytest.mark.parametrize(("dimensions", "slopes"), [(1, False), (1, True), (3, True)])
def test_the_fit_recovers_what_made_the_answers(dimensions: int, slopes: bool, irt: Any) -> None:
    """Of 400 models on 60 items: difficulties, slopes and abilities, and in several dimensions the probabilities."""
    theta, a, b = world(1, 400, 60, dimensions)
    if not slopes:
        a = np.ones_like(a)
    p, y = answers(theta, a, b)
    items, found = irt.fit(y, dimensions, slopes=slopes)

    fitted = irt.sigmoid(found @ items.slopes.T - items.difficulty)
    assert np.abs(fitted - p).mean() < 0.09
    assert np.corrcoef(items.difficulty, b)[0, 1] > 0.97
    if dimensions == 1:
        assert np.corrcoef(found[:, 0], theta[:, 0])[0, 1] > 0.9
    if slopes and dimensions == 1:
        assert np.corrcoef(items.slopes[:, 0], a[:, 0])[0, 1] > 0.75
    if not slopes:
        assert np.all(items.slopes == 1.0)


def test_scores_may_be_missing(irt: Any) -> None:
    """Of a third of the answers the fit still recovers the items; the missing ones play no part."""
    theta, a, b = world(1, 600, 40, 1)
    _, y = answers(theta, a, b)
    seen = np.where(np.random.default_rng(4).random(y.shape) < 1 / 3, y, np.nan)
    items, _ = irt.fit(seen, 1, slopes=True)

    assert np.corrcoef(items.difficulty, b)[0, 1] > 0.95
    assert np.corrcoef(items.slopes[:, 0], a[:, 0])[0, 1] > 0.6


@pytest.mark.parametrize("n", [2, 12, 60])
def test_ability_is_the_maximum(n: int, irt: Any) -> None:
    """Newton's answer against a general optimizer, also with fewer items than dimensions, and for graded scores."""
    theta, a, b = world(2, 5, n, 3)
    p, y = answers(theta, a, b)
    prior = np.array([0.25, 0.0, -0.5])
    for scores in (y, p):
        got = irt.ability(scores, a, b, prior)
        for row, x in zip(scores, got, strict=True):

            def loss(v: np.ndarray, row: np.ndarray = row) -> float:
                logit = a @ v - b
                return float(np.sum(np.logaddexp(0, logit) - row * logit) + 0.5 * np.sum((v - prior) ** 2))

            assert x == pytest.approx(optimize.minimize(loss, prior, tol=1e-10).x, abs=1e-4)


def test_all_right_and_all_wrong_stay_finite(irt: Any) -> None:
    """The prior holds them, and all right is above all wrong."""
    _, _, b = world(3, 1, 20, 1)
    low, high = irt.ability(np.array([np.zeros(20), np.ones(20)]), np.ones((20, 1)), b, np.zeros(1))[:, 0]

    assert -6 < low < 0 < high < 6


def test_ridge_is_the_textbook_one(irt: Any) -> None:
    """With one of its penalties it solves the normal equations; a linear truth is found; noise leaves the mean."""
    rng = np.random.default_rng(0)
    x, beta = rng.standard_normal((40, 6)), rng.standard_normal(6)
    new = rng.standard_normal((5, 6))
    noisy = x @ beta + rng.standard_normal(40)
    got = irt.ridge(x, noisy, new)

    assert irt.ridge(x, 3 + x @ beta, new) == pytest.approx(3 + new @ beta, abs=1e-2)
    top = np.linalg.norm(x - x.mean(0), 2) ** 2
    one_of = [
        noisy.mean() + (new - x.mean(0)) @ np.linalg.solve(c.T @ c + k * top * np.eye(6), c.T @ (noisy - noisy.mean()))
        for c in [x - x.mean(0)]
        for k in np.geomspace(1e-4, 1e3, 29)
    ]
    assert min(np.abs(got - other).max() for other in one_of) < 1e-10
    flat = irt.ridge(x, rng.standard_normal(40), new)
    assert np.ptp(flat) < np.ptp(x @ beta) / 4


def test_estimators_on_a_world_that_fits_them(irt: Any) -> None:
    """Where answers do follow a model, filling in beats the sample's mean; all of the items give the whole mean."""
    theta, a, b = world(5, 300, 120, 1)
    _, y = answers(theta, a, 2 * b)  # items that are hard or easy, so that it matters which ones are drawn
    train, new = y[:260], y[260:]
    w = np.full(120, 1 / 120)
    many, abilities = irt.fit(train, 2, slopes=True)
    fits = {"2PL": irt.fit(train, 1, slopes=True)[0], "M2PL": many}
    taken = np.random.default_rng(1).permutation(120)[:20]
    out = irt.estimates(new, train, taken, w, fits, abilities[:4])
    error = {e: np.abs(x - new @ w).mean() for e, x in out.items()}

    assert error["P-IRT 2PL"] < 0.85 * error["mean"]
    assert error["control"] < 0.85 * error["mean"]
    assert out["GMP-IRT"] == pytest.approx((out["mean"] + out["MP-IRT"]) / 2)
    everything = irt.estimates(new, train, np.arange(120), w, fits, abilities[:4])
    for e in ("mean", "P-IRT 2PL", "MP-IRT", "GMP-IRT"):
        assert everything[e] == pytest.approx(new @ w)
