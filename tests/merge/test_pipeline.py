"""Properties of the delta pipeline that need no oracle (merge methods, section 11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from evomerge.merge.bank import Bank
from evomerge.merge.pipeline import Sketches, apply
from evomerge.recipe import Rule

Banks = Callable[..., Bank]
SHAPES: dict[str, tuple[int, ...]] = {"matrix": (37, 29), "line": (65,), "single": (1,)}
BLOCK = dict.fromkeys(SHAPES, "layers.0.mlp")


def random_sources(seed: int, experts: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A base and experts with heavy-tailed deltas, as fine-tuning leaves them."""
    g = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=g) * 0.05 for n, s in SHAPES.items()}
    out: dict[str, Any] = {"base": {n: t.to(dtype) for n, t in base.items()}}
    for i in range(experts):
        deltas = {n: torch.randn(s, generator=g) ** 3 * 2e-3 for n, s in SHAPES.items()}
        out[f"e{i}"] = {n: (base[n] + deltas[n]).to(dtype) for n in SHAPES}
    return out


def rule(method: str, coefficients: dict[str, tuple[float, float]], lam: float = 1.0, normalize: bool = True) -> Rule:
    """A rule with (weight, density) per source, in the order given."""
    params: dict[str, Any] = {} if method == "linear" else {"lambda": lam}
    if method != "task_arithmetic":
        params["normalize"] = normalize
    sources = {
        s: {"weight": w, "density": d} if method == "ties" else {"weight": w} for s, (w, d) in coefficients.items()
    }
    return Rule(method=method, params=params, sources=sources)


def merged(bank: Bank, r: Rule, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The block as the pipeline builds it."""
    view = bank.view("layers.0.mlp")
    out = torch.zeros(len(view.base), dtype=dtype)
    health = apply(out, view, r, Sketches())
    assert float(health) == 0.0
    return out


def test_density_keeps_nested_entries_of_the_right_number(bank_of: Banks) -> None:
    """A higher density keeps all that a lower one kept, and max(1, int(density n)) entries of each tensor."""
    sources = random_sources(3, experts=1)
    bank = bank_of({"base": {n: torch.zeros(s) for n, s in SHAPES.items()}, "e0": sources["e0"]}, BLOCK)
    before = torch.zeros(len(bank.view("layers.0.mlp").base), dtype=torch.bool)
    for density in (1e-6, 0.01, 0.1, 0.29, 0.5, 0.77, 0.999, 1.0):
        out = merged(bank, rule("ties", {"e0": (1.0, density)}))
        kept = out != 0.0

        assert bool((kept | ~before).all()), "nested"
        for name, start, stop in bank.view("layers.0.mlp").spans():
            n = stop - start
            assert int(kept[start:stop].sum()) == max(1, int(density * n)), (name, density)
        before = kept


def test_equal_magnitudes_at_the_cut_are_all_kept(bank_of: Banks) -> None:
    """Entries that tie with the k-th largest are kept together, as in the TIES authors' code."""
    delta = torch.tensor([3.0, -2.0, 2.0, 2.0, 1.0, 0.0])
    bank = bank_of({"base": {"x": torch.zeros(6)}, "e": {"x": delta}}, {"x": "layers.0.mlp"})
    out = merged(bank, rule("ties", {"e": (1.0, 0.34)}))  # k = 2

    assert out.tolist() == [3.0, -2.0, 2.0, 2.0, 0.0, 0.0]


def test_signs_are_elected_by_weighted_mass(bank_of: Banks) -> None:
    """The sign with the larger weighted sum wins an entry; a sum of zero counts as positive."""
    base = {"x": torch.zeros(3)}
    bank = bank_of(
        {
            "base": base,
            "a": {"x": torch.tensor([1.0, 1.0, -2.0])},
            "b": {"x": torch.tensor([-3.0, -1.0, -4.0])},
        },
        {"x": "layers.0.mlp"},
    )
    equal = merged(bank, rule("ties", {"a": (1.0, 1.0), "b": (1.0, 1.0)}))
    heavy = merged(bank, rule("ties", {"a": (4.0, 1.0), "b": (1.0, 1.0)}, normalize=False))

    assert equal.tolist() == [-3.0, 1.0, -3.0]
    assert heavy.tolist() == [4.0, 4.0, -12.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["base", "e0"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_health_is_finite_only_where_all_weights_are(method: str, where: str, bad: float, bank_of: Banks) -> None:
    """One NaN or infinity among the sources of a block shows in the returned scalar."""
    sources = random_sources(8)
    sources[where]["line"][40] = bad
    view = bank_of(sources, BLOCK).view("layers.0.mlp")
    out = torch.zeros(len(view.base))

    assert not torch.isfinite(apply(out, view, rule(method, {"e0": (0.5, 1.0)}), Sketches()))


def test_health_sees_overflow_of_the_cast(bank_of: Banks) -> None:
    """A weight that is finite in fp32 but not in the built dtype is as bad as an infinity."""
    sources = random_sources(9, experts=1)
    sources["e0"]["line"][3] = 1e5  # float16 ends at 65504
    view = bank_of(sources, BLOCK).view("layers.0.mlp")
    r = rule("task_arithmetic", {"e0": (1.0, 1.0)})

    assert torch.isfinite(apply(torch.zeros(len(view.base)), view, r, Sketches()))
    assert not torch.isfinite(apply(torch.zeros(len(view.base), dtype=torch.float16), view, r, Sketches()))
