"""The exported folder: what was scored is what ships, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.architectures import ARCHITECTURES
from evomerge.errors import RunError, UserError
from evomerge.export import hf
from evomerge.export.hf import write_hf
from evomerge.export.verify import verify
from evomerge.merge.bank import Bank
from evomerge.merge.builder import Builder
from evomerge.merge.live import live_model
from evomerge.merge.pipeline import BuildError
from evomerge.pool import Checkpoint, ModelPool
from evomerge.recipe import Recipe

WEIGHTS = "model.safetensors"
TOKENS = torch.tensor([[1, 40, 300, 7, 7, 410, 99, 260, 13, 5]])
RULES: list[dict[str, Any]] = [
    {
        "match": {"layers": [0, 0]},
        "method": "ties",
        "sources": {"x": {"weight": 0.7, "density": 0.4}, "y": {"weight": 1.1, "density": 0.8}},
    },
    {"method": "task_arithmetic", "params": {"lambda": 0.9}, "sources": {"x": {"weight": 0.3}, "y": {"weight": -0.2}}},
]


def pool_of(tiny_model: Any, arch: str, dtype: str = "float32", **config: Any) -> ModelPool:
    base, x, y = (tiny_model(arch, seed, dtype=dtype, **config) for seed in (0, 1, 2))
    return ModelPool.open(base, {"x": x, "y": y})


def canonical(pool: ModelPool, dtype: str = "float32", rules: list[dict[str, Any]] = RULES) -> Recipe:
    return Recipe.model_validate({"dtype": dtype, "merge": rules}).canonical(pool.manifest())


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(("tied", "dtype"), [(False, "float32"), (True, "bfloat16")])
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "mixtral", "qwen2_moe", "mamba", "opt", "bloom"])
def test_stock_transformers_loads_what_was_scored(
    tiny_model: Any, tmp_path: Path, arch: str, tied: bool, dtype: str
) -> None:
    """The folder's weights and logits in from_pretrained equal the live model's to the bit; no name is amiss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pool = pool_of(tiny_model, arch, dtype, tied=tied)
    manifest = pool.manifest()
    recipe = canonical(pool, dtype)
    builder = Builder(Bank.load(pool, manifest, torch.device("cpu")), dtype)
    live = live_model(pool.checkpoints["base"].path, builder.views(), dtype)
    builder.build(recipe)
    folder = write_hf(tmp_path / "out", recipe, pool, manifest)

    stock, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    for name, weight in stock.state_dict().items():
        assert torch.equal(weight, live.state_dict()[name]), name
    assert set(load_file(folder / "model.safetensors")) == set(load_file(pool.checkpoints["base"].path / WEIGHTS))
    stock.eval()
    with torch.inference_mode():
        assert torch.equal(stock(input_ids=TOKENS).logits, live(input_ids=TOKENS).logits)
    assert stock.dtype == getattr(torch, dtype)
    assert AutoTokenizer.from_pretrained(folder)("Once")["input_ids"][0] == 1
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["model_type"]) == (dtype, arch)
    assert "torch_dtype" not in config


def test_the_export_keeps_the_bases_names(tiny_model: Any, tmp_path: Path) -> None:
    """A GPT-2 without prefix is exported without it, and loads; experts may be stored under other names."""
    from transformers import AutoModelForCausalLM

    base = tiny_model("gpt2", tied=True, name="bare")
    tensors = load_file(base / WEIGHTS)
    bare = {n.removeprefix("transformer."): t for n, t in tensors.items()}
    save_file(bare, base / WEIGHTS, {"format": "pt"})
    pool = ModelPool.open(base, {"x": tiny_model("gpt2", 1, tied=True), "y": tiny_model("gpt2", 2, tied=True)})
    folder = write_hf(tmp_path / "out", canonical(pool), pool, pool.manifest())

    assert set(load_file(folder / WEIGHTS)) == set(bare)
    stock, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(stock.transformer.wpe.weight, load_file(folder / WEIGHTS)["wpe.weight"])
    assert verify(folder).ok


def test_a_merge_over_vocabularies_of_other_length(tiny_model: Any, tmp_path: Path) -> None:
    """Export and live model have the base's rows, whatever the experts have."""
    from transformers import AutoModelForCausalLM

    sizes = {"x": 520, "y": 500}
    experts = {n: tiny_model("gpt_neox", i, vocab_size=v) for i, (n, v) in enumerate(sizes.items(), 1)}
    pool = ModelPool.open(tiny_model("gpt_neox"), experts)
    manifest = pool.manifest()
    builder = Builder(Bank.load(pool, manifest, torch.device("cpu")), "float32")
    live = live_model(pool.checkpoints["base"].path, builder.views(), "float32")
    builder.build(canonical(pool))
    folder = write_hf(tmp_path / "out", canonical(pool), pool, manifest)

    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert stock.get_input_embeddings().weight.shape == (512, 32)
    with torch.inference_mode():
        assert torch.equal(stock(input_ids=TOKENS).logits, live(input_ids=TOKENS).logits)


def test_what_the_config_says_of_the_bases_files_stays_behind(tiny_model: Any, tmp_path: Path) -> None:
    """Quantisation, code and the base's own name are not the merge's, in the export as in the live model."""
    base = tiny_model("llama", name="stale")
    config = json.loads((base / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "gptq", "bits": 4}, "_name_or_path": "/home/me", "auto_map": {}}
    (base / "config.json").write_text(json.dumps(config))
    pool = ModelPool.open(base, {"x": tiny_model("llama", 1), "y": tiny_model("llama", 2)})
    folder = write_hf(tmp_path / "out", canonical(pool), pool, pool.manifest())

    written = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "_name_or_path", "auto_map"} & set(written)
    assert set(written) >= set(config) - {"quantization_config", "_name_or_path", "auto_map", "torch_dtype"}


