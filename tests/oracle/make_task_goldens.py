"""Write tests/goldens/tasks.json: what lm-eval's own task files and model class make of known rows and texts.

Prompts, choices and answers: the templates and functions of lm-eval's task files over the rows of
tests/assets/eval/*.hub.jsonl. Numbers: `loglikelihood_rolling` with small windows, and `loglikelihood` of sentences
behind an empty context, by HFLM on the quickstart's base model. Run it in the oracle environment:

    .venv-oracle/bin/python tests/oracle/make_task_goldens.py
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lm_eval
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import apply_template
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "tests" / "assets" / "eval"
TASKS = Path(lm_eval.__file__).parent / "tasks"
MODEL = ROOT / "experiments" / "quickstart" / "models" / "skills-base"

TEMPLATES = {  # preset -> lm-eval's task file
    "arc": "arc/arc_easy.yaml",
    "mmlu": "mmlu/default/_default_template_yaml",
    "blimp": "blimp/_template_yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "mgsm-de": "mgsm/direct/mgsm_direct_de.yaml",
    "mgsm-es": "mgsm/direct/mgsm_direct_es.yaml",
    "mgsm-zh": "mgsm/direct/mgsm_direct_zh.yaml",
}
TEXTS = (
    "Once upon a time there was a little girl named Lily. She had a big red ball and a dog. " * 3,
    "The dog sat.",
    "x",
    "Zürich, naïve, 漢字 and 🙂: bytes are no characters. " * 4,
)
ROLLING_WINDOWS = (16, 64)


class Loader(yaml.SafeLoader):
    """Task files name Python functions; they are looked up by hand below."""


Loader.add_constructor("!function", lambda loader, node: None)


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ASSETS / f"{name}.hub.jsonl").read_text(encoding="utf-8").splitlines()]


def rendered(template: Any, doc: dict[str, Any]) -> Any:
    return apply_template(template, doc) if isinstance(template, str) else template


def prompts() -> dict[str, list[dict[str, Any]]]:
    out: dict[str, list[dict[str, Any]]] = {}
    for name, file in TEMPLATES.items():
        task = yaml.load((TASKS / file).read_text(encoding="utf-8"), Loader)
        out[name] = []
        for doc in read(name):
            row: dict[str, Any] = {"prompt": rendered(task["doc_to_text"], doc)}
            if "doc_to_choice" in task:
                choices = task["doc_to_choice"]
                if isinstance(choices, str):
                    choices = listed(choices, doc)
                target = task["doc_to_target"]
                gold = doc[target] if target in doc else int(rendered(target, doc))
                row |= {"choices": choices, "gold": gold}
            else:
                row["target"] = rendered(task["doc_to_target"], doc)
            out[name].append(row)
    where = TASKS / "xcopa" / "utils.py"
    spec = spec_from_file_location("xcopa_utils", where)
    assert spec is not None
    assert spec.loader is not None
    xcopa = module_from_spec(spec)
    spec.loader.exec_module(xcopa)
    for language in ("it", "tr", "zh"):
        to_text = getattr(xcopa, f"doc_to_text_{language}")
        out[f"xcopa-{language}"] = [
            {"prompt": to_text(doc), "choices": xcopa.doc_to_choice(doc), "gold": doc["label"]}
            for doc in read(f"xcopa-{language}")
        ]
    return out


def listed(template: str, doc: dict[str, Any]) -> list[str]:
    """A template that renders to a list: its items as JSON, so that nothing is evaluated."""
    inner = template.strip().removeprefix("{{").removesuffix("}}").strip()
    return json.loads(apply_template("{{ (" + inner + ") | tojson }}", doc))


def numbers() -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    rolling = {}
    for window in ROLLING_WINDOWS:
        # Without add_bos_token lm-eval 0.4.13 puts BOS in front twice, once as prefix and once by the tokenizer.
        harness = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=window, add_bos_token=False
        )
        requests = [
            Instance(request_type="loglikelihood_rolling", doc={}, arguments=(t,), idx=i) for i, t in enumerate(TEXTS)
        ]
        rolling[str(window)] = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    pairs = [[row["sentence_good"], row["sentence_bad"]] for row in read("blimp")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=("", s), idx=i)
        for pair in pairs
        for i, s in enumerate(pair)
    ]
    answers = [float(f"{log_p:.7g}") for log_p, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    return {
        "texts": list(TEXTS),
        "rolling": {w: [float(f"{x:.7g}") for x in xs] for w, xs in rolling.items()},
        "blimp": [answers[i : i + 2] for i in range(0, len(answers), 2)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "goldens" / "tasks.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = {
        "meta": {n: version(n) for n in ("lm_eval", "transformers", "tokenizers", "torch")},
        "prompts": prompts(),
        "numbers": numbers(),
    }
    arguments.out.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
