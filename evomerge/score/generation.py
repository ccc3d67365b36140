"""Generation, greedy: what the model writes behind each prompt, and whether it is right.

transformers' generate runs one padded batch until its longest answer is done, and copies all keys and values at every
token. Here the tokens that all prompts share are run once per candidate, items of like length are decoded together,
rows that are done leave the batch, and keys and values are written into buffers that grow by blocks. Every row has its
own positions and its own mask, so each is decoded as if it were alone: the tokens are those of
`generate(do_sample=False)` on one item, but for ties in the last bits of logits.

A row ends with an end-of-text token, with a stop string in what it wrote, or after `max_tokens`. Repetition penalties
and other settings of generation_config.json do not apply; its end-of-text tokens do.

Columns, one value per item:
  exact_match  1 where the answer is one of the accepted ones (`tasks/generation.py`)
  tokens       tokens written, a closing end-of-text token apart
  stopped      1 where the model ended by itself, 0 where `max_tokens` cut it off
  extracted    1 where `extract` found an answer in it, right or wrong
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from evomerge.errors import UserError
from evomerge.score.attention import expanded, masks, prefix_cache, takes_branches, windows
from evomerge.score.model import NonFinite
from evomerge.score.plan import Plan, Scorable, Target, places
from evomerge.score.prompts import Prompter, check_lengths, shared_prefix
from evomerge.tasks.base import Item
from evomerge.tasks.generation import Extract, GenerationSpec, Normalise, counted, right

CACHE_TOKENS = 32_768
"""Keys and values that a batch may hold at most: 4 GiB for a model of 8B parameters with grouped queries in bf16."""
ROW_SHARE = 16
"""A batch has at most the plan's `batch_tokens` divided by this many rows."""
SLOW_ROWS = range(4, 16)
"""Batches that take a CPU longer than one of 16 rows: products with wide matrices fall on a slower path (`make bench`,
generation, answers that end early)."""
BLOCK = 64
"""Columns by which the buffers of keys and values grow."""
UNSEEN = 1 << 40
"""The position of padding: beyond all others, so that no row looks back at it."""


@dataclass(frozen=True)
class GenerationPlan(Plan):
    """A compiled generation task.

    `prefix` holds the tokens that all prompts share, shape (P,); `prompts` the others of each item, at least one.
    """

    prefix: NDArray[np.int32]
    prompts: tuple[NDArray[np.int32], ...]
    targets: tuple[tuple[str, ...], ...]
    max_tokens: int
    ends: tuple[int, ...]
    stop: tuple[str, ...]
    extract: Extract | None
    normalise: tuple[Normalise, ...]

    def content(self) -> list[Any]:
        """Every token, and all that answers are judged by."""
        tokens = [self.prefix.tolist(), [p.tolist() for p in self.prompts]]
        extract = None if self.extract is None else self.extract.model_dump()
        return [*tokens, self.targets, self.max_tokens, self.ends, self.stop, extract, self.normalise]

    def tokens(self, positions: Sequence[int]) -> int:
        """Tokens computed at most: every answer as long as it may be."""
        return self.least_tokens(positions) + len(positions) * (self.max_tokens - 1)

    def least_tokens(self, positions: Sequence[int]) -> int:
        """Tokens computed where every answer is empty: the prompts, the prefix once."""
        return len(self.prefix) + sum(len(self.prompts[i]) for i in positions)


@dataclass(frozen=True)
class Written:
    """What the model wrote for one item: tokens without the closing one, the text before the first stop string."""

    tokens: tuple[int, ...]
    text: str
    stopped: bool


