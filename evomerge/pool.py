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
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from evomerge.architectures import ARCHITECTURES, block_order
from evomerge.errors import UserError
from evomerge.manifest import Manifest, TensorInfo, lay_out
from evomerge.stock import Conversion, Stock

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Stored dtypes that can be merged; quantised weights cannot."""
RECIPE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_JSON = 50_000_000
"""Bytes of a config, an index or a tokenizer.json."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a checkpoint as the live model has it: shape, and dtype as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """One model folder in the usual transformers layout. Tensors are read lazily through mmap.

    `tensors` and `tensor` speak of the live model's parameters, whatever the files call them and however they
    cut them; `stored_form` goes back.
    """

    def __init__(self, path: Path) -> None:
        """Read config and headers. Raises UserError for anything missing, unreadable, foreign or pickled."""
        self.path = path
        if not path.is_dir():
            raise UserError(f"{path}: no such model folder; expected one with config.json and *.safetensors")
        if not (path / "config.json").is_file():
            raise UserError(f"{path}: has no config.json; expected a model folder with config.json and *.safetensors")
        self.config: dict[str, Any] = read_json(path / "config.json")
        self._open: dict[Path, Any] = {}
        self._files = self._headers()
        self.stock = Stock(path, self.config)
        self.model_type = str(self.stock.model_type)
        self._placed = self.stock.place(path, self._files)
        self._plain = dict(self._placed.plain)
        for alias, name in self._placed.aliases.items():
            self._plain.setdefault(self.stock.aliases[alias], name)  # a tied pair may be stored under either name
        self._conversion: dict[str, Conversion] = {}
        made: dict[str, Parameter] = {}
        for conversion in self._placed.conversions:
            parts = self._converted(conversion)
            made |= parts
            self._conversion |= dict.fromkeys(parts, conversion)
        self.tensors = {n: p for n in self.stock.shapes if (p := self._parameter(n, made)) is not None}
        """Parameter -> shape and dtype, in the live model's order; tied ones once."""
        self.foreign = self._placed.foreign
        """Stored names that the architecture has no place for."""

    def _headers(self) -> dict[str, Path]:
        """Stored name -> file. Raises UserError for what is not whole, doubled or of a dtype that cannot be merged."""
        named, files = _weight_files(self.path)
        out: dict[str, Path] = {}
        for file in files:
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name in out:
                    raise UserError(f"{self.path}: tensor {name!r} stands in two files; keep one")
                out[name] = file
        if not out:
            raise UserError(f"{self.path}: the safetensors files hold no tensors")
        for name, file in named.items():
            if out.get(name) != file:
                raise UserError(f"{file}: has no tensor {name!r}, but the index says so; fetch the checkpoint again")
        return out

    def _converted(self, conversion: Conversion) -> dict[str, Parameter]:
        """The parameters that a conversion makes, found out on the meta device."""

        def blank(name: str) -> torch.Tensor:
            part = self._handle(self._files[name]).get_slice(name)
            dtype = _mergeable(self.path, name, str(part.get_dtype()), self.config)
            return torch.empty(part.get_shape(), dtype=dtype, device="meta")

        try:
            made = conversion(blank)
        except UserError:
            raise
        except Exception as e:
            raise UserError(
                f"{self.path}: transformers cannot convert tensor {conversion.sources[0][1]!r} "
                f"({' '.join(str(e).split())[:200] or type(e).__name__}); the checkpoint may not be whole"
            ) from None
        return {
            n: Parameter(tuple(t.shape), next(k for k, d in DTYPES.items() if d == t.dtype)) for n, t in made.items()
        }

    def _parameter(self, name: str, made: Mapping[str, Parameter]) -> Parameter | None:
        """One parameter, stored as it is or made by a conversion; None where the files lack it."""
        if name not in self._plain:
            return made.get(name)
        part = self._handle(self._files[self._plain[name]]).get_slice(self._plain[name])
        dtype = str(part.get_dtype())
        _mergeable(self.path, self._plain[name], dtype, self.config)
        return Parameter(tuple(part.get_shape()), dtype)

    def check_whole(self) -> None:
        """Raise UserError where files and config.json do not make one model, naming the first tensor."""
        counted = f"the {self.model_type} architecture with {self.layers} layers (num_hidden_layers in config.json)"
        if self.foreign:
            raise UserError(f"{self.path}: tensor {self.foreign[0]!r} is not part of {counted}")
        for name, shape in self.stock.shapes.items():
            found = self.tensors.get(name)
            if found is None:
                raise UserError(f"{self.path}: tensor {name!r} is missing, a part of {counted}")
            if found.shape != shape:
                raise UserError(
                    f"{self.path}: tensor {name!r} has shape {list(found.shape)}, but by config.json it should have "
                    f"{list(shape)}"
                )

    @property
    def tied(self) -> bool:
        """True where the head shares the embedding's weights."""
        return self.stock.tied

    @property
    def layers(self) -> int:
        """Number of transformer layers by config.json."""
        return self.stock.layers

    @property
    def context_length(self) -> int:
        """Tokens that the model takes; 2**30 where config.json sets no limit."""
        return self.stock.context_length

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        """Token -> id, None without tokenizer files that tell. Raises UserError where they cannot be read."""
        return vocabulary(self.path)

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as e:
                reason = str(e).splitlines()[0]
                raise UserError(f"{file}: not a whole safetensors file ({reason}); fetch it again") from None
        return self._open[file]

    def _stored(self, name: str) -> torch.Tensor:
        return self._handle(self._files[name]).get_tensor(name)

    def tensor(self, name: str) -> torch.Tensor:
        """One parameter in its stored dtype, a view of the mapped file unless it has to be converted."""
        if name in self._plain:
            return self._stored(self._plain[name])
        return self._conversion[name](self._stored)[name]

    def sha256(self) -> str:
        """Content hash: parameters' names, dtypes, shapes and bytes in name order; independent of the files."""
        total = hashlib.sha256()
        for name in sorted(self.tensors):
            t = self.tensors[name]
            total.update(f"{name}\0{t.dtype}\0{list(t.shape)}\0".encode())
            total.update(raw_bytes(self.tensor(name)))
        return total.hexdigest()

    def stored_form(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameters under this checkpoint's own tensor names and in its cut, so that they load as it does."""
        out = {self._plain[n]: t for n, t in weights.items() if n in self._plain}
        converted = {n: t for n, t in weights.items() if n not in self._plain}
        reverted = self.stock.reverted(converted) if converted else {}
        # Where the conversion does not lead back to the names we read, transformers' own load as well.
        return out | (reverted if set(reverted) <= set(self._files) else converted)

    def differing_copies(self) -> list[str]:
        """Stored names of tied parameters whose contents differ from the ones that count. Reads both."""
        out = []
        for alias, name in self._placed.aliases.items():
            kept = self._plain[self.stock.aliases[alias]]
            if kept != name:
                a, b = self._stored(kept), self._stored(name)
                if a.dtype != b.dtype or not torch.equal(a, b):
                    out.append(name)
        return out


def _mergeable(path: Path, name: str, dtype: str, config: Mapping[str, Any]) -> torch.dtype:
    if dtype not in DTYPES:
        hint = "; the model is quantised, use its full-precision original" if "quantization_config" in config else ""
        raise UserError(f"{path}: tensor {name!r} is stored as {dtype}; mergeable are {', '.join(DTYPES)}{hint}")
    return DTYPES[dtype]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's bytes, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises UserError."""
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


def _weight_files(path: Path) -> tuple[dict[str, Path], list[Path]]:
    """(tensor -> file by the index, empty without one; all files)."""
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
        return {str(n): path / str(f) for n, f in names.items()}, [path / f for f in files]
    single = path / "model.safetensors"
    if single.is_file():
        return {}, [single]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(pattern))
    if pickles:
        raise UserError(
            f"{path}: holds only pickled weights ({pickles[0]}), which can run code and are not read; "
            "convert them to safetensors first"
        )
    raise UserError(f"{path}: no model.safetensors and no model.safetensors.index.json")


