"""The contract that every row of the table of methods fulfils: a new row inherits all of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.merge import pipeline
from evomerge.merge.bank import Bank
from evomerge.merge.builder import Builder
from evomerge.merge.methods import BANDS, METHODS
from evomerge.merge.pipeline import BuildError
from evomerge.recipe import Recipe, check_value

Data = dict[str, Any]
Banks = Callable[..., Bank]

SHAPES: dict[str, tuple[int, ...]] = {"matrix": (37, 29), "line": (65,), "single": (1,)}
BLOCK = dict.fromkeys(SHAPES, "layers.0.mlp")


def variants() -> dict[str, tuple[str, Data]]:
    """Every method with every combination of its options."""
    out = {}
    for method in METHODS.values():
        for values in itertools.product(*(allowed for _, allowed in method.options.values())):
            options = dict(zip(method.options, values, strict=True))
            out[" ".join([method.name, *(f"{o}={v}" for o, v in options.items())])] = (method.name, options)
    return out


VARIANTS = variants()
every = pytest.mark.parametrize("name", VARIANTS)
MEANS = [  # what gives back one expert where all are the same
    n
    for n, (method, options) in VARIANTS.items()
    if METHODS[method].combine == "spherical" or (options.get("normalize") and METHODS[method].sparsify != "bernoulli")
]


def random_sources(seed: int, experts: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A base and experts with heavy-tailed deltas, as fine-tuning leaves them."""
    g = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=g) * 0.05 for n, s in SHAPES.items()}
    out: dict[str, Any] = {"base": {n: t.to(dtype) for n, t in base.items()}}
    for i in range(experts):
        deltas = {n: torch.randn(s, generator=g) ** 3 * 2e-3 for n, s in SHAPES.items()}
        out[f"e{i}"] = {n: (base[n] + deltas[n]).to(dtype) for n in SHAPES}
    return out


def rule(name: str, sources: dict[str, tuple[float, float]], **params: Any) -> Data:
    """A rule of a variant over (weight, density) per source; what a method does not have is left out.

    A density also is the factor of a band, so that bands differ where densities do.
    """
    method, options = VARIANTS[name]
    row = METHODS[method]
    given = {
        s: {"weight": abs(w) if row.combine == "spherical" else w, "density": d, "band_2": d, "band_4": 1.5 - d / 2}
        for s, (w, d) in sources.items()
    }
    if row.combine == "spherical":
        given = dict(sorted(given.items())[:2])
    return {
        "method": method,
        "params": {**options, **{p: v for p, v in params.items() if p in row.per_block}},
        "sources": {s: {c: v for c, v in coefs.items() if c in row.per_source} for s, coefs in given.items()},
    }


def built(bank: Bank, *rules: Data, dtype: str = "float32") -> torch.Tensor:
    """The buffer of a fresh builder."""
    builder = Builder(bank, dtype)
    builder.build(Recipe.model_validate({"dtype": dtype, "merge": list(rules)}).canonical(bank.manifest))
    return builder.buffer.clone()


MIXED = {"e0": (0.6, 0.5), "e1": (0.31, 0.2), "e2": (-0.17, 1.0)}


# -- the table ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_consistent(name: str) -> None:
    """A row is found by its name, cites its paper, and its defaults are within its own ranges."""
    method = METHODS[name]

    assert method.name == name
    assert re.search(r"arXiv \d{4}\.\d{4,5}|doi 10\.\d+/", method.source)
    assert {*method.per_source, *method.per_block} == set(method.coefficients)
    assert "weight" in method.per_source
    assert not set(method.coefficients) & set(method.options)
    for c, x in method.coefficients.items():
        assert x.low <= x.default <= x.high
        check_value(method, c, x.default)
    for o, (default, allowed) in method.options.items():
        assert default in allowed
        check_value(method, o, default)


