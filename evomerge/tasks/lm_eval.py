"""Tasks of lm-evaluation-harness: the installed ones, or YAML files of your own (`kind: lm_eval`).

Their documents become items; `data` and named splits are lm-eval's own: `training`, `validation`, `test`. lm-eval
itself is imported when a task is loaded, not before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from evomerge.errors import UserError, nearest
from evomerge.library import located
from evomerge.tasks.base import SPLITS, Direction, Item, TaskSpec, disjoint, item_digest, normalised, split_of

Docs = Literal["training", "validation", "test"]


@dataclass(frozen=True)
class Doc:
    """A document: which of lm-eval's docs it is from (None: those that lm-eval scores) and its place there."""

    docs: str | None
    index: int
    fields: Mapping[str, Any]


class LmEvalSpec(TaskSpec):
    """Scored by lm-evaluation-harness on the live candidate (`score/lm_eval.py`)."""

    shares: ClassVar[frozenset[str]] = frozenset({"acc", "acc_norm", "exact_match"})

    kind: Literal["lm_eval"]
    task: str = Field(description="lm-eval's name of one task, no group")
    include_path: str | None = Field(None, description="folder with task YAMLs of your own; they may run code")
    data: Docs | None = Field(None, description="the docs that shares are cut from; default test, else validation")
    # A key of its own here; kinds whose metrics are fixed keep them in a class variable of this name.
    metrics: Mapping[str, Direction] = Field(  # type: ignore[misc]
        default={}, description="further metrics to keep, and those for which lower is better"
    )
    metric: str = Field("acc", description="what the search optimises; one that lm-eval averages over docs")
    report_metric: str = Field(
        default_factory=lambda given: given.get("metric", ""), description="what tables show; default `metric`"
    )
    filter: str | None = Field(None, description="which of the task's answer filters; default its only one")
    num_fewshot: int | None = Field(None, ge=0, description="default the task's own")
    limit: int | None = Field(None, gt=0, description="the first so many docs of each kind")
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = Field(True, description="few-shot examples as turns, where a chat template is applied")
    batch_size: int = Field(16, ge=1, description="requests in one forward pass")

    @model_validator(mode="after")
    def _docs_named(self) -> LmEvalSpec:
        for split, value in self.splits.items():
            if isinstance(value, str) and value not in get_args(Docs):
                raise ValueError(
                    f"splits: {split}: expected a share or one of {', '.join(get_args(Docs))}, got {value!r}"
                )
        return self

    @property
    def needs_data(self) -> bool:
        """No: lm-eval knows where its docs are."""
        return False

    @property
    def directions(self) -> Mapping[str, Direction]:
        """Higher is better unless `metrics` says otherwise; `load` compares with what lm-eval says."""
        return {**dict.fromkeys((self.metric, self.report_metric), "higher"), **self.metrics}

    @property
    def runs_code(self) -> bool:
        """Task YAMLs of one's own may name Python code (`!function`), which loading them imports."""
        return self.include_path is not None

    @property
    def test_set(self) -> str | None:
        """What an installed task scores by default is what papers report; its training docs are free."""
        searched = {v if isinstance(v, str) else self.data for s, v in self.splits.items() if s != "report"}
        if self.include_path is not None or searched <= {"training"}:
            return None
        return f"what lm-eval's {self.task!r} is reported on"

    def resolved(self, folder: Path) -> TaskSpec:
        """The same task with an absolute `include_path`."""
        if self.include_path is None:
            return self
        return self.model_copy(update={"include_path": str(located(folder, self.include_path))})

    def load(self, folder: Path) -> tuple[Item, ...]:
        """The documents as items, in lm-eval's order. Raises UserError for what lm-eval does not have."""
        task = open_task(self.task, task_folder(self.task, self.include_path), f"task {self.name!r}")
        self._check(task)
        items: dict[str, list[Item]] = {s: [] for s in SPLITS}
        shares = {s: v for s, v in self.splits.items() if not isinstance(v, str)}
        if shares:
            for item, key in self._items(task, self.data):
                split = split_of(key, shares)
                if split is not None:
                    items[split].append(item(split))
        for split, value in self.splits.items():
            if isinstance(value, str):
                items[split] += [item(split) for item, _ in self._items(task, value)]
        return disjoint(self, items)

    def _items(self, task: Any, docs: str | None) -> Iterator[tuple[Any, str]]:
        with quiet():
            rows = [dict(d) for d in docs_of(task, docs, f"task {self.name!r}")][: self.limit]
            identities = [_identity(task, row) for row in rows]
        for n, (row, identity) in enumerate(zip(rows, identities, strict=True)):
            where = f"{docs or 'doc'}-{n}"
            digest = item_digest(identity)
            key = digest
            if self.group_by is not None:
                if self.group_by not in row:
                    raise UserError(
                        f"task {self.name!r}: group_by: docs have no {self.group_by!r}{nearest(self.group_by, row)}"
                    )
                key = f"group:{row[self.group_by]}"
            content = Doc(docs, n, row)
            yield (lambda s, w=where, d=digest, c=content: Item(w, s, f"{self.task} {w}", d, c)), key

    def _check(self, task: Any) -> None:
        """Raises UserError for what cannot be scored by item, or reproducibly, or in the direction that is meant."""
        from lm_eval.api.metrics import mean

        who = f"task {self.name!r}: lm-eval's {self.task!r}"
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"{who} runs the code that the model writes; that is not supported")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"{who} needs pictures or sound; only text is supported")
        sampled = (task.config.generation_kwargs or {}) if task.OUTPUT_TYPE == "generate_until" else {}
        if sampled.get("do_sample") or (sampled.get("do_sample") is None and sampled.get("temperature")):
            raise UserError(f"{who} samples its answers, which no run repeats; set do_sample: false in its YAML")
        known, higher = task.aggregation(), task.higher_is_better()
        for metric, direction in self.directions.items():
            if metric not in known:
                raise UserError(f"{who} has no metric {metric!r}{nearest(metric, known)}")
            if known[metric] is not mean:
                how = getattr(known[metric], "__name__", "a function of its own")
                raise UserError(f"{who} aggregates {metric!r} by {how}; only means over docs can be searched by item")
            theirs = "higher" if higher[metric] else "lower"
            if theirs != direction:
                raise UserError(
                    f"{who}: for {metric!r} {theirs} is better; say so with metrics: {{{metric}: {theirs}}}"
                )
        filters = [f.name for f in task._filters]
        if self.filter is None and len(filters) > 1:
            raise UserError(f"{who} filters answers in several ways; choose with filter: {' or '.join(filters)}")
        if self.filter is not None and self.filter not in filters:
            raise UserError(f"{who} has no filter {self.filter!r}{nearest(self.filter, filters)}")
        if self.num_fewshot and task.config.num_fewshot == 0:
            raise UserError(f"{who} is fixed to num_fewshot: 0 by its own YAML; drop num_fewshot")


