"""Run mergekit on a configuration and, if asked, compare its weights with a folder of ours.

Run it in the oracle environment (see requirements.txt beside this file):

    .venv-oracle/bin/python tests/oracle/run_mergekit.py CONFIG OUT [--compare FOLDER] [--tolerance 1e-6]

It does what `mergekit-yaml CONFIG OUT --no-write-model-card` does, on the CPU and offline. (For a relative
path of at most one slash, such as models/base, the model card asks the hub whether that is a repository;
offline this ends mergekit before it has written the tokenizer. A path that begins with ./ or / does not.)
Relative model paths in CONFIG are taken from the current folder, as mergekit takes them.

With --compare it prints the largest absolute difference of each tensor and exits 1 if one exceeds the
tolerance or is not a number, or if names, shapes or dtypes differ. 2: mergekit refused the configuration.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file


def merge(config: Path, out: Path) -> None:
    """Merge as mergekit-yaml would, without the model card."""
    merge_config = MergeConfiguration.model_validate(yaml.safe_load(config.read_text(encoding="utf-8")))
    options = MergeOptions(quiet=True, device="cpu", write_model_card=False)
    run_merge(merge_config, str(out), options=options)


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a folder's safetensors files, sharded or not."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"no safetensors file in {folder}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> bool:
    """Print one line a tensor, largest absolute difference first; true where all agree."""
    rows: list[tuple[float, str, str]] = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            rows.append((float("inf"), name, "only in " + ("FOLDER" if name in ours else "OUT")))
            continue
        left, right = ours[name], theirs[name]
        if left.shape != right.shape or left.dtype != right.dtype:
            what = f"OUT {right.dtype} {tuple(right.shape)}, FOLDER {left.dtype} {tuple(left.shape)}"
            rows.append((float("inf"), name, what))
            continue
        gap = (left.double() - right.double()).abs().max().item() if left.numel() else 0.0
        if math.isnan(gap):
            rows.append((float("inf"), name, "not a number"))
        else:
            rows.append((gap, name, ""))
    for gap, name, what in sorted(rows, key=lambda row: (-row[0], row[1])):
        print(f"{gap:.3e}  {name}  {what}".rstrip())
    worst = max(rows)[0]
    print(f"{len(rows)} tensors, largest difference {worst:.3e}, tolerance {tolerance:g}")
    return worst <= tolerance


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a mergekit YAML file")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write the merged model to")
    parser.add_argument("--compare", type=Path, metavar="FOLDER", help="folder holding our safetensors")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="largest difference (default: 1e-6)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        merge(arguments.config, arguments.out)
    except Exception as error:  # whatever mergekit raises, it is the configuration's fault here
        print(f"mergekit refused {arguments.config}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if arguments.compare is None:
        return 0
    same = compare(load_folder(arguments.compare), load_folder(arguments.out), arguments.tolerance)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
