"""The local executor under fire: workers that die, hang, grow, or never start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from evomerge.errors import RunError, UserError
from evomerge.proposal import ItemSet, Job, WorkUnit
from evomerge.recipe import Recipe
from evomerge.workers import Done
from evomerge.workers.fake import FakeEvaluator
from evomerge.workers.local import STARTS, LocalExecutor
from evomerge.workers.units import ATTEMPTS

ITEMS = ItemSet("search", {"a": (0, 1)})
RECIPE = Recipe.model_validate({"merge": []})


def unit(n: int) -> WorkUnit:
    return WorkUnit(n, (Job(n, 0, RECIPE, ITEMS),))


Make = Callable[..., LocalExecutor]


@pytest.fixture
def local() -> Iterator[Make]:
    """local(make, **settings) -> an executor that is closed after the test."""
    made: list[LocalExecutor] = []

    def start(make: Any, **settings: Any) -> LocalExecutor:
        made.append(LocalExecutor(make, **{"count": 1, "timeout_seconds": 60.0, **settings}))
        return made[-1]

    yield start
    for executor in made:
        executor.close()


def drained(executor: LocalExecutor, count: int, seconds: float = 60.0) -> dict[int, Done]:
    done: dict[int, Done] = {}
    deadline = time.monotonic() + seconds
    while len(done) < count and time.monotonic() < deadline:
        for job, evaluation, telemetry in executor.wait(0.2):
            assert job.proposal not in done
            done[job.proposal] = (job, evaluation, telemetry)
    assert len(done) == count, f"{len(done)} of {count} came back"
    return done


def gone(pid: int, seconds: float = 10.0) -> bool:
    """True once no live process has this id."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_killed_worker_is_replaced_and_its_unit_tried_again(local: Make) -> None:
    """kill -9 in the middle of a unit costs an attempt, not the result."""
    executor = local(partial(FakeEvaluator, latency=0.8))
    executor.submit(unit(1))
    executor.submit(unit(2))
    while executor._workers[0].task is None:
        executor.wait(0.05)
    first = executor.pids[0]
    os.kill(first, signal.SIGKILL)
    done = drained(executor, 2)

    assert all(e.ok for _, e, _ in done.values())
    assert done[1][2].attempts == 2
    assert done[2][2].attempts == 1
    assert executor.pids[0] != first


def test_an_idle_worker_that_dies_costs_no_attempt(local: Make) -> None:
    """A worker killed between two units is replaced before the next one needs it, or the unit is tried again."""
    executor = local(FakeEvaluator)
    executor.submit(unit(1))
    drained(executor, 1)
    os.kill(executor.pids[0], signal.SIGKILL)
    executor.submit(unit(2))

    assert drained(executor, 1)[2][1].ok


def test_a_unit_that_always_kills_its_worker_fails(local: Make) -> None:
    """After three deaths the unit is recorded as failed:died; others, on both workers, are unharmed."""
    executor = local(partial(FakeEvaluator, failures={3: "die"}), count=2)
    for n in range(6):
        executor.submit(unit(n))
    done = drained(executor, 6)

    assert {n: e.status for n, (_, e, _) in done.items()} == {n: "failed:died" if n == 3 else "ok" for n in range(6)}
    assert done[3][1].reason == f"its worker died {ATTEMPTS} times (signal 9)"
    assert done[3][2].attempts == ATTEMPTS
    assert {t.worker for _, _, t in done.values()} <= {"local-0", "local-1"}


@pytest.mark.parametrize(
    ("failure", "status", "attempts"), [("die", "failed:died", ATTEMPTS + 1), ("hang", "failed:timeout", 2)]
)
def test_one_of_several_jobs_takes_no_others_with_it(local: Make, failure: str, status: str, attempts: int) -> None:
    """The jobs of a unit whose worker does not come through it are tried once more, each alone."""
    executor = local(partial(FakeEvaluator, failures={2: failure}), timeout_seconds=1.0)
    jobs = tuple(j for n in (1, 2, 3) for j in unit(n).jobs)
    executor.submit(WorkUnit(9, jobs))
    done = drained(executor, 3)

    assert {n: e.status for n, (_, e, _) in done.items()} == {1: "ok", 2: status, 3: "ok"}
    assert done[2][2].attempts == attempts