def test_promised_methods() -> None:
    """Every method but one is checked against an independent implementation (goldens, `make oracle`)."""
    assert {n: m.status for n, m in METHODS.items()} == {
        **dict.fromkeys(("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"), "verified"),
        "spectral": "derived",
    }


def test_compositions_differ() -> None:
    """No two rows are the same composition of primitives."""
    rows = [(m.delta, m.spectrum, m.sparsify, m.consensus, m.combine) for m in METHODS.values()]

    assert len(set(rows)) == len(rows)


# -- the contract -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [1.0, 0.4])
@every
def test_zero_deltas_give_the_base(name: str, density: float, bank_of: Banks) -> None:
    """Experts that equal the base leave it as it is: exactly where deltas are added, to rounding in a mean."""
    sources = random_sources(0, experts=0)
    bank = bank_of({"base": sources["base"], "a": sources["base"], "b": sources["base"]}, BLOCK)
    r = rule(name, {"a": (0.7, density), "b": (-0.2, density)}, mask_seed=3)
    if VARIANTS[name] == ("linear", {"normalize": False}):
        r["sources"]["b"]["weight"] = 0.3
    out = built(bank, r)

    if METHODS[r["method"]].adds_to_base(r["params"]):
        assert torch.equal(out, bank.flat["base"])
    else:
        assert torch.allclose(out, bank.flat["base"], rtol=3e-7, atol=0)


@every
def test_one_expert_at_weight_one_is_that_expert(name: str, bank_of: Banks) -> None:
    """Weight 1, density 1: exact without a base, within one rounding of base + (expert - base) for the others."""
    bank = bank_of(random_sources(1), BLOCK)
    r = rule(name, {"e1": (1.0, 1.0)}, mask_seed=3)
    out = built(bank, r)

    if METHODS[r["method"]].adds_to_base(r["params"]):
        assert torch.allclose(out, bank.flat["e1"], rtol=2e-7, atol=1e-8)
        assert not torch.equal(out, bank.flat["base"])
    else:
        assert torch.equal(out, bank.flat["e1"])


@every
def test_order_of_experts_does_not_matter(name: str, bank_of: Banks) -> None:
    """Any order of the sources in a rule, and of the bank's vectors, gives the same bits and the same id."""
    sources = random_sources(2)
    bank = bank_of(sources, BLOCK)
    # Hashes go with the content, as those of files do.
    other = Bank({n: bank.flat[n] for n in ("base", "e2", "e0", "e1")}, bank.manifest)
    r = rule(name, MIXED, **{"lambda": 0.8, "mask_seed": 7})
    turned = {**r, "sources": dict(reversed(list(r["sources"].items())))}

    assert torch.equal(built(bank, r), built(bank, turned))
    assert torch.equal(built(bank, r), built(other, r))


@every
def test_building_has_no_history(name: str, bank_of: Banks) -> None:
    """After other recipes, other seeds and other densities the bits are those of the recipe built alone."""
    bank = bank_of(random_sources(3), BLOCK)
    wanted = rule(name, MIXED, mask_seed=1)
    before = [rule(name, {"e1": (0.4, 0.7), "e2": (1.1, 0.3)}, mask_seed=2), rule("ties normalize=True", MIXED)]
    builder = Builder(bank, "float32")
    for r in [*before, wanted]:
        builder.build(Recipe.model_validate({"merge": [r]}).canonical(bank.manifest))

    assert torch.equal(builder.buffer, built(bank, wanted))


