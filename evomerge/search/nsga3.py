"""NSGA-III on Optuna: fronts as in NSGA-II, kept apart by reference directions instead of crowding.

Deb and Jain 2014, "An evolutionary many-objective optimization algorithm using reference-point-based nondominated
sorting approach, part I", IEEE TEC 18(4). For three and more objectives, where crowding says little. The reference
points are Das and Dennis' with `divisions` per objective: (m + divisions - 1 choose divisions) of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evomerge.search.nsga2 import Nsga2
from evomerge.search.nsga2 import Options as Nsga2Options
from evomerge.search.optuna_study import made, renewing


@dataclass(frozen=True)
class Options(Nsga2Options):
    """Settings of the experiment file: those of NSGA-II, and the reference directions."""

    divisions: int = 6
    """Parts that every objective's axis is cut into; 28 directions for three objectives."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divisions < 1:
            raise ValueError(f"divisions: at least 1 is needed, got {self.divisions}")


class Nsga3(Nsga2):
    """NSGA-II's loop with another choice of survivors."""

    options_class = Options

    def _sampler(self, seed: int) -> Any:
        assert isinstance(self._options, Options)
        divisions = self._options.divisions
        return made(
            lambda optuna: renewing(optuna.samplers.NSGAIIISampler, self._renewed)(
                **self._operators(optuna), dividing_parameter=divisions, seed=seed
            )
        )