class Generation:
    """Scorer of the kind `generation`."""

    stateless = False

    def compile(self, spec: GenerationSpec, items: tuple[Item, ...], target: Target) -> GenerationPlan:
        """Tokenise every prompt. Raises UserError naming items without tokens or without room for `max_tokens`."""
        prompter = Prompter(spec, target.tokenizer)
        rows = []
        for item in items:
            row = prompter.tokens(prompter.text(item.content))
            if not row:
                raise UserError(f"{item.where}: the prompt is empty and the tokenizer adds no token in front")
            rows.append(row)
        lengths = [(item, len(row) + spec.max_tokens) for item, row in zip(items, rows, strict=True)]
        what = f"of prompt and answer (max_tokens {spec.max_tokens}); lower max_tokens, or drop them"
        check_lengths(spec.name, lengths, target.limit, what)
        shared = shared_prefix(rows)
        return GenerationPlan(
            **places(spec, items, target.shape),
            prefix=np.array(rows[0][:shared], dtype=np.int32),
            prompts=tuple(np.array(r[shared:], dtype=np.int32) for r in rows),
            targets=tuple(i.content.targets for i in items),
            max_tokens=spec.max_tokens,
            ends=target.ends,
            stop=spec.stop,
            extract=spec.extract,
            normalise=spec.normalise,
        )

    def score(
        self, candidate: Scorable, plan: GenerationPlan, positions: tuple[int, ...]
    ) -> Mapping[str, NDArray[np.float32]]:
        """All columns for the items at `positions`. Raises NonFinite on NaN logits, SlowPattern."""
        written = self.write(candidate, plan, positions)
        match = [
            right(w.text, plan.targets[i], plan.extract, plan.normalise)
            for w, i in zip(written, positions, strict=True)
        ]
        return {
            "exact_match": np.array(match, dtype=np.float32),
            "tokens": np.array([len(w.tokens) for w in written], dtype=np.float32),
            "stopped": np.array([w.stopped for w in written], dtype=np.float32),
            "extracted": np.array([counted(w.text, plan.extract) is not None for w in written], dtype=np.float32),
        }

    def write(self, candidate: Scorable, plan: GenerationPlan, positions: tuple[int, ...]) -> list[Written]:
        """What the model writes for the items at `positions`, in their order. Raises NonFinite on NaN logits."""
        out: list[Written | None] = [None] * len(positions)
        with torch.inference_mode():
            if not takes_branches(candidate.model.config):
                return [alone(candidate, plan, i) for i in positions]
            past = prefix_cache(candidate.model, plan.prefix)
            for batch in batches(plan, positions):
                decoding = Decoding(candidate, plan, [positions[n] for n in batch], past)
                for n, written in zip(batch, decoding.run(), strict=True):
                    out[n] = written
        return [w for w in out if w is not None]


