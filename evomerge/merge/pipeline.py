"""The delta pipeline: executes any row of `methods.py` over one block, in fp32, with one rounding at the end.

    delta -> sparsify -> weight -> consensus -> combine -> scale -> add base -> cast once

The block is walked in chunks that stay in the cache, so a build reads each source once and writes once.
A chunk never crosses a tensor, because trimming is per tensor. Sources go in name order: what is built does
not depend on the order in which a recipe names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import RunError
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

    def threshold(self, source: str, tensor: str, size: int, density: float, delta: Callable[[], Tensor]) -> float:
        """The k-th largest |tau|, k = max(1, int(density size)). 0 keeps everything; NaN says tau is not finite.

        Entries that tie with the k-th are all kept, as in the TIES authors' code (mergekit keeps an arbitrary
        choice of exactly k). `delta()` is the whole tensor's tau in fp32; it is asked for once.
        """
        k = max(1, int(density * size))
        if k >= size:
            return 0.0
        key = (source, tensor)
        if key not in self.sorted:
            self.sorted[key] = delta().abs_().sort(descending=True).values.cpu()
        table = self.sorted[key]
        # NaN and infinities sort first; trimming could hide them.
        return float(table[k - 1]) if bool(table[0].isfinite()) else math.nan


class BuildError(RunError):
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
    # Only trimming knows tensors; else the block is one run, alignment gaps (zeros) included.
    spans = view.spans() if method.sparsify == "top_k" else [("", 0, len(out))]
    chunk = min(CHUNK_GPU if out.is_cuda else CHUNK_CPU, max(stop - start for _, start, stop in spans))
    scratch = torch.empty(len(names) + 4, chunk, dtype=torch.float32, device=out.device)
    health = torch.zeros((), dtype=torch.float32, device=out.device)
    for tensor, start, stop in spans:
        thresholds = _thresholds(method, rule, names, tensor, view, start, stop, sketches)
        if any(math.isnan(t) for t in thresholds):
            return health.fill_(math.nan)
        for a in range(start, stop, chunk):
            b = min(a + chunk, stop)
            base = view.base[a:b].float() if method.delta == "base" else None
            sources = [view.sources[n][a:b] for n in names]
            written = out[a:b]
            room = scratch[:, : b - a]
            # In fp32 the accumulator is the target itself; else it is rounded once at the end.
            merged = written if out.dtype == torch.float32 else room[-1]
            if method.consensus == "none":
                _sum(merged, room, sources, base, weights, thresholds)
            else:
                _elected(merged, room, sources, base, weights, thresholds, normalize=bool(rule.params["normalize"]))
            if lam != 1.0:
                merged.mul_(lam)
            if base is not None:
                merged.add_(base)
            if merged is not written:
                written.copy_(merged)
            # Any NaN or infinity survives a sum; zero times the sum stays 0 for finite values. A cast to float16
            # may overflow, so there what was written counts.
            health.add_((written if out.dtype == torch.float16 else merged).sum(dtype=torch.float32) * 0.0)
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
        source, base = view.sources[n][start:stop], view.base[start:stop]
        density = rule.sources[n]["density"]
        out.append(sketches.threshold(n, tensor, stop - start, density, partial(_whole_delta, source, base)))
    return out


def _whole_delta(source: Tensor, base: Tensor) -> Tensor:
    return source.float() - base.float()


def _delta(out: Tensor, source: Tensor, base: Tensor | None, threshold: float) -> Tensor:
    """tau in fp32 (or the weights themselves where a method has no base), trimmed below the threshold."""
    if base is None:
        out.copy_(source)
    elif source.dtype == base.dtype:
        torch.sub(source, base, out=out)
    else:  # widening first is faster than a subtraction of mixed types
        out.copy_(source).sub_(base)
    if threshold > 0.0:
        # hardshrink keeps |x| > limit; with the float just below, it keeps |x| >= threshold. (masked_fill_ and
        # where are not vectorised on the CPU and take 25 times as long.)
        torch.hardshrink(out, np.nextafter(np.float32(threshold), np.float32(0)).item(), out=out)
    return out


def _sum(
    total: Tensor,
    room: Tensor,
    sources: list[Tensor],
    base: Tensor | None,
    weights: list[float],
    thresholds: list[float],
) -> None:
    """total = sum_i w_i tau_i. `room` is scratch of shape (n_sources + 4, chunk)."""
    tau = room[0]
    _delta(total, sources[0], base, thresholds[0]).mul_(weights[0])
    for source, w, t in zip(sources[1:], weights[1:], thresholds[1:], strict=True):
        total.add_(_delta(tau, source, base, t), alpha=w)


def _elected(
    total: Tensor,
    room: Tensor,
    sources: list[Tensor],
    base: Tensor | None,
    weights: list[float],
    thresholds: list[float],
    *,
    normalize: bool,
) -> None:
    """total = sum (or mean by agreeing weights) of entries whose sign agrees with the sum's; a zero sum counts as +.

    With the elected sign s, an entry d agrees where s d > 0; so s max(s d, 0) is d or 0.
    """
    n = len(sources)
    spare, share = room[n], room[n + 1]
    for i, (source, w, t) in enumerate(zip(sources, weights, thresholds, strict=True)):
        weighted = _delta(room[i], source, base, t).mul_(w)
        if i == 0:
            total.copy_(weighted)
        else:
            total.add_(weighted)
    sign = torch.ge(total, 0.0, out=room[n + 2]).mul_(2.0).sub_(1.0)
    total.mul_(0.0)  # zeros; a NaN, which agrees with no sign, must not vanish
    share.zero_()
    for i, w in enumerate(weights):
        agreeing = torch.mul(room[i], sign, out=spare).clamp_(min=0.0)
        total.add_(agreeing)
        if normalize:
            share.add_(agreeing.sign_(), alpha=w)
    if normalize:
        # Weights are multiples of 1e-6, so a smaller sum is a cancelled one (opposite signs): divide by 1, as
        # mergekit does for an exact zero. It lets rounding residues through, which blow the weights up.
        cancelled = torch.lt(torch.abs(share, out=spare), 5e-7, out=spare)
        total.div_(share.add_(cancelled))
    total.mul_(sign)
