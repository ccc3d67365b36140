"""Routes in words and as a picture: every hop is told, and what is skipped, repeated or scaled stands out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from evomerge.config import load
from evomerge.history import History
from evomerge.manifest import Manifest
from evomerge.proposal import Evaluation
from evomerge.recipe import Recipe
from evomerge.report.coefficients import coefficient_maps
from evomerge.report.front import front, front_text
from evomerge.report.results import text_table
from evomerge.report.routes import path_text, route_figure, route_of, route_text, skipped
from evomerge.report.status import candidate, candidate_text, status_of, status_text

ManifestOf = Callable[..., Manifest]


def hops(source: str, *layers: int, **first: float) -> list[dict[str, Any]]:
    """Hops through layers of one source; `first` are the scale and gains of the first of them."""
    return [{"from": source, "layer": n, **(first if i == 0 else {})} for i, n in enumerate(layers)]


def recipe_of(manifest: Manifest, *path: list[dict[str, Any]], merge: Any = (), **ends: str) -> Recipe:
    data = {"base": manifest.base, "merge": list(merge), "route": {"hops": [*chain(*path)], **ends}}
    return Recipe.model_validate(data).canonical(manifest)


MERGE = [{"match": {"layers": [8, 11]}, "method": "task_arithmetic", "sources": {"math": {"weight": 0.5}}}]


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        (
            [hops("math", *range(5)), hops("base", *range(3, 8), scale=0.8), hops("merged", *range(8, 12))],
            {"merge": MERGE},
            "14 hops: math 0-4, base 3-7 (x0.8 in), merged 8-11",
        ),
        ([hops("base", *range(11))], {}, "11 hops: base 0-10; skips layer 11 of 12"),
        ([hops("base", 5)], {}, "1 hop: base 5; skips layers 0-4, 6-11 of 12"),
        (
            [hops("base", *range(12)), hops("base", *range(10, 12))],
            {},
            "14 hops: base 0-11, 10-11; repeats base 10-11",
        ),
        (
            [hops("base", *range(12)), hops("code", 11, 11, 11, attn_gain=0.5)],
            {},
            "15 hops: base 0-11, code 11 (3 times, attn x0.5 to x1); repeats code 11",
        ),
        (
            [hops("math", n, scale=0.9, mlp_gain=1.25) for n in range(12)],
            {},
            "12 hops: math 0-11 (x0.9 in each, mlp x1.25)",
        ),
        (
            [hops("math", n, scale=0.5 + n / 10) for n in range(12)],
            {"embed": "math", "head": "code"},
            "12 hops: math 0-11 (x0.5 to x1.6 in); embed of math; head of code",
        ),
        ([hops("base", *reversed(range(12)))], {}, "12 hops: base 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0"),
    ],
)
def test_words(manifest_of: ManifestOf, path: Any, more: Any, words: str) -> None:
    """Stretches, scales and gains, then what is skipped, repeated, and of another source at the ends."""
    manifest = manifest_of(12)

    assert route_text(recipe_of(manifest, *path, **more), manifest) == words


def test_words_of_merged_ends_and_of_segments(manifest_of: ManifestOf) -> None:
    """What rules or segments build at the ends is merged; a tied head is no end of its own."""
    manifest, tied = manifest_of(2), manifest_of(2, tied=True)
    rule = [{"match": "all", "method": "linear", "sources": {"math": {}, "code": {}}}]
    back = [hops("merged", 1, 0)]

    assert route_text(recipe_of(manifest, *back, merge=rule), manifest).endswith("; embed, final norm, head of merged")
    assert route_text(recipe_of(tied, *back, merge=rule), tied).endswith("; embed, final norm of merged")
    mixed = recipe_of(manifest, *back).model_dump(by_alias=True, exclude_defaults=True, exclude={"merge"})
    weights = {"base": [0.5, 1.0], "math": [0.5, 0.0]}
    mixed |= {"sources": {}, "segments": {"layout": manifest.layout, "cuts": [0, 64], "weights": weights}}
    mixed["route"]["hops"] = back[0]
    segments = Recipe.model_validate(mixed).canonical(manifest)
    assert route_text(segments, manifest) == "2 hops: merged 1, 0; embed, final norm, head of merged"


def test_long_routes_are_cut(manifest_of: ManifestOf) -> None:
    """Where only so many stretches are written out, the number of hops left is told."""
    manifest = manifest_of(4)
    long = recipe_of(manifest, *[hops("base", *range(4)) for _ in range(50)])
    assert long.route is not None

    assert path_text(long.route, 3) == "base 0-3, 0-3, 0-3, and 188 more"
    assert path_text(long.route) == "base " + ", ".join(["0-3"] * 50)
    assert path_text(long.route, 50) == path_text(long.route)


def test_a_source_of_another_depth(manifest_of: ManifestOf) -> None:
    """Its layers are other ones: going through them skips none of the base's, nor makes up for them."""
    manifest, deep = manifest_of(2, ("math",)), manifest_of(4, ())
    both = replace(
        manifest,
        layers={**manifest.layers, "deep": 4},
        hashes={**manifest.hashes, "deep": "f" * 64},
        layouts={"deep": deep.tensors},
    )
    recipe = recipe_of(both, hops("base", 0), hops("deep", 1, 2, 3))
    assert recipe.route is not None

    assert skipped(recipe.route, both) == [1]
    assert route_text(recipe, both) == "4 hops: base 0, deep 1-3; skips layer 1 of 2"
    figure = route_figure(recipe, both)
    assert [t["y"] for t in figure["data"] if t["name"] == "deep"] == [[1, 2, 3]]
    assert figure["layout"]["yaxis"]["range"][1] > 3


