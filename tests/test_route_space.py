"""Layer routes as search spaces: total decode, canonical recipes, encode as its inverse, and short real searches."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evomerge.check import check, text
from evomerge.config import load
from evomerge.errors import UserError
from evomerge.manifest import Manifest
from evomerge.prepare import baselines, bind_space, prepare
from evomerge.proposal import Genome, frozen_genome
from evomerge.recipe import MERGED, Hop, Recipe, Route
from evomerge.route_space import MOST_AXES, SIGMA, RouteSpace
from evomerge.run import run
from evomerge.schema import validated
from evomerge.search.cmaes import Options
from evomerge.space import RouteSpec, SearchSpace, SpaceSpec

Data = dict[str, Any]
Hops = list[tuple[str, int, float]]
WEIGHT = {"weight": {"low": 0.0, "high": 1.0}}
ENCODINGS = get_args(RouteSpec.model_fields["encoding"].annotation)


@pytest.fixture(scope="session")
def m(manifest_of: Any) -> Manifest:
    """Three layers, two experts, and one of five layers."""
    pool, deep = manifest_of(layers=3), manifest_of(layers=5)
    return replace(
        pool,
        layers={**pool.layers, "deep": 5},
        hashes={**pool.hashes, "deep": f"{9:064x}"},
        layouts={"deep": deep.tensors},
    )


def space_of(m: Manifest, route: Data, **spec: Any) -> RouteSpace:
    space = bind_space(validated(SpaceSpec, {"route": route, **spec}, "space"), m, "float32")
    assert isinstance(space, RouteSpace)
    return space


def at(space: SearchSpace, **values: Any) -> Genome:
    """The default with some axes changed; `route.` and dots of their names left out."""
    named = {a.name.removeprefix("route.").replace(".", "_"): a for a in space.axes}
    assert set(values) <= set(named), sorted(named)
    return frozen_genome([a.unit(values.get(n, a.default)) for n, a in named.items()])


def plain(m: Manifest) -> Recipe:
    return Recipe.model_validate({"merge": []}).canonical(m)


def path(r: Recipe) -> Hops:
    assert r.route is not None
    return [(h.from_, h.layer, h.scale) for h in r.route.hops]


def routed(m: Manifest, hops: Hops, end: str = "base", **more: Any) -> Recipe:
    """A recipe from a list of hops."""
    steps = tuple(Hop(from_=source, layer=layer, scale=scale) for source, layer, scale in hops)
    route = Route(embed=end, final_norm=end, head=end, hops=steps)
    return Recipe.model_validate({"route": route, **more}).canonical(m)


# -- what the genes mean ------------------------------------------------------------------------------------


def test_indicator_is_the_papers_array(m: Manifest) -> None:
    """All layers of A, then of B, twice; what is on is the path, in the order of the array."""
    space = space_of(m, {"encoding": "indicator", "models": ["base", "code"]})

    assert [a.name for a in space.axes[:12]] == [
        f"route.{r}.{model}.{i}.on" for r in (1, 2) for model in ("base", "code") for i in range(3)
    ]
    g = at(space, **{"1_base_1_on": 0.0, "1_base_2_on": 0.4, "1_code_1_on": 0.6, "2_base_1_on": 1, "2_base_2_on": 1})
    assert space.decode(g, m).id == routed(m, [("base", 0, 1), ("code", 1, 1), ("base", 1, 1), ("base", 2, 1)]).id


def test_the_threshold_itself_is_out(m: Manifest) -> None:
    """Above 0.5 is in, as a half is not: with all genes there only the pinned ends remain."""
    space = space_of(m, {"encoding": "indicator", "scales": "none"})

    assert path(space.decode(frozen_genome([0.5] * len(space.axes)), m)) == [("base", 0, 1.0), ("base", 2, 1.0)]


def test_the_default_is_two_steps_from_the_threshold(m: Manifest) -> None:
    """A's first repetition at +2 sigma of CMA-ES's own default step, all else at -2 sigma."""
    space = space_of(m, {"encoding": "indicator", "scales": "none"})
    z = (space.default - 0.5) / Options().sigma

    assert Options().sigma == SIGMA
    np.testing.assert_allclose(z, [2.0] * 3 + [-2.0] * (len(z) - 3), atol=1e-4)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_default_is_model_a(encoding: str, m: Manifest) -> None:
    """The default of every encoding decodes to the plain recipe of the first model; `merged` is then the base."""
    for a in ("base", "merged"):
        space = space_of(m, {"encoding": encoding, "models": [a]})
        assert space.decode(space.default, m).id == plain(m).id
    for a in ("code", "deep"):
        space = space_of(m, {"encoding": encoding, "models": [a]})
        assert space.decode(space.default, m).id == baselines(m, "float32")[a].id


def test_ends_are_pinned_and_not_doubled(m: Manifest) -> None:
    """A's first and last layer are added where the path does not have them as its ends already."""
    space = space_of(m, {"encoding": "slices", "models": ["base", "code"], "slices": 2})
    code = {"slice1_model": "code", "slice1_start": 1, "slice1_end": 3}

    assert path(space.decode(at(space, **code), m)) == [
        ("base", 0, 1.0), ("code", 1, 1.0), ("code", 2, 1.0), ("base", 2, 1.0),
    ]  # fmt: skip
    assert path(space.decode(at(space, slice1_start=0, slice1_end=2, slice2_start=1, slice2_end=3), m)) == [
        ("base", 0, 1.0), ("base", 1, 1.0), ("base", 1, 1.0), ("base", 2, 1.0),
    ]  # fmt: skip
    assert path(space.decode(at(space, slice1_end=0), m)) == [("base", 0, 1.0), ("base", 2, 1.0)]


