"""Layer swapping: which layer comes from where, total decode, encode as its inverse."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import UserError
from evomerge.layer_swap import LayerSwapSpace
from evomerge.manifest import Manifest
from evomerge.proposal import frozen_genome
from evomerge.recipe import Recipe
from evomerge.schema import validated
from evomerge.space import SpaceSpec

Data = dict[str, Any]
FIXED = {"outer": "math", "inner": "code", "embed": "outer", "head": "inner"}


def space_of(m: Manifest, swap: Data | None = None, **axes: tuple[int, int]) -> LayerSwapSpace:
    bounds = {n: {"low": low, "high": high} for n, (low, high) in axes.items()}
    return LayerSwapSpace(validated(SpaceSpec, {"layer_swap": swap or {}, "axes": bounds}, "space"), m, "float32")


def sources(r: Recipe, m: Manifest) -> dict[str, str]:
    """Block -> the names of the models it is the mean of."""
    return {b: "+".join(r.blocks[b].sources) if b in r.blocks else m.base for b in m.blocks}


def at(space: LayerSwapSpace, **values: Any) -> Any:
    return frozen_genome([a.unit(values.get(a.name, a.default)) for a in space.axes])


def test_layers_come_from_where_they_should(manifest_of: Any) -> None:
    """Two layers below, one above, one averaged at each end; embedding and head as given."""
    m = manifest_of(layers=8)
    space = space_of(m, FIXED, bottom=(0, 4), top=(0, 4), transition=(0, 2))
    r = space.decode(at(space, bottom=2, top=1, transition=1), m)

    both = "code+math"
    expected = ["math", "math", both, "code", "code", "code", both, "math"]
    found = sources(r, m)
    assert [found[f"layers.{i}.mlp"] for i in range(8)] == expected
    assert [found[f"layers.{i}.attention"] for i in range(8)] == expected
    assert (found["embed"], found["final_norm"], found["head"]) == ("math", "code", "code")
    assert {r.method for r in r.blocks.values()} == {"linear"}


def test_no_layers_below_means_no_transition_there(manifest_of: Any) -> None:
    """A run of no layers has no transition; with none at all the inner model keeps every layer."""
    m = manifest_of(layers=4)
    space = space_of(m, FIXED, bottom=(0, 2), top=(0, 2), transition=(0, 2))
    top = sources(space.decode(at(space, bottom=0, top=1, transition=1), m), m)
    none = sources(space.decode(at(space, bottom=0, top=0, transition=2), m), m)

    assert [top[f"layers.{i}.norm"] for i in range(4)] == ["code", "code", "code+math", "math"]
    assert {none[f"layers.{i}.norm"] for i in range(4)} == {"code"}


def test_default_bounds_scale_with_the_layers(manifest_of: Any) -> None:
    """8, 4 and 2 of 32 layers; at least one each."""
    for layers, expected in ((32, [8, 4, 2]), (5, [1, 1, 1])):
        space = space_of(manifest_of(layers=layers), FIXED)
        assert [(a.kind, a.low, a.high) for a in space.axes] == [("int", 0, high) for high in expected]


def test_what_is_not_given_is_searched(manifest_of: Any) -> None:
    """outer, inner, embed and head become categorical axes; one expert has the base as its partner."""
    three, one = (space_of(manifest_of(layers=4, experts=e)) for e in (("a", "b", "c"), ("a",)))

    assert [a.name for a in three.axes] == ["outer", "inner", "embed", "head", "bottom", "top", "transition"]
    assert [a.choices for a in three.axes[:3]] == [("a", "b", "c"), ("a", "b", "c"), ("outer", "inner", "base")]
    assert one.axes[0].choices == ("a", "base")
    assert len(three.probes()) == 6
    described = three.describe()
    assert described["method"] == "layer_swap"
    assert described["bounds"]["outer"] == ["a", "b", "c"]


@pytest.mark.parametrize("swap", [{}, FIXED, {"outer": "base", "embed": "base"}, {"inner": "math"}])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_decode_is_total_and_encode_inverts_it(swap: Data, data: st.DataObject, manifest_of: Any) -> None:
    """Every point of the cube is a canonical recipe, and encode gives a point that decodes to the same one."""
    m = manifest_of(layers=data.draw(st.integers(1, 6)), tied=data.draw(st.booleans()))
    layers = m.layers[m.base]
    space = space_of(m, swap, bottom=(0, layers), top=(0, layers), transition=(0, min(2, layers)))
    genes = st.floats(0, 1)
    g = frozen_genome(data.draw(st.lists(genes, min_size=len(space.axes), max_size=len(space.axes))))

    r = space.decode(g, m)

    assert r.canonical(m).id == r.id
    assert Recipe.from_yaml(r.to_yaml()).canonical(m).id == r.id
    assert space.decode(space.encode(r, m), m).id == r.id


def test_every_point_of_a_small_space(manifest_of: Any) -> None:
    """All 16 combinations of two counts decode to what the definition says, and encode again."""
    m = manifest_of(layers=3)
    space = space_of(m, FIXED, bottom=(0, 3), top=(0, 3), transition=(0, 1))
    for bottom, top in itertools.product(range(4), range(4)):
        r = space.decode(at(space, bottom=bottom, top=top, transition=0), m)
        found = sources(r, m)
        for i in range(3):
            assert found[f"layers.{i}.mlp"] == ("math" if i < bottom or i >= 3 - top else "code")
        assert space.decode(space.encode(r, m), m).id == r.id


@pytest.mark.parametrize(
    "text",
    [
        "merge: [{method: linear, sources: {math: {}, code: {weight: 0.5}}}]",
        "merge: [{method: task_arithmetic, sources: {math: {}}}]",
        "merge: [{match: {module: mlp}, method: linear, sources: {math: {}}}, {method: linear, sources: {code: {}}}]",
        "merge: []",
    ],
)
def test_encode_refuses_what_is_no_swap(text: str, manifest_of: Any) -> None:
    """Other weights, methods, modules apart, and models that are not swapped have no point in the space."""
    m = manifest_of(layers=4)

    with pytest.raises(ValueError, match="cannot express"):
        space_of(m).encode(Recipe.from_yaml(text).canonical(m), m)


def test_an_expert_alone_can_be_encoded(manifest_of: Any) -> None:
    """Where both models are searched, a baseline of one expert is a point: outer and inner are the same."""
    m = manifest_of(layers=4)
    r = Recipe.from_yaml("merge: [{method: linear, sources: {math: {}}}]").canonical(m)
    space = space_of(m)

    assert space.decode(space.encode(r, m), m).id == r.id


@pytest.mark.parametrize(
    ("swap", "axes", "words"),
    [
        ({"outer": "mth"}, {}, "layer_swap.outer: unknown source 'mth'; did you mean 'math'?"),
        ({}, {"bottom": (0, 9)}, "bottom: the model has 4 layers, but high is 9"),
    ],
)
def test_swaps_that_do_not_fit_the_pool(swap: Data, axes: Any, words: str, manifest_of: Any) -> None:
    """Unknown models and more layers than there are, are refused in one line."""
    with pytest.raises(UserError) as caught:
        space_of(manifest_of(layers=4), swap, **axes)

    assert words in str(caught.value)


def test_decode_refuses_what_is_no_genome(manifest_of: Any) -> None:
    """A vector of another length or off the cube is no point."""
    space = space_of(manifest_of(), FIXED)
    for genes in ([0.5], [0.5, 0.5, 1.5]):
        with pytest.raises(ValueError, match=r"genes in \[0, 1\]"):
            space.decode(np.array(genes), manifest_of())
