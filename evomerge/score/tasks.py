"""Tasks: items from JSONL files, split by hash into search, select and report. No torch.

Items are hashed by normalised content (or by a group key where items are parallel), so an item keeps its
split whatever the file's order, copies of an item never straddle two splits, and a report item that also
stands in the search data is found.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evomerge.errors import UserError, nearest

SPLITS = ("search", "select", "report")
Split = Literal["search", "select", "report"]
MAX_FILE = 1_000_000_000
MAX_LINE = 2_000_000

METRICS: Mapping[str, Literal["higher", "lower"]] = {
    "accuracy": "higher",
    "accuracy_norm": "higher",
    "probability": "higher",
    "cross_entropy": "lower",
    "answer_loss": "lower",
}
"""Per-item columns and which way is good (`multiple_choice.py` defines them)."""


class TaskSpec(BaseModel):
    """One task of a fitness file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    kind: Literal["multiple_choice"] = "multiple_choice"
    data: str | None = Field(None, description="JSONL file that shares of `splits` are cut from")
    splits: Mapping[Split, float | str] = Field(
        default={"search": 0.6, "select": 0.2, "report": 0.2},
        description="each split: a share of `data`, or a JSONL file of its own",
    )
    group_by: str | None = Field(None, description="field whose equal values stay in one split")
    metric: str = Field("accuracy", description="what the search optimises")
    report_metric: str = Field("accuracy", description="what tables show")
    weight: float = Field(1.0, gt=0)
    prefix: str = Field("", description="text in front of every prompt, for example few-shot examples")
    prompt: str = Field("{question}", description="template over the item's fields")
    choice: str = Field("{choice}", description="template of one choice; carries its own leading blank")
    choices: str = Field("choices", description="field with the list of choices")
    gold: str = Field("gold", description="field with the position of the right choice")
    end_of_text: bool = Field(False, description="close every choice with the end-of-text token")

    @model_validator(mode="after")
    def _consistent(self) -> TaskSpec:
        for metric in (self.metric, self.report_metric):
            if metric not in METRICS:
                raise ValueError(f"unknown metric {metric!r}{nearest(metric, METRICS)}")
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"splits: expected {', '.join(SPLITS)}, got {', '.join(self.splits) or 'none'}")
        shares = [v for v in self.splits.values() if not isinstance(v, str)]
        if any(not 0 < s <= 1 for s in shares) or sum(shares) > 1 + 1e-9:
            raise ValueError(f"splits: shares must lie in (0, 1] and sum to at most 1, got {shares}")
        if shares and self.data is None:
            raise ValueError("splits: shares are cut from `data`, which is missing")
        return self


@dataclass(frozen=True)
class Item:
    """One scored item: rendered texts, the position of the right choice, and what it is called."""

    id: str
    split: str
    prompt: str
    choices: tuple[str, ...]
    gold: int
    digest: str
    where: str


def load_items(spec: TaskSpec, folder: Path) -> tuple[Item, ...]:
    """Read all items of a task, in file order, search before select before report.

    Raises UserError naming file and line: unreadable files, wrong fields, empty splits, items in two splits.
    """
    items: dict[str, list[Item]] = {s: [] for s in SPLITS}
    shares = {s: v for s, v in spec.splits.items() if not isinstance(v, str)}
    if shares:
        assert spec.data is not None
        for item, key in _read(spec, folder / spec.data):
            split = _split_of(key, shares)
            if split is not None:
                items[split].append(_with_split(item, split))
    for split, value in spec.splits.items():
        if isinstance(value, str):
            items[split] += [_with_split(item, split) for item, _ in _read(spec, folder / value)]
    owner: dict[str, Item] = {}
    ids: dict[str, Item] = {}
    for split in SPLITS:
        if not items[split]:
            raise UserError(f"task {spec.name!r}: the {split} split has no items; give it a larger share or a file")
        for item in items[split]:
            other = owner.setdefault(item.digest, item)
            if other.split != split:
                raise UserError(
                    f"task {spec.name!r}: the same item stands in {other.split} ({other.where}) and "
                    f"{split} ({item.where}); splits must be disjoint"
                )
            same = ids.setdefault(item.id, item)
            if same is not item:
                raise UserError(f"task {spec.name!r}: the id {item.id!r} stands twice, {same.where} and {item.where}")
    return tuple(i for s in SPLITS for i in items[s])


