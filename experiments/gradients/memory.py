"""Memory of a gradient beside that of a score: the quickstart's models, and a random Llama of 86 million parameters.

`python experiments/gradients/memory.py` writes memory.json beside this file. Every line is a process of its own, on the
CPU with one thread: a candidate is built, then what is resident is sampled every 2 ms while it is scored, or scored and
differentiated, on one batch of 1,024 tokens; with layers kept, or run again in the backward pass.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "quickstart" / "models"
LLAMA = {
    "vocab_size": 512,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(folder: Path, dtype: str, seed: int) -> str:
    """A random checkpoint with the quickstart's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).to(getattr(torch, dtype)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODELS / "skills-base" / file, folder / file)
    return str(folder)


def measure(base: str, expert: str, what: str) -> dict[str, Any]:
    """One candidate: seconds, and mebibytes beyond what is resident once it is built."""
    from evomerge import evaluate
    from evomerge.config import fitness_of, load
    from evomerge.objective import differentiated
    from evomerge.prepare import baselines, prepare
    from evomerge.proposal import ItemSet, Job, WorkUnit

    evaluate.RECOMPUTE_ABOVE = 0 if what == "recomputed" else 2**60
    data = str(HERE.parent / "quickstart" / "data" / "skill_attr_cal.jsonl")
    prepared = prepare(
        load(
            {
                "name": "memory",
                "models": {"base": base, "experts": {"x": expert}},
                "search_space": "per-layer",
                "fitness": {"tasks": [{"name": "attr", "data": data, "metric": "probability"}]},
                "search": {"algorithm": "adam", "budget": {"evaluations": 8}},
                "workers": {"backend": "inline", "device": "cpu"},
            }
        )
    )
    plan, at = prepared.plans["attr"], []
    longest = max(len(plan.trees[i].tokens) for i in plan.splits["search"])  # type: ignore[attr-defined]
    for i in plan.splits["search"]:
        if (len(at) + 1) * longest <= 1024:
            at.append(i)
    evaluator = prepared.evaluator()()
    recipe = baselines(prepared.manifest, prepared.dtype)["x"]
    warm = Job(0, 0, recipe, ItemSet("warm", {"attr": tuple(at[:1])}))
    evaluator.evaluate(WorkUnit(0, (warm,)))
    asked = () if what == "score" else differentiated(fitness_of(prepared.experiment))
    job = Job(0, 0, recipe, ItemSet("batch", {"attr": tuple(at)}), asked)

    process, peak, over = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not over.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    [(e, _)] = evaluator.evaluate(WorkUnit(1, (job,)))
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    assert e.ok, e.reason
    from evomerge.merge.gradient import activation_bytes

    size = 4 if prepared.dtype == "float32" else 2
    return {
        "parameters": prepared.manifest.parameters,
        "dtype": prepared.dtype,
        "what": what,
        "tokens": len(at) * longest,
        "mib": round((peak[0] - before) / 2**20, 1),
        "estimate_mib": round(activation_bytes(prepared.manifest, len(at) * longest, size) / 2**20, 1),
        "buffer_mib": round(prepared.manifest.elements * size / 2**20, 1),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    """All lines, one process each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pools = [(str(MODELS / "skills-base"), str(MODELS / "skills-add"))]
        for dtype in ("float32", "bfloat16"):
            pools.append(tuple(write_model(Path(folder) / f"{dtype}-{i}", dtype, i) for i in (0, 1)))
        for base, expert in pools:
            for what in ("score", "kept", "recomputed"):
                command = [sys.executable, __file__, base, expert, what]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps(rows[-1]), flush=True)
    (HERE / "memory.json").write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