def test_scales_act_off_the_natural_order_only(m: Manifest) -> None:
    """A hop to the next layer of the same model has no scale, nor has the first; all others have their slot's."""
    space = space_of(m, {"encoding": "indicator", "models": ["base", "code"]})
    every = {a.name.removeprefix("route.").replace(".", "_"): 1.5 for a in space.axes if a.name.endswith("scale")}
    on = {"1_base_1_on": 0, "1_base_2_on": 0, "1_code_1_on": 1, "1_code_2_on": 1}
    r = space.decode(at(space, **every, **on), m)

    assert path(r) == [("base", 0, 1.0), ("code", 1, 1.5), ("code", 2, 1.0), ("base", 2, 1.5)]
    assert space.decode(at(space, **every), m).id == plain(m).id
    assert space.decode(at(space, **on, **{"1_code_1_scale": 1.5, "end_scale": 1.5}), m).id == r.id


def test_a_table_of_pairs_scales_every_hop(m: Manifest) -> None:
    """W_ij as in the paper: M x M scales, natural hops included."""
    space = space_of(m, {"encoding": "indicator", "models": ["base", "code"], "repetitions": 1, "scales": "pairs"})
    r = space.decode(at(space, **{"base_0>base_1_scale": 2.0, "base_1>base_2_scale": 0.5}), m)

    assert len(space.axes) == 6 + 6 * 6
    assert path(r) == [("base", 0, 1.0), ("base", 1, 2.0), ("base", 2, 0.5)]


def test_repeats_count_the_layers(m: Manifest) -> None:
    """0 leaves a layer out, 2 goes through it twice; the ends are always there."""
    space = space_of(
        m, {"encoding": "repeats"}, axes={"repeats": {"low": 0, "high": 2}, "mlp_gain": {"low": 0, "high": 2}}
    )
    r = space.decode(at(space, **{"0_repeats": 0, "1_repeats": 2, "1_scale": 1.25, "1_mlp_gain": 0.5}), m)

    assert path(r) == [("base", 0, 1.0), ("base", 1, 1.0), ("base", 1, 1.25), ("base", 2, 1.0)]
    assert r.route is not None
    assert [h.mlp_gain for h in r.route.hops] == [1.0, 0.5, 0.5, 1.0]
    assert path(space.decode(at(space, **{"1_repeats": 0}), m)) == [("base", 0, 1.0), ("base", 2, 1.0)]


