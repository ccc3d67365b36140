"""`evomerge inspect`: what stands between a pool and a good merge, seen in its weights and files alone.

A task vector is an expert minus the base (Ilharco et al. 2023, arXiv 2212.04089). Its length says how far training
went, the cosine of two says whether they share a direction, and entries that pull a weight to opposite sides cancel
when they are added, which is what TIES sets out to mend (Yadav et al. 2023, arXiv 2306.01708, section 3).

Weights are read through mmap, one tensor at a time, in chunks: beside one task vector of the largest tensor in fp32
little is resident. Differences are formed in fp32, as a merge forms them, and summed in fp64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.architectures import block_order
from evomerge.errors import UserError
from evomerge.licences import Licence, licence_of, remarks
from evomerge.pool import DTYPES, Checkpoint, ModelPool, read_json, vocabulary

TOP = 0.2
"""Share of a tensor's entries, largest by magnitude, that count for sign conflicts: the 20% that TIES keeps."""
FAR = 1.0
"""Relative delta norm above which the base is likely wrong. Two models trained apart, of like length, lie near
sqrt(2); at 1 an expert is as far from the base as the zero model is. Fine-tunes stay well below: the quickstart's,
trained hard, reach 0.34."""
NEARER = 0.9
"""An expert that lies nearer to another than this share of its distance to the base has likely another base. Task
vectors of independent fine-tunes are near orthogonal, which puts experts farther from each other than from the base;
0.9 needs a cosine of 0.44 at least, whatever their lengths."""
CHUNK = 1 << 16
"""Elements at a time; those of several experts in fp64 stay in a CPU core's cache."""
SAME_ANYWAY = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_from_model_config")
"""Keys of config.json and generation_config.json that say nothing about the model."""
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens", "extra_special_tokens")
TOKENIZER_SETTINGS = (*SPECIAL, "add_bos_token", "add_eos_token", "tokenizer_class")


@dataclass(frozen=True)
class Finding:
    """Something to look at. `severity`: "error" stops a merge, "warning" likely spoils one, "note" is worth knowing.

    `kind`: pool, base, weights, tokenizer, chat_template, generation_config, config, dtype or licence.
    """

    severity: str
    kind: str
    model: str
    text: str


@dataclass(frozen=True)
class Sums:
    """Sums over the entries of some tensors, for K experts; all add up over tensors. Float64 throughout."""

    size: NDArray[np.float64]
    """Entries, shape ()."""
    base: NDArray[np.float64]
    """Squared norm of the base, shape ()."""
    gram: NDArray[np.float64]
    """Inner products of the task vectors, shape (K, K)."""
    unlike: NDArray[np.float64]
    """Above 0 where two task vectors differ anywhere, shape (K, K)."""
    changed: NDArray[np.float64]
    """Entries in which an expert differs from the base, shape (K,)."""
    both: NDArray[np.float64]
    """Entries that are among the top of both experts, shape (K, K); the diagonal counts each one's own."""
    opposed: NDArray[np.float64]
    """Those of `both` in which the signs oppose, shape (K, K)."""

    @classmethod
    def zero(cls, experts: int) -> Sums:
        """Sums over nothing."""
        one, pairs = np.zeros(()), np.zeros((experts, experts))
        return cls(one, one, pairs, pairs, np.zeros(experts), pairs, pairs)

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def norms(self) -> NDArray[np.float64]:
        """Delta norms ||tau||, shape (K,)."""
        return np.asarray(np.sqrt(self.gram.diagonal()))

    @property
    def relative(self) -> NDArray[np.float64]:
        """||tau|| / ||base||, shape (K,); NaN where the base is 0."""
        return _ratio(self.norms, np.sqrt(self.base))

    @property
    def cosines(self) -> NDArray[np.float64]:
        """Cosines of the task vectors, shape (K, K); NaN where one is 0."""
        return _ratio(self.gram, np.outer(self.norms, self.norms))

    @property
    def distances(self) -> NDArray[np.float64]:
        """||expert i - expert j||, shape (K, K)."""
        squares = self.gram.diagonal()
        return np.asarray(np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * self.gram, 0.0)))

    @property
    def conflicts(self) -> NDArray[np.float64]:
        """Sign conflict rate, shape (K, K): of the entries that are among the top of both, the share that oppose.

        An entry is among the top of an expert where its |delta| is not 0 and at least that of the ceil(TOP * n)
        largest of its tensor's n entries. 0 is full agreement, 0.5 is what unrelated experts have; NaN without
        common entries.
        """
        return _ratio(self.opposed, self.both)

    @property
    def overlaps(self) -> NDArray[np.float64]:
        """Entries that are among the top of both as a share of an expert's top (Dice), shape (K, K).

        1 for the same entries, about TOP for unrelated ones.
        """
        own = self.both.diagonal()
        return _ratio(2 * self.both, own[:, None] + own[None])


