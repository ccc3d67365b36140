"""The live model: a stock transformers model whose parameters are views of the builder's buffer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import UserError
from evomerge.pool import TORCH_DTYPES, read_json
from evomerge.stock import stock_config, stock_model


def live_model(folder: Path, views: Mapping[str, Tensor], dtype: str) -> Any:
    """Build the architecture of `folder`'s config and put `views` in the place of its parameters and stored buffers.

    Nothing is initialised or copied; buffers such as the rotary table keep the precision that transformers
    gives them (casting a whole model would round them). Raises UserError where names or shapes differ.
    """
    config = stock_config(folder, read_json(folder / "config.json"))
    model = stock_model(folder, config, TORCH_DTYPES[dtype])
    missing = dict(views)
    placed: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in placed:  # the second name of a tied parameter
            continue
        placed.add(id(tensor))
        view = missing.pop(name, None)
        if view is None:
            raise UserError(f"{folder}: transformers expects a tensor {name!r} that the checkpoint does not have")
        if view.shape != tensor.shape:
            raise UserError(
                f"{folder}: {name!r} has shape {list(view.shape)}, transformers expects {list(tensor.shape)}"
            )
        tensor.requires_grad_(False)
        tensor.data = view
    if missing:
        raise UserError(f"{folder}: transformers has no place for the tensor {next(iter(missing))!r}")
    device = next(iter(views.values())).device
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in placed:
                setattr(module, key, buffer.to(device))
    model.eval()
    return model


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises UserError in one line where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"{folder}: no usable tokenizer ({reason})") from None


def inference(device: torch.device, threads: int) -> None:
    """Set what scoring relies on: thread count, and full fp32 matrix products on CUDA."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
