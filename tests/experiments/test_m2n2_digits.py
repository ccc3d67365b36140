"""The digits experiment: its task and its dense children agree with what the paper and the search say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.search.niches import Group, Mix, merged

FILE = Path(__file__).resolve().parents[2] / "experiments" / "m2n2_digits" / "run.py"


@pytest.fixture(scope="module")
def digits() -> Any:
    spec = importlib.util.spec_from_file_location("m2n2_digits", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def task(digits: Any) -> Any:
    return digits.Task()


def test_the_task_is_the_published_one(digits: Any, task: Any) -> None:
    """Sizes of the specification, and a prediction worked out without slices of a flat vector."""
    rng = np.random.default_rng(0)
    theta = digits.random_vector(rng)
    w, b, v, c = digits.unpacked(theta)

    assert (digits.PARAMETERS, task.cut, len(task.labels)) == (19210, 1437, 1797)
    assert np.array_equal(np.concatenate([w.ravel(), b, v.ravel(), c]), theta)
    x = task.pixels[3]
    hidden = [max(0.0, float(x @ w[:, i] + b[i])) for i in range(256)]
    told = int(np.argmax([np.dot(hidden, v[:, k]) + c[k] for k in range(10)]))
    assert task.train(theta)[3] == (told == task.labels[3])


def test_dense_children_are_the_searchs_children(digits: Any) -> None:
    """The experiment's merge equals the weightless one of the search over the same draws."""
    rng = np.random.default_rng(1)
    a, b = digits.random_vector(rng), digits.random_vector(rng)

    class Pair:
        sources = ("a", "b")

        def gram(self, start: int, stop: int) -> np.ndarray:
            x = np.stack([a, b])[:, start:stop].astype(np.float64)
            return x @ x.T

    for seed in range(5):
        child = digits.merge(a, b, np.random.default_rng(seed), split=True)
        draws = np.random.default_rng(seed)
        share, cut = float(draws.random()), int(draws.integers(digits.PARAMETERS))
        seeds = [Mix((0,), np.eye(2)[[k]]) for k in range(2)]
        whole = Group(((0, digits.PARAMETERS),))
        mix = merged(*seeds, Pair(), [whole], [share], [cut], origin=np.zeros(2))
        expected = np.concatenate(
            [mix.weights[0] @ np.stack([a, b])[:, :cut], mix.weights[-1] @ np.stack([a, b])[:, cut:]]
        )
        assert np.allclose(child, expected, rtol=1e-4, atol=1e-7)


def test_a_short_evolution_improves(digits: Any, task: Any) -> None:
    """Pre-trained seeds know half of the digits each; their children know more than half."""
    seeds = digits.pretrained(task, np.random.default_rng([0, 0]))
    known = [task.train(s).mean() for s in seeds]
    curve = list(digits.evolve(task, digits.M2N2["m2n2"], "pretrained", 100, 0))

    assert 0.1 < max(known) < 0.5
    assert [step for step, _, _ in curve] == [100]
    assert curve[0][1] > max(known) + 0.1
