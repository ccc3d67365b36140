"""Recipes: canonical form, ids, YAML, and one line for every kind of bad input."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.canonical import canonical_json
from evomerge.errors import UserError
from evomerge.manifest import Manifest
from evomerge.merge.methods import BANDS, METHODS
from evomerge.recipe import Recipe, check_value, in_common, rounded
from evomerge.yamlio import dump_yaml

Data = dict[str, Any]


def recipe(merge: list[Data] | None = None, **other: Any) -> Recipe:
    return Recipe.from_yaml(dump_yaml({"recipe": 1, **({} if merge is None else {"merge": merge}), **other}))


def rule(method: str = "task_arithmetic", match: Any = "all", params: Data | None = None, **weights: Any) -> Data:
    sources = {n: w if isinstance(w, dict) else {"weight": w} for n, w in weights.items()}
    return {"match": match, "method": method, "params": params or {}, "sources": sources}


@pytest.fixture(scope="module")
def m(manifest_of: Any) -> Manifest:
    return manifest_of(layers=4)  # type: ignore[no-any-return]


# -- equal ids: the same model written in another way ------------------------------------------------------------

RANGES = [
    rule(match={"layers": [0, 1]}, math=0.5),
    rule(match={"layers": [2, 3]}, math=0.5),
    rule(match={"module": ["embed", "final_norm", "head"]}, math=0.5),
]
EQUAL: dict[str, tuple[list[Data], list[Data]]] = {
    "order of sources": ([rule(math=0.5, code=0.25)], [rule(code=0.25, math=0.5)]),
    "whole numbers": ([rule(math=1)], [rule(math=1.0)]),
    "default coefficients": ([rule(math={})], [rule(math=1.0, params={"lambda": 1})]),
    "default options": ([rule("ties", math=0.5)], [rule("ties", math=0.5, params={"normalize": True})]),
    "default density": ([rule("ties", math=0.5)], [rule("ties", math={"weight": 0.5, "density": 1})]),
    "all or ranges": ([rule(math=0.5)], RANGES),
    "all or every module": (
        [rule(math=0.5)],
        [rule(match={"module": ["embed", "attention", "mlp", "norm", "final_norm", "head"]}, math=0.5)],
    ),
    "order of rules for other blocks": (RANGES, RANGES[::-1]),
    "rules that are never reached": ([rule(math=0.5)], [rule(math=0.5), rule(code=3.0)]),
    "weight 0": ([rule(math=0.5)], [rule(math=0.5, code=0.0)]),
    "weight -0": ([rule(math=0.5)], [rule(math=0.5, code=-0.0)]),
    "weight below the rounding": ([rule(math=0.5)], [rule(math=0.5 + 1e-9, code=1e-9)]),
    "weight 0 in ties": ([rule("ties", math=0.5)], [rule("ties", math=0.5, code={"weight": 0, "density": 0.3})]),
    "lambda 0": ([], [rule(math=0.5, params={"lambda": 0})]),
    "lambda 0 in ties": ([], [rule("ties", math=0.5, params={"lambda": 0.0})]),
    "no sources": ([], [rule()]),
    "no sources in linear": ([], [rule("linear")]),
    "only weights 0": ([], [rule(math=0.0, code=0)]),
    "linear of the base": ([], [rule("linear", base=0.7)]),
    "linear of the base, weight 1": ([], [rule("linear", base=1, params={"normalize": False})]),
    "linear of the base and a weight 0": ([], [rule("linear", base=0.7, math=0)]),
    "slerp at the base": ([], [rule("slerp", base=0.7, math=0)]),
    "slerp at the expert": ([rule("slerp", math=1)], [rule("slerp", base=0, math=0.3)]),
    "slerp of deltas at one expert": (
        [rule("slerp", params={"vectors": "deltas"}, math=1)],
        [rule("slerp", params={"vectors": "deltas"}, math=7, code=0)],
    ),
    "slerp and a third of weight 0": (
        [rule("slerp", math=0.4, base=0.6)],
        [rule("slerp", base=0.6, math=0.4, code=0)],
    ),
    "default bands": ([rule("spectral", math={"band_2": 0.5})], [rule("spectral", math={"band_2": 0.5, "band_4": 1})]),
    "bands 0": (
        [rule("spectral", math={"band_1": 2})],
        [rule("spectral", math={"band_1": 2}, code={f"band_{b}": -0.0 for b in (1, 2, 3, 4)})],
    ),
    "weight 0 and bands": ([], [rule("spectral", math={"weight": 0, "band_1": 2}, params={"lambda": 3})]),
    "weight 0 in DARE": ([rule("dare_linear", math=0.5)], [rule("dare_linear", math=0.5, code=0)]),
    "lambda 0 in DARE": ([], [rule("dare_ties", math={"density": 0.5}, params={"lambda": 0, "mask_seed": 3})]),
    "seed without a mask": (
        [rule("dare_ties", math=0.5)],
        [rule("dare_ties", math=0.5, params={"mask_seed": 9, "rescale": "l1"})],
    ),
    "seed of a mask on a source of weight 0": (
        [rule("dare_linear", math=0.5)],
        [rule("dare_linear", math=0.5, code={"weight": 0, "density": 0.5}, params={"mask_seed": 9})],
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_models_have_equal_ids(name: str, m: Manifest) -> None:
    """Two ways to write the same model give the same id and the same canonical JSON."""
    one, two = (recipe(merge).canonical(m) for merge in EQUAL[name])

    assert one.id == two.id
    assert canonical_json(one.to_json()["merge"] if one.blocks else []) == canonical_json(
        two.to_json()["merge"] if two.blocks else []
    )


def test_rules_that_leave_the_base_shadow_later_ones(m: Manifest) -> None:
    """First match wins, also where the first match is inert: that block stays the base's."""
    r = recipe([rule(match={"layers": [0, 0]}, math=0.0), rule(math=0.5)]).canonical(m)

    assert not any(name.startswith("layers.0.") for name in r.blocks)
    assert "layers.1.mlp" in r.blocks


