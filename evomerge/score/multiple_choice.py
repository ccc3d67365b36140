"""Multiple choice by log-likelihood, compiled.

The usual way runs every (context, choice) pair as a padded sequence and computes logits at all positions.
Here the tokens that all contexts share (few-shot examples) are run once per candidate and kept as keys and
values, every context is run once with its choices as branches behind it (a 4-D attention mask and explicit
position ids, on stock transformers models), and only rows that predict an answer token reach the LM head.
The numbers are the same: checked against plain transformers in fp32.

Tokenisation is lm-evaluation-harness's: encode(context + choice) split behind len(encode(context)).

Columns, one value per item (s_c is the summed log-probability of choice c, in nats):
  accuracy       1 where s is largest at the right choice (the first one wins a tie)
  accuracy_norm  the same with s_c divided by the characters of the choice
  probability    softmax of s over the choices, at the right one
  cross_entropy  minus its logarithm
  answer_loss    minus s of the right choice per token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.errors import UserError
from evomerge.score.attention import expanded, masks, prefix_cache, takes_branches, windows
from evomerge.score.model import NonFinite, prefix_token
from evomerge.score.plan import Plan, Scorable, Target, places
from evomerge.score.prompts import Prompter, check_lengths, shared_prefix
from evomerge.tasks.base import Item
from evomerge.tasks.multiple_choice import MultipleChoiceSpec


@dataclass(frozen=True)
class ChoiceTree:
    """One item as a tree: the context once, every choice as a branch of its last token.

    `tokens`, `positions`, `segments` have one entry per input token, shape (L,): segment 0 is the context
    behind the shared prefix, segment c + 1 the branch of choice c. Scored are `targets` at `rows` (indices
    into the input tokens) for choice `owners`; a choice's log-probability is the sum over its targets.
    `lengths` are the choices' characters, by which `accuracy_norm` divides.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    segments: NDArray[np.int32]
    rows: NDArray[np.int32]
    targets: NDArray[np.int32]
    owners: NDArray[np.int32]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class ChoicePlan(Plan):
    """A compiled multiple-choice task. `prefix` holds the tokens that all contexts share, shape (P,)."""

    prefix: NDArray[np.int32]
    trees: tuple[ChoiceTree, ...]

    def content(self) -> list[Any]:
        """Every token."""
        rows = [
            [t.tokens.tolist(), t.segments.tolist(), t.rows.tolist(), t.targets.tolist(), t.lengths, t.gold]
            for t in self.trees
        ]
        return [self.prefix.tolist(), rows]

    def tokens(self, positions: Sequence[int]) -> int:
        """Tokens computed for these items, the prefix once."""
        return len(self.prefix) + sum(len(self.trees[i].tokens) for i in positions)


@dataclass(frozen=True)
class _Batch:
    """Trees padded to one length, ready for the device. Shapes: B rows, L tokens, P prefix tokens, R answer
    rows, T targets at most per choice, C choices over the whole batch."""

    tokens: Tensor  # (B, L)
    positions: Tensor  # (B, L)
    mask: Tensor | dict[str, Tensor]  # (B, 1, L, P + L), additive; by type of layer where a model has two
    answers: Tensor  # (R,) into B * L
    pick_rows: Tensor  # (C, T) into R
    pick_tokens: Tensor  # (C, T)
    pick_valid: Tensor  # (C, T) bool
    counts: tuple[int, ...]  # choices of each item
    order: tuple[int, ...]  # where each item stands in the caller's order


