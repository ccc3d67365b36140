"""The local executor: supervised worker processes on this machine, one unit at a time each.

A worker that dies, hangs beyond the limit or grows beyond its memory is killed and replaced; its unit is tried
again where that may help, and becomes a recorded failure where it does not. The driver never waits on a pipe
that nobody will write to: it holds its own end only, so a dead worker reads as end-of-file at once.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for

import psutil

from evomerge.errors import RunError, UserError
from evomerge.proposal import WorkUnit
from evomerge.workers import Done, MakeEvaluator
from evomerge.workers.units import ATTEMPTS, Task, give_up

START_SECONDS = 600.0
"""Time for a worker to load its pool."""
STARTS = 3
"""Workers that fail to start in a row before the run gives up."""
POLL_SECONDS = 0.5
"""How often memory and time limits are looked at."""


@dataclass
class _Worker:
    """A process, our end of its pipe, and what it is doing. `since` is the monotonic time of the last hand-over."""

    name: str
    process: subprocess.Popen[bytes]
    pipe: Connection
    since: float
    ready: bool = False
    task: Task | None = None


class LocalExecutor:
    """`count` processes, each started as a fresh interpreter with an evaluator of its own."""

    def __init__(
        self,
        make: MakeEvaluator,
        *,
        count: int,
        timeout_seconds: float,
        memory_gb: float | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        """Nothing is started before the first unit. `memory_gb` limits the resident size of each process."""
        self._payload = pickle.dumps(make)
        self._timeout = timeout_seconds
        self._memory = None if memory_gb is None else memory_gb * 2**30
        self._start_seconds = start_seconds
        self._queue: deque[Task] = deque()
        self._failed_starts = 0
        self._last_failure = ""
        self._count = count
        self._workers: list[_Worker] = []

    # -- executor interface -------------------------------------------------------------------------------

    def submit(self, unit: WorkUnit) -> None:
        """Queue a unit; an idle worker gets it at once."""
        if not self._workers:
            self._workers = [self._start(f"local-{i}") for i in range(self._count)]
        self._queue.append(Task(unit))
        self._hand_out()

    def wait(self, seconds: float) -> list[Done]:
        """Collect results for at most `seconds`. Raises RunError where no worker can be started."""
        deadline = time.monotonic() + seconds
        done: list[Done] = []
        while not done:
            left = deadline - time.monotonic()
            ready = wait_for([w.pipe for w in self._workers], timeout=max(0.0, min(left, POLL_SECONDS)))
            for i, worker in enumerate(self._workers):
                if worker.pipe in ready:
                    done += self._receive(i)
                else:
                    done += self._check_limits(i)
            self._hand_out()
            if time.monotonic() >= deadline:
                break
        return done

    def close(self) -> None:
        """Stop all workers at once."""
        self._queue.clear()
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.pipe.close()
            worker.process.kill()
        for worker in workers:
            worker.process.wait()

    @property
    def pids(self) -> list[int]:
        """Process ids, for tests that kill."""
        return [w.process.pid for w in self._workers]

    # -- processes ----------------------------------------------------------------------------------------

    def _start(self, name: str) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            # A fresh interpreter rather than a fork or a re-import of the caller's main module: it works from
            # notebooks and scripts without a main guard, and inherits no threads.
            process = subprocess.Popen(
                [sys.executable, "-m", "evomerge.workers.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_fileno() else subprocess.DEVNULL,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
        pipe = Connection(ours.detach())
        with contextlib.suppress(OSError):
            pipe.send_bytes(self._payload)
        return _Worker(name, process, pipe, time.monotonic())

    def _replace(self, i: int) -> str:
        """Kill and start anew; returns how the old process ended."""
        old = self._workers[i]
        old.pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            old.process.wait(timeout=0.5)
        old.process.kill()
        code = old.process.wait()
        if not old.ready:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                reason = self._last_failure or f"exit status {code}"
                raise RunError(f"no worker could be started in {STARTS} attempts ({reason}); see the messages above")
        self._workers[i] = self._start(old.name)
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    # -- traffic ------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._queue and worker.ready and worker.task is None:
                task = self._queue.popleft()
                task.attempts += 1
                worker.task = task
                worker.since = time.monotonic()
                # A worker that died just now reads as end-of-file in the next wait.
                with contextlib.suppress(OSError):
                    worker.pipe.send(task.unit)

    def _receive(self, i: int) -> list[Done]:
        worker = self._workers[i]
        try:
            kind, payload = worker.pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return self._lost(i)
        if kind == "ready":
            worker.ready = True
            self._failed_starts = 0
            return []
        if kind == "bad_start":
            self._last_failure = str(payload)
            if isinstance(payload, UserError):
                raise payload
            return []
        task, worker.task = worker.task, None
        assert task is not None
        return [
            (job, e, replace(t, worker=worker.name, attempts=task.attempts))
            for job, (e, t) in zip(task.unit.jobs, payload, strict=True)
        ]

    def _lost(self, i: int) -> list[Done]:
        """The worker is gone. Its unit is tried again, at most ATTEMPTS times in all."""
        worker = self._workers[i]
        how = self._replace(i)
        task = worker.task
        if task is None:
            return []
        if task.attempts < ATTEMPTS:
            self._queue.appendleft(task)
            return []
        return give_up(self._queue, worker.name, task, "failed:died", f"its worker died {task.attempts} times ({how})")

    def _check_limits(self, i: int) -> list[Done]:
        worker = self._workers[i]
        elapsed = time.monotonic() - worker.since
        if not worker.ready:
            if elapsed > self._start_seconds:
                self._last_failure = f"not ready within {self._start_seconds:g} s"
                self._replace(i)
            return []
        if worker.task is None:
            return []
        limit = self._timeout * len(worker.task.unit.jobs)
        if elapsed > limit:
            self._replace(i)
            return give_up(self._queue, worker.name, worker.task, "failed:timeout", f"took longer than {limit:g} s")
        if self._memory is not None and _resident(worker.process.pid) > self._memory:
            self._replace(i)
            gb = self._memory / 2**30
            return give_up(
                self._queue, worker.name, worker.task, "failed:oom", f"grew beyond the worker's limit of {gb:g} GiB"
            )
        return []


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _has_fileno() -> bool:
    try:
        sys.stderr.fileno()
    except (OSError, ValueError):
        return False
    return True
