"""Plain checkpoints of layer routes: what stock transformers loads is what the live model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.architectures import ARCHITECTURES
from evomerge.errors import UserError
from evomerge.export.hf import write_hf
from evomerge.export.verify import verify
from evomerge.merge.bank import Bank
from evomerge.merge.builder import Builder
from evomerge.merge.live import live_model
from evomerge.merge.route import Router
from evomerge.pool import ModelPool
from evomerge.recipe import Recipe

TOKENS = torch.tensor([[1, 40, 300, 7, 7, 410, 99, 260, 13, 5, 77, 500, 3, 41, 212, 9]])
TYPED = ("gemma2", "gemma3_text")


def live(pool: ModelPool, recipe: Recipe) -> Any:
    """The model that a candidate is scored with."""
    manifest = pool.manifest()
    builder = Builder(Bank.load(pool, manifest, torch.device("cpu")), recipe.dtype)
    model = live_model(pool.checkpoints[pool.base].path, builder.views(), recipe.dtype)
    builder.build(recipe)
    Router(model, pool, builder).follow(recipe)
    return model


def log_likelihoods(model: Any) -> torch.Tensor:
    """Of every token behind those before it."""
    with torch.inference_mode():
        logp = model(input_ids=TOKENS).logits.float().log_softmax(-1)
    return logp[:, :-1].gather(-1, TOKENS[:, 1:, None])


def written(model: Any) -> torch.Tensor:
    """Greedy continuation, with a KV cache."""
    with torch.inference_mode():
        out: torch.Tensor = model.generate(TOKENS, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    return out[0, TOKENS.shape[1] :]


def stock(folder: Path) -> Any:
    """What from_pretrained makes of an export; no name is amiss."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_exported_route_is_what_was_scored(arch: str, tied: bool, tiny_model: Any, tmp_path: Path) -> None:
    """Repeats, skips, three sources of two depths beside merged layers, scales and gains: same tokens, same words."""
    types = ["full_attention", "sliding_attention", "full_attention"]
    more = {"layer_types": types} if arch in TYPED else {}
    experts = {"x": tiny_model(arch, 1, tied=tied), "deep": tiny_model(arch, 2, tied=tied, num_hidden_layers=3, **more)}
    pool = ModelPool.open(tiny_model(arch, tied=tied), experts)
    hops = [
        {"from": "merged", "layer": 0, "scale": 0.8},
        {"from": "deep", "layer": 2, "scale": 1.3},
        {"from": "merged", "layer": 1, "attn_gain": 0.5},
        {"from": "x", "layer": 1, "mlp_gain": 0.8},
        {"from": "deep", "layer": 2, "scale": 0.9},
        {"from": "deep", "layer": 1},
        {"from": "base", "layer": 1},
    ]
    merge = {"method": "task_arithmetic", "sources": {"x": {"weight": 0.3}}}
    recipe = Recipe.model_validate({"merge": [merge], "route": {"hops": hops}}).canonical(pool.manifest())
    scored = live(pool, recipe)
    folder = write_hf(tmp_path / "out", recipe, pool, pool.manifest())

    export = stock(folder)
    torch.testing.assert_close(log_likelihoods(export), log_likelihoods(scored), rtol=0, atol=1e-5)
    assert torch.equal(written(export), written(scored))
    assert export.config.num_hidden_layers == len(hops)
    config = json.loads((folder / "config.json").read_text())
    own = {s: getattr(c.stock.config, "layer_types", None) for s, c in pool.checkpoints.items()}
    kinds = None if own["base"] is None else [own.get(h["from"], own["base"])[h["layer"]] for h in hops]
    assert config.get("layer_types") == kinds
    if arch in TYPED:
        assert set(kinds or ()) == {"full_attention", "sliding_attention"}

    assert verify(folder).ok
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    changed = next(n for n in sorted(tensors) if ".4." in n)
    tensors[changed].view(-1)[0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert verify(folder).differing == (changed,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_models(dtype: str, quickstart: Path, tmp_path: Path) -> None:
    """The quickstart's models through a route with a repeat and scales; in half precision within its rounding."""
    models = quickstart / "models"
    pool = ModelPool.open(models / "skills-base", {e: models / f"skills-{e}" for e in ("add", "attr", "count")})
    hops: list[dict[str, Any]] = [{"from": "add", "layer": i} for i in range(3)]
    hops += [{"from": "attr", "layer": 2, "scale": 1.2}, {"from": "merged", "layer": 3, "mlp_gain": 0.7}]
    hops += [{"from": "count", "layer": 3, "scale": 0.8}, {"from": "attr", "layer": 4}]
    merge = {"method": "linear", "sources": {"add": {}, "count": {}}}
    route = {"hops": hops, "head": "attr", "embed": "attr"}
    recipe = Recipe.model_validate({"dtype": dtype, "merge": [merge], "route": route}).canonical(pool.manifest())
    scored = live(pool, recipe)
    export = stock(write_hf(tmp_path / "out", recipe, pool, pool.manifest()))

    gap = (log_likelihoods(export) - log_likelihoods(scored)).abs()
    assert str(export.dtype) == f"torch.{dtype}"
    if dtype == "bfloat16":
        assert 0 < float(gap.mean()) < 0.2
    else:
        assert float(gap.max()) < 5e-5  # experiments/routes/folding.md: up to 3.8e-5 with these models
        assert torch.equal(written(export), written(scored))


def test_a_route_of_an_unknown_family_leaves_nothing(tiny_model: Any, tmp_path: Path) -> None:
    """Where scales are not known to fold into the weights, nothing is exported."""
    pool = ModelPool.open(tiny_model("olmo2"), {"x": tiny_model("olmo2", 1)})
    hops = [{"from": "x", "layer": 1, "scale": 0.5}]
    recipe = Recipe.model_validate({"route": {"hops": hops}}).canonical(pool.manifest())

    with pytest.raises(UserError, match="not for 'olmo2': whether scales fold into its weights was not checked"):
        write_hf(tmp_path / "out", recipe, pool, pool.manifest())
    assert list(tmp_path.iterdir()) == []
