"""Routes on live models: every family, against plain transformers, the paper's own rule, and one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from evomerge.architectures import ARCHITECTURES
from evomerge.errors import UserError
from evomerge.manifest import Manifest
from evomerge.merge.bank import Bank
from evomerge.merge.builder import Builder
from evomerge.merge.live import live_model
from evomerge.merge.route import Router, Shared, check_routable
from evomerge.pool import ModelPool
from evomerge.recipe import Recipe
from tests.conftest import fine_tuned

TYPES = {"gemma2", "gemma3_text"}
"""Families whose tiny models mix types of layers."""


@dataclass
class Routed:
    """A pool of three models, one of another depth, live."""

    pool: ModelPool
    manifest: Manifest
    builder: Builder
    model: Any
    router: Router

    def follow(self, recipe: Recipe) -> None:
        self.builder.build(recipe)
        self.router.follow(recipe)

    def recipe(self, data: dict[str, Any]) -> Recipe:
        return Recipe.model_validate(data).canonical(self.manifest)

    def path(self, source: str) -> Recipe:
        """All of one model, in its own order."""
        hops = [{"from": source, "layer": i} for i in range(self.manifest.layers[source])]
        ends = dict.fromkeys(("embed", "final_norm", "head"), source)
        return self.recipe({"route": {**ends, "hops": hops}})


def opened(folders: dict[str, Path]) -> Routed:
    base, *_ = folders
    pool = ModelPool.open(folders[base], {n: p for n, p in folders.items() if n != base}, base)
    manifest = pool.manifest()
    builder = Builder(Bank.load(pool, manifest, torch.device("cpu")), "float32")
    model = live_model(folders[base], builder.views(), "float32")
    return Routed(pool, manifest, builder, model, Router(model, pool, builder))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def routed(request: pytest.FixtureRequest, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Routed:
    arch = request.param
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    shallow = {"num_hidden_layers": 3} | ({"layer_types": types} if arch in TYPES else {})
    deep = {"num_hidden_layers": 4} | (
        {"layer_types": [*types[1:], *types[1:2], "full_attention"]} if arch in TYPES else {}
    )
    base = tiny_model(arch, 1, **shallow)
    tuned = fine_tuned(base, tmp_path_factory.mktemp(arch) / "tuned", 5)
    return opened({"base": base, "tuned": tuned, "deep": tiny_model(arch, 2, **deep)})


WINDING = {
    "merge": [{"method": "task_arithmetic", "sources": {"tuned": {"weight": 0.5}}}],
    "route": {
        "hops": [
            {"from": "merged", "layer": 0, "scale": 0.7},
            {"from": "deep", "layer": 3, "scale": 1.3},
            {"from": "merged", "layer": 1, "attn_gain": 0.5},
            {"from": "tuned", "layer": 2, "mlp_gain": -0.8},
            {"from": "deep", "layer": 3, "scale": 0.6},
            {"from": "base", "layer": 2},
        ]
    },
}
TOKENS = torch.randint(5, 500, (2, 40), generator=torch.Generator().manual_seed(0))


def log_probabilities(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits.log_softmax(-1)  # type: ignore[no-any-return]


def stock(routed: Routed, source: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(routed.pool.checkpoints[source].path).eval()


def test_the_whole_of_a_model_is_that_model(routed: Routed) -> None:
    """All layers of any source, another depth included, in their order: plain transformers' bits."""
    for source in ("base", "tuned", "deep"):
        routed.follow(routed.path(source))

        assert torch.equal(log_probabilities(routed.model), log_probabilities(stock(routed, source))), source


def test_what_came_before_leaves_no_trace(routed: Routed) -> None:
    """A route, another one, none at all, the first again: the same bits, and the base is the base."""
    recipe = routed.recipe(WINDING)
    routed.follow(recipe)
    first = log_probabilities(routed.model)
    routed.follow(routed.path("deep"))
    routed.follow(routed.path("base"))

    assert torch.equal(log_probabilities(routed.model), log_probabilities(stock(routed, "base")))
    routed.follow(recipe)
    assert torch.equal(log_probabilities(routed.model), first)


def test_scales_are_the_papers(routed: Routed) -> None:
    """Folded gains are the rule of the paper, which multiplies the stream itself where it enters a layer.

    With an eps of 1e-12 for the norms, so that nothing but rounding is left between the two.
    """
    recipe = routed.recipe(WINDING)
    assert recipe.route is not None
    routed.follow(recipe)
    norms = [m for m in routed.model.modules() if hasattr(m, "variance_epsilon") or hasattr(m, "eps")]
    before = [(m, n, getattr(m, n)) for m in norms for n in ("variance_epsilon", "eps") if hasattr(m, n)]
    for m, n, _ in before:
        setattr(m, n, 1e-12)
    folded = log_probabilities(routed.model)
    handles = []
    for layer, hop in zip(
        routed.model.get_submodule(ARCHITECTURES[routed.model.config.model_type].stack), recipe.route.hops, strict=True
    ):
        layer.gains[:] = [hop.attn_gain, hop.mlp_gain]

        def entering(_m: Any, args: Any, kwargs: Any, scale: float = hop.scale) -> Any:
            if args:
                return (args[0] * scale, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * scale}

        handles.append(layer.register_forward_pre_hook(entering, with_kwargs=True))
    scaled = log_probabilities(routed.model)
    for handle in handles:
        handle.remove()
    for m, n, value in before:
        setattr(m, n, value)

    assert not torch.equal(scaled, folded)
    torch.testing.assert_close(scaled, folded, atol=3e-5, rtol=0)