@pytest.mark.parametrize("chunk", [7, 64, 1 << 30])
@every
def test_chunks_do_not_matter(name: str, chunk: int, bank_of: Banks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walking a block in pieces of any length gives the weights of one pass, to the last place."""
    bank = bank_of(random_sources(5), BLOCK)
    r = rule(name, MIXED, mask_seed=5, **{"lambda": 0.9})
    whole = built(bank, r)
    monkeypatch.setattr(pipeline, "CHUNK_CPU", chunk)

    pieces = built(bank, r)
    if chunk % 64 == 0:
        assert torch.equal(pieces, whole)
    else:  # torch's scalar tail may contract a multiply and an add differently from its vector body
        assert torch.allclose(pieces, whole, rtol=3e-7, atol=1e-9)


@every
def test_half_precision_is_computed_in_fp32_and_rounded_once(name: str, bank_of: Banks) -> None:
    """A merge of half-precision sources is the fp32 merge of the same values, rounded at the end."""
    for dtype in (torch.bfloat16, torch.float16):
        sources = random_sources(4, dtype=dtype)
        exact = {s: {n: t.float() for n, t in ts.items()} for s, ts in sources.items()}
        r = rule(name, MIXED, mask_seed=9, **{"lambda": 0.9})
        wide = built(bank_of(exact, BLOCK), r)

        assert torch.equal(built(bank_of(sources, BLOCK), r), wide)
        assert torch.equal(built(bank_of(sources, BLOCK), r, dtype=str(dtype).removeprefix("torch.")), wide.to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every
def test_bad_weights_are_caught(name: str, bad: float, bank_of: Banks) -> None:
    """A NaN or infinity in a source is refused, masked out or not."""
    for seed, density in ((0, 1.0), (1, 0.5), (2, 0.5), (3, 0.05), (4, 0.05)):
        sources = random_sources(8)
        sources["e0"]["line"][40] = bad
        r = rule(name, {"e0": (0.5, density), "e1": (0.4, density)}, mask_seed=seed)
        with pytest.raises(BuildError, match="NaN or infinite"):
            built(bank_of(sources, BLOCK), r)


@pytest.mark.parametrize("name", MEANS)
def test_identical_experts_give_the_delta_of_one(name: str, bank_of: Banks) -> None:
    """A mean over copies of one expert is that expert, whatever their positive weights."""
    sources = random_sources(6, experts=1)
    bank = bank_of({**sources, "e1": sources["e0"], "e2": sources["e0"]}, BLOCK)
    one = built(bank, rule(name, {"e0": (1.0, 0.3)}))
    copies = built(bank, rule(name, {"e0": (0.2, 0.3), "e1": (1.4, 0.3), "e2": (0.05, 0.3)}))

    assert torch.allclose(copies, one, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [n for n, (m, _) in VARIANTS.items() if "lambda" in METHODS[m].coefficients])
def test_lambda_scales_the_delta(name: str, bank_of: Banks) -> None:
    """Doubling lambda doubles what is added to the base."""
    bank = bank_of(random_sources(7), BLOCK)
    one, two = (built(bank, rule(name, MIXED, **{"lambda": lam})) for lam in (1.0, 2.0))

    base = bank.flat["base"]
    assert torch.allclose(two - base, 2 * (one - base), rtol=1e-4, atol=2e-8)
    assert not torch.equal(one, base)


@every
def test_inert_forms_build_the_same_bits(name: str, bank_of: Banks) -> None:
    """What the canonical form removes (evomerge/recipe.py) leaves no trace in the weights either: each form, built
    from its own rule, has the bits and the id of the plain one."""
    bank = bank_of(random_sources(10), BLOCK)
    plain = rule(name, {"e0": (0.6, 1.0), "e1": (0.3, 1.0)})
    forms = [{**plain, "sources": {**plain["sources"], "e2": {"weight": 0.0}}}]
    row = METHODS[plain["method"]]
    if "mask_seed" in row.coefficients:
        forms += [{**plain, "params": {**plain["params"], "mask_seed": 12, "rescale": r}} for r in ("l1",)]
    ids = {Recipe.model_validate({"merge": [r]}).canonical(bank.manifest).id for r in [plain, *forms]}
    view = bank.view("layers.0.mlp")
    raw = []
    for form in [plain, *forms]:  # past the canonical form, as the pipeline would see them
        r = Recipe.model_validate({"merge": [form]}).canonical(bank.manifest).blocks["layers.0.mlp"]
        sources = {s: {**next(iter(r.sources.values())), **c} for s, c in form["sources"].items()}
        if row.combine == "spherical":
            sources = {s: c for s, c in sources.items() if s != "e2"}
        r = r.model_copy(update={"params": {**r.params, **form["params"]}, "sources": sources})
        out = torch.zeros(len(view.base))
        pipeline.apply(out, view, r, pipeline.Sketches())
        raw.append(out)

    assert len(ids) == 1
    for out in raw:
        assert torch.equal(out, raw[0])
    assert torch.equal(raw[0], built(bank, plain))


# -- SLERP --------------------------------------------------------------------------------------------------------


def test_slerp_of_a_right_angle(bank_of: Banks) -> None:
    """Half-way between two orthogonal vectors of equal length lies a vector of that length."""
    unit = {"base": {"x": torch.tensor([1.0, 0.0])}, "a": {"x": torch.tensor([0.0, 1.0])}}
    bank = bank_of(unit)
    out = built(bank, {"method": "slerp", "sources": {"base": {"weight": 2.0}, "a": {"weight": 1.0}}})

    assert torch.allclose(out, torch.tensor([3**0.5 / 2, 0.5]))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_slerp_ends_are_the_models(weight: float, bank_of: Banks) -> None:
    """At t = 0 and t = 1 one model remains, exactly."""
    bank = bank_of(random_sources(11), BLOCK)
    out = built(bank, {"method": "slerp", "sources": {"base": {"weight": 1.0 - weight}, "e0": {"weight": weight}}})

    assert torch.equal(out, bank.flat["e0" if weight else "base"])


def test_slerp_of_vectors_without_direction(bank_of: Banks) -> None:
    """A zero tensor, as a frozen one's delta, counts as orthogonal; two of them stay zero; opposite deltas cancel."""
    base = {"x": torch.zeros(4), "y": torch.zeros(4), "z": torch.zeros(4)}
    d = torch.tensor([3.0, -1.0, 2.0, 0.5])
    bank = bank_of(
        {"base": base, "a": {"x": d, "y": base["y"], "z": d}, "b": {"x": base["x"], "y": base["y"], "z": -d}}
    )
    out = built(bank, {"method": "slerp", "params": {"vectors": "deltas"}, "sources": {"a": {}, "b": {}}})

    assert torch.allclose(out[:4], d * 0.5**0.5)
    assert not out[64:68].any()
    assert torch.allclose(out[128:132], torch.zeros(4), atol=1e-6)


def test_slerp_of_nearly_parallel_weights_is_linear(bank_of: Banks) -> None:
    """Above a cosine of 0.9995 weights are interpolated linearly, below it on the arc."""
    x = torch.tensor([1.0, 0.0])
    for angle, linear in ((0.03, True), (0.035, False)):
        y = torch.tensor([torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))])
        out = built(bank_of({"base": {"x": x}, "a": {"x": y}}), {"method": "slerp", "sources": {"base": {}, "a": {}}})

        assert torch.allclose(out, (x + y) / 2, rtol=0, atol=1e-7) == linear


