"""Journals on other machines: an asked genome may differ in its last bits; the journalled one counts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evomerge
from evomerge.canonical import decode_array, encode_array
from evomerge.cli import main
from evomerge.errors import RunError
from evomerge.history import History
from evomerge.journal import TOLERANCE, read, seal
from evomerge.run import run
from evomerge.rundir import read_telemetry

With = Callable[..., Any]
SETTINGS = {"search_space.groups": "layers", "search.budget": {"evaluations": 200}, "search.population": 10}
KERNELS = ("Haswell", "SkylakeX", "Prescott", "Nehalem")


def journal(out: Path) -> bytes:
    return (out / "journal.jsonl").read_bytes()


def events(out: Path) -> list[dict[str, Any]]:
    return read(out / "journal.jsonl")[0]


def moved(out: Path, number: int, by: float) -> None:
    """Change a gene of a candidate of the last generation, as no other machine's arithmetic would; seals it anew."""
    changed = []
    for event in events(out):
        if event["kind"] == "asked" and event["id"] == number:
            genome = decode_array(event["genome"]).copy()
            genome[0] += by if genome[0] < 0.5 else -by
            event["genome"] = encode_array(genome)
        changed.append(seal(event))
    (out / "journal.jsonl").write_bytes(b"".join(changed))


@pytest.mark.parametrize("by", [1e-9, 0.5 * TOLERANCE])
def test_last_bits_are_told_as_journalled(by: float, run_copy: Path, experiment_with: With) -> None:
    """A difference within the tolerance completes; it is noted in the telemetry with its event and size."""
    moved(run_copy, 15, by)
    whole = journal(run_copy)
    history = run(experiment_with(), run_copy)
    notes = [t for t in read_telemetry(run_copy / "telemetry.jsonl") if t.get("note") == "drift"]
    [seq] = [e["seq"] for e in events(run_copy) if e["kind"] == "asked" and e["id"] == 15]

    assert history.stopped
    assert journal(run_copy) == whole
    assert [n["seq"] for n in notes] == [seq]
    assert notes[0]["size"] == pytest.approx(by, rel=1e-6)


def test_a_changed_genome_is_refused(run_copy: Path, experiment_with: With, capsys: pytest.CaptureFixture[str]) -> None:
    """A thousandth is no rounding: refused with the size and the way on, then accepted where the user says so."""
    moved(run_copy, 15, 1e-3)
    whole = journal(run_copy)

    with pytest.raises(RunError, match=r"differs from the journalled one by 1\.00e-03 .*pass --accept-drift"):
        run(experiment_with(), run_copy)
    assert main(["resume", str(run_copy)]) == 1
    assert journal(run_copy) == whole
    assert main(["resume", str(run_copy), "--accept-drift"]) == 0
    assert History.read(run_copy).stopped
    assert journal(run_copy) == whole
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_kernel(small_experiment: Path, tmp_path: Path) -> None:
    """A journal half written under one OpenBLAS kernel is completed under another; what stands is kept.

    On a processor on which the kernels agree to the bit the journals must be equal instead.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(evomerge.__file__).parents[1])}

    def go(kernel: str, out: Path) -> str:
        sets = [a for k, v in SETTINGS.items() for a in ("--set", f"{k}={json.dumps(v)}")]
        done = subprocess.run(
            [sys.executable, "-m", "evomerge", "run", str(small_experiment), "--out", str(out), *sets],
            env={**environment, "OPENBLAS_CORETYPE": kernel},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    for kernel in KERNELS:
        go(kernel, tmp_path / kernel)
    whole = {k: journal(tmp_path / k) for k in KERNELS}
    print(f"\n{len(set(whole.values()))} different journals of {len(KERNELS)} kernels")
    drifted = 0
    for kernel in KERNELS[1:]:
        out = tmp_path / f"resumed-{kernel}"
        shutil.copytree(tmp_path / KERNELS[0], out)
        half = whole[KERNELS[0]][: len(whole[KERNELS[0]]) // 2]
        half = half[: half.rindex(b"\n") + 1]
        (out / "journal.jsonl").write_bytes(half)
        go(kernel, out)
        notes = [t for t in read_telemetry(out / "telemetry.jsonl") if t.get("note") == "drift"]
        largest = max((t["size"] for t in notes), default=0.0)
        print(f"{KERNELS[0]} -> {kernel}: {len(notes)} genomes drifted, by {largest:.2e} at most")

        assert journal(out).startswith(half)
        assert History.read(out).stopped
        assert largest <= TOLERANCE
        if whole[kernel] == whole[KERNELS[0]]:
            assert journal(out) == whole[kernel]
            assert notes == []
        else:
            drifted += bool(notes)
            asked = [[e for e in events(o) if e["kind"] == "asked"] for o in (out, tmp_path / kernel)]
            assert len(asked[0]) == len(asked[1])
            first = [decode_array(e["genome"]) for e in asked[0] if "genome" in e]
            assert all(np.all((g >= 0) & (g <= 1)) for g in first)
    assert (drifted > 0) == (len(set(whole.values())) > 1)