@dataclass(frozen=True)
class Inspection:
    """What `evomerge inspect` found. `blocks` maps a block to its sums over `experts`, in layout order."""

    base: str
    experts: tuple[str, ...]
    """Those whose weights could be compared."""
    parameters: int
    dtypes: Mapping[str, str]
    licences: Mapping[str, Licence]
    blocks: Mapping[str, Sums]
    left_out: tuple[str, ...]
    """Tensors of the base that are in no figure, because a model lacks them or has another shape."""
    findings: tuple[Finding, ...]

    @property
    def total(self) -> Sums:
        """Over all blocks."""
        return sum(self.blocks.values(), Sums.zero(len(self.experts)))

    @property
    def by_module(self) -> dict[str, Sums]:
        """Sums by module: embed, attention, mlp, norm, final_norm, head."""
        return self._grouped(lambda block: block.rpartition(".")[2])

    @property
    def by_layer(self) -> dict[int, Sums]:
        """Sums by layer, for what lies in layers."""
        return {int(k): v for k, v in self._grouped(lambda b: b.split(".")[1] if "." in b else None).items()}

    def _grouped(self, key: Any) -> dict[str, Sums]:
        out: dict[str, Sums] = {}
        for block, sums in self.blocks.items():
            if (k := key(block)) is not None:
                out[k] = out[k] + sums if k in out else sums
        return out

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Indices of all pairs of experts, i < j."""
        n = len(self.experts)
        return ((i, j) for i in range(n) for j in range(i + 1, n))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; lists over experts follow `experts`, matrices are (experts, experts)."""
        return {
            "base": self.base,
            "experts": list(self.experts),
            "parameters": self.parameters,
            "dtypes": dict(self.dtypes),
            "licences": {n: asdict(li) for n, li in self.licences.items()},
            "overall": _figures(self.total),
            "by_module": {m: _figures(s) for m, s in self.by_module.items()},
            "by_layer": {str(i): _figures(s) for i, s in self.by_layer.items()},
            "by_block": {b: _figures(s) for b, s in self.blocks.items()},
            "left_out": list(self.left_out),
            "findings": [asdict(f) for f in self.findings],
        }


def _figures(sums: Sums) -> dict[str, Any]:
    return {
        "norm": sums.norms.tolist(),
        "relative_norm": sums.relative.tolist(),
        "changed": _ratio(sums.changed, sums.size).tolist(),
        "cosine": sums.cosines.tolist(),
        "distance": sums.distances.tolist(),
        "sign_conflict": sums.conflicts.tolist(),
        "overlap": sums.overlaps.tolist(),
    }


