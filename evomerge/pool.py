"""ModelPool: a base and its experts, opened by mmap, checked against each other and hashed.

Every complaint names the folder or tensor, what was expected and what came, before anything is loaded.
Only safetensors are read: pickled checkpoints can run code and are refused, never executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from evomerge.architectures import ARCHITECTURES, Architecture, block_order
from evomerge.errors import UserError, nearest
from evomerge.manifest import Manifest, lay_out

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Stored dtypes that can be merged; quantised weights cannot."""
RECIPE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_JSON = 50_000_000
"""Bytes of a config, an index or a tokenizer.json."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, shape, dtype as safetensors names it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """One model folder in the usual transformers layout. Tensors are read lazily through mmap."""

    def __init__(self, path: Path) -> None:
        """Read config and headers. Raises UserError for anything missing, unreadable or pickled."""
        self.path = path
        if not path.is_dir():
            raise UserError(f"{path}: no such model folder; expected one with config.json and *.safetensors")
        if not (path / "config.json").is_file():
            raise UserError(f"{path}: has no config.json; expected a model folder with config.json and *.safetensors")
        self.config: dict[str, Any] = read_json(path / "config.json")
        self.model_type = str(self.config.get("model_type"))
        if self.model_type not in ARCHITECTURES:
            raise UserError(
                f"{path}: architecture {self.model_type!r} is not supported{nearest(self.model_type, ARCHITECTURES)}"
            )
        self.architecture: Architecture = ARCHITECTURES[self.model_type]
        layers = self.config.get("num_hidden_layers")
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise UserError(f"{path / 'config.json'}: num_hidden_layers should be a whole number, got {layers!r}")
        self._open: dict[Path, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(path):
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = handle.get_slice(name)
                if self.architecture.ignored.fullmatch(name):
                    continue
                if name in self.tensors:
                    raise UserError(f"{path}: tensor {name!r} stands in two files; keep one")
                self.tensors[name] = StoredTensor(file, tuple(part.get_shape()), str(part.get_dtype()))
        if not self.tensors:
            raise UserError(f"{path}: the safetensors files hold no tensors")
        if self.tied:
            # Tied models are stored with or without the second name; the embedding is the one that counts.
            self.tensors.pop(self.architecture.head, None)

    @property
    def tied(self) -> bool:
        """True where the head shares the embedding's weights."""
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def layers(self) -> int:
        """Number of transformer layers by config.json."""
        return int(self.config["num_hidden_layers"])

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as e:
                reason = str(e).splitlines()[0]
                raise UserError(f"{file}: not a whole safetensors file ({reason}); fetch it again") from None
        return self._open[file]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored, a view of the mapped file."""
        return self._handle(self.tensors[name].file).get_tensor(name)

    def sha256(self) -> str:
        """Content hash: names, dtypes, shapes and bytes in name order; independent of sharding."""
        total = hashlib.sha256()
        for name in sorted(self.tensors):
            t = self.tensors[name]
            total.update(f"{name}\0{t.dtype}\0{list(t.shape)}\0".encode())
            total.update(raw_bytes(self.tensor(name)))
        return total.hexdigest()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's bytes, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_json(path: Path) -> dict[str, Any]:
    """One bounded JSON file that holds an object. Raises UserError."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{path}: larger than {MAX_JSON} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is not JSON") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object")
    return data


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index}: has no weight_map")
        files = sorted({str(f) for f in names.values()})
        for f in files:
            if Path(f).name != f:
                raise UserError(f"{index}: the file name {f!r} leads out of the folder")
            if not (path / f).is_file():
                raise UserError(f"{path / f}: missing shard; the index names it")
        return [path / f for f in files]
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(pattern))
    if pickles:
        raise UserError(
            f"{path}: holds only pickled weights ({pickles[0]}), which can run code and are not read; "
            "convert them to safetensors first"
        )
    raise UserError(f"{path}: no model.safetensors and no model.safetensors.index.json")


def _check_names(c: Checkpoint) -> None:
    """Every tensor must have a block, and every numbered layer must be there."""
    for name, t in c.tensors.items():
        block = c.architecture.block_of(name)
        if block is None:
            raise UserError(f"{c.path}: tensor {name!r} is not part of the {c.model_type} architecture")
        if t.dtype not in DTYPES:
            raise UserError(f"{c.path}: tensor {name!r} is stored as {t.dtype}; mergeable are {', '.join(DTYPES)}")
        if block.startswith("layers.") and int(block.split(".")[1]) >= c.layers:
            raise UserError(f"{c.path}: tensor {name!r} lies beyond the {c.layers} layers of config.json")
    needed = [c.architecture.embed, f"{c.architecture.final_norm}.weight", *([] if c.tied else [c.architecture.head])]
    for name in needed:
        if name not in c.tensors:
            raise UserError(f"{c.path}: tensor {name!r} is missing")
    found = {c.architecture.block_of(n) for n in c.tensors}
    for i in range(c.layers):
        for module in ("attention", "mlp"):
            if f"layers.{i}.{module}" not in found:
                raise UserError(
                    f"{c.path}: layer {i} has no {module} tensors, but config.json counts {c.layers} layers"
                )
    parts = {(int(m[1]), m[2]) for n in c.tensors if (m := c.architecture.layer.fullmatch(n))}
    for part in sorted({p for _, p in parts}):
        for i in range(c.layers):
            if (i, part) not in parts:
                raise UserError(
                    f"{c.path}: layer {i} has no {part!r}, but other layers do; the checkpoint is not whole"
                )