def test_scales_and_gains_of_the_natural_path(m: Manifest) -> None:
    """Every layer once; a scale, and gains of attention and MLP."""
    space = space_of(m, {"encoding": "scales"})
    r = space.decode(at(space, **{"0_scale": 0.8, "1_attn_gain": 1.2, "2_mlp_gain": 0.5}), m)

    assert r.route is not None
    assert [(h.layer, h.scale, h.attn_gain, h.mlp_gain) for h in r.route.hops] == [
        (0, 0.8, 1.0, 1.0), (1, 1.0, 1.2, 1.0), (2, 1.0, 1.0, 0.5),
    ]  # fmt: skip
    assert len(space_of(m, {"encoding": "scales"}, axes={"scale": {"low": 0.5, "high": 2.0}}).axes) == 3


def test_later_hops_are_dropped_where_a_path_gets_too_long(m: Manifest) -> None:
    """`max_hops` keeps the beginning and A's last layer; by default twice the deepest model."""
    space = space_of(m, {"encoding": "indicator", "max_hops": 4})
    everything = frozen_genome([1.0] * len(space.axes))
    long = space_of(m, {"encoding": "indicator", "scales": "none"})

    assert space.decode(everything, m).id == plain(m).id  # cut behind A's last layer, which is an end already
    r = space.decode(at(space, **{"1_base_2_on": 0, "1_code_1_on": 1, "1_deep_4_on": 1, "2_base_0_on": 1}), m)
    assert [h[:2] for h in path(r)] == [("base", 0), ("base", 1), ("code", 1), ("base", 2)]
    r = long.decode(frozen_genome([1.0] * len(long.axes)), m)
    assert len(path(r)) == long.max_hops == 10
    assert path(r)[-1][:2] == ("base", 2)


def test_models_of_other_depths(m: Manifest) -> None:
    """By default all experts follow the base, whatever their depth; A may be the deep one."""
    space = space_of(m, {"encoding": "slices"})
    assert dict(space.models) == {"base": 3, "code": 3, "deep": 5, "math": 3}

    r = space.decode(at(space, slice1_end=1, slice2_model="deep", slice2_start=3, slice2_end=5), m)
    assert [h[:2] for h in path(r)] == [("base", 0), ("deep", 3), ("deep", 4), ("base", 2)]
    deep = space_of(m, {"encoding": "indicator", "models": ["deep", "experts"]})
    assert list(deep.models) == ["deep", "code", "math"]
    ends = {n: dict(rule.sources) for n, rule in deep.decode(deep.default, m).blocks.items()}
    assert ends == {end: {"deep": {"weight": 1.0}} for end in ("embed", "final_norm", "head")}


def test_layers_that_a_model_does_not_have_are_no_hops(m: Manifest) -> None:
    """Slices go to the end of the deepest model; of others they end where the model does."""
    space = space_of(m, {"encoding": "slices", "models": ["base", "deep"], "slices": 1})

    assert space.decode(at(space, slice1_start=4, slice1_end=5), m).id == space.decode(at(space, slice1_end=0), m).id


# -- merges and routes together -----------------------------------------------------------------------------


def test_merge_axes_build_the_source_merged(m: Manifest, recipe_over: Any) -> None:
    """The rules of the same point; layers that the path leaves out have none."""
    space = space_of(m, {"encoding": "repeats"}, axes=WEIGHT, experts=["math"])
    both = {"math_all_weight": 0.5}
    natural, shorter = (space.decode(at(space, **both, **{"1_repeats": n}), m) for n in (1, 0))

    merge = recipe_over(m, {"method": "task_arithmetic", "sources": {"math": {"weight": 0.5}}})
    assert natural.id == merge.id
    assert [h[:2] for h in path(shorter)] == [("merged", 0), ("merged", 2)]
    assert set(shorter.blocks) == {n for n in m.blocks if not n.startswith("layers.1.")}
    assert list(space_of(m, {"encoding": "indicator"}, axes=WEIGHT).models) == ["merged", "code", "deep", "math"]


