"""The one table of merge methods. Most published methods are a row over the same primitives.

The order of the primitives is fixed (`pipeline.py` executes it):
delta -> sparsify -> weight -> consensus -> combine -> scale -> add base -> cast once.
A new pointwise method is one row here; this module holds data only, so that spaces and recipes need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Coefficient:
    """One searchable number of a method: per source (`weight`) or shared by a block (`lambda`)."""

    default: float
    low: float
    high: float
    per: Literal["source", "block"] = "source"


@dataclass(frozen=True)
class Method:
    """One merge method as a composition of primitives.

    `coefficients` are what a search may vary, with the range within which a value has a meaning;
    `options` are switches, name -> (default, allowed values). `source` cites paper and reference code.
    """

    name: str
    source: str
    status: Literal["verified", "derived", "experimental"]
    delta: Literal["base", "none"]
    sparsify: Literal["none", "top_k"] = "none"
    consensus: Literal["none", "sign_mass"] = "none"
    combine: Literal["sum", "weighted_mean", "masked_mean"] = "sum"
    coefficients: Mapping[str, Coefficient] = field(default_factory=dict)
    options: Mapping[str, tuple[Scalar, tuple[Scalar, ...]]] = field(default_factory=dict)

    @cached_property
    def per_source(self) -> tuple[str, ...]:
        """Names of the coefficients that every source has its own of."""
        return tuple(n for n, c in self.coefficients.items() if c.per == "source")

    @cached_property
    def per_block(self) -> tuple[str, ...]:
        """Names of the coefficients that a block has one of."""
        return tuple(n for n, c in self.coefficients.items() if c.per == "block")


_ANY = 1e6
WEIGHT = Coefficient(default=1.0, low=-_ANY, high=_ANY)
LAMBDA = Coefficient(default=1.0, low=-_ANY, high=_ANY, per="block")
DENSITY = Coefficient(default=1.0, low=1e-6, high=1.0)
ON_OFF: tuple[Scalar, ...] = (True, False)

METHODS: Mapping[str, Method] = {
    m.name: m
    for m in (
        Method(
            "linear",
            "Model soups, arXiv 2203.05482; theta = sum w_i theta_i / sum w_i",
            "verified",
            delta="none",
            combine="weighted_mean",
            coefficients={"weight": WEIGHT},
            options={"normalize": (True, ON_OFF)},
        ),
        Method(
            "task_arithmetic",
            "Task arithmetic, arXiv 2212.04089; theta_0 + lambda sum w_i tau_i",
            "verified",
            delta="base",
            combine="sum",
            coefficients={"weight": WEIGHT, "lambda": LAMBDA},
        ),
        Method(
            "ties",
            "TIES-Merging, arXiv 2306.01708, in mergekit's variant: trim per tensor, elect on weighted deltas, "
            "divide by the agreeing weights, a zero sum counts as +",
            "verified",
            delta="base",
            sparsify="top_k",
            consensus="sign_mass",
            combine="masked_mean",
            coefficients={"weight": WEIGHT, "density": DENSITY, "lambda": LAMBDA},
            options={"normalize": (True, ON_OFF)},
        ),
    )
}
