"""The stock transformers model of a config.json: its parameters, their blocks, and what checkpoints call them.

The model is built on torch's meta device, so names and shapes cost no memory. What transformers does to the names
of a checkpoint while loading it (old prefixes, renamed modules, experts fused into one tensor) is done here by
transformers' own tables and functions, never by a copy of them. No code of a checkpoint is ever run.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.architectures import ARCHITECTURES, derived_block
from evomerge.errors import UserError, nearest

MAX_LAYERS = 1000
"""More are taken for a broken config.json; the largest models have about 130."""

_IGNORED = re.compile(r".*rotary_emb\.inv_freq|.*(attn|attention)\.(masked_bias|bias)|(.*\.)?position_ids")
"""What old checkpoints store beside the weights: rotary tables, causal masks and positions, computed today."""


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that transformers turns into others while loading, for example experts into one tensor."""

    target: str
    sources: tuple[tuple[str, str], ...]
    """(pattern, stored name), in transformers' order."""
    converter: Any
    model: Any

    def __call__(self, tensor_of: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """parameter name -> tensor, from the stored tensors that `tensor_of` reads."""
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.target, name, pattern, tensor_of(name))
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}


@dataclass(frozen=True)
class Placement:
    """Where a checkpoint's tensors belong.

    `plain` maps parameter -> stored name, `aliases` the same for further names of tied parameters; `foreign` are
    stored names that the model has no place for.
    """

    plain: Mapping[str, str]
    conversions: tuple[Conversion, ...]
    aliases: Mapping[str, str]
    foreign: tuple[str, ...]


