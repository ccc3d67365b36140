"""Presets: the keys of well-known benchmarks' tasks, by name; files of `fitness/presets`.

A preset's file has a `description` and the keys of its `task`. Where `variants` follow, each is a preset of its own,
`file-variant`: the same keys with some more or others, for example a language's words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from evomerge.errors import UserError, nearest
from evomerge.library import entries
from evomerge.schema import validated
from evomerge.yamlio import load_yaml

LIBRARY = "fitness/presets"


class PresetFile(BaseModel):
    """One file of presets. `task` and the variants are checked with the task that they become part of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    task: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]] = {}

    def names(self, stem: str) -> list[str]:
        """What the presets of this file are called."""
        return [f"{stem}-{v}" for v in self.variants] or [stem]


def preset_files() -> dict[str, tuple[PresetFile, Path]]:
    """Name of a file -> its content and path."""
    return {n: (validated(PresetFile, load_yaml(p), str(p)), p) for n, p in entries(LIBRARY).items()}


def presets() -> dict[str, dict[str, Any]]:
    """Name of a preset -> its keys."""
    out = {}
    for stem, (file, _) in preset_files().items():
        for name, more in zip(file.names(stem), file.variants.values() or ({},), strict=True):
            out[name] = {**file.task, **more}
    return out


def expanded(task: Any) -> Any:
    """A task's plain data with its preset's keys as defaults; what has no preset is returned as it came.

    The task is called like the preset where it has no name. Raises UserError for unknown presets.
    """
    if not isinstance(task, Mapping) or task.get("preset") is None:
        return task
    known, name = presets(), task["preset"]
    if not isinstance(name, str) or name not in known:
        family = [k for k in known if k.startswith(f"{name}-")]
        if family:
            raise UserError(f"preset {name!r} needs a language; choose one of {', '.join(family)}")
        raise UserError(f"unknown preset {name!r}{nearest(str(name), known)}")
    return {"name": name, **known[name], **{k: v for k, v in task.items() if k != "preset"}}
