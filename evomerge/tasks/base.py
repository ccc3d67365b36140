"""Tasks: what the items of a fitness are, read from files and split by hash into search, select and report. No torch.

Items are hashed by normalised content (or by a group key where items are parallel), so an item keeps its
split whatever the file's order, copies of an item never straddle two splits, and a report item that also
stands in the search data is found. A kind of task is a subclass of `TaskSpec` in a file of its own.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evomerge.errors import UserError, nearest
from evomerge.library import located
from evomerge.tasks.rows import Row, rows
from evomerge.tasks.test_sets import test_set_of

SPLITS = ("search", "select", "report")
Split = Literal["search", "select", "report"]
Direction = Literal["higher", "lower"]
Edit = Literal["strip", "lower_first", "drop_last", "behind_hashes"]

EDITS: Mapping[Edit, Callable[[str], str]] = {
    "strip": str.strip,
    "lower_first": lambda text: text[:1].lower() + text[1:],
    "drop_last": lambda text: text.strip()[:-1],
    "behind_hashes": lambda text: text.rpartition("####")[2].strip(),
}
"""Blanks at both ends off; the first letter small; blanks and then the last sign (the full stop) off; only what stands
behind the last ####, the whole text where there is none."""


@dataclass(frozen=True)
class Allowed:
    """What only the command line may allow, never a file: running an experiment's own code; searching on test sets."""

    code: bool = False
    test_sets: bool = False


NOTHING = Allowed()


@dataclass(frozen=True)
class Parsed:
    """One row as a kind of task reads it: what makes two items the same to a reader, and what is scored."""

    identity: str
    content: Any


@dataclass(frozen=True)
class Item:
    """One scored item; `content` is what its kind of task scores (for example `Choices`), `group` its `group_by`.

    `test_set` names the known benchmark whose test set the item's row is of (`tasks/test_sets.py`).
    """

    id: str
    split: str
    where: str
    digest: str
    content: Any
    group: str | None = None
    test_set: str | None = None


class TaskSpec(BaseModel):
    """One task of a fitness file; every kind adds its own keys, metrics and reading of a row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Without a value here, so that a kind whose tasks name their own metrics can make this a key of theirs.
    metrics: ClassVar[Mapping[str, Direction]]
    """Per-item columns that the kind's scorer gives, and which way is good."""
    benchmark: ClassVar[bool] = True
    """False where the metrics say nothing about how well a model does: no row of result tables, no floor."""
    shares: ClassVar[frozenset[str]] = frozenset()
    """Metrics that are shares of a whole, such as accuracy: means over tasks are taken of these, or of one metric."""
    measured: ClassVar[frozenset[str]] = frozenset()
    """Metrics that depend on the machine's moment as well, such as seconds: recorded values count, and are not compared
    with new ones."""
    smooth: ClassVar[Mapping[str, str]] = {}
    """Metric -> the one that is differentiated for it: itself, or where it counts, what it is the rounding of. The
    kind's scorer is a `score.plan.Differentiable` where there are any."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    kind: str
    data: str | None = Field(None, description="file that shares of `splits` are cut from")
    splits: Mapping[Split, float | str] = Field(
        default={"search": 0.6, "select": 0.2, "report": 0.2},
        description="each split: a share of `data`, or a file of its own",
    )
    preset: str | None = Field(None, description="whose keys are this task's defaults (`evomerge list presets`)")
    columns: Mapping[str, tuple[str | tuple[str, ...], ...]] = Field(
        default={},
        description="new names for fields: name -> the first of these that a row has, each a field, a template with "
        "{field} places, or a list of fields whose values become one list",
    )
    values: Mapping[str, Mapping[str, str]] = Field(
        default={}, description="field -> its possible values and what stands for each, such as {cause: because}"
    )
    edits: Mapping[str, Edit] = Field(
        default={}, description="field -> how its text, or each text of its list, changes"
    )
    group_by: str | None = Field(None, description="field whose equal values stay in one split")
    metric: str = Field(description="what the search optimises")
    report_metric: str = Field(description="what tables show")
    weight: float = Field(1.0, gt=0)
    expert: str | None = Field(None, description="the expert that recovered gain is measured against; default the best")

    @model_validator(mode="after")
    def _consistent(self) -> TaskSpec:
        if self.preset is not None:
            raise ValueError("preset: is known in a fitness; elsewhere call evomerge.tasks.presets.expanded first")
        for metric in (self.metric, self.report_metric):
            if metric not in self.directions:
                raise ValueError(f"unknown metric {metric!r}{nearest(metric, self.directions)}")
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"splits: expected {', '.join(SPLITS)}, got {', '.join(self.splits) or 'none'}")
        shares = [v for v in self.splits.values() if not isinstance(v, str)]
        if any(not 0 < s <= 1 for s in shares) or sum(shares) > 1 + 1e-9:
            raise ValueError(f"splits: shares must lie in (0, 1] and sum to at most 1, got {shares}")
        if shares and self.data is None and self.needs_data:
            raise ValueError("splits: shares are cut from `data`, which is missing")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether the items come from files."""
        return True

    @property
    def runs_code(self) -> bool:
        """Whether loading or scoring runs code that the experiment names."""
        return False

    @property
    def test_set(self) -> str | None:
        """The known benchmark whose test items the search would look at, or None."""
        return None

    @property
    def directions(self) -> Mapping[str, Direction]:
        """Metric -> which way is good."""
        return self.metrics

    def unit(self, metric: str) -> str:
        """What a metric counts; only metrics of one unit are averaged over tasks."""
        return "share" if metric in self.shares else metric

    def sign(self, metric: str) -> float:
        """+1 where more of the metric is worse (a loss), -1 where more is better."""
        return -1.0 if self.directions[metric] == "higher" else 1.0

    def resolved(self, folder: Path) -> TaskSpec:
        """The same task with absolute files, which stood relative to `folder`. Raises UserError for what is no path."""
        splits = {s: str(located(folder, v)) if isinstance(v, str) else v for s, v in self.splits.items()}
        data = None if self.data is None else str(located(folder, self.data))
        return self.model_copy(update={"splits": splits, "data": data})

    def rows(self, path: Path, who: str) -> Iterator[Row]:
        """A file's rows with `columns`, `values` and `edits` applied, in this order. Raises UserError."""
        for row in rows(path, who):
            yield self._edited(self._replaced(self._named(row)))

    def _named(self, row: Row) -> Row:
        return row.with_fields(**{name: _first(row, name, options) for name, options in self.columns.items()})

    def _replaced(self, row: Row) -> Row:
        new = {}
        for name, table in self.values.items():
            found = row.field(name, "values")
            if not isinstance(found, str) or found not in table:
                raise row.bad(f"the field {name!r} should be one of {', '.join(table)}, got {found!r}"[:200])
            new[name] = table[found]
        return row.with_fields(**new)

    def _edited(self, row: Row) -> Row:
        new: dict[str, Any] = {}
        for name, edit in self.edits.items():
            found = row.field(name, "edits")
            texts = found if isinstance(found, list) else [found]
            if not all(isinstance(t, str) for t in texts):
                raise row.bad(f"the field {name!r} should be text or a list of texts, got {found!r}"[:200])
            changed = [EDITS[edit](t) for t in texts]
            new[name] = changed if isinstance(found, list) else changed[0]
        return row.with_fields(**new)

    def parse(self, row: Row) -> Parsed:
        """What this kind makes of a row. Raises UserError at the row's place."""
        raise NotImplementedError

    def remarks(self, items: tuple[Item, ...]) -> list[str]:
        """What the items tell of the task's keys that is allowed and still looks wrong; no model is needed."""
        return []

    def load(self, folder: Path) -> tuple[Item, ...]:
        """All items in file order, search before select before report. Raises UserError naming file and line."""
        return load_items(self, folder)