def test_cached_generation_is_right(routed: Routed) -> None:
    """Every hop has its own place in the KV cache: with and without it the same tokens, repeats included."""
    routed.follow(routed.recipe(WINDING))

    def written(*, use_cache: bool) -> Tensor:
        with torch.inference_mode():
            return routed.model.generate(  # type: ignore[no-any-return]
                TOKENS[:1, :30],
                max_new_tokens=12,
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=0,
                eos_token_id=None,
            )

    assert torch.equal(written(use_cache=True), written(use_cache=False))


# -- shared beginnings ---------------------------------------------------------------------------------------------


def paths(routed: Routed) -> list[Recipe]:
    """Four candidates: two alike to the last hop, one that leaves them early, one that has nothing in common."""
    hops = WINDING["route"]["hops"]  # type: ignore[index]
    ends = [hops, [*hops[:5], {"from": "base", "layer": 1}], [*hops[:2], {"from": "deep", "layer": 0}], hops[1:]]
    return [routed.recipe({"merge": WINDING["merge"], "route": {"hops": h}}) for h in ends]


def computed(routed: Routed) -> Iterator[list[int]]:
    """The number of layers that were computed, counted while the generator is open."""
    count = [0]
    modules = {id(h.layer): h.layer for h in routed.router._hops.values()}
    handles = [m.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1)) for m in modules.values()]
    yield count
    for handle in handles:
        handle.remove()


def test_what_paths_have_in_common_is_computed_once(routed: Routed) -> None:
    """The same bits as one by one, and only what differs is computed."""
    recipes = paths(routed)
    alone = []
    for recipe in recipes:
        routed.follow(recipe)
        alone.append(log_probabilities(routed.model))

    router, layers = routed.router, []
    counting = computed(routed)
    count = next(counting)
    for i, recipe in enumerate(recipes):
        router.shared.expect(recipe.path, [r.path for r in recipes[i + 1 :]])
        routed.follow(recipe)
        count[0] = 0
        with router.sharing("these tokens"):
            assert torch.equal(log_probabilities(routed.model), alone[i])
        layers.append(count[0])
    next(counting, None)

    assert layers == [6, 1, 1, 5]
    router.shared.expect((), [])
    assert router.shared.used == 0


def test_other_passes_are_other_states(routed: Routed) -> None:
    """States of one pass are not those of the next, nor of another key."""
    recipes = paths(routed)
    other = TOKENS.flip(1)
    for recipe in recipes[:2]:
        routed.router.shared.expect(recipe.path, [r.path for r in recipes[1:2]])
        routed.follow(recipe)
        with routed.router.sharing("both"), torch.inference_mode():
            first, second = (routed.model(input_ids=t).logits for t in (TOKENS, other))
    routed.router.shared.clear()

    with torch.inference_mode():
        assert torch.equal(first, routed.model(input_ids=TOKENS).logits)
        assert torch.equal(second, routed.model(input_ids=other).logits)


def state(size: int) -> Tensor:
    return torch.zeros(size // 4)


def test_room_is_bounded() -> None:
    """The shortest beginnings go first, what does not fit is not kept, and what nobody wants any more is dropped."""
    shared = Shared(room=100)
    a, b, c = ("a",), ("a", "b"), ("a", "b", "c")

    shared.keep(a, 0, state(60))
    shared.keep(b, 0, state(60))
    assert (shared.used, set(shared.states)) == (60, {b})
    shared.keep(a, 1, state(60))
    assert (shared.used, set(shared.states)) == (60, {b})
    shared.keep(c, 0, state(400))
    assert set(shared.states) == set()
    shared.keep(c, 0, state(40))
    assert shared.longest((*c, "d"), 0)[0] == 3
    assert shared.longest((*c, "d"), 1) == (0, None)
    shared.expect(("x",), [("x", "y")])
    assert (shared.used, shared.wanted) == (0, {("x",)})


# -- refusals ------------------------------------------------------------------------------------------------------


def test_families_whose_folding_was_not_checked_are_refused(tiny_model: Any) -> None:
    """OLMo 2 normalises what its branches add: a scaled stream is another model."""
    with pytest.raises(UserError, match=r"layer routes are known for llama.*not for 'olmo2'"):
        check_routable(ModelPool.open(tiny_model("olmo2"), {}))


def test_layers_of_another_position_encoding_are_refused(tiny_model: Any) -> None:
    """The model has one rotary table."""
    other = tiny_model("llama", 3, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})

    with pytest.raises(UserError, match=r"expert 'other'.*rope_parameters is .*5000.*layers of both cannot"):
        check_routable(ModelPool.open(tiny_model("llama"), {"other": other}))
