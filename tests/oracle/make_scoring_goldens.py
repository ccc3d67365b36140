"""Write tests/goldens/scoring.json: log-probabilities of answers by plain transformers and by lm-eval.

One forward a choice, batch 1, no padding, no cache, all logits, float32 weights; the log-softmax and the
sum over a choice's tokens are taken in float64. Run it in the oracle environment (see requirements.txt
beside this file), from the repository root:

    .venv-oracle/bin/python tests/oracle/make_scoring_goldens.py

tests/goldens/README.md describes the layout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ".venv-oracle/bin/python tests/oracle/make_scoring_goldens.py"
VERSIONS = ("transformers", "tokenizers", "lm_eval", "torch")
MODELS = ("skills-base", "skills-add")
TASKS = ("skill_add", "skill_attr", "skill_count")
TOLERANCE = 1e-4  # between the sums of lm-eval and of plain transformers, both float32

Item = dict[str, Any]


def seven(value: Any) -> Any:
    """Round every float inside to seven significant digits."""
    if isinstance(value, dict):
        return {key: seven(part) for key, part in value.items()}
    if isinstance(value, list):
        return [seven(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def read_items(path: Path, limit: int) -> list[Item]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(limit), strict=False)]


def encode_pair(tokenizer: Any, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Split the tokens of context + choice at the length of the context's own, after one BOS."""
    if context != context.rstrip():
        raise SystemExit(f"a context with trailing blanks would need lm-eval's rule for them: {context!r}")
    whole: list[int] = tokenizer.encode(context + choice, add_special_tokens=False)
    start: list[int] = tokenizer.encode(context, add_special_tokens=False)
    if whole[: len(start)] != start or len(whole) == len(start):
        raise SystemExit(f"the context's tokens do not begin those of {context + choice!r}")
    bos = tokenizer.bos_token_id
    if tokenizer.encode(context) != [bos, *start]:
        raise SystemExit("the tokenizer's own encoding does not begin with exactly one BOS")
    return [bos, *start], whole[len(start) :]


@torch.no_grad()
def token_log_probs(model: Any, context: list[int], continuation: list[int]) -> list[float]:
    """Score each token of the continuation."""
    ids = torch.tensor([context + continuation])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    rows = torch.log_softmax(logits[len(context) - 1 : -1].double(), dim=-1)
    return [row[token].item() for row, token in zip(rows, continuation, strict=True)]


def score_task(model: Any, tokenizer: Any, items: list[Item]) -> list[Item]:
    """Score every choice of every item, open and closed with EOS, each in a forward of its own."""
    scored = []
    for item in items:
        row: Item = {"id": item["id"], "gold": item["gold"], "choices": item["choices"]}
        for variant, end in (("open", []), ("closed", [tokenizer.eos_token_id])):
            logs = []
            for choice in item["choices"]:
                context, continuation = encode_pair(tokenizer, item["question"], choice)
                logs.append(token_log_probs(model, context, continuation + end))
            row[variant] = {"log_prob": [sum(log) for log in logs], "tokens": [len(log) for log in logs]}
        scored.append(row)
    return scored


def cross_check(harness: HFLM, items: list[Item], scored: list[Item]) -> float:
    """Add lm-eval's numbers for the open variant; return the largest difference from ours."""
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(item["question"], choice), idx=index)
        for item in items
        for index, choice in enumerate(item["choices"])
    ]
    answers = iter(harness.loglikelihood(requests, disable_tqdm=True))
    worst = 0.0
    for row in scored:
        theirs = [next(answers) for _ in row["choices"]]
        row["lm_eval"] = {
            "log_prob": [float(log_prob) for log_prob, _ in theirs],
            "greedy": [bool(greedy) for _, greedy in theirs],
        }
        pairs = zip(row["open"]["log_prob"], row["lm_eval"]["log_prob"], strict=True)
        worst = max(worst, *(abs(ours - other) for ours, other in pairs))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    quickstart = ROOT / "experiments" / "quickstart"
    parser.add_argument("--models", type=Path, default=quickstart / "models", help="folder of the models")
    parser.add_argument("--data", type=Path, default=quickstart / "data", help="folder of the task files")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "goldens" / "scoring.json")
    parser.add_argument("--items", type=int, default=20, help="first items of each task (default: 20)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    results: dict[str, dict[str, list[Item]]] = {}
    worst = 0.0
    for name in MODELS:
        folder = str(arguments.models / name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
        results[name] = {}
        for task in TASKS:
            items = read_items(arguments.data / f"{task}.jsonl", arguments.items)
            results[name][task] = score_task(model, tokenizer, items)
            gap = cross_check(harness, items, results[name][task])
            worst = max(worst, gap)
            print(f"{name} {task}: {len(items)} items, lm-eval differs by at most {gap:.2g}")
    if worst > TOLERANCE:
        raise SystemExit(f"lm-eval and plain transformers differ by {worst:.3g}")

    meta = {
        "versions": {n: version(n) for n in VERSIONS} | {"python": platform.python_version()},
        "command": COMMAND,
        "attention": model.config._attn_implementation,
        "lm_eval": {"batch_size": 1, "add_bos_token": harness.add_bos_token, "device": "cpu"},
        "lm_eval_largest_difference": float(f"{worst:.1g}"),
    }
    text = json.dumps({"meta": meta, "models": seven(results)}, indent=1)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(f"{arguments.out.name}: {arguments.out.stat().st_size} bytes")
    print(json.dumps(meta))


if __name__ == "__main__":
    main()