def load_items(spec: TaskSpec, folder: Path) -> tuple[Item, ...]:
    """Read all items of a task from its files, in file order, search before select before report.

    Raises UserError naming file and line: unreadable files, wrong fields, empty splits, items in two splits.
    """
    items: dict[str, list[Item]] = {s: [] for s in SPLITS}
    shares = {s: v for s, v in spec.splits.items() if not isinstance(v, str)}
    if shares:
        assert spec.data is not None
        for item, key in _read(spec, folder / spec.data):
            split = split_of(key, shares)
            if split is not None:
                items[split].append(_with_split(item, split))
    for split, value in spec.splits.items():
        if isinstance(value, str):
            items[split] += [_with_split(item, split) for item, _ in _read(spec, folder / value)]
    return disjoint(spec, items)


def disjoint(spec: TaskSpec, items: Mapping[str, list[Item]]) -> tuple[Item, ...]:
    """The items of all splits in the order of SPLITS. Raises UserError for empty and overlapping splits, equal ids."""
    owner: dict[str, Item] = {}
    ids: dict[str, Item] = {}
    for split in SPLITS:
        if not items[split]:
            rows, distinct = [i for some in items.values() for i in some], {i.digest for s in items.values() for i in s}
            copies = f" ({len(rows)} rows are {len(distinct)} distinct items)" if len(distinct) < len(rows) else ""
            raise UserError(
                f"task {spec.name!r}: the {split} split has no items{copies}; give it a larger share or a file"
            )
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
    return replace(item, id=item.id or f"{split}/{item.where}", split=split)


def split_of(key: str, shares: Mapping[Any, float]) -> str | None:
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


def item_digest(identity: str) -> str:
    """The hash by which copies of an item are found, 24 hex digits."""
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def _read(spec: TaskSpec, path: Path) -> Iterator[tuple[Item, str]]:
    """All items of one file with their split keys."""
    for row in spec.rows(path, f"task {spec.name!r}"):
        parsed = spec.parse(row)
        digest = item_digest(parsed.identity)
        group = None if spec.group_by is None else str(row.field(spec.group_by, "group_by"))
        key = digest if group is None else f"group:{group}"
        name = row.fields.get("id")
        known = test_set_of(row.fields.values())
        yield Item("" if name is None else str(name), "", row.where, digest, parsed.content, group, known), key


def _first(row: Row, name: str, options: tuple[str | tuple[str, ...], ...]) -> Any:
    """The value of the first option of `columns` whose fields a row has."""
    for option in options:
        if isinstance(option, tuple):
            if all(row.has(o) for o in option):
                return [row.field(o) for o in option]
        elif "{" in option:
            if all(row.has(o) for o in PLACE.findall(option)):
                return render(option, row)
        elif row.has(option):
            return row.field(option)
    wanted = " or ".join(repr(o) if isinstance(o, str) else f"all of {', '.join(o)}" for o in options)
    there = ", ".join(map(str, row.fields))[:200]
    raise row.bad(f"columns.{name} needs {wanted}; its fields are {there}")


PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
"""A place in a template."""


def render(template: str, row: Row) -> str:
    """Put fields into `{name}` places: plain replacement, no attributes, no expressions."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        found = row.field(name)
        if not isinstance(found, str | int | float):
            raise row.bad(f"the field {name!r} should be text, got {type(found).__name__}")
        return str(found)

    return PLACE.sub(value, template)