# -- DARE ---------------------------------------------------------------------------------------------------------

LONG = 400_000
DENSITIES = (1e-6, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999999)


@pytest.fixture(scope="module")
def ones(bank_of: Banks) -> Bank:
    """Deltas of 1 everywhere over a base of 0: what is built is the mask times its factor."""
    shapes = {n: torch.zeros(LONG) for n in ("x", "y")}
    return bank_of({"base": shapes, **{e: {n: t + 1.0 for n, t in shapes.items()} for e in ("a", "b")}})


def kept(bank: Bank, expert: str, density: float, seed: int = 0, tensor: int = 0) -> torch.Tensor:
    r = {"method": "dare_linear", "params": {"mask_seed": seed}, "sources": {expert: {"density": density}}}
    t = bank.manifest.tensors[tensor]
    return built(bank, r)[t.offset : t.offset + t.size] != 0.0


def test_masks_are_nested_in_density(ones: Bank) -> None:
    """A higher density keeps all that a lower one kept."""
    before = torch.zeros(LONG, dtype=torch.bool)
    for density in DENSITIES:
        now = kept(ones, "a", density)
        assert bool((now | ~before).all())
        before = now


@pytest.mark.parametrize("density", DENSITIES)
def test_as_many_are_kept_as_the_density_says(density: float, ones: Bank) -> None:
    """Within five standard deviations of a binomial, over the tensor and over each tenth of it."""
    mask = kept(ones, "a", density).double()
    for part in (mask, *mask.view(10, -1)):
        n = len(part)
        assert abs(float(part.sum()) - n * density) <= 5 * (n * density * (1 - density)) ** 0.5 + 1