class MultipleChoice:
    """Scorer of the kind `multiple_choice`."""

    stateless = True

    def __init__(self) -> None:
        self._prepared: dict[tuple[Any, ...], tuple[_Batch, ...]] = {}

    # -- compile ------------------------------------------------------------------------------------------

    def compile(self, spec: MultipleChoiceSpec, items: tuple[Item, ...], target: Target) -> ChoicePlan:
        """Tokenise and lay out every item.

        Raises UserError naming the item where a choice adds no token, where an item is longer than the model's
        context, or where there is no end-of-text token to close choices with.
        """
        prompter = Prompter(spec, target.tokenizer)
        closing: list[int] = []
        if spec.end_of_text:
            if target.tokenizer.eos_token_id is None:
                raise UserError(f"task {spec.name!r}: end_of_text is set, but the tokenizer has no end-of-text token")
            closing = [int(target.tokenizer.eos_token_id)]
        contexts, answers = [], []
        for item in items:
            context, choices = _encode(prompter, item, closing)
            if not context:
                raise UserError(f"{item.where}: the prompt is empty and the tokenizer has no token to begin with")
            contexts.append(context)
            answers.append(choices)
        lengths = [len(c) + max(map(len, a)) for c, a in zip(contexts, answers, strict=True)]
        check_lengths(
            spec.name,
            list(zip(items, lengths, strict=True)),
            target.limit,
            "with its longest choice; shorten or drop them",
        )
        shared = shared_prefix(contexts)
        trees = tuple(_tree(c[shared:], a, shared, item) for c, a, item in zip(contexts, answers, items, strict=True))
        prefix = np.array(contexts[0][:shared], dtype=np.int32)
        return ChoicePlan(**places(spec, items, target.shape), prefix=prefix, trees=trees)

    # -- score --------------------------------------------------------------------------------------------

    def score(
        self, candidate: Scorable, plan: ChoicePlan, positions: tuple[int, ...]
    ) -> Mapping[str, NDArray[np.float32]]:
        """All columns for the items at `positions` of the plan. Raises NonFinite on NaN logits."""
        sums = self.choice_logprobs(candidate.model, plan, positions)
        return columns(sums, [plan.trees[i] for i in positions])

    def mean_in_parts(
        self, candidate: Scorable, plan: ChoicePlan, positions: tuple[int, ...], metric: str
    ) -> Iterator[Tensor]:
        """The mean of `probability`, `cross_entropy` or `answer_loss` (see `score.plan.Differentiable`).

        The shared prefix is run with every item: its keys and values depend on the weights, too.
        """
        model = candidate.model
        trees = tuple(_with_prefix(plan.prefix, plan.trees[i]) for i in positions)
        alone = replace(plan, prefix=plan.prefix[:0], trees=trees)
        branches = takes_branches(model.config)
        for batch in _batches(model, alone, tuple(range(len(trees)))):
            sums = _run(model, batch, None) if branches else _run_rows(model, batch, alone.prefix)
            if not bool(sums.isfinite().all()):
                raise NonFinite(f"task {plan.task!r}: log-probabilities are NaN or infinite")
            values = [_value(s, trees[p], metric) for s, p in zip(sums.split(batch.counts), batch.order, strict=True)]
            yield torch.stack(values).sum() / len(trees)

    def choice_logprobs(self, model: Any, plan: ChoicePlan, positions: tuple[int, ...]) -> list[NDArray[np.float64]]:
        """Per item the summed log-probability of every choice, shape (n_choices,), in nats."""
        key = (plan.id, positions, *windows(model.config))  # a layer route may have other types of layers
        if key not in self._prepared:
            if len(self._prepared) >= 16:
                self._prepared.clear()
            self._prepared[key] = tuple(_batches(model, plan, positions))
        out: list[NDArray[np.float64]] = [np.empty(0)] * len(positions)
        with torch.inference_mode():
            branches = takes_branches(model.config)
            past = prefix_cache(model, plan.prefix) if branches else None
            for batch in self._prepared[key]:
                whole = _run(model, batch, past) if branches else _run_rows(model, batch, plan.prefix)
                sums = whole.double().cpu().numpy()
                if not np.isfinite(sums).all():
                    raise NonFinite(f"task {plan.task!r}: log-probabilities are NaN or infinite")
                at = 0
                for n, place in zip(batch.counts, batch.order, strict=True):
                    out[place] = sums[at : at + n]
                    at += n
        return out


def columns(sums: Sequence[NDArray[np.float64]], trees: Sequence[ChoiceTree]) -> dict[str, NDArray[np.float32]]:
    """The metric columns (module docstring) from summed log-probabilities; each of shape (n_items,)."""
    rows = []
    for s, tree in zip(sums, trees, strict=True):
        norm = s / np.array(tree.lengths)
        log_p = s[tree.gold] - (s.max() + np.log(np.exp(s - s.max()).sum()))
        tokens = int(np.count_nonzero(tree.owners == tree.gold))
        rows.append(
            (
                float(int(np.argmax(s)) == tree.gold),
                float(int(np.argmax(norm)) == tree.gold),
                float(np.exp(log_p)),
                float(-log_p),
                float(-s[tree.gold] / tokens),
            )
        )
    table = np.array(rows, dtype=np.float32).reshape(-1, 5)
    names = ("accuracy", "accuracy_norm", "probability", "cross_entropy", "answer_loss")
    return {n: np.ascontiguousarray(table[:, i]) for i, n in enumerate(names)}


