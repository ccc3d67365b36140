"""The merge methods against mergekit 0.1.5 and PEFT 0.21.2 (tests/goldens/README.md).

Of DARE everything but the drawing of masks is compared: the oracle was given the masks that the goldens hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.merge import pipeline
from evomerge.merge.builder import Builder

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "merge_methods.npz")
CASES: dict[str, dict[str, Any]] = {c["name"]: c for c in map(json.loads, GOLDENS["cases"].tolist())}
RELATIVE = 2e-6
"""Of a tensor's largest weight: a few units in the last place of fp32."""


def rule(case: dict[str, Any]) -> dict[str, Any] | None:
    """The case as a rule of ours, None where no method of ours says the same."""
    method, params = case["method"], dict(case["params"])
    if method == "magnitude_prune":
        return None
    weights = {s: c["weight"] for s, c in case["sources"].items()}
    if method == "linear":
        del params["lambda"]
    elif method == "task_arithmetic" and params.pop("normalize"):
        params["lambda"] /= sum(weights.values())  # the mean is a scaled sum
    elif method == "slerp":
        params = {"vectors": params["vectors"]}
    elif method == "dare_linear":
        del params["normalize"]
    sources: dict[str, dict[str, float]] = {s: {"weight": w} for s, w in weights.items()}
    if method in ("ties", "dare_linear", "dare_ties"):
        # Nothing kept of a source is the same as no source; our densities begin above 0.
        kept = {s: c["density"] for s, c in case["sources"].items() if c["density"] > 0}
        sources = {s: {"weight": weights[s], "density": d} for s, d in kept.items()}
    return {"method": method, "params": params, "sources": sources}


EXPRESSIBLE = [name for name, case in CASES.items() if rule(case) is not None]


def inputs(case: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    dtype = torch.bfloat16 if case["inputs"] == "in_bf16" else torch.float32
    return {
        s: {t: torch.from_numpy(GOLDENS[f"{case['inputs']}/{s}/{t}"]).to(dtype) for t in case["tensors"]}
        for s in ("base", "e0", "e1", "e2")
    }


def test_all_goldens_but_magnitude_pruning_are_used() -> None:
    """Only the rows of a method that we do not have are left out."""
    left_out = set(CASES) - set(EXPRESSIBLE)

    assert left_out == {"peft_prune_density_0.5", "peft_prune_density_0.2"}
    assert len(EXPRESSIBLE) >= 45
    assert {CASES[n]["inputs"] for n in EXPRESSIBLE} == {"in", "in_bf16"}


def use_masks_of(name: str, bank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pipeline draw the masks that the oracle was given, in place of its own."""
    source_of = {digest: s for s, digest in bank.manifest.hashes.items()}
    drawn: dict[int, torch.Tensor] = {}

    def multiplier(seed: int, digest: str, tensor: str) -> int:
        mask = torch.from_numpy(GOLDENS[f"{name}/mask/{source_of[digest]}/{tensor}"])
        drawn[len(drawn)] = mask.flatten()
        return len(drawn) - 1

    def scatter(out: torch.Tensor, spare: torch.Tensor, seed: int, tensor: str, start: int) -> torch.Tensor:
        return torch.arange(start, start + len(out), dtype=torch.int32, out=out)

    def keep(out: torch.Tensor, spare: torch.Tensor, scattered: torch.Tensor, key: int, density: float) -> torch.Tensor:
        return out.copy_(drawn[key][scattered.long()])

    for replacement in (multiplier, scatter, keep):
        monkeypatch.setattr(pipeline, replacement.__name__, replacement)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_merges_as_the_oracle_does(
    name: str, bank_of: Callable[..., Any], recipe_over: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A canonical recipe, built in place, gives the oracle's weights to a few units in the last place."""
    case = CASES[name]
    bank = bank_of(inputs(case))
    if case["method"].startswith("dare"):
        use_masks_of(name, bank, monkeypatch)
    builder = Builder(bank, case["out_dtype"])
    builder.build(recipe_over(bank.manifest, rule(case), dtype=case["out_dtype"]))

    ulp = RELATIVE if case["out_dtype"] == "float32" else 2**-8
    exact = total = 0
    for tensor, ours in builder.views().items():
        theirs = torch.from_numpy(GOLDENS[f"{name}/{tensor}"])
        gap = float((ours.float() - theirs).abs().max())
        assert gap <= ulp * float(theirs.abs().max()), f"{tensor}: {gap:.3g}"
        exact += int((ours.float() == theirs).sum())
        total += theirs.numel()
    if case["out_dtype"] == "bfloat16":
        assert exact >= 0.999 * total, "rounded once, so only a half-way case may fall the other way"