def test_around_an_earlier_result(m: Manifest, recipe_over: Any) -> None:
    """`merged` is what the recipe builds: its natural path is the recipe itself, other paths carry its rules."""
    merge = recipe_over(m, {"method": "ties", "sources": {"math": {"weight": 0.5}, "code": {"weight": 0.7}}})
    before = space_of(m, {"encoding": "slices", "models": ["merged", "experts"]})
    space = before.around(merge)

    assert before.decode(before.default, m).id == plain(m).id
    assert space.axes == before.axes
    assert space.decode(space.default, m).id == merge.id
    np.testing.assert_array_equal(space.encode(merge, m), space.default)
    with pytest.raises(ValueError, match="cannot express"):
        before.encode(merge, m)
    r = space.decode(at(space, slice2_model="merged", slice2_start=1, slice2_end=3), m)
    assert [h[:2] for h in path(r)] == [("merged", i) for i in (0, 1, 2, 1, 2)]
    assert {n: rule.method for n, rule in r.blocks.items()} == dict.fromkeys(m.blocks, "ties")
    r = space.decode(at(space, slice1_end=1), m)
    assert [h[:2] for h in path(r)] == [("merged", 0), ("merged", 2)]
    assert space.decode(space.encode(r, m), m).id == r.id
    assert space.around(r).decode(space.default, m).blocks == r.blocks


def test_around_segments(m: Manifest) -> None:
    """Segments are carried as they are; embedding, norm and head are then the mix's, whoever is first."""
    mix = {"layout": m.layout, "cuts": [0, 100], "weights": {"base": [0.5, 0.0], "math": [0.5, 1.0]}}
    merge = Recipe.model_validate({"segments": mix}).canonical(m)
    for models in (["merged", "code"], ["code", "merged"]):
        space = space_of(m, {"encoding": "indicator", "models": models}).around(merge)
        r = space.decode(space.default, m)
        assert r.segments == merge.segments
        assert (r.id == merge.id) == (models[0] == "merged")
        assert space.decode(space.encode(r, m), m).id == r.id


def test_around_changes_nothing_where_merged_is_no_source(m: Manifest, recipe_over: Any) -> None:
    """Without `merged` among the models, and with axes that build it, the space stays; so do all other spaces."""
    merge = recipe_over(m, {"method": "linear", "sources": {"math": {"weight": 1.0}}})
    for spec in (
        {"route": {"encoding": "slices"}},
        {"route": {"encoding": "slices"}, "axes": WEIGHT},
        {"axes": WEIGHT},
        {"layer_swap": {}},
    ):
        space = bind_space(validated(SpaceSpec, spec, "space"), m, "float32")
        assert space.around(merge) is space


# -- for all spaces -----------------------------------------------------------------------------------------

SPACES: list[Data] = [
    {"route": {"encoding": "indicator"}},
    {"route": {"encoding": "indicator", "scales": "none", "max_hops": 4}},
    {"route": {"encoding": "indicator", "scales": "pairs", "models": ["base", "deep"], "repetitions": 1}},
    {"route": {"encoding": "indicator", "models": ["deep", "experts", "base"]}},
    {"route": {"encoding": "indicator", "models": ["merged", "base"]}},
    {"route": {"encoding": "slices"}},
    {"route": {"encoding": "slices", "models": ["code", "merged", "base"], "slices": 3, "max_hops": 4}},
    {"route": {"encoding": "repeats"}},
    {"route": {"encoding": "repeats", "max_hops": 4}, "axes": {"repeats": {"low": 1, "high": 3}}},
    {"route": {"encoding": "scales", "models": ["deep"]}},
    {"route": {"encoding": "indicator"}, "axes": WEIGHT, "groups": "layers", "method": "linear"},
    {"route": {"encoding": "slices", "models": ["base", "merged"]}, "axes": WEIGHT, "groups": "layer-modules"},
    {"route": {"encoding": "repeats"}, "axes": WEIGHT, "groups": {"buckets": 2}, "method": ["linear", "ties"]},
    {"route": {"encoding": "scales"}, "axes": {**WEIGHT, "scale": {"low": 0.5, "high": 3.0}}},
]


