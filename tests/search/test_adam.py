"""Adam: the steps of torch's own, the walls of the cube, failures on the way."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.errors import UserError
from evomerge.proposal import Genome, Proposal, Result, frozen_genome
from evomerge.search import make_options
from evomerge.search.adam import Adam, Options
from evomerge.search.base import Start
from evomerge.space import Axis


def make(n: int = 3, start: float = 0.3, **options: float) -> Adam:
    axes = tuple(Axis(f"x{i}") for i in range(n))
    rng = np.random.Generator(np.random.PCG64(1))
    return Adam(axes, Start(frozen_genome([start] * n)), rng, itertools.count(), Options(**options))


def step(opt: Adam, gradient: Any) -> Genome:
    """Ask, tell a gradient (None: a failure), give the point that was asked."""
    [p] = opt.ask(5)
    assert p.genome is not None
    if gradient is None:
        opt.tell(p, Result(np.array([math.inf]), "failed:nan"))
    else:
        opt.tell(p, Result(np.array([1.0]), gradient=np.atleast_2d(gradient).astype(np.float64)))
    return p.genome


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.01, "beta1": 0.5, "beta2": 0.9}])
def test_steps_are_those_of_torch(options: dict[str, float]) -> None:
    """Away from the walls, the points are torch.optim.Adam's in float64, for gradients of very different sizes."""
    o = Options(**options)
    x = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Adam([x], lr=o.learning_rate, betas=(o.beta1, o.beta2), eps=1e-8)
    ours = make(start=0.5, **options)
    rng = np.random.default_rng(3)
    for _ in range(12):
        g = rng.standard_normal(3) * [1e-4, 1.0, 1e3]
        assert np.allclose(step(ours, g), x.detach().numpy(), rtol=0, atol=1e-12)
        x.grad = torch.from_numpy(g)
        theirs.step()


def test_the_walls_are_kept() -> None:
    """Gradients that point outwards lead to the wall and not beyond; pointing back, away from it."""
    opt = make(2, learning_rate=0.3, beta1=0.0)
    points = [step(opt, [1.0, -1.0]) for _ in range(4)]

    assert np.array_equal(points[-1], [0.0, 1.0])
    step(opt, [-1.0, 1.0])
    back = step(opt, [-1.0, 1.0])
    assert back[0] > 0.0
    assert back[1] < 1.0


def test_a_failed_step_is_halved() -> None:
    """After failures the next point lies half way to the last one that could be scored; nothing is learned of them."""
    opt, other = make(learning_rate=0.1), make(learning_rate=0.1)
    first, same = step(opt, [1.0, -1.0, 2.0]), step(other, [1.0, -1.0, 2.0])
    second, third, fourth = (step(opt, g) for g in (None, None, [1.0, 1.0, 1.0]))

    assert np.array_equal(first, same)
    assert np.allclose(third, (first + second) / 2)
    assert np.allclose(fourth, (first + third) / 2)
    moved = step(opt, [1.0, 1.0, 1.0]) - fourth
    step(other, [1.0, 1.0, 1.0])
    [p] = other.ask(1)
    assert p.genome is not None
    assert np.allclose(moved, p.genome - second)


def test_a_start_that_fails_is_asked_again() -> None:
    """Where nothing was scored yet there is nowhere to go back to."""
    opt = make()

    assert np.array_equal(step(opt, None), step(opt, None))
    assert opt.recommend(1) == []


def test_the_answer_is_where_the_last_step_leads() -> None:
    """recommend gives the point that would be asked next."""
    opt = make()
    for _ in range(3):
        step(opt, [1.0, 2.0, -1.0])
    [answer], [p] = opt.recommend(4), opt.ask(1)

    assert answer.genome is not None
    assert np.array_equal(answer.genome, p.genome)
    assert answer.id < p.id


def test_a_result_without_gradient_is_refused() -> None:
    """A score alone teaches nothing; the proposal still waits."""
    opt = make()
    [p] = opt.ask(1)

    with pytest.raises(ValueError, match="without its gradient"):
        opt.tell(p, Result(np.array([1.0])))

    assert isinstance(p, Proposal)
    opt.tell(p, Result(np.array([1.0]), gradient=np.ones((1, 3))))
    assert opt.ask(1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rat": 0.1}, "no setting 'learning_rat'; did you mean 'learning_rate'"),
        ({"learning_rate": "0.1"}, "learning_rate should be a number, got '0.1'"),
        ({"learning_rate": 0}, "learning_rate: `0 < learning_rate <= 1` must hold, but got 0"),
        ({"learning_rate": 1.5}, "learning_rate"),
        ({"beta1": -0.1}, "beta1: `0 <= beta1 < 1` must hold, but got -0.1"),
        ({"beta2": 1}, "beta2: `0 <= beta2 < 1` must hold, but got 1"),
        ({"beta2": math.nan}, "beta2"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    """Settings are checked by name, kind and range, each in one line."""
    with pytest.raises(UserError) as caught:
        make_options("adam", settings)

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