def test_no_merge_is_the_base(m: Manifest) -> None:
    """A recipe without rules is the base, as one with an empty list is."""
    assert recipe().canonical(m).id == recipe([]).canonical(m).id
    assert recipe().canonical(m).blocks == {}


def test_unmentioned_sources_and_given_hashes_leave_the_id(m: Manifest) -> None:
    """Sources that no rule uses, their paths, and hashes that agree are no part of the model."""
    plain = recipe([rule(math=0.5)]).canonical(m)
    sources: Data = {"base": {"sha256": m.hashes["base"]}, "math": {"path": "/somewhere"}, "code": {}}

    full = recipe([rule(math=0.5)], sources=sources).canonical(m)

    assert full.id == plain.id
    assert set(full.sources) == {"base", "math"}


def test_path_is_no_part_of_the_id(m: Manifest, tmp_path: Path) -> None:
    """The same recipe file in two folders has one id, although its sources' paths resolve differently."""
    text = dump_yaml(recipe([rule(math=0.5)], sources={"base": {"path": "b"}, "math": {"path": "m"}}).to_json())
    loaded = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(text)
        loaded.append(Recipe.load(tmp_path / name / "recipe.yaml"))

    assert loaded[0].sources["math"].path == str((tmp_path / "one" / "m").resolve())
    assert loaded[0].sources["math"].path != loaded[1].sources["math"].path
    assert loaded[0].canonical(m).id == loaded[1].canonical(m).id


def test_a_rule_for_the_head_of_a_tied_model_is_inert(manifest_of: Any) -> None:
    """Tied models have no head of their own, so a rule for it changes nothing."""
    tied = manifest_of(tied=True)
    head = rule(match={"module": "head"}, math=0.9)
    by_name = rule(match={"block": "head"}, math=0.9)

    assert recipe([head, by_name, rule(code=0.5)]).canonical(tied).id == recipe([rule(code=0.5)]).canonical(tied).id


# -- different ids: another model ------------------------------------------------------------

PLAIN = {"merge": [rule("ties", math={"weight": 0.5, "density": 0.5}, code=0.25)]}
OTHERS: dict[str, Data] = {
    "dtype": {**PLAIN, "dtype": "bfloat16"},
    "weight": {"merge": [rule("ties", math={"weight": 0.500001, "density": 0.5}, code=0.25)]},
    "density": {"merge": [rule("ties", math={"weight": 0.5, "density": 0.499999}, code=0.25)]},
    "method": {"merge": [rule(math=0.5, code=0.25)]},
    "lambda": {"merge": [rule("ties", math={"weight": 0.5, "density": 0.5}, code=0.25, params={"lambda": 0.9})]},
    "option": {"merge": [rule("ties", math={"weight": 0.5, "density": 0.5}, code=0.25, params={"normalize": False})]},
    "swapped sources": {"merge": [rule("ties", code={"weight": 0.5, "density": 0.5}, math=0.25)]},
    "one block less": {"merge": [rule(match={"block": "layers.1.norm"}), *PLAIN["merge"]]},
    "sum of the base": {"merge": [rule("linear", base=0.7, params={"normalize": False})]},
    "mask seed": {
        "merge": [rule("dare_ties", math={"weight": 0.5, "density": 0.5}, code=0.25, params={"mask_seed": 1})]
    },
    "mask": {"merge": [rule("dare_ties", math={"weight": 0.5, "density": 0.5}, code=0.25)]},
    "rescaling": {"merge": [rule("dare_ties", math={"density": 0.5}, params={"rescale": "l1"})]},
    "vectors": {"merge": [rule("slerp", math=0.5, code=0.25, params={"vectors": "deltas"})]},
    "arc": {"merge": [rule("slerp", math=0.5, code=0.25)]},
    "other end of the arc": {"merge": [rule("slerp", math=0.25, code=0.5)]},
    "sign": {"merge": [rule("ties", math={"weight": -0.5, "density": 0.5}, code=0.25)]},
}


def test_all_the_others_differ(m: Manifest) -> None:
    """No two of them are the same model either."""
    ids = [recipe(**data).canonical(m).id for data in OTHERS.values()]

    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_have_other_ids(name: str, m: Manifest) -> None:
    """Whatever changes the built weights changes the id."""
    assert recipe(**OTHERS[name]).canonical(m).id != recipe(**PLAIN).canonical(m).id


def test_part_of_the_base_is_not_the_base(m: Manifest) -> None:
    """Without normalisation 0.7 times the base is another model than the base."""
    part = recipe([rule("linear", base=0.7, params={"normalize": False})]).canonical(m)

    assert part.id != recipe().canonical(m).id
    assert list(part.blocks) == list(m.blocks)