@pytest.mark.parametrize("spec", SPACES, ids=[json.dumps(s) for s in SPACES])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_decode_is_total_and_encode_inverts_it(spec: Data, data: st.DataObject, m: Manifest) -> None:
    """Every point of the cube is a canonical recipe within the bounds; encode gives a point of the same recipe."""
    space = space_of(m, **spec)
    if data.draw(st.booleans()) and MERGED in space.models:
        merge = Recipe.from_yaml("merge: [{match: {layers: [1, 2]}, method: linear, sources: {math: {}}}]")
        space = space.around(merge.canonical(m))
    size = len(space.axes)
    genes = data.draw(st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0]), min_size=size, max_size=size))
    r = space.decode(frozen_genome(genes), m)

    assert r.canonical(m).id == r.id
    assert Recipe.from_yaml(r.to_yaml()).canonical(m).id == r.id
    low, high = space.describe()["route"]["hops"]
    assert r.route is None or low <= len(r.route.hops) <= high
    assert space.decode(space.encode(r, m), m).id == r.id


@pytest.mark.parametrize("spec", SPACES, ids=[json.dumps(s) for s in SPACES])
def test_probes_are_points(spec: Data, m: Manifest) -> None:
    """The default comes first; each other model is looked at."""
    space = space_of(m, **spec)
    probes = space.probes()

    np.testing.assert_array_equal(probes[0], space.default)
    visited = {h.from_ for g in probes if (r := space.decode(g, m)).route is not None for h in r.route.hops}
    assert visited >= set(space.models) - {"base", "merged"}