def _check_alike(base: Checkpoint, expert: Checkpoint, name: str) -> None:
    """Raise UserError where the expert cannot be merged with the base, tensor by tensor."""
    who = f"expert {name!r} ({expert.path})"
    if expert.model_type != base.model_type:
        raise UserError(f"{who}: architecture {expert.model_type!r}, but the base is {base.model_type!r}")
    if expert.tied != base.tied:
        raise UserError(f"{who}: tie_word_embeddings is {expert.tied}, but the base's is {base.tied}")
    row = ARCHITECTURES.get(base.model_type)
    if expert.layers != base.layers and row is None:
        raise UserError(
            f"{who}: {expert.layers} layers, but the base has {base.layers}; routes through models of different depth "
            f"are known for {', '.join(ARCHITECTURES)}"
        )

    def beyond(name: str, layers: int) -> bool:
        found = None if row is None else row.layer.fullmatch(name)
        return found is not None and int(found[1]) >= layers

    for n, t in base.tensors.items():
        other = expert.tensors.get(n)
        if other is None and beyond(n, expert.layers):
            continue
        if other is None:
            raise UserError(f"{who}: tensor {n!r} is missing")
        by_token = n in base.stock.rows  # a vocabulary may be longer or shorter
        if (other.shape[1:] if by_token else other.shape) != (t.shape[1:] if by_token else t.shape):
            raise UserError(f"{who}: shape of {n!r} is {list(other.shape)}, but the base's is {list(t.shape)}")
    extra = sorted(n for n in expert.tensors if n not in base.tensors and not beyond(n, base.layers))
    if extra:
        raise UserError(f"{who}: tensor {extra[0]!r} is not in the base")
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        mine, theirs = (getattr(c.stock.config, key, None) for c in (expert, base))
        if mine != theirs:
            raise UserError(f"{who}: {key} is {mine}, but the base's is {theirs}")
    _check_tokenizers(base, expert, who)


