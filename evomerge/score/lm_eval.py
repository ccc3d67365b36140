"""Tasks of lm-evaluation-harness on the live candidate: no checkpoint on disk, one score per document.

Prompts are built once, in the driver, by lm-eval itself and over all documents in its order, so they are those that
its own command line would send; few-shot examples are drawn from one stream and would else depend on which items are
asked for. Workers send the asked ones through lm-eval's HFLM around the live model, and lm-eval's filters and
`process_results` turn answers into metrics. That is its `evaluate` without the building and the aggregation.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.errors import RunError, UserError
from evomerge.score.model import NonFinite
from evomerge.score.plan import Plan, Scorable, Target, places
from evomerge.score.prompts import check_lengths
from evomerge.tasks.base import Item
from evomerge.tasks.lm_eval import LmEvalSpec, open_task, quiet, task_folder

FEWSHOT_SEED = 1234
"""lm-eval's own default."""

Request = tuple[str, tuple[Any, ...]]
"""lm-eval's type of request (loglikelihood, loglikelihood_rolling, generate_until) and its arguments."""


ROLLING = "loglikelihood_rolling"


@dataclass(frozen=True)
class LmEvalPlan(Plan):
    """Built requests and documents by item. `limit` is the model's context and `lengths` the items' tokens."""

    lm_task: str
    folder: str
    code: str
    metrics: tuple[str, ...]
    filter: str | None
    batch_size: int
    limit: int
    repeats: int
    docs: tuple[Mapping[str, Any], ...]
    requests: tuple[tuple[Request, ...], ...]
    lengths: tuple[int, ...]

    def content(self) -> list[Any]:
        """Every prompt and document, and the version of what judges the answers."""
        judge = [self.lm_task, self.code, self.filter, self.batch_size, self.limit, self.repeats]
        return [judge, json.dumps([self.docs, self.requests], sort_keys=True, default=str)]

    def tokens(self, positions: Sequence[int]) -> int:
        """Tokens of all requests, generated ones as many as are allowed."""
        return sum(self.lengths[i] for i in positions)


class LmEval:
    """Scorer of the kind `lm_eval`."""

    stateless = False

    def __init__(self) -> None:
        self._tasks: dict[str, Any] = {}
        self._wrapped: dict[tuple[int, int], tuple[Any, Any]] = {}

    # -- compile ------------------------------------------------------------------------------------------

    def compile(self, spec: LmEvalSpec, items: tuple[Item, ...], target: Target) -> LmEvalPlan:
        """Build every prompt. Raises UserError for prompts that do not fit the model, or where one cannot be built."""
        who = f"task {spec.name!r}"
        folder = task_folder(spec.task, spec.include_path)
        if spec.apply_chat_template and not target.tokenizer.chat_template:
            raise UserError(f"{who}: apply_chat_template is set, but the tokenizer has no chat template")
        built: dict[str | None, list[list[Any]]] = {}
        for docs in {i.content.docs for i in items}:
            task = open_task(spec.task, folder, who)
            count = 1 + max(i.content.index for i in items if i.content.docs == docs)
            try:
                built[docs] = _build(task, docs, count, spec, target.tokenizer)
            except Exception as e:  # templates and code of the task's YAML
                raise UserError(f"{who}: its prompts cannot be built ({type(e).__name__}: {e})"[:400]) from None
        instances = [built[i.content.docs][i.content.index] for i in items]
        lengths = [[_length(r, target) for r in group] for group in instances]
        # lm-eval would cut a prompt to fit without a word; rolling texts go through windows, whatever their length.
        longest = [
            max((n for r, n in zip(group, tokens, strict=True) if r.request_type != ROLLING), default=0)
            for group, tokens in zip(instances, lengths, strict=True)
        ]
        check_lengths(spec.name, list(zip(items, longest, strict=True)), target.limit, "with its answer")
        return LmEvalPlan(
            **places(spec, items, target.shape),
            lm_task=spec.task,
            folder=folder,
            code=version("lm_eval") + ("" if spec.include_path is None else f" {_hash(Path(spec.include_path))}"),
            metrics=tuple(spec.directions),
            filter=spec.filter,
            batch_size=spec.batch_size,
            limit=target.limit,
            repeats=int(task.config.repeats),
            docs=tuple(i.content.fields for i in items),
            requests=tuple(tuple((r.request_type, r.args) for r in group) for group in instances),
            lengths=tuple(map(sum, lengths)),
        )

    # -- score --------------------------------------------------------------------------------------------

    def score(
        self, candidate: Scorable, plan: LmEvalPlan, positions: tuple[int, ...]
    ) -> Mapping[str, NDArray[np.float32]]:
        """The metrics of these items. Raises NonFinite on NaN log-likelihoods, RunError for no numbers."""
        with quiet(), torch.inference_mode():
            rows = self._results(candidate, plan, positions)
        out = {}
        for metric in plan.metrics:
            values = [row.get(metric) for row in rows]
            if not all(isinstance(v, bool | int | float | np.number) and np.isfinite(v) for v in values):
                odd = next(v for v in values if not (isinstance(v, bool | int | float | np.number) and np.isfinite(v)))
                raise RunError(f"task {plan.task!r}: lm-eval's {metric!r} should be a number for each doc, got {odd!r}")
            out[metric] = np.array(values, dtype=np.float32)
        return out

    def _results(self, candidate: Scorable, plan: LmEvalPlan, positions: tuple[int, ...]) -> list[Mapping[str, Any]]:
        from lm_eval.api.instance import Instance

        if plan.id not in self._tasks:
            self._tasks[plan.id] = open_task(plan.lm_task, plan.folder, f"task {plan.task!r}")
        task, lm = self._tasks[plan.id], self._lm(candidate, plan)
        groups = [
            [
                Instance(kind, plan.docs[at], copy.deepcopy(arguments), i, (plan.lm_task, n, plan.repeats))
                for i, (kind, arguments) in enumerate(plan.requests[at])
            ]
            for n, at in enumerate(positions)
        ]
        instances = list(itertools.chain.from_iterable(groups))
        for kind in sorted({i.request_type for i in instances}):
            asked = [i for i in instances if i.request_type == kind for _ in range(plan.repeats)]
            for request, answer in zip(asked, getattr(lm, kind)(asked, disable_tqdm=True), strict=True):
                number = answer[0] if isinstance(answer, tuple) else answer
                if not isinstance(number, str) and not np.isfinite(number):
                    raise NonFinite(f"task {plan.task!r}: log-likelihoods are NaN or infinite")
                request.resps.append(answer)
        task._instances = instances
        task.apply_filters()
        name = plan.filter or next(iter(instances[0].filtered_resps))
        return [task.process_results(g[0].doc, [i.filtered_resps[name] for i in g]) for g in groups]

    def _lm(self, candidate: Scorable, plan: LmEvalPlan) -> Any:
        key = (plan.batch_size, plan.limit)
        if key not in self._wrapped or self._wrapped[key][0] is not candidate.model:
            self._wrapped[key] = candidate.model, _wrap(candidate, plan)
        return self._wrapped[key][1]


