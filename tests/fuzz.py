"""Fuzz the readers of strangers' files: `python tests/fuzz.py [--seed S] N` makes N mutations of good files.

Recipes, experiments and whole run directories are damaged by bytes (flips, cuts, repeats), by lines and by
structure (values replaced, removed, renamed; journal events sealed again). Only UserError and RunError, in one
line, may come out. Prints counts; the exit status is 1 where anything else was raised.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from evomerge.config import load
from evomerge.errors import RunError, UserError
from evomerge.history import History
from evomerge.journal import Journal, read, seal
from evomerge.prepare import Prepared, prepare
from evomerge.recipe import Recipe
from evomerge.report.results import results
from evomerge.report.status import status
from evomerge.run import run
from evomerge.workers.fake import FakeEvaluator

ROOT = Path(__file__).resolve().parents[1]

JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf"), "", "x", "..", "/etc/passwd",
    "\0", "é\u2028", "x" * 5000, [], [[]], [1, 2], {}, {"x": 1}, {"": None}, [None] * 50,
)  # fmt: skip


def by_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, remove, repeat or insert some bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out) + 1)
        to = min(len(out), at + rng.choice((1, 2, 30, 3000)))
        how = rng.randrange(6)
        if how == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del out[at:]
        elif how == 2:
            del out[at:to]
        elif how == 3:
            out[at:at] = out[at:to]
        elif how == 4:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
        elif at < len(out):
            out[at] = rng.choice(b"\0\n\r{}[]:,\"'&*!|>-#%@`~ \t0")
    return bytes(out)


def by_lines(data: bytes, rng: random.Random) -> bytes:
    """Remove, repeat or swap whole lines."""
    lines = data.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 3))):
        if not lines:
            break
        a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
        how = rng.randrange(4)
        if how == 0:
            del lines[a]
        elif how == 1:
            lines.insert(b, lines[a])
        elif how == 2:
            lines[a], lines[b] = lines[b], lines[a]
        else:
            del lines[a:]
    return b"".join(lines)


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(p for k, v in inner for p in places(v, (*at, k)))]


def by_structure(data: Any, rng: random.Random) -> Any:
    """Replace, remove, rename, repeat or move values anywhere in plain data."""
    out = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        found = [p for p in places(out) if p]
        if not found:
            break
        at = rng.choice(found)
        inner = out
        for key in at[:-1]:
            inner = inner[key]
        how = rng.randrange(5)
        if how == 0:
            del inner[at[-1]]
        elif how == 1 and isinstance(inner, dict):
            inner[rng.choice(("x", "", "merge", "sources", "method", "weight", "é"))] = inner.pop(at[-1])
        elif how == 2 and isinstance(inner, list):
            inner.append(copy.deepcopy(inner[at[-1]]))
        elif how == 3:
            value: Any = out
            for key in rng.choice(found):
                value = value[key] if isinstance(value, dict | list) and _has(value, key) else None
            inner[at[-1]] = copy.deepcopy(value)
        else:
            inner[at[-1]] = copy.deepcopy(rng.choice(JUNK))
    return out


def _has(data: Any, key: Any) -> bool:
    return key in data if isinstance(data, dict) else isinstance(key, int) and key < len(data)


def sealed(events: list[Any]) -> bytes:
    out = b""
    for e in events:
        try:
            out += seal({k: v for k, v in e.items() if k != "crc"})
        except (AttributeError, TypeError, ValueError):  # NaN, or no event at all: as bytes
            out += (json.dumps(e, default=str) + "\n").encode()
    return out


class Fuzz:
    """Good files to start from, and one function per kind that damages and reads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        asset = ROOT / "tests" / "assets" / "journal-v1" / "run" / "experiment.yaml"
        self.experiment_text = asset.read_text(encoding="utf-8").replace("ROOT", str(ROOT))
        self.file = folder / "experiment.yaml"
        self.file.write_text(self.experiment_text, encoding="utf-8")
        Prepared.evaluator = lambda _: FakeEvaluator  # type: ignore[assignment,method-assign,misc,return-value]
        experiment = load(self.file)
        self.manifest = prepare(experiment).manifest
        self.good = folder / "good"
        history = run(experiment, self.good)
        self.events, _ = read(self.good / "journal.jsonl")
        self.recipes = [
            history.winner.to_json(),
            *({"base": "base", "dtype": "float32", "merge": m} for m in RULES),
        ]

    def recipe(self, rng: random.Random) -> None:
        good = rng.choice(self.recipes)
        if rng.random() < 0.5:
            text = by_bytes(yaml.safe_dump(good).encode(), rng).decode("utf-8", "replace")
        else:
            text = yaml.safe_dump(by_structure(good, rng), allow_unicode=True)
        r = Recipe.from_yaml(text)
        r.canonical(self.manifest)
        r.to_yaml()

    def experiment(self, rng: random.Random) -> None:
        path = self.folder / "mutated.yaml"
        if rng.random() < 0.4:
            path.write_bytes(by_bytes(self.experiment_text.encode(), rng))
        else:
            data = by_structure(yaml.safe_load(self.experiment_text), rng)
            path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
        experiment = load(path)
        experiment.to_yaml()
        if rng.random() < 0.05:
            prepare(experiment)

    def journal_reader(self, rng: random.Random) -> None:
        path = self.folder / "journal.jsonl"
        path.write_bytes(self._journal(rng))
        read(path)
        with Journal(path):
            pass

    def run_directory(self, rng: random.Random) -> None:
        out = self.folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.good, out)
        (out / "journal.jsonl").write_bytes(self._journal(rng))
        for name in ("telemetry.jsonl", "experiment.yaml"):
            if rng.random() < 0.1:
                (out / name).write_bytes(by_bytes((out / name).read_bytes(), rng))
        told = [e for e in self.events if e["kind"] == "told"]
        early = [{"recipe_id": "x", **by_structure(rng.choice(told), rng)} for _ in range(rng.randrange(3))]
        (out / "finished.jsonl").write_bytes(sealed(early))
        first: Exception | None = None
        for read_it in (self._read, lambda o: run(load(o / "experiment.yaml"), o), self._read):
            try:
                read_it(out)
            except (UserError, RunError) as e:
                _one_line(e)
                first = first or e
        if first is not None:
            raise first

    def _read(self, out: Path) -> None:
        history = History.read(out)
        status(out)
        _ = history.evaluations
        results(history)
        for number in history.entries:
            history.recipe(number)

    def _journal(self, rng: random.Random) -> bytes:
        data = (self.good / "journal.jsonl").read_bytes()
        how = rng.randrange(4)
        if how == 0:
            return by_bytes(data, rng)
        if how == 1:
            return by_lines(data, rng)
        events = copy.deepcopy(self.events)
        if rng.random() < 0.5:
            del events[rng.randrange(1, len(events)) :]
        at = rng.randrange(len(events))
        events[at] = by_structure(events[at], rng)
        return sealed(events)


