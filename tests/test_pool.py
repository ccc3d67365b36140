"""ModelPool: what it accepts, what it hashes, and how it refuses."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.architectures import ARCHITECTURES
from evomerge.errors import UserError
from evomerge.pool import Checkpoint, ModelPool


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(values)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {n: t.clone() for n, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def sharded(folder: Path, target: Path, size: str = "20KB") -> Path:
    """The same checkpoint as transformers writes it in several files."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(target, max_shard_size=size)
    return target


# -- what is accepted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layout_covers_every_weight_once(tiny_model: Any, arch: str, tied: bool) -> None:
    """Every parameter of the stock model has one place and one block; tied embeddings count once."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model(arch, tied=tied)
    manifest = ModelPool.open(folder, {"x": tiny_model(arch, 1, tied=tied)}).manifest()

    stock = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert {t.name: t.shape for t in manifest.tensors} == {n: tuple(p.shape) for n, p in stock.items()}
    assert manifest.parameters == sum(p.numel() for p in stock.values())
    layers = [f"layers.{i}.{m}" for i in range(2) for m in ("attention", "mlp", "norm")]
    head = [] if tied and "lm_head.bias" not in stock else ["head"]
    assert list(manifest.blocks) == ["embed", *layers, "final_norm", *head]
    assert all(t.offset % 64 == 0 for t in manifest.tensors)


@pytest.mark.parametrize(("arch", "tied"), [("llama", False), ("mistral", True), ("qwen2", False), ("qwen3", True)])
def test_sharding_does_not_change_the_hash(tiny_model: Any, tmp_path: Path, arch: str, tied: bool) -> None:
    """The content hash and every tensor are the same in one file and in several."""
    folder = tiny_model(arch, tied=tied)
    whole, parts = Checkpoint(folder), Checkpoint(sharded(folder, tmp_path / "parts"))

    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert parts.sha256() == whole.sha256()
    assert all(torch.equal(parts.tensor(n), whole.tensor(n)) for n in whole.tensors)


def test_tied_head_stored_or_not_is_the_same_model(tiny_model: Any) -> None:
    """A tied model that was saved with its head's copy hashes like one without."""
    lean = tiny_model("llama", tied=True)
    fat = tiny_model("llama", tied=True, name="fat")
    change_weights(fat, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))

    assert "lm_head.weight" in load_file(fat / "model.safetensors")
    assert Checkpoint(fat).sha256() == Checkpoint(lean).sha256()


def test_stored_rotary_table_is_ignored(tiny_model: Any) -> None:
    """Old checkpoints hold rotary frequencies, which transformers computes itself."""
    old = tiny_model("llama", name="old")
    change_weights(old, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))

    assert Checkpoint(old).sha256() == Checkpoint(tiny_model("llama")).sha256()


# -- names that transformers converts --------------------------------------------------------------------------


def as_first_published(tensors: dict[str, torch.Tensor]) -> None:
    """GPT-2 as the hub's oldest files have it: no prefix, and causal masks beside the weights."""
    for name in [n for n in tensors if n.startswith("transformer.")]:
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)


def with_new_head(tensors: dict[str, torch.Tensor]) -> None:
    """GPT-NeoX with the name that its head has in transformers today."""
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")


def under_the_heads_name(tensors: dict[str, torch.Tensor]) -> None:
    """A tied model that was stored under its second name only."""
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def with_fused_experts(tensors: dict[str, torch.Tensor]) -> None:
    """Mixtral with its experts in one tensor, as the live model has them."""
    for i in (0, 1):
        moe, mlp = f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
        w1, w2, w3 = ([tensors.pop(f"{moe}.experts.{e}.w{n}.weight") for e in range(3)] for n in (1, 2, 3))
        tensors[f"{mlp}.experts.gate_up_proj"] = torch.stack([torch.cat(p) for p in zip(w1, w3, strict=True)])
        tensors[f"{mlp}.experts.down_proj"] = torch.stack(w2)
        tensors[f"{mlp}.gate.weight"] = tensors.pop(f"{moe}.gate.weight")


