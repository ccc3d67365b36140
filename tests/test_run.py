"""Runs end to end: real search, real tiny models, the journal as the only truth."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import evomerge
from evomerge.canonical import decode_array
from evomerge.errors import RunError, UserError
from evomerge.history import History
from evomerge.journal import read, seal
from evomerge.progress import Silent
from evomerge.run import run
from evomerge.rundir import RunDirectory, read_telemetry
from evomerge.workers.inline import InlineExecutor

With = Callable[..., Any]
Overrides = dict[str, Any]
TWO_STAGES: Overrides = {
    "search_space": {
        "stages": [
            {"space": {"axes": {"weight": {"low": -0.5, "high": 1.5, "default": "uniform"}}}, "share": 0.5},
            {"space": {"groups": "layers", "axes": {"weight": {"low": -0.5, "high": 1.5}}}, "share": 0.5},
        ]
    }
}


def journal(out: Path) -> bytes:
    return (out / "journal.jsonl").read_bytes()


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read(out / "journal.jsonl")[0] if e["kind"] == kind]


# -- what a run leaves ----------------------------------------------------------------------------------------


def test_a_run_does_what_the_straight_line_says(finished_run: Path) -> None:
    """Baselines first, then exactly the budget, the mean, finalists on select, winner and baselines on report."""
    kinds = [e["kind"] for e in read(finished_run / "journal.jsonl")[0]]
    asked = events(finished_run, "asked")
    roles = [e["role"] for e in asked]

    assert kinds[:4] == ["run", "items", "items", "items"]
    assert kinds[-1] == "stop"
    assert roles == ["baseline"] * 4 + ["search"] * 12 + ["mean"]
    assert [e["name"] for e in asked[:4]] == ["base", "one", "two", "uniform"]
    assert [e["id"] for e in asked] == list(range(17))
    split = {e["id"]: e["name"] for e in events(finished_run, "items")}
    told = [(split[e["items"]], e["id"]) for e in events(finished_run, "told")]
    assert [i for s, i in told if s == "search"] == list(range(17))
    [final] = events(finished_run, "final")
    assert [i for s, i in told if s == "select"] == final["finalists"]
    assert set(final["finalists"]) >= {0, 1, 2, 3, 16}
    assert [i for s, i in told if s == "report"] == sorted({0, 1, 2, 3, final["winner"]})


def test_the_journal_names_no_clock_host_or_path(finished_run: Path, tiny_model: Any) -> None:
    """Timings and places stand in telemetry only."""
    import socket

    text = re.sub(r'"b64":"[^"]*"', "", journal(finished_run).decode())

    assert str(tiny_model("llama").parent) not in text
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)
    assert not re.search(r'"[^"]*(seconds|time|pid|host)[^"]*":', text)
    lines = read_telemetry(finished_run / "telemetry.jsonl")
    assert len(lines) >= 17
    assert all(t["score_seconds"] > 0 for t in lines)


def test_recorded_recipes_decode_again(finished_run: Path) -> None:
    """Every candidate's recipe, decoded from its genome, has the journalled id; so has the winner."""
    history = History.read(finished_run)

    for entry in history.entries.values():
        assert history.recipe(entry.id).id == entry.recipe_id
    assert history.winner.id == history.entry(history.winner_id or 0).recipe_id
    with pytest.raises(UserError, match="no candidate 17; there are 0 to 16"):
        history.recipe(17)


def test_winner_is_the_best_on_select(finished_run: Path) -> None:
    """The winner's recorded loss is the smallest, and its scores give that loss again."""
    history = History.read(finished_run)
    final = history.final
    assert final is not None

    losses = {int(i): x for i, x in final["losses"].items()}
    winner = history.winner_id
    assert winner is not None
    assert losses[winner] == min(losses.values())
    scores = history.entry(winner).scores("select")
    assert scores is not None
    means = [float(np.mean(scores[t]["cross_entropy"], dtype=np.float64)) for t in ("sums", "words")]
    assert losses[winner] == pytest.approx(np.mean(means), abs=1e-12)


def test_evaluations_are_a_table(finished_run: Path) -> None:
    """One row per candidate and split, with status, loss and the reported metric of every task."""
    history = History.read(finished_run)
    rows = history.evaluations

    assert len(rows) == len(events(finished_run, "told"))
    assert {r["split"] for r in rows} == {"search", "select", "report"}
    assert all(r["status"] == "ok" and np.isfinite(r["loss"]) for r in rows)
    assert all(0 <= r["sums.accuracy"] <= 1 and 0 <= r["words.accuracy"] <= 1 for r in rows)
    assert {r["loss"] for r in rows if r["id"] == 4 and r["split"] == "search"} == {
        history.loss(history.entry(4), "search")
    }


