"""Random masks without storage: a uniform field that is a hash of (seed, source, tensor, index).

A mask keeps an element where u < density. So masks are nested (a higher density keeps all that a lower one kept),
candidates of a search share their random numbers, and what is kept depends neither on the device nor on chunks nor
on which other sources a recipe has. `source` is the content hash: a renamed expert keeps its mask.

    table of hashed lanes  x  multiplier of (seed, tensor, page)  ->  xorshift  x  multiplier of the source  ->  u

Two rounds of 32-bit multiplicative hashing with odd multipliers taken from sha256 (multiply-shift, Dietzfelbinger
et al. 1997), in wrapping int32 arithmetic, which CPU and CUDA share. The first round serves all sources: an element
costs three operations and one more for each source. It is a hash for statistics, not for secrets.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

PAGE = 1 << 16
"""Elements that share one multiplier; the index within a page is the lane."""


def multiplier(*key: str | int) -> int:
    """An odd int32 that depends on every part of the key."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "little", signed=True) | 1


@lru_cache(maxsize=8)
def _lanes(device: torch.device) -> Tensor:
    """PAGE odd pseudo-random int32: murmur3's finaliser (Appleby, public domain) over 1 ... PAGE."""
    x = torch.arange(1, PAGE + 1, dtype=torch.int64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    x ^= x >> 16
    return ((x | 1) - (1 << 31)).to(torch.int32).to(device)


def scatter(out: Tensor, spare: Tensor, seed: int, tensor: str, start: int) -> Tensor:
    """Fill `out` (int32, any length n) for elements start ... start + n of a tensor: the round that sources share.

    `spare` is int32 scratch of the same length.
    """
    lanes = _lanes(out.device)
    at, stop = 0, len(out)
    while at < stop:
        page, lane = divmod(start + at, PAGE)
        whole = (stop - at) // PAGE if lane == 0 else 0
        if whole > 1:
            rows = torch.tensor([[multiplier(seed, tensor, p)] for p in range(page, page + whole)], dtype=torch.int32)
            n = whole * PAGE
            torch.mul(lanes, rows.to(out.device), out=out[at : at + n].view(whole, PAGE))
        else:
            n = min(PAGE - lane, stop - at)
            torch.mul(lanes[lane : lane + n], multiplier(seed, tensor, page), out=out[at : at + n])
        at += n
    # An arithmetic shift: the sign bit cancels itself and 31 bits go on.
    torch.bitwise_right_shift(out, 15, out=spare)
    return out.bitwise_xor_(spare)


def keep(out: Tensor, spare: Tensor, scattered: Tensor, factor: int, density: float) -> Tensor:
    """Fill `out` (float) with 1 where u < density, else 0; `factor` is the source's odd multiplier.

    u is a multiple of 2^-32, and so is the density that is kept to. `spare` is int32 scratch of the same length.
    """
    torch.mul(scattered, factor, out=spare)
    return torch.lt(spare, min(round(density * 2**32), 2**32 - 1) - 2**31, out=out)
