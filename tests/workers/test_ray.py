"""The Ray executor on real Ray, CPU only: the contract, actors that die, hang or never start, and clusters."""

from __future__ import annotations

import ast
import json
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

import numpy as np
import psutil
import pytest

import evomerge
from evomerge.errors import RunError, UserError
from evomerge.prepare import Prepared, prepare
from evomerge.proposal import ItemSet, Job, WorkUnit
from evomerge.recipe import Recipe
from evomerge.run import run
from evomerge.rundir import read_telemetry
from evomerge.workers import Done
from evomerge.workers.fake import FakeEvaluator
from evomerge.workers.ray import STARTS, RayExecutor
from evomerge.workers.units import ATTEMPTS

PACKAGE = Path(evomerge.__file__).parent
ITEMS = ItemSet("search", {"a": (0, 1, 2), "b": (5, 3)})
With = Callable[..., Any]
Make = Callable[..., RayExecutor]


def test_ray_is_imported_in_one_file() -> None:
    """No other file of the package imports ray, not even inside a function."""
    importing = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            if any(n.split(".")[0] == "ray" for n in names):
                importing.add(str(path.relative_to(PACKAGE)))

    assert importing == {"workers/ray.py"}


def unit(n: int, jobs: int = 1) -> WorkUnit:
    recipes = [Recipe.model_validate({"base": f"base-{n}-{j}", "merge": []}) for j in range(jobs)]
    return WorkUnit(n, tuple(Job(10 * n + j, 0, r, ITEMS) for j, r in enumerate(recipes)))


def command(experiment: Path, out: Path, *overrides: str) -> list[str]:
    sets = [a for o in ("workers.backend=ray", *overrides) for a in ("--set", o)]
    return [sys.executable, "-m", "evomerge", "run", str(experiment), "--out", str(out), "--json", *sets]


