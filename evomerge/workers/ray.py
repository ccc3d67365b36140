"""The Ray executor: one actor per device, on this machine or on a cluster. The only file that imports Ray.

Submitted to by a `ray.wait` loop rather than ActorPool, which loses items when an actor dies. Actors ask for no
CPUs (`num_cpus=0`; an actor with a GPU would take one, and further actors would pend in silence). Ray restarts and
retries nothing: an actor that died is replaced here, its unit is queued again, a bounded number of times, and then
becomes a recorded failure. Weights never travel: every actor opens the pool by path.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from evomerge.errors import RunError, UserError
from evomerge.proposal import Evaluation, Telemetry, WorkUnit
from evomerge.workers import Done, Evaluator, MakeEvaluator
from evomerge.workers.units import ATTEMPTS, Task, give_up

STARTS = 3
"""Starts of one actor that may fail in a row."""
READY_SECONDS = 300.0
"""Time for actors to be placed and to load their pool."""

CONNECT_SECONDS = 10.0
"""Time for the host of a cluster's address to answer."""


class _Actor:
    """The process on the other side: one evaluator."""

    def __init__(self, make: MakeEvaluator) -> None:
        self._make = make

    def ready(self) -> tuple[str, int]:
        """Load everything, then give host name and process id.

        Not in the constructor: of what that raises Ray passes on the text only.
        """
        # Ray sets OMP_NUM_THREADS; the evaluator sets its own thread count.
        self._evaluator: Evaluator = self._make()
        return socket.gethostname(), os.getpid()

    def evaluate(self, unit: WorkUnit) -> list[tuple[Evaluation, Telemetry]]:
        """One result per job."""
        return self._evaluator.evaluate(unit)


@dataclass
class _Worker:
    """An actor, and what it is doing: `ref` is the call in flight (loading, or evaluating `task`)."""

    name: str
    actor: Any
    ref: Any
    since: float
    host: str = ""
    pid: int = 0
    ready: bool = False
    task: Task | None = None
    failed_starts: int = 0


