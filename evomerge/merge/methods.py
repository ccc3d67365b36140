"""The one table of merge methods. Most published methods are a row over the same primitives.

The order of the primitives is fixed (`pipeline.py` executes it):
delta -> spectrum -> sparsify -> rescale -> weight -> consensus -> combine -> scale -> add base -> cast once.
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
    """One searchable number of a method: per source (`weight`) or shared by a block (`lambda`).

    Integers (`mask_seed`) may be searched as well, but are usually left at their default.
    """

    default: float
    low: float
    high: float
    per: Literal["source", "block"] = "source"
    integer: bool = False


@dataclass(frozen=True)
class Method:
    """One merge method as a composition of primitives.

    `coefficients` are what a search may vary, with the range within which a value has a meaning;
    `options` are switches, name -> (default, allowed values). `source` cites paper and reference code.
    `delta` says what is combined: differences from the base, the weights themselves, or either (option `vectors`).
    `spectrum` says whether singular values of a difference are scaled, by bands; without, a method that adds plain
    sums to the base is linear in its weights.
    """

    name: str
    source: str
    status: Literal["verified", "derived", "experimental"]
    delta: Literal["base", "none", "either"]
    spectrum: Literal["none", "bands"] = "none"
    sparsify: Literal["none", "top_k", "bernoulli"] = "none"
    consensus: Literal["none", "sign_mass"] = "none"
    combine: Literal["sum", "weighted_mean", "masked_mean", "spherical"] = "sum"
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

    @property
    def linear(self) -> bool:
        """True where weights are a linear combination of whole sources (or its quotient by the sum of weights).

        Then inner products with the sources give the derivative by every coefficient.
        """
        plain = self.sparsify == "none" and self.consensus == "none" and self.spectrum == "none"
        return plain and self.combine != "spherical"

    @property
    def bands(self) -> tuple[str, ...]:
        """Names of the coefficients that scale bands of singular values, the largest values' first."""
        return BANDS if self.spectrum == "bands" else ()

    def adds_to_base(self, options: Mapping[str, Scalar]) -> bool:
        """True where differences from the base are combined and added to it."""
        if self.delta == "either":
            return options.get("vectors", self.options["vectors"][0]) == "deltas"
        return self.delta == "base"


_ANY = 1e6
WEIGHT = Coefficient(default=1.0, low=-_ANY, high=_ANY)
LAMBDA = Coefficient(default=1.0, low=-_ANY, high=_ANY, per="block")
BAND = Coefficient(default=1.0, low=-_ANY, high=_ANY)
BANDS = ("band_1", "band_2", "band_3", "band_4")
"""A quarter each of a task vector's squared norm, so that equal changes of two factors move the weights equally far.
Of equal numbers of directions, those of small singular values would hardly count."""
DENSITY = Coefficient(default=1.0, low=1e-6, high=1.0)
SHARE = Coefficient(default=1.0, low=0.0, high=_ANY)
MASK_SEED = Coefficient(default=0, low=0, high=2**32 - 1, per="block", integer=True)
ON_OFF: tuple[Scalar, ...] = (True, False)
RESCALE: tuple[Scalar, tuple[Scalar, ...]] = ("inverse_probability", ("inverse_probability", "l1"))

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
            "spectral",
            "Task arithmetic whose singular values are scaled, as by CycleQD's mutation, arXiv 2410.14735, in four "
            "bands; theta_0 + lambda sum w_i U_i (f_i S_i) V_i^T, and f_i's mean for what is no matrix of a layer",
            "derived",
            delta="base",
            spectrum="bands",
            combine="sum",
            coefficients={"weight": WEIGHT, **dict.fromkeys(BANDS, BAND), "lambda": LAMBDA},
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
        Method(
            "dare_linear",
            "DARE, arXiv 2311.03099; theta_0 + lambda sum w_i m_i tau_i / p_i with m_i ~ Bernoulli(p_i), p the density "
            "(rescale l1: mergekit's ||tau||_1 / ||m tau||_1 per tensor in place of 1 / p)",
            "verified",
            delta="base",
            sparsify="bernoulli",
            combine="sum",
            coefficients={"weight": WEIGHT, "density": DENSITY, "lambda": LAMBDA, "mask_seed": MASK_SEED},
            options={"rescale": RESCALE},
        ),
        Method(
            "dare_ties",
            "DARE, arXiv 2311.03099, in place of trimming in TIES, arXiv 2306.01708; as in mergekit a sum unless "
            "normalized",
            "verified",
            delta="base",
            sparsify="bernoulli",
            consensus="sign_mass",
            combine="masked_mean",
            coefficients={"weight": WEIGHT, "density": DENSITY, "lambda": LAMBDA, "mask_seed": MASK_SEED},
            options={"normalize": (False, ON_OFF), "rescale": RESCALE},
        ),
        Method(
            "slerp",
            "Shoemake 1985, doi 10.1145/325165.325242; along the arc between two models, each tensor flattened, at "
            "t = w_2 / (w_1 + w_2); mergekit's slerp (vectors: weights) and nuslerp with a base (vectors: deltas)",
            "verified",
            delta="either",
            combine="spherical",
            coefficients={"weight": SHARE},
            options={"vectors": ("weights", ("weights", "deltas"))},
        ),
    )
}
