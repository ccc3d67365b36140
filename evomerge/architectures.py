"""Which tensors form which block, by architecture. One row a family; no torch.

Blocks are `embed`, `layers.<i>.attention`, `layers.<i>.mlp`, `layers.<i>.norm`, `final_norm` and `head`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MODULES = ("embed", "attention", "mlp", "norm", "final_norm", "head")


@dataclass(frozen=True)
class Architecture:
    """Tensor-name patterns of one family: `layer` captures (index, rest); `modules` maps a prefix of rest."""

    embed: str
    final_norm: str
    head: str
    layer: re.Pattern[str]
    modules: Mapping[str, str]
    ignored: re.Pattern[str]

    def block_of(self, tensor: str) -> str | None:
        """The block a tensor belongs to, or None for a name this family does not have."""
        if tensor == self.embed:
            return "embed"
        if tensor == self.head:
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
    embed="model.embed_tokens.weight",
    final_norm="model.norm",
    head="lm_head.weight",
    layer=re.compile(r"model\.layers\.(\d+)\.(.+)"),
    modules={
        "self_attn.": "attention",
        "mlp.": "mlp",
        "input_layernorm.": "norm",
        "post_attention_layernorm.": "norm",
    },
    # Old checkpoints stored the rotary table, which transformers computes itself.
    ignored=re.compile(r".*rotary_emb\.inv_freq"),
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""Keyed by `model_type` of config.json."""


def block_order(block: str) -> tuple[int, int, int]:
    """Sort key: embedding, layers by index (attention, mlp, norm), final norm, head."""
    parts = block.split(".")
    if parts[0] == "layers":
        return (1, int(parts[1]), MODULES.index(parts[2]))
    return (0 if block == "embed" else 2, 0, MODULES.index(block))
