"""Masks, positions and shared prefixes on stock transformers models: what several kinds of scorers rely on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.architectures import ARCHITECTURES


def masks(
    config: Any, segment: NDArray[np.int64], place: NDArray[np.int64], prefix: int, like: Tensor
) -> Tensor | dict[str, Tensor]:
    """Additive mask (B, 1, L, P + L): a token sees the prefix, its item's context and its own branch, causally.

    Models whose layers differ in their attention window get one by type of layer, as transformers takes them.
    """
    length = segment.shape[1]
    causal = np.tril(np.ones((length, length), dtype=bool))
    query, key = segment[:, :, None], segment[:, None, :]
    allowed = causal & ((query == key) | ((key == 0) & (query >= 0)))
    allowed = np.concatenate([np.ones((*segment.shape, prefix), dtype=bool), allowed], axis=2)
    columns = np.broadcast_to(np.arange(prefix), (segment.shape[0], prefix))
    back = place[:, :, None] - np.concatenate([columns, place], axis=1)[:, None, :]
    out = {}
    for kind, window in windows(config).items():
        seen = allowed if window is None else allowed & (back < window)
        mask = torch.zeros(seen.shape, dtype=torch.float32)
        mask.masked_fill_(~torch.from_numpy(seen), torch.finfo(torch.float16).min)
        out[kind] = mask[:, None].to(like.device, like.dtype)
    return out if len(out) > 1 else out.popitem()[1]


def windows(config: Any) -> dict[str, int | None]:
    """Type of layer -> sliding attention window in tokens, None for full attention."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    everywhere = ["full_attention" if window is None else "sliding_attention"]
    kinds = getattr(config, "layer_types", None) or everywhere
    return {k: int(window) if window is not None and k == "sliding_attention" else None for k in sorted(set(kinds))}


def takes_branches(config: Any) -> bool:
    """Whether masks and positions of our own may be given: for families where that was checked.

    Others may carry a recurrent state, count positions by themselves or read the mask in their own way.
    """
    return config.model_type in ARCHITECTURES


def prefix_cache(model: Any, prefix: NDArray[np.int32]) -> Any:
    """Keys and values of the shared prefix (P,), batch size 1, or None where it is empty."""
    if not len(prefix):
        return None
    from transformers import DynamicCache

    device = next(model.parameters()).device
    cache = DynamicCache()
    # Everything below the head: the prefix predicts nothing that is scored.
    model.base_model(
        input_ids=torch.from_numpy(prefix.astype(np.int64))[None].to(device),
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def expanded(cache: Any, rows: int) -> Any:
    """A cache of its own for one batch: the prefix's keys and values seen by every row."""
    from transformers import DynamicCache

    out = DynamicCache()
    for i, layer in enumerate(cache.layers):
        out.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), i)
    return out
