"""Layer routes on a stock transformers model: its list of layers becomes the hops of a path.

Evolutionary Model Merge's data-flow space (arXiv 2403.13187, section 3.2). Nothing is copied: a hop is a module of its
own, with its own place in the KV cache, over the resident weights of a source or over the builder's buffer; what goes
over a layer repeatedly shares them. The stream is never scaled itself. What a path's scales and gains amount to, by
`Route.gains`, multiplies the outputs of the two branches of each hop, which is what the export folds into weights.

Candidates whose paths begin alike share the hidden states of what they have in common (`Shared`): the same bits as one
by one, since they are the same operations on the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.architectures import ARCHITECTURES
from evomerge.errors import RunError, UserError
from evomerge.merge.bank import Bank
from evomerge.merge.builder import Builder
from evomerge.merge.pipeline import BuildError
from evomerge.pool import ModelPool
from evomerge.recipe import MERGED, Recipe, Route, in_common

Steps = tuple[Any, ...]
"""A path or its beginning (`Recipe.path`)."""

ROOM = 1 << 30
"""Bytes of hidden states that are kept for candidates whose paths begin alike."""

MOST_HOPS = 2000
"""Hops whose modules are kept for later routes; each takes some tens of kB."""

SAME = (
    *("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "head_dim"),
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "rms_norm_eps"),
    *("layer_norm_eps", "layer_norm_epsilon", "sliding_window", "hidden_act", "hidden_activation"),
    *(
        "activation_function",
        "attn_logit_softcapping",
        "query_pre_attn_scalar",
        "max_position_embeddings",
        "use_parallel_residual",
    ),
    *(
        "use_bidirectional_attention",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
    ),
)
"""Settings that a path's layers have in common, since the model has them once."""


