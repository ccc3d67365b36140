"""A user's Python function, called with the live candidate.

    def score(model, tokenizer, items):
        return {"metric": [one finite number per item]}

`model` is the built candidate, a transformers model in eval mode, under `torch.inference_mode`; `tokenizer` is a copy
that the function may change; `items` are copies of the data file's rows, as dicts, those that are to be scored now.
What comes back must have every metric that the task names, with one finite number for each item, in their order. The
scores of an item must not depend on which other items are in the call: they are cached by item.

The function must leave the model as it is. Later candidates rebuild only the blocks that differ, so a change would
stay in them; it is looked for after every call, fails the candidate, and the worker begins with a fresh model.

The file is hashed into the plan: another version of it is another task. Modules that the function imports from beside
its file are found while the file itself is being imported (not later), and are not part of the hash.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.errors import RunError, UserError, nearest
from evomerge.score.model import Altered
from evomerge.score.plan import Plan, Scorable, Target, places
from evomerge.tasks.base import Item
from evomerge.tasks.function import FunctionSpec


@dataclass(frozen=True)
class FunctionPlan(Plan):
    """`function` as in the spec with an absolute path, `sha256` of its file, the metrics' names, and the rows."""

    function: str
    sha256: str
    metrics: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]

    def content(self) -> list[Any]:
        """The file's hash and every row; not where the file lies."""
        return [self.function.rpartition(":")[2], self.sha256, self.metrics, [dict(r) for r in self.rows]]

    def tokens(self, positions: Sequence[int]) -> int:
        """None are counted: only the function knows what it runs."""
        return 0


class Function:
    """Scorer of the kind `python`."""

    stateless = False

    def __init__(self) -> None:
        self._loaded: dict[str, tuple[Callable[..., Any], Any]] = {}

    def compile(self, spec: FunctionSpec, items: tuple[Item, ...], target: Target) -> FunctionPlan:
        """Import the function's file, without calling it. Raises UserError where that gives no function."""
        _, sha256 = load_function(spec.function, f"task {spec.name!r}")
        return FunctionPlan(
            **places(spec, items, target.shape),
            function=spec.function,
            sha256=sha256,
            metrics=tuple(spec.metrics),
            rows=tuple(i.content for i in items),
        )

    def score(
        self, candidate: Scorable, plan: FunctionPlan, positions: tuple[int, ...]
    ) -> Mapping[str, NDArray[np.float32]]:
        """What the function gives for these items. Raises Altered, RunError for what breaks the contract."""
        if plan.id not in self._loaded:
            function, sha256 = load_function(plan.function, f"task {plan.task!r}")
            if sha256 != plan.sha256:
                raise RunError(f"task {plan.task!r}: {plan.function} changed since the run began; begin a new run")
            self._loaded[plan.id] = function, copy.deepcopy(candidate.tokenizer)
        function, tokenizer = self._loaded[plan.id]
        rows = [copy.deepcopy(dict(plan.rows[i])) for i in positions]
        before = state(candidate.model)
        try:
            with torch.inference_mode():
                answer = function(candidate.model, tokenizer, rows)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            place = f"{Path(last.filename).name} line {last.lineno}"
            raise RunError(f"task {plan.task!r}: the function raised {type(e).__name__}: {e} ({place})") from e
        finally:
            # Also behind an exception, which would else leave the change in later candidates.
            changed = changes(before, state(candidate.model))
            if changed:
                raise Altered(f"task {plan.task!r}: the function changed the model ({changed}); work on a copy")
        return columns(answer, plan, len(positions))


def columns(answer: Any, plan: FunctionPlan, n: int) -> dict[str, NDArray[np.float32]]:
    """The named metrics, each of shape (n,). Raises RunError naming what is missing, too long, or no finite number."""
    who = f"task {plan.task!r}: the function"
    if not isinstance(answer, Mapping):
        raise RunError(f"{who} should return a dict of metrics, got {type(answer).__name__}")
    out = {}
    for metric in plan.metrics:
        if metric not in answer:
            raise RunError(f"{who} gave no {metric!r}{nearest(metric, map(str, answer))}")
        try:
            column = np.asarray(answer[metric], dtype=np.float32)
        except (TypeError, ValueError):
            raise RunError(f"{who}'s {metric!r} should be a list of numbers") from None
        if column.shape != (n,):
            raise RunError(f"{who}'s {metric!r} should have one number for each of {n} items, got shape {column.shape}")
        if not np.isfinite(column).all():
            at = int(np.flatnonzero(~np.isfinite(column))[0])
            raise RunError(f"{who}'s {metric!r} is {column[at]} at position {at}")
        out[metric] = column
    return out


# -- loading ------------------------------------------------------------------------------------------------


def load_function(reference: str, who: str) -> tuple[Callable[..., Any], str]:
    """The function of `file.py:name` or `module:name`, and the sha256 of its file.

    Raises UserError where there is no such file, module or function, or where importing it fails.
    """
    where, _, name = reference.rpartition(":")
    path = Path(where) if where.endswith(".py") else None
    if path is not None and not path.is_file():
        raise UserError(f"{who}: there is no file {path}")
    try:
        module = importlib.import_module(where) if path is None else _module_of(path)
    except (Exception, SystemExit) as e:
        raise UserError(f"{who}: {where} cannot be imported ({type(e).__name__}: {e})") from None
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        what = f"{where} has no {name!r}{nearest(name, known)}" if function is None else f"{reference} is no function"
        raise UserError(f"{who}: {what}")
    file = getattr(module, "__file__", None)
    if file is None:
        raise UserError(f"{who}: {where} has no source file to tell its versions apart")
    return function, _hash(Path(file))


def _module_of(path: Path) -> ModuleType:
    """Import a file under a name of its own; its folder is on the path only meanwhile."""
    name = f"evomerge_function_{_hash(path)[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    before = list(sys.path)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path[:] = before
    return module


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- the model is left as it was ----------------------------------------------------------------------------

State = dict[str, dict[str, tuple[Any, ...]]]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def state(model: Any) -> State:
    """Weights (place, type, version, sum of their bits), modes and hooks of a model: one read of its memory.

    Buffers are left out: some rotary embeddings extend theirs with the length of their input.
    """
    parameters = dict(model.named_parameters())
    sums = torch.stack([_bits(p.data) for p in parameters.values()]).tolist()
    return {
        "weights": {
            # Tensors made under inference_mode have no version; ours are older.
            name: (p.data_ptr(), p.dtype, p.shape, None if p.is_inference() else p._version, bits)
            for (name, p), bits in zip(parameters.items(), sums, strict=True)
        },
        "modes or hooks": {
            name: (type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for name, m in model.named_modules()
        },
    }


def _bits(tensor: Tensor) -> Tensor:
    """Sum over rows of the row's number times the sum of its bits as integers, modulo 2^64: rows cannot change places.

    Exact, so that the smallest change shows; in floating point it could be rounded away.
    """
    rows = tensor.view(_BITS[tensor.element_size()]).reshape(-1, tensor.shape[-1]).sum(dim=-1, dtype=torch.int64)
    return (rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum()


def changes(before: State, after: State) -> str:
    """What differs, in words; empty where nothing does."""
    for what, old in before.items():
        new = after[what]
        differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if differing:
            more = f" and {len(differing) - 1} more" if differing[1:] else ""
            return f"{what} of {differing[0] or 'the model'}{more}"
    return ""