def _ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """a / b, NaN for a division by 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(b == 0, np.nan, a / b))


def _depth_findings(pool: ModelPool, expert: str) -> list[Finding]:
    """No merge goes without it, but a layer route may."""
    try:
        pool.check_mergeable()
    except UserError as e:
        return [Finding("warning", "pool", expert, str(e))]
    return []


def inspect_pool(base: tuple[str, Path], experts: Mapping[str, Path]) -> Inspection:
    """Compare experts with a base, (name, folder) each. Raises UserError where the base itself cannot be read.

    What would stop a merge is a finding; an expert that cannot be compared is left out of the figures.
    """
    name, folder = base
    first = Checkpoint(folder)
    findings: list[Finding] = []
    opened: dict[str, Checkpoint] = {}
    for expert, path in experts.items():
        try:
            pool = ModelPool.open(folder, {expert: path}, name)
        except UserError as e:
            findings.append(Finding("error", "pool", expert, str(e)))
        else:
            findings += _depth_findings(pool, expert)
        try:
            opened[expert] = Checkpoint(path)
        except UserError:
            continue  # the same complaint stands there already
    compared = {n: c for n, c in opened.items() if _comparable(first, c)}
    alike = [n for n, t in first.tensors.items() if all(_same(first, c, n) for c in compared.values())]
    if not alike:
        raise UserError(f"{folder}: no tensor of it can be compared with an expert")
    blocks: dict[str, Sums] = {}
    for block, tensors in _by_block(first, alike).items():
        blocks[block] = Sums.zero(len(compared))
        for tensor in tensors:
            blocks[block] += sums_of(first.tensor(tensor), [c.tensor(tensor) for c in compared.values()])
    for expert, c in opened.items():
        findings += _file_findings(first, c, expert)
    licences = {n: licence_of(c.path) for n, c in {name: first, **opened}.items()}
    findings += [Finding("note", "licence", "", text) for text in remarks(licences)]
    inspection = Inspection(
        base=name,
        experts=tuple(compared),
        parameters=sum(math.prod(t.shape) for t in first.tensors.values()),
        dtypes={n: _dtype(c) for n, c in {name: first, **opened}.items()},
        licences=licences,
        blocks=blocks,
        left_out=tuple(sorted(set(first.tensors) - set(alike))),
        findings=(),
    )
    order = ("error", "warning", "note")
    found = sorted([*findings, *_weight_findings(inspection)], key=lambda f: order.index(f.severity))
    return Inspection(**{**vars(inspection), "findings": tuple(found)})


# -- weights ------------------------------------------------------------------------------------------------


def sums_of(base: Tensor, experts: Sequence[Tensor]) -> Sums:
    """Sums over one tensor of the base and of K experts, all of one shape, in any float dtype."""
    total = Sums.zero(len(experts))
    if not experts:
        return total
    flat, others = base.reshape(-1), [e.reshape(-1) for e in experts]
    cuts = torch.tensor([_cut(flat, e) for e in others])[:, None]
    for at in range(0, flat.numel(), CHUNK):
        b = flat[at : at + CHUNK].float()
        deltas = torch.stack([e[at : at + CHUNK].float() - b for e in others])
        wide = deltas.double()
        up, down = (deltas >= cuts).float(), (deltas <= -cuts).float()  # counts of a chunk are exact in fp32
        both, against = (up + down) @ (up + down).T, up @ down.T
        total += Sums(
            size=np.float64(b.numel()),  # type: ignore[arg-type]
            base=b.double().square().sum().numpy(),
            gram=(wide @ wide.T).numpy(),
            unlike=np.array([[not torch.equal(a, b) for a in deltas] for b in deltas], dtype=np.float64),
            changed=torch.count_nonzero(deltas, 1).double().numpy(),
            both=both.double().numpy(),
            opposed=(against + against.T).double().numpy(),
        )
    return total


def _cut(base: Tensor, expert: Tensor) -> float:
    """|delta| of the ceil(TOP * n)-th largest entry, where that is 0 the least number above 0."""
    magnitudes = (expert.float() - base.float()).abs_().numpy()
    k = len(magnitudes) - math.ceil(TOP * len(magnitudes))
    magnitudes.partition(k)
    return float(max(magnitudes[k], np.finfo(np.float32).smallest_subnormal))


def _same(base: Checkpoint, expert: Checkpoint, tensor: str) -> bool:
    a, b = base.tensors[tensor], expert.tensors.get(tensor)
    return b is not None and a.shape == b.shape and a.dtype in DTYPES and b.dtype in DTYPES and math.prod(a.shape) > 0


def _comparable(base: Checkpoint, expert: Checkpoint) -> bool:
    """True where all tensors within layers agree in shape; vocabularies may differ."""
    layers = [n for n in base.tensors if (_block(base, n) or "").startswith("layers.")]
    return expert.model_type == base.model_type and all(_same(base, expert, n) for n in layers)


def _by_block(base: Checkpoint, tensors: Sequence[str]) -> dict[str, list[str]]:
    """block -> tensors, in layout order; names that the architecture does not have are left out."""
    found = [(b, n) for n in tensors if (b := _block(base, n)) is not None]
    out: dict[str, list[str]] = {}
    for block, name in sorted(found, key=lambda x: (block_order(x[0]), x[1])):
        out.setdefault(block, []).append(name)
    return out


def _block(c: Checkpoint, tensor: str) -> str | None:
    return c.stock.blocks.get(tensor)


def _dtype(c: Checkpoint) -> str:
    sizes: dict[str, int] = {}
    for t in c.tensors.values():
        sizes[t.dtype] = sizes.get(t.dtype, 0) + math.prod(t.shape)
    return "+".join(sorted(sizes, key=lambda d: -sizes[d]))


def _weight_findings(i: Inspection) -> Iterator[Finding]:
    total, blocks = i.total, i.blocks
    for text in _left_out(i):
        yield Finding("note", "weights", "", text)
    for k, name in enumerate(i.experts):
        sick = [b for b, s in blocks.items() if not math.isfinite(s.gram[k, k])]
        if sick:
            yield Finding("error", "weights", name, f"NaN or infinite weights in {_few(sick)}")
        elif total.changed[k] == 0:
            yield Finding("error", "weights", name, f"the same weights as the base {i.base!r}; remove it")
        elif frozen := [b for b, s in blocks.items() if s.changed[k] == 0]:
            yield Finding("note", "weights", name, f"{len(frozen)} blocks are the base's: {_few(frozen)}")
        if total.relative[k] > FAR:
            yield Finding(
                "warning",
                "base",
                name,
                f"its delta is {total.relative[k]:.2f} times as long as the base (limit {FAR:g}; models trained "
                f"apart lie near 1.41): {i.base!r} is likely not its base",
            )
        near = {j: total.distances[k, j] for j in range(len(i.experts)) if j != k and total.unlike[k, j] > 0}
        closest = min(near, key=lambda j: near[j], default=None)
        if closest is not None and near[closest] < NEARER * total.norms[k]:
            yield Finding(
                "warning",
                "base",
                name,
                f"lies nearer to {i.experts[closest]!r} ({near[closest]:.4g}) than to the base ({total.norms[k]:.4g}): "
                f"{i.base!r} is likely not its base, or it comes from that expert's line",
            )
    for a, b in i.pairs():
        if total.unlike[a, b] == 0 and total.changed[a] > 0:
            yield Finding("error", "weights", i.experts[b], f"the same weights as {i.experts[a]!r}; remove one")


def _left_out(i: Inspection) -> Iterator[str]:
    if i.left_out:
        yield f"in no figure, because the models differ in shape or lack them: {_few(i.left_out)}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# -- files beside the weights ---------------------------------------------------------------------------------

Differences = Iterator[tuple[str, str]]
"""(severity, text) of each."""


def _file_findings(base: Checkpoint, expert: Checkpoint, name: str) -> Iterator[Finding]:
    """Differences of tokenizer, chat template, generation settings, config and dtype."""
    looks: dict[str, Callable[[Path, Path], Differences]] = {
        "tokenizer": _tokenizer_differences,
        "chat_template": _template_differences,
        "generation_config": _generation_differences,
        "config": lambda a, b: _differences(read_json(a / "config.json"), read_json(b / "config.json"), SAME_ANYWAY),
    }
    for kind, look in looks.items():
        try:
            for severity, text in look(base.path, expert.path):
                yield Finding(severity, kind, name, text)
        except UserError as e:
            yield Finding("warning", kind, name, str(e))
    if _dtype(base) != _dtype(expert):
        yield Finding("note", "dtype", name, f"stored as {_dtype(expert)}, the base as {_dtype(base)}")


def _differences(base: Mapping[str, Any], expert: Mapping[str, Any], ignored: Sequence[str] = ()) -> Differences:
    for key in sorted({*base, *expert} - set(ignored)):
        if base.get(key) != expert.get(key):
            yield "note", f"{_shown(key)} is {_shown(expert.get(key))}, the base's {_shown(base.get(key))}"


def _shown(value: Any) -> str:
    """A stranger's value in one short, printable line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _generation_differences(base: Path, expert: Path) -> Differences:
    file = "generation_config.json"
    if (base / file).is_file() and (expert / file).is_file():
        yield from _differences(_optional(base / file), _optional(expert / file), SAME_ANYWAY)
    elif (base / file).is_file() != (expert / file).is_file():
        yield "note", f"{'has' if (expert / file).is_file() else 'lacks'} a {file}, unlike the base"


