"""What scorers of all kinds share about running a model."""

from __future__ import annotations

from typing import Any

from evomerge.errors import RunError


class NonFinite(RunError):
    """The model's logits are NaN or infinite."""


class Altered(RunError):
    """Scoring left the model other than it found it; what comes next needs a fresh one."""


def prefix_token(tokenizer: Any) -> int | None:
    """What a text begins behind where nothing else stands in front: BOS, else end-of-text, as in lm-eval."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return None
