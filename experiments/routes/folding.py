"""What folding a route's scales into weights costs: the live model, its export, half precision, and a scaled stream.

`python experiments/routes/folding.py` writes folding.json and folding.md's tables beside this file (CPU, one thread).
For every architecture with layer routes a tiny random pool, and the quickstart's trained models: one path with a repeat
over two sources, scales between 0.6 and 1.5. Differences are |delta log p| of a token, the largest and the mean.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from evomerge.architectures import ARCHITECTURES
from evomerge.export.hf import write_hf
from evomerge.merge.bank import Bank
from evomerge.merge.builder import Builder
from evomerge.merge.live import live_model
from evomerge.merge.route import Router
from evomerge.pool import ModelPool
from evomerge.recipe import Recipe

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
SCALES = (1.0, 0.7, 1.3, 1.0, 0.6, 1.5, 0.9)
LAYERS = 4
SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
TABLE_BEGINS = "<!-- tables: written by folding.py -->\n"


def write_random(folder: Path, arch: str, seed: int) -> Path:
    """A tiny random checkpoint, norms and biases included."""
    known = CONFIG_MAPPING[arch]()
    config = AutoConfig.for_model(arch, **{n: v for n, v in SMALL.items() if hasattr(known, n)})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return folder


def pools(folder: Path) -> Iterator[tuple[str, ModelPool, Tensor]]:
    """(what, base and expert `x`, tokens of shape (sequences, length))."""
    random = torch.randint(5, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    for arch in ARCHITECTURES:
        base, x = (write_random(folder / f"{arch}-{seed}", arch, seed) for seed in (1, 2))
        yield f"{arch}, random", ModelPool.open(base, {"x": x}), random
    models = QUICKSTART / "models"
    lines = (QUICKSTART / "data" / "skill_attr_cal.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines[:64]]
    text = " ".join(i["question"] + i["choices"][i["gold"]] for i in items)
    ids = AutoTokenizer.from_pretrained(models / "skills-base")(text)["input_ids"][:256]
    for expert in ("add", "attr", "count"):
        pool = ModelPool.open(models / "skills-base", {"x": models / f"skills-{expert}"})
        yield f"llama, trained: base and {expert}", pool, torch.tensor(ids).view(4, 64)


def path(layers: int) -> list[dict[str, Any]]:
    """Every layer in order, the second twice, from base and expert in turn, with SCALES."""
    visited = [0, 1, 1, *range(2, layers)]
    names = ("base", "x")
    return [{"from": names[j % 2], "layer": i, "scale": SCALES[j]} for j, i in enumerate(visited)]


def log_p(model: Any, tokens: Tensor) -> Tensor:
    """Of every token behind those before it, shape (sequences, length - 1)."""
    with torch.inference_mode():
        logp = model(input_ids=tokens).logits.float().log_softmax(-1)
    return logp[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


def scaled_stream(model: Any, layers: nn.ModuleList, recipe: Recipe, tokens: Tensor) -> tuple[Tensor, float]:
    """log p where each hop's input is multiplied by its scale, and the smallest mean square that a hop is given."""
    squares: list[float] = []

    def scale(by: float) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            scaled = args[0] * by
            squares.append(float(scaled.square().mean(-1).min()))
            return (scaled, *args[1:]), kwargs

        return hook

    assert recipe.route is not None
    handles = []
    for layer, hop in zip(layers, recipe.route.hops, strict=True):
        layer.gains[:] = (hop.attn_gain, hop.mlp_gain)
        handles.append(layer.register_forward_pre_hook(scale(hop.scale), with_kwargs=True))
    out = log_p(model, tokens)
    for handle in handles:
        handle.remove()
    return out, min(squares)


def without_eps(model: Any) -> None:
    """Let norms divide by the root of the mean square alone."""
    for module in model.modules():
        for name in ("variance_epsilon", "eps"):
            if hasattr(module, name):
                setattr(module, name, 1e-30)


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest and the mean one."""
    gap = (a - b).abs()
    return float(gap.max()), float(gap.mean())


def measure(pool: ModelPool, tokens: Tensor, folder: Path) -> dict[str, Any]:
    """All figures of one pool: (largest, mean) differences, and the stream's mean square over the norms' eps."""
    manifest = pool.manifest()
    bank = Bank.load(pool, manifest, torch.device("cpu"))
    base = pool.checkpoints[pool.base]
    out: dict[str, Any] = {}
    live, export = {}, {}
    for dtype in ("float32", "bfloat16"):
        recipe = Recipe.model_validate({"dtype": dtype, "route": {"hops": path(base.layers)}}).canonical(manifest)
        builder = Builder(bank, dtype)
        model = live_model(base.path, builder.views(), dtype)
        builder.build(recipe)
        router = Router(model, pool, builder)
        router.follow(recipe)
        live[dtype] = log_p(model, tokens)
        written = write_hf(folder / dtype, recipe, pool, manifest)
        export[dtype] = log_p(AutoModelForCausalLM.from_pretrained(written, dtype="auto").eval(), tokens)
        out[f"live_export_{dtype}"] = difference(live[dtype], export[dtype])
        if dtype == "float32":
            layers = model.get_submodule(ARCHITECTURES[base.model_type].stack)
            scaled, square = scaled_stream(model, layers, recipe, tokens)
            out["folded_scaled"] = difference(live[dtype], scaled)
            without_eps(model)
            scaled, _ = scaled_stream(model, layers, recipe, tokens)
            router.follow(recipe)
            out["folded_scaled_without_eps"] = difference(log_p(model, tokens), scaled)
            config = base.stock.config
            names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
            out["square_over_eps"] = square / next(v for n in names if (v := getattr(config, n, None)) is not None)
    out["live_float32_bfloat16"] = difference(live["float32"], live["bfloat16"])
    out["export_float32_bfloat16"] = difference(export["float32"], export["bfloat16"])
    return out


IN_FP32 = {
    "live_export_float32": "live and export",
    "folded_scaled": "folded and scaled stream",
    "folded_scaled_without_eps": "the same with eps 1e-30",
    "square_over_eps": "smallest mean square / eps",
}
IN_BF16 = {
    "live_export_bfloat16": "live and export",
    "live_float32_bfloat16": "live, fp32 and bf16",
    "export_float32_bfloat16": "export, fp32 and bf16",
}


def table(results: dict[str, dict[str, Any]], columns: dict[str, str]) -> str:
    """Markdown, one row a pool; differences as largest (mean)."""

    def cell(figure: Any) -> str:
        return f"{figure:.0f}" if isinstance(figure, float) else f"{figure[0]:.1e} ({figure[1]:.1e})"

    rows = [["models", *columns.values()], ["---"] * (len(columns) + 1)]
    rows += [[what, *(cell(figures[c]) for c in columns)] for what, figures in results.items()]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def main() -> None:
    """Measure all pools and write both files."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for what, pool, tokens in pools(Path(folder)):
            results[what] = measure(pool, tokens, Path(folder) / what)
            print(what, results[what], flush=True)
    (HERE / "folding.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    words = HERE / "folding.md"
    text = words.read_text(encoding="utf-8") if words.exists() else ""
    tables = f"{TABLE_BEGINS}\nfp32:\n\n{table(results, IN_FP32)}\nbf16:\n\n{table(results, IN_BF16)}"
    words.write_text(text.partition(TABLE_BEGINS)[0] + tables, encoding="utf-8")


if __name__ == "__main__":
    main()