@pytest.mark.parametrize(
    ("arch", "tied", "rename"),
    [
        ("gpt2", True, as_first_published),
        ("gpt2", False, as_first_published),
        ("gpt_neox", False, with_new_head),
        ("llama", True, under_the_heads_name),
        ("mixtral", False, with_fused_experts),
    ],
)
def test_stored_names_do_not_change_the_model(tiny_model: Any, arch: str, tied: bool, rename: Any) -> None:
    """Whatever names and cut transformers accepts for the same weights, parameters and hash are the same."""
    usual, other = tiny_model(arch, tied=tied), tiny_model(arch, tied=tied, name="other")
    change_weights(other, rename)
    a, b = Checkpoint(usual), Checkpoint(other)

    assert set(load_file(usual / "model.safetensors")) != set(load_file(other / "model.safetensors"))
    assert a.sha256() == b.sha256()
    assert a.tensors == b.tensors
    for c, folder in ((a, usual), (b, other)):
        weights = {n: c.tensor(n) for n in c.tensors}
        stored = load_file(folder / "model.safetensors")
        back = c.stored_form(weights)
        assert all(torch.equal(back[n], stored[n]) for n in back)
        assert {n for n in stored if not n.endswith((".attn.bias", ".masked_bias"))} == set(back)


def test_one_parameter_under_two_names(tiny_model: Any) -> None:
    """Two stored tensors that transformers would load into the same parameter are refused by name."""
    folder = tiny_model("gpt2", name="twice")
    change_weights(folder, lambda t: t.update({"wpe.weight": t["transformer.wpe.weight"] + 1}))

    text = refusal(folder, {})
    assert "'wpe.weight'" in text
    assert "are the same parameter" in text


def test_experts_that_cannot_be_fused(tiny_model: Any) -> None:
    """A mixture with one expert missing is refused naming the tensor, before anything is loaded."""
    folder = tiny_model("mixtral", name="lacking")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    change_weights(folder, lambda t: t.pop(name))

    assert "model.layers.1.block_sparse_moe.experts" in refusal(folder, {})


def test_tied_copies_that_differ_are_noted(tiny_model: Any) -> None:
    """A config that ties what the files hold twice with other contents is worth a note, for base and expert."""
    base, expert = tiny_model("llama", tied=True, name="base"), tiny_model("llama", 1, tied=True, name="expert")
    change_weights(base, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    change_weights(expert, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    notes = ModelPool.open(base, {"x": expert}).notes()

    assert len(notes) == 1
    assert notes[0].startswith("expert 'x': its config ties embedding and head, but lm_head.weight is stored")


# -- content hashes -------------------------------------------------------------------------------------------


def test_hash_sees_every_bit(tiny_model: Any) -> None:
    """One flipped bit and another dtype of the same bytes change the hash."""
    name = "model.layers.1.mlp.up_proj.weight"
    flipped, cast = (tiny_model("llama", name=n) for n in ("flipped", "cast"))

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.int32)[3, 3] ^= 1

    change_weights(flipped, flip)
    hashes = {Checkpoint(f).sha256() for f in (tiny_model("llama"), flipped)}
    for dtype in (torch.float16, torch.bfloat16):
        change_weights(cast, lambda t, d=dtype: t.update({"model.norm.weight": torch.zeros(32, dtype=d)}))
        hashes.add(Checkpoint(cast).sha256())
    assert len(hashes) == 4


def test_stored_dtype_is_that_of_most_parameters(tiny_model: Any) -> None:
    """A bfloat16 model with fp32 norms is a bfloat16 model."""
    mixed = tiny_model("llama", dtype="bfloat16", name="mixed")
    change_weights(mixed, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))

    assert ModelPool.open(mixed, {}).stored_dtype == "bfloat16"
    assert ModelPool.open(tiny_model("llama"), {}).stored_dtype == "float32"


