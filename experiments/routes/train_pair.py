"""Train the deeper models that layer routes go through: a base of 12 layers and, from it, an expert of add and of attr.

    python experiments/routes/train_pair.py

Items, loss and schedule are those of ../quickstart/train_experts.py; no question of a data file there is trained on.
The same --seed gives the same weights on the same machine and software. What is different here:

Depth. To save the training of a dozen layers from scratch, the base is skills-base (5 layers) grown: behind each layer
stand one or two copies of it whose branches end in zeros (`o_proj`, `down_proj`), so that they change nothing before
they are trained. This is the block expansion of LLaMA Pro (arXiv 2401.02415), with all layers trained.

Stochastic depth (arXiv 1603.09382, unscaled as LayerDrop's, arXiv 1909.11556). In training each layer is left out of
each step with a chance of DROPPED. No layer can then rely on its neighbours, which is what a route asks: it skips
layers, repeats them and goes from one model into the other.

One embedding and one final norm. The experts keep the base's, so that a route through several models has no choice
to make at its ends, and their residual streams stay alike.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
sys.path.append(str(QUICKSTART))
from train_experts import Stage, accuracy, load, normalised, read_items, save, train  # noqa: E402

MODELS = Path("runs/route-models")
COPIES = (2, 3, 2, 3, 2)  # how often each layer of skills-base stands in the grown one: 12 in all
DROPPED = 0.2

# The first stage starts from the grown skills-base, every other one from the first one's result.
STAGES = (
    Stage("base", ("add", "attr", "count"), steps=400, lr=1e-3),
    Stage("add", ("add",), steps=1500, lr=1e-3),
    Stage("attr", ("attr",), steps=700, lr=1e-3),
)


@torch.no_grad()
def grow(model: PreTrainedModel, copies: Sequence[int]) -> None:
    """Put each layer there `copies` times, in place; all but the first of them add nothing to the residual stream."""
    layers = []
    for layer, number in zip(model.model.layers, copies, strict=True):
        layers.append(layer)
        for _ in range(number - 1):
            silent = copy.deepcopy(layer)
            silent.self_attn.o_proj.weight.zero_()
            silent.mlp.down_proj.weight.zero_()
            layers.append(silent)
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)


def drop_layers(model: PreTrainedModel, share: float, rng: random.Random) -> None:
    """From now on, wherever gradients are asked for, leave each layer out with the chance `share`."""

    def dropping(layer: torch.nn.Module) -> None:
        whole = layer.forward

        def forward(hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            return hidden if torch.is_grad_enabled() and rng.random() < share else whole(hidden, *args, **kwargs)

        layer.forward = forward

    for layer in model.model.layers:
        dropping(layer)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the base and the two experts that layer routes go through.")
    parser.add_argument("--to", dest="target", type=Path, default=MODELS, help=f"default {MODELS}")
    parser.add_argument("--steps", type=int, help="of every model, in place of the stages' own")
    parser.add_argument("--batch", type=int, default=Stage.batch, help=f"items a step, default {Stage.batch}")
    parser.add_argument("--dropped", type=float, default=DROPPED, help=f"chance of a layer, default {DROPPED}")
    parser.add_argument("--seed", type=int, default=0, help="of items and left-out layers, default 0")
    return parser


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks; what is wrong with it raises ValueError before any training."""
    for name in ("steps", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"expected a positive number, got --{name} {value}")
    if not 0 <= options.dropped < 1:
        raise ValueError(f"expected a chance from 0 to below 1, got --dropped {options.dropped}")
    stages = [replace(stage, steps=options.steps or stage.steps, batch=options.batch) for stage in STAGES]
    targets = [options.target / stage.name for stage in stages]
    for target in targets:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise ValueError(f"expected a new or empty folder, got {target} with files; choose another --to")
    data = {path.stem: read_items(path) for path in sorted((QUICKSTART / "data").glob("skill_*.jsonl"))}
    held_out = {normalised(item.question) for group in data.values() for item in group}
    for stage, target in zip(stages, targets, strict=True):
        first = target == targets[0]
        model, tokenizer = load(QUICKSTART / "models/skills-base" if first else targets[0])
        if first:
            grow(model, COPIES)
        else:
            model.model.embed_tokens.requires_grad_(False)
            model.model.norm.requires_grad_(False)
        drop_layers(model, options.dropped, random.Random(f"{options.seed}-dropped"))
        train(model, tokenizer, stage, held_out, options.seed)
        save(model, tokenizer, target)
        scores = [f"{skill} {accuracy(model, tokenizer, data[f'skill_{skill}']):.3f}" for skill in STAGES[0].skills]
        print(f"{stage.name}: {', '.join(scores)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 fine, 1 training failed, 2 bad input, 130 interrupted."""
    options = arguments().parse_args(argv)
    torch.set_num_threads(1)  # these shapes run slower with two, and one thread always adds in the same order
    transformers_logging.disable_progress_bar()
    try:
        run(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train_pair: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("train_pair: interrupted; the model in training was not written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