def test_every_path_of_a_small_array(m: Manifest) -> None:
    """All 2^6 choices of one repetition: as many different paths as the definition has, each encoded again."""
    space = space_of(
        m, {"encoding": "indicator", "models": ["base", "code"], "repetitions": 1, "scales": "none", "max_hops": 7}
    )
    ids = set()
    expected = set()
    for n in range(64):
        on = [n >> i & 1 for i in range(6)]
        r = space.decode(frozen_genome([float(b) for b in on]), m)
        hops = [(("base", "code")[i // 3], i % 3) for i in range(6) if on[i]]
        hops = hops if hops[:1] == [("base", 0)] else [("base", 0), *hops]
        hops = hops if hops[-1] == ("base", 2) else [*hops, ("base", 2)]
        assert r.id == routed(m, [(*h, 1.0) for h in hops]).id
        assert space.decode(space.encode(r, m), m).id == r.id
        ids.add(r.id)
        expected.add(tuple(hops))
    # With base.1 or without; the 7 choices of layers of code, after base.2 or in its place, or none of them.
    assert len(ids) == len(expected) == 2 * (7 * 2 + 1)


@pytest.mark.parametrize(
    ("route", "hops"),
    [
        ({"encoding": "indicator"}, [("base", 0, 1), ("base", 0, 1), ("base", 0, 1), ("base", 2, 1)]),
        ({"encoding": "indicator"}, [("base", 0, 1), ("base", 1, 1.5), ("base", 2, 1)]),
        ({"encoding": "slices", "slices": 1}, [("base", 0, 1), ("code", 1, 1), ("math", 1, 1), ("base", 2, 1)]),
        ({"encoding": "slices"}, [("base", 0, 1), ("code", 1, 3.0), ("base", 2, 1)]),
        ({"encoding": "repeats"}, [("base", 0, 1), ("base", 2, 1), ("base", 1, 1), ("base", 2, 1)]),
        ({"encoding": "repeats"}, [("base", 0, 1), ("code", 1, 1), ("base", 2, 1)]),
        ({"encoding": "scales"}, [("base", 0, 1), ("base", 2, 1)]),
    ],
)
def test_encode_refuses_what_is_no_path_of_the_space(route: Data, hops: Hops, m: Manifest) -> None:
    """Too many repetitions or slices, scales out of bounds or where none acts, other models and orders."""
    with pytest.raises(ValueError, match="cannot express"):
        space_of(m, route).encode(routed(m, hops), m)


def test_decode_refuses_what_is_no_genome(m: Manifest) -> None:
    """A vector of another length or off the cube is no point."""
    space = space_of(m, {"encoding": "scales"})
    for genes in ([0.5], [1.5] * 9):
        with pytest.raises(ValueError, match=r"genes in \[0, 1\]"):
            space.decode(np.array(genes), m)


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"route": {}}, "'route.encoding' is missing"),
        ({"route": {"encoding": "indicators"}}, "route.encoding: expected 'indicator', 'slices'"),
        ({"route": {"encoding": "slices", "models": ["cod"]}}, "unknown model 'cod'; did you mean 'code'?"),
        ({"route": {"encoding": "slices", "models": ["code", "code"]}}, "models: expected different names"),
        ({"route": {"encoding": "repeats", "models": ["base", "code"]}}, "is of the layers of one model"),
        ({"route": {"encoding": "scales", "models": ["experts"]}}, "is of the layers of one model"),
        ({"route": {"encoding": "slices", "repetitions": 2}}, "repetitions: is for encoding indicator, got"),
        ({"route": {"encoding": "scales", "max_hops": 9}}, "max_hops: is for encoding indicator or slices or repeats"),
        ({"route": {"encoding": "scales", "scales": "none"}}, "leave out `scales: none`"),
        ({"route": {"encoding": "slices", "max_hops": 2}}, "base alone has 3 layers, but max_hops is 2"),
        ({"route": {"encoding": "slices"}, "layer_swap": {}}, "layer_swap goes without route"),
        ({"route": {"encoding": "slices"}, "method": "ties"}, "method: nothing is merged here; name a coefficient"),
        ({"route": {"encoding": "slices"}, "groups": "layers", "params": {}}, "groups, params: nothing is"),
        ({"route": {"encoding": "slices"}, "axes": {"wieght": {"low": 0, "high": 1}}}, "did you mean 'weight'?"),
        ({"route": {"encoding": "slices"}, "axes": {"scal": {"low": 0.5, "high": 1}}}, "did you mean 'scale'?"),
        ({"route": {"encoding": "slices"}, "axes": {"repeats": {"low": 0, "high": 2}}}, "only scale"),
        ({"route": {"encoding": "slices"}, "axes": {"scale": {"low": -1, "high": 2}}}, "positive numbers, got low -1"),
        ({"route": {"encoding": "slices"}, "axes": {"scale": {"low": 2, "high": 3}}}, "and hold 1, the model as it is"),
        ({"route": {"encoding": "slices"}, "axes": {"scale": {"low": 0.5, "high": 1e4}}}, "within [0.001, 1000]"),
        ({"route": {"encoding": "repeats"}, "axes": {"repeats": {"low": 0, "high": 1.5}}}, "expected whole numbers"),
        (
            {"route": {"encoding": "slices", "scales": "none"}, "axes": {"scale": {"low": 0.5, "high": 2}}},
            "`scales: none` makes all 1; keep one",
        ),
        ({"route": {"encoding": "scales", "models": ["code"]}, "axes": WEIGHT}, "weight build `merged`, which no"),
        ({"route": {"encoding": "slices"}, "axes": WEIGHT, "method": "slerp"}, "search space: slerp is between two"),
        ({"route": {"encoding": "slices"}, "axes": {"scale": {"low": 0.5, "high": 2, "default": "uniform"}}}, "give a"),
    ],
)  # fmt: skip
def test_specs_that_do_not_fit(spec: Data, words: str, manifest_of: Any) -> None:
    """One line that says what was expected."""
    with pytest.raises(UserError) as caught:
        bind_space(validated(SpaceSpec, spec, "space"), manifest_of(layers=3, experts=("a", "b", "code")), "float32")

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_many_axes_are_refused(manifest_of: Any) -> None:
    """A table over three models of 40 layers is 14,400 scales."""
    with pytest.raises(UserError, match=rf"more than {MOST_AXES:,} axes; .* or scales: slots"):
        space_of(manifest_of(layers=40), {"encoding": "indicator", "scales": "pairs"})