def _tokenizer_differences(base: Path, expert: Path) -> Differences:
    if not any((expert / f).is_file() for f in ("tokenizer.json", "tokenizer.model")):
        yield "note", "no tokenizer files; taken to use the base's"
        return
    a, b = base / "tokenizer.json", expert / "tokenizer.json"
    if a.is_file() and b.is_file():
        ours, theirs = vocabulary(base) or {}, vocabulary(expert) or {}
        for text, tokens in (
            ("tokens that the base lacks", sorted(set(theirs) - set(ours))),
            ("tokens of the base missing", sorted(set(ours) - set(theirs))),
            ("tokens with other ids", sorted(t for t in set(ours) & set(theirs) if ours[t] != theirs[t])),
        ):
            if tokens:
                yield "warning", f"{len(tokens)} {text}, for example {_shown(tokens[0])}"
        ours_, theirs_ = read_json(a), read_json(b)
        for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if ours_.get(key) != theirs_.get(key):
                yield "warning", f"another {key}"
        if _merges(ours_) != _merges(theirs_):
            yield "warning", "other merges of tokens"
        flags = [{t["content"]: bool(t.get("special")) for t in x.get("added_tokens") or ()} for x in (ours_, theirs_)]
        for token in sorted(set(flags[0]) & set(flags[1])):
            if flags[0][token] != flags[1][token]:
                yield "note", f"added token {_shown(token)}: special is {flags[1][token]}, the base's {flags[0][token]}"
    a, b = base / "tokenizer.model", expert / "tokenizer.model"
    if a.is_file() and b.is_file() and a.read_bytes() != b.read_bytes():
        yield "warning", "another tokenizer.model"
    ours, theirs = ({k: v for k, v in _settings(p).items() if k in TOKENIZER_SETTINGS} for p in (base, expert))
    yield from _differences(ours, theirs)