def _wrap(candidate: Scorable, plan: LmEvalPlan) -> Any:
    """lm-eval's model around the live one; its tokenizer is a copy, because it is given a padding token."""
    from lm_eval.models.huggingface import HFLM

    class Silent(HFLM):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **rest: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **rest)

    return Silent(
        pretrained=candidate.model,
        tokenizer=copy.deepcopy(candidate.tokenizer),
        batch_size=plan.batch_size,
        max_length=plan.limit,
    )


def _build(task: Any, docs: str | None, count: int, spec: LmEvalSpec, tokenizer: Any) -> list[list[Any]]:
    """lm-eval's requests of the first `count` documents, as its command line builds them."""
    if docs is not None:
        # lm-eval scores the docs of `test_split`, and keeps a doc out of its own examples where those are the same.
        task.config.test_split = getattr(task.config, f"{docs}_split")
        if task.fewshot_cfg.split is None and task.has_training_docs():
            task.fewshot_cfg.split = task.config.training_split
    if spec.num_fewshot is not None:
        task.set_config("num_fewshot", spec.num_fewshot)
    elif task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(FEWSHOT_SEED)

    def chat(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    with quiet():
        task.build_all_requests(
            limit=count,
            apply_chat_template=spec.apply_chat_template,
            fewshot_as_multiturn=spec.fewshot_as_multiturn,
            chat_template=chat if spec.apply_chat_template else None,
        )
    groups: list[list[Any]] = [[] for _ in range(count)]
    for instance in task.instances:
        groups[instance.doc_id].append(instance)
    return groups


def _length(request: Any, target: Target) -> int:
    """Tokens of one request with its answer."""
    first, *rest = request.args
    if request.request_type == ROLLING:
        return len(target.tokenizer(first)["input_ids"])
    if request.request_type == "loglikelihood":
        return len(target.tokenizer(first + rest[0])["input_ids"])
    return len(target.tokenizer(first)["input_ids"]) + int(rest[0].get("max_gen_toks", 256))


def _hash(folder: Path) -> str:
    """Hash of the YAML and Python files of a user's folder, by name and content."""
    hashes = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".yaml", ".py") and p.is_file()):
        hashes.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return hashes.hexdigest()
