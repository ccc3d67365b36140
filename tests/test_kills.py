"""Drivers that are killed, interrupted and doubled: the journal in the end is that of a run left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

import evomerge
from evomerge.journal import read, read_sealed
from evomerge.run import run
from evomerge.rundir import read_telemetry

With = Callable[..., Any]
Key = tuple[str, str]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(evomerge.__file__).parents[1])}
LONG = {"search.budget": {"evaluations": 120}}


def journal(out: Path) -> bytes:
    path = out / "journal.jsonl"
    return path.read_bytes() if path.exists() else b""


def command(experiment: Path, out: Path, **overrides: object) -> list[str]:
    sets = [a for k, v in overrides.items() for a in ("--set", f"{k}={json.dumps(v)}")]
    return [sys.executable, "-m", "evomerge", "run", str(experiment), "--out", str(out), *sets]


def started(*args: Any, **settings: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(*args, text=True, env=ENVIRONMENT, **{**pipes, **settings})


@dataclass
class Autopsy:
    """What every death left behind, and whether the rest of the run kept to it."""

    whole: bytes
    kills: int = 0
    runs: int = 0
    torn: int = 0
    kept: int = 0
    early: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    _finished: set[Key] = field(default_factory=set)
    _lines: int = 0

    def died(self, out: Path) -> None:
        """After a kill: the journal is the head of the uninterrupted one, but for a torn last line."""
        self.kills += 1
        data = journal(out)
        head = data[: data.rfind(b"\n") + 1]
        assert self.whole.startswith(head), "an event differs from the uninterrupted run's"
        self.torn += data != head
        events = [json.loads(line) for line in head.splitlines()]
        self.phases[events[-1]["kind"] if events else "nothing"] += 1
        self._none_again(out)
        recipes = {e["id"]: e["recipe_id"] for e in events if e["kind"] == "asked"}
        told = [(recipes[e["id"]], e["items"]) for e in events if e["kind"] == "told"]
        waiting = {(e["recipe_id"], e["items"]) for e in read_sealed(out / "finished.jsonl")[0]} - {*told}
        assert self._finished <= {*told} | waiting, "a finished evaluation was lost"
        self._finished = {*told} | waiting
        self.kept += len(told)
        self.early += len(waiting)

    def ended(self, out: Path) -> None:
        """After the last life: the same bytes, nothing told or evaluated twice."""
        self.runs += 1
        assert journal(out) == self.whole
        told = [(e["id"], e["items"]) for e in read(out / "journal.jsonl")[0] if e["kind"] == "told"]
        assert len(told) == len(set(told))
        self._none_again(out)
        self._finished, self._lines = set(), 0

    def _none_again(self, out: Path) -> None:
        """What was finished before this life was not evaluated in it."""
        whole = [json.loads(line) for line in self.whole.splitlines()]
        recipes = {e["id"]: e["recipe_id"] for e in whole if e["kind"] == "asked"}
        items = {e["name"]: e["id"] for e in whole if e["kind"] == "items"}
        lines = [t for t in read_telemetry(out / "telemetry.jsonl") if "proposal" in t]
        evaluated = {(recipes[t["proposal"]], items[t["items"]]) for t in lines[self._lines :]}
        assert not evaluated & self._finished, "a finished evaluation was repeated"
        self._lines = len(lines)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills over {self.runs} runs, {self.torn} torn tails, {self.kept} results found in journals "
            f"and {self.early} in finished.jsonl at the kills, last event at the kill: {dict(self.phases)}"
        )


# -- kill -9 --------------------------------------------------------------------------------------------------

NURSERY = """
import json, os, random, signal, sys, time
import cma, scipy.stats, transformers.models.llama.modeling_llama
import evomerge.evaluate, evomerge.progress, evomerge.report.results, evomerge.run
from evomerge.cli import main

out, seed, argv = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
rng, path = random.Random(seed), os.path.join(out, "journal.jsonl")

def size():
    return os.stat(path).st_size if os.path.exists(path) else 0

for line in sys.stdin:
    start = size()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(argv))
    over = 0
    if line.strip() == "kill":
        if rng.random() < 0.8:
            while not over and size() <= start:
                over = os.waitpid(child, os.WNOHANG)[0]
        time.sleep(rng.uniform(0.0, 0.05))
        if not over:
            os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