def test_python_interface(small_experiment: Path, tmp_path: Path, finished_run: Path) -> None:
    """evomerge.run takes a file and overrides and returns the history of the folder it names, twice as well as once."""
    evomerge.run(small_experiment, tmp_path / "out", {"name": "renamed", "export.format": "mergekit"})
    assert (tmp_path / "out" / "exports" / "mergekit").is_file()
    history = evomerge.run(small_experiment, tmp_path / "out", {"name": "renamed"})

    assert history.path == tmp_path / "out"
    assert history.experiment.name == "renamed"
    assert "<h1>renamed: evomerge run</h1>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert journal(tmp_path / "out") == journal(finished_run)


# -- workers do not matter ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_local_workers_give_the_same_bytes(
    count: int, experiment_with: With, tmp_path: Path, finished_run: Path
) -> None:
    """One or two worker processes write the journal that the inline executor writes."""
    run(experiment_with(**{"workers.backend": "local", "workers.count": count}), tmp_path / "out")

    assert journal(tmp_path / "out") == journal(finished_run)
    workers = {t["worker"] for t in read_telemetry(tmp_path / "out" / "telemetry.jsonl")}
    assert workers
    assert workers <= {f"local-{i}" for i in range(count)}


# -- resuming -------------------------------------------------------------------------------------------------


def cut_points(data: bytes) -> list[int]:
    """Places to cut: nothing, inside and after the first line, between and inside later ones, before the end."""
    ends = [i + 1 for i, b in enumerate(data) if b == ord("\n")]
    told = [i for i, line in enumerate(data.splitlines()) if b'"kind":"told"' in line]
    middle = told[len(told) // 2]
    return [
        0,
        ends[0] // 2,
        ends[0],
        ends[5],
        ends[told[1]] - 1,
        ends[middle - 1] + 10,
        ends[middle],
        ends[told[-1]] - 3,
        ends[-2],
        len(data) - 1,
    ]


@pytest.mark.parametrize("cut", range(10))
def test_a_cut_journal_is_completed_to_the_same_bytes(cut: int, run_copy: Path, experiment_with: With) -> None:
    """Wherever a crash cut the journal, resuming gives the bytes of a run that was never interrupted."""
    whole = journal(run_copy)
    (run_copy / "journal.jsonl").write_bytes(whole[: cut_points(whole)[cut]])
    history = run(experiment_with(), run_copy)

    assert journal(run_copy) == whole
    assert history.stopped


def test_resuming_again_and_again(run_copy: Path, experiment_with: With, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies after every few evaluations still arrives at the same bytes."""
    whole = journal(run_copy)
    (run_copy / "journal.jsonl").write_bytes(b"")
    wait = InlineExecutor.wait
    served = 0

    def dying(self: InlineExecutor, seconds: float) -> Any:
        nonlocal served
        served += 1
        if served % 4 == 0:
            raise KeyboardInterrupt
        return wait(self, seconds)

    monkeypatch.setattr(InlineExecutor, "wait", dying)
    deaths = 0
    while not (History.read(run_copy).stopped if journal(run_copy) else False):
        try:
            run(experiment_with(), run_copy)
        except KeyboardInterrupt:
            deaths += 1
        assert deaths < 40

    assert deaths >= 5
    assert journal(run_copy) == whole


def test_the_experiment_file_alone_is_no_run(run_copy: Path, experiment_with: With) -> None:
    """A crash right after the folder was made leaves something that the same command goes on with."""
    whole = journal(run_copy)
    (run_copy / "journal.jsonl").write_bytes(b"")
    (run_copy / "experiment.yaml").unlink()
    run(experiment_with(), run_copy)

    assert journal(run_copy) == whole
    assert (run_copy / "experiment.yaml").is_file()


def test_resume_on_two_workers(run_copy: Path, experiment_with: With) -> None:
    """A run whose first result came inline may be finished by two processes, to the same bytes."""
    whole = journal(run_copy)
    (run_copy / "journal.jsonl").write_bytes(whole[: cut_points(whole)[4]])
    (run_copy / "telemetry.jsonl").unlink()
    run(experiment_with(**{"workers.backend": "local", "workers.count": 2}), run_copy)

    assert journal(run_copy) == whole
    assert len(events(run_copy, "told")) - 1 == sum(e["attempts"] for e in read_telemetry(run_copy / "telemetry.jsonl"))
    workers = {t["worker"] for t in read_telemetry(run_copy / "telemetry.jsonl")}
    assert workers
    assert workers <= {"local-0", "local-1"}


def test_a_finished_run_evaluates_nothing(
    run_copy: Path, experiment_with: With, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running a finished run again changes no byte and submits no work."""

    def refuse(*_: object) -> None:
        raise AssertionError("something was evaluated")

    before = {p.name: p.read_bytes() for p in run_copy.iterdir()}
    monkeypatch.setattr(InlineExecutor, "submit", refuse)
    history = run(experiment_with(), run_copy)

    assert history.winner_id is not None
    assert {p.name: p.read_bytes() for p in run_copy.iterdir()} == before


def test_damage_in_the_middle_is_refused(run_copy: Path, experiment_with: With) -> None:
    """A flipped byte before the last line is damage, not an interrupted write; nothing is overwritten."""
    data = bytearray(journal(run_copy))
    data[len(data) // 2] ^= 1
    (run_copy / "journal.jsonl").write_bytes(data)

    with pytest.raises(UserError, match=r"line \d+: damaged"):
        run(experiment_with(), run_copy)
    assert journal(run_copy) == bytes(data)


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"search.seed": 4}, "holds another experiment"),
        ({"search.budget": {"evaluations": 11}}, "it can only be raised"),
        ({"search.budget": {"item_evaluations": 300}}, "it can only be raised"),
        ({"models.dtype": "bfloat16"}, "holds another experiment"),
    ],
    ids=["seed", "budget", "kind of budget", "dtype"],
)
def test_another_experiment_does_not_touch_the_folder(
    change: Overrides, text: str, run_copy: Path, experiment_with: With
) -> None:
    """The folder of another experiment, or of another budget, is left as it is."""
    before = {p.name: p.read_bytes() for p in run_copy.iterdir()}

    with pytest.raises(UserError, match=text):
        run(experiment_with(**change), run_copy)
    assert {p.name: p.read_bytes() for p in run_copy.iterdir()} == before


