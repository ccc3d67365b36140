"""evomerge: evolutionary merge-recipe optimizer for language models.

import evomerge
run = evomerge.run("quickstart")      # or evomerge.Run.read("runs/quickstart")
run.winner                            # the winning recipe
run.evaluations                       # one row per candidate and split
run.export("merged")                  # a checkpoint that stock transformers loads
"""

from __future__ import annotations

from importlib.metadata import version

# Before the function of that name: importing the module later would put it in the function's place.
import evomerge.run  # noqa: F401
from evomerge.api import Run, run
from evomerge.tasks.base import Allowed

__version__ = version("evomerge")
__all__ = ["Allowed", "Run", "__version__", "run"]
