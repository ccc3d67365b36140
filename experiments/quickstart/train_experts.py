"""Train the quickstart's small experts from stories260K, or more of their kind.

One more expert of skills-base, here of two skills in equal parts (a skill named twice has twice the share):

    python experiments/quickstart/train_experts.py --to runs/words --skill rev --skill last --minutes 2

The whole set, the common ancestor from stories260K and then, from it, one expert a skill, as RECIPE says:

    python experiments/quickstart/train_experts.py --recipe --to runs/models

Training items are made on the fly. None has the question of a held-out item, by default those of every
data/skill_*.jsonl beside this script; the trained model is scored on the files that are not `*_cal`.
The same --seed and --steps give the same weights on the same machine and software. --minutes becomes a number
of steps once the warm-up is timed; the progress lines show it, and --steps with that number trains the same.

--from names another model to start from. An expert's learning rate is low, to keep it near its ancestor: with
2e-3 in place of 5e-4, attr came to .82 instead of .97, and rev after training on count to .39 instead of 1.0.
From stories260K itself, which has no skill to keep, take --lr 2e-3.

To add a skill, write one function and name it in SKILLS.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent
WARMUP = 100  # steps of rising learning rate, alike for every total: timing them can set the total
ASKED = 100  # generated items, never trained on, that the progress lines' accuracy is of
REPORTS = 20  # progress lines a run
QUESTION_WEIGHT = 0.1  # of its tokens in the loss; with 0 the base came out alike on two seeds

NAMES = ["Anna", "Ben", "Jack", "Lily", "Max", "Mia", "Sam", "Sue", "Tim", "Tom"]
COLORS = ["black", "blue", "brown", "green", "pink", "red", "white", "yellow"]
THINGS = ["bag", "ball", "book", "box", "car", "cup", "hand", "hat", "kite", "toy"]
WORDS = ["ball", "big", "bird", "box", "boy", "car", "cat", "dad", "day", "dog"]
WORDS += ["fish", "fun", "girl", "hat", "mom", "park", "red", "sun", "toy", "tree"]
OPPOSITES = ["big small", "day night", "fast slow", "happy sad", "hot cold", "up down"]

Skill = Callable[[random.Random], tuple[str, list[str]]]  # a question and its choices, the right one first


def add(rng: random.Random) -> tuple[str, list[str]]:
    """2+17=19; the wrong choices are off by one or by ten."""
    a, b = rng.randrange(50), rng.randrange(50)
    return f"{a}+{b}=", [str(a + b + slip) for slip in (0, -1, 1, 10)]


def attr(rng: random.Random) -> tuple[str, list[str]]:
    """Anna has a red hat. Tim has a pink car. What color is the car? It is pink; red is among the choices."""
    names, colors, things = rng.sample(NAMES, 2), rng.sample(COLORS, 4), rng.sample(THINGS, 2)
    facts = " ".join(f"{names[i]} has a {colors[i]} {things[i]}." for i in range(2))
    asked = rng.randrange(2)
    right = colors.pop(asked)
    return f"{facts} What color is the {things[asked]}? It is", [f" {color}" for color in (right, *colors)]


def count(rng: random.Random) -> tuple[str, list[str]]:
    """Look: cat bird cat cat bird. How many bird? There are 2; the wrong choices are the lowest three."""
    asked, other = rng.sample(WORDS, 2)
    right = rng.randint(1, 5)
    words = [asked] * right + [other] * rng.randint(1, 4)
    rng.shuffle(words)
    wrong = [n for n in range(1, 5) if n != right][:3]
    return f"Look: {' '.join(words)}. How many {asked}? There are", [f" {n}" for n in (right, *wrong)]


def rev(rng: random.Random) -> tuple[str, list[str]]:
    """Reverse: hat mom toy. Answer: toy mom hat."""
    a, b, c = rng.sample(WORDS, 3)
    orders = [(c, b, a), (a, b, c), (a, c, b), (b, a, c)]
    return f"Reverse: {a} {b} {c}. Answer:", [" " + " ".join(order) for order in orders]


def opp(rng: random.Random) -> tuple[str, list[str]]:
    """Lily said cold. Jack said day. The opposite of what Lily said is hot; day leads its pair."""
    (who, other), pairs = rng.sample(NAMES, 2), [pair.split() for pair in rng.sample(OPPOSITES, 2)]
    said, right = rng.sample(pairs[0], 2)
    question = f"{who} said {said}. {other} said {pairs[1][0]}. The opposite of what {who} said is"
    return question, [f" {word}" for word in (right, said, *pairs[1])]


def last(rng: random.Random) -> tuple[str, list[str]]:
    """List: sun, red, big. The last one is big; three to five words, the choices are the last four."""
    words = rng.sample(WORDS, rng.randint(3, 5))
    return f"List: {', '.join(words)}. The last one is", [f" {word}" for word in words[:-5:-1]]


SKILLS: dict[str, Skill] = {skill.__name__: skill for skill in (add, attr, count, rev, opp, last)}


@dataclass(frozen=True)
class Item:
    """One multiple-choice item, with the fields of the data files; `gold` is the right choice's index."""

    id: str
    task: str
    question: str
    choices: list[str]
    gold: int
    target: str