def test_other_weights_of_a_source_have_another_id(m: Manifest) -> None:
    """The id holds the sources' content hashes, the base's included."""
    ids = set()
    for changed in (None, "math", "base"):
        hashes = {n: "f" * 64 if n == changed else h for n, h in m.hashes.items()}
        ids.add(recipe([rule(math=0.5)]).canonical(Manifest(m.base, m.layers, m.tensors, hashes)).id)

    assert len(ids) == 3


def test_an_unused_source_does_not_count(m: Manifest) -> None:
    """Another hash of a source that the recipe does not use leaves the id alone."""
    other = Manifest(m.base, m.layers, m.tensors, {**m.hashes, "code": "f" * 64})

    assert recipe([rule(math=0.5)]).canonical(m).id == recipe([rule(math=0.5)]).canonical(other).id


# -- canonical form ------------------------------------------------------------


def test_canonical_form_is_one_complete_rule_a_block(m: Manifest) -> None:
    """Every block has its own rule, with sorted sources and every coefficient and option filled in."""
    r = recipe([rule("ties", math=0.5, code=0.25)]).canonical(m)

    assert list(r.blocks) == list(m.blocks)
    for one in r.blocks.values():
        assert list(one.sources) == ["code", "math"]
        assert one.sources["math"] == {"weight": 0.5, "density": 1.0}
        assert one.params == {"lambda": 1.0, "normalize": True}


def test_first_match_wins(m: Manifest) -> None:
    """Each block follows the first rule that covers it; blocks without a rule are the base's."""
    r = recipe(
        [
            rule(match={"block": "layers.2.mlp"}, math=0.1),
            rule(match={"layers": [1, 2], "module": "mlp"}, math=0.2),
            rule(match={"layers": [2, 3]}, math=0.3),
        ]
    ).canonical(m)

    weights = {b: x.sources["math"]["weight"] for b, x in r.blocks.items()}
    assert weights == {
        "layers.1.mlp": 0.2,
        "layers.2.attention": 0.3,
        "layers.2.mlp": 0.1,
        "layers.2.norm": 0.3,
        "layers.3.attention": 0.3,
        "layers.3.mlp": 0.3,
        "layers.3.norm": 0.3,
    }


def test_only_canonical_recipes_have_ids(m: Manifest) -> None:
    """A recipe as people write it has no id before it is bound to a pool."""
    with pytest.raises(ValueError, match="call canonical"):
        _ = recipe([rule(math=0.5)]).id
    with pytest.raises(ValueError, match="call canonical"):
        _ = recipe().blocks


def test_id_is_stable(m: Manifest) -> None:
    """The id of one known recipe never changes: journals and exports hold it."""
    r = recipe([rule("ties", math={"weight": 0.5, "density": 0.25}), rule(code=1)]).canonical(m)

    assert len(r.id) == 64
    assert r.id == recipe([rule("ties", math={"weight": 0.5, "density": 0.25}), rule(code=1)]).canonical(m).id
    assert r.id == "81381331425b1d5a240d1a47c630bfdcbe1559741248429494991de5fc9cd89d"


def test_rounding() -> None:
    """Coefficients are multiples of 1e-6 and never -0.0."""
    assert rounded(0.12345649) == 0.123456
    assert rounded(1 / 3) == 0.333333
    assert math.copysign(1, rounded(-1e-9)) == 1.0


# -- hypothesis over recipes ------------------------------------------------------------

WEIGHTS = st.one_of(
    st.sampled_from([0, 0.0, -0.0, 1, 1.0, -1, 0.5, 1e-7, 1e6, -1e6]), st.floats(-1e6, 1e6), st.integers(-9, 9)
)
MATCHES = st.one_of(
    st.just("all"),
    st.builds(lambda a, b: {"layers": sorted([a, b])}, st.integers(0, 3), st.integers(0, 3)),
    st.builds(lambda x: {"module": x}, st.sampled_from(["embed", "attention", "mlp", "norm", "final_norm", "head"])),
    st.builds(lambda x: {"module": x}, st.lists(st.sampled_from(["attention", "mlp"]), min_size=1, max_size=2)),
    st.builds(lambda i: {"block": f"layers.{i}.mlp"}, st.integers(0, 3)),
)


@st.composite
def rules(draw: st.DrawFn) -> Data:
    method = METHODS[draw(st.sampled_from(["task_arithmetic", "spectral", "ties", "dare_linear", "dare_ties"]))]
    values = {
        "weight": WEIGHTS,
        **dict.fromkeys(BANDS, WEIGHTS),
        "density": st.floats(1e-6, 1),
        "lambda": WEIGHTS,
        "mask_seed": st.integers(0, 2**32 - 1),
    }
    sources = draw(st.lists(st.sampled_from(["math", "code"]), unique=True, max_size=2))

    def some(names: tuple[str, ...]) -> Data:
        return {n: draw(values[n]) for n in names if draw(st.booleans())}

    params = some(method.per_block)
    for option, (_, allowed) in method.options.items():
        if draw(st.booleans()):
            params[option] = draw(st.sampled_from(allowed))
    return {
        "match": draw(MATCHES),
        "method": method.name,
        "params": params,
        "sources": {s: some(method.per_source) for s in sources},
    }


SOURCES = st.sampled_from(["merged", "base", "math", "code"])
GAINS = st.one_of(st.just(1.0), st.floats(-3, 3))