def test_differences_that_do_not_stop_a_merge_are_noted(tiny_model: Any) -> None:
    """Another norm epsilon and missing tokenizer files are named, not refused."""
    expert = tiny_model("llama", 1, name="expert")
    change_config(expert, rms_norm_eps=1e-3)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (expert / file).unlink()
    notes = ModelPool.open(tiny_model("llama"), {"odd": expert, "plain": tiny_model("llama", 2)}).notes()

    assert len(notes) == 2
    assert "'odd': rms_norm_eps is 0.001" in notes[0]
    assert "'odd': no tokenizer files" in notes[1]


# -- what is refused ------------------------------------------------------------------------------------------


def refusal(base: Path, experts: dict[str, Path]) -> str:
    """The one line in which the pool is refused."""

    def opened() -> None:
        pool = ModelPool.open(base, experts)
        pool.check_mergeable()
        pool.manifest()

    with pytest.raises(UserError) as caught:
        opened()
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


def test_missing_folder(tiny_model: Any, tmp_path: Path) -> None:
    """A path that is no folder is named, as the base and as an expert."""
    assert f"{tmp_path / 'gone'}: no such model folder" in refusal(tmp_path / "gone", {})
    assert f"{tmp_path / 'gone'}: no such model folder" in refusal(tiny_model("llama"), {"x": tmp_path / "gone"})


