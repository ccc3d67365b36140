"""Kinds of tasks: what a fitness file may ask for. A new kind is a file here, its scorer in `score/`, and one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Union

from pydantic import Discriminator, Tag

from evomerge.tasks.base import TaskSpec
from evomerge.tasks.function import FunctionSpec
from evomerge.tasks.generation import GenerationSpec
from evomerge.tasks.lm_eval import LmEvalSpec
from evomerge.tasks.multiple_choice import MultipleChoiceSpec
from evomerge.tasks.perplexity import PerplexitySpec
from evomerge.tasks.structure import StructureSpec
from evomerge.tasks.weights import WeightsSpec


class Kind(NamedTuple):
    """The keys of a kind of task, where its scorer is (module:class), and one line about it."""

    spec: type[TaskSpec]
    scorer: str
    about: str


KINDS: Mapping[str, Kind] = {
    "multiple_choice": Kind(
        MultipleChoiceSpec, "evomerge.score.multiple_choice:MultipleChoice", "log-likelihood of given choices"
    ),
    "generation": Kind(
        GenerationSpec, "evomerge.score.generation:Generation", "what the model writes, compared with the answer"
    ),
    "perplexity": Kind(PerplexitySpec, "evomerge.score.perplexity:Perplexity", "bits per byte of given texts"),
    "weights": Kind(WeightsSpec, "evomerge.score.weights:Weights", "distance of the weights from the base"),
    "structure": Kind(
        StructureSpec, "evomerge.score.structure:Structure", "layers, parameters or latency of the merged model"
    ),
    "lm_eval": Kind(LmEvalSpec, "evomerge.score.lm_eval:LmEval", "a task of lm-evaluation-harness, in memory"),
    "python": Kind(FunctionSpec, "evomerge.score.function:Function", "a Python function of your own"),
}


def kind_of(data: Any) -> str:
    """The kind that plain data or a spec says it is; `multiple_choice` where it says nothing."""
    kind = data.get("kind", "multiple_choice") if isinstance(data, dict) else getattr(data, "kind", "multiple_choice")
    return str(kind)


if TYPE_CHECKING:
    Task = TaskSpec
else:
    # Only the chosen kind's keys are looked at, so that complaints speak of it alone.
    Task = Annotated[
        Union[tuple(Annotated[k.spec, Tag(name)] for name, k in KINDS.items())],  # noqa: UP007 (a computed union)
        Discriminator(
            kind_of,
            custom_error_type="unknown_kind",
            custom_error_message=f"kind: should be one of {', '.join(KINDS)}",
        ),
    ]