@st.composite
def routes(draw: st.DrawFn) -> Data:
    """Any path of a few hops; half of them go through the layers in order, as merges do."""
    layers = draw(st.one_of(st.just([0, 1, 2, 3]), st.lists(st.integers(0, 3), min_size=1, max_size=7)))
    scaled = draw(st.booleans())
    hops: list[Data] = [{"from": draw(SOURCES), "layer": i} for i in layers]
    for hop in hops if scaled else ():
        hop |= {"scale": draw(st.floats(1e-3, 9)), "attn_gain": draw(GAINS), "mlp_gain": draw(GAINS)}
    end = draw(SOURCES)
    return {"embed": end, "final_norm": draw(SOURCES), "head": end, "hops": hops}


RECIPES = st.builds(
    lambda merge, dtype, route: {"recipe": 1, "dtype": dtype, "merge": merge} | ({"route": route} if route else {}),
    st.lists(rules(), max_size=4),
    st.sampled_from(["float32", "bfloat16"]),
    st.one_of(st.none(), routes()),
)


@settings(max_examples=60, deadline=None)
@given(data=RECIPES)
def test_canonical_is_idempotent_and_survives_yaml(data: Data, manifest_of: Any) -> None:
    """canonical(canonical(r)) is the same recipe, and so is what is read back from its YAML, by id and content."""
    m = manifest_of(layers=4)
    r = Recipe.from_yaml(dump_yaml(data)).canonical(m)

    assert r.canonical(m).id == r.id
    assert r.canonical(m).to_json() == r.to_json()
    back = Recipe.from_yaml(r.to_yaml())
    assert back.canonical(m).id == r.id
    assert back.id == r.id
    assert back.to_yaml() == r.to_yaml()


@settings(max_examples=60, deadline=None)
@given(data=RECIPES, tied=st.booleans())
def test_grouped_is_the_same_recipe_in_fewer_rules(data: Data, tied: bool, manifest_of: Any) -> None:
    """What `show` prints is made canonical into the same recipe, with at most one rule a block."""
    m = manifest_of(layers=4, tied=tied)
    r = Recipe.from_yaml(dump_yaml(data)).canonical(m)

    short = r.grouped()
    assert Recipe.from_yaml(short.to_yaml()).canonical(m).id == r.id
    assert short.merge is not None
    assert len(short.merge) <= len(r.blocks)


def test_equal_neighbours_share_a_rule(manifest_of: Any) -> None:
    """Layers as ranges, modules together, and a block whose rule is another one breaks the range of its module."""
    rule = {"method": "task_arithmetic", "sources": {"math": {"weight": 0.5}}}
    other = {**rule, "match": {"block": "layers.2.mlp"}, "sources": {"code": {"weight": 1.0}}}
    m = manifest_of(layers=4)
    whole = Recipe.model_validate({"merge": [rule]}).canonical(m).grouped()
    broken = Recipe.model_validate({"merge": [other, rule]}).canonical(m).grouped()

    def matches(r: Recipe) -> list[Any]:
        return [x["match"] for x in r.to_json()["merge"]]

    assert matches(whole) == [{"module": ["embed", "final_norm", "head"]}, {"layers": [0, 3]}]
    assert matches(broken) == [
        {"module": ["embed", "final_norm", "head"]},
        {"layers": [0, 3], "module": ["attention", "norm"]},
        {"layers": [0, 1], "module": "mlp"},
        {"layers": [2, 2], "module": "mlp"},
        {"layers": [3, 3], "module": "mlp"},
    ]


@settings(max_examples=40, deadline=None)
@given(data=RECIPES)
def test_written_recipe_reads_back_equal(data: Data) -> None:
    """Also before it is canonical, a recipe read back from its YAML equals the one that was written."""
    r = Recipe.from_yaml(dump_yaml(data))

    assert Recipe.from_yaml(r.to_yaml()) == r


# -- routes ------------------------------------------------------------------------------


def through(*hops: tuple[str, int], merge: Any = (), **ends: str) -> Recipe:
    path = [{"from": source, "layer": layer} for source, layer in hops]
    return Recipe.model_validate({"merge": list(merge), "route": {**ends, "hops": path}})


def test_a_natural_path_is_a_merge(m: Manifest) -> None:
    """Every layer once and in order is no route, whatever it comes from: the merge that takes each as it is."""
    half = {"method": "task_arithmetic", "sources": {"math": {"weight": 0.5}}}
    path = through(("merged", 0), ("code", 1), ("base", 2), ("merged", 3), merge=[half], embed="code").canonical(m)
    rules: list[Data] = [
        {"match": {"layers": [1, 1]}, "method": "linear", "sources": {"code": {}}},
        {"match": {"module": "embed"}, "method": "linear", "sources": {"code": {}}},
        {"match": {"layers": [2, 2]}, "method": "linear", "sources": {"base": {}}},
        half,
    ]

    assert path.route is None
    assert path.id == Recipe.model_validate({"merge": rules}).canonical(m).id
    assert through(*(("base", i) for i in range(4))).canonical(m).id == Recipe().canonical(m).id


def test_rules_that_no_hop_uses_are_inert(m: Manifest) -> None:
    """Rules of layers that the path leaves out go, and a merged layer without rules is the base's."""
    rule = {"match": {"layers": [1, 2]}, "method": "task_arithmetic", "sources": {"math": {"weight": 0.5}}}
    short = through(("merged", 0), ("merged", 1), ("math", 1), merge=[rule]).canonical(m)

    assert {*short.blocks} == {"layers.1.attention", "layers.1.mlp", "layers.1.norm"}
    assert short.route is not None
    assert [h.from_ for h in short.route.hops] == ["base", "merged", "math"]
    assert through(("merged", 0), ("merged", 0), merge=[rule]).canonical(m).blocks == {}