def batches(plan: GenerationPlan, positions: Sequence[int]) -> Iterator[list[int]]:
    """Indices into `positions` that are decoded together: like lengths, bounded keys and values, a fixed order."""
    order = sorted(range(len(positions)), key=lambda n: (len(plan.prompts[positions[n]]), positions[n]))
    fixed, rows = len(plan.prefix) + plan.max_tokens, max(plan.shape.batch_tokens // ROW_SHARE, 1)
    return grouped(order, lambda n: fixed + len(plan.prompts[positions[n]]), CACHE_TOKENS, rows)


def grouped(order: Sequence[int], size: Callable[[int], int], limit: int, rows: int) -> Iterator[list[int]]:
    """Cut `order`, in which `size` never falls, where rows times the largest size, or the rows alone, are too many."""
    group: list[int] = []
    for n in order:
        if group and (len(group) == rows or size(n) * (len(group) + 1) > limit):
            yield group
            group = []
        group.append(n)
    if group:
        yield group


class Decoding:
    """One batch from its prompts to its last token."""

    def __init__(self, candidate: Scorable, plan: GenerationPlan, items: Sequence[int], past: Any) -> None:
        self.model, self.plan, self.items = candidate.model, plan, items
        self.tails = [Tail(candidate.tokenizer, plan, i) for i in items]
        self.past = past
        self.rows = list(range(len(items)))  # which item each row of the batch is
        self.weight = next(candidate.model.parameters())
        self.windows = windows(candidate.model.config)

    def run(self) -> list[Written]:
        """What each row wrote, in the order of the items."""
        self._prompts()
        for left in reversed(range(self.plan.max_tokens)):
            tokens = self._choose()
            tails = [self.tails[i] for i in self.rows]
            on = [n for n, t in enumerate(tails) if not t.stopped and not t.add(tokens[n])]
            if not on or not left:
                break
            kept = self._worth_keeping(on)
            if len(kept) < len(tokens):
                self._keep(kept)
            self._step([tokens[n] for n in kept])
        return [t.written() for t in self.tails]

    def _prompts(self) -> None:
        """Run all prompts, as many in one pass as the plan's `batch_tokens` allow, into one cache."""
        prompts = [self.plan.prompts[i] for i in self.items]
        groups = grouped(range(len(prompts)), lambda n: len(prompts[n]), self.plan.shape.batch_tokens, len(prompts))
        logits, places, caches = zip(
            *(self._pass([prompts[n] for n in g], len(prompts[-1])) for g in groups), strict=True
        )
        self.logits, self.place = torch.cat(logits), torch.cat(places)
        self.at = self._tensor(np.array([len(self.plan.prefix) + len(p) for p in prompts]))
        layers = zip(*caches, strict=True)
        self.cache = Cache(layers=[Columns(*(torch.cat(x) for x in zip(*parts, strict=True))) for parts in layers])

    def _pass(
        self, prompts: Sequence[NDArray[np.int32]], longest: int
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits (B, V) behind some prompts, position (B, K) of every column, and keys and values of all layers.

        Padding stands at the left, to the width of these prompts while they run and to `longest` in what is returned:
        columns may stand in any order, so that one in front of the shared prefix does no harm.
        """
        front, width = len(self.plan.prefix), len(prompts[-1])
        tokens = np.zeros((len(prompts), width), dtype=np.int64)
        place, segment = np.zeros_like(tokens), np.full_like(tokens, -1)  # padding sees padding only
        columns = np.full((len(prompts), longest + front), UNSEEN)
        columns[:, longest - width : longest - width + front] = np.arange(front)
        for r, prompt in enumerate(prompts):
            n = len(prompt)
            tokens[r, width - n :], segment[r, width - n :] = prompt, 0
            place[r, width - n :] = columns[r, longest + front - n :] = np.arange(front, front + n)
        cache = DynamicCache() if self.past is None else expanded(self.past, len(prompts))
        logits = self.model(
            input_ids=self._tensor(tokens),
            attention_mask=masks(self.model.config, segment, place, front, self.weight),
            position_ids=self._tensor(place),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        missing = (0, 0, longest - width, 0)
        return logits, self._tensor(columns), [(pad(c.keys, missing), pad(c.values, missing)) for c in cache.layers]

    def _choose(self) -> list[int]:
        """The likeliest token of every row, the first one of a tie."""
        best, token = self.logits.max(dim=-1)  # on CPUs three times as fast as argmax
        if not bool(torch.isfinite(best).all()):
            raise NonFinite(f"task {self.plan.task!r}: logits are NaN or infinite")
        return [int(t) for t in token.tolist()]

    def _worth_keeping(self, on: list[int]) -> list[int]:
        """The rows that still write; on the CPU with ended ones up to a batch that is faster than theirs."""
        if self.weight.is_cuda or len(on) not in SLOW_ROWS or len(self.rows) < SLOW_ROWS.stop:
            return on
        ended = [n for n in range(len(self.rows)) if n not in on]
        return sorted([*on, *ended[: SLOW_ROWS.stop - len(on)]])

    def _keep(self, rows: list[int]) -> None:
        """Go on with some rows only."""
        self.rows = [self.rows[n] for n in rows]
        index = self._tensor(np.array(rows))
        self.place, self.at = self.place[index], self.at[index]
        for layer in self.cache.layers:
            layer.keep(index)

    def _step(self, tokens: list[int]) -> None:
        """One token further."""
        self.place = torch.cat([self.place, self.at[:, None]], dim=1)
        back = self.at[:, None] - self.place
        seen_by = {}
        for kind, window in self.windows.items():
            seen = (back >= 0) & (back < (window or UNSEEN))
            mask = torch.zeros(seen.shape, dtype=self.weight.dtype, device=seen.device)
            seen_by[kind] = mask.masked_fill_(~seen, torch.finfo(torch.float16).min)[:, None, None]
        self.logits = self.model(
            input_ids=self._tensor(np.array(tokens))[:, None],
            attention_mask=seen_by if len(seen_by) > 1 else next(iter(seen_by.values())),
            position_ids=self.at[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self.at = self.at + 1

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.weight.device)


class Columns(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in buffers with room to spare, each (B, heads, columns, width).

    transformers' own dynamic layer copies everything at every token.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.used = keys.shape[2]
        self._keys, self._values = keys, values
        self._show()

    def _show(self) -> None:
        self.keys, self.values = self._keys[:, :, : self.used], self._values[:, :, : self.used]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add columns; returns all that are in use."""
        end = self.used + key_states.shape[2]
        if end > self._keys.shape[2]:
            more = (0, 0, 0, max(BLOCK, key_states.shape[2]))
            self._keys, self._values = pad(self.keys, more), pad(self.values, more)
        self._keys[:, :, self.used : end] = key_states
        self._values[:, :, self.used : end] = value_states
        self.used = end
        self._show()
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows only."""
        self._keys, self._values = self._keys[rows], self._values[rows]
        self._show()


class Tail:
    """One row's answer as it grows: its tokens, and whether a stop string stands in its text."""

    def __init__(self, tokenizer: Any, plan: GenerationPlan, item: int) -> None:
        self.tokenizer, self.plan = tokenizer, plan
        # Decoders drop the blank in front of a text's first word; behind the prompt's last token it stays.
        self.anchor = int(plan.prompts[item][-1])
        self.tokens: list[int] = []
        self.stopped = False
        # Every token but a special one gives a byte or more, so a stop string lies within so many tokens.
        self.reach = max((len(s.encode()) for s in plan.stop), default=0) + 4

    def add(self, token: int) -> bool:
        """Take one more token; True where the answer ends with it."""
        if token in self.plan.ends:
            self.stopped = True
            return True
        self.tokens.append(token)
        if self.plan.stop:
            start = max(len(self.tokens) - self.reach, 0)
            text = self._text(self.tokens[start - 1] if start else self.anchor, self.tokens[start:])
            self.stopped = any(s in text for s in self.plan.stop)
        return self.stopped

    def written(self) -> Written:
        """The answer, cut in front of the first stop string."""
        text = self._text(self.anchor, self.tokens)
        cuts = [at for s in self.plan.stop if (at := text.find(s)) >= 0]
        return Written(tuple(self.tokens), text[: min(cuts)] if cuts else text, self.stopped)

    def _text(self, before: int, tokens: list[int]) -> str:
        """The text that `tokens` add behind the token `before`."""
        front, whole = (self._decode([before, *more]) for more in ([], tokens))
        return whole.removeprefix(front)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def alone(candidate: Scorable, plan: GenerationPlan, item: int) -> Written:
    """One item by transformers' own generate: for families whose masks and caches were not checked."""
    tail = Tail(candidate.tokenizer, plan, item)

    def finite(_tokens: Tensor, scores: Tensor) -> Tensor:
        if not bool(torch.isfinite(scores.max(dim=-1).values).all()):
            raise NonFinite(f"task {plan.task!r}: logits are NaN or infinite")
        return scores

    def ended(tokens: Tensor, _scores: Tensor) -> Tensor:
        return torch.tensor([tail.add(int(tokens[0, -1]))], device=tokens.device)

    row = np.concatenate([plan.prefix, plan.prompts[item]]).astype(np.int64)
    tokens = torch.from_numpy(row)[None].to(next(candidate.model.parameters()).device)
    candidate.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=plan.max_tokens, pad_token_id=0),
        logits_processor=[finite],
        stopping_criteria=[ended],
    )
    return tail.written()