def test_a_hanging_unit_times_out(local: Make) -> None:
    """A unit beyond the limit is failed:timeout, its worker is killed, and the next unit gets a new one."""
    executor = local(partial(FakeEvaluator, failures={1: "hang"}), timeout_seconds=0.6)
    executor.submit(unit(1))
    executor.submit(unit(2))
    while executor._workers[0].task is None:
        executor.wait(0.05)
    first = executor.pids[0]
    done = drained(executor, 2)

    assert done[1][1].status == "failed:timeout"
    assert "0.6 s" in done[1][1].reason
    assert done[1][2].attempts == 1, "a hang is not tried again"
    assert done[2][1].ok
    assert gone(first)


def test_a_growing_worker_is_stopped(local: Make) -> None:
    """A worker beyond its memory is failed:oom; the next unit is fine."""
    executor = local(partial(FakeEvaluator, failures={1: "grow"}), memory_gb=0.3)
    executor.submit(unit(1))
    executor.submit(unit(2))
    done = drained(executor, 2)

    assert done[1][1].status == "failed:oom"
    assert "0.3 GiB" in done[1][1].reason
    assert done[2][1].ok


def test_two_workers_work_at_the_same_time(local: Make) -> None:
    """Two units of two workers are in flight together."""
    executor = local(partial(FakeEvaluator, latency=0.3), count=2)
    executor.submit(unit(0))
    done: list[Done] = []
    while not done or not all(w.ready for w in executor._workers):
        done += executor.wait(0.05)
    for n in range(1, 4):
        executor.submit(unit(n))
    both = False
    while len(done) < 4:
        done += executor.wait(0.05)
        both |= all(w.task is not None for w in executor._workers)

    assert both
    assert {t.worker for _, _, t in done} == {"local-0", "local-1"}


def test_close_leaves_no_process(local: Make) -> None:
    """Idle, busy and hanging workers are gone after close."""
    executor = local(partial(FakeEvaluator, failures={1: "hang"}), count=2)
    executor.submit(unit(1))
    executor.submit(unit(2))
    drained(executor, 1)
    pids = executor.pids
    executor.close()

    assert len(pids) == 2
    assert all(gone(pid, 1.0) for pid in pids)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A module that worker processes can import, with evaluators that do not start."""
    (tmp_path / "bad_starts.py").write_text(
        textwrap.dedent("""
            from evomerge.errors import UserError

            def user():
                raise UserError("the pool changed")

            def broken():
                raise RuntimeError("no luck")

            def hangs():
                import time
                time.sleep(3600)
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    import bad_starts  # type: ignore[import-not-found]

    return bad_starts


def test_bad_input_found_by_a_worker_reaches_the_driver(local: Make, importable: Any) -> None:
    """A UserError of the start is raised in the driver as what it is, at once."""
    executor = local(importable.user)
    executor.submit(unit(1))

    with pytest.raises(UserError, match="the pool changed"):
        drained(executor, 1)


def test_workers_that_never_start_end_the_run(local: Make, importable: Any) -> None:
    """Another exception is tried a few times, then the run fails with the reason."""
    executor = local(importable.broken)
    executor.submit(unit(1))

    with pytest.raises(RunError, match=rf"in {STARTS} attempts \(RuntimeError: no luck\)"):
        drained(executor, 1)


def test_a_start_that_hangs_is_given_up(local: Make, importable: Any) -> None:
    """A worker that is not ready within its time counts as a failed start."""
    executor = local(importable.hangs, start_seconds=0.2)
    executor.submit(unit(1))

    with pytest.raises(RunError, match=r"not ready within 0\.2 s"):
        drained(executor, 1)


DRIVER = """
import sys, time
from functools import partial
from evomerge.proposal import ItemSet, Job, WorkUnit
from evomerge.recipe import Recipe
from evomerge.workers.fake import FakeEvaluator
from evomerge.workers.local import LocalExecutor

executor = LocalExecutor(partial(FakeEvaluator, failures={1: "hang"}), count=2, timeout_seconds=600)
for n in (0, 1):
    executor.submit(WorkUnit(n, (Job(n, 0, Recipe.model_validate({"merge": []}), ItemSet("s", {"a": (0,)})),)))
done = []
while not done:
    done += executor.wait(0.1)
print(*executor.pids, flush=True)
time.sleep(3600)
"""


def test_a_killed_driver_leaves_no_orphans() -> None:
    """Workers of a driver that was killed with -9, one idle and one in a hanging unit, end by themselves."""
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        pids = [int(p) for p in driver.stdout.readline().split()]
        alive = [psutil.pid_exists(p) for p in pids]
        driver.kill()
        driver.wait()

    assert alive == [True, True]
    assert all(gone(pid) for pid in pids)
