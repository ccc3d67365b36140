"""What scorers of all kinds share about running a model."""

from __future__ import annotations

from evomerge.errors import RunError


class NonFinite(RunError):
    """The model's logits are NaN or infinite."""


class Altered(RunError):
    """Scoring left the model other than it found it; what comes next needs a fresh one."""