_WAY_OUT = (
    "take the base that this expert was trained from, or leave the expert out (`evomerge inspect` compares pools)"
)


def _check_tokenizers(base: Checkpoint, expert: Checkpoint, who: str) -> None:
    """Compare vocabularies; an expert without tokenizer files is taken to use the base's.

    Rows of the embeddings are tokens by id. What only one side has changes nothing; a token with two ids, and an
    id with two tokens, is a conflict that no alignment by id can mend.
    """
    ours, theirs = base.vocabulary, expert.vocabulary
    if ours is not None and theirs is not None:
        for token in sorted(ours.keys() & theirs.keys()):
            if ours[token] != theirs[token]:
                raise UserError(
                    f"{who}: another tokenizer: token {token!r} has id {theirs[token]}, in the base {ours[token]}"
                    f"; {_WAY_OUT}"
                )
        by_id = {i: t for t, i in ours.items()}
        for token in sorted(theirs.keys() - ours.keys()):
            other = by_id.get(theirs[token])
            if other is not None:
                raise UserError(
                    f"{who}: another tokenizer: token {token!r} has id {theirs[token]}, in the base that is {other!r}"
                    f"; {_WAY_OUT}"
                )
        return
    a, b = base.path / "tokenizer.model", expert.path / "tokenizer.model"
    if a.exists() and b.exists() and a.read_bytes() != b.read_bytes():
        raise UserError(f"{who}: another tokenizer: tokenizer.model differs from the base's; {_WAY_OUT}")


def vocabulary(folder: Path) -> dict[str, int] | None:
    """token -> id of a folder's tokenizer.json, else of its vocab.json and added_tokens.json, else None."""
    path = folder / "tokenizer.json"
    try:
        if not path.exists():
            path = folder / "vocab.json"
            if not path.exists():
                return None
            more = folder / "added_tokens.json"
            both = {**read_json(path), **(read_json(more) if more.exists() else {})}
            return {str(t): int(i) for t, i in both.items()}
        tokenizer = read_json(path)
        vocab = (tokenizer.get("model") or {}).get("vocab") or {}
        if isinstance(vocab, list):  # Unigram: [token, log probability] in id order
            vocab = {str(pair[0]): i for i, pair in enumerate(vocab)}
        added = {str(t["content"]): int(t["id"]) for t in tokenizer.get("added_tokens") or ()}
        return {**vocab, **added}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path}: holds no vocabulary that can be read") from None


