"""What an export records of its scores: means by split, task and metric, and the fitness that gave them."""

from __future__ import annotations

from typing import Any

from evomerge.config import fitness_of
from evomerge.history import History


def scores_for_record(history: History, candidate: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(split -> task -> metric -> mean, the resolved fitness as plain data)."""
    entry = history.entry(candidate)
    scores = {}
    for split, result in entry.results.items():
        if result.scores is not None:
            scores[split] = {
                task: {metric: float(column.mean()) for metric, column in metrics.items()}
                for task, metrics in result.scores.items()
            }
    return scores, fitness_of(history.experiment).model_dump(mode="json", exclude_defaults=True)