def drained(executor: RayExecutor, count: int, seconds: float = 90.0) -> dict[int, Done]:
    done: dict[int, Done] = {}
    deadline = time.monotonic() + seconds
    while len(done) < count and time.monotonic() < deadline:
        for job, evaluation, telemetry in executor.wait(0.2):
            assert job.proposal not in done
            done[job.proposal] = (job, evaluation, telemetry)
    assert len(done) == count, f"{len(done)} of {count} came back"
    return done


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A module that actors can import, with evaluators that do not start."""
    (tmp_path / "ray_starts.py").write_text(
        textwrap.dedent("""
            import os, signal
            from evomerge.errors import UserError
            from evomerge.workers.fake import FakeEvaluator

            def user():
                raise UserError("/models/one: no such model folder")

            def broken():
                raise RuntimeError("no luck")

            def dies(log):
                with open(log, "a") as f:
                    f.write("start\\n")
                os.kill(os.getpid(), signal.SIGKILL)

            def hangs():
                import time
                time.sleep(3600)
        """)
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{PACKAGE.parent}")
    monkeypatch.syspath_prepend(str(tmp_path))
    import ray_starts  # type: ignore[import-not-found]

    return ray_starts


@pytest.fixture
def executor() -> Iterator[Make]:
    """executor(make, **settings) -> a RayExecutor that is closed after the test."""
    made: list[RayExecutor] = []

    def make(evaluator: Any, **settings: Any) -> RayExecutor:
        made.append(RayExecutor(evaluator, **{"count": 1, "timeout_seconds": 60.0, **settings}))
        return made[-1]

    yield make
    for e in made:
        e.close()


# -- the contract ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_contract(count: int, executor: Make) -> None:
    """Every job comes back once with its own scores; failures are results; work may come at any time; close twice."""
    running = executor(partial(FakeEvaluator, failures={11: "nan", 20: "error"}), count=count)
    units = [unit(n, 1 + n % 3) for n in range(7)]
    for u in units:
        running.submit(u)
    jobs = [j for u in units for j in u.jobs]
    done = drained(running, len(jobs))
    expected = {
        j.proposal: FakeEvaluator(failures={11: "nan", 20: "error"}).evaluate(WorkUnit(0, (j,)))[0][0] for j in jobs
    }

    assert sorted(done) == sorted(j.proposal for j in jobs)
    for proposal, (job, evaluation, telemetry) in done.items():
        assert job in jobs
        assert telemetry.worker.split("@")[0] in {f"ray-{i}" for i in range(count)}
        assert telemetry.attempts == 1
        assert (evaluation.status, evaluation.reason) == (expected[proposal].status, expected[proposal].reason)
        for task, metrics in (expected[proposal].scores or {}).items():
            for metric, column in metrics.items():
                assert evaluation.scores is not None
                assert np.array_equal(evaluation.scores[task][metric], column)
    assert running.wait(0.01) == []
    running.submit(unit(9))
    assert [*drained(running, 1)] == [90]
    running.submit(unit(8))
    running.close()
    running.close()


@pytest.fixture
def slow_scores(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """slow_scores(latency): runs use made-up scores that take so long, so that every actor gets its part."""

    def use(latency: float) -> None:
        monkeypatch.setattr(Prepared, "evaluator", lambda self: partial(FakeEvaluator, latency=latency))

    return use


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [2, 4])
def test_actors_write_the_same_journal(
    count: int, experiment_with: With, tmp_path: Path, slow_scores: Callable[[float], None]
) -> None:
    """Two and four actors, each with its part of the work, write the bytes of the inline run."""
    slow_scores(0.0)
    run(experiment_with(), tmp_path / "inline")
    slow_scores(0.5)
    out = tmp_path / "out"
    run(experiment_with(**{"workers.backend": "ray", "workers.count": count}), out)
    workers = {t["worker"].split("@")[0] for t in read_telemetry(out / "telemetry.jsonl")}

    assert (out / "journal.jsonl").read_bytes() == (tmp_path / "inline" / "journal.jsonl").read_bytes()
    assert workers == {f"ray-{i}" for i in range(count)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_models(
    experiment_with: With, finished_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Real models on two actors: the inline run's bytes, also when resumed from the middle; nothing on stdout."""
    out = tmp_path / "out"
    experiment = experiment_with(**{"workers.backend": "ray", "workers.count": 2})
    run(experiment, out)
    whole = (finished_run / "journal.jsonl").read_bytes()
    first = (out / "journal.jsonl").read_bytes()
    (out / "journal.jsonl").write_bytes(whole[: len(whole) // 2])
    run(experiment, out)

    assert first == whole
    assert (out / "journal.jsonl").read_bytes() == whole
    assert capfd.readouterr().out == ""


# -- actors that die, hang or never start ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_actor_recovers(executor: Make) -> None:
    """kill -9 in the middle of a unit costs an attempt, not the result; the next result is there within 10 s."""
    running = executor(partial(FakeEvaluator, latency=1.0))
    running.submit(unit(1))
    running.submit(unit(2))
    while running._workers[0].task is None:
        running.wait(0.05)
    first = running.pids[0]
    os.kill(first, signal.SIGKILL)
    begun = time.monotonic()
    done: list[Done] = []
    while not done:
        done += running.wait(0.2)
    seconds = time.monotonic() - begun - 1.0
    rest = drained(running, 1)

    print(f"\nkilled actor: back at work after {seconds:.2f} s")
    assert done[0][1].ok
    assert done[0][2].attempts == 2
    assert rest[20][1].ok
    assert rest[20][2].attempts == 1
    assert running.pids[0] != first
    assert seconds < 10.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_actor_recovers_within_ten_seconds(experiment_with: With, executor: Make) -> None:
    """The same with real models: a new actor has loaded its pool and answered within 10 s of the kill."""
    prepared = prepare(experiment_with())
    running = executor(prepared.evaluator())
    recipes = list(prepared.baselines().values())
    running.submit(WorkUnit(0, (Job(0, 0, recipes[0], prepared.items["search"]),)))
    drained(running, 1)
    os.kill(running.pids[0], signal.SIGKILL)
    begun = time.monotonic()
    running.submit(WorkUnit(1, (Job(1, 0, recipes[1], prepared.items["search"]),)))
    done = drained(running, 1)
    seconds = time.monotonic() - begun

    print(f"\nkilled actor with a pool: its next result after {seconds:.2f} s")
    assert done[1][1].ok
    assert seconds < 10.0


@pytest.mark.slow
def test_a_hung_task_times_out(executor: Make) -> None:
    """A unit beyond the limit is failed:timeout and not tried again; the next one gets a new actor."""
    running = executor(partial(FakeEvaluator, failures={10: "hang"}), timeout_seconds=1.0)
    running.submit(unit(1))
    running.submit(unit(2))
    while running._workers[0].task is None:
        running.wait(0.05)
    first = running.pids[0]
    done = drained(running, 2)

    assert done[10][1].status == "failed:timeout"
    assert done[10][1].reason == "took longer than 1 s"
    assert done[10][2].attempts == 1
    assert done[20][1].ok
    assert not psutil.pid_exists(first) or psutil.Process(first).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_unit_that_always_kills_its_actor_fails(executor: Make) -> None:
    """After three deaths the unit is failed:died; the others are unharmed."""
    running = executor(partial(FakeEvaluator, failures={20: "die"}), count=2)
    for n in range(1, 5):
        running.submit(unit(n))
    done = drained(running, 4)

    assert {n: e.status for n, (_, e, _) in done.items()} == {10: "ok", 20: "failed:died", 30: "ok", 40: "ok"}
    assert done[20][1].reason == f"its worker died {ATTEMPTS} times"
    assert done[20][2].attempts == ATTEMPTS


@pytest.mark.slow
def test_an_actor_that_dies_at_every_start(executor: Make, importable: Any, tmp_path: Path) -> None:
    """The run ends after three starts, not after thousands."""
    log = tmp_path / "starts"
    running = executor(partial(importable.dies, str(log)))
    running.submit(unit(1))

    with pytest.raises(RunError, match=f"ray-0 could not be started in {STARTS} attempts"):
        drained(running, 1)
    assert len(log.read_text().splitlines()) <= STARTS


@pytest.mark.slow
def test_a_start_that_raises(executor: Make, importable: Any) -> None:
    """An exception of the start is tried a few times, then the run fails with the reason."""
    running = executor(importable.broken)
    running.submit(unit(1))

    with pytest.raises(RunError, match=f"ray-0 could not be started in {STARTS} attempts.*no luck"):
        drained(running, 1)


@pytest.mark.slow
def test_bad_input_found_by_an_actor(executor: Make, importable: Any) -> None:
    """A UserError of the start reaches the driver as what it is, at once, with the worker's name."""
    running = executor(importable.user)
    running.submit(unit(1))

    with pytest.raises(UserError, match=r"^ray-0: /models/one: no such model folder$"):
        drained(running, 1)


@pytest.mark.slow
def test_a_missing_model_folder_is_named(experiment_with: With, executor: Make, tiny_model: Any) -> None:
    """A worker without the base's folder, as on another host, says which worker and which folder."""
    folder = tiny_model("llama", 0, name="leaving")
    prepared = prepare(experiment_with(**{"models.base": str(folder)}))
    make = prepared.evaluator()
    folder.rename(folder.with_name("gone"))
    running = executor(make)
    running.submit(unit(1))

    with pytest.raises(UserError, match=rf"^ray-0.*: {folder}: no such model folder"):
        drained(running, 1)


@pytest.mark.slow
def test_a_start_that_hangs_is_given_up(executor: Make, importable: Any) -> None:
    """An actor that is not ready within its time ends the run with a message instead of silent waiting."""
    running = executor(importable.hangs, ready_seconds=4.0)
    running.submit(unit(1))

    with pytest.raises(RunError, match="ray-0 was not ready within 4 s"):
        drained(running, 1)


# -- clusters and resources -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_gpus_than_there_are(executor: Make) -> None:
    """Asking for GPUs that the cluster lacks is bad input, said at once."""
    running = executor(FakeEvaluator, count=300, gpus=0.5)

    with pytest.raises(UserError, match=r"300 actors of 0\.5 GPU need 150, the cluster has \d"):
        running.submit(unit(1))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cluster_that_nobody_answers(small_experiment: Path, tmp_path: Path) -> None:
    """A wrong address ends the command with status 2 and one line, in reasonable time."""
    begun = time.monotonic()
    done = subprocess.run(
        command(small_experiment, tmp_path / "out", "workers.address='127.0.0.1:1'"),
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )

    print(f"\nno cluster: refused after {time.monotonic() - begun:.1f} s")
    assert done.returncode == 2, done.stderr
    assert "workers.address '127.0.0.1:1': no Ray cluster answers" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hosts(experiment_with: With, tmp_path: Path, slow_scores: Callable[[float], None]) -> None:
    """Two raylets of one cluster, given by address: the same journal, with an actor on each of them."""
    from ray.cluster_utils import Cluster

    slow_scores(0.0)
    run(experiment_with(), tmp_path / "inline")
    slow_scores(0.5)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "num_gpus": 1})
    try:
        cluster.add_node(num_cpus=2, num_gpus=1)
        cluster.wait_for_nodes()
        change = {"workers.backend": "ray", "workers.count": 2, "workers.address": cluster.address}
        # A GPU that Ray only believes in puts one actor on each host.
        out = tmp_path / "out"
        run(experiment_with(**change, **{"workers.gpus_per_worker": 1.0}), out)
        alive = len(cluster.list_all_nodes())
    finally:
        cluster.shutdown()

    assert (out / "journal.jsonl").read_bytes() == (tmp_path / "inline" / "journal.jsonl").read_bytes()
    assert {t["worker"].split("@")[0] for t in read_telemetry(out / "telemetry.jsonl")} == {"ray-0", "ray-1"}
    assert alive == 2, "a cluster that is not ours is left running"


# -- standard output ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_stdout_is_data_only(small_experiment: Path, tmp_path: Path) -> None:
    """`run --json` on Ray prints one JSON value and nothing else, though an actor was killed on the way."""
    out = tmp_path / "out"
    with subprocess.Popen(
        command(small_experiment, out, "search.budget={evaluations: 300}"),
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as driver:
        path = out / "journal.jsonl"
        while driver.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 20):
            time.sleep(0.05)
        victims = [
            p.pid
            for p in psutil.Process(driver.pid).children(recursive=True)
            if p.status() != psutil.STATUS_ZOMBIE and "_Actor" in " ".join(p.cmdline())
        ]
        running = driver.poll() is None
        if victims:
            os.kill(victims[0], signal.SIGKILL)
        stdout, stderr = driver.communicate(timeout=200)

    assert running
    assert victims, "there was no actor to kill"
    assert driver.returncode == 0, stderr
    assert json.loads(stdout)["dir"] == str(out)
