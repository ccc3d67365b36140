"""The wheel: what users install, outside the checkout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def done(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the files that belong to the project, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source") / "evomerge"
    files = done("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=source)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and this environment's packages behind it; returns its bin folder."""
    home = tmp_path_factory.mktemp("venv") / "venv"
    done(sys.executable, "-m", "venv", home, cwd=home.parent)
    python = home / "bin" / "python"
    done(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=home.parent)
    ours = Path(done(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).stdout.strip())
    # Behind the wheel on the path. Their .pth files are not read, so an editable install of ours stays out.
    (ours / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


@pytest.fixture
def away(tmp_path: Path, installed: Path) -> Path:
    """A working folder that is not the checkout, from which the checkout is not importable."""
    where = done(installed / "python", "-c", "import evomerge; print(evomerge.__file__)", cwd=tmp_path).stdout
    assert where.startswith(str(installed.parent)), where
    return tmp_path


def test_wheel_holds_package_and_libraries(wheel: Path) -> None:
    """Code, type marker or not, the libraries, the quickstart's models and data, the licence."""
    names = set(zipfile.ZipFile(wheel).namelist())

    for kind in ("search_spaces", "fitness", "fitness/presets", "experiments"):
        mine = {p.relative_to(ROOT).as_posix() for p in (ROOT / kind).glob("*.yaml")}
        assert {f"evomerge/_library/{n}" for n in mine} <= names
    assert "evomerge/_library/experiments/quickstart/models/skills-base/model.safetensors" in names
    assert "evomerge/_library/experiments/quickstart/data/skill_add.jsonl" in names
    assert {"evomerge/merge/pipeline.py", "evomerge/tasks/test_sets.txt"} <= names
    assert any(n.endswith("LICENSE") for n in names)
    assert not any(n.startswith("tests/") or "__pycache__" in n for n in names)


def test_installed_wheel_lists_and_checks(installed: Path, away: Path) -> None:
    """The library is found inside the installed package, and the quickstart fits together."""
    rows: list[dict[str, Any]] = json.loads(
        done(installed / "evomerge", "list", "experiments", "--json", cwd=away).stdout
    )
    quickstart = next(r for r in rows if r["name"] == "quickstart")

    assert quickstart["path"].startswith(str(installed.parent))
    assert "/evomerge/_library/experiments/" in quickstart["path"]
    assert "fits together" in done(installed / "evomerge", "check", "quickstart", cwd=away).stdout


def test_installed_wheel_runs_the_quickstart(installed: Path, away: Path) -> None:
    """A short search on the real models, with real workers, from a folder outside the checkout."""
    short = ("--set", "search.budget.evaluations=12", "--set", "search.finalists=2")
    result = done(installed / "evomerge", "run", "quickstart", *short, "--json", cwd=away)
    table = json.loads(result.stdout)["table"]

    assert {r["model"] for r in table} == {"base", "add", "attr", "count", "uniform", "winner"}
    resolved = (away / "runs" / "quickstart" / "experiment.yaml").read_text()
    assert str(installed.parent) in resolved
    assert str(ROOT) not in resolved
    done(installed / "evomerge", "export", "runs/quickstart", "--to", "merged", cwd=away)
    assert "everything agrees" in done(installed / "evomerge", "verify", "merged", cwd=away).stdout
