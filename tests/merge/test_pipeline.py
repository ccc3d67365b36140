"""Properties of the delta pipeline that need no oracle (merge methods, section 11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from evomerge.merge import pipeline
from evomerge.merge.bank import Bank
from evomerge.merge.pipeline import Sketches, apply
from evomerge.recipe import Rule

Banks = Callable[..., Bank]
SHAPES: dict[str, tuple[int, ...]] = {"matrix": (37, 29), "line": (65,), "single": (1,)}
BLOCK = dict.fromkeys(SHAPES, "layers.0.mlp")
METHODS = ("linear", "task_arithmetic", "ties")


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


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("method", METHODS)
def test_zero_deltas_give_the_base(method: str, density: float, bank_of: Banks) -> None:
    """Experts that equal the base leave it as it is: exactly where deltas are added, to rounding in a mean."""
    sources = random_sources(0, experts=0)
    bank = bank_of({"base": sources["base"], "a": sources["base"], "b": sources["base"]}, BLOCK)
    out = merged(bank, rule(method, {"a": (0.7, density), "b": (-0.2, density)}))

    if method == "linear":
        assert torch.allclose(out, bank.flat["base"], rtol=3e-7, atol=0)
    else:
        assert torch.equal(out, bank.flat["base"])


@pytest.mark.parametrize("method", METHODS)
def test_one_expert_at_weight_one_is_that_expert(method: str, bank_of: Banks) -> None:
    """Weight 1, density 1: exact for linear, within one rounding of base + (expert - base) for the others."""
    bank = bank_of(random_sources(1), BLOCK)
    out = merged(bank, rule(method, {"e1": (1.0, 1.0)}))

    if method == "linear":
        assert torch.equal(out, bank.flat["e1"])
    else:
        assert torch.allclose(out, bank.flat["e1"], rtol=2e-7, atol=1e-8)
        assert not torch.equal(out, bank.flat["base"])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_order_of_experts_does_not_matter(method: str, normalize: bool, bank_of: Banks) -> None:
    """Any order of the sources in a rule, and of the bank's vectors, gives the same bits."""
    sources = random_sources(2)
    coefficients = {"e0": (0.9, 0.3), "e1": (-0.4, 0.8), "e2": (0.37, 1.0)}
    shuffled = {n: coefficients[n] for n in ("e2", "e0", "e1")}
    bank = bank_of(sources, BLOCK)
    other = bank_of({n: sources[n] for n in ("base", "e1", "e2", "e0")}, BLOCK)

    first = merged(bank, rule(method, coefficients, 0.8, normalize))
    assert torch.equal(first, merged(bank, rule(method, shuffled, 0.8, normalize)))
    assert torch.equal(first, merged(other, rule(method, coefficients, 0.8, normalize)))


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


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_computed_in_fp32_and_rounded_once(method: str, bank_of: Banks) -> None:
    """A bf16 merge of bf16 sources is the fp32 merge of the same values, rounded at the end."""
    sources = random_sources(4, dtype=torch.bfloat16)
    exact = {s: {n: t.float() for n, t in ts.items()} for s, ts in sources.items()}
    r = rule(method, {"e0": (0.6, 0.5), "e1": (0.31, 0.2), "e2": (-0.17, 1.0)}, 0.9)
    wide = merged(bank_of(exact, BLOCK), r)

    assert torch.equal(merged(bank_of(sources, BLOCK), r), wide)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(merged(bank_of(sources, BLOCK), r, dtype), wide.to(dtype))


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000, 1 << 30])
@pytest.mark.parametrize("method", METHODS)
def test_chunks_do_not_matter(method: str, chunk: int, bank_of: Banks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walking a block in pieces of any length gives the weights of one pass, to the last place."""
    bank = bank_of(random_sources(5), BLOCK)
    r = rule(method, {"e0": (0.6, 0.5), "e1": (0.31, 0.2), "e2": (-0.17, 1.0)}, 0.9)
    whole = merged(bank, r)
    monkeypatch.setattr(pipeline, "CHUNK_CPU", chunk)

    pieces = merged(bank, r)
    if chunk % 64 == 0:
        assert torch.equal(pieces, whole)
    else:  # torch's scalar tail may contract a multiply and an add differently from its vector body
        assert torch.allclose(pieces, whole, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_identical_experts_give_the_delta_of_one(method: str, bank_of: Banks) -> None:
    """A mean over copies of one expert is that expert, whatever their positive weights."""
    sources = random_sources(6, experts=1)
    bank = bank_of({**sources, "e1": sources["e0"], "e2": sources["e0"]}, BLOCK)
    one = merged(bank, rule(method, {"e0": (1.0, 0.3)}))
    copies = merged(bank, rule(method, {"e0": (0.2, 0.3), "e1": (1.4, 0.3), "e2": (0.05, 0.3)}))

    assert torch.allclose(copies, one, rtol=1e-6, atol=1e-8)


def test_lambda_scales_the_delta(bank_of: Banks) -> None:
    """Doubling lambda doubles what is added to the base, for both methods that add to it."""
    bank = bank_of(random_sources(7), BLOCK)
    for method in ("task_arithmetic", "ties"):
        one, two = (merged(bank, rule(method, {"e0": (0.5, 0.5), "e1": (0.2, 0.9)}, lam)) for lam in (1.0, 2.0))

        base = bank.flat["base"]
        assert torch.allclose(two - base, 2 * (one - base), rtol=1e-4, atol=2e-8)


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