RULES: tuple[Any, ...] = (
    [],
    [{"match": {"layers": [0, 2]}, "method": "ties", "sources": {"add": {"weight": 1, "density": 0.5}}}],
    [{"method": "linear", "sources": {"add": {"weight": 0.5}, "count": {"weight": 0.5}}}],
)


def _one_line(e: Exception) -> None:
    if not str(e) or "\n" in str(e):
        raise AssertionError(f"not one line: {e!r}")


def main() -> int:
    """Run the mutations, print the counts and every foreign exception once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("iterations", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    foreign: dict[str, str] = {}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        kinds: list[tuple[Callable[[random.Random], None], int]] = [
            (fuzz.recipe, 40), (fuzz.experiment, 40), (fuzz.journal_reader, 12), (fuzz.run_directory, 8),
        ]  # fmt: skip
        for n in range(args.iterations):
            rng = random.Random(f"{args.seed} {n}")
            [(kind, _)] = rng.choices(kinds, [w for _, w in kinds])
            outcome = "read"
            try:
                kind(rng)
            except (UserError, RunError) as e:
                outcome = type(e).__name__
                try:
                    _one_line(e)
                except AssertionError:
                    outcome = "foreign"
                    foreign.setdefault(f"{kind.__name__}: not one line", f"seed {args.seed} iteration {n}: {e!r}")
            except Exception as e:
                outcome = "foreign"
                where = traceback.extract_tb(e.__traceback__)[-1]
                key = f"{kind.__name__}: {type(e).__name__} at {where.filename}:{where.lineno}"
                foreign.setdefault(key, f"seed {args.seed} iteration {n}\n{traceback.format_exc()}")
            counts.setdefault(kind.__name__, Counter())[outcome] += 1
    for name, counter in sorted(counts.items()):
        print(f"{name:<16} {sum(counter.values()):>8}  " + ", ".join(f"{k} {v}" for k, v in sorted(counter.items())))
    print(
        f"{args.iterations} mutations in {time.monotonic() - begun:.0f} s, {len(foreign)} kinds of foreign exceptions"
    )
    for key, text in foreign.items():
        print(f"\n== {key}\n{text}")
    return 1 if foreign else 0


if __name__ == "__main__":
    sys.exit(main())
