"""The delta pipeline: executes any row of `methods.py` over one block, in fp32, with one rounding at the end.

    delta -> sparsify -> weight -> consensus -> combine -> scale -> add base -> cast once

The block is walked in chunks that stay in the cache, so a build reads each source once and writes once.
A chunk never crosses a tensor, because trimming is per tensor. Sources go in name order: what is built does
not depend on the order in which a recipe names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evomerge.merge.bank import BlockView
from evomerge.merge.methods import METHODS, Method
from evomerge.recipe import Rule

CHUNK_CPU = 1 << 16
"""Elements: 256 KiB of fp32 per temporary, so that the few temporaries of a chunk stay in the L2 cache."""
CHUNK_GPU = 1 << 24


@dataclass
class Sketches:
    """Sorted magnitudes |tau|, descending, per (source, tensor): any density becomes one look-up.

    Prepared once per pool, at a tensor's first use, on the CPU in fp32: 4 bytes per weight and expert.
    """

    sorted: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def threshold(self, source: str, tensor: str, delta: Tensor, density: float) -> float:
        """The k-th largest |tau| with k = max(1, int(density n)); 0 where everything is kept.

        Entries that tie with the k-th are all kept, as in the TIES authors' code (mergekit keeps an arbitrary
        choice of exactly k). `delta` is the whole tensor's tau in fp32.
        """
        n = delta.numel()
        k = max(1, int(density * n))
        if k >= n:
            return 0.0
        key = (source, tensor)
        if key not in self.sorted:
            self.sorted[key] = delta.abs().sort(descending=True).values.cpu()
        return float(self.sorted[key][k - 1])


class BuildError(RuntimeError):
    """The recipe does not build a usable model; the text is the reason."""


def apply(out: Tensor, view: BlockView, rule: Rule, sketches: Sketches) -> Tensor:
    """Build one block of a canonical recipe into `out` (flat, any float dtype).

    Returns a scalar tensor that is finite exactly where everything written is (not read here, so that the
    GPU need not wait).
    """
    method = METHODS[rule.method]
    names = sorted(rule.sources)
    weights = [rule.sources[n]["weight"] for n in names]
    if method.combine == "weighted_mean" and rule.params["normalize"]:
        total = sum(weights)
        weights = [w / total for w in weights]
    lam = float(rule.params.get("lambda", 1.0))
    chunk = CHUNK_GPU if out.is_cuda else CHUNK_CPU
    health = torch.zeros((), dtype=torch.float32, device=out.device)
    for tensor, start, stop in view.spans():
        thresholds = _thresholds(method, rule, names, tensor, view, start, stop, sketches)
        for a in range(start, stop, chunk):
            b = min(a + chunk, stop)
            base = view.base[a:b].float() if method.delta == "base" else None
            sources = [view.sources[n][a:b] for n in names]
            if method.consensus == "none":
                merged = _sum(sources, base, weights, thresholds)
            else:
                merged = _elected(sources, base, weights, thresholds, normalize=bool(rule.params["normalize"]))
            if lam != 1.0:
                merged.mul_(lam)
            if base is not None:
                merged.add_(base)
            out[a:b].copy_(merged)
            # Any NaN or infinity survives a sum; zero times the sum stays 0 for finite values.
            health.add_(merged.sum() * 0.0)
    return health


def _thresholds(
    method: Method,
    rule: Rule,
    names: list[str],
    tensor: str,
    view: BlockView,
    start: int,
    stop: int,
    sketches: Sketches,
) -> list[float]:
    """Per source, the smallest |tau| that is kept; 0 keeps everything."""
    if method.sparsify == "none":
        return [0.0] * len(names)
    out = []
    for n in names:
        density = rule.sources[n]["density"]
        if density >= 1.0:
            out.append(0.0)
            continue
        delta = view.sources[n][start:stop].float() - view.base[start:stop].float()
        out.append(sketches.threshold(n, tensor, delta, density))
    return out


def _delta(source: Tensor, base: Tensor | None, threshold: float) -> Tensor:
    """tau in fp32 (or the weights themselves where a method has no base), trimmed below the threshold."""
    tau = source.float() if base is None else torch.sub(source, base)
    if threshold > 0.0:
        tau = tau.masked_fill(tau.abs() < threshold, 0.0)
    return tau


def _sum(sources: list[Tensor], base: Tensor | None, weights: list[float], thresholds: list[float]) -> Tensor:
    """sum_i w_i tau_i."""
    total = _delta(sources[0], base, thresholds[0]) * weights[0]
    for source, w, t in zip(sources[1:], weights[1:], thresholds[1:], strict=True):
        total.add_(_delta(source, base, t), alpha=w)
    return total


def _elected(
    sources: list[Tensor], base: Tensor | None, weights: list[float], thresholds: list[float], *, normalize: bool
) -> Tensor:
    """Sum (or mean by agreeing weights) of the entries whose sign agrees with the sum's; a zero sum counts as +."""
    weighted = [_delta(s, base, t) * w for s, w, t in zip(sources, weights, thresholds, strict=True)]
    mass = weighted[0].clone()
    for d in weighted[1:]:
        mass.add_(d)
    positive = mass >= 0.0
    total = torch.zeros_like(mass)
    share = torch.zeros_like(mass)
    for d, w in zip(weighted, weights, strict=True):
        agrees = torch.where(positive, d > 0.0, d < 0.0)
        total.add_(torch.where(agrees, d, 0.0))
        if normalize:
            share.add_(agrees, alpha=w)
    if normalize:
        # Weights are multiples of 1e-6, so a smaller sum is a cancelled one (opposite signs): divide by 1, as
        # mergekit does for an exact zero. It lets rounding residues through, which blow the weights up.
        total.div_(torch.where(share.abs() < 5e-7, 1.0, share))
    return total


def prepared_bytes(method: str, tables: Mapping[str, int]) -> int:
    """Memory of the sketches that a method needs, for sources with the given number of weights."""
    return 4 * sum(tables.values()) if METHODS[method].sparsify == "top_k" else 0
