"""Write evomerge/tasks/test_sets.txt: digests of the questions of benchmark test sets, from copies of these sets.

    python experiments/test_sets.py FOLDER

FOLDER holds the files of SOURCES, JSON lines. The digests say nothing about the questions, so the list carries no
benchmark text; it holds these sets alone, and of some only the part that was at hand when it was written:

- MGSM de, en, es and zh: all 250 test questions each; the English ones are rows 0-249 of GSM8K's test set
- SVAMP: rows 0-299 of SVAMP.json. All 1,000 are a challenge set for evaluation (Patel et al. 2021); the train/test
  split of some copies came later
- ARC-Easy: rows 0-499 of the test set
- XCOPA it, tr and zh: the premises of the 500 test items each
- BLiMP: the grammatical sentences of 1,300 pairs, 100 of one paradigm for each of 13 phenomena
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from evomerge.tasks.test_sets import FILE, question_digest

SOURCES = {
    "MGSM de": ("mgsm_de.jsonl", "question"),
    "MGSM en (GSM8K test)": ("mgsm_en.jsonl", "question"),
    "MGSM es": ("mgsm_es.jsonl", "question"),
    "MGSM zh": ("mgsm_zh.jsonl", "question"),
    "SVAMP": ("svamp_300.jsonl", "question"),
    "ARC-Easy test": ("arc_easy_500.jsonl", "question"),
    "XCOPA it test": ("xcopa_it.jsonl", "question"),
    "XCOPA tr test": ("xcopa_tr.jsonl", "question"),
    "XCOPA zh test": ("xcopa_zh.jsonl", "question"),
    "BLiMP": ("blimp_100_per_term.jsonl", "good"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    lines, seen = [], set()
    for benchmark, (file, field) in SOURCES.items():
        lines.append(f"# {benchmark}")
        for line in (folder / file).read_text(encoding="utf-8").splitlines():
            digest = question_digest(json.loads(line)[field])
            if digest is not None and digest not in seen:
                seen.add(digest)
                lines.append(digest)
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{FILE}: {len(seen)} digests")


if __name__ == "__main__":
    main()