def _merges(tokenizer: Mapping[str, Any]) -> Any:
    """Merges of a BPE, pairs as lists whichever way they are written."""
    merges = (tokenizer.get("model") or {}).get("merges")
    if not isinstance(merges, list):
        return merges
    return [m.split(" ", 1) if isinstance(m, str) else m for m in merges]


def _settings(folder: Path) -> dict[str, Any]:
    """Settings of the tokenizer; special tokens as texts, whichever way they are written."""
    found = {**_optional(folder / "special_tokens_map.json"), **_optional(folder / "tokenizer_config.json")}
    return {k: v.get("content", v) if isinstance(v, dict) else v for k, v in found.items()}


def chat_templates(folder: Path) -> dict[str, str]:
    """Chat templates of a model folder by name; "default" for a single one. Raises UserError."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > 1_000_000:
            raise UserError(f"{file}: larger than 1000000 bytes")
        return {"default": file.read_bytes().decode("utf-8", "replace")}
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _optional(folder / name).get("chat_template")
        if isinstance(found, str):
            return {"default": found}
        if isinstance(found, list):
            return {
                str(t["name"]): str(t["template"])
                for t in found
                if isinstance(t, dict) and {"name", "template"} <= {*t}
            }
    return {}


def _template_differences(base: Path, expert: Path) -> Differences:
    ours, theirs = chat_templates(base), chat_templates(expert)
    for name in sorted({*ours, *theirs}):
        if name not in theirs:
            yield "note", f"no chat template {_shown(name)}, unlike the base"
        elif name not in ours:
            yield "warning", f"has a chat template {_shown(name)}, the base has none, and the merge takes the base's"
        elif ours[name] != theirs[name]:
            yield "warning", f"another chat template {_shown(name)}; the merge takes the base's"