def test_scales_and_gains_make_a_route(m: Manifest) -> None:
    """A scale on the natural path is another model; what scales amount to accumulates from hop to hop."""
    hops = [{"from": "base", "layer": i} for i in range(4)]
    hops[1] |= {"scale": 2.0}
    hops[3] |= {"scale": 0.5, "mlp_gain": 3.0}
    scaled = Recipe.model_validate({"route": {"hops": hops}}).canonical(m)

    assert scaled.route is not None
    assert scaled.route.gains() == [(1.0, 1.0), (0.5, 0.5), (0.5, 0.5), (1.0, 3.0)]
    assert scaled.id != Recipe().canonical(m).id


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (through(("base", 4)), "route, hop 1: 'base' has layers 0 to 3, not 4"),
        (through(("base", 0), ("meth", 0)), "route, hop 2: unknown source 'meth'; did you mean 'math'?"),
        (through(("base", 0), head="meth"), "route.head: unknown source 'meth'; did you mean 'math'?"),
    ],
)
def test_hops_that_are_not_there(recipe: Recipe, words: str, m: Manifest) -> None:
    """The hop is named, and what it may be."""
    with pytest.raises(UserError) as caught:
        recipe.canonical(m)
    assert str(caught.value) == words


def test_tied_models_have_one_source_of_both_ends(manifest_of: Any) -> None:
    """Head and embedding are one tensor there."""
    tied = manifest_of(layers=4, tied=True)

    with pytest.raises(
        UserError, match="tie the head to the embedding, so head 'merged' must be the same as embed 'math'"
    ):
        through(("base", 0), embed="math").canonical(tied)
    assert {*through(("base", 0), embed="math", head="math").canonical(tied).blocks} == {"embed"}


def test_paths_begin_alike(m: Manifest) -> None:
    """`path` tells hops apart by source, layer, scales so far, rules of merged layers and the embedding."""
    rule = {"match": {"layers": [1, 2]}, "method": "task_arithmetic", "sources": {"math": {"weight": 0.5}}}
    other = {**rule, "sources": {"math": {"weight": 0.25}}}
    hops = [("base", 0), ("merged", 1), ("math", 3), ("base", 0)]
    one = through(*hops, merge=[rule]).canonical(m).path

    assert in_common(one, through(*hops[:3], merge=[rule]).canonical(m).path) == 3
    assert in_common(one, through(*hops, merge=[other]).canonical(m).path) == 1
    assert in_common(one, through(*hops, merge=[rule], embed="math").canonical(m).path) == 0
    assert in_common(one, through(*hops[:2], ("math", 2), merge=[rule]).canonical(m).path) == 2
    assert Recipe().canonical(m).path == ()


# -- wider than what is built ------------------------------------------------------------

WIDER: dict[str, tuple[str, str]] = {
    "ensemble": (
        "ensemble: {rule: logprob_mean, missing_mass: renormalise, members: {a: 0.6, b: 0.4}}",
        "'ensemble'",
    ),
    "factor mix": ("factor_mix: {sources: {a: {weight: 0.7, keep_a: 0.4}}}", "'factor_mix'"),
    "adapter": (
        """
        sources: {base: {}, med: {kind: adapter}}
        merge: [{method: linear, sources: {med: {weight: 1}}}]
        """,
        "'med' is an adapter",
    ),
    "nested recipe": (
        """
        sources:
          base: {}
          ps: {recipe: {recipe: 1, merge: [{method: linear, sources: {math: {weight: 0.6}}}]}}
        merge: [{method: linear, sources: {ps: {weight: 1}}}]
        """,
        "'ps' is a nested recipe",
    ),
    "union tokenizer": ("tokenizer: {policy: union}", "'union'"),
}


@pytest.mark.parametrize("name", WIDER)
def test_wider_recipes_parse_and_are_refused(name: str, m: Manifest) -> None:
    """The format already carries what later versions build: it reads, writes, and is refused with what is missing."""
    text, words = WIDER[name]
    r = Recipe.from_yaml(text)

    reason = r.unsupported()
    assert reason is not None
    assert words in reason
    with pytest.raises(UserError) as caught:
        r.canonical(m)
    assert str(caught.value) == reason
    assert Recipe.from_yaml(r.to_yaml()) == r


# -- segments ------------------------------------------------------------


def segments(m: Manifest, cuts: list[int], **weights: list[float]) -> Recipe:
    return recipe(segments={"layout": m.layout, "cuts": cuts, "weights": weights})