class RayExecutor:
    """`count` actors. Ray is started at the first unit, and stopped by `close` where we started it."""

    def __init__(
        self,
        make: MakeEvaluator,
        *,
        count: int,
        timeout_seconds: float,
        gpus: float = 0.0,
        address: str | None = None,
        ready_seconds: float = READY_SECONDS,
    ) -> None:
        """`gpus` is each actor's share of a GPU; `address` is a running cluster (auto or a URL)."""
        self._make = make
        self._count = count
        self._timeout = timeout_seconds
        self._gpus = gpus
        self._address = address
        self._ready_seconds = ready_seconds
        self._queue: deque[Task] = deque()
        self._workers: list[_Worker] = []
        self._ray: Any = None
        self._owned = False
        self._stdout: int | None = None

    # -- executor interface -------------------------------------------------------------------------------

    def submit(self, unit: WorkUnit) -> None:
        """Queue a unit; an idle actor gets it at once."""
        if not self._workers:
            self._begin()
        self._queue.append(Task(unit))
        self._hand_out()

    def wait(self, seconds: float) -> list[Done]:
        """Collect results for at most `seconds`. Raises RunError where actors cannot be placed or started."""
        deadline = time.monotonic() + seconds
        done: list[Done] = []
        while not done:
            busy = {w.ref: w for w in self._workers if w.ref is not None}
            left = max(0.0, min(deadline - time.monotonic(), 0.5))
            finished, _ = self._ray.wait(list(busy), num_returns=1, timeout=left) if busy else ([], [])
            for ref in finished:
                done += self._collect(busy[ref])
            for worker in self._workers:
                done += self._check_limits(worker)
            self._hand_out()
            if time.monotonic() >= deadline:
                break
        return done

    def close(self) -> None:
        """Stop the actors, and Ray where we started it."""
        self._queue.clear()
        if self._ray is None:
            return
        for worker in self._workers:
            with contextlib.suppress(Exception):
                self._ray.kill(worker.actor, no_restart=True)
        self._workers.clear()
        if self._owned:
            self._ray.shutdown()
        self._restore_stdout()

    @property
    def pids(self) -> list[int]:
        """Process ids of ready actors, for tests that kill."""
        return [w.pid for w in self._workers if w.ready]

    # -- actors -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._address is not None:
            _check_answers(self._address)
        self._divert_stdout()
        import ray

        self._ray = ray
        if not ray.is_initialized():
            self._owned = True
            handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
            try:
                ray.init(
                    address=self._address,
                    include_dashboard=False if self._address is None else None,
                    log_to_driver=False,
                    configure_logging=False,
                )
            except ConnectionError as e:
                self._restore_stdout()
                raise UserError(f"workers.address {self._address!r}: no Ray cluster answers ({e})") from None
            finally:  # Ray puts its own handlers in; ours finish the commit
                if threading.current_thread() is threading.main_thread():
                    for s, handler in handlers.items():
                        signal.signal(s, handler)
        self._check_resources()
        self._shipped = ray.put(self._make)
        self._actor_class = ray.remote(_Actor)
        self._workers = [self._start(f"ray-{i}") for i in range(self._count)]

    def _check_resources(self) -> None:
        have = float(self._ray.cluster_resources().get("GPU", 0.0))
        need = self._gpus * self._count
        if need > have + 1e-9:
            raise UserError(
                f"workers: {self._count} actors of {self._gpus:g} GPU need {need:g}, the cluster has {have:g}; "
                "lower count or gpus_per_worker"
            )

    def _start(self, name: str) -> _Worker:
        actor = self._actor_class.options(num_cpus=0, num_gpus=self._gpus, max_restarts=0, max_task_retries=0).remote(
            self._shipped
        )
        return _Worker(name, actor, actor.ready.remote(), time.monotonic())

    def _restart(self, worker: _Worker) -> None:
        """A new actor in the place of one that is gone."""
        with contextlib.suppress(Exception):
            self._ray.kill(worker.actor, no_restart=True)
        fresh = self._start(worker.name)
        worker.actor, worker.ref, worker.since = fresh.actor, fresh.ref, fresh.since
        worker.ready, worker.task = False, None

    # -- traffic ------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._queue and worker.ready and worker.ref is None:
                task = self._queue.popleft()
                task.attempts += 1
                worker.task = task
                worker.ref = worker.actor.evaluate.remote(task.unit)
                worker.since = time.monotonic()

    def _collect(self, worker: _Worker) -> list[Done]:
        errors = self._ray.exceptions
        ref, worker.ref = worker.ref, None
        try:
            result = self._ray.get(ref)
        except errors.RayTaskError as e:
            cause = e.cause if isinstance(e.cause, UserError) else None
            if cause is not None:
                raise UserError(f"{worker.name}: {cause}") from None
            return self._lost(worker, str(e).strip().splitlines()[-1])
        except errors.RayActorError as e:
            return self._lost(worker, str(e).strip().splitlines()[0])
        except errors.RayError as e:
            return self._lost(worker, str(e).strip().splitlines()[0])
        if not worker.ready:
            worker.host, worker.pid = result
            worker.ready = True
            worker.failed_starts = 0
            return []
        task, worker.task = worker.task, None
        assert task is not None
        name = f"{worker.name}@{worker.host}"
        return [
            (job, e, replace(t, worker=name, attempts=task.attempts))
            for job, (e, t) in zip(task.unit.jobs, result, strict=True)
        ]

    def _lost(self, worker: _Worker, reason: str) -> list[Done]:
        """The actor is gone. Its unit is tried again, at most ATTEMPTS times in all."""
        task, was_ready = worker.task, worker.ready
        if not was_ready:
            worker.failed_starts += 1
            if worker.failed_starts >= STARTS:
                raise RunError(f"{worker.name} could not be started in {STARTS} attempts ({reason})")
        self._restart(worker)
        if task is None:
            return []
        if task.attempts < ATTEMPTS:
            self._queue.appendleft(task)
            return []
        return give_up(
            self._queue, f"{worker.name}@{worker.host}", task, "failed:died", f"its worker died {task.attempts} times"
        )

    def _check_limits(self, worker: _Worker) -> list[Done]:
        elapsed = time.monotonic() - worker.since
        if not worker.ready:
            if elapsed > self._ready_seconds:
                raise RunError(
                    f"{worker.name} was not ready within {self._ready_seconds:g} s; the cluster has "
                    f"{_summary(self._ray.available_resources())} free; lower workers.count or free some"
                )
            return []
        if worker.task is None:
            return []
        limit = self._timeout * len(worker.task.unit.jobs)
        if elapsed <= limit:
            return []
        task = worker.task
        self._restart(worker)
        return give_up(
            self._queue, f"{worker.name}@{worker.host}", task, "failed:timeout", f"took longer than {limit:g} s"
        )

    # -- standard output ----------------------------------------------------------------------------------

    def _divert_stdout(self) -> None:
        """Ray reports dead workers on file descriptor 1, which belongs to our data: point it at 2 meanwhile."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            if sys.stdout.fileno() == 1:
                self._stdout = os.dup(1)
                os.dup2(2, 1)

    def _restore_stdout(self) -> None:
        if self._stdout is not None:
            sys.stdout.flush()
            os.dup2(self._stdout, 1)
            os.close(self._stdout)
            self._stdout = None


def _check_answers(address: str) -> None:
    """Raises UserError where nobody listens at HOST:PORT; Ray itself would try for many minutes."""
    place = re.fullmatch(r"(?:ray://)?\[?(?P<host>[^/]+?)\]?:(?P<port>\d{1,5})", address)
    if place is None:  # auto, or a name that Ray knows
        return
    try:
        socket.create_connection((place["host"], int(place["port"])), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as e:
        raise UserError(f"workers.address {address!r}: no Ray cluster answers ({e})") from None


def _summary(resources: dict[str, float]) -> str:
    wanted = {k: v for k, v in resources.items() if k in ("CPU", "GPU")}
    return ", ".join(f"{v:g} {k}" for k, v in sorted(wanted.items())) or "nothing"
