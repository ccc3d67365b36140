"""Perplexity of texts by rolling windows, as lm-evaluation-harness's `loglikelihood_rolling`.

A text is tokenised by itself, without special tokens, behind one prefix token (BOS, else end-of-text), and every
token of it is predicted exactly once. A text longer than a window goes through several: the first predicts as many
tokens as a window takes, each further one takes the last `context` tokens that are already predicted, or as many as
fit where it is the last, in front of new ones. Positions begin at 0 in every window.

Columns, one value per text (s is its summed log-probability in nats):
  bits_per_byte  -s / ln 2 / bytes of the text in UTF-8; independent of the tokenizer
  loss           -s / tokens

The mean of a column is the plain mean over texts: a short text counts as much as a long one. The value of a whole
corpus weighs texts by their bytes (or tokens); where that is wanted, cut the corpus into pieces of about one length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.errors import UserError
from evomerge.score.model import NonFinite, prefix_token
from evomerge.score.plan import Plan, Scorable, Target, places
from evomerge.tasks.base import Item
from evomerge.tasks.perplexity import PerplexitySpec

MAX_LOGITS = 2**26
"""Logits in memory at a time (256 MiB in fp32): 512 rows of a vocabulary of 128k."""


@dataclass(frozen=True)
class Window:
    """One input of L tokens and the last T of its predictions: `tokens` (L,), `targets` (T,), T <= L."""

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]


@dataclass(frozen=True)
class PerplexityPlan(Plan):
    """A compiled perplexity task: the windows of every text, and its length in bytes."""

    windows: tuple[tuple[Window, ...], ...]
    lengths: tuple[int, ...]

    def content(self) -> list[Any]:
        """Every token."""
        return [[[w.tokens.tolist(), w.targets.tolist()] for w in text] for text in self.windows] + [self.lengths]

    def tokens(self, positions: Sequence[int]) -> int:
        """Tokens computed for these texts."""
        return sum(len(w.tokens) for i in positions for w in self.windows[i])


class Perplexity:
    """Scorer of the kind `perplexity`."""

    stateless = True

    def compile(self, spec: PerplexitySpec, items: tuple[Item, ...], target: Target) -> PerplexityPlan:
        """Tokenise every text and cut it into windows.

        Raises UserError where a window is longer than the model takes, and for tokenizers without a token to begin
        with.
        """
        window = spec.window or target.limit
        if window > target.limit:
            raise UserError(f"task {spec.name!r}: window is {window} tokens; the model takes {target.limit}")
        if spec.context > window:
            raise UserError(f"task {spec.name!r}: context is {spec.context} tokens; the model takes {window}")
        first = prefix_token(target.tokenizer)
        if first is None:
            raise UserError(
                f"task {spec.name!r}: the tokenizer has neither a BOS nor an end-of-text token to begin with"
            )
        texts = []
        for item in items:
            # Not verbose: it would warn of texts longer than the model takes, which is what windows are for.
            ids = list(target.tokenizer(item.content.text, add_special_tokens=False, verbose=False)["input_ids"])
            if not ids:
                raise UserError(f"{item.where}: the text has no tokens")
            texts.append(tuple(rolling(ids, first, window, spec.context)))
        lengths = tuple(len(i.content.text.encode()) for i in items)
        return PerplexityPlan(**places(spec, items, target.shape), windows=tuple(texts), lengths=lengths)

    def score(
        self, candidate: Scorable, plan: PerplexityPlan, positions: tuple[int, ...]
    ) -> Mapping[str, NDArray[np.float32]]:
        """Both columns for the texts at `positions`. Raises NonFinite on NaN logits."""
        nats = self.nats(candidate.model, plan, positions)
        size = np.array([plan.lengths[i] for i in positions], dtype=np.float64)
        count = np.array([sum(len(w.targets) for w in plan.windows[i]) for i in positions], dtype=np.float64)
        return {
            "bits_per_byte": (nats / math.log(2) / size).astype(np.float32),
            "loss": (nats / count).astype(np.float32),
        }

    def mean_in_parts(
        self, candidate: Scorable, plan: PerplexityPlan, positions: tuple[int, ...], metric: str
    ) -> Iterator[Tensor]:
        """The mean of `loss` or `bits_per_byte` (see `score.plan.Differentiable`)."""
        if metric == "loss":
            units = [float(sum(len(w.targets) for w in plan.windows[i])) for i in positions]
        else:
            units = [plan.lengths[i] * math.log(2) for i in positions]
        for group in _batches(plan, positions):
            nats, owners = _token_nats(candidate.model, [w for _, w in group])
            if not bool(nats.isfinite().all()):
                raise NonFinite(f"task {plan.task!r}: log-probabilities are NaN or infinite")
            shares = np.array([1.0 / units[place] / len(positions) for place, _ in group])[owners]
            yield nats @ torch.from_numpy(shares).to(nats.device, nats.dtype)

    def nats(self, model: Any, plan: PerplexityPlan, positions: tuple[int, ...]) -> NDArray[np.float64]:
        """Minus the summed log-probability of every text, shape (n,)."""
        out = np.zeros(len(positions))
        with torch.inference_mode():
            for group in _batches(plan, positions):
                for place, nats in zip((p for p, _ in group), _run(model, [w for _, w in group]), strict=True):
                    out[place] += nats
        if not np.isfinite(out).all():
            raise NonFinite(f"task {plan.task!r}: log-probabilities are NaN or infinite")
        return out


def rolling(ids: Sequence[int], first: int, window: int, context: int) -> Iterator[Window]:
    """The windows of a text: inputs of at most `window` tokens, every token of the text a target exactly once."""
    whole = np.array([first, *ids], dtype=np.int32)
    done = 0
    while done < len(ids):
        fresh = window if done == 0 else window - context + 1
        end = min(done + fresh, len(ids))
        begin = max(end - window, 0)
        yield Window(whole[begin:end], whole[done + 1 : end + 1])
        done = end


def _batches(plan: PerplexityPlan, positions: tuple[int, ...]) -> Iterator[list[tuple[int, Window]]]:
    """Windows with their place in `positions`, by length, so that a batch pads little; in a fixed order."""
    windows = [(place, w) for place, i in enumerate(positions) for w in plan.windows[i]]
    group: list[tuple[int, Window]] = []
    for place, w in sorted(windows, key=lambda x: (len(x[1].tokens), x[0])):
        if group and len(w.tokens) * (len(group) + 1) > plan.shape.batch_tokens:
            yield group
            group = []
        group.append((place, w))
    if group:
        yield group


def _run(model: Any, windows: Sequence[Window]) -> list[float]:
    """Minus the summed log-probability of every window's targets."""
    nats, owners = _token_nats(model, windows)
    sums = np.bincount(owners, weights=nats.double().cpu().numpy(), minlength=len(windows))
    return [float(x) for x in sums]


