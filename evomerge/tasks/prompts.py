"""Prompts of a task: template, text in front, few-shot examples, system turn and chat template. No tokenizer here.

Examples come from a file of their own. They are the same for every item, so that the tokens in front of all items stay
shared, and are chosen by a seeded hash of their content, so that the file's order does not matter. One that stands
among the task's items in any split, or shares its group with one, is never chosen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evomerge.errors import UserError
from evomerge.library import located
from evomerge.tasks.base import Item, Parsed, TaskSpec, item_digest, load_items, render
from evomerge.tasks.rows import Row


@dataclass(frozen=True)
class Shot:
    """One few-shot example: its rendered prompt and its answer."""

    prompt: str
    answer: str


class FewShot(BaseModel):
    """Worked examples in front of every prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(description="file with examples, read like the items; what is an item too is left out")
    count: int = Field(ge=1, le=64)
    seed: int = Field(0, description="another seed chooses other examples")
    answer: str | None = Field(
        None, description="template of an example's answer over its fields; default the right choice, or the target"
    )
    separator: str = Field("\n\n", description="between examples and in front of the prompt; unused in a chat")


class Prompted(TaskSpec):
    """A kind of task that puts its items to the model as text. Its contents have `prompt` and `shots`."""

    prefix: str = Field("", description="text in front of all else (in a chat: of the first user turn)")
    prompt: str = Field("{question}", description="template over the item's fields")
    few_shot: FewShot | None = Field(None, description="worked examples in front of every prompt")
    chat_template: bool = Field(False, description="put prompt and examples into the tokenizer's chat template")
    system: str | None = Field(None, description="text of the system turn of a chat")

    @model_validator(mode="after")
    def _a_chat(self) -> Prompted:
        if self.system is not None and not self.chat_template:
            raise ValueError("system: is a turn of a chat; set chat_template: true, or use prefix")
        return self

    def resolved(self, folder: Path) -> Prompted:
        """The same task with absolute files."""
        task = super().resolved(folder)
        assert isinstance(task, Prompted)
        if task.few_shot is None:
            return task
        few = task.few_shot.model_copy(update={"data": str(located(folder, task.few_shot.data))})
        return task.model_copy(update={"few_shot": few})

    def answer_of(self, content: Any) -> str:
        """The answer that a few-shot example shows, behind its prompt."""
        raise NotImplementedError

    def load(self, folder: Path) -> tuple[Item, ...]:
        """All items, each with the task's few-shot examples. Raises UserError, also where examples are too few."""
        items = load_items(self, folder)
        if self.few_shot is None:
            return items
        shots = self._shots(self.few_shot, folder, items)
        return tuple(replace(i, content=replace(i.content, shots=shots)) for i in items)

    def _shots(self, few: FewShot, folder: Path, items: tuple[Item, ...]) -> tuple[Shot, ...]:
        taken = {i.digest for i in items}
        groups = {i.group for i in items} - {None}
        found: dict[str, tuple[Row, Parsed]] = {}
        for row in self.rows(folder / few.data, f"task {self.name!r}, few_shot"):
            parsed = self.parse(row)
            digest = item_digest(parsed.identity)
            group = None if self.group_by is None else str(row.field(self.group_by, "group_by"))
            if digest not in taken and group not in groups:
                found.setdefault(digest, (row, parsed))
        if len(found) < few.count:
            raise UserError(
                f"task {self.name!r}, few_shot: {few.data} has {len(found)} examples that are no items of the task, "
                f"{few.count} were asked for; lower count, or give it a file of its own"
            )
        chosen = sorted(found, key=lambda d: hashlib.sha256(f"{few.seed}:{d}".encode()).digest())[: few.count]
        out = []
        for row, parsed in (found[d] for d in chosen):
            answer = self.answer_of(parsed.content) if few.answer is None else render(few.answer, row)
            out.append(Shot(parsed.content.prompt, answer))
        return tuple(out)