"""
"""Forks a fresh driver per line of its input, so that a life does not begin with seconds of imports."""


@pytest.mark.slow
def test_a_few_kills(small_experiment: Path, tmp_path: Path, finished_run: Path) -> None:
    """Three drivers killed with -9 at random moments, a fourth one finishes: the same journal."""
    out = tmp_path / "out"
    autopsy = Autopsy(journal(finished_run))
    argv = json.dumps(["run", str(small_experiment), "--out", str(out)])
    with started(
        [sys.executable, "-W", "ignore", "-c", NURSERY, str(out), "5", argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for order in ("kill", "kill", "kill", "live"):
            print(order, file=nursery.stdin, flush=True)
            status = int(nursery.stdout.readline() or 99)
            if status == 0:
                break
            assert (order, status) == ("kill", -signal.SIGKILL)
            autopsy.died(out)
        nursery.stdin.close()
        nursery.stdout.close()
        assert nursery.stderr is not None
        nursery.stderr.close()

    assert autopsy.kills >= 2
    autopsy.ended(out)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("count", "lag"), [(1, None), (2, None), (2, 3)], ids=["one", "two", "two steady"])
def test_a_hundred_kills(
    count: int, lag: int | None, small_experiment: Path, experiment_with: With, tmp_path: Path
) -> None:
    """Real drivers with real workers, killed 34 times each way: nothing lost, nothing repeated, the same bytes."""
    rng = random.Random(10 * count + (lag or 0))
    change: dict[str, Any] = dict(LONG)
    if lag is not None:
        change |= {"search.algorithm": "random", "search.lag": lag}
    run(experiment_with(**change), tmp_path / "whole")
    autopsy = Autopsy(journal(tmp_path / "whole"))
    workers = {"workers.backend": "local", "workers.count": count}
    out = tmp_path / "out"
    while autopsy.kills < 34 or out.exists():
        size = len(journal(out))
        with started(command(small_experiment, out, **change, **workers)) as driver:
            if autopsy.kills < 34:
                if rng.random() < 0.8:  # else in the middle of starting up
                    while driver.poll() is None and len(journal(out)) <= size:
                        time.sleep(0.001)
                    time.sleep(rng.uniform(0.0, 0.3))
                else:
                    time.sleep(rng.uniform(0.0, 6.0))
                driver.send_signal(signal.SIGKILL)
            _, errors = driver.communicate(timeout=300)
        if driver.returncode == 0:
            autopsy.ended(out)
            shutil.rmtree(out)
        else:
            assert driver.returncode == -signal.SIGKILL, errors
            autopsy.died(out)

    print(f"\n{count} workers, lag {lag}: {autopsy}")
    assert autopsy.kills == 34
    assert autopsy.runs >= 1


class Backwards:
    """An executor that finishes the youngest unit first, and dies at the end of its life."""

    life = 0
    evaluated: ClassVar[Counter[Key]] = Counter()

    def __init__(self, make: Any) -> None:
        self._evaluator = make()
        self._queue: list[Any] = []

    def submit(self, unit: Any) -> None:
        self._queue.append(unit)

    def wait(self, _: float) -> list[Any]:
        Backwards.life -= 1
        if Backwards.life < 0:
            raise KeyboardInterrupt
        unit = self._queue.pop()
        Backwards.evaluated.update((j.recipe.id, j.items.id) for j in unit.jobs)
        results = self._evaluator.evaluate(unit)
        return [(job, e, t) for job, (e, t) in zip(unit.jobs, results, strict=True)]

    def close(self) -> None:
        self._queue.clear()


@pytest.mark.parametrize("lag", [None, 3])
def test_early_results_are_not_repeated(
    lag: int | None,
    experiment_with: With,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Results that came before their turn when the driver died are taken up again: nothing is evaluated twice."""
    change: dict[str, Any] = {} if lag is None else {"search.algorithm": "random", "search.lag": lag}
    whole = finished_run if lag is None else run(experiment_with(**change), tmp_path / "whole").path
    monkeypatch.setattr(sys.modules[run.__module__], "make_executor", lambda make, *_: Backwards(make))
    Backwards.evaluated.clear()
    out = tmp_path / "out"
    autopsy = Autopsy(journal(whole))
    over = False
    while not over:
        Backwards.life = 3
        try:
            run(experiment_with(**change), out)
            over = True
        except KeyboardInterrupt:
            autopsy.died(out)
    autopsy.ended(out)

    assert autopsy.kills > 5
    assert autopsy.early > 5
    assert {*Backwards.evaluated.values()} == {1}