def test_segments_that_build_the_same_have_one_id(m: Manifest) -> None:
    """Equal neighbours join, sources of weight 0 go, digits beyond 1e-6 go, cuts in a gap move behind it."""
    tensors = [t for t in m.tensors if t.size % 64]
    gap, after = tensors[0], next(t for t in m.tensors if t.offset > tensors[0].offset)
    plain = segments(m, [0, after.offset], base=[1, 0.25], math=[0.5, 0.75]).canonical(m)

    for other in (
        segments(m, [0, gap.offset + gap.size], math=[0.5, 0.75], base=[1, 0.25]),
        segments(m, [0, after.offset - 1, after.offset], base=[1, 7, 0.25], math=[0.5, 7, 0.75]),
        segments(m, [0, 5, after.offset], base=[1, 1, 0.25], math=[0.5, 0.5000000001, 0.75]),
        segments(m, [0, after.offset], base=[1, 0.25], math=[0.5, 0.75], code=[1e-9, -1e-9]),
    ):
        assert other.canonical(m) == plain
        assert other.canonical(m).id == plain.id
    assert plain.canonical(m) == plain
    assert set(plain.sources) == {"base", "math"}
    assert Recipe.from_yaml(plain.to_yaml()).canonical(m).id == plain.id
    for other in (
        segments(m, [0, after.offset + 1], base=[1, 0.25], math=[0.5, 0.75]),
        segments(m, [0, after.offset], base=[1, 0.25], math=[0.5, 0.750001]),
        segments(m, [0, after.offset], base=[1, 0.25], code=[0.5, 0.75]),
    ):
        assert other.canonical(m).id != plain.id


def test_one_source_alone_is_its_linear_rule(m: Manifest) -> None:
    """Segments that are one whole source have the id of what a baseline is; of the base they have no rules."""
    for name in ("math", "base"):
        alone = recipe([rule("linear", **{name: 1.0})]).canonical(m)
        assert segments(m, [0, 100], **{name: [1.0, 1.0]}).canonical(m).id == alone.id
    assert segments(m, [0], math=[0.5]).canonical(m).segments is not None


def test_parts_of_segments_within_a_stretch(m: Manifest) -> None:
    """A stretch is walked from its start to its end; weights of 0 are left out."""
    s = segments(m, [0, 10, 20], math=[0.5, 0.0, 1.0], code=[0.0, 2.0, 3.0]).segments
    assert s is not None

    assert list(s.within(0, 10)) == [(0, 10, {"math": 0.5})]
    assert list(s.within(5, 25)) == [
        (5, 10, {"math": 0.5}),
        (10, 20, {"code": 2.0}),
        (20, 25, {"math": 1.0, "code": 3.0}),
    ]
    assert list(s.within(12, 13)) == [(12, 13, {"code": 2.0})]


@pytest.mark.parametrize(
    ("cuts", "weights", "words"),
    [
        ([0, 10**9], {"math": [1, 2]}, "the cut 1000000000 is behind the last of"),
        ([0], {"maths": [1.0]}, "segments: unknown source 'maths'; did you mean 'math'?"),
        ([0, 10], {"math": [1.0, 0.0]}, "all weights of a segment are 0"),
        ([5], {"math": [1.0]}, "cuts must begin with 0 and rise"),
        ([0, 9, 9], {"math": [1, 2, 3]}, "cuts must begin with 0 and rise"),
        ([0, -3], {"math": [1, 2]}, "expected at least 0, got -3"),
        ([0, 10], {"math": [1]}, "source 'math' has 1 weights for 2 segments"),
        ([0], {"math": [float("nan")]}, "segments.weights.math.0"),
        ([0], {"math": [1e7]}, "segments.weights.math.0"),
        ([], {"math": []}, "segments.cuts"),
        ([0], {}, "segments.weights"),
    ],
)
def test_bad_segments_are_refused(cuts: list[int], weights: dict[str, list[float]], words: str, m: Manifest) -> None:
    """One line that says what is wrong, at reading or against the models."""
    with pytest.raises(UserError, match=re.escape(words)):
        segments(m, cuts, **weights).canonical(m)


def test_segments_of_another_layout_are_refused(m: Manifest, manifest_of: Any) -> None:
    """A cut means a weight only in the layout that it was made for."""
    with pytest.raises(UserError, match="made for the layout sha256:"):
        segments(manifest_of(layers=3), [0], math=[0.5]).canonical(m)
    with pytest.raises(ValueError, match="only a canonical recipe has an id"):
        _ = segments(m, [0], math=[0.5]).id
    with pytest.raises(ValueError, match="no rules by block"):
        _ = segments(m, [0], math=[0.5]).canonical(m).blocks


# -- bad input ------------------------------------------------------------