def _check_alike(base: Checkpoint, expert: Checkpoint, name: str) -> None:
    """Raise UserError where the expert cannot be merged with the base, tensor by tensor."""
    who = f"expert {name!r} ({expert.path})"
    if expert.model_type != base.model_type:
        raise UserError(f"{who}: architecture {expert.model_type!r}, but the base is {base.model_type!r}")
    if expert.layers != base.layers:
        raise UserError(f"{who}: {expert.layers} layers, but the base has {base.layers}")
    if expert.tied != base.tied:
        raise UserError(f"{who}: tie_word_embeddings is {expert.tied}, but the base's is {base.tied}")
    for n, t in base.tensors.items():
        other = expert.tensors.get(n)
        if other is None:
            raise UserError(f"{who}: tensor {n!r} is missing")
        if other.shape != t.shape:
            what = "vocabulary" if base.architecture.block_of(n) in ("embed", "head") else "shape"
            raise UserError(f"{who}: {what} of {n!r} is {list(other.shape)}, but the base's is {list(t.shape)}")
    extra = sorted(set(expert.tensors) - set(base.tensors))
    if extra:
        raise UserError(f"{who}: tensor {extra[0]!r} is not in the base")
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        if expert.config.get(key, base.config.get(key)) != base.config.get(key):
            raise UserError(f"{who}: {key} is {expert.config.get(key)}, but the base's is {base.config.get(key)}")
    _check_tokenizers(base, expert, who)


def _check_tokenizers(base: Checkpoint, expert: Checkpoint, who: str) -> None:
    """Compare vocabularies; an expert without tokenizer files is taken to use the base's."""
    a, b = base.path / "tokenizer.json", expert.path / "tokenizer.json"
    if a.exists() and b.exists():
        ta, tb = vocabulary(a), vocabulary(b)
        for token in sorted(set(ta) | set(tb)):
            if ta.get(token) != tb.get(token):
                raise UserError(
                    f"{who}: another tokenizer: token {token!r} has id {tb.get(token)}, in the base {ta.get(token)}"
                )
        return
    a, b = base.path / "tokenizer.model", expert.path / "tokenizer.model"
    if a.exists() and b.exists() and a.read_bytes() != b.read_bytes():
        raise UserError(f"{who}: another tokenizer: tokenizer.model differs from the base's")


def vocabulary(path: Path) -> dict[str, int]:
    """Token -> id of a tokenizer.json, added tokens included. Raises UserError."""
    tokenizer = read_json(path)
    try:
        vocab = (tokenizer.get("model") or {}).get("vocab") or {}
        if isinstance(vocab, list):  # Unigram: [token, log probability] in id order
            vocab = {str(pair[0]): i for i, pair in enumerate(vocab)}
        added = {str(t["content"]): int(t["id"]) for t in tokenizer.get("added_tokens") or ()}
        return {**vocab, **added}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: holds no vocabulary that can be read") from None


def notes_on(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Differences that do not stop a merge but deserve a look."""
    for name, e in experts.items():
        for key in (
            "rope_parameters",
            "rope_theta",
            "rope_scaling",
            "rms_norm_eps",
            "sliding_window",
            "hidden_act",
        ):
            if e.config.get(key) != base.config.get(key):
                yield f"expert {name!r}: {key} is {e.config.get(key)}, the merge uses the base's {base.config.get(key)}"
        if not (e.path / "tokenizer.json").exists() and not (e.path / "tokenizer.model").exists():
            yield f"expert {name!r}: no tokenizer files; taken to use the base's"


@dataclass(frozen=True)
class ModelPool:
    """Base and experts that fit together."""

    base: str
    checkpoints: Mapping[str, Checkpoint]

    @classmethod
    def open(cls, base: Path, experts: Mapping[str, Path], base_name: str = "base") -> ModelPool:
        """Open and check all folders; no weights are read. Raises UserError."""
        first = Checkpoint(base)
        _check_names(first)
        opened = {base_name: first}
        for name, path in experts.items():
            if name == base_name:
                raise UserError(f"an expert may not be called {base_name!r}: that is the base")
            expert = Checkpoint(path)
            _check_names(expert)
            _check_alike(first, expert, name)
            opened[name] = expert
        return cls(base_name, opened)

    @property
    def stored_dtype(self) -> str:
        """The base's dtype as recipes name it, by most parameters."""
        sizes: dict[str, int] = {}
        for t in self.checkpoints[self.base].tensors.values():
            sizes[t.dtype] = sizes.get(t.dtype, 0) + int(torch.Size(t.shape).numel())
        return RECIPE_DTYPES[max(sizes, key=lambda d: sizes[d])]

    def notes(self) -> list[str]:
        """Differences worth a look."""
        experts = {n: c for n, c in self.checkpoints.items() if n != self.base}
        return list(notes_on(self.checkpoints[self.base], experts))

    def manifest(self) -> Manifest:
        """Layout and content hashes. Reads every weight once. Raises UserError on duplicate experts."""
        with ThreadPoolExecutor() as threads:  # hashlib releases the GIL
            digests = list(threads.map(lambda c: c.sha256(), self.checkpoints.values()))
        hashes = dict(zip(self.checkpoints, digests, strict=True))
        seen: dict[str, str] = {}
        for name, digest in hashes.items():
            if digest in seen:
                raise UserError(f"{name!r} and {seen[digest]!r} hold the same weights; remove one")
            seen[digest] = name
        base = self.checkpoints[self.base]
        rows = []
        for name, t in base.tensors.items():
            block = base.architecture.block_of(name)
            if block is not None:
                rows.append((name, t.shape, t.dtype, block))
        rows.sort(key=lambda r: (block_order(r[3]), r[0]))
        return Manifest(self.base, {n: c.layers for n, c in self.checkpoints.items()}, lay_out(rows), hashes)
