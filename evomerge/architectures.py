"""Which tensors form which block, by architecture. One row a family; no torch.

Blocks are `embed`, `layers.<i>.attention`, `layers.<i>.mlp`, `layers.<i>.norm`, `final_norm` and `head`.
Names are those of transformers' live models; what a checkpoint calls them is `stock.py`'s business. Families
without a row are derived from the stock model's names by `derived_block`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MODULES = ("embed", "attention", "mlp", "norm", "final_norm", "head")


@dataclass(frozen=True)
class Architecture:
    """Tensor-name patterns of one family: `layer` captures (index, rest); `modules` maps a prefix of rest."""

    embed: tuple[str, ...]
    final_norm: str
    layer: re.Pattern[str]
    modules: Mapping[str, str]
    head: tuple[str, ...] = ("lm_head.weight", "lm_head.bias")
    branches: tuple[str, str] = ("self_attn.o_proj", "mlp.down_proj")
    """The modules of a layer whose outputs its two branches add to the residual stream: attention's and the MLP's."""
    offset: float = 0.0
    """What a branch's last module adds to its weight: 1 for Gemma's norms, which multiply by 1 + weight."""

    @property
    def stack(self) -> str:
        """The name of the list of layers in the live model."""
        return self.layer.pattern.partition(r"\.(\d+)")[0].replace("\\", "")

    def layer_of(self, tensor: str) -> tuple[int, str] | None:
        """(layer, name within it) of a layer's tensor."""
        found = self.layer.fullmatch(tensor)
        return None if found is None else (int(found[1]), found[2])

    def block_of(self, tensor: str) -> str | None:
        """The block a tensor belongs to, or None for a name this family does not have."""
        if tensor in self.embed:
            return "embed"
        if tensor in self.head:
            return "head"
        if tensor.rpartition(".")[0] == self.final_norm:
            return "final_norm"
        found = self.layer.fullmatch(tensor)
        if found is None:
            return None
        index, rest = found.groups()
        for prefix, module in self.modules.items():
            if rest.startswith(prefix):
                return f"layers.{int(index)}.{module}"
        return None


_LLAMA = Architecture(
    embed=("model.embed_tokens.weight",),
    final_norm="model.norm",
    layer=re.compile(r"model\.layers\.(\d+)\.(.+)"),
    modules={
        "self_attn.": "attention",
        "mlp.": "mlp",
        "input_layernorm.": "norm",
        "post_attention_layernorm.": "norm",
    },
)
_GEMMA2 = Architecture(
    embed=_LLAMA.embed,
    final_norm=_LLAMA.final_norm,
    layer=_LLAMA.layer,
    modules={
        **_LLAMA.modules,
        "pre_feedforward_layernorm.": "norm",
        "post_feedforward_layernorm.": "norm",
    },
    branches=("post_attention_layernorm", "post_feedforward_layernorm"),
    offset=1.0,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi3": _LLAMA,
    "phi": Architecture(
        embed=_LLAMA.embed,
        final_norm="model.final_layernorm",
        layer=_LLAMA.layer,
        modules=_LLAMA.modules,
        branches=("self_attn.dense", "mlp.fc2"),
    ),
    "gpt2": Architecture(
        embed=("transformer.wte.weight", "transformer.wpe.weight"),
        final_norm="transformer.ln_f",
        layer=re.compile(r"transformer\.h\.(\d+)\.(.+)"),
        modules={"attn.": "attention", "mlp.": "mlp", "ln_1.": "norm", "ln_2.": "norm"},
        branches=("attn.c_proj", "mlp.c_proj"),
    ),
    "gpt_neox": Architecture(
        embed=("gpt_neox.embed_in.weight",),
        final_norm="gpt_neox.final_layer_norm",
        layer=re.compile(r"gpt_neox\.layers\.(\d+)\.(.+)"),
        modules={
            "attention.": "attention",
            "mlp.": "mlp",
            "input_layernorm.": "norm",
            "post_attention_layernorm.": "norm",
        },
        branches=("attention.dense", "mlp.dense_4h_to_h"),
    ),
}
"""Keyed by `model_type` of config.json. The scorer's branches are checked against plain transformers for each."""


# -- families without a row -----------------------------------------------------------------------------------

_WITHIN = (
    ("norm", re.compile(r"norm|(^|_)ln(_|\d|$)"), True),
    ("attention", re.compile(r"attn|attention"), True),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|^ff$|^fc_?\d|moe|experts"), True),
    ("attention", re.compile(r"mixer|mamba|ssm|conv|recurrent|temporal|rg_lru"), False),
)
"""(module, what a part of a name says, whether it says so): what mixes tokens without attention counts as it."""
_EMBED = re.compile(r"embed|wpe|position")


def derived_block(tensor: str, layer: re.Pattern[str], embed: frozenset[str], head: frozenset[str]) -> tuple[str, bool]:
    """(block, whether the name says so) of a tensor of any causal language model.

    `layer` captures (index, rest) as in `Architecture`; `embed` and `head` are the tensors of the two
    embeddings. Within a layer the first part of the name that speaks of norm, attention or MLP decides, and what
    speaks of none counts as MLP. Outside, positions and what is named after the embedding go with it, other
    norms are the final norm, and the rest counts as head.
    """
    if tensor in embed:
        return "embed", True
    if tensor in head:
        return "head", True
    found = layer.fullmatch(tensor)
    if found is not None:
        index, rest = found.groups()
        for part in rest.split("."):
            for module, pattern, sure in _WITHIN:
                if pattern.search(part):
                    return f"layers.{int(index)}.{module}", sure
        return f"layers.{int(index)}.mlp", False
    norm = any(_WITHIN[0][1].search(part) for part in tensor.split("."))
    if _EMBED.search(tensor):
        return "embed", not norm
    return ("final_norm", True) if norm else ("head", False)


def block_order(block: str) -> tuple[int, int, int]:
    """Sort key: embedding, layers by index (attention, mlp, norm), final norm, head."""
    parts = block.split(".")
    if parts[0] == "layers":
        return (1, int(parts[1]), MODULES.index(parts[2]))
    return (0 if block == "embed" else 2, 0, MODULES.index(block))