def _with_split(item: Item, split: str) -> Item:
    # Files of two splits may have the same name, in folders of their own.
    name = item.id or f"{split}/{item.where}"
    return Item(name, split, item.prompt, item.choices, item.gold, item.digest, item.where)


def _split_of(key: str, shares: Mapping[Any, float]) -> str | None:
    """Hash shares: the first 52 bits of sha256 as a uniform number; shares in the fixed order of SPLITS."""
    u = int(hashlib.sha256(key.encode()).hexdigest()[:13], 16) / 16**13
    edge = 0.0
    for split in SPLITS:
        edge += shares.get(split, 0.0)
        if u < edge:
            return split
    return None


def normalised(text: str) -> str:
    """NFKC, case-folded, white space folded to single blanks: equal for near copies."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).strip()


def _read(spec: TaskSpec, path: Path) -> list[tuple[Item, str]]:
    """All items of one file with their split keys."""
    out = []
    try:
        if path.stat().st_size > MAX_FILE:
            raise UserError(f"{path}: larger than {MAX_FILE} bytes")
        with path.open(encoding="utf-8") as f:
            for n, line in enumerate(f, 1):
                if line.strip():
                    out.append(_item(spec, line, f"{path.name}:{n}", f"{path} line {n}"))
    except OSError as e:
        raise UserError(f"task {spec.name!r}: {path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"task {spec.name!r}: {path}: is not UTF-8 text") from None
    if not out:
        raise UserError(f"task {spec.name!r}: {path}: holds no items; expected one JSON object a line")
    return out


def _item(spec: TaskSpec, line: str, where: str, place: str) -> tuple[Item, str]:
    def bad(what: str) -> UserError:
        return UserError(f"{place}: {what}")

    if len(line) > MAX_LINE:
        raise bad(f"longer than {MAX_LINE} characters")
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise bad("is not JSON; expected one object a line") from None
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad("holds half of a surrogate pair, which is no text") from None
    if not isinstance(data, dict):
        raise bad(f"expected a JSON object, got {type(data).__name__}")
    for field in (spec.choices, spec.gold):
        if field not in data:
            raise bad(f"the field {field!r} is missing{nearest(field, map(str, data))}")
    choices, gold = data[spec.choices], data[spec.gold]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise bad(f"{spec.choices!r} should be a list of two or more texts, got {choices!r}"[:200])
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise bad(f"{spec.gold!r} should be the position of the right choice, 0 to {len(choices) - 1}, got {gold!r}")
    prompt = render(spec.prompt, data, place)
    texts = tuple(render(spec.choice, {**data, "choice": c}, place) for c in choices)
    if len(set(texts)) < len(texts):
        raise bad(f"two of the choices are equal: {list(choices)}")
    # The content that makes two items the same to a reader: prompt and set of choices.
    content = "\x1f".join([normalised(prompt), *sorted(normalised(c) for c in texts)])
    digest = hashlib.sha256(content.encode()).hexdigest()[:24]
    key = digest
    if spec.group_by is not None:
        if spec.group_by not in data:
            raise bad(f"the field {spec.group_by!r} (group_by) is missing")
        key = f"group:{data[spec.group_by]}"
    name = "" if data.get("id") is None else str(data["id"])
    return Item(name, "", prompt, texts, gold, digest, where), key


def render(template: str, fields: Mapping[str, Any], place: str) -> str:
    """Put fields into `{name}` places: plain replacement, no attributes, no expressions."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in fields:
            raise UserError(f"{place}: the field {name!r} is missing{nearest(name, fields)}")
        if not isinstance(fields[name], str | int | float):
            raise UserError(f"{place}: the field {name!r} should be text, got {type(fields[name]).__name__}")
        return str(fields[name])

    return re.sub(r"\{([A-Za-z_][A-Za-z0-9_]*)\}", value, template)