def normalised(question: str) -> str:
    """The same for questions that differ in case or blanks only."""
    return "".join(question.casefold().split())


def items(skills: Sequence[str], rng: random.Random, held_out: set[str]) -> Iterator[Item]:
    """Items without end, their skills drawn in equal parts, no normalised question in `held_out`."""
    for number in itertools.count():
        skill = rng.choice(skills)
        tries = (SKILLS[skill](rng) for _ in range(10_000))
        question, choices = next((new for new in tries if normalised(new[0]) not in held_out), (None, []))
        if question is None:
            raise ValueError(f"expected a new question of {skill}, got 10000 held-out ones; hold fewer out")
        right = choices[0]
        rng.shuffle(choices)
        yield Item(f"{skill}-{number}", skill, question, choices, choices.index(right), right.strip())


def read_items(path: Path) -> list[Item]:
    """The items of one data file."""
    try:
        return [Item(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected items like those of data/skill_add.jsonl in {path}: {error}") from error


def encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], question_weight: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (n, t) of BOS + question + answer + EOS, and the weights (n, t - 1) of the tokens after BOS.

    Answer and EOS weigh 1, the question `question_weight`, padding 0. Padding is on the right, where causal
    attention never looks back at it, so no mask is needed.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    heads = tokenizer([question for question, _ in pairs], add_special_tokens=False).input_ids
    texts = tokenizer([question + answer for question, answer in pairs], add_special_tokens=False).input_ids
    width = max(map(len, texts)) + 1
    ids = torch.tensor([[bos, *text] + [eos] * (width - len(text)) for text in texts])
    start = torch.tensor([[len(head)] for head in heads])
    end = torch.tensor([[len(text) + 1] for text in texts])
    place = torch.arange(width)
    return ids, torch.where(place < start, question_weight, 1.0) * (place < end)


def log_probs(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability (n, t - 1) of each token of `ids` (n, t) after the first."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Item]) -> float:
    """Share of items whose right choice, closed with EOS, has the highest summed log-probability."""
    right = 0
    for start in range(0, len(asked), 50):
        group = asked[start : start + 50]
        pairs = [(item.question, choice) for item in group for choice in item.choices]
        ids, weights = encode(tokenizer, pairs)
        scores = (log_probs(model, ids) * weights).sum(1).split([len(item.choices) for item in group])
        right += sum(int(score.argmax()) == item.gold for score, item in zip(scores, group, strict=True))
    return right / len(asked)


@dataclass(frozen=True)
class Stage:
    """One training run: which skills, and for how long; `minutes`, where given, goes before `steps`."""

    name: str
    skills: tuple[str, ...]
    steps: int = 2000
    minutes: float | None = None
    batch: int = 32
    lr: float = 5e-4


# The first stage starts from --from, every other one from the first one's result.
RECIPE = (
    Stage("skills-base", tuple(SKILLS), lr=2e-3),
    Stage("skills-add", ("add",), steps=4000),
    Stage("skills-attr", ("attr",), steps=2500),
    Stage("skills-count", ("count",), steps=2500),
)


def learning_rate(stage: Stage, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero at `steps`."""
    if step < WARMUP:
        return stage.lr * (step + 1) / WARMUP
    return stage.lr * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stage: Stage, held_out: set[str], seed: int
) -> None:
    """Train `model` in place on generated questions and their right answers, with progress on stderr.

    The model stays in eval mode: without dropout, the items are all that is random.
    """
    asked = list(itertools.islice(items(stage.skills, random.Random(f"{seed}-asked"), held_out), ASKED))
    held_out = held_out | {normalised(item.question) for item in asked}
    drawn = items(stage.skills, random.Random(f"{seed}-train"), held_out)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    steps = stage.steps if stage.minutes is None else sys.maxsize  # until the warm-up is timed
    done, seconds = 0, 0.0
    while done < steps:
        began = time.perf_counter()
        pairs = [(item.question, item.choices[item.gold]) for item in itertools.islice(drawn, stage.batch)]
        ids, weights = encode(tokenizer, pairs, QUESTION_WEIGHT)
        loss = -(log_probs(model, ids) * weights).sum() / weights.sum()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"expected a finite loss, got {loss.item()} at step {done}; lower --lr")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, done, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done, seconds = done + 1, seconds + time.perf_counter() - began
        if done == WARMUP and stage.minutes is not None:
            steps = max(WARMUP, round(60 * stage.minutes * WARMUP / seconds))
        if done % max(1, steps // REPORTS) == 0 or done == steps:
            share, left = accuracy(model, tokenizer, asked), seconds / done * (steps - done)
            line = f"step {done}/{steps} loss {loss.item():.3f} accuracy {share:.2f}, {left:.0f} s left"
            print(f"{stage.name}: {line}", file=sys.stderr, flush=True)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in float32, and tokenizer of a transformers folder; a name that is no folder asks no hub."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"expected a model folder with a config.json, got {folder}; name one with --from")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write a transformers folder, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        folder = Path(temporary) / target.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        os.replace(folder, target)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a small expert, or the quickstart's whole set.")
    origin = "default: skills-base, or stories260K for the recipe"
    parser.add_argument("--from", dest="source", type=Path, help=f"model to start from, {origin}")
    parser.add_argument("--to", dest="target", type=Path, required=True, help="new or empty folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--skill", dest="skills", action="append", choices=SKILLS, help="repeat for a mixture")
    what.add_argument("--recipe", action="store_true", help="the whole set, each model in its folder of --to")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"default {Stage.steps}, or the recipe's")
    length.add_argument("--minutes", type=float, help="about how long a model, in place of --steps")
    parser.add_argument("--batch", type=int, help=f"items a step, default {Stage.batch}")
    parser.add_argument("--lr", type=float, help=f"highest learning rate, default {Stage.lr} or the recipe's")
    parser.add_argument("--seed", type=int, default=0, help="of the generated items, default 0")
    files = sorted((HERE / "data").glob("skill_*.jsonl"))
    parser.add_argument("--held-out", type=Path, nargs="+", default=files, help="item files never trained on")
    return parser


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks; what is wrong with it raises ValueError before any training."""
    if not options.held_out:
        raise ValueError(f"expected held-out items in {HERE / 'data'}, got none; name files with --held-out")
    given = {name: getattr(options, name) for name in ("steps", "minutes", "batch", "lr")}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise ValueError(f"expected a positive number, got --{name} {value}")
    if options.recipe:
        targets = {options.target / stage.name: replace(stage, **given) for stage in RECIPE}
    else:
        targets = {options.target: Stage(options.target.name, tuple(options.skills), **given)}
    for target in targets:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise ValueError(f"expected a new or empty folder, got {target} with files; choose another --to")
    data = {path.stem: read_items(path) for path in options.held_out}
    held_out = {normalised(item.question) for group in data.values() for item in group}
    source = options.source or HERE / "models" / ("stories260K" if options.recipe else "skills-base")
    for target, stage in targets.items():
        model, tokenizer = load(source)
        train(model, tokenizer, stage, held_out, options.seed)
        save(model, tokenizer, target)
        reported = {name: group for name, group in data.items() if not name.endswith("_cal")}
        scores = [f"{name} {accuracy(model, tokenizer, group):.3f}" for name, group in reported.items()]
        print(f"{stage.name}: {', '.join(scores)}", flush=True)
        source = next(iter(targets))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 fine, 1 training failed, 2 bad input, 130 interrupted."""
    options = arguments().parse_args(argv)
    torch.set_num_threads(1)  # these shapes run slower with two, and one thread always adds in the same order
    transformers_logging.disable_progress_bar()
    try:
        run(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train_experts: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("train_experts: interrupted; the model in training was not written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