def test_old_spaces_say_the_same(m: Manifest) -> None:
    """A space without a route dumps as before there were any: experiment ids hash it."""
    assert "route" not in validated(SpaceSpec, {"axes": WEIGHT}, "space").model_dump()


# -- searches -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def depths(tiny_model: Any, small_experiment: Path) -> Callable[..., Any]:
    """depths(space, **overrides) -> the small experiment with a space over a base of 2 layers, two experts, and one of
    3 layers."""
    deep = tiny_model("llama", 5, num_hidden_layers=3)

    def make(space: Data, **overrides: object) -> Any:
        return load(small_experiment, {"models.experts.deep": str(deep), "search_space": space, **overrides})

    return make


def paths_of(history: Any) -> list[list[tuple[str, int]]]:
    return [
        [(h.from_, h.layer) for h in r.route.hops]
        for e in history.entries.values()
        if e.role == "search" and (r := history.recipe(e.id)).route is not None
    ]


@pytest.mark.parametrize(
    ("space", "search"),
    [
        ({"route": {"encoding": "indicator"}}, {"algorithm": "cma-es", "population": 4}),
        ({"route": {"encoding": "slices", "slices": 2}}, {"algorithm": "tpe", "startup": 4}),
        ({"route": {"encoding": "indicator", "models": ["merged", "deep"]}, "axes": WEIGHT}, {"algorithm": "ga"}),
        ({"route": {"encoding": "repeats", "models": ["deep"]}}, {"algorithm": "nsga-ii", "population": 6}),
    ],
)
def test_a_search_over_paths(space: Data, search: Data, depths: Callable[..., Any], tmp_path: Path) -> None:
    """A short real search: candidates with paths are scored, the deep expert is a baseline, a winner is chosen."""
    settings = {"population": 4, "budget": {"evaluations": 12}, "seed": 3, "finalists": 2, **search}
    goals = {"fitness.objectives": [{"name": t, "tasks": [t]} for t in ("sums", "words")]}
    history = run(
        depths(space, search=settings, **(goals if search["algorithm"] == "nsga-ii" else {})), tmp_path / "run"
    )

    routes = paths_of(history)
    assert routes
    space_of_run = history.spaces[0]
    assert isinstance(space_of_run, RouteSpace)
    first, layers = next(iter(space_of_run.models.items()))
    assert {(p[0][1], p[-1][1]) for p in routes} == {(0, layers - 1)}
    assert {p[i][0] for p in routes for i in (0, -1)} <= {first, "base"}  # a layer of `merged` without rules
    assert max(map(len, routes)) <= space_of_run.max_hops
    assert all(e.scores("search") is not None for e in history.entries.values())
    assert "deep" in history.baselines
    assert history.final is not None


def test_check_says_what_is_searched(depths: Callable[..., Any]) -> None:
    """Models with their layers, slots, hops and scales; work for the longest path."""
    found = check(depths({"route": {"encoding": "indicator"}}))
    lines = text(found)

    assert "stage 1  37 axes, routes\n" in lines
    assert (
        "indicator of base (2 layers), deep (3 layers), one (2 layers), two (2 layers): 18 slots, a scale each, "
        "2 to 6 hops"
    ) in lines
    plain = check(depths({"route": {"encoding": "scales"}}))
    assert found.flop_per_candidate > 1.5 * plain.flop_per_candidate
    assert "2 layers, a scale each, 2 hops" in text(plain)
    joint = text(check(depths({"route": {"encoding": "repeats", "scales": "none"}, "axes": WEIGHT})))
    assert "4 axes, routes, task_arithmetic over 1 groups of blocks" in joint
    assert "searched: weight in [0, 1], repeats in [0, 2]" in joint