class Stock:
    """What transformers builds for one config.json."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Build on the meta device. Raises UserError for what is no causal language model of transformers."""
        self.model_type = config.get("model_type")
        self.config = stock_config(folder, config)
        self.model: Any = stock_model(folder, self.config, torch.float32, meta=True)
        self.layers = int(self.config.num_hidden_layers)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Parameter (or stored buffer) -> shape, in the model's order; tied ones under their first name only."""
        self.aliases: dict[str, str] = {}
        """Further names of tied parameters -> the first."""
        first: dict[int, str] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) in first:
                self.aliases[name] = first[id(tensor)]
            else:
                first[id(tensor)] = name
                self.shapes[name] = tuple(tensor.shape)
        with _one_line(f"{folder}: transformers finds no embeddings of architecture {self.model_type!r}"):
            inputs = _own(self.model, self.model.get_input_embeddings())
            outputs = _own(self.model, self.model.get_output_embeddings())
        self.embed = frozenset(self.aliases.get(n, n) for n in inputs)
        self.head = frozenset(self.aliases.get(n, n) for n in outputs) - self.embed
        if not inputs or not outputs:
            raise UserError(f"{folder}: architecture {self.model_type!r} has no token embedding or no language head")
        self.rows = self.embed | self.head
        """Parameters with one row a token of the vocabulary."""
        self.blocks, self.notes = self._blocks(folder)

    @property
    def tied(self) -> bool:
        """True where the head shares the embedding's weights."""
        return any(a in self.embed for a in self.aliases.values())

    @property
    def context_length(self) -> int:
        """Tokens that the model takes; 2**30 where config.json sets no limit."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else 1 << 30

    def _blocks(self, folder: Path) -> tuple[dict[str, str], tuple[str, ...]]:
        """Parameter -> block by the table, else by the parameters' names; and what was decided without a name."""
        row = ARCHITECTURES.get(str(self.model_type))
        layer = None
        out: dict[str, str] = {}
        unsure: dict[str, str] = {}
        for name in self.shapes:
            block = row.block_of(name) if row is not None else None
            if block is None:
                layer = layer or self._layer_pattern(folder)
                block, sure = derived_block(name, layer, self.embed, self.head)
                if not sure:
                    found = layer.fullmatch(name)
                    part = found[2].split(".")[0] if found else name.rpartition(".")[0] or name
                    unsure[part] = block.split(".")[-1]
            out[name] = block
        notes = [f"{self.model_type}: tensors of {p!r} are counted as {m}" for p, m in unsure.items()]
        for part in sorted(self.model._keep_in_fp32_modules_strict or ()):
            if any(part in n for n in out):
                notes.append(
                    f"{self.model_type}: transformers computes {part!r} in float32; only with models.dtype float32 are "
                    "scores exactly those of the export"
                )
        return out, tuple(notes)

    def _layer_pattern(self, folder: Path) -> re.Pattern[str]:
        """The one list of tensors that is numbered from 0 to the last layer."""
        numbers: dict[str, set[int]] = {}
        for name in self.shapes:
            if found := re.match(r"(.+?)\.(\d+)\.", name):
                numbers.setdefault(found[1], set()).add(int(found[2]))
        whole = [p for p, seen in numbers.items() if seen == set(range(self.layers))]
        if len(whole) != 1 or len(numbers) != 1:
            raise UserError(
                f"{folder}: the layers of architecture {self.model_type!r} are not one list of tensors numbered from "
                f"0 to {self.layers - 1}, so it cannot be merged layer by layer"
            )
        return re.compile(re.escape(whole[0]) + r"\.(\d+)\.(.+)")

    # -- checkpoints ----------------------------------------------------------------------------------------

    @cached_property
    def _mapping(self) -> tuple[list[Any], list[Any], dict[str, Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(self.model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        return renamings, converters, {p: c for c in converters for p in c.source_patterns}

    def place(self, folder: Path, stored: Iterable[str]) -> Placement:
        """Find the parameter of every stored tensor, as from_pretrained does. Raises UserError for one stored twice."""
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        renamings, converters, by_pattern = self._mapping
        known = self.model.state_dict(keep_vars=True)
        prefix = self.model.base_model_prefix
        ignored = [re.compile(p) for p in self.model._keys_to_ignore_on_load_unexpected or ()]
        plain: dict[str, str] = {}
        aliases: dict[str, str] = {}
        foreign: list[str] = []
        collected: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        for name in sorted(stored, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if renamed not in known and name in known:
                renamed, pattern = name, None
            if renamed not in known:
                if _IGNORED.fullmatch(name) or any(p.search(renamed) for p in ignored):
                    continue
                foreign.append(name)
            elif pattern is not None:
                collected.setdefault(renamed, (by_pattern[pattern], []))[1].append((pattern, name))
            elif (plain if renamed in self.shapes else aliases).setdefault(renamed, name) != name:
                raise UserError(f"{folder}: the tensors {plain.get(renamed)!r} and {name!r} are the same parameter")
        conversions = tuple(Conversion(t, tuple(s), c, self.model) for t, (c, s) in collected.items())
        return Placement(plain, conversions, aliases, tuple(foreign))

    def reverted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters as save_pretrained stores them: the conversions undone."""
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self.model, dict(weights)))


def stock_config(folder: Path, config: Mapping[str, Any]) -> Any:
    """transformers' view of config.json. Raises UserError for what is no causal language model it knows."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own_code = "; it brings code of its own, which is never run" if "auto_map" in config else ""
        raise UserError(
            f"{folder}: architecture {kind!r} is not a causal language model of the installed transformers"
            f"{own_code or nearest(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
        )
    with _one_line(f"{folder / 'config.json'}: transformers cannot read it"):
        parsed = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = parsed.get_text_config(decoder=True)
    if getattr(parsed, "is_encoder_decoder", False):
        raise UserError(f"{folder}: architecture {kind!r} is an encoder-decoder; only decoders can be merged")
    if kind not in ARCHITECTURES and getattr(parsed, "is_decoder", None) is False:
        raise UserError(f"{folder}: architecture {kind!r} is an encoder (is_decoder is false in its config.json)")
    if text is not parsed:
        raise UserError(
            f"{folder}: architecture {kind!r} is multi-modal; expected a text-only checkpoint (for gemma3 one of type "
            "gemma3_text), so save its language model as one first"
        )
    layers = getattr(parsed, "num_hidden_layers", None)
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS:
        raise UserError(
            f"{folder / 'config.json'}: num_hidden_layers should be a whole number up to {MAX_LAYERS}, got {layers!r}"
        )
    # The config names how a quantised checkpoint was stored; what is read here is stored in full precision.
    if hasattr(parsed, "quantization_config"):
        del parsed.quantization_config
    return parsed


def stock_model(folder: Path, config: Any, dtype: torch.dtype, *, meta: bool = False) -> Any:
    """The uninitialised model, with transformers' own choice of attention. Raises UserError for a bad config.

    Its attention is from_pretrained's too: some architectures (Gemma 2's soft caps) are wrong in any other.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    device = torch.device("meta") if meta else contextlib.nullcontext()
    with _one_line(f"{folder / 'config.json'}: transformers cannot build it"), no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model.tie_weights()
    return model


def _own(model: Any, module: Any) -> list[str]:
    """Names of the parameters of one submodule, under all names that they have."""
    if module is None:
        return []
    own = {id(p) for p in module.parameters()}
    return [n for n, t in model.state_dict(keep_vars=True).items() if id(t) in own]


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn whatever transformers makes of untrusted configuration into one line."""
    try:
        yield
    except Exception as e:
        raise UserError(f"{what} ({' '.join(str(e).split())[:300] or type(e).__name__})") from None
