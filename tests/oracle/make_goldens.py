"""Write tests/goldens/merge_methods.npz: merges by mergekit and PEFT for the project's operators to match.

Run it in the oracle environment (see requirements.txt beside this file), from the repository root:

    .venv-oracle/bin/python tests/oracle/make_goldens.py

The same versions write the same bytes. tests/goldens/README.md describes the layout.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from mergekit.merge_methods import merge_tensors
from numpy.typing import NDArray
from peft.utils import merge_utils

SEED = 20240917
COMMAND = ".venv-oracle/bin/python tests/oracle/make_goldens.py"
VERSIONS = ("mergekit", "peft", "torch", "numpy", "transformers")
EXPERTS = ("e0", "e1", "e2")
TOLERANCE = 1e-8  # between mergekit and PEFT, where both define the same merge
SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (40, 24),
    "line": (64,),
    "odd": (7,),
    "single": (1,),
    "square": (10, 10),  # int(0.29 * 100) is 28: the product falls below the whole number
    "frozen": (24, 8),  # e1 equals base
    "cancel": (16,),  # e1 - base is exactly base - e0, and e2 equals base: signed sums of zero
}

Array = NDArray[np.float32]
Inputs = dict[str, dict[str, torch.Tensor]]  # source -> tensor name -> tensor


@dataclass(frozen=True)
class Case:
    """One merge: its description goes into the npz as JSON, its outputs as `<name>/<tensor>`."""

    name: str
    method: str
    weights: Sequence[float]
    densities: Sequence[float] = (1.0, 1.0, 1.0)
    lam: float = 1.0
    normalize: bool = False
    oracle: str = "mergekit"
    inputs: str = "in"  # or "in_bf16"
    out_dtype: str = "float32"
    tensors: Sequence[str] = field(default=tuple(SHAPES))
    options: Mapping[str, Any] = field(default_factory=dict)  # further params: vectors of slerp, rescale of DARE
    base_weight: float = 0.0  # of the base, where slerp has it as a source

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "method": self.method,
            "params": {"lambda": self.lam, "normalize": self.normalize, **self.options},
            "sources": {
                **({"base": {"weight": self.base_weight, "density": 1.0}} if self.base_weight else {}),
                **{
                    expert: {"weight": weight, "density": density}
                    for expert, weight, density in zip(EXPERTS, self.weights, self.densities, strict=True)
                },
            },
            "oracle": self.oracle,
            "inputs": self.inputs,
            "out_dtype": self.out_dtype,
            "tensors": list(self.tensors),
        }


ONES = (1.0, 1.0, 1.0)
PLAIN = (0.2, 0.5, 0.9)
SIGNED = (0.7, -0.4, 1.1)
# PEFT keeps int(density * n) entries and may keep none; mergekit keeps at least one. So no "single" here.
PEFT_TENSORS = ("matrix", "line", "odd", "square", "frozen", "cancel")


def same(density: float) -> tuple[float, float, float]:
    return (density, density, density)


def cases() -> list[Case]:
    """Every merge that is written, grouped by method."""
    linear = [
        Case("linear_normalized", "linear", PLAIN, normalize=True),
        Case("linear_sum", "linear", PLAIN),
        Case("linear_negative_normalized", "linear", (0.8, -0.3, 0.6), normalize=True),
        Case("linear_negative_sum", "linear", (0.8, -0.3, 0.6)),
        Case("linear_bf16", "linear", PLAIN, normalize=True, inputs="in_bf16"),
    ]
    arithmetic = [
        Case("ta_plain", "task_arithmetic", PLAIN),
        Case("ta_lambda", "task_arithmetic", PLAIN, lam=0.7),
        Case("ta_signed_lambda", "task_arithmetic", SIGNED, lam=0.7),
        Case("ta_zero_weight", "task_arithmetic", (0.6, 0.0, -0.25)),
        Case("ta_all_zero", "task_arithmetic", (0.0, 0.0, 0.0)),
        Case("ta_normalized", "task_arithmetic", PLAIN, normalize=True),
        Case("ta_bf16", "task_arithmetic", PLAIN, inputs="in_bf16"),
        Case("ta_bf16_signed_lambda", "task_arithmetic", SIGNED, lam=0.7, inputs="in_bf16"),
        Case("ta_bf16_rounded", "task_arithmetic", PLAIN, lam=0.7, inputs="in_bf16", out_dtype="bfloat16"),
    ]
    ties = [
        Case("ties_density_1", "ties", PLAIN, same(1.0), normalize=True),
        Case("ties_density_0.5", "ties", PLAIN, same(0.5), normalize=True),
        Case("ties_density_0.2", "ties", PLAIN, same(0.2), normalize=True),
        Case("ties_density_0.013", "ties", PLAIN, same(0.013), normalize=True),
        Case("ties_density_0.29", "ties", PLAIN, same(0.29), normalize=True),
        Case("ties_mixed", "ties", PLAIN, (0.9, 0.4, 0.1), normalize=True),
        Case("ties_mixed_lambda", "ties", (1.3, 0.4, 0.8), (0.25, 0.6, 1.0), lam=0.7, normalize=True),
        Case("ties_sum", "ties", PLAIN, same(0.5)),
        Case("ties_sum_mixed_lambda", "ties", PLAIN, (0.9, 0.4, 0.1), lam=0.7),
        Case("ties_negative", "ties", SIGNED, (0.6, 0.5, 0.3), normalize=True),
        Case("ties_negative_sum", "ties", SIGNED, (0.6, 0.5, 0.3)),
        Case("ties_ones", "ties", ONES, same(0.3), normalize=True),
        Case("ties_zero_weight", "ties", (0.6, 0.0, 0.9), same(0.5), normalize=True),
        Case("ties_zero_density", "ties", PLAIN, (0.5, 0.0, 0.5), normalize=True),
        # e0 and e1 agreeing alone give a divisor of exactly zero, which counts as one
        Case("ties_zero_divisor", "ties", (0.5, -0.5, 0.25), same(1.0), normalize=True),
    ]
    peft: dict[str, Any] = {"oracle": "peft", "tensors": PEFT_TENSORS}
    others = [
        Case("peft_ta", "task_arithmetic", SIGNED, **peft),
        Case("peft_ties_density_1", "ties", ONES, same(1.0), normalize=True, **peft),
        Case("peft_ties_density_0.5", "ties", ONES, same(0.5), normalize=True, **peft),
        Case("peft_ties_density_0.2", "ties", ONES, same(0.2), normalize=True, **peft),
        Case("peft_prune_density_0.5", "magnitude_prune", ONES, same(0.5), **peft),
        Case("peft_prune_density_0.2", "magnitude_prune", SIGNED, same(0.2), **peft),
    ]
    weights: dict[str, Any] = {"options": {"vectors": "weights"}}
    deltas: dict[str, Any] = {"options": {"vectors": "deltas"}}
    slerp = [
        Case("slerp_base", "slerp", (0.3, 0.0, 0.0), base_weight=0.7, **weights),
        Case("slerp_base_low", "slerp", (0.0, 0.05, 0.0), base_weight=0.95, **weights),
        Case("slerp_experts", "slerp", (0.2, 0.0, 0.9), **weights),
        Case("slerp_bf16", "slerp", (0.6, 0.6, 0.0), inputs="in_bf16", out_dtype="bfloat16", **weights),
        Case("slerp_deltas", "slerp", (0.4, 0.8, 0.0), **deltas),
        Case("slerp_deltas_half", "slerp", (0.0, 1.0, 1.0), **deltas),
        Case("slerp_deltas_bf16", "slerp", (1.2, 0.0, 0.4), inputs="in_bf16", **deltas),
    ]
    l1: dict[str, Any] = {"options": {"rescale": "l1"}}
    inverse: dict[str, Any] = {"options": {"rescale": "inverse_probability"}, **peft}
    dare = [
        Case("dare_linear", "dare_linear", PLAIN, same(0.5), **l1),
        Case("dare_linear_signed_lambda", "dare_linear", SIGNED, (0.9, 0.3, 0.1), lam=0.7, **l1),
        Case("dare_linear_bf16", "dare_linear", PLAIN, (0.2, 1.0, 0.6), inputs="in_bf16", **l1),
        Case("dare_ties", "dare_ties", PLAIN, same(0.5), **l1),
        Case("dare_ties_signed_lambda", "dare_ties", SIGNED, (0.9, 0.3, 0.1), lam=0.7, **l1),
        Case("dare_ties_normalized", "dare_ties", PLAIN, (0.4, 0.6, 1.0), normalize=True, **l1),
        Case("peft_dare_linear", "dare_linear", SIGNED, same(0.3), **inverse),
        Case("peft_dare_ties", "dare_ties", ONES, same(0.6), normalize=True, **inverse),
    ]
    return [*linear, *arithmetic, *ties, *others, *slerp, *dare]


def make_inputs() -> Inputs:
    """Draw a base and three experts with heavy-tailed deltas (Student t, 2.5 degrees of freedom)."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    inputs: Inputs = {source: {} for source in ("base", *EXPERTS)}
    for name, shape in SHAPES.items():
        base = rng.normal(0.0, 0.05, shape).astype(np.float32)
        deltas = rng.standard_t(2.5, (len(EXPERTS), *shape)) * 2e-3
        if name == "frozen":
            deltas[1] = 0.0
        if name == "cancel":  # multiples of 2**-12 below 0.5: sums and differences are exact in float32
            base = (np.round(base * 4096) / 4096).astype(np.float32)
            steps = rng.permutation(np.arange(1, base.size + 1)) * rng.choice((-1, 1), base.size)
            deltas = np.stack([steps, -steps, np.zeros_like(steps)]) / 4096
        inputs["base"][name] = torch.from_numpy(base)
        for expert, delta in zip(EXPERTS, deltas, strict=True):
            inputs[expert][name] = torch.from_numpy((base + delta).astype(np.float32))
    return inputs