def _encode(prompter: Prompter, item: Item, closing: list[int]) -> tuple[list[int], list[list[int]]]:
    """lm-eval's pair encoding: trailing blanks of the context belong to the choice.

    Where nothing stands in front of the choices, the prefix token does.
    """
    context = prompter.text(item.content)
    stripped = context.rstrip()
    blanks = context[len(stripped) :]
    ids = prompter.tokens(stripped)
    first = prefix_token(prompter.tokenizer)
    bare = not ids
    if bare and first is not None:
        ids = [first]
    choices = []
    for text in item.content.choices:
        whole = prompter.tokens(stripped + blanks + text)
        if bare and whole[:1] != ids:
            whole = ids + whole
        answer = whole[len(ids) :] + closing
        if len(whole) <= len(ids):
            raise UserError(f"{item.where}: the choice {text!r} adds no token to the prompt")
        choices.append(answer)
    return ids, choices


def _tree(context: Sequence[int], choices: Sequence[Sequence[int]], offset: int, item: Item) -> ChoiceTree:
    """Lay one item out: context tokens, then each choice without its last token, which is only predicted."""
    tokens = list(context)
    positions = list(range(offset, offset + len(context)))
    segments = [0] * len(context)
    rows, targets, owners = [], [], []
    end = len(context) - 1
    for c, choice in enumerate(choices):
        at = end
        for step, token in enumerate(choice):
            rows.append(at)
            targets.append(token)
            owners.append(c)
            if step < len(choice) - 1:
                at = len(tokens)
                tokens.append(token)
                positions.append(offset + len(context) + step)
                segments.append(c + 1)
    return ChoiceTree(
        tokens=np.array(tokens, dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        segments=np.array(segments, dtype=np.int32),
        rows=np.array(rows, dtype=np.int32),
        targets=np.array(targets, dtype=np.int32),
        owners=np.array(owners, dtype=np.int32),
        lengths=tuple(len(c) for c in item.content.choices),
        gold=item.content.gold,
    )


def _value(sums: Tensor, tree: ChoiceTree, metric: str) -> Tensor:
    """One item's column as a scalar tensor, from the summed log-probabilities of its choices (n_choices,)."""
    right = sums[tree.gold]
    if metric == "answer_loss":
        return -right / int(np.count_nonzero(tree.owners == tree.gold))
    log_p = right - sums.logsumexp(dim=0)
    return log_p.exp() if metric == "probability" else -log_p


def _with_prefix(prefix: NDArray[np.int32], tree: ChoiceTree) -> ChoiceTree:
    """The tree that has the shared prefix (P,) as a part of its context."""
    p = len(prefix)
    return replace(
        tree,
        tokens=np.concatenate([prefix, tree.tokens]),
        positions=np.concatenate([np.arange(p, dtype=np.int32), tree.positions]),
        segments=np.concatenate([np.zeros(p, dtype=np.int32), tree.segments]),
        rows=tree.rows + p,
    )


def _batches(model: Any, plan: ChoicePlan, positions: tuple[int, ...]) -> Iterator[_Batch]:
    """Items by length, so that a batch pads little; ties by position, so that the order is fixed."""
    order = sorted(range(len(positions)), key=lambda i: (len(plan.trees[positions[i]].tokens), positions[i]))
    group: list[int] = []
    for i in order:
        length = len(plan.trees[positions[i]].tokens)
        if group and length * (len(group) + 1) > plan.shape.batch_tokens:
            yield _batch(model, plan, positions, group)
            group = []
        group.append(i)
    if group:
        yield _batch(model, plan, positions, group)


def _batch(model: Any, plan: ChoicePlan, positions: tuple[int, ...], group: list[int]) -> _Batch:
    trees = [plan.trees[positions[i]] for i in group]
    b, length = len(trees), max(len(t.tokens) for t in trees)
    tokens = np.zeros((b, length), dtype=np.int64)
    place = np.zeros((b, length), dtype=np.int64)
    segment = np.full((b, length), -1, dtype=np.int64)  # padding sees padding only
    answers: dict[int, int] = {}
    picks: list[list[tuple[int, int]]] = []
    for r, t in enumerate(trees):
        n = len(t.tokens)
        tokens[r, :n], place[r, :n], segment[r, :n] = t.tokens, t.positions, t.segments
        mine: list[list[tuple[int, int]]] = [[] for _ in t.lengths]
        for row, target, owner in zip(t.rows, t.targets, t.owners, strict=True):
            flat = answers.setdefault(r * length + int(row), len(answers))
            mine[int(owner)].append((flat, int(target)))
        picks += mine
    width = max(len(p) for p in picks)
    pick = np.zeros((2, len(picks), width), dtype=np.int64)
    valid = np.zeros((len(picks), width), dtype=bool)
    for c, p in enumerate(picks):
        pick[:, c, : len(p)] = np.array(p).T
        valid[c, : len(p)] = True
    weight = next(model.parameters())
    device = weight.device
    return _Batch(
        tokens=torch.from_numpy(tokens).to(device),
        positions=torch.from_numpy(place).to(device),
        mask=masks(model.config, segment, place, len(plan.prefix), weight),
        answers=torch.tensor(list(answers), device=device),
        pick_rows=torch.from_numpy(pick[0]).to(device),
        pick_tokens=torch.from_numpy(pick[1]).to(device),
        pick_valid=torch.from_numpy(valid).to(device),
        counts=tuple(len(t.lengths) for t in trees),
        order=tuple(group),
    )


def _run(model: Any, batch: _Batch, past: Any) -> Tensor:
    """Summed log-probability of every choice of the batch, shape (C,), fp32."""
    logits = _answer_logits(
        model,
        batch.answers,
        input_ids=batch.tokens,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        past_key_values=None if past is None else expanded(past, len(batch.tokens)),
        use_cache=past is not None,
    )
    total = logits.logsumexp(dim=-1)
    picked = logits[batch.pick_rows, batch.pick_tokens] - total[batch.pick_rows]
    return torch.where(batch.pick_valid, picked, 0.0).sum(dim=-1)


def _run_rows(model: Any, batch: _Batch, prefix: NDArray[np.int32]) -> Tensor:
    """The same for any causal model: one whole row a choice, padded behind, without mask, positions or cache."""
    length, room = batch.tokens.shape[1], batch.tokens.numel()
    tokens, answers = batch.tokens.cpu().reshape(-1), batch.answers.cpu()
    front = torch.from_numpy(prefix.astype(np.int64))
    rows = []
    for picks, valid in zip(batch.pick_rows.cpu(), batch.pick_valid.cpu(), strict=True):
        at = answers[picks[valid]]  # the last token of the context, then the choice's own
        start = int(at[0]) // length * length
        rows.append(torch.cat([front, tokens[start : int(at[0]) + 1], tokens[at[1:]]]))
    out = []
    wide = max(len(r) for r in rows)
    step = max(1, room // wide)
    for n in range(0, len(rows), step):
        part, valid = rows[n : n + step], batch.pick_valid[n : n + step]
        padded = torch.zeros(len(part), wide, dtype=torch.long)
        where = []
        for i, (row, count) in enumerate(zip(part, valid.sum(dim=1).tolist(), strict=True)):
            padded[i, : len(row)] = row
            where.append(torch.arange(len(row) - count, len(row)) + i * wide)
        device = batch.tokens.device
        logits = _answer_logits(model, torch.cat(where).to(device), input_ids=padded.to(device), use_cache=False)
        log_p = logits.gather(1, batch.pick_tokens[n : n + step][valid][:, None])[:, 0] - logits.logsumexp(dim=-1)
        sums = torch.zeros(valid.shape, dtype=log_p.dtype, device=device)
        sums[valid] = log_p
        out.append(sums.sum(dim=-1))
    return torch.cat(out)


def _answer_logits(model: Any, answers: Tensor, **inputs: Any) -> Tensor:
    """Logits (R, vocabulary), fp32, at the flat positions `answers` (R,) of the batch."""

    def answer_rows(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Through the head go only rows that predict an answer token; what the model does to logits
        # behind its head (scaling, soft caps) is elementwise and stays the model's own.
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[answers][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(answer_rows)
    try:
        logits: Tensor = model(**inputs).logits[0]
    finally:
        hook.remove()
    return logits.float()
