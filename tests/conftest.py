"""Shared fixtures: tiny real checkpoints (seeded, CPU, offline) and the quickstart's pool."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# The same examples on every run: a search for new ones is tests/fuzz.py's business, not that of a change in review.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")

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

_MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
PECULIAR: dict[str, dict[str, object]] = {
    # Small caps and windows, so that they matter in a sentence of 40 tokens.
    "gemma2": {**_MIXED_LAYERS, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_MIXED_LAYERS, "query_pre_attn_scalar": 8},
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mamba": {"state_size": 4, "time_step_rank": 4},
}
"""Settings beside the common ones."""


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
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    settings: dict[str, object] = {
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
    }
    known = CONFIG_MAPPING[arch]()
    settings = {n: v for n, v in settings.items() if hasattr(known, n)} | PECULIAR.get(arch, {}) | overrides
    config = AutoConfig.for_model(arch, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:  # trained norms are not all ones, and trained biases not all zeros
                    p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODELS / "skills-base" / file, folder / file)
    return folder


# -- a small experiment: real search, real models, a second of work -------------------------------------------

Items = list[dict[str, object]]

OBJECTS = ("cat", "dog", "red ball", "big tree", "sun")


def small_items(task: str, start: int, count: int) -> Items:
    """Items of two kinds: sums with two to four choices of several tokens, and words behind a shared start."""
    out: Items = []
    for i in range(start, start + count):
        if task == "sums":
            choices = [str(3 * i + 7 + d) for d in range(2 + i % 3)]
            item: dict[str, object] = {"question": f"{i}+{2 * i + 7}=", "choices": choices}
        else:
            first = OBJECTS[i % 5]
            choices = [f" {w}" for w in (first, OBJECTS[(i + 1) % 5], OBJECTS[(i + 3) % 5])]
            item = {"question": f"Once upon a time there was a {first} and number {i}. It was a", "choices": choices}
        out.append({"id": f"{task}-{i}", **item, "gold": i % 2})
    return out


def write_items(path: Path, items: Items) -> Path:
    path.write_text("".join(json.dumps(i) + "\n" for i in items), encoding="utf-8")
    return path


def fine_tuned(base: Path, target: Path, seed: int) -> Path:
    """A copy of a checkpoint with small seeded changes to every weight, as fine-tuning makes them."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, target)
    g = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    changed = {n: t + 0.05 * torch.randn(t.shape, generator=g) for n, t in sorted(tensors.items())}
    save_file(changed, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture(scope="session")
def small_experiment(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment file: tiny Llama base with two experts, two tasks of 12/6/8 items, 12 evaluations, inline."""
    folder = tmp_path_factory.mktemp("small")
    base = tiny_model("llama", 0)
    tasks = []
    for task in ("sums", "words"):
        splits = {}
        at = 0
        for split, count in (("search", 12), ("select", 6), ("report", 8)):
            splits[split] = write_items(folder / f"{task}_{split}.jsonl", small_items(task, at, count)).name
            at += count
        tasks.append({"name": task, "splits": splits, "metric": "cross_entropy", "end_of_text": task == "sums"})
    experiment = {
        "name": "small",
        "models": {
            "base": str(base),
            "experts": {n: str(fine_tuned(base, folder / n, i)) for i, n in enumerate(("one", "two"), 14)},
        },
        "search_space": {
            "method": "task_arithmetic",
            "axes": {"weight": {"low": -0.5, "high": 1.5, "default": "uniform"}},
        },
        "fitness": {"tasks": tasks},
        "search": {"algorithm": "cma-es", "seed": 3, "budget": {"evaluations": 12}, "population": 4, "finalists": 3},
        "workers": {"backend": "inline", "device": "cpu"},
    }
    path = folder / "small.yaml"
    path.write_text(json.dumps(experiment, indent=1), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture(scope="session")
def finished_run(small_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the small experiment, inline. Read only; tests that write take `run_copy`."""
    from evomerge.config import load
    from evomerge.run import run

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "small"
    run(load(small_experiment), out)
    return out


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def experiment_with(small_experiment: Path) -> Callable[..., Any]:
    """experiment_with(**{"search.seed": 2}) -> the small experiment with overrides."""
    from evomerge.config import load

    def make(**overrides: object) -> Any:
        return load(small_experiment, overrides)

    return make


# -- tasks of lm-eval ---------------------------------------------------------------------------------------


@pytest.fixture
def lm_eval_task(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """lm_eval_task(rows, training=None, metrics=("acc",), files={}, **yaml) -> a folder with the lm-eval task `mine`.

    Multiple choice over `question`, `choices` and `gold`, without blanks in between; its data are the test docs.
    `process_results: module.function` names code among `files` (name -> text). lm-eval's caches stay in the folder.
    """
    import datasets
    import huggingface_hub.constants
    import yaml

    cache = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))  # for workers
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for constants in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def make(
        rows: Items,
        *,
        training: Items | None = None,
        metrics: tuple[str, ...] = ("acc",),
        files: dict[str, str] | None = None,
        process_results: str | None = None,
        **settings: object,
    ) -> Path:
        folder = tmp_path_factory.mktemp("tasks")
        data = {"test": str(write_items(folder / "test.jsonl", rows))}
        if training is not None:
            data["train"] = str(write_items(folder / "train.jsonl", training))
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        config = {
            "task": "mine",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": data},
            "test_split": "test",
            "training_split": None if training is None else "train",
            "fewshot_split": None if training is None else "train",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
            **settings,
        }
        text = yaml.safe_dump({k: v for k, v in config.items() if v is not None})
        if process_results is not None:
            text += f"process_results: !function {process_results}\n"
        (folder / "mine.yaml").write_text(text, encoding="utf-8")
        return folder

    return make


# -- hand-made pools without files ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bank_of() -> Callable[..., Any]:
    """bank_of({source: {tensor: Tensor}}, blocks={tensor: block}) -> a Bank over a hand-made manifest.

    Without `blocks` the tensors become attention blocks of layers 0, 1, 2 ... in their order.
    """
    from evomerge.manifest import Manifest, lay_out
    from evomerge.merge.bank import Bank

    def make(sources: dict[str, dict[str, torch.Tensor]], blocks: dict[str, str] | None = None) -> Bank:
        tensors = sources["base"]
        blocks = blocks or {n: f"layers.{i}.attention" for i, n in enumerate(tensors)}
        infos = lay_out([(n, tuple(t.shape), "F32", blocks[n]) for n, t in tensors.items()])
        hashes = {s: f"{i:064x}" for i, s in enumerate(sources, 1)}
        manifest = Manifest("base", dict.fromkeys(sources, len(tensors)), infos, hashes)
        flat = {}
        for source, given in sources.items():
            flat[source] = torch.zeros(manifest.elements, dtype=next(iter(given.values())).dtype)
            for info in infos:
                flat[source][info.offset : info.offset + info.size] = given[info.name].reshape(-1)
        return Bank(flat, manifest)

    return make


@pytest.fixture(scope="session")
def recipe_over() -> Callable[..., Any]:
    """recipe_over(manifest, *rules, dtype="float32") -> a canonical recipe."""
    from evomerge.recipe import Recipe

    def make(manifest: Any, *rules: dict[str, object], dtype: str = "float32") -> Recipe:
        return Recipe.model_validate({"base": manifest.base, "dtype": dtype, "merge": list(rules)}).canonical(manifest)

    return make


ManifestOf = Callable[..., Any]


@pytest.fixture(scope="session")
def manifest_of() -> ManifestOf:
    """manifest_of(layers=2, experts=("math", "code"), tied=False) -> a Llama's Manifest, without files."""
    from evomerge.architectures import ARCHITECTURES, block_order
    from evomerge.manifest import Manifest, lay_out

    def make(layers: int = 2, experts: tuple[str, ...] = ("math", "code"), tied: bool = False) -> Manifest:
        shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,)}
        if not tied:
            shapes["lm_head.weight"] = (16, 8)
        for i in range(layers):
            at = f"model.layers.{i}"
            shapes |= {f"{at}.self_attn.{p}_proj.weight": (8, 8) for p in "qkvo"}
            shapes |= {f"{at}.mlp.up_proj.weight": (12, 8), f"{at}.mlp.down_proj.weight": (8, 12)}
            shapes |= {f"{at}.input_layernorm.weight": (8,), f"{at}.post_attention_layernorm.weight": (8,)}
        rows = [(n, s, "F32", str(ARCHITECTURES["llama"].block_of(n))) for n, s in shapes.items()]
        rows.sort(key=lambda row: block_order(row[3]))
        names = ("base", *experts)
        hashes = {name: f"{i:064x}" for i, name in enumerate(names, 1)}
        return Manifest("base", dict.fromkeys(names, layers), lay_out(rows), hashes)

    return make