def test_masks_are_independent(ones: Bank) -> None:
    """Of other experts, tensors, seeds and neighbours: both are kept as often as chance says."""
    a = kept(ones, "a", 0.3)
    others = [
        kept(ones, "b", 0.3),
        kept(ones, "a", 0.3, seed=1),
        kept(ones, "a", 0.3, tensor=1),
        a.roll(1),
        a.roll(65536),
    ]
    for other in others:
        both = float((a & other).double().sum())
        assert abs(both - 0.09 * LONG) <= 5 * (LONG * 0.09 * 0.91) ** 0.5


def test_masks_are_a_function_of_the_recipe(ones: Bank) -> None:
    """The same seed draws the same mask again; names of experts do not matter, what else is merged neither."""
    a = kept(ones, "a", 0.3, seed=4)
    hashes = {"base": ones.manifest.hashes["base"], "renamed": ones.manifest.hashes["a"]}
    manifest = type(ones.manifest)("base", ones.manifest.layers, ones.manifest.tensors, hashes)
    renamed = Bank({"base": ones.flat["base"], "renamed": ones.flat["a"]}, manifest)
    both = {"a": {"density": 0.3, "weight": 1.0}, "b": {"density": 0.5, "weight": 100.0}}
    together = built(ones, {"method": "dare_linear", "params": {"mask_seed": 4}, "sources": both})[:LONG]

    assert torch.equal(kept(ones, "a", 0.3, seed=4), a)
    assert torch.equal(kept(renamed, "renamed", 0.3, seed=4), a)
    assert torch.equal(together % 100 != 0, a)
    assert not torch.equal(kept(ones, "a", 0.3, seed=5), a)


def test_mask_bits_are_stable() -> None:
    """The hash never changes: recipes hold a seed, not a mask. Any start gives the same bits as the whole."""
    from evomerge.merge.masks import PAGE, multiplier, scatter

    n = 3 * PAGE + 100
    whole = torch.empty(n, dtype=torch.int32)
    scatter(whole, torch.empty_like(whole), 7, "model.norm.weight", 0)
    for start, stop in ((0, 10), (PAGE - 3, PAGE + 5), (PAGE, 3 * PAGE), (5, n)):
        part = torch.empty(stop - start, dtype=torch.int32)
        scatter(part, torch.empty_like(part), 7, "model.norm.weight", start)
        assert torch.equal(part, whole[start:stop])

    assert multiplier(7, "ab", "model.norm.weight") == -1181581251
    assert whole[[0, 1, PAGE, n - 1]].tolist() == [1831602804, 1102609427, 1475506281, 1694989197]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_masks_are_the_same_on_cuda(density: float) -> None:
    """CPU and CUDA draw the same bits."""
    from evomerge.merge.masks import PAGE, keep, multiplier, scatter

    out = []
    for device in ("cpu", "cuda"):
        bits = torch.empty(2, 5 * PAGE + 11, dtype=torch.int32, device=device)
        scattered = scatter(bits[0], bits[1], 1, "x", 17)
        mask = torch.empty(bits.shape[1], device=device)
        out.append(keep(mask, bits[1], scattered, multiplier(1, "a", "x"), density).cpu())
    assert torch.equal(*out)


