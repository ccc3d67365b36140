"""mergekit itself executes our configurations to our weights.

EVOMERGE_ORACLE_PYTHON names the Python of the oracle environment (default .venv-oracle/bin/python).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from evomerge.export.hf import MERGEKIT, write_hf
from evomerge.pool import ModelPool
from evomerge.recipe import Recipe

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("EVOMERGE_ORACLE_PYTHON", ROOT / ".venv-oracle" / "bin" / "python"))
EXPERTS = ("add", "attr", "count")


def per_layer_and_module(layers: int) -> list[dict[str, Any]]:
    """Task arithmetic with other weights in every layer and module; some blocks stay the base's."""
    rules = []
    for i in range(layers):
        for m, module in enumerate(("attention", "mlp", "norm")):
            if (i + m) % 5 == 4:
                continue
            sources = {e: {"weight": round(0.1 * (i + 1) - 0.3 * m + 0.05 * n, 6)} for n, e in enumerate(EXPERTS)}
            rules.append({"match": {"block": f"layers.{i}.{module}"}, "method": "task_arithmetic", "sources": sources})
    embed = {"match": {"module": ["embed", "final_norm"]}, "method": "task_arithmetic", "params": {"lambda": 0.7}}
    return [*rules, {**embed, "sources": {"add": {"weight": 0.9}, "count": {"weight": -0.2}}}]


TIES: dict[str, Any] = {
    "method": "ties",
    "params": {"lambda": 0.8},
    "sources": {
        "add": {"weight": 1.1, "density": 0.3},
        "attr": {"weight": 0.6, "density": 0.75},
        "count": {"weight": 0.9, "density": 1.0},
    },
}
CASES: dict[str, list[dict[str, Any]]] = {
    "task arithmetic per layer and module": per_layer_and_module(5),
    "uniform linear": [{"method": "linear", "sources": {e: {} for e in EXPERTS}}],
    "linear sum on some blocks": [
        {
            "match": {"module": ["attention", "mlp"]},
            "method": "linear",
            "params": {"normalize": False},
            "sources": {"add": {"weight": 0.7}, "attr": {"weight": 0.4}, "base": {"weight": -0.1}},
        }
    ],
    "ties": [TIES],
    "ties without normalisation, per layer": [
        {"match": {"layers": [i, i]}, **TIES, "params": {"lambda": 0.5 + 0.1 * i, "normalize": False}} for i in range(5)
    ],
    "the base": [],
    "slerp between the base and an expert, per layer": [
        {
            "match": {"layers": [i, i]},
            "method": "slerp",
            "sources": {"base": {"weight": 3 - i}, "add": {"weight": i + 1}},
        }
        for i in range(4)
    ],
    "slerp between two experts": [
        {
            "match": {"module": "mlp"},
            "method": "slerp",
            "sources": {"count": {"weight": 0.9}, "add": {"weight": 0.3}},
        },
        {"match": {"module": "norm"}, "method": "slerp", "sources": {"count": {}}},
        {"method": "slerp", "sources": {"count": {"weight": 0.2}, "add": {"weight": 0.3}}},
    ],
    "slerp of one expert": [{"method": "slerp", "sources": {"count": {"weight": 0.2}}}],
    "slerp of deltas, per layer": [
        *(
            {
                "match": {"layers": [i, i]},
                "method": "slerp",
                "params": {"vectors": "deltas"},
                "sources": {"attr": {"weight": i}, "add": {"weight": 1.5}},
            }
            for i in range(4)
        ),
        {"method": "slerp", "params": {"vectors": "deltas"}, "sources": {"attr": {"weight": 0.7}, "add": {}}},
    ],
    "DARE-TIES of density 1": [{**TIES, "method": "dare_ties", "sources": {"add": {"weight": 0.7}, "count": {}}}],
    "DARE of density 1": [
        {"method": "dare_linear", "params": {"lambda": 0.9}, "sources": {"add": {"weight": 0.7}, "count": {}}}
    ],
    "layers swapped": [
        {"match": {"layers": [0, 0]}, "method": "linear", "sources": {"add": {}}},
        {"match": {"layers": [1, 1]}, "method": "linear", "sources": {"add": {}, "count": {}}},
        {"match": {"layers": [2, 4]}, "method": "linear", "sources": {"count": {}}},
        {"match": {"module": "embed"}, "method": "linear", "sources": {"add": {}}},
    ],
}