def test_another_dtype_than_the_sources(tiny_model: Any, tmp_path: Path) -> None:
    """A bf16 merge of fp32 sources is the fp32 merge rounded once."""
    pool = pool_of(tiny_model, "llama")
    manifest = pool.manifest()
    wide, half = (
        load_file(write_hf(tmp_path / d, canonical(pool, d), pool, manifest) / "model.safetensors")
        for d in ("float32", "bfloat16")
    )

    assert all(torch.equal(half[n], wide[n].to(torch.bfloat16)) for n in wide)


def test_shards(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models are cut into files with an index; content hash, logits and verification are the same."""
    from transformers import AutoModelForCausalLM

    pool = pool_of(tiny_model, "llama")
    manifest = pool.manifest()
    whole = write_hf(tmp_path / "whole", canonical(pool), pool, manifest)
    monkeypatch.setattr(hf, "SHARD_BYTES", 30_000)
    parts = write_hf(tmp_path / "parts", canonical(pool), pool, manifest)

    files = sorted(p.name for p in parts.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert Checkpoint(parts).sha256() == Checkpoint(whole).sha256()
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.size * 4 for t in manifest.tensors)
    a, b = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (whole, parts))
    with torch.inference_mode():
        assert torch.equal(a(input_ids=TOKENS).logits, b(input_ids=TOKENS).logits)
    assert verify(parts).ok


def test_generation_config_and_tokenizer_come_along(tiny_model: Any, tmp_path: Path) -> None:
    """Files beside the weights are the base's, byte for byte; foreign files stay behind."""
    base = tiny_model("llama", name="rich")
    (base / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5, "do_sample": true}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "notes.txt").write_text("private")
    pool = ModelPool.open(base, {"x": tiny_model("llama", 1), "y": tiny_model("llama", 2)})
    folder = write_hf(tmp_path / "out", canonical(pool), pool, pool.manifest())

    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert not (folder / "notes.txt").exists()


def test_record_and_recipe(tiny_model: Any, tmp_path: Path) -> None:
    """The record names recipe, sources and a hash for every tensor; the recipe file rebuilds the same id."""
    pool = pool_of(tiny_model, "llama")
    manifest = pool.manifest()
    recipe = canonical(pool)
    folder = write_hf(tmp_path / "out", recipe, pool, manifest, notes={"candidate": 4})
    record = json.loads((folder / "evomerge.json").read_text())

    assert record["recipe_id"] == recipe.id
    assert record["candidate"] == 4
    assert set(record["tensors"]) == {t.name for t in manifest.tensors}
    assert {n: s["sha256"] for n, s in record["sources"].items()} == manifest.hashes
    assert record["mergekit"].startswith("not expressible: mergekit has one merge method a file")
    assert not (folder / "mergekit_config.yml").exists()
    loaded = Recipe.load(folder / "recipe.yaml")
    assert loaded.canonical(manifest).id == recipe.id
    assert {s.path for s in loaded.sources.values()} == {str(c.path) for c in pool.checkpoints.values()}


def test_expressible_recipes_bring_their_mergekit_file(tiny_model: Any, tmp_path: Path) -> None:
    """A recipe that mergekit can express carries the configuration."""
    pool = pool_of(tiny_model, "llama")
    folder = write_hf(tmp_path / "out", canonical(pool, rules=RULES[1:]), pool, pool.manifest())

    assert json.loads((folder / "evomerge.json").read_text())["mergekit"] == "mergekit_config.yml"
    assert "merge_method: task_arithmetic" in (folder / "mergekit_config.yml").read_text()


def test_a_target_in_the_way_is_left_alone(tiny_model: Any, tmp_path: Path) -> None:
    """A folder with something in it, or a file, is refused; an empty folder is taken."""
    pool = pool_of(tiny_model, "llama")
    manifest = pool.manifest()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()

    for name in ("full", "file"):
        with pytest.raises(UserError, match="exists and is not empty"):
            write_hf(tmp_path / name, canonical(pool), pool, manifest)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    write_hf(tmp_path / "empty", canonical(pool), pool, manifest)
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert leftovers(tmp_path) == ["empty", "file", "full"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "ctrl-c"])
@pytest.mark.parametrize("step", ["_write_shards", "_write", "recipe_with_paths", "to_mergekit"])
def test_an_interrupted_export_leaves_nothing(
    step: str, error: BaseException, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails half-way, neither the target nor a temporary folder remains."""

    def fail(*_: object) -> None:
        raise error

    pool = pool_of(tiny_model, "llama")
    monkeypatch.setattr(hf, step, fail)

    with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt):
        write_hf(tmp_path / "out", canonical(pool), pool, pool.manifest())
    assert leftovers(tmp_path) == []


def test_weights_that_are_not_finite_are_not_written(tiny_model: Any, tmp_path: Path) -> None:
    """A recipe that overflows the built dtype is a BuildError and leaves nothing."""
    pool = pool_of(tiny_model, "llama")
    rules = [{"method": "task_arithmetic", "params": {"lambda": 1e6}, "sources": {"x": {"weight": 1e3}}}]

    with pytest.raises(BuildError, match="NaN or infinite weights in embed"):
        write_hf(tmp_path / "out", canonical(pool, "float16", rules), pool, pool.manifest())
    assert leftovers(tmp_path) == []