# -- torn tails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_torn_tails(seed: int, run_copy: Path, experiment_with: With) -> None:
    """A tail cut at any byte, of a line that was never acknowledged or of several that no sync protected."""
    rng = random.Random(seed)
    whole = journal(run_copy)
    (run_copy / "journal.jsonl").write_bytes(whole[: rng.randrange(len(whole))])
    run(experiment_with(), run_copy)

    assert journal(run_copy) == whole


def test_a_torn_tail_of_early_results(run_copy: Path, experiment_with: With) -> None:
    """A line that a crash cut short in finished.jsonl hides no line that is written after it."""
    from evomerge.commit import _Finished
    from evomerge.proposal import Evaluation

    path = run_copy / "finished.jsonl"
    first = _Finished(path)
    first.keep(("a", "x", False), Evaluation("failed:nan", reason="one"))
    first.close()
    with path.open("ab") as f:
        f.write(b'{"recipe_id":"b","items":"x","sta')
    second = _Finished(path)
    second.keep(("c", "x", False), Evaluation("failed:nan", reason="two"))
    second.close()
    third = _Finished(path)
    third.close()

    assert [*third.waiting] == [("a", "x", False), ("c", "x", False)]


# -- polite ends ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_ends_a_run_politely(
    number: signal.Signals, count: int, small_experiment: Path, experiment_with: With, tmp_path: Path
) -> None:
    """Ctrl-C and SIGTERM: exit 130, the resume line, whole lines; that line leads to the same journal."""
    run(experiment_with(**LONG), tmp_path / "whole")
    out = tmp_path / "out"
    overrides = {**LONG, "workers.backend": "local", "workers.count": count}
    with started(command(small_experiment, out, **overrides)) as driver:
        while driver.poll() is None and journal(out).count(b"\n") < 30:
            time.sleep(0.01)
        begun = time.monotonic()
        driver.send_signal(number)
        _, errors = driver.communicate(timeout=60)
        seconds = time.monotonic() - begun
    cut = journal(out)
    resume = subprocess.run(
        [sys.executable, "-m", "evomerge", "resume", str(out)], env=ENVIRONMENT, capture_output=True, text=True
    )

    assert driver.returncode == 130
    assert errors.rstrip().splitlines()[-1] == f"evomerge: interrupted; go on with: evomerge resume {out}"
    assert "Traceback" not in errors
    assert cut.endswith(b"\n")
    assert len(cut) < len(journal(out))
    assert resume.returncode == 0, resume.stderr
    assert journal(out) == journal(tmp_path / "whole")
    print(f"\n{number.name}, {count} workers: stopped in {seconds:.2f} s")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_process_is_refused(small_experiment: Path, experiment_with: With, tmp_path: Path) -> None:
    """While one process runs in a folder, another one ends with status 2 and changes nothing of the result."""
    run(experiment_with(**LONG), tmp_path / "whole")
    out = tmp_path / "out"
    with started(command(small_experiment, out, **LONG)) as first:
        while first.poll() is None and journal(out).count(b"\n") < 10:
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        size = len(journal(out))
        second = subprocess.run(
            command(small_experiment, out, **LONG), env=ENVIRONMENT, capture_output=True, text=True, timeout=120
        )
        same = len(journal(out)) == size
        first.send_signal(signal.SIGCONT)
        _, errors = first.communicate(timeout=120)

    assert second.returncode == 2
    assert second.stderr.rstrip().splitlines()[-1] == (
        f"evomerge: {out}: another evomerge process is running here; stop it first"
    )
    assert second.stdout == ""
    assert same
    assert first.returncode == 0, errors
    assert journal(out) == journal(tmp_path / "whole")