def run_mergekit(folder: Path, out: Path, tolerance: float) -> subprocess.CompletedProcess[str]:
    if not PYTHON.exists():
        pytest.fail(f"no oracle environment at {PYTHON}; make it (tests/goldens/README.md) or set the variable")
    command = [PYTHON, ROOT / "tests/oracle/run_mergekit.py", folder / MERGEKIT, out, "--compare", folder]
    return subprocess.run(
        [*map(str, command), "--tolerance", str(tolerance)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", CASES)
def test_mergekit_builds_our_weights(name: str, quickstart: Path, tmp_path: Path) -> None:
    """The configuration of an export, run by mergekit, gives the export's tensors within fp32 rounding."""
    models = quickstart / "models"
    pool = ModelPool.open(models / "skills-base", {e: models / f"skills-{e}" for e in EXPERTS})
    manifest = pool.manifest()
    recipe = Recipe.model_validate({"merge": CASES[name]}).canonical(manifest)
    folder = write_hf(tmp_path / "ours", recipe, pool, manifest)
    result = run_mergekit(folder, tmp_path / "theirs", 1e-6)

    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert len([line for line in result.stdout.splitlines() if "e-" in line or "e+" in line]) >= len(manifest.tensors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tiny_models_of_every_kind(tied: bool, dtype: str, tiny_model: Any, tmp_path: Path) -> None:
    """Untied heads, tied embeddings and bfloat16 results: mergekit writes the same names, dtypes and values."""
    folders = [tiny_model("qwen2", seed, tied=tied, dtype=dtype) for seed in (0, 1, 2)]
    pool = ModelPool.open(folders[0], {"x": folders[1], "y": folders[2]})
    manifest = pool.manifest()
    merge = [
        {
            "match": {"layers": [1, 1]},
            "method": "task_arithmetic",
            "sources": {"x": {"weight": 0.35}, "y": {"weight": 0.8}},
        },
        {"method": "task_arithmetic", "sources": {"x": {"weight": 0.5}}},
    ]
    recipe = Recipe.model_validate({"dtype": dtype, "merge": merge}).canonical(manifest)
    folder = write_hf(tmp_path / "ours", recipe, pool, manifest)
    # One unit in the last place of bfloat16 at 1, where a sum in another order falls on the other side.
    result = run_mergekit(folder, tmp_path / "theirs", 1e-6 if dtype == "float32" else 2**-8)

    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert ("lm_head.weight" in result.stdout) != tied


ROUTES: dict[str, dict[str, Any]] = {
    "skips, repeats and three sources of two depths, with scales": {
        "final_norm": "deep",
        "head": "deep",
        "hops": [
            {"from": "base", "layer": 0},
            {"from": "base", "layer": 1},
            {"from": "deep", "layer": 1, "scale": 1.3},
            {"from": "deep", "layer": 2},
            {"from": "x", "layer": 1, "mlp_gain": 0.8},
            {"from": "x", "layer": 1, "attn_gain": -0.7},
            {"from": "deep", "layer": 2, "scale": 0.6},
        ],
    },
    "ends of other models than the first and the last layer": {
        "embed": "x",
        "hops": [{"from": "deep", "layer": i} for i in (0, 1, 2, 1, 2)],
    },
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ROUTES)
def test_mergekit_stacks_our_routes(name: str, dtype: str, tiny_model: Any, tmp_path: Path) -> None:
    """A route's slices, run by mergekit, give the weights of its export to the last bit."""
    experts = {"x": tiny_model("llama", 1), "deep": tiny_model("llama", 2, num_hidden_layers=3)}
    pool = ModelPool.open(tiny_model("llama"), experts)
    manifest = pool.manifest()
    recipe = Recipe.model_validate({"dtype": dtype, "route": ROUTES[name]}).canonical(manifest)
    folder = write_hf(tmp_path / "ours", recipe, pool, manifest)
    result = run_mergekit(folder, tmp_path / "theirs", 0.0)

    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    hops = ROUTES[name]["hops"]
    assert f"model.layers.{len(hops) - 1}.mlp.up_proj.weight" in result.stdout
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_hidden_layers"] == len(hops)