def test_pickles_are_refused_and_never_run(tiny_model: Any, tmp_path: Path) -> None:
    """A folder with pickled weights only is refused without the pickle's payload having been executed."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = tiny_model("llama", name="pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    text = refusal(folder, {})

    assert "pytorch_model.bin" in text
    assert "convert them to safetensors" in text
    assert not (tmp_path / "executed").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "executed").exists(), "the payload is a real one"


@pytest.mark.parametrize("share", [0.0, 1e-5, 1e-4, 0.01, 0.5, 0.999999])
def test_truncated_safetensors(tiny_model: Any, share: float) -> None:
    """A weight file cut at any length is named as not whole."""
    folder = tiny_model("llama", name="cut")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: min(int(len(data) * share) + (4 if share == 1e-5 else 0), len(data) - 1)])

    assert f"{file}: not a whole safetensors file" in refusal(folder, {})


def cut_shard(folder: Path) -> None:
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])


def drop_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def leave_folder(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../../secret.safetensors"
    path.write_text(json.dumps(index))


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def two_homes(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = sorted(folder.glob("*.safetensors"))[0]
    (folder / "twice.safetensors").write_bytes(first.read_bytes())
    index["weight_map"]["model.norm.weight"] = "twice.safetensors"
    path.write_text(json.dumps(index))


def name_absent(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (name_absent, "has no tensor 'model.layers.9.mlp.up_proj.weight', but the index says so"),
        (cut_shard, "not a whole safetensors file"),
        (drop_shard, "missing shard; the index names it"),
        (leave_folder, "'../../secret.safetensors' leads out of the folder"),
        (empty_index, "has no weight_map"),
        (two_homes, "stands in two files"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_damaged_shards(tiny_model: Any, tmp_path: Path, damage: Callable[[Path], None], fragment: str) -> None:
    """Every fault of a sharded checkpoint gets its own line."""
    folder = sharded(tiny_model("llama"), tmp_path / "parts")
    damage(folder)

    assert fragment in refusal(folder, {})


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (None, "has no config.json; expected a model folder"),
        ("{", "config.json: is not JSON"),
        ("[1]", "config.json: expected a JSON object"),
        ("\x80", "config.json: is not JSON"),
        ("[" * 100_000, "config.json: is not JSON"),
        ('{"model_type": "clip"}', "architecture 'clip' is not a causal language model"),
        ('{"model_type": "own", "auto_map": {}}', "it brings code of its own, which is never run"),
        ('{"model_type": "bart"}', "is an encoder-decoder"),
        ('{"model_type": "bert"}', "is an encoder"),
        ('{"model_type": "gemma3"}', "is multi-modal"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "transformers cannot read it (integer division"),
        ('{"model_type": "llama", "hidden_act": "evil"}', "transformers cannot build it"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000}', "num_hidden_layers"),
        ('{"model_type": "llama", "num_hidden_layers": -1}', "num_hidden_layers"),
        ('{"model_type": "mistal"}', "did you mean 'mistral'"),
        ('{"model_type": "llama"}', "has shape [512, 32], but by config.json it should have [32000, 4096]"),
        ('{"model_type": "llama", "num_hidden_layers": "two"}', "num_hidden_layers"),
        ('{"model_type": ["llama"], "num_hidden_layers": 2}', "architecture ['llama'] is not"),
    ],
)
def test_bad_config(tiny_model: Any, text: str | None, fragment: str) -> None:
    """A config.json that is missing, unreadable or of an unknown model is refused in one line."""
    folder = tiny_model("llama", name="config")
    if text is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(text, encoding="latin-1")

    assert fragment in refusal(folder, {})


def test_no_weights_at_all(tiny_model: Any) -> None:
    """A folder without weights says which files were looked for."""
    folder = tiny_model("llama", name="empty")
    (folder / "model.safetensors").unlink()
    missing = refusal(folder, {})
    save_file({}, folder / "model.safetensors")

    assert "no model.safetensors" in missing
    assert "hold no tensors" in refusal(folder, {})


MLP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda t: t.update({MLP: t[MLP].to(torch.int8)}), (MLP, "stored as I8", "F32, BF16, F16")),
        (lambda t: t.update({"model.vision.weight": torch.ones(2)}), ("model.vision.weight", "not part of the llama")),
        (lambda t: t.pop("lm_head.weight"), ("'lm_head.weight' is missing",)),
        (lambda t: t.pop("model.embed_tokens.weight"), ("'model.embed_tokens.weight' is missing",)),
        (lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}), ("layers.7", "with 2 layers")),
        (
            lambda t: [t.pop(n) for n in list(t) if ".1.mlp." in n],
            ("'model.layers.1.mlp.gate_proj.weight' is missing",),
        ),
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
            ("'model.layers.1.self_attn.k_proj.weight' is missing",),
        ),
        (lambda t: t.pop("model.norm.weight"), ("'model.norm.weight' is missing",)),
    ],
    ids=["int8", "foreign", "no head", "no embedding", "layer beyond", "no mlp", "a gap", "no final norm"],
)
def test_odd_tensors(tiny_model: Any, change: Callable[[Any], object], fragments: tuple[str, ...]) -> None:
    """Quantised, foreign, missing and surplus tensors are named."""
    folder = tiny_model("llama", name="odd")
    change_weights(folder, change)

    text = refusal(folder, {})
    assert all(f in text for f in fragments), text


def test_expert_of_another_architecture(tiny_model: Any) -> None:
    """Both architectures are named."""
    text = refusal(tiny_model("llama"), {"alien": tiny_model("mistral")})

    assert "expert 'alien'" in text
    assert "architecture 'mistral', but the base is 'llama'" in text


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        ({"intermediate_size": 64}, ("shape of 'model.layers.0.mlp.", "64", "48")),
        ({"hidden_size": 64}, ("[512, 64]", "[512, 32]")),
        ({"num_hidden_layers": 3}, ("3 layers, but the base has 2",)),
        ({"tied": True}, ("tie_word_embeddings is True, but the base's is False",)),
        ({"num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1}, ("num_attention_heads is 2",)),
        ({"attention_bias": True}, ("is not in the base", ".bias")),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_expert_of_another_shape(tiny_model: Any, config: dict[str, Any], fragments: tuple[str, ...]) -> None:
    """The tensor and both shapes are named, or the setting and both values."""
    text = refusal(tiny_model("llama"), {"odd": tiny_model("llama", 1, **config)})

    assert "expert 'odd'" in text
    assert all(f in text for f in fragments), text


def test_expert_without_a_tensor(tiny_model: Any) -> None:
    """A tensor that the base has and the expert lacks is named."""
    expert = tiny_model("qwen2", 1, name="lacking")
    change_weights(expert, lambda t: [t.pop(f"model.layers.{i}.self_attn.q_proj.bias") for i in (0, 1)])

    assert "'model.layers.0.self_attn.q_proj.bias' is missing" in refusal(tiny_model("qwen2"), {"x": expert})


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_expert_with_another_tokenizer(tiny_model: Any) -> None:
    """A token with two ids and an id with two tokens are refused by the token; so is an unreadable vocabulary."""
    swapped, taken, broken = (tiny_model("llama", 1, name=n) for n in ("swapped", "taken", "broken"))
    vocabulary = json.loads((swapped / "tokenizer.json").read_text())["model"]["vocab"]
    first, second, last = list(vocabulary)[300], list(vocabulary)[301], list(vocabulary)[511]

    def swap(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        vocab[first], vocab[second] = vocab[second], vocab[first]

    change_tokenizer(swapped, swap)
    change_tokenizer(taken, lambda d: d["added_tokens"].append({"id": 511, "content": "<extra>"}))
    (broken / "tokenizer.json").write_text('{"model": {"vocab": 3}, "added_tokens": [7]}')

    text = refusal(tiny_model("llama"), {"x": swapped})
    assert "another tokenizer" in text
    assert repr(min(first, second)) in text
    assert f"'<extra>' has id 511, in the base that is {last!r}" in refusal(tiny_model("llama"), {"x": taken})
    assert "tokenizer.json" in refusal(tiny_model("llama"), {"x": broken})


def test_old_tokenizer_files_are_compared_too(tiny_model: Any) -> None:
    """Without tokenizer.json, vocab.json and added_tokens.json are the vocabulary."""
    base, same, other = (tiny_model("gpt2", i, name=n) for i, n in enumerate(("base", "same", "other")))
    for folder, token in ((base, "b"), (same, "b"), (other, "c")):
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps({"a": 0, token: 1}))
        (folder / "added_tokens.json").write_text('{"<pad>": 2}')
    (same / "added_tokens.json").write_text('{"<pad>": 2, "<more>": 3}')

    assert any("'<more>' is not in the base's" in n for n in ModelPool.open(base, {"x": same}).notes())
    assert "token 'c' has id 1, in the base that is 'b'" in refusal(base, {"x": other})


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        (520, "expert 'x': 520 token rows, the base has 512; rows 512 to 519 are left out"),
        (504, "expert 'x': 504 token rows, the base has 512; rows 504 to 511 are the base's"),
    ],
)
def test_vocabularies_of_other_length_are_noted(tiny_model: Any, rows: int, note: str) -> None:
    """More or fewer rows are aligned by token id, with a note; so are added tokens, which the base does not know."""
    expert = tiny_model("llama", 1, vocab_size=rows, name="longer")
    change_tokenizer(expert, lambda d: d["added_tokens"].append({"id": 515, "content": "<extra>"}))
    pool = ModelPool.open(tiny_model("llama"), {"x": expert})

    added = "expert 'x': token '<extra>' is not in the base's tokenizer, which the merge uses"
    assert pool.notes() == [note, added]
    assert {t.shape for t in pool.manifest().tensors if t.block in ("embed", "head")} == {(512, 32)}


def test_duplicate_experts(tiny_model: Any) -> None:
    """Two names for the same weights, and an expert that is the base, are refused by name."""
    base, expert = tiny_model("llama"), tiny_model("llama", 1)

    assert "'b' and 'a' hold the same weights" in refusal(base, {"a": expert, "b": tiny_model("llama", 1, name="b")})
    assert "'a' and 'base' hold the same weights" in refusal(base, {"a": base})
    assert "may not be called 'base'" in refusal(base, {"base": expert})