def test_folders_that_are_no_runs(tmp_path: Path, experiment_with: With) -> None:
    """A file, and a folder with something else in it, are refused and left alone."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "experiment.yaml").write_text("mine")

    with pytest.raises(UserError, match="is a file"):
        run(experiment_with(), tmp_path / "file")
    with pytest.raises(UserError, match="is not empty and no run directory"):
        run(experiment_with(), tmp_path / "folder")
    assert (tmp_path / "folder" / "experiment.yaml").read_text() == "mine"
    assert {p.name for p in (tmp_path / "folder").iterdir()} == {"experiment.yaml"}


def test_bad_input_writes_nothing(tmp_path: Path, experiment_with: With) -> None:
    """A pool that does not fit is refused before the run directory exists."""
    with pytest.raises(UserError, match="no such model folder"):
        run(experiment_with(**{"models.experts.one": str(tmp_path / "gone")}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_runs_in_one_folder(run_copy: Path, experiment_with: With) -> None:
    """A folder that another process works in is refused."""
    import fcntl

    with (run_copy / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        with pytest.raises(UserError, match="another evomerge process is running here"):
            run(experiment_with(), run_copy)


# -- stages, budgets, failures --------------------------------------------------------------------------------


def test_the_second_stage_starts_at_the_best_of_the_first(experiment_with: With, tmp_path: Path) -> None:
    """Stage 2's start decodes to the best candidate that its space can express, spread over the layers."""
    history = run(experiment_with(**TWO_STAGES), tmp_path / "out")
    stages = events(tmp_path / "out", "stage")
    asked = [e for e in history.entries.values() if e.role == "search"]

    assert [sum(e.stage == n for e in asked) for n in (0, 1)] == [6, 6]
    start = decode_array(stages[1]["inputs"]["start"])
    first = [e for e in history.entries.values() if e.stage == 0]
    best = min(first, key=lambda e: (history.loss(e, "search"), e.id))
    begun = history.spaces[1].decode(start, history.manifest)
    assert begun.id == best.recipe_id
    assert {e.role for e in first} == {"search", "mean"}


