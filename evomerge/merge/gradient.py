"""The derivative of a loss by merge coefficients, from one backward pass and without a whole gradient in memory.

Where a block is linear in its coefficients, W_b = theta_0 + sum_k w_bk tau_k, the chain rule leaves one inner product
for each of them: dL/dw_bk = <dL/dW_b, tau_k>. Every parameter's gradient is multiplied with the sources as soon as
the backward pass has it, and freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evomerge.manifest import Manifest
from evomerge.merge.bank import Bank

CHUNK = 1 << 20
"""Elements that are multiplied at a time: temporaries of a few MiB, and sums that do not depend on the device."""
RECOMPUTE_ABOVE = 2**30
"""Bytes of activations in one batch above which layers are run again in the backward pass instead of being kept."""


@contextmanager
def inner_products(model: Any, bank: Bank) -> Iterator[Tensor]:
    """<dL/dW_b, c_k>, summed over every `loss.backward()` within, shape (n_blocks, 1 + n_experts), float64.

    Blocks are in the manifest's order; c_0 = theta_0 is the base, c_k = theta_k - theta_0 the difference of expert k.
    `model` is the live one over this bank's manifest. It is left as it was: no gradients, none wanted, no hooks.
    """
    manifest = bank.manifest
    rows = {name: n for n, name in enumerate(manifest.blocks)}
    names = (manifest.base, *manifest.experts)
    sums = torch.zeros(len(rows), len(names), dtype=torch.float64, device=bank.flat[manifest.base].device)
    wanted: list[Tensor] = []
    handles = []
    try:
        infos = {t.name: t for t in manifest.tensors}
        for name, tensor in model.state_dict(keep_vars=True).items():
            info = infos.get(name)
            if info is None or not tensor.is_floating_point():
                continue  # not merged, or the second name of a tied parameter, whose gradient has both parts
            vectors = [bank.flat[n][info.offset : info.offset + info.size] for n in names]
            tensor.requires_grad_(True)
            wanted.append(tensor)
            add = partial(_add, sums[rows[info.block]], vectors)
            handles.append(tensor.register_post_accumulate_grad_hook(add))
        with torch.enable_grad():
            yield sums
    finally:
        for handle in handles:
            handle.remove()
        for tensor in wanted:
            tensor.requires_grad_(False)
            tensor.grad = None


def _add(row: Tensor, vectors: list[Tensor], tensor: Tensor) -> None:
    """Add one parameter's part to its block's row (1 + n_experts,), and free its gradient."""
    assert tensor.grad is not None
    gradient = tensor.grad.reshape(-1)
    for at in range(0, len(gradient), CHUNK):
        part = slice(at, at + CHUNK)
        g, base = gradient[part].float(), vectors[0][part].float()
        row[0] += (g * base).sum(dtype=torch.float64)
        for k, vector in enumerate(vectors[1:], 1):
            row[k] += (vector[part].float() - base).mul_(g).sum(dtype=torch.float64)
    tensor.grad = None


def activation_bytes(manifest: Manifest, tokens: int, itemsize: int) -> int:
    """What a forward pass keeps for the backward one, roughly: inputs and outputs of every matrix of the layers."""
    tensors = [t for b in manifest.blocks.values() if b.layer is not None for t in b.tensors]
    return tokens * itemsize * sum(sum(t.shape[-2:]) for t in tensors if len(t.shape) > 1)


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a layer keeps its input and runs again in the
    backward pass. A third more work, the same numbers.

    Not by transformers' own switch, which works in training mode only, where dropout would be on.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is there again
