"""An example of a Python function as a task: does the model write the right sum, and then stop?

Used by fitness/exact-sums.yaml. The contract is in evomerge/score/function.py.
"""

from __future__ import annotations

from typing import Any

MAX_TOKENS = 6


def score(model: Any, tokenizer: Any, items: list[dict[str, Any]]) -> dict[str, list[float]]:
    """exact: 1 where the greedy answer is the target and nothing else. tokens: how many were written."""
    tokenizer.padding_side = "left"  # the tokenizer is the function's own copy
    batch = tokenizer([item["question"] for item in items], padding=True, return_tensors="pt").to(model.device)
    written = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )[:, batch["input_ids"].shape[1] :]
    exact, tokens = [], []
    for item, row in zip(items, written.tolist(), strict=True):
        length = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
        answer = tokenizer.decode(row[:length])
        exact.append(float(length is not None and answer.strip() == item["target"]))
        tokens.append(float(MAX_TOKENS if length is None else length))
    return {"exact": exact, "tokens": tokens}
