"""The builder: one buffer at fixed addresses, changed blocks only, no history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evomerge.merge.builder import Builder
from evomerge.merge.pipeline import BuildError
from evomerge.recipe import Recipe

BLOCKS = ("embed", "layers.0.attention", "layers.0.mlp", "final_norm")
EXPERTS = ("a", "b", "c")


@pytest.fixture(scope="module")
def bank(bank_of: Callable[..., Any]) -> Any:
    g = torch.Generator().manual_seed(0)
    names = {"embed.w": "embed", "q": BLOCKS[1], "k": BLOCKS[1], "up": BLOCKS[2], "norm": "final_norm"}
    base = {n: torch.randn(11, 7, generator=g) for n in names}
    experts = {e: {n: t + 0.01 * torch.randn(11, 7, generator=g) for n, t in base.items()} for e in EXPERTS}
    return bank_of({"base": base, **experts}, names)


coefficient = st.integers(-1_500_000, 1_500_000).map(lambda n: n / 1_000_000)
rules = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {
            "method": st.just("ties"),
            "params": st.fixed_dictionaries({"lambda": coefficient, "normalize": st.booleans()}),
            "sources": st.dictionaries(
                st.sampled_from(EXPERTS),
                st.fixed_dictionaries({"weight": coefficient, "density": st.sampled_from([0.05, 0.3, 0.5, 1.0])}),
                min_size=1,
            ),
        }
    ),
    st.fixed_dictionaries(
        {
            "method": st.just("task_arithmetic"),
            "sources": st.dictionaries(
                st.sampled_from(EXPERTS), st.fixed_dictionaries({"weight": coefficient}), min_size=1
            ),
        }
    ),
)
recipes = st.tuples(*[rules] * len(BLOCKS))


def over(manifest: Any, chosen: tuple[Any, ...]) -> Recipe:
    merge = [{"match": {"block": b}, **r} for b, r in zip(BLOCKS, chosen, strict=True) if r is not None]
    return Recipe.model_validate({"merge": merge}).canonical(manifest)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(recipes, min_size=2, max_size=6))
def test_building_has_no_history(bank: Any, history: list[tuple[Any, ...]]) -> None:
    """After any sequence of builds the buffer holds the bits of the last recipe built alone, and only blocks whose
    rule changed were written."""
    old = Builder(bank, "float32")
    before: Recipe | None = None
    for chosen in history:
        recipe = over(bank.manifest, chosen)
        expected = [b for b in BLOCKS if before is None or before.blocks.get(b) != recipe.blocks.get(b)]
        changed = old.build(recipe)
        before = recipe
        new = Builder(bank, "float32")
        new.build(recipe)

        assert changed == len(expected)
        assert torch.equal(old.buffer, new.buffer)


def test_equal_ids_build_equal_bits(bank: Any) -> None:
    """Inert genes and the order of sources change neither id nor weights."""
    plain = {"method": "ties", "sources": {"a": {"weight": 0.5, "density": 0.5}, "b": {"weight": 1.0, "density": 0.3}}}
    noisy = {
        "method": "ties",
        "params": {"lambda": 1.0},
        "sources": {
            "c": {"weight": 0.0, "density": 0.9},
            "b": {"density": 0.3},
            "a": {"weight": 0.50000004, "density": 0.5},
        },
    }
    one, two = (Recipe.model_validate({"merge": [r]}).canonical(bank.manifest) for r in (plain, noisy))
    builders = [Builder(bank, "float32") for _ in range(2)]
    for builder, recipe in zip(builders, (one, two), strict=True):
        builder.build(recipe)

    assert one.id == two.id
    assert torch.equal(builders[0].buffer, builders[1].buffer)
    assert builders[0].build(two) == 0


def test_segments_are_weighted_sums_of_flat_vectors(bank: Any) -> None:
    """Cuts inside tensors and across blocks: fp32 sums over the flat layout, rounded once; only new blocks change."""
    m = bank.manifest
    at = m.tensors[1].offset + 3
    weights = {"base": (0.25, -0.5, 1.0), "a": (0.5, 0.0, 0.0), "c": (0.0, 1.75, 0.0)}
    segments = {"layout": m.layout, "cuts": (0, 30, at), "weights": weights}
    recipe = Recipe.model_validate({"segments": segments}).canonical(m)
    expected = torch.zeros(m.elements)
    for i, (start, stop) in enumerate(((0, 30), (30, at), (at, m.elements))):
        for n in sorted(weights):
            expected[start:stop] += weights[n][i] * bank.flat[n][start:stop]

    builder, fresh = Builder(bank, "float32"), Builder(bank, "float32")
    builder.build(over(m, ({"method": "ties", "sources": {"a": {"weight": 0.5}}},) * 4))
    assert builder.build(recipe) == len(BLOCKS)
    fresh.build(recipe)
    assert torch.equal(builder.buffer, fresh.buffer)
    assert torch.allclose(builder.buffer, expected, rtol=1e-6, atol=1e-7)
    assert builder.build(recipe) == 0

    moved = Recipe.model_validate({"segments": {**segments, "cuts": (0, 31, at)}}).canonical(m)
    assert builder.build(moved) == 1, "the cut that moved lies in the first block"
    fresh.build(moved)
    assert torch.equal(builder.buffer, fresh.buffer)
    half = Builder(bank, "bfloat16")
    half.build(moved.model_copy(update={"dtype": "bfloat16"}))
    assert torch.equal(half.buffer, fresh.buffer.bfloat16())


def test_one_source_built_by_segments_is_that_source(bank: Any) -> None:
    """Weight 1 copies to the bit, on either side of a cut; what is not finite is refused and named."""
    m = bank.manifest
    weights = {"a": (1.0, 0.0), "b": (0.0, 1.0)}
    recipe = Recipe.model_validate({"segments": {"layout": m.layout, "cuts": (0, 100), "weights": weights}})
    builder = Builder(bank, "float32")
    builder.build(recipe.canonical(m))
    assert torch.equal(builder.buffer, torch.cat([bank.flat["a"][:100], bank.flat["b"][100:]]))

    huge = {"a": (1.0, 1e6), "b": (0.0, 1e6)}
    sick = Recipe.model_validate({"dtype": "float16", "segments": {**recipe.segments.model_dump(), "weights": huge}})
    with pytest.raises(BuildError, match=r"NaN or infinite weights in layers\.0\.attention and 2 more"):
        Builder(bank, "float16").build(sick.canonical(m))


def test_addresses_never_change(bank: Any) -> None:
    """The views handed out before the first build are the memory of every later one."""
    builder = Builder(bank, "float32")
    views = builder.views()
    before = {n: v.data_ptr() for n, v in views.items()}
    for weight in (0.3, 0.0, 1.2):
        builder.build(over(bank.manifest, ({"method": "task_arithmetic", "sources": {"a": {"weight": weight}}},) * 4))

    assert {n: v.data_ptr() for n, v in builder.views().items()} == before
    expected = bank.flat["base"] + 1.2 * (bank.flat["a"] - bank.flat["base"])
    for t in bank.manifest.tensors:
        assert views[t.name].shape == t.shape
        assert torch.allclose(views[t.name].view(-1), expected[t.offset : t.offset + t.size])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("source", ["base", "a"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_bad_weights_are_refused_and_leave_no_trace(
    method: str, source: str, bad: float, bank_of: Callable[..., Any]
) -> None:
    """A NaN or infinity raises an error that names the block; the next good build has the right bits."""
    tensors = {n: torch.linspace(-1, 1, 70) for n in ("x", "y", "z")}
    sources = {"base": tensors, **{e: {n: t + i for n, t in tensors.items()} for i, e in enumerate("ab", 1)}}
    sources[source] = {n: t.clone() for n, t in sources[source].items()}
    sources[source]["y"][33] = bad
    bank = bank_of(sources)
    coefs = {e: {"weight": 0.5} for e in "ab"}
    sick = Recipe.model_validate({"merge": [{"method": method, "sources": coefs}]}).canonical(bank.manifest)
    merge: list[dict[str, Any]]
    if source == "base":  # only a merge that does not read the base is good
        merge = [{"method": "linear", "sources": {"b": {}}}]
    else:
        good = {"method": method, "sources": {"b": {"weight": 0.25}}}
        merge = [{"match": {"block": f"layers.{i}.attention"}, **good} for i in (0, 2)]
    fine = Recipe.model_validate({"merge": merge})
    canonical = fine.canonical(bank.manifest)
    old, new = Builder(bank, "float32"), Builder(bank, "float32")
    new.build(canonical)

    if method == "linear" and source == "base":
        old.build(sick)  # linear over the experts never looks at the base
    else:
        with pytest.raises(BuildError, match=r"NaN or infinite weights in layers\.1\.attention"):
            old.build(sick)
        with pytest.raises(BuildError):
            old.build(sick)
    old.build(canonical)
    assert torch.equal(old.buffer, new.buffer)


def test_several_sick_blocks_are_counted(bank_of: Callable[..., Any]) -> None:
    """The first sick block is named, the others are counted."""
    base = {n: torch.ones(5) for n in ("x", "y", "z")}
    bank = bank_of({"base": base, "a": {n: torch.full((5,), float("nan")) for n in base}})
    recipe = Recipe.model_validate({"merge": [{"method": "ties", "sources": {"a": {}}}]}).canonical(bank.manifest)

    with pytest.raises(BuildError, match=r"layers\.0\.attention and 2 more$"):
        Builder(bank, "float32").build(recipe)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_buffer_is_the_fp32_build_rounded_once(bank: Any, dtype: str) -> None:
    """The same rules built in half precision are the fp32 weights rounded once."""
    chosen = ({"method": "task_arithmetic", "sources": {e: {"weight": 0.4} for e in EXPERTS}}, None, None, None)
    wide = over(bank.manifest, chosen)
    half = wide.model_copy(update={"dtype": dtype})
    builders = {d: Builder(bank, d) for d in ("float32", dtype)}
    builders["float32"].build(wide)
    builders[dtype].build(half)

    assert torch.equal(builders[dtype].buffer, builders["float32"].buffer.to(getattr(torch, dtype)))
    assert not torch.equal(builders[dtype].buffer.float(), builders["float32"].buffer)
    with pytest.raises(ValueError, match=f"holds {dtype}, the recipe asks for float32"):
        builders[dtype].build(wide)