def check_routable(pool: ModelPool) -> None:
    """Raise UserError where layers of the pool cannot follow one another, or could not be exported so."""
    base = pool.checkpoints[pool.base]
    row = ARCHITECTURES.get(base.model_type)
    if row is None:
        raise UserError(
            f"{base.path}: layer routes are known for {', '.join(ARCHITECTURES)}, not for {base.model_type!r}: whether "
            "scales fold into its weights was not checked"
        )
    if getattr(base.stock.config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(
            f"{base.path}: scale_attn_by_inverse_layer_idx ties what a layer does to its place in the model"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for name, c in pool.checkpoints.items():
        for key in SAME:
            ours, theirs = (getattr(m.stock.config, key, None) for m in (base, c))
            if ours != theirs:
                raise UserError(
                    f"expert {name!r} ({c.path}): {key} is {theirs}, but the base's is {ours}; layers of both cannot "
                    "stand in one model"
                )
        # A model has rotary tables for the types of attention that its own layers have.
        kinds, known = (set(getattr(m.stock.config, "layer_types", None) or ()) for m in (c, base))
        if kinds - known:
            raise UserError(
                f"expert {name!r} ({c.path}): layer_types has {min(kinds - known)!r}, which none of the base's layers "
                "is; a route through it needs a base that has both"
            )
        ours, theirs = (getattr(m.stock.config, "layer_types", None) for m in (base, c))
        if c.layers == base.layers and ours != theirs:
            raise UserError(
                f"expert {name!r} ({c.path}): layer_types is {theirs}, but the base's is {ours}; models of as many "
                "layers must agree in it"
            )
        for tensor, t in c.tensors.items():
            if (found := row.layer_of(tensor)) is not None and shapes.setdefault(found[1], t.shape) != t.shape:
                raise UserError(
                    f"{c.path}: {tensor!r} has shape {list(t.shape)}, in other layers it is {list(shapes[found[1]])}; "
                    "a route's layers must be alike"
                )


@dataclass
class Shared:
    """Hidden states behind the beginnings of paths, by the pass that they belong to."""

    room: int = ROOM
    wanted: frozenset[Steps] = frozenset()
    """Beginnings that a later candidate has as well."""
    used: int = 0
    states: dict[Steps, dict[Any, Tensor]] = field(default_factory=dict)

    def expect(self, path: Steps, later: Sequence[Steps]) -> None:
        """Keep from now on what `later` candidates, in this order, have in common with this one."""
        wanted, common = set(), len(path)
        for other in later:
            common = min(common, in_common(path, other))
            if common:
                wanted.add(path[:common])
        self.wanted = frozenset(wanted)
        beginnings = {path[:n] for n in range(1, len(path) + 1)}
        for old in [p for p in self.states if p not in wanted and p not in beginnings]:
            self._drop(old)

    def keep(self, path: Steps, key: Any, state: Tensor) -> None:
        """Keep a state where there is room: the shortest beginnings, which save least, go first."""
        size = state.numel() * state.element_size()
        while self.used + size > self.room and self.states:
            shortest = min(self.states, key=len)
            if len(shortest) >= len(path):
                return
            self._drop(shortest)
        if self.used + size <= self.room:
            self.states.setdefault(path, {})[key] = state
            self.used += size

    def longest(self, path: Steps, key: Any) -> tuple[int, Tensor | None]:
        """Of the beginnings that this pass is known behind, the number of hops of the longest, and the state."""
        for n in range(len(path), 0, -1) if self.states else ():
            if (state := self.states.get(path[:n], {}).get(key)) is not None:
                return n, state
        return 0, None

    def clear(self) -> None:
        """Forget everything."""
        self.states.clear()
        self.used, self.wanted = 0, frozenset()

    def _drop(self, path: Steps) -> None:
        self.used -= sum(s.numel() * s.element_size() for s in self.states.pop(path).values())


class Router:
    """Sends tokens through a live model along the routes of recipes that its builder has built."""

    def __init__(self, model: Any, pool: ModelPool, builder: Builder) -> None:
        """Take a live model over the builder's buffer; it goes through its own layers until a route is followed."""
        self.shared = Shared()
        self.model = model
        self._pool, self._builder = pool, builder
        base = pool.checkpoints[pool.base]
        self._row = ARCHITECTURES.get(base.model_type)
        self._plain: tuple[Any, int, Any] | None = None
        self._resident: dict[tuple[str, int], nn.Module] = {}
        self._hops: dict[tuple[str, int, int], _Hop] = {}
        self._path: Steps = ()
        self._skipped = 0
        self._state: Tensor | None = None
        self._key: Any = None
        self._passes = 0
        self._sharing = self._filling = False

    # -- following a route ----------------------------------------------------------------------------------

    def follow(self, recipe: Recipe) -> None:
        """Go along the recipe's route, or through the model's own layers where it has none."""
        config = self.model.config
        if recipe.route is None:
            if self._plain is not None:
                self._place(*self._plain)
            self._path = ()
            return
        if self._plain is None:
            check_routable(self._pool)
            self._plain = (self._stack(), config.num_hidden_layers, getattr(config, "layer_types", None))
            self.model.base_model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._path = recipe.path
        hops = []
        for i, (hop, gains) in enumerate(zip(recipe.route.hops, recipe.route.gains(), strict=True)):
            hops.append(self._hop(hop.from_, hop.layer, i))
            hops[-1].gains[:] = gains
        self._place(nn.ModuleList(hops), len(hops), layer_types(recipe.route, self._pool))

    def distance(self) -> float:
        """How far the merged weights are from the base (`Builder.distance`). Raises RunError along a route."""
        if self._path:
            raise RunError("a layer route has no distance from the base, weight by weight")
        return self._builder.distance()

    def __deepcopy__(self, memo: Any) -> Router:
        """Itself: a copy of the live model goes through copies of its hops."""
        return self

    def _place(self, layers: nn.ModuleList, count: int, kinds: Any) -> None:
        assert self._row is not None
        parent, _, name = self._row.stack.rpartition(".")
        setattr(self.model.get_submodule(parent), name, layers)
        config = self.model.config
        config.num_hidden_layers = count
        if kinds is not None:
            config.layer_types = list(kinds)
            if hasattr(self.model.base_model, "has_sliding_layers"):
                self.model.base_model.has_sliding_layers = "sliding_attention" in kinds

    def _stack(self) -> Any:
        assert self._row is not None
        return self.model.get_submodule(self._row.stack)

    def _hop(self, source: str, layer: int, place: int) -> _Hop:
        key = (source, layer, place)
        if len(self._hops) > MOST_HOPS:
            self._hops.clear()
        if key not in self._hops:
            self._hops[key] = _Hop(self, _twin(self._layer(source, layer), self.model.config, place), place)
        return self._hops[key]

    def _layer(self, source: str, layer: int) -> nn.Module:
        """A layer of a source over its resident weights, in the dtype of what is built."""
        assert self._row is not None
        assert self._plain is not None
        own: nn.ModuleList = self._plain[0]
        if source == MERGED:
            return own[layer]
        if (source, layer) not in self._resident:
            weights = layer_weights(self._builder.bank, source, layer, self._builder.buffer.dtype)
            blank = self._pool.checkpoints[source].stock.model.get_submodule(f"{self._row.stack}.{layer}")
            twin = _twin(blank, self.model.config, layer)
            for module_name, module in twin.named_modules():
                for name in module._parameters:
                    tensor = weights.get(f"{module_name}.{name}" if module_name else name)
                    if tensor is not None:
                        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
                for name, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_meta:
                        module._buffers[name] = own[0].get_submodule(module_name)._buffers[name]
            self._resident[source, layer] = twin.eval()
        return self._resident[source, layer]

    # -- sharing what paths have in common --------------------------------------------------------------------

    @contextmanager
    def sharing(self, key: Any) -> Iterator[None]:
        """Within it the model's passes are known by `key` and their number: two candidates must make the same ones."""
        self._key, self._passes, self._sharing = key, 0, bool(self._path)
        try:
            yield
        finally:
            self._sharing, self._skipped, self._state = False, 0, None

    def _begin(self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        """Called before every pass: find how many hops of it are known already."""
        self._skipped, self._state = 0, None
        if not self._sharing:
            return
        self._passes += 1
        cache = kwargs.get("past_key_values")
        # A pass that fills a cache is for the keys and values of all hops.
        self._filling = cache is not None and cache.get_seq_length() == 0
        if not self._filling:
            self._skipped, self._state = self.shared.longest(self._path, (self._key, self._passes))

    def known(self, place: int) -> tuple[bool, Tensor | None]:
        """Whether this pass need not go through a hop, and its output where that is known."""
        return place < self._skipped, self._state if place == self._skipped - 1 else None

    def passed(self, place: int, state: Tensor) -> None:
        """Told what came out of a hop."""
        if (
            self._sharing
            and self.shared.wanted
            and not self._filling
            and (path := self._path[: place + 1]) in self.shared.wanted
        ):
            self.shared.keep(path, (self._key, self._passes), state)


class _Hop(nn.Module):
    """One layer at one place of a path. `gains` multiply what its attention and its MLP add."""

    def __init__(self, router: Router, layer: nn.Module, place: int) -> None:
        super().__init__()
        self.layer = layer
        self.gains = [1.0, 1.0]
        self._router, self._place = router, place
        assert router._row is not None
        for i, name in enumerate(router._row.branches):
            layer.get_submodule(name).register_forward_hook(partial(_multiplied, self.gains, i))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, unless this pass has it already."""
        skip, state = self._router.known(self._place)
        if skip:
            return hidden_states if state is None else state
        out: Tensor = self.layer(hidden_states, *args, **kwargs)
        self._router.passed(self._place, out)
        return out

    def __getattr__(self, name: str) -> Any:
        """What models ask of a layer beside calling it, for example its type of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def _multiplied(gains: list[float], i: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output if gains[i] == 1.0 else output * gains[i]


def layer_weights(bank: Bank, source: str, layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name within the layer -> weights of one source's layer: views of the bank where it has the dtype."""
    out = {}
    for block in bank.manifest.blocks_of(source).values():
        if block.layer != layer:
            continue
        for t in block.tensors:
            out[_within(t.name, layer)] = bank.flat[source][t.offset : t.offset + t.size].view(t.shape).to(dtype)
    return out


def layer_types(route: Route, pool: ModelPool) -> list[str] | None:
    """Each hop's type of attention, which is its source layer's; None where the family's layers have but one."""
    out = []
    for hop in route.hops:
        kinds = getattr(
            pool.checkpoints[pool.base if hop.from_ == MERGED else hop.from_].stock.config, "layer_types", None
        )
        if kinds is None:
            return None
        out.append(str(kinds[hop.layer]))
    return out


def routed_config(route: Route, pool: ModelPool) -> dict[str, Any]:
    """What a route changes of its base's config.json."""
    config = pool.checkpoints[pool.base].stock.config
    kinds = layer_types(route, pool)
    count = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return {count: len(route.hops)} | ({} if kinds is None else {"layer_types": kinds})


def _within(tensor: str, layer: int) -> str:
    """A tensor's name within its layer: what follows the first number, which is the layer's."""
    return tensor.partition(f".{layer}.")[2]


def routed_weights(route: Route, pool: ModelPool, builder: Builder) -> dict[str, Tensor]:
    """The plain model that a route amounts to: layer j's tensors are those of hop j, its gains folded into them.

    Of what the builder has built for the recipe. Folding is done in fp32 with one rounding. Raises UserError where
    scales do not fold into the pool's architecture.
    """
    check_routable(pool)
    row = ARCHITECTURES[pool.checkpoints[pool.base].model_type]
    built, dtype = builder.views(), builder.buffer.dtype
    out = {n: t for n, t in built.items() if row.layer_of(n) is None}
    for j, (hop, gains) in enumerate(zip(route.hops, route.gains(), strict=True)):
        if hop.from_ == MERGED:
            layer = {found[1]: t for n, t in built.items() if (found := row.layer_of(n)) and found[0] == hop.layer}
        else:
            layer = layer_weights(builder.bank, hop.from_, hop.layer, dtype)
        for name, tensor in layer.items():
            gain = dict(zip(row.branches, gains, strict=True)).get(name.rpartition(".")[0], 1.0)
            if gain != 1.0:
                tensor = tensor.float().add(row.offset).mul_(gain).sub_(row.offset).to(dtype)
            # A plain checkpoint has no two tensors in one place: what is gone over again is copied.
            if not bool(tensor.isfinite().all()):
                raise BuildError(f"NaN or infinite weights in {name} of hop {j + 1}, layer {hop.layer} of {hop.from_}")
            again = any((h.from_, h.layer) == (hop.from_, hop.layer) for h in route.hops[:j])
            out[f"{row.stack}.{j}.{name}"] = tensor.clone() if again else tensor
    return out


def _twin(layer: nn.Module, config: Any, place: int) -> nn.Module:
    """A copy of a layer's modules, not of its weights, at another place of the KV cache and of the live config."""
    memo: dict[int, Any] = {id(t): t for t in (*layer.parameters(), *layer.buffers())}
    for module in layer.modules():
        if (theirs := getattr(module, "config", None)) is not None:
            memo[id(theirs)] = config
    twin = copy.deepcopy(layer, memo)
    for module in twin.modules():
        if getattr(module, "layer_idx", None) is not None:
            module.layer_idx = place  # type: ignore[assignment]
    return twin
