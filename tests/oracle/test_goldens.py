"""The committed goldens are what the independent implementations say today."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
PYTHON = Path(os.environ.get("EVOMERGE_ORACLE_PYTHON", str(ROOT / ".venv-oracle" / "bin" / "python")))

pytestmark = pytest.mark.oracle


def _run(script: str, out: Path) -> None:
    subprocess.run(
        [PYTHON, ROOT / "tests" / "oracle" / script, "--out", out], cwd=ROOT, check=True, capture_output=True
    )


def test_merge_goldens_come_out_again(tmp_path: Path) -> None:
    """mergekit and PEFT still give the committed tensors, bit for bit."""
    out = tmp_path / "merge_methods.npz"

    _run("make_goldens.py", out)

    with np.load(out) as new, np.load(GOLDENS / "merge_methods.npz") as old:
        assert set(new) == set(old)
        for name in set(old) - {"meta"}:
            np.testing.assert_array_equal(new[name], old[name], err_msg=name)


def test_scoring_goldens_come_out_again(tmp_path: Path) -> None:
    """Plain transformers and lm-eval still give the committed log-probabilities, to 1e-4 on a sum."""
    out = tmp_path / "scoring.json"

    _run("make_scoring_goldens.py", out)

    new, old = json.loads(out.read_text())["models"], json.loads((GOLDENS / "scoring.json").read_text())["models"]
    assert len(list(_numbers(old))) > 1000
    np.testing.assert_allclose(list(_numbers(new)), list(_numbers(old)), atol=1e-4)


def test_task_goldens_come_out_again(tmp_path: Path) -> None:
    """lm-eval still gives the committed prompts, choices and answers, and its log-likelihoods to 1e-4 of a sum."""
    out = tmp_path / "tasks.json"

    _run("make_task_goldens.py", out)

    new, old = (json.loads(p.read_text(encoding="utf-8")) for p in (out, GOLDENS / "tasks.json"))
    assert new["prompts"] == old["prompts"]
    for part in ("rolling", "blimp"):
        there = list(_numbers(old["numbers"][part]))
        assert len(there) >= 8
        np.testing.assert_allclose(list(_numbers(new["numbers"][part])), there, atol=1e-4, rtol=1e-6)


def test_archive_goldens_come_out_again(tmp_path: Path) -> None:
    """pyribs' archives still hold the committed candidates; the centres of its k-means to 1e-6."""
    out = tmp_path / "archives.json"

    _run("make_archive_goldens.py", out)

    new, old = (json.loads(p.read_text(encoding="utf-8")) for p in (out, GOLDENS / "archives.json"))
    np.testing.assert_allclose(new["cvt"].pop("centroids"), old["cvt"].pop("centroids"), atol=1e-6)
    for name in ("grid-2", "grid-100", "grid-3", "cvt"):
        assert new[name] == old[name]


def _numbers(data: Any) -> Any:
    if isinstance(data, dict):
        for key in sorted(data):
            yield from _numbers(data[key])
    elif isinstance(data, list):
        for entry in data:
            yield from _numbers(entry)
    elif isinstance(data, int | float):
        yield float(data)