@pytest.mark.parametrize("name", [n for n, (m, _) in VARIANTS.items() if METHODS[m].sparsify == "bernoulli"])
def test_density_one_masks_nothing(name: str, bank_of: Banks) -> None:
    """With all densities 1, DARE has the bits of task arithmetic and of TIES."""
    bank = bank_of(random_sources(12), BLOCK)
    dense = {s: (w, 1.0) for s, (w, _) in MIXED.items()}
    dare = rule(name, dense, mask_seed=3, **{"lambda": 0.9})
    other = "task_arithmetic" if dare["method"] == "dare_linear" else f"ties normalize={dare['params']['normalize']}"

    assert torch.equal(built(bank, dare), built(bank, rule(other, dense, **{"lambda": 0.9})))


def test_rescaling_keeps_the_mean(ones: Bank) -> None:
    """Survivors are divided by the density; with l1 by the share of |tau| that survived, so that its sum stays."""
    for rescale in ("inverse_probability", "l1"):
        r = {"method": "dare_linear", "params": {"rescale": rescale}, "sources": {"a": {"density": 0.25}}}
        out = built(ones, r)[:LONG]
        survivors = out[out != 0]
        if rescale == "l1":
            assert float(survivors[0]) == pytest.approx(LONG / len(survivors), rel=1e-6)
            assert float(out.double().sum()) == pytest.approx(LONG, rel=1e-6)
        else:
            assert bool((survivors == 4.0).all())


# -- singular values by band --------------------------------------------------------------------------------------

FACTORS = (0.7, -0.4, 1.6, 0.2)


def spectral(weight: float = 1.0, factors: tuple[float, ...] = FACTORS) -> dict[str, float]:
    return {"weight": weight, **dict(zip(BANDS, factors, strict=True))}


