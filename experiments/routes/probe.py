"""Accuracy of routes through the layers of train_pair.py's models, in plain torch and without a search.

    python experiments/routes/probe.py                              # ROUTES
    python experiments/routes/probe.py "add 0-9, attr 10" "base 0-5 5-11"

A route names a model, then the layers it takes from there, one number or a first and a last one; embedding and final
norm are the same in all models. Items are the first of the searching and selecting ones of each skill,
../quickstart/data/skill_*_cal.jsonl.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from train_pair import MODELS, QUICKSTART, STAGES, accuracy, load, read_items
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

# Whole models; a layer left out, one twice, two exchanged; a cut from one expert to the other; one found by trial.
ROUTES = [
    "base 0-11",
    *(f"{name} {layers}" for name in ("add", "attr") for layers in ("0-11", "0-4 6-11", "0-6 6-11", "0-5 7 6 8-11")),
    *(f"{one} 0-{cut - 1}, {other} {cut}-11" for cut in (6, 9) for one, other in (("add", "attr"), ("attr", "add"))),
    "add 0-3, base 4, add 5-9, attr 10",
]


def layers_of(route: str, models: Mapping[str, PreTrainedModel]) -> list[torch.nn.Module]:
    """The layers a route takes, in order."""
    taken: list[torch.nn.Module] = []
    for part in route.split(","):
        name, *spans = part.split() or [""]
        if name not in models:
            raise ValueError(f"expected one of {', '.join(models)}, got {name!r} in the route {route!r}")
        if not spans:
            raise ValueError(f"expected a model and its layers, as in 'add 0-11', got {part!r} in the route {route!r}")
        layers = models[name].model.layers
        for span in spans:
            found = re.fullmatch(r"(\d+)(?:-(\d+))?", span)
            if found is None:
                raise ValueError(f"expected layers as 4 or 0-11, got {span!r} in the route {route!r}")
            start, stop = int(found[1]), int(found[2] or found[1]) + 1
            if not 0 <= start < stop <= len(layers):
                raise ValueError(f"expected layers within 0-{len(layers) - 1}, got {span!r} in the route {route!r}")
            taken += layers[start:stop]
    return taken


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line a route; exit status 2 for bad input."""
    parser = argparse.ArgumentParser(description="Score routes through the layers of the base and the experts.")
    parser.add_argument("routes", nargs="*", default=ROUTES)
    parser.add_argument("--models", type=Path, default=MODELS, help="what train_pair.py wrote")
    parser.add_argument("--items", type=int, default=100, help="of each skill, default 100")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    skills = STAGES[0].skills
    try:
        models = {stage.name: load(options.models / stage.name)[0] for stage in STAGES}
        frame, tokenizer = load(options.models / STAGES[0].name)  # its layers give way to the route's
        taken = {route: layers_of(route, models) for route in options.routes}
        if options.items < 1:
            raise ValueError(f"expected a positive number, got --items {options.items}")
        items = {skill: read_items(QUICKSTART / f"data/skill_{skill}_cal.jsonl")[: options.items] for skill in skills}
    except (ValueError, OSError) as error:
        print(f"probe: {error}", file=sys.stderr)
        return 2
    print(f"| route | {' | '.join(skills)} |\n|{' --- |' * (len(skills) + 1)}")
    for route, layers in taken.items():
        frame.model.layers = torch.nn.ModuleList(layers)
        frame.config.num_hidden_layers = len(layers)
        shares = [f"{accuracy(frame, tokenizer, items[skill]):.3f}" for skill in skills]
        print(f"| {route} | {' | '.join(shares)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