def _token_nats(model: Any, windows: Sequence[Window]) -> tuple[Tensor, NDArray[np.int64]]:
    """Minus the log-probability of every target, shape (T,), fp32, and the window that each belongs to."""
    length = max(len(w.tokens) for w in windows)
    tokens = np.zeros((len(windows), length), dtype=np.int64)
    rows, targets, owners = [], [], []
    for n, w in enumerate(windows):
        tokens[n, : len(w.tokens)] = w.tokens  # padded behind, where no real token looks
        rows.append(n * length + np.arange(len(w.tokens) - len(w.targets), len(w.tokens)))
        targets.append(w.targets)
        owners.append(np.full(len(w.targets), n))
    device = next(model.parameters()).device
    output = model.base_model(input_ids=torch.from_numpy(tokens).to(device), use_cache=False)
    body = output.last_hidden_state
    hidden = body.reshape(-1, body.shape[-1])[torch.from_numpy(np.concatenate(rows)).to(device)]
    target = torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(device)
    step = max(1, MAX_LOGITS // model.config.vocab_size)
    parts = []
    for at in range(0, len(hidden), step):
        logits = _logits(model, output, hidden[at : at + step]).float()
        picked = logits.gather(1, target[at : at + step, None])[:, 0]
        parts.append(logits.logsumexp(dim=-1) - picked)
    return torch.cat(parts), np.concatenate(owners)


def _logits(model: Any, output: Any, hidden: Tensor) -> Tensor:
    """Logits (R, V) of rows (R, D) of the body's output: the model's own forward, with all it does behind its head."""
    body, done = model.base_model, dataclasses.replace(output, last_hidden_state=hidden[None])
    body.forward = lambda *_, **__: done
    try:
        return model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=hidden.device), use_cache=False).logits[0]
    finally:
        del body.forward  # the class's own is there again
