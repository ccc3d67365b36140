"""Search spaces: axes, groups, decode (total) and encode (its inverse), and the library's entries."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.config import StagedSpec, resolve_space
from evomerge.errors import UserError
from evomerge.importance import important_groups
from evomerge.library import entries
from evomerge.manifest import Manifest
from evomerge.prepare import bind_space
from evomerge.proposal import frozen_genome
from evomerge.recipe import Recipe
from evomerge.schema import validated
from evomerge.space import Axis, Important, RuleSpace, SpaceSpec

Data = dict[str, Any]
WEIGHT: Data = {"low": -0.5, "high": 1.5, "default": "uniform"}


def spec(**data: Any) -> SpaceSpec:
    return validated(SpaceSpec, {"axes": {"weight": WEIGHT}, **data}, "space")


def space_of(m: Manifest, **data: Any) -> RuleSpace:
    return RuleSpace(spec(**data), m, "float32")


@pytest.fixture(scope="module")
def m(manifest_of: Any) -> Manifest:
    return manifest_of(layers=4)  # type: ignore[no-any-return]


# -- axes ------------------------------------------------------------

FLOAT = Axis("f", "float", -0.5, 1.5)
LOG = Axis("l", "float", 0.001, 10.0, log=True)
INT = Axis("i", "int", -1, 3, default=2.0)
CHOICE = Axis("c", "categorical", choices=("a", "b", "c"), default="b")


@pytest.mark.parametrize(
    ("axis", "u", "value"),
    [
        (FLOAT, 0.0, -0.5),
        (FLOAT, 1.0, 1.5),
        (FLOAT, 0.25, 0.0),
        (FLOAT, 1 / 3, 0.166667),
        (LOG, 0.0, 0.001),
        (LOG, 1.0, 10.0),
        (LOG, 0.5, 0.1),
        (INT, 0.0, -1),
        (INT, 0.1999, -1),
        (INT, 0.2, 0),
        (INT, 0.9999, 3),
        (INT, 1.0, 3),
        (CHOICE, 0.0, "a"),
        (CHOICE, 0.34, "b"),
        (CHOICE, 1.0, "c"),
    ],
)
def test_value_of_an_axis(axis: Axis, u: float, value: float | str) -> None:
    """The unit interval maps onto the bounds, onto whole numbers, or onto choices, in parts of equal size."""
    assert axis.value(u) == value


@given(u=st.floats(0, 1), axis=st.sampled_from([FLOAT, LOG, INT, CHOICE]))
def test_unit_inverts_value(u: float, axis: Axis) -> None:
    """value(unit(value(u))) is value(u), for every kind of axis, ends included."""
    value = axis.value(u)

    assert 0.0 <= axis.unit(value) <= 1.0
    assert axis.value(axis.unit(value)) == value


def test_levels_have_equal_shares() -> None:
    """An int axis of 5 levels and a categorical of 3 split the unit interval evenly; a float has no levels."""
    grid = (np.arange(3000) + 0.5) / 3000

    assert [INT.levels, CHOICE.levels, FLOAT.levels] == [5, 3, None]
    assert np.unique([INT.value(float(u)) for u in grid], return_counts=True)[1].tolist() == [600] * 5
    assert np.unique([CHOICE.value(float(u)) for u in grid], return_counts=True)[1].tolist() == [1000] * 3


def test_units_of_levels_lie_in_their_middle() -> None:
    """A level's unit is its middle, so that a search that starts there is far from both neighbours."""
    assert [INT.unit(v) for v in (-1, 0, 3)] == pytest.approx([0.1, 0.3, 0.9])
    assert [CHOICE.unit(v) for v in ("a", "b", "c")] == pytest.approx([1 / 6, 0.5, 5 / 6])


@pytest.mark.parametrize(
    ("axis", "value"),
    [(FLOAT, 1.6), (FLOAT, -0.6), (FLOAT, "x"), (FLOAT, float("nan")), (INT, 4), (CHOICE, "d"), (LOG, 0)],
)
def test_values_outside_an_axis_are_refused(axis: Axis, value: float | str) -> None:
    """unit() raises ValueError for a value that the axis does not have."""
    with pytest.raises(ValueError, match=r".+"):
        axis.unit(value)


# -- names and groups ------------------------------------------------------------