BAD: list[tuple[str, str]] = [
    ("", "expected a mapping of keys, got NoneType"),
    ("[1]", "expected a mapping of keys, got list"),
    ("recipe: 2", "recipe: expected 1, got 2"),
    ("dtyp: float32", "unknown key 'dtyp'; did you mean 'dtype'?"),
    ("Merge: []", "unknown key 'Merge'; did you mean 'merge'?"),
    ("str: 1", "unknown key 'str'"),
    ("dtype: float8", "'bfloat16'"),
    ("merge: [{method: linea, sources: {}}]", "merge.0: unknown method 'linea'; did you mean 'linear'?"),
    ("merge: [{metod: linear, sources: {}}]", "unknown key 'merge.0.metod'; did you mean 'method'?"),
    ("merge: [{method: linear}]", "the key 'merge.0.sources' is missing"),
    ("merge: [{method: linear, sources: {Math: {wieght: 1}}}]", "no 'wieght' per source; did you mean 'weight'?"),
    (
        "merge: [{method: linear, sources: {Math: 3}}]",
        "merge.0.sources.Math: expected a mapping, such as {name: value}, got 3",
    ),
    ("merge: [{method: ties, params: {lamda: 1}, sources: {}}]", "no parameter 'lamda'; did you mean 'lambda'?"),
    ("merge: [{method: ties, params: {normalize: 1}, sources: {}}]", "normalize: expected one of [True, False], got 1"),
    ("merge: [{method: ties, params: {lambda: true}, sources: {}}]", "got True"),
    ("merge: [{method: ties, params: {lambda: big}, sources: {}}]", "got 'big'"),
    ("merge: [{method: ties, params: {lambda: .nan}, sources: {}}]", "must hold, but got nan"),
    ("merge: [{method: ties, sources: {a: {density: 0}}}]", "`1e-06 <= density <= 1` must hold, but got 0.0"),
    ("merge: [{method: ties, sources: {a: {density: 1.5}}}]", "got 1.5"),
    ("merge: [{method: dare_ties, params: {mask_seed: 1.0}, sources: {}}]", "expected a whole number, got 1.0"),
    ("merge: [{method: dare_ties, params: {mask_seed: true}, sources: {}}]", "expected a whole number, got True"),
    ("merge: [{method: dare_ties, params: {mask_seed: 4294967296}, sources: {}}]", "must hold, but got 4294967296"),
    ("merge: [{method: dare_ties, params: {rescale: l2}, sources: {}}]", "['inverse_probability', 'l1'], got 'l2'"),
    ("merge: [{method: slerp, params: {vectors: delta}, sources: {}}]", "['weights', 'deltas'], got 'delta'"),
    ("merge: [{method: slerp, sources: {a: {weight: -0.5}}}]", "`0 <= weight <= 1e+06` must hold, but got -0.5"),
    ("merge: [{method: ties, sources: {a: {weight: .inf}}}]", "got inf"),
    (
        "merge: [{method: linear, sources: {}, match: {layers: [3, 1]}}]",
        "`0 <= first <= last` must hold, but got [3, 1]",
    ),
    ("merge: [{method: linear, sources: {}, match: {layers: [-1, 1]}}]", "[-1, 1]"),
    ("merge: [{method: linear, sources: {}, match: {layer: [0, 1]}}]", "'merge.0.match.layer'; did you mean 'layers'?"),
    ("merge: [{method: linear, sources: {}, match: {block: a, module: mlp}}]", "leave out layers and module"),
    ("merge: [{method: linear, sources: {}, match: {module: mpl}}]", "'mlp'"),
    ("{merge: [], segments: {layout: a, cuts: [0], weights: {a: [1]}}}", "exclude one another"),
    (
        "{ensemble: {rule: prob_mean, members: {a: 1}}, "
        "route: {embed: a, final_norm: a, head: a, hops: [{from: a, layer: 0}]}}",
        "not with ensemble",
    ),
    ("route: {embed: a, final_norm: a, head: a, hops: [{from: a, layer: 0, scale: 0}]}", "route.hops.0.scale"),
    ("route: {embed: a, final_norm: a, head: a, hops: [{form: a, layer: 0}]}", "did you mean 'from'?"),
    ("sources: {a: {recipe: {basee: a}}}", "unknown key 'sources.a.recipe.basee'; did you mean 'base'?"),
    ("sources: {Math: {sha: a}}", "unknown key 'sources.Math.sha'; did you mean 'sha256'?"),
    (
        "{sources: {base: {}, math: {}}, merge: [{method: linear, sources: {mth: {}}}]}",
        "unknown source 'mth'; did you mean 'math'?",
    ),
    (
        "{sources: {math: {}}, merge: [{method: linear, sources: {math: {}}}]}",
        "the base 'base' is not among the sources",
    ),
    ("{merge: [], merge: []}", "the key 'merge' stands here twice"),
    ("{base: &a x, dtype: *a}", "aliases (*name) are not accepted"),
    ("merge: [", "line 1"),
    ("merge: !!python/name:os.system x", "could not determine a constructor"),
    ("merge: !!bool maybe", "not readable as YAML"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_bad_recipes_get_one_line(text: str, words: str) -> None:
    """Every kind of bad input is refused in one line that names the place, the rule or the nearest name."""
    with pytest.raises(UserError) as caught:
        Recipe.from_yaml(text, "here.yaml")

    message = str(caught.value)
    assert message.startswith("here.yaml")
    assert words in message
    assert "\n" not in message


UNFIT: list[tuple[list[Data], Data, str]] = [
    ([rule(maht=1)], {}, "unknown source 'maht'; did you mean 'math'?"),
    ([rule(base=1)], {}, "task_arithmetic adds to the base; it cannot be a source too"),
    ([rule("linear", math=0, code=0)], {}, "all weights of linear are 0"),
    ([rule("linear", math=1, code=-1)], {}, "sum to 0 and cannot be normalised"),
    ([rule("slerp", math=0, code=0)], {}, "all weights of slerp are 0"),
    ([rule("slerp", math=1, code=1, base=1)], {}, "slerp is between two models, but base, code, math have weights"),
    ([rule("slerp", math=1, base=1, params={"vectors": "deltas"})], {}, "slerp adds to the base"),
    ([rule("dare_ties", math=1, base=1)], {}, "dare_ties adds to the base"),
    ([rule(match={"layers": [4, 9]}, math=1)], {}, "merge rule 1: layers [4, 9] go past the last one"),
    ([rule(match={"layers": [0, 4]}, math=1)], {}, "the model has 4 layers, 0 to 3"),
    ([rule(match={"module": "head"}), rule(match={"block": "lm_head"}, math=1)], {}, "merge rule 2 matches no block"),
    ([rule(match={"block": "layers.0.mpl"}, math=1)], {}, "matches no block"),
    ([], {"base": "other"}, "the recipe's base is 'other', the pool's is 'base'"),
    ([], {"sources": {"base": {}, "maths": {}}}, "needs a source 'maths'; did you mean 'math'?"),
    ([], {"sources": {"base": {}, "math": {"sha256": "ab" * 32}}}, "not the same weights"),
]


@pytest.mark.parametrize(("merge", "other", "words"), UNFIT)
def test_recipes_that_do_not_fit_the_pool(merge: list[Data], other: Data, words: str, m: Manifest) -> None:
    """A recipe that names what the pool does not have, or that builds no model, is refused in one line."""
    r = recipe(merge, **other)

    with pytest.raises(UserError) as caught:
        r.canonical(m)

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_file_is_named(m: Manifest) -> None:
    """Where a recipe came from a file, what does not fit the pool begins with the file's name."""
    with pytest.raises(UserError, match=r"^here\.yaml: merge rule 1 matches no block"):
        recipe([rule(match={"block": "x"}, math=1)]).canonical(m, "here.yaml")


def test_unreadable_files_get_one_line(tmp_path: Path) -> None:
    """A missing file, a folder, foreign bytes and a file beyond the cap are each refused by name."""
    missing, folder, binary, huge = (tmp_path / n for n in ("missing.yaml", "folder.yaml", "binary.yaml", "huge.yaml"))
    folder.mkdir()
    binary.write_bytes(b"\xff\xfe\x00")
    huge.write_text("#" * 4_000_001)

    for path, words in ((missing, "No such file"), (folder, "directory"), (binary, "UTF-8"), (huge, "4000001 bytes")):
        with pytest.raises(UserError) as caught:
            Recipe.load(path)
        assert words in str(caught.value)
        assert path.name in str(caught.value)


def test_nearest_name_for_values() -> None:
    """check_value is the one place that knows what a coefficient or option may be."""
    check_value(METHODS["ties"], "density", 0.5)
    check_value(METHODS["ties"], "normalize", False)

    for name, value in (("density", 0.0), ("density", "x"), ("density", True), ("normalize", 0), ("normalize", "on")):
        with pytest.raises(ValueError, match=name):
            check_value(METHODS["ties"], name, value)


# -- strangers' files ------------------------------------------------------------


def only_user_errors(text: str) -> None:
    """Reads, or raises UserError in one line: nothing else may come out."""
    try:
        r: Any = Recipe.from_yaml(text)
    except UserError as e:
        r = e
    assert isinstance(r, Recipe) or (str(r) and "\n" not in str(r))


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(max_size=80), st.binary(max_size=80).map(lambda b: b.decode("utf-8", "replace"))))
def test_junk_text_raises_only_user_errors(text: str) -> None:
    """Random text never gets further than one line of refusal."""
    only_user_errors(text)