COMPARED = (
    *("rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    *("sliding_window", "layer_types", "hidden_act", "hidden_activation", "activation_function"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "partial_rotary_factor"),
)
"""Settings in which an expert may differ from the base, whose the merge uses."""


def notes_on(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Differences that do not stop a merge but deserve a look."""
    yield from base.stock.notes
    for name, c in {"base": base, **experts}.items():
        who = "base" if c is base else f"expert {name!r}"
        for stored in c.differing_copies():
            yield (
                f"{who}: its config ties embedding and head, but {stored} is stored with other contents; the merge "
                "ties them and uses the embedding (transformers would not tie this checkpoint)"
            )
    for name, e in experts.items():
        for key in COMPARED:
            if e.config.get(key) != base.config.get(key):
                yield f"expert {name!r}: {key} is {e.config.get(key)}, the merge uses the base's {base.config.get(key)}"
        ours, theirs = base.vocabulary, e.vocabulary
        if theirs is None and not (e.path / "tokenizer.model").exists():
            yield f"expert {name!r}: no tokenizer files; taken to use the base's"
        yield from _vocabulary_notes(base, e, f"expert {name!r}")
        if ours is not None and theirs is not None and (added := sorted(theirs.keys() - ours.keys())):
            more = f" and {len(added) - 1} more" if len(added) > 1 else ""
            yield f"expert {name!r}: token {added[0]!r}{more} is not in the base's tokenizer, which the merge uses"


def _vocabulary_notes(base: Checkpoint, expert: Checkpoint, who: str) -> Iterator[str]:
    """How rows are aligned where the vocabularies differ in length."""
    name = min(base.stock.embed)
    ours, theirs = base.tensors[name].shape[0], expert.tensors[name].shape[0]
    if theirs > ours:
        yield f"{who}: {theirs} token rows, the base has {ours}; rows {ours} to {theirs - 1} are left out"
    elif theirs < ours:
        yield f"{who}: {theirs} token rows, the base has {ours}; rows {theirs} to {ours - 1} are the base's"


@dataclass(frozen=True)
class ModelPool:
    """Base and experts that fit together."""

    base: str
    checkpoints: Mapping[str, Checkpoint]

    @classmethod
    def open(cls, base: Path, experts: Mapping[str, Path], base_name: str = "base") -> ModelPool:
        """Open and check all folders; no weights are read. Raises UserError."""
        first = Checkpoint(base)
        first.check_whole()
        opened = {base_name: first}
        for name, path in experts.items():
            if name == base_name:
                raise UserError(f"an expert may not be called {base_name!r}: that is the base")
            expert = Checkpoint(path)
            expert.check_whole()
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

    def check_mergeable(self) -> None:
        """Raise UserError for an expert of another depth than the base, which only routes can use."""
        base = self.checkpoints[self.base]
        for name, c in self.checkpoints.items():
            if c.layers != base.layers:
                raise UserError(
                    f"expert {name!r} ({c.path}): {c.layers} layers, but the base has {base.layers}; only layer routes "
                    "go through models of different depth"
                )

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
        layers = {n: c.layers for n, c in self.checkpoints.items()}
        tensors = self._layout(self.base)
        others = {n: self._layout(n) for n, count in layers.items() if count != layers[self.base]}
        return Manifest(self.base, layers, tensors, hashes, others)

    def _layout(self, source: str) -> tuple[TensorInfo, ...]:
        """The flat layout of one source; the vocabulary is the base's."""
        own, base = self.checkpoints[source], self.checkpoints[self.base]
        shapes = {n: base.tensors[n].shape if n in base.stock.rows else t.shape for n, t in own.tensors.items()}
        rows = [(n, shapes[n], t.dtype, own.stock.blocks[n]) for n, t in own.tensors.items()]
        rows.sort(key=lambda r: (block_order(r[3]), r[0]))
        return lay_out(rows)
