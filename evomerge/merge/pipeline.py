"""The delta pipeline: executes any row of `methods.py` over one block, in fp32, with one rounding at the end.

    delta -> spectrum -> sparsify -> rescale -> weight -> consensus -> combine -> scale -> add base -> cast once

The block is walked in chunks that stay in the cache, so a build reads each source once and writes once.
A chunk never crosses a tensor where a method knows tensors. Sources go in name order: what is built does
not depend on the order in which a recipe names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import RunError
from evomerge.merge.bank import BlockView
from evomerge.merge.masks import keep, multiplier, scatter
from evomerge.merge.methods import BANDS, METHODS, Method
from evomerge.recipe import Rule

CHUNK_CPU = 1 << 15
"""Elements: 128 KiB of fp32 per temporary, so that the few temporaries of a chunk stay in the L2 cache."""
CHUNK_GPU = 1 << 24
CHUNK_STATISTICS = 1 << 20
"""For sums over a tensor in fp64. Apart from the others, so that no statistic depends on how a build is chunked."""


@dataclass
class Sketches:
    """What is known of a pool's tensors: prepared once, at a tensor's first use, and small but for `sorted` and
    `directions`.

    `hashes` are the sources' content hashes, from which random masks are drawn; without one, the name is used.
    """

    hashes: Mapping[str, str] = field(default_factory=dict)
    sorted: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """Magnitudes |tau| per (source, tensor), descending: any density is one look-up. On the CPU, 4 bytes a weight."""
    cosines: dict[tuple[str, str, bool, str], float] = field(default_factory=dict)
    directions: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of tau per (source, tensor), on its device: singular vectors of all bands but the last and the bands they are in.
    At most 3/4 of the shorter side's square, 4 bytes each: for a square matrix 3/4 of an fp32 tau."""

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

    def banded(self, source: str, tensor: str, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Left singular vectors of `tau`, shape (n_rows, k), and of each the band it is in, from 0, shape (k,).

        `tau` is in fp64 and not taller than wide. The direction i is in band floor(4 sum_{j<i} s_j^2 / sum_j s_j^2),
        s descending, so the largest is in the first one; the last band's are left out. They are eigenvectors of
        tau tau^T: in fp64 that is as good as an SVD for all but tiny singular values, which the last band has, and
        several times as fast. None are known of a tau that is 0 or not finite.
        """
        key = (source, tensor)
        if key not in self.directions:
            gram = tau @ tau.T
            total = float(gram.trace())
            if total > 0.0 and bool(gram.isfinite().all()):
                energies, vectors = (x.flip(-1) for x in torch.linalg.eigh(gram))
                before = (energies.cumsum(0) - energies) / total
                # Equal shares that add up to a bound in theory must not fall below it by a rounding.
                bands = (before * len(BANDS) + 1e-9).long()
                first = int((bands < len(BANDS) - 1).sum())
                self.directions[key] = (vectors[:, :first].float(), bands[:first])
            else:
                self.directions[key] = (gram.new_empty(len(gram), 0), gram.new_empty(0).long())
        return self.directions[key]

    def cosine(self, a: str, b: str, tensor: str, x: Tensor, y: Tensor, base: Tensor | None) -> float:
        """Cosine of two flat tensors, or of their differences from `base`, in fp64; NaN where one is not finite.

        A vector of length below 1e-8 has no direction and counts as orthogonal, as in mergekit.
        """
        key = (a, b, base is not None, tensor)
        if key not in self.cosines:
            gram = torch.zeros(3, dtype=torch.float64, device=x.device)
            for at in range(0, len(x), CHUNK_STATISTICS):
                part = slice(at, at + CHUNK_STATISTICS)
                u, v = (_tau(s[part], None if base is None else base[part]).double() for s in (x, y))
                gram += torch.stack([u @ u, v @ v, u @ v])
            uu, vv, uv = gram.tolist()
            if not math.isfinite(uu + vv):
                self.cosines[key] = math.nan
            elif min(uu, vv) <= 1e-16:
                self.cosines[key] = 0.0
            else:
                self.cosines[key] = max(-1.0, min(1.0, uv / math.sqrt(uu) / math.sqrt(vv)))
        return self.cosines[key]


class BuildError(RunError):
    """The recipe does not build a usable model; the text is the reason."""


@dataclass(frozen=True)
class _Term:
    """One source within a tensor: what is kept of its tau, and by what that is multiplied.

    `factor` is the weight with its rescaling; `multiplier` draws the mask, None where nothing is masked. A vector
    that is `formed` is no source's but a difference already.
    """

    vector: Tensor
    weight: float
    factor: float
    threshold: float = 0.0
    density: float = 1.0
    multiplier: int | None = None
    formed: bool = False


@dataclass(frozen=True)
class _Chunk:
    """One stretch of a block. `room` is fp32 scratch of shape (n_sources + 4, chunk), `bits` int32, (2, chunk)."""

    start: int
    stop: int
    base: Tensor | None
    room: Tensor
    bits: Tensor
    normalize: bool = False


def apply(out: Tensor, view: BlockView, rule: Rule, sketches: Sketches) -> Tensor:
    """Build one block of a canonical recipe into `out` (flat, any float dtype).

    Returns a scalar tensor that is finite exactly where everything written is (not read here, so that the
    GPU need not wait).
    """
    method = METHODS[rule.method]
    add = method.adds_to_base(rule.params)
    lam = float(rule.params.get("lambda", 1.0))
    seed = int(rule.params.get("mask_seed", 0))
    normalize = bool(rule.params.get("normalize", False))
    # Only some primitives know tensors; else the block is one run, alignment gaps (zeros) included.
    per_tensor = (method.sparsify, method.spectrum) != ("none", "none") or method.combine == "spherical"
    spans = view.spans() if per_tensor else [("", 0, len(out))]
    chunk = min(CHUNK_GPU if out.is_cuda else CHUNK_CPU, max(stop - start for _, start, stop in spans))
    scratch = torch.empty(len(rule.sources) + 4, chunk, dtype=torch.float32, device=out.device)
    integers = torch.empty(2, chunk if method.sparsify == "bernoulli" else 0, dtype=torch.int32, device=out.device)
    health = torch.zeros((), dtype=torch.float32, device=out.device)
    for tensor, start, stop in spans:
        terms = _terms(method, rule, tensor, view, start, stop, sketches)
        if any(math.isnan(t.threshold) or math.isnan(t.factor) for t in terms):
            return health.fill_(math.nan)
        for a in range(start, stop, chunk):
            b = min(a + chunk, stop)
            base = view.base[a:b].float() if add else None
            written = out[a:b]
            here = _Chunk(a - start, b - start, base, scratch[:, : b - a], integers[:, : b - a], normalize)
            if any(t.multiplier is not None for t in terms):
                scatter(here.bits[0], here.bits[1], seed, tensor, here.start)
            # In fp32 the accumulator is the target itself; else it is rounded once at the end.
            merged = written if out.dtype == torch.float32 else here.room[-1]
            if method.consensus == "none":
                _sum(merged, here, terms)
            else:
                _elected(merged, here, terms)
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


def mix(out: Tensor, weighted: Sequence[tuple[Tensor, float]]) -> Tensor:
    """out = sum_k w_k theta_k in fp32 with one rounding, in the given order; all flat and of one length.

    Returns a scalar tensor that is finite exactly where everything written is, as `apply` does.
    """
    chunk = CHUNK_GPU if out.is_cuda else CHUNK_CPU
    health = torch.zeros((), dtype=torch.float32, device=out.device)
    for at in range(0, len(out), chunk):
        part = slice(at, at + chunk)
        written = out[part]
        total = torch.zeros_like(written, dtype=torch.float32)
        for vector, weight in weighted:
            total.add_(vector[part].float(), alpha=weight)
        written.copy_(total)
        health.add_((written if out.dtype == torch.float16 else total).sum(dtype=torch.float32) * 0.0)
    return health


# -- per tensor: what each source contributes -----------------------------------------------------------------


def _terms(
    method: Method, rule: Rule, tensor: str, view: BlockView, start: int, stop: int, sketches: Sketches
) -> list[_Term]:
    """One term a source, in name order. A NaN among them says that a source is not finite."""
    names = sorted(rule.sources)
    weights = [rule.sources[n]["weight"] for n in names]
    vectors = [view.sources[n][start:stop] for n in names]
    base = view.base[start:stop]
    if method.combine == "weighted_mean" and rule.params["normalize"]:
        total = sum(weights)
        weights = [w / total for w in weights]
    if method.combine == "spherical":
        weights = _arc(names, weights, tensor, vectors, base if method.adds_to_base(rule.params) else None, sketches)
    if method.spectrum == "bands":
        factors = [[rule.sources[n][b] for b in method.bands] for n in names]
        shape = next((t.shape for t in view.block.tensors if t.name == tensor and t.matrix), None)
        return _scaled(names, weights, factors, tensor, shape, vectors, base, sketches)
    terms = [_Term(v, w, w) for v, w in zip(vectors, weights, strict=True)]
    if method.sparsify == "none":
        return terms
    densities = [rule.sources[n]["density"] for n in names]
    triples = list(zip(names, terms, densities, strict=True))
    if method.sparsify == "top_k":
        return [
            _Term(
                t.vector,
                t.weight,
                t.weight,
                threshold=sketches.threshold(n, tensor, stop - start, d, partial(_tau, t.vector, base)),
            )
            for n, t, d in triples
        ]
    seed = int(rule.params["mask_seed"])
    return [
        t if d == 1.0 else _masked(t, seed, sketches.hashes.get(n, n), tensor, base, d, str(rule.params["rescale"]))
        for n, t, d in triples
    ]


def _scaled(
    names: list[str],
    weights: list[float],
    factors: list[list[float]],
    tensor: str,
    shape: tuple[int, ...] | None,
    vectors: list[Tensor],
    base: Tensor,
    sketches: Sketches,
) -> list[_Term]:
    """tau_k with its singular values scaled by band; what is no matrix (`shape` None) by the mean of the factors.

    U (f S) V^T = f_last tau + sum_i (f_i - f_last) u_i u_i^T tau: where the factors agree it is task arithmetic to the
    bit, and nothing has to be known of the last band. The sum over all sources is one further term, formed in fp64, so
    that threads and devices show in next to none of its fp32 values. It takes 4 k operations a weight and source, k
    being the number of directions known: as many as a forward pass over 2 k tokens.
    """
    if shape is None:
        means = [w * (math.fsum(f) / len(f)) for w, f in zip(weights, factors, strict=True)]
        return [_Term(v, m, m) for v, m in zip(vectors, means, strict=True)]
    terms, total = [], None
    for name, weight, (*others, last), vector in zip(names, weights, factors, vectors, strict=True):
        terms.append(_Term(vector, weight * last, weight * last))
        if all(f == last for f in others):
            continue
        tau = _tau(vector, base).view(shape).double()
        tau = tau if shape[0] <= shape[1] else tau.T
        u, bands = sketches.banded(name, tensor, tau)
        u, gains = u.double(), torch.tensor(others, dtype=torch.float64, device=u.device).sub_(last).mul_(weight)[bands]
        change = (u * gains) @ (u.T @ tau)
        total = change if total is None else total.add_(change)
    if total is not None:
        flat = (total if shape[0] <= shape[1] else total.T).float().flatten()
        terms.append(_Term(flat, 1.0, 1.0, formed=True))
    return terms


def _masked(t: _Term, seed: int, source: str, tensor: str, base: Tensor, density: float, rescale: str) -> _Term:
    """The term under its random mask, rescaled so that its mean over masks, or its L1 norm, stays the same."""
    key = multiplier(seed, source, tensor)
    if rescale == "inverse_probability":
        return _Term(t.vector, t.weight, t.weight / density, density=density, multiplier=key)
    sums = torch.zeros(2, dtype=torch.float64, device=base.device)
    for at in range(0, len(base), CHUNK_STATISTICS):
        part = slice(at, at + CHUNK_STATISTICS)
        magnitude = _tau(t.vector[part], base[part]).abs_()
        bits = torch.empty(2, len(magnitude), dtype=torch.int32, device=base.device)
        scattered = scatter(bits[0], bits[1], seed, tensor, at)
        kept = keep(torch.empty_like(magnitude), bits[1], scattered, key, density)
        sums += torch.stack([magnitude.sum(dtype=torch.float64), kept.mul_(magnitude).sum(dtype=torch.float64)])
    before, after = sums.tolist()
    # mergekit leaves tensors alone whose norm is below 1e-7, before or after.
    ratio = 1.0 if min(before, after) < 1e-7 else before / after
    return _Term(t.vector, t.weight, t.weight * ratio, density=density, multiplier=key)


def _arc(
    names: list[str],
    weights: list[float],
    tensor: str,
    vectors: list[Tensor],
    base: Tensor | None,
    sketches: Sketches,
) -> list[float]:
    """Coefficients of SLERP at t = w_2 / (w_1 + w_2); of a single source 1.

    Weights whose |cosine| exceeds 0.9995 are interpolated linearly, as by mergekit's slerp, which covers opposite
    directions; deltas only where the sine vanishes, as by its nuslerp.
    """
    if len(names) == 1:
        return [1.0]
    t = weights[1] / (weights[0] + weights[1])
    cosine = sketches.cosine(names[0], names[1], tensor, vectors[0], vectors[1], base)
    parallel = abs(cosine) > 0.9995 if base is None else 1.0 - cosine * cosine <= 1e-16
    if parallel:
        return [1.0 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def _tau(source: Tensor, base: Tensor | None) -> Tensor:
    """A fresh fp32 vector: the difference from the base, or the weights themselves."""
    return source.to(torch.float32, copy=True) if base is None else source.float() - base.float()


# -- per chunk --------------------------------------------------------------------------------------------------


def _delta(out: Tensor, spare: Tensor, c: _Chunk, t: _Term) -> Tensor:
    """tau in fp32 (or the weights themselves where a method has no base), trimmed or masked."""
    source = t.vector[c.start : c.stop]
    if c.base is None or t.formed:
        out.copy_(source)
    elif source.dtype == c.base.dtype:
        torch.sub(source, c.base, out=out)
    else:  # widening first is faster than a subtraction of mixed types
        out.copy_(source).sub_(c.base)
    if t.threshold > 0.0:
        # hardshrink keeps |x| > limit; with the float just below, it keeps |x| >= threshold. (masked_fill_ and
        # where are not vectorised on the CPU and take 25 times as long.)
        torch.hardshrink(out, np.nextafter(np.float32(t.threshold), np.float32(0)).item(), out=out)
    if t.multiplier is not None:
        # Zero times NaN is NaN: what is masked out still shows where it is not finite.
        out.mul_(keep(spare, c.bits[1], c.bits[0], t.multiplier, t.density))
    return out


def _sum(total: Tensor, c: _Chunk, terms: list[_Term]) -> None:
    """total = sum_i f_i tau_i."""
    tau, spare = c.room[0], c.room[1]
    _delta(total, spare, c, terms[0]).mul_(terms[0].factor)
    for t in terms[1:]:
        total.add_(_delta(tau, spare, c, t), alpha=t.factor)


def _elected(total: Tensor, c: _Chunk, terms: list[_Term]) -> None:
    """total = sum (or mean by agreeing weights) of entries whose sign agrees with the sum's; a zero sum counts as +.

    With the elected sign s, an entry d agrees where s d > 0; so s max(s d, 0) is d or 0.
    """
    n = len(terms)
    spare, share = c.room[n], c.room[n + 1]
    mass = c.room[n + 2]
    for i, t in enumerate(terms):
        weighted = _delta(c.room[i if c.normalize else 0], spare, c, t).mul_(t.factor)
        if i == 0:
            total.copy_(weighted)
        else:
            total.add_(weighted)
        if not c.normalize:
            mass = torch.abs(weighted, out=mass) if i == 0 else mass.add_(weighted.abs_())
    if not c.normalize:
        # sum_i max(s d_i, 0) = (sum |d_i| + |sum d_i|) / 2
        half = torch.ge(total, 0.0, out=spare).sub_(0.5)
        total.abs_().add_(mass).mul_(half)
        return
    sign = torch.ge(total, 0.0, out=c.room[n + 2]).mul_(2.0).sub_(1.0)
    total.mul_(0.0)  # zeros; a NaN, which agrees with no sign, must not vanish
    share.zero_()
    for i, t in enumerate(terms):
        agreeing = torch.mul(c.room[i], sign, out=spare).clamp_(min=0.0)
        total.add_(agreeing)
        share.add_(agreeing.sign_(), alpha=t.weight)
    # Weights are multiples of 1e-6, so a smaller sum is a cancelled one (opposite signs): divide by 1, as
    # mergekit does for an exact zero. It lets rounding residues through, which blow the weights up.
    cancelled = torch.lt(torch.abs(share, out=spare), 5e-7, out=spare)
    total.div_(share.add_(cancelled))
    total.mul_(sign)