def _identity(task: Any, row: Mapping[str, Any]) -> str:
    """What makes two documents the same to a reader: the rendered text, with the choices or else the answer."""
    text = str(task.doc_to_text(row))
    if task.config.doc_to_choice is not None:
        rest = sorted(normalised(str(c)) for c in task.doc_to_choice(row))
    elif task.config.doc_to_target is not None:
        rest = [normalised(str(task.doc_to_target(row)))]
    else:
        rest = [normalised(json.dumps(row, sort_keys=True, default=str))]
    return "\x1f".join([normalised(text), *rest])


# -- lm-eval's side -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No chatter: lm-eval prints, logs and draws bars, also on standard output, which belongs to our data."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


@cache
def _yaml_files(tasks: Path) -> dict[Path, str]:
    """lm-eval's 14,000 task files, unparsed: a second's work, where its own index takes a quarter of a minute."""
    return {p: p.read_text(encoding="utf-8", errors="replace") for p in sorted(tasks.glob("**/*.yaml"))}


_NAMES = re.compile(r"""^["']?(task|group)["']?:[ \t]*["']?([\w.:+/-]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE)
"""(task or group, its name) where a YAML file says what it is called."""


def _file_of(name: str, tasks: Path) -> Path | None:
    """The only file below `tasks` that calls its task so, None where it takes lm-eval's index to tell.

    Raises UserError for a name that stands in none of the files, and so can be neither task, group nor tag.
    """
    texts = _yaml_files(tasks)
    word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
    having = [p for p, text in texts.items() if word.search(text)]
    if not having:
        raise UserError(
            f"lm-eval has no task {name!r}{nearest(name, {n for t in texts.values() for _, n in _NAMES.findall(t)})}"
        )
    called = [(p, kind) for p in having for kind, n in _NAMES.findall(texts[p]) if n == name]
    return called[0][0] if len(called) == 1 and called[0][1] == "task" else None


@cache
def _installed() -> Any:
    """lm-eval's own tasks by its own index."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def task_folder(name: str, include_path: str | None) -> str:
    """The folder that a task's YAML lies in: `include_path`, or relative to lm-eval's own tasks.

    Raises UserError where lm-eval is not installed, and for names that are no task.
    """
    package = importlib.util.find_spec("lm_eval")
    if package is None or package.origin is None:
        raise UserError("lm_eval tasks need lm-evaluation-harness; install it with pip install 'evomerge[lm-eval]'")
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UserError(f"include_path: there is no folder {include_path}")
        return include_path
    tasks = Path(package.origin).parent / "tasks"
    file = _file_of(name, tasks) or _entry(_installed(), name).yaml_path
    return str(file.parent.relative_to(tasks))


def _entry(manager: Any, name: str) -> Any:
    entry = manager.task_index.get(name)
    if entry is None:
        raise UserError(f"lm-eval has no task {name!r}{nearest(name, manager.all_tasks)}")
    if name in manager.all_subtasks:
        return entry
    members = sorted(entry.tags) if name in manager.all_tags else _members(entry.cfg)
    raise UserError(f"lm-eval's {name!r} is a group; give each of its tasks an entry: {', '.join(members)}"[:400])


def _members(group: Mapping[str, Any]) -> list[str]:
    members = group.get("task") or []
    return [str(m.get("task", m.get("group"))) if isinstance(m, dict) else str(m) for m in members]


def open_task(name: str, folder: str, who: str) -> Any:
    """A fresh lm-eval task with its data. Raises UserError in one line where YAML or data cannot be loaded."""
    import lm_eval.tasks

    # A relative folder lies in lm-eval's own, an absolute one is the user's.
    place = Path(lm_eval.tasks.__file__).parent / folder
    try:
        with quiet():
            manager = lm_eval.tasks.TaskManager(include_path=str(place), include_defaults=False)
            _entry(manager, name)
            return manager.load([name])["tasks"][name]
    except UserError as e:
        raise UserError(f"{who}: {e}") from None
    except Exception as e:  # whatever YAML, its code, data sets and the network may run into
        reason = (str(e).splitlines() or [""])[0]
        raise UserError(f"{who}: lm-eval's {name!r} cannot be loaded ({type(e).__name__}: {reason})"[:400]) from None


def docs_of(task: Any, docs: str | None, who: str) -> Any:
    """The documents by name, or those that lm-eval scores. Raises UserError where the task has none of that name."""
    if docs is None:
        return task.eval_docs
    if not getattr(task, f"has_{docs}_docs")():
        have = [d for d in get_args(Docs) if getattr(task, f"has_{d}_docs")()]
        raise UserError(f"{who}: lm-eval's {task.task_name!r} has no {docs} docs, only {', '.join(have)}")
    return getattr(task, f"{docs}_docs")()