def test_probes_come_first_and_count(experiment_with: With, tmp_path: Path) -> None:
    """A budget that affords them scores the probes before stage 0, within the budget, and starts at the best."""
    change = {"search.budget": {"evaluations": 24}}
    out = tmp_path / "out"
    history = run(experiment_with(**change), out)
    whole = journal(out)
    probes = [e for e in history.entries.values() if e.name == "probe"]
    [stage] = events(out, "stage")
    last = [i for i, e in enumerate(read(out / "journal.jsonl")[0]) if e.get("name") == "probe"][-1]

    assert len(probes) == len(history.spaces[0].probes()) > 0
    assert sum(e.role == "search" for e in history.entries.values()) == 24
    best = min(probes, key=lambda e: (history.loss(e, "search"), e.id))
    start = history.spaces[0].decode(decode_array(stage["inputs"]["start"]), history.manifest)
    assert start.id == best.recipe_id
    for keep in (last, last + 3):
        (out / "journal.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:keep]))
        run(experiment_with(**change), out)
        assert journal(out) == whole


def test_a_space_that_can_express_a_baseline_starts_there(experiment_with: With, tmp_path: Path) -> None:
    """Linear merges contain every baseline but the base, so the search begins at the best of them."""
    space = {"method": "linear", "axes": {"weight": {"low": 0.0, "high": 1.0, "default": "uniform"}}}
    history = run(experiment_with(search_space=space), tmp_path / "out")
    [stage] = events(tmp_path / "out", "stage")

    start = history.spaces[0].decode(decode_array(stage["inputs"]["start"]), history.manifest)
    ranked = sorted((history.loss(e, "search"), e.id) for e in history.baselines.values() if e.name != "base")
    assert start.id == history.entry(ranked[0][1]).recipe_id


def test_two_stages_resume_too(experiment_with: With, tmp_path: Path) -> None:
    """Cut in its second stage, a staged run is completed to the same bytes."""
    out = tmp_path / "out"
    run(experiment_with(**TWO_STAGES), out)
    whole = journal(out)
    at = whole.index(b'"stage":1')
    (out / "journal.jsonl").write_bytes(whole[: at + 500])
    run(experiment_with(**TWO_STAGES), out)

    assert journal(out) == whole


@pytest.mark.parametrize(
    ("budget", "asked"), [({"evaluations": 5}, 5), ({"item_evaluations": 24 * 7 + 23}, 7)], ids=["count", "items"]
)
def test_budgets_are_kept(budget: Overrides, asked: int, experiment_with: With, tmp_path: Path) -> None:
    """Exactly as many candidates as the budget pays for, also where it ends inside a generation."""
    history = run(experiment_with(**{"search.budget": budget}), tmp_path / "out")

    assert sum(e.role == "search" for e in history.entries.values()) == asked
    assert history.winner_id is not None


def test_a_budget_of_time_ends_and_resumes(
    experiment_with: With, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes end the search after the generation that crosses them; the finished run replays without them."""
    clock = itertools.count(0.0, 1.0)  # every look costs a second
    monkeypatch.setattr(RunDirectory, "seconds", property(lambda _: next(clock)))
    change = {"search.budget": {"minutes": 0.5}}
    history = run(experiment_with(**change), tmp_path / "out")
    whole = journal(tmp_path / "out")
    monkeypatch.setattr(RunDirectory, "seconds", property(lambda _: 1e9))
    run(experiment_with(**change), tmp_path / "out")

    groups = Counter(e.group for e in history.entries.values() if e.role == "search")
    assert history.stopped
    assert len(groups) >= 3
    assert set(list(groups.values())[1:]) == {4}, "a generation that has begun is finished"
    assert journal(tmp_path / "out") == whole


def nan_expert(tiny_model: Any, seed: int, name: str) -> str:
    folder: Path = tiny_model("llama", seed, name=name)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_most_of_a_generation_failing_stops_the_run(experiment_with: With, tiny_model: Any, tmp_path: Path) -> None:
    """With an expert full of NaN every merge that uses it fails: recorded, and the run stops with the reasons."""
    experiment = experiment_with(**{"models.experts.one": nan_expert(tiny_model, 1, "sick")})

    with pytest.raises(RunError, match=r"of the last \d+ candidates failed \(\d+ x failed:nan .*layers\.0\.mlp"):
        run(experiment, tmp_path / "out")
    told = events(tmp_path / "out", "told")
    failed = {e["id"] for e in told if e["status"] != "ok"}
    assert {1, 3} <= failed, "the sick expert itself and the uniform merge"
    assert {e["status"] for e in told} == {"ok", "failed:nan"}


def test_a_run_that_stopped_on_failures_goes_on_when_resumed(
    experiment_with: With, tiny_model: Any, tmp_path: Path
) -> None:
    """What the journal replays does not stop it again: every resume gets at least one generation further."""
    experiment = experiment_with(**{"models.experts.one": nan_expert(tiny_model, 1, "sick")})
    sizes = []

    for _ in range(9):
        try:
            history = run(experiment, tmp_path / "out")
            break
        except RunError:
            sizes.append(len(events(tmp_path / "out", "told")))
    else:
        pytest.fail("the run never came to its end")

    assert sizes == sorted(set(sizes))
    assert history.winner_id in {0, 2}
    assert history.stopped


def test_a_base_that_cannot_be_scored_ends_the_run(experiment_with: With, tiny_model: Any, tmp_path: Path) -> None:
    """Without the base there is nothing to compare with: one line that says why."""
    with pytest.raises(RunError, match=r"the base itself could not be scored \(failed:nan: .*layers\.0\.mlp"):
        run(experiment_with(**{"models.base": nan_expert(tiny_model, 0, "sick base")}), tmp_path / "out")


class Notes(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def test_other_numerics_are_noted_not_refused(run_copy: Path, experiment_with: With, monkeypatch: Any) -> None:
    """Resuming on other software warns, keeps what the journal says and goes on."""
    from evomerge import prepare

    whole = journal(run_copy)
    (run_copy / "journal.jsonl").write_bytes(whole[: cut_points(whole)[6]])
    real = prepare.numerics
    monkeypatch.setattr(prepare, "numerics", lambda *a: {**real(*a), "cpu": "AVX1024"})
    notes = Notes()
    run(experiment_with(), run_copy, notes)

    assert notes.texts == ["resuming with another cpu than the run began with; last bits may differ"]
    assert journal(run_copy) == whole


def test_numerics_that_a_journal_does_not_name_are_no_others(run_copy: Path, experiment_with: With) -> None:
    """A journal of an earlier version, which named less software, is resumed without a word."""
    old, *rest = read(run_copy / "journal.jsonl")[0]
    del old["numerics"]["scipy"], old["numerics"]["optuna"]
    (run_copy / "journal.jsonl").write_bytes(b"".join(map(seal, [old, *rest])))
    whole = journal(run_copy)
    (run_copy / "journal.jsonl").write_bytes(whole[: cut_points(whole)[6]])
    notes = Notes()
    run(experiment_with(), run_copy, notes)

    assert not any("resuming with another" in t for t in notes.texts)
    assert journal(run_copy) == whole


# -- real kills -----------------------------------------------------------------------------------------------


def written(out: Path) -> int:
    path = out / "journal.jsonl"
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_at_random_moments(small_experiment: Path, tmp_path: Path, finished_run: Path) -> None:
    """A real driver with a real worker, killed again and again at random moments, writes the same journal."""
    rng = random.Random(7)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "evomerge", "run", str(small_experiment), "--out", str(out)]
    command += ["--set", "workers.backend=local"]
    deaths, size = 0, 0
    for _ in range(60):
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        ) as driver:
            if deaths < 8:
                # Kill soon after the first new event, so that every life gets somewhere and none gets far.
                while driver.poll() is None and (not out.is_dir() or written(out) <= size):
                    time.sleep(0.001)
                time.sleep(rng.uniform(0.0, 0.1))
                driver.send_signal(signal.SIGKILL)
            _, errors = driver.communicate(timeout=120)
        if driver.returncode == 0:
            break
        assert driver.returncode == -signal.SIGKILL, errors
        deaths, size = deaths + 1, written(out)

    assert driver.returncode == 0
    assert deaths >= 3
    assert journal(out) == journal(finished_run)
    assert json.loads(journal(out).splitlines()[-1])["kind"] == "stop"
    shutil.rmtree(out)


@pytest.mark.parametrize("algorithm", ["greedy-soup", "frank-wolfe", "ga", "gp"])
def test_other_algorithms_run_and_replay(algorithm: str, experiment_with: With, tmp_path: Path) -> None:
    """Algorithms that propose recipes, and ones that recall genomes: a cut journal is completed exactly."""
    overrides = {"search": {"algorithm": algorithm, "budget": {"evaluations": 10}, "finalists": 3}}
    if algorithm in ("ga", "gp"):
        overrides["search"]["population"] = 3
    history = run(experiment_with(**overrides), tmp_path / "whole")
    whole = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "experiment.yaml").write_bytes((tmp_path / "whole" / "experiment.yaml").read_bytes())
    (tmp_path / "cut" / "journal.jsonl").write_bytes(b"".join(lines[: len(lines) * 2 // 3]))

    run(experiment_with(**overrides), tmp_path / "cut")

    assert (tmp_path / "cut" / "journal.jsonl").read_bytes() == whole
    assert history.winner_id is not None