def test_names_of_strangers(manifest_of: ManifestOf) -> None:
    """A name from a damaged journal breaks no line and moves no cursor."""
    manifest = manifest_of(2, ("a\nb\x1b[2J",))
    words = route_text(recipe_of(manifest, hops("a\nb\x1b[2J", 1, 0)), manifest)

    assert words.isprintable()
    assert "a\\nb" in words


# -- picture ----------------------------------------------------------------------------------------------------


def drawn(figure: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {t["name"]: t for t in figure["data"]}


def test_the_picture_has_every_hop(manifest_of: ManifestOf) -> None:
    """Each hop is one mark of its source, hovered with its scale, gains and what they amount to."""
    manifest = manifest_of(6)
    recipe = recipe_of(
        manifest,
        hops("math", 0, 1),
        hops("base", 1, 3, scale=0.5, attn_gain=2.0),
        hops("math", 1, mlp_gain=-1.0),
    )
    assert recipe.route is not None
    traces = drawn(route_figure(recipe, manifest))
    marks = {x: (n, y, c) for n in ("math", "base") for x, y, c in _marks(traces[n])}

    assert {x: (name, y) for x, (name, y, _) in marks.items()} == {
        i: (h.from_, h.layer) for i, h in enumerate(recipe.route.hops, 1)
    }
    for i, (hop, gains) in enumerate(zip(recipe.route.hops, recipe.route.gains(), strict=True), 1):
        assert marks[i][2][:5] == pytest.approx([hop.scale, hop.attn_gain, hop.mlp_gain, *gains])
    assert [marks[i][2][5] for i in range(1, 6)] == ["", "", "", "", ", time 2"]
    assert traces["math"]["marker"]["color"] != traces["base"]["marker"]["color"]
    assert traces["math"]["marker"]["symbol"] != traces["base"]["marker"]["symbol"]
    assert traces["path"]["y"] == [0, 1, 1, 3, 1]


def _marks(trace: dict[str, Any]) -> list[tuple[int, int, Any]]:
    return list(zip(trace["x"], trace["y"], trace["customdata"], strict=True))


def test_skipped_repeated_and_scaled_layers_are_seen(manifest_of: ManifestOf) -> None:
    """Skipped layers where the path passes them, rings on repeated ones, a row for each factor that is not 1."""
    manifest = manifest_of(6)
    path = [hops("base", 1, 3), hops("math", 3, attn_gain=0.5), hops("base", 3, 4)]
    traces = drawn(route_figure(recipe_of(manifest, *path), manifest))

    skips = traces["skipped"]
    assert list(zip(skips["x"], skips["y"], strict=True)) == [(0.5, 0), (1.5, 2), (5.5, 5)]
    assert (traces["repeated"]["x"], traces["repeated"]["y"]) == ([4], [3])
    assert traces["factors"]["y"] == ["attention gain"]
    assert traces["factors"]["z"] == [[None, None, 0.5, None, None]]
    assert (traces["factors"]["zmin"], traces["factors"]["zmax"]) == (0.5, 1.5)
    assert traces["layers in order"]["x"] == [1, 6]
    assert traces["layers in order"]["y"] == [0, 5]

    plain = drawn(route_figure(recipe_of(manifest, hops("base", *range(6)), hops("math", 5)), manifest))
    assert not {"skipped", "repeated", "factors"} & set(plain)


@pytest.mark.parametrize("count", [1, 5, 100, 1000])
def test_any_length_fits(manifest_of: ManifestOf, count: int) -> None:
    """Every hop lies within the axes, and the figure stays of a page's height."""
    manifest = manifest_of(32)
    path = [hops("base", n % 32, scale=1.5) for n in range(count)]
    layout = route_figure(recipe_of(manifest, *path), manifest)["layout"]

    assert layout["xaxis"]["range"][0] < 1
    assert count < layout["xaxis"]["range"][1]
    assert layout["yaxis"]["range"][0] < 0
    assert layout["yaxis"]["range"][1] > 31
    assert layout["yaxis2"]["domain"][1] < layout["yaxis"]["domain"][0]
    assert 200 < layout["height"] < 800


def test_coefficients_of_merged_layers_only(manifest_of: ManifestOf) -> None:
    """Layers that a route does not go through as merged have none; a route without merged layers has no map."""
    manifest = manifest_of(3)
    rule = [{"method": "task_arithmetic", "sources": {"math": {"weight": 0.5}}}]
    through = recipe_of(manifest, hops("merged", 0), hops("code", 1), hops("merged", 2), hops("base", 0), merge=rule)
    around = recipe_of(manifest, hops("code", 0, 1), embed="math")

    (weight, _) = coefficient_maps({0: through, 1: around}, manifest)
    assert weight.columns == ("layer 0, embed", "layer 1", "layer 2, final norm, head")
    assert weight.values[0][weight.rows.index("math")] == [0.5, None, 0.5]
    assert 1 not in weight.values
    assert coefficient_maps({1: around}, manifest) == []


# -- a run ------------------------------------------------------------------------------------------------------

WORDS = {
    "around": "3 hops: base 0, two 0-1 (x0.9 in)",
    "through": (
        "3 hops: one 0, merged 1 (2 times, attn x0.8 to x1); repeats merged 1; embed, final norm, head of merged"
    ),
}


def numbers(history: History) -> tuple[int, int]:
    """The given routes: the one around the merged layers, the one through them."""
    around, through = (e.id for e in history.entries.values() if e.role == "given")
    return around, through


def test_words_in_texts_and_json(routed_run: History) -> None:
    """Show, status, the table and the front tell routes of candidates that have them, and none of others."""
    around, through = numbers(routed_run)

    for number, words in ((around, WORDS["around"]), (through, WORDS["through"])):
        data = candidate(routed_run, number)
        assert data["route"] == words == route_of(routed_run, number)
        text = candidate_text(routed_run, data)
        assert f"# route of {words}\n" in text
        back = Recipe.from_yaml(text).canonical(routed_run.manifest)
        assert back.id == routed_run.entry(number).recipe_id
    assert candidate(routed_run, 0)["route"] is None
    assert "# route" not in candidate_text(routed_run, candidate(routed_run, 0))
    state = status_of(routed_run)
    assert state["route"] == WORDS["through"]
    assert f"winner: candidate {through}\nits route: {WORDS['through']}" in status_text(state)
    assert f"the winner's route: {WORDS['through']}" in text_table(routed_run)
    assert {m["id"]: m["route"] for m in front(routed_run)["members"]} == dict(
        zip((around, through), WORDS.values(), strict=True)
    )
    for words in WORDS.values():
        assert f"route: {words}\n" in front_text(front(routed_run))
    of_base = replace(routed_run, final={**(routed_run.final or {}), "winner": 0, "front": [0]})
    assert status_of(of_base)["route"] is None
    assert "route" not in text_table(of_base) + front_text(front(of_base))


def test_a_live_run_tells_its_best_route(small_experiment: Path, routed_run: History) -> None:
    """While there is no winner it is the best so far's; several objectives have no best."""
    around, _ = numbers(routed_run)
    live = replace(routed_run, final=None, stopped=False)
    found = live.entry(around).scores("search")
    assert found is not None
    perfect = Evaluation("ok", {t: {m: 0 * x for m, x in metrics.items()} for t, metrics in found.items()})
    entries = {**live.entries, around: replace(live.entry(around), results={"search": perfect})}
    one = replace(live, experiment=load(small_experiment), entries=entries)

    assert status_of(live)["route"] is None
    assert status_of(one)["best"] == around
    assert f"\nits route: {WORDS['around']}\n" in status_text(status_of(one)) + "\n"