def to_bfloat16(inputs: Inputs) -> Inputs:
    return {s: {n: t.to(torch.bfloat16) for n, t in tensors.items()} for s, tensors in inputs.items()}


def draw_masks(case: Case) -> dict[str, dict[str, torch.Tensor]]:
    """Masks of a DARE case, tensor name -> expert -> bool: drawn here, for the oracle and the project alike."""
    if not case.method.startswith("dare"):
        return {}
    rng = np.random.Generator(np.random.PCG64([SEED, sum(case.name.encode())]))
    return {
        name: {e: torch.from_numpy(rng.random(SHAPES[name]) < d) for e, d in zip(EXPERTS, case.densities, strict=True)}
        for name in case.tensors
    }


@contextmanager
def bernoulli_draws(masks: Sequence[torch.Tensor]) -> Iterator[None]:
    """torch.bernoulli returns these masks, one a call; all of them must be asked for."""
    left = list(masks)
    with mock.patch.object(torch, "bernoulli", lambda probabilities: left.pop(0).to(probabilities.dtype)):
        yield
    assert not left


def by_mergekit_slerp(case: Case, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> torch.Tensor:
    """slerp with t between two models of which the first is mergekit's base; nuslerp with a base for deltas."""
    options: dict[str, Any] = {"dtype": torch.float32, "out_dtype": getattr(torch, case.out_dtype), "base_index": 0}
    rows = [(w, v) for w, v in zip((case.base_weight, *case.weights), (base, *experts), strict=True) if w]
    weights, vectors = [w for w, _ in rows], [v for _, v in rows]
    if case.options["vectors"] == "deltas":
        return merge_tensors([base, *vectors], "nuslerp", parameters={"weight": weights}, **options)
    return merge_tensors(vectors, "slerp", parameters={"t": weights[1] / sum(weights)}, **options)


def by_mergekit(case: Case, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor, merged by mergekit in float32 from the inputs as stored."""
    options: dict[str, Any] = {"dtype": torch.float32, "out_dtype": getattr(torch, case.out_dtype)}
    parameters: dict[str, Any] = {"weight": list(case.weights), "normalize": case.normalize}
    if case.method == "linear":
        return merge_tensors(list(experts), "linear", parameters=parameters, **options)
    parameters["lambda"] = case.lam
    if case.method != "task_arithmetic":
        parameters["density"] = list(case.densities)
    return merge_tensors([base, *experts], case.method, parameters=parameters, base_index=0, **options)


def by_peft(case: Case, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor: PEFT merges deltas, to which the base is added."""
    deltas = [expert - base for expert in experts]
    weights = torch.tensor(case.weights)
    if case.method == "task_arithmetic":
        return base + merge_utils.task_arithmetic(deltas, weights)
    merge = {
        "ties": merge_utils.ties,
        "magnitude_prune": merge_utils.magnitude_prune,
        "dare_linear": merge_utils.dare_linear,
        "dare_ties": merge_utils.dare_ties,
    }[case.method]
    return base + merge(deltas, weights, case.densities[0])


def refuse_ties_in_magnitude(case: Case, inputs: Inputs) -> None:
    """Which of two equal magnitudes is kept at the cut is nobody's promise, so no case may depend on it."""
    if case.method not in ("ties", "magnitude_prune"):
        return
    for name in case.tensors:
        for expert, density in zip(EXPERTS, case.densities, strict=True):
            size = np.sort((inputs[expert][name] - inputs["base"][name]).abs().numpy().ravel())[::-1]
            kept = max(1, int(density * size.size))
            if 0 < density < 1 and kept < size.size and size[kept - 1] == size[kept] != 0:
                raise SystemExit(f"{case.name}/{name}: {expert} has a tie in magnitude at the cut")


def oracles_agree(merged: Mapping[str, Array]) -> float:
    """Largest difference between PEFT and mergekit where both define the same thing."""
    inputs, worst = make_inputs(), 0.0
    for case in cases():
        if case.oracle != "peft" or case.method not in ("task_arithmetic", "ties"):
            continue
        for name in case.tensors:
            other = by_mergekit(case, inputs["base"][name], [inputs[e][name] for e in EXPERTS]).numpy()
            worst = max(worst, float(np.abs(other - merged[f"{case.name}/{name}"]).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "goldens" / "merge_methods.npz"
    parser.add_argument("--out", type=Path, default=default, help="where to write (default: %(default)s)")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)

    inputs = {"in": make_inputs()}
    inputs["in_bf16"] = to_bfloat16(inputs["in"])
    arrays: dict[str, Any] = {
        f"{kind}/{source}/{name}": tensor.float().numpy()
        for kind, sources in inputs.items()
        for source, tensors in sources.items()
        for name, tensor in tensors.items()
    }
    merged: dict[str, Array] = {}
    for case in cases():
        given = inputs[case.inputs]
        refuse_ties_in_magnitude(case, given)
        merge = {"mergekit": by_mergekit, "peft": by_peft}[case.oracle]
        if case.method == "slerp":
            merge = by_mergekit_slerp
        masks = draw_masks(case)
        for name in case.tensors:
            # Neither draws a mask of density 1.
            drawn = [m for (e, m), d in zip(masks.get(name, {}).items(), case.densities, strict=False) if d < 1]
            with bernoulli_draws(drawn):
                result = merge(case, given["base"][name], [given[expert][name] for expert in EXPERTS])
            arrays |= {f"{case.name}/mask/{e}/{name}": m.numpy() for e, m in masks.get(name, {}).items()}
            merged[f"{case.name}/{name}"] = result.float().numpy()
    for key, array in merged.items():
        if not np.isfinite(array).all():
            raise SystemExit(f"{key} is not finite")
    gap = oracles_agree(merged)
    if gap > TOLERANCE:
        raise SystemExit(f"PEFT and mergekit differ by {gap:.3g}")

    versions = {name: version(name) for name in VERSIONS} | {"python": platform.python_version()}
    meta = {"versions": versions, "command": COMMAND, "seed": SEED, "generator": "numpy PCG64"}
    arrays |= merged
    arrays["cases"] = np.array([json.dumps(case.describe()) for case in cases()])
    arrays["meta"] = np.array(json.dumps(meta))
    np.savez_compressed(out, **arrays)

    for case in cases():
        print(f"{case.name}: {case.oracle} {case.method}, {len(case.tensors)} tensors")
    print(f"PEFT and mergekit differ by at most {gap:.3g}")
    print(f"{out.name}: {len(cases())} cases, {len(arrays)} arrays, {out.stat().st_size} bytes")
    print(json.dumps(meta))


if __name__ == "__main__":
    main()