def test_axes_are_named_by_their_path(m: Manifest) -> None:
    """Names say expert, group and coefficient; shared coefficients have no expert; experts are sorted."""
    both = space_of(m, method="ties", axes={"weight": WEIGHT, "lambda": {"low": 0, "high": 2}})
    layers = space_of(m, groups="layers")

    assert [a.name for a in both.axes] == ["code.all.weight", "math.all.weight", "all.lambda"]
    assert [a.name for a in layers.axes][:4] == [
        "code.outside.weight",
        "math.outside.weight",
        "code.layers.0.weight",
        "math.layers.0.weight",
    ]
    assert len({a.name for a in layers.axes}) == len(layers.axes) == 10


BY_LAYER = {i: tuple(f"layers.{i}.{x}" for x in ("attention", "mlp", "norm")) for i in range(4)}
OUTSIDE = ("embed", "final_norm", "head")
GROUPS: dict[str, tuple[Any, dict[str, tuple[str, ...]]]] = {
    "all": ("all", {"all": ("embed", *itertools.chain(*BY_LAYER.values()), "final_norm", "head")}),
    "layers": ("layers", {"outside": OUTSIDE, **{f"layers.{i}": BY_LAYER[i] for i in range(4)}}),
    "layer-modules": (
        "layer-modules",
        {x: (x,) for x in ("embed", *itertools.chain(*BY_LAYER.values()), "final_norm", "head")},
    ),
    "two buckets": (
        {"buckets": 2},
        {"outside": OUTSIDE, "layers.0-1": BY_LAYER[0] + BY_LAYER[1], "layers.2-3": BY_LAYER[2] + BY_LAYER[3]},
    ),
    "three buckets": (
        {"buckets": 3},
        {
            "outside": OUTSIDE,
            "layers.0": BY_LAYER[0],
            "layers.1-2": BY_LAYER[1] + BY_LAYER[2],
            "layers.3": BY_LAYER[3],
        },
    ),
    "more buckets than layers": (
        {"buckets": 99},
        {"outside": OUTSIDE, **{f"layers.{i}": BY_LAYER[i] for i in range(4)}},
    ),
    "named": (
        [{"name": "mlps", "match": {"module": "mlp"}}, {"name": "first", "match": {"layers": [0, 0]}}],
        {"mlps": tuple(f"layers.{i}.mlp" for i in range(4)), "first": ("layers.0.attention", "layers.0.norm")},
    ),
    "named with a rest": (
        [{"name": "head", "match": {"block": "head"}}, {"name": "rest", "match": "all"}],
        {"head": ("head",), "rest": ("embed", *itertools.chain(*BY_LAYER.values()), "final_norm")},
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_blocks(name: str, m: Manifest) -> None:
    """Each way of grouping covers the blocks it should, each block at most once."""
    groups, expected = GROUPS[name]

    space = space_of(m, groups=groups)

    assert {k: tuple(v) for k, v in space.groups.items()} == expected
    assert len(space.axes) == 2 * len(expected)
    described = space.describe()
    assert (described["method"], described["groups"]) == ("task_arithmetic", len(expected))
    assert described["names"] == [a.name for a in space.axes]


@pytest.mark.parametrize(("layers", "buckets"), [(n, b) for n in (1, 2, 7, 30) for b in (1, 2, 3, 5, 8)])
def test_buckets_are_contiguous_and_even(layers: int, buckets: int, manifest_of: Any) -> None:
    """Every layer is in one bucket, in order, and the longest has at most one layer more than the shortest."""
    m = manifest_of(layers=layers)

    groups = {k: v for k, v in space_of(m, groups={"buckets": buckets}).groups.items() if k != "outside"}

    runs = [sorted({m.blocks[b].layer for b in names}) for names in groups.values()]
    assert list(itertools.chain(*runs)) == list(range(layers))
    assert len(runs) == min(layers, buckets)
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_tied_models_have_no_head(manifest_of: Any) -> None:
    """Where head and embedding are one tensor, there is one block and one axis for both."""
    space = space_of(manifest_of(tied=True), groups="layer-modules")

    assert "head" not in space.groups
    assert "embed" in space.groups


@pytest.mark.parametrize(
    "groups",
    [
        [{"name": "a", "match": "all"}, {"name": "b", "match": {"module": "mlp"}}],
        [{"name": "a", "match": {"block": "layers.7.mlp"}}],
        [{"name": "a", "match": {"module": "mlp"}}, {"name": "a", "match": {"module": "norm"}}],
    ],
)
def test_empty_and_repeated_groups_are_refused(groups: list[Data], m: Manifest) -> None:
    """A named group that repeats a name, or that earlier groups left nothing for, is refused by name."""
    with pytest.raises(UserError, match=r"group '[ab]' is a repeat or matches no block"):
        space_of(m, groups=groups)


# -- bad specs ------------------------------------------------------------

BAD: list[tuple[Data, str]] = [
    ({"axes": {}}, "axes"),
    ({"axes": {"wieght": WEIGHT}}, "no coefficient 'wieght'; did you mean 'weight'?"),
    ({"axes": {"weight": {"low": 1, "high": 0}}}, "`low < high` must hold, but got (low=1, high=0)"),
    ({"axes": {"weight": {"low": 1, "high": 1}}}, "`low < high` must hold"),
    ({"axes": {"weight": {"low": 0, "high": 1e-7}}}, "`low < high` must hold"),
    ({"axes": {"weight": {"low": 0, "high": float("nan")}}}, "`low < high` must hold"),
    ({"axes": {"weight": {"low": float("-inf"), "high": 1}}}, "`low < high` must hold"),
    ({"axes": {"weight": {"low": 0, "high": 1, "default": 2}}}, "default 2 lies outside [0, 1]"),
    ({"axes": {"weight": {"low": 0, "high": 1, "default": "middle"}}}, "axes.weight.default"),
    ({"axes": {"weight": {"low": 0, "high": 1, "log": True}}}, "a log axis needs low > 0, got 0"),
    ({"axes": {"weight": {"low": 0, "hihg": 1}}}, "unknown key 'axes.weight.hihg'; did you mean 'high'?"),
    ({"axes": {"weight": {"low": 0}}}, "the key 'axes.weight.high' is missing"),
    ({"axes": {"weight": {"low": -1e9, "high": 1}}}, "bounds must lie within"),
    ({"axes": {"weight": {"low": "x", "high": 1}}}, "axes.weight.low"),
    ({"method": "ties", "axes": {"density": {"low": 0, "high": 1}}}, "density: bounds must lie within [1e-06, 1]"),
    ({"method": "tise"}, "unknown method 'tise'; did you mean 'ties'?"),
    ({"method": []}, "expected one or several different methods"),
    ({"method": ["ties", "ties"]}, "expected one or several different methods, got ['ties', 'ties']"),
    ({"method": ["ties", "linaer"]}, "unknown method 'linaer'; did you mean 'linear'?"),
    ({"method": ["ties", "linear"], "axes": {"densty": WEIGHT}}, "ties or linear has no coefficient 'densty'"),
    ({"method": ["ties", "linear"], "params": {"lambda": "x"}}, "lambda"),
    ({"method": "slerp"}, "weight: bounds must lie within [0, 1e+06], got [-0.5, 1.5]"),
    ({"method": "dare_ties", "axes": {"mask_seed": {"low": 0.5, "high": 3}}}, "mask_seed: expected whole numbers"),
    ({"method": "dare_ties", "params": {"mask_seed": 1.5}}, "mask_seed: expected a whole number, got 1.5"),
    ({"method": "dare_ties", "params": {"mask_seed": -1}}, "must hold, but got -1"),
    ({"layer_swap": {}, "axes": {}, "method": "ties"}, "layer_swap goes without method"),
    ({"layer_swap": {}}, "layer_swap has no axis 'weight'"),
    ({"layer_swap": {"outre": "a"}, "axes": {}}, "did you mean 'outer'?"),
    ({"layer_swap": {}, "axes": {"top": {"low": 0, "high": 1.5}}}, "top: expected whole numbers"),
    ({"layer_swap": {}, "axes": {"top": {"low": -1, "high": 1}}}, "top: a number of layers is at least 0, got -1"),
    ({"params": {"lamda": 1}}, "no parameter 'lamda'; did you mean 'lambda'?"),
    ({"params": {"weight": 1}}, "weight is both an axis and fixed in params"),
    ({"params": {"lambda": "big"}}, "lambda"),
    ({"params": {"lambda": 1e9}}, "must hold, but got 1000000000.0"),
    ({"method": "ties", "params": {"density": 0}}, "`1e-06 <= density <= 1` must hold, but got 0"),
    ({"method": "ties", "params": {"normalize": "yes"}}, "normalize: expected one of [True, False], got 'yes'"),
    ({"groups": "layer"}, "groups"),
    ({"groups": {"bucket": 2}}, "unknown key 'groups.bucket'; did you mean 'buckets'?"),
    ({"groups": {"buckets": 0}}, "groups.buckets"),
    ({"groups": [{"name": "a b", "match": "all"}]}, "groups.0.name"),
    ({"groups": [{"name": "a", "match": {"modul": "mlp"}}]}, "did you mean 'module'?"),
]


@pytest.mark.parametrize(("data", "words"), BAD)
def test_bad_specs_get_one_line(data: Data, words: str) -> None:
    """Reversed bounds, unknown coefficients, groups and values are refused in one line that names the place."""
    with pytest.raises(UserError) as caught:
        spec(**data)

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# -- decode and encode ------------------------------------------------------------

SPACES: dict[str, Data] = {
    "one weight": {},
    "layers": {"groups": "layers"},
    "layer modules": {"groups": "layer-modules"},
    "buckets": {"groups": {"buckets": 3}},
    "named": {"groups": [{"name": "mlps", "match": {"module": "mlp"}}]},
    "linear": {"method": "linear"},
    "linear around 0": {"method": "linear", "axes": {"weight": {"low": -1, "high": 1}}},
    "linear sum": {"method": "linear", "axes": {"weight": {"low": -1, "high": 1}}, "params": {"normalize": False}},
    "ties": {"method": "ties", "axes": {"weight": WEIGHT, "density": {"low": 0.05, "high": 1.0}}},
    "ties, all": {
        "method": "ties",
        "groups": "layers",
        "axes": {
            "weight": {"low": 0, "high": 1.5},
            "density": {"low": 0.01, "high": 1.0, "log": True},
            "lambda": {"low": -1, "high": 2},
        },
        "params": {"normalize": False},
    },
    "lambda alone": {"axes": {"lambda": {"low": -1, "high": 1}}, "params": {"weight": 0.3}},
    "bounds between the decimals": {"axes": {"weight": {"low": 0.1234567, "high": 0.7654321}}},
    "dare": {"method": "dare_linear", "axes": {"weight": WEIGHT, "density": {"low": 0.05, "high": 1.0}}},
    "mask seeds": {
        "method": "dare_ties",
        "axes": {"weight": WEIGHT, "mask_seed": {"low": 2, "high": 5}},
        "params": {"density": 0.5, "rescale": "l1"},
    },
    "bands": {
        "method": "spectral",
        "groups": {"buckets": 2},
        "axes": {f"band_{b}": {"low": -0.5, "high": 1.5} for b in (1, 2, 3, 4)},
    },
    "some bands": {
        "method": "spectral",
        "axes": {"band_1": {"low": 0, "high": 2}, "lambda": {"low": 0, "high": 1}},
        "params": {"band_2": 0.5, "band_3": 0, "weight": -0.3},
    },
    "one band": {
        "method": "spectral",
        "axes": {"band_1": {"low": -1, "high": 1}},
        "params": {"band_2": 0, "band_3": 0.0, "band_4": 0, "lambda": 2},
    },
    "bands above 0": {"method": "spectral", "axes": {"weight": WEIGHT, "band_3": {"low": 0.1, "high": 1}}},
    "bands or not": {
        "method": ["task_arithmetic", "spectral"],
        "axes": {"weight": {"low": 0, "high": 1}, "band_1": {"low": -1, "high": 2}},
    },
    "slerp": {"method": "slerp", "groups": "layers", "axes": {"weight": {"low": 0, "high": 0.8}}},
    "slerp of deltas": {"method": "slerp", "axes": {"weight": {"low": 0, "high": 2}}, "params": {"vectors": "deltas"}},
    "slerp with the base": {
        "method": "slerp",
        "groups": "layers",
        "axes": {"weight": {"low": 0, "high": 1}},
        "experts": ["math"],
    },
    "one expert": {"groups": "layers", "experts": ["math"]},
    "any method": {
        "method": ["task_arithmetic", "ties", "dare_ties", "linear", "slerp"],
        "groups": {"buckets": 2},
        "axes": {
            "weight": {"low": 0, "high": 1.5},
            "density": {"low": 0.05, "high": 1.0},
            "lambda": {"low": 0.0, "high": 2.0},
        },
        "params": {"mask_seed": 4},
    },
    "thirds": {"axes": {"weight": {"low": 1 / 3, "high": 2 / 3}}},
    "log": {"axes": {"weight": {"low": 1e-5, "high": 100.0, "log": True}}},
}


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_decode_is_total_and_encode_inverts_it(name: str, data: st.DataObject, manifest_of: Any) -> None:
    """Every point of the cube is a canonical recipe, and encode gives a point that decodes to the same one."""
    m = manifest_of(layers=4, tied=data.draw(st.booleans()))
    space = space_of(m, **SPACES[name])
    genes = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
    g = frozen_genome(data.draw(st.lists(genes, min_size=len(space.axes), max_size=len(space.axes))))

    r = space.decode(g, m)

    assert r.canonical(m).id == r.id
    assert Recipe.from_yaml(r.to_yaml()).canonical(m).id == r.id
    back = space.encode(r, m)
    assert space.decode(back, m).id == r.id


@pytest.mark.parametrize("name", SPACES)
def test_corners_of_the_cube(name: str, m: Manifest) -> None:
    """The corners and the middle decode, and encode again to the same recipe."""
    space = space_of(m, **SPACES[name])
    rng = np.random.default_rng(0)
    points = [np.zeros(len(space.axes)), np.ones(len(space.axes)), np.full(len(space.axes), 0.5)]
    points += [rng.integers(0, 2, len(space.axes)).astype(float) for _ in range(6)]

    for point in points:
        r = space.decode(frozen_genome(point), m)
        assert space.decode(space.encode(r, m), m).id == r.id


def test_decode_says_what_the_names_say(m: Manifest) -> None:
    """The gene of `math.layers.2.weight` is the weight of math in the blocks of layer 2, and nothing else."""
    space = space_of(m, groups="layers")
    at = [a.name for a in space.axes].index("math.layers.2.weight")
    g = np.full(len(space.axes), 0.25)  # weight 0
    g[at] = 1.0

    r = space.decode(frozen_genome(g), m)

    assert {b: dict(x.sources) for b, x in r.blocks.items()} == {b: {"math": {"weight": 1.5}} for b in BY_LAYER[2]}


def test_default_is_the_uniform_merge(m: Manifest) -> None:
    """`uniform` is one part of as many as there are experts; other defaults are the method's, or the given number."""
    uniform, none, given = (
        space_of(m, axes={"weight": {"low": 0.0, "high": 2.0, "default": d}}) for d in ("uniform", None, 0.3)
    )

    weights = [
        next(iter(s.decode(s.default, m).blocks.values())).sources["math"]["weight"] for s in (uniform, none, given)
    ]
    assert weights == [0.5, 1.0, 0.3]


def test_fixed_params_reach_every_rule(m: Manifest) -> None:
    """Options and coefficients of `params` stand in each block's rule."""
    space = space_of(m, method="ties", params={"density": 0.2, "lambda": 0.7, "normalize": False})

    for rule in space.decode(space.default, m).blocks.values():
        assert rule.params == {"lambda": 0.7, "normalize": False}
        assert {c["density"] for c in rule.sources.values()} == {0.2}


def test_dtype_is_part_of_the_recipe(m: Manifest) -> None:
    """The space's dtype is that of every recipe it decodes to."""
    space = RuleSpace(spec(), m, "bfloat16")

    assert space.decode(space.default, m).dtype == "bfloat16"


@pytest.mark.parametrize("genes", [[0.5], [0.5, 0.5, 0.5], [0.5, 1.5], [0.5, float("nan")], [-0.1, 0.5]])
def test_decode_refuses_what_is_no_genome(genes: list[float], m: Manifest) -> None:
    """A vector of another length, off the cube or not finite is no genome of this space."""
    with pytest.raises(ValueError, match=r"genes in \[0, 1\]"):
        space_of(m).decode(np.array(genes), m)


INEXPRESSIBLE: dict[str, str] = {
    "another method": "merge: [{method: ties, sources: {math: {weight: 0.5}}}]",
    "outside the bounds": "merge: [{method: task_arithmetic, sources: {math: {weight: 1.75}}}]",
    "finer groups": "merge: [{match: {layers: [0, 0]}, method: task_arithmetic, sources: {math: {weight: 0.5}}}]",
    "another fixed value": "merge: [{method: task_arithmetic, params: {lambda: 0.5}, sources: {math: {weight: 0.5}}}]",
    "another dtype": "dtype: float16",
}


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_encode_refuses_what_the_space_cannot_express(name: str, m: Manifest) -> None:
    """A recipe of another method, grouping, bound, fixed value or dtype has no point in the space."""
    r = Recipe.from_yaml(INEXPRESSIBLE[name]).canonical(m)

    with pytest.raises(ValueError, match=r"cannot express|outside"):
        space_of(m).encode(r, m)


def test_the_base_is_a_point_of_every_additive_space(m: Manifest) -> None:
    """Where weight 0 is within the bounds, the base itself can be encoded."""
    base = Recipe().canonical(m)

    for data in ({}, {"groups": "layers"}, SPACES["ties, all"]):
        space = space_of(m, **data)
        assert space.decode(space.encode(base, m), m).id == base.id


@pytest.mark.parametrize("fine", ["layers", "layer-modules", {"buckets": 2}])
def test_coarse_recipes_are_points_of_finer_spaces(fine: Any, m: Manifest) -> None:
    """Whatever a one-weight stage finds, corners included, a finer space of the same bounds starts from."""
    coarse, finer = space_of(m), space_of(m, groups=fine)
    rng = np.random.default_rng(1)

    for g in [np.zeros(2), np.ones(2), np.array([0.25, 1.0]), *(rng.random(2) for _ in range(10))]:
        r = coarse.decode(frozen_genome(g), m)
        assert finer.decode(finer.encode(r, m), m).id == r.id


# -- several methods ------------------------------------------------------------

ANY = SPACES["any method"]


def test_the_method_is_an_axis(m: Manifest) -> None:
    """One categorical axis for the run; what not all methods have is conditional on those that do."""
    space = space_of(m, **ANY)
    when = {a.name.rpartition(".")[2]: a.when for a in space.axes}

    assert space.axes[0] == Axis("method", "categorical", choices=tuple(ANY["method"]), default="task_arithmetic")
    assert when == {
        "method": None,
        "weight": None,
        "density": ("method", frozenset({"ties", "dare_ties"})),
        "lambda": ("method", frozenset({"task_arithmetic", "ties", "dare_ties"})),
    }
    assert space.describe()["bounds"]["method"] == ANY["method"]


def test_inert_genes_leave_the_recipe(m: Manifest) -> None:
    """A gene whose condition does not hold changes nothing; where it holds, it does."""
    space = space_of(m, **ANY)
    rng = np.random.default_rng(2)
    for axis, method in itertools.product(space.axes[1:], ANY["method"]):
        values = 0.1 + 0.8 * rng.random(len(space.axes))
        values[0] = space.axes[0].unit(method)
        other = values.copy()
        at = space.axes.index(axis)
        other[at] = 1.0 - 0.5 * values[at]
        one, two = (space.decode(frozen_genome(v), m).id for v in (values, other))

        assert (one != two) == (axis.when is None or method in axis.when[1]), (axis.name, method)


def test_every_method_of_a_choice_is_probed(m: Manifest) -> None:
    """The first looks of a search see each method once, at the defaults."""
    space = space_of(m, **ANY)
    methods = [{r.method for r in space.decode(g, m).blocks.values()} for g in space.probes()]

    assert methods[: len(ANY["method"])] == [{n} for n in ANY["method"]]


def test_every_expert_is_probed_by_its_bands(m: Manifest) -> None:
    """Where bands are searched and weights are not, half and all of one expert are half and all of its bands."""
    space = space_of(m, **SPACES["bands"])
    recipes = [space.decode(g, m) for g in space.probes()[1:]]
    rules = [
        (set(r.sources) - {"base"}, [v for rule in r.blocks.values() for v in rule.sources.values()]) for r in recipes
    ]

    assert [experts for experts, _ in rules] == [{e} for e in m.experts for _ in range(2)]
    for n, (_, coefs) in enumerate(rules):
        assert coefs == [{"weight": 1.0, **{f"band_{b}": (0.5, 1.0)[n % 2] for b in (1, 2, 3, 4)}}] * len(m.blocks)


def test_new_keys_leave_old_identities_alone() -> None:
    """Keys that are not given are not in what experiment ids are made of."""
    assert set(spec().model_dump(mode="json")) == {"description", "method", "groups", "axes", "params"}
    assert spec(experts=["a"]).model_dump(mode="json")["experts"] == ["a"]


POOL: list[tuple[Data, tuple[str, ...], str]] = [
    ({"method": "slerp", "axes": {"weight": {"low": 0, "high": 1}}}, ("a", "b", "c"), "slerp is between two models"),
    (
        {"method": "slerp", "axes": {"weight": {"low": 0, "high": 1}}, "params": {"vectors": "deltas"}},
        ("a",),
        "here two experts; this space has a",
    ),
    ({"experts": ["mahts"]}, ("maths", "code"), "unknown expert 'mahts'; did you mean 'maths'?"),
    ({"experts": []}, ("maths",), "expected at least one"),
    ({"groups": [{"name": "g", "match": {"layers": [0, 4]}}]}, ("a",), "group 'g': layers [0, 4] go past the last one"),
]


@pytest.mark.parametrize(("data", "experts", "words"), POOL)
def test_spaces_that_do_not_fit_the_pool(data: Data, experts: tuple[str, ...], words: str, manifest_of: Any) -> None:
    """What only the pool tells is refused when the space is bound to it, in one line."""
    with pytest.raises(UserError) as caught:
        space_of(manifest_of(layers=4, experts=experts), **data)

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_named_experts_are_merged(m: Manifest) -> None:
    """`experts` leaves the others out; uniform is a share of those that are left."""
    space = space_of(m, experts=["math"])
    r = space.decode(space.default, m)

    assert [a.name for a in space.axes] == ["math.all.weight"]
    assert next(iter(r.blocks.values())).sources == {"math": {"weight": 1.0}}


def test_slerp_weight_of_the_only_expert_is_t(m: Manifest) -> None:
    """Between the base and one expert the weights are 1 - t and t; the ends are the models."""
    space = space_of(m, **{**SPACES["slerp with the base"], "groups": "all"})
    middle, zero, one = (space.decode(frozen_genome([t]), m).blocks.get("embed") for t in (0.3, 0.0, 1.0))

    assert middle is not None
    assert middle.sources == {"base": {"weight": 0.7}, "math": {"weight": 0.3}}
    assert zero is None
    assert one is not None
    assert one.sources == {"math": {"weight": 1.0}}


# -- the gradient by the genome ---------------------------------------------------

LAMBDA: Data = {"low": 0.2, "high": 2.0, "log": True, "default": 1.0}
SMOOTH: list[Data] = [
    {"groups": "all"},
    {"groups": "layers", "params": {"lambda": 0.4}},
    {"groups": {"buckets": 2}, "axes": {"weight": WEIGHT, "lambda": LAMBDA}},
    {"groups": "all", "axes": {"lambda": LAMBDA}, "params": {"weight": 0.3}, "experts": ["code"]},
    {"method": "linear", "groups": "layer-modules"},
    {"method": "linear", "groups": [{"name": "first", "match": {"layers": [0, 1]}}], "experts": ["math"]},
    {"method": "linear", "groups": "layers", "params": {"normalize": False}},
]


@pytest.mark.parametrize("data", SMOOTH, ids=str)
def test_the_gradient_is_the_slope(data: Data, m: Manifest) -> None:
    """For a loss that is linear in the weights, <G_b, W_b> summed over blocks: against central differences."""
    space = space_of(m, **data)
    rng = np.random.default_rng(1)
    weights = {n: rng.standard_normal((len(m.blocks), 5)) for n in m.hashes}
    slopes = rng.standard_normal((len(m.blocks), 5))
    differences = [weights["base"], *(weights[e] - weights["base"] for e in m.experts)]
    products = np.stack([(slopes * c).sum(axis=1) for c in differences], axis=1)
    g = frozen_genome(rng.integers(2000, 8000, len(space.axes)) / 10000)

    def loss(at: Any) -> float:
        rules, total = space.decode(frozen_genome(at), m).blocks, 0.0
        for b, name in enumerate(m.blocks):
            base, rule = weights["base"][b], rules.get(name)
            built = base
            if rule is not None:
                each = [(c["weight"], weights[s][b]) for s, c in rule.sources.items()]
                if rule.method == "task_arithmetic":
                    built = base + float(rule.params["lambda"]) * sum(w * (x - base) for w, x in each)
                else:
                    built = sum(w * x for w, x in each) / (sum(w for w, _ in each) if rule.params["normalize"] else 1)
            total += float(slopes[b] @ built)
        return total

    step = 1e-3
    expected = [(loss(g + step * e) - loss(g - step * e)) / (2 * step) for e in np.eye(len(g))]
    assert space.why_no_gradient() is None
    # Coefficients are rounded to 1e-6, which differences of 2e-3 see on axes whose values are no multiples of it.
    assert np.allclose(space.gradient(g, products, m), expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())


def test_weights_that_sum_to_nothing_have_no_slope(m: Manifest) -> None:
    """Where the base is built in the place of what cannot be normalised, the derivative is 0, and finite."""
    products = np.ones((len(m.blocks), 3))
    half = frozen_genome(np.array([0.75, 0.25]))  # 1 and 0
    for space, g in (
        (
            space_of(m, method="linear", axes={"weight": {"low": -1.0, "high": 1.0}}),
            frozen_genome(np.array([1.0, 0.0])),
        ),
        (space_of(m, method="linear", params={"normalize": False}), frozen_genome(np.array([0.25, 0.25]))),
    ):
        assert not space.decode(g, m).blocks
        assert np.array_equal(space.gradient(g, products, m), np.zeros(2))
        assert np.isfinite(space.gradient(half, products, m)).all()


def test_what_has_no_gradient_says_why(m: Manifest) -> None:
    """Methods that are not linear by name, and a choice of methods by its axis."""
    assert space_of(m, method="ties").why_no_gradient() == (
        "ties is not linear in its coefficients; use linear or task_arithmetic"
    )
    assert "dare_linear is not linear" in str(space_of(m, method="dare_linear").why_no_gradient())
    assert "axis 'method'" in str(space_of(m, method=["linear", "task_arithmetic"]).why_no_gradient())


# -- the library ------------------------------------------------------------


def test_the_library_has_its_entries() -> None:
    """The spaces that the issue promises are there."""
    assert set(entries("search_spaces")) >= {
        "one-weight-per-expert",
        "per-layer",
        "per-layer-and-module",
        "ties",
        "ties-per-layer",
        "coarse-to-fine",
        "linear",
        "slerp",
        "dare-ties",
        "any-method",
        "layer-swap",
        "spectral",
    }


@pytest.mark.parametrize("name", entries("search_spaces"))
@pytest.mark.parametrize("experts", [("math",), ("code", "math", "med")])
def test_library_spaces_decode_at_their_default(
    name: str, experts: tuple[str, ...], tmp_path: Any, manifest_of: Any
) -> None:
    """Every entry has a description, loads, binds to a pool, and its default point is a recipe of all experts."""
    loaded = resolve_space(name, tmp_path)
    assert loaded.description
    if name in ("slerp", "layer-swap"):  # of two models
        experts = experts[:2]
    m = manifest_of(layers=3, experts=experts)

    stages = loaded.stages if isinstance(loaded, StagedSpec) else ()
    for one in [s.space for s in stages] or [loaded]:
        assert isinstance(one, SpaceSpec)
        if isinstance(one.groups, Important):
            one = important_groups(one, np.ones(3), m)
        space = bind_space(one, m, "float32")
        r = space.decode(space.default, m)
        if name == "layer-swap":
            assert set(r.sources) >= set(experts)
            continue
        if one.route is not None and one.merges is None:  # routes begin with the first model as it is
            assert set(r.sources) == {"base"}
            continue
        assert set(r.blocks) == set(m.blocks)
        assert set(r.sources) == {"base", *experts}
        assert space.decode(space.encode(r, m), m).id == r.id


def test_library_stages_follow_one_another(m: Manifest, tmp_path: Any) -> None:
    """Every stage of the coarse-to-fine entry can start wherever the one before may end."""
    loaded = resolve_space("coarse-to-fine", tmp_path)
    assert isinstance(loaded, StagedSpec)
    spaces = [RuleSpace(s.space, m, "float32") for s in loaded.stages if isinstance(s.space, SpaceSpec)]
    assert len(spaces) == len(loaded.stages) >= 2

    for coarse, fine in itertools.pairwise(spaces):
        for corner in itertools.product((0.0, 0.5, 1.0), repeat=len(coarse.axes)):
            r = coarse.decode(frozen_genome(list(corner)), m)
            assert fine.decode(fine.encode(r, m), m).id == r.id