def test_stages_follow_one_another(depths: Callable[..., Any]) -> None:
    """A route stage after a merge needs it as a source `merged`, and then can start from whatever is found."""

    def staged(models: list[str]) -> Any:
        route = {"route": {"encoding": "indicator", "models": models}}
        merge = {"axes": {"weight": {"low": -0.5, "high": 1.5}}, "groups": "layers"}
        return depths({"stages": [{"space": merge, "share": 0.5}, {"space": route, "share": 0.5}]})

    prepared = prepare(staged(["merged", "experts"]))
    assert isinstance(prepared.spaces[1], RouteSpace)
    with pytest.raises(UserError, match=r"stage 2 cannot start from all that stage 1 may find .*`merged`"):
        prepare(staged(["base", "experts"]))


@pytest.mark.parametrize("name", ["route-indicator", "route-slices", "route-repeats", "route-scales", "route-joint"])
def test_library_spaces_fit_a_real_pool(name: str, depths: Callable[..., Any]) -> None:
    """`check` accepts every entry as it is, the deep expert included."""
    assert "route" in check(depths(name)).stages[0]


def test_the_hybrid_of_the_library_fits_a_real_pool(depths: Callable[..., Any]) -> None:
    """Merge first, routes through its result then."""
    first, second = check(depths("hybrid")).stages

    assert "route" not in first
    assert list(second["route"]["models"]) == ["merged", "deep", "one", "two"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"search.algorithm": "adam"}, "adam needs gradients, but layer routes have no derivative"),
        ({"search.algorithm": "greedy-soup"}, "greedy-soup mixes the models itself and knows no layer routes"),
    ],
)
def test_algorithms_without_routes_are_refused(overrides: Data, words: str, depths: Callable[..., Any]) -> None:
    """Gradients and algorithms with mixes of their own are for merges."""
    settings = {"search": {"budget": {"evaluations": 12}, "seed": 3}, **overrides}
    with pytest.raises(UserError, match=words):
        prepare(depths({"route": {"encoding": "slices"}}, **settings))


def test_a_distance_from_the_base_is_refused(depths: Callable[..., Any], small_experiment: Path) -> None:
    """A path has no weights beside the base's to measure it by."""
    tasks = json.loads(small_experiment.read_text())["fitness"]["tasks"]
    goals = [{"name": "loss", "tasks": ["sums", "words"]}]
    fitness = {"tasks": [*tasks, {"name": "far", "kind": "weights"}], "objectives": goals}
    with pytest.raises(UserError, match="task 'far' of kind weights compares a model with the base"):
        prepare(depths({"route": {"encoding": "slices"}}, fitness=fitness))


def test_other_depths_need_a_route(depths: Callable[..., Any]) -> None:
    """Merges alone still refuse an expert of another depth."""
    with pytest.raises(UserError, match="3 layers, but the base has 2; only layer routes"):
        prepare(depths({"axes": WEIGHT}))


def test_baselines_of_other_depths_are_their_own_models(m: Manifest, manifest_of: Any) -> None:
    """All their layers with their embedding, norm and head; the mergeable ones' mean stays the last."""
    found = baselines(m, "float32")
    assert list(found) == ["base", "deep", "code", "math", "uniform"]
    assert path(found["deep"]) == [("deep", i, 1.0) for i in range(5)]
    assert set(found["deep"].blocks) == {"embed", "final_norm", "head"}
    assert set(found["uniform"].sources) == {"base", "code", "math"}

    tied = manifest_of(layers=3, tied=True)
    deep = manifest_of(layers=5, tied=True)
    tied = replace(tied, layers={**tied.layers, "deep": 5}, hashes={**tied.hashes, "deep": "f" * 64})
    tied = replace(tied, layouts={"deep": deep.tensors})
    assert set(baselines(tied, "float32")["deep"].blocks) == {"embed", "final_norm"}