TAGS = ("bool", "int", "float", "map", "timestamp", "binary", "set", "omap", "pairs", "null", "str", "seq")
SIGNS = (
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    " ",
    "\n",
    "\n  ",
    "- ",
    "? ",
    "&a ",
    "*a",
    "|\n",
    ">\n",
    "'",
    '"',
    "<<",
    "=",
    "~",
)
WORDS = (
    "merge",
    "method",
    "sources",
    "recipe",
    "route",
    "base",
    "x",
    "1",
    "1e3",
    ".nan",
    "2020-01-01",
    "0x",
    "0b",
    "_",
)
ODD = ("#", "---", "%", "\\", "\t", "\x85", "\ufeff", "!x ")
YAML_BITS = st.lists(st.sampled_from([*(f"!!{t} " for t in TAGS), *SIGNS, *WORDS, *ODD]), max_size=14).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=YAML_BITS)
def test_yaml_like_junk_raises_only_user_errors(text: str) -> None:
    """Tags on wrong values, stray indicators and half documents never get further than one line of refusal."""
    only_user_errors(text)


ROUTE = """
merge: [{method: task_arithmetic, sources: {math: {weight: 1.0}}}]
route:
  embed: base
  final_norm: base
  head: base
  hops:
    - {from: merged, layer: 0}
    - {from: math, layer: 3, scale: 0.8}
    - {from: merged, layer: 3, attn_gain: 1, mlp_gain: 0.9}
"""
SEED = Recipe.from_yaml(ROUTE).to_json() | {"sources": {"base": {"sha256": "ab"}, "math": {"path": "x"}}}
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(p for k, v in inner for p in places(v, (*at, k)))]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_recipes_raise_only_user_errors(data: st.DataObject) -> None:
    """A good recipe with one value replaced, removed or renamed reads, or is refused in one line."""
    mutated = copy.deepcopy(SEED)
    at = data.draw(st.sampled_from([p for p in places(mutated) if p]))
    inner = mutated
    for key in at[:-1]:
        inner = inner[key]
    how = data.draw(st.sampled_from(["replace", "remove", "rename"]))
    if how == "replace" or isinstance(inner, list):
        inner[at[-1]] = data.draw(JUNK)
    elif how == "remove":
        del inner[at[-1]]
    else:
        inner[data.draw(st.text(max_size=6))] = inner.pop(at[-1])

    only_user_errors(dump_yaml(mutated))


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10**6), char=st.characters(), cut=st.booleans())
def test_damaged_text_raises_only_user_errors(at: int, char: str, cut: bool) -> None:
    """A recipe file with one character replaced, or cut off anywhere, reads or is refused in one line."""
    text = dump_yaml(SEED)
    at %= len(text)

    only_user_errors(text[:at] if cut else text[:at] + char + text[at + 1 :])
