"""Shared fixtures: tiny real checkpoints (seeded, CPU, offline) and the quickstart's pool."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "experiments" / "quickstart"
MODELS = QUICKSTART / "models"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny models run slower with two threads, and results are promised for one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The quickstart's folder: models/ and data/."""
    return QUICKSTART


TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """tiny_model(arch, seed=0, tied=False, dtype="float32", **config) -> a folder with a random checkpoint.

    2 layers, width 32, the quickstart's tokenizer (512 tokens). Same arguments, same folder. `name` makes a
    fresh copy that a test may damage.
    """
    made: dict[str, Path] = {}

    def make(
        arch: str = "llama",
        seed: int = 0,
        *,
        tied: bool = False,
        dtype: str = "float32",
        name: str | None = None,
        **overrides: object,
    ) -> Path:
        key = json.dumps([arch, seed, tied, dtype, sorted(overrides.items())], default=str)
        if key not in made:
            made[key] = _write_model(tmp_path_factory.mktemp(arch), arch, seed, tied, dtype, overrides)
        if name is None:
            return made[key]
        copy = tmp_path_factory.mktemp(name) / name
        shutil.copytree(made[key], copy)
        return copy

    return make


def _write_model(folder: Path, arch: str, seed: int, tied: bool, dtype: str, overrides: dict[str, object]) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "initializer_range": 0.2,  # so that logits differ between tokens
        **overrides,
    }
    config = AutoConfig.for_model(arch, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "norm" in n:  # trained norms are not all ones
                    p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODELS / "skills-base" / file, folder / file)
    return folder