def parts(tau: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """A matrix's four bands by numpy's dense SVD; what precedes a direction tells the quarter it is in."""
    u, s, vt = np.linalg.svd(tau.astype(np.float64), full_matrices=False)
    out = [np.zeros(tau.shape) for _ in range(4)]
    for i in range(len(s)):
        out[int(4 * (s[:i] ** 2).sum() / (s**2).sum())] += s[i] * np.outer(u[:, i], vt[i])
    return out


@pytest.mark.parametrize("shape", [(37, 29), (29, 37), (24, 24), (40, 1), (1, 6)])
def test_bands_are_those_of_a_dense_svd(shape: tuple[int, int], bank_of: Banks) -> None:
    """Tall, wide and square matrices of several experts, against numpy in fp64."""
    g = torch.Generator().manual_seed(13)
    sources = {n: {"matrix": torch.randn(shape, generator=g)} for n in ("base", "a", "b")}
    factors = {"a": (0.4, FACTORS), "b": (-0.7, (0.0, 0.0, 0.0, 2.0))}
    given = {n: spectral(*f) for n, f in factors.items()}
    bank = bank_of(sources, {"matrix": "layers.0.mlp"})
    out = built(bank, {"method": "spectral", "params": {"lambda": 0.8}, "sources": given})

    base = sources["base"]["matrix"].numpy()
    expected = base.astype(np.float64)
    for n, (weight, by_band) in factors.items():
        bands = parts(sources[n]["matrix"].numpy() - base)
        expected = expected + 0.8 * weight * sum(f * p for f, p in zip(by_band, bands, strict=True))
    np.testing.assert_allclose(out.view(shape).numpy(), expected, rtol=1e-6, atol=2e-6)


def test_equal_bands_are_task_arithmetic(bank_of: Banks) -> None:
    """With the factor 1 everywhere, or any one factor beside weights of 1, the bits are those of task arithmetic."""
    bank = bank_of(random_sources(14), BLOCK)
    weights = {"e0": 0.3, "e1": -1.7, "e2": 0.05}
    plain = {n: {"weight": w} for n, w in weights.items()}
    forms = [plain, {n: spectral(factors=(w,) * 4) for n, w in weights.items()}]
    for params in ({}, {"lambda": 0.9}):
        expected = built(bank, {"method": "task_arithmetic", "params": params, "sources": plain})
        for given in forms:
            assert torch.equal(built(bank, {"method": "spectral", "params": params, "sources": given}), expected)


def test_bands_add_up(bank_of: Banks) -> None:
    """What single bands add to the base sums to what all of them add; of a matrix they are at right angles."""
    bank = bank_of(random_sources(15), BLOCK)
    base = bank.flat["base"]
    single = [
        built(bank, {"method": "spectral", "sources": {"e0": spectral(factors=tuple(np.eye(4)[b]))}}) - base
        for b in range(4)
    ]

    assert torch.allclose(sum(single, torch.zeros_like(base)), bank.flat["e0"] - base, rtol=1e-5, atol=1e-7)
    stop = 37 * 29
    norm = float((bank.flat["e0"] - base)[:stop].square().sum())
    for b, x in enumerate(single):
        assert 0.1 * norm < float(x[:stop].square().sum()) < 0.45 * norm
        assert torch.allclose(x[stop:] * 4, (bank.flat["e0"] - base)[stop:], rtol=1e-4, atol=1e-7), "means elsewhere"
        for y in single[:b]:
            assert abs(float(x[:stop] @ y[:stop])) < 1e-4 * norm


def test_only_matrices_of_layers_have_bands(bank_of: Banks) -> None:
    """Embedding, head and stacks of matrices are scaled by the mean of the bands, as vectors are."""
    blocks = {"x": "embed", "y": "layers.0.mlp", "z": "layers.0.mlp", "w": "head"}
    g = torch.Generator().manual_seed(16)
    shapes: dict[str, tuple[int, ...]] = {"x": (9, 8), "y": (6, 5), "z": (2, 6, 5), "w": (9, 8)}
    bank = bank_of({s: {n: torch.randn(d, generator=g) for n, d in shapes.items()} for s in ("base", "a")}, blocks)
    out = built(bank, {"method": "spectral", "sources": {"a": spectral()}})
    mean = built(bank, {"method": "task_arithmetic", "sources": {"a": {"weight": sum(FACTORS) / 4}}})

    for t in bank.manifest.tensors:
        there = slice(t.offset, t.offset + t.size)
        assert torch.allclose(out[there], mean[there], rtol=1e-6, atol=1e-6) == (t.name != "y")


def test_bands_of_few_directions(bank_of: Banks) -> None:
    """One direction is all in the first band, four equal ones are in one each, and a zero delta has none."""
    base = {n: torch.zeros(4, 4) for n in ("one", "four", "none")}
    one = torch.outer(torch.arange(1.0, 5.0), torch.tensor([1.0, -2.0, 0.5, 3.0]))
    blocks = dict.fromkeys(base, "layers.0.mlp")
    bank = bank_of({"base": base, "a": {"one": one, "four": torch.eye(4) * 0.3, "none": base["none"]}}, blocks)
    first, last = (
        built(bank, {"method": "spectral", "sources": {"a": spectral(factors=f)}})
        for f in ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    )

    assert torch.allclose(first[:16], one.flatten(), atol=1e-5)
    assert torch.allclose(last[:16], torch.zeros(16), atol=1e-5)
    for out in (first, last):
        assert float(out[64:80].square().sum()) == pytest.approx(0.3**2, rel=1e-5)
        assert not out[128:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_matrices_without_directions_are_refused(bad: float, bank_of: Banks) -> None:
    """A delta that is not finite has no singular directions; it is a failed build and no crash."""
    sources = random_sources(17)
    sources["e0"]["matrix"][3, 4], sources["base"]["matrix"][3, 4] = bad, -bad
    with pytest.raises(BuildError, match="NaN or infinite"):
        built(bank_of(sources, BLOCK), {"method": "spectral", "sources": {"e0": spectral(factors=(1, 2, 3, 0))}})
