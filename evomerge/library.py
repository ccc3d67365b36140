"""Finds entries of the YAML libraries: the packaged copy first, then the checkout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evomerge.errors import UserError, nearest

KINDS = {
    "search_spaces": "search space",
    "fitness": "fitness",
    "fitness/presets": "preset",
    "experiments": "experiment",
}


def roots() -> Iterator[Path]:
    """Folders that may hold the libraries."""
    package = Path(__file__).resolve().parent
    yield package / "_library"
    yield package.parent


def entries(kind: str) -> dict[str, Path]:
    """Name -> file of every entry of one library."""
    out: dict[str, Path] = {}
    for root in roots():
        for path in sorted((root / kind).glob("*.yaml")):
            out.setdefault(path.stem, path)
    return out


def located(folder: Path, name: str) -> Path:
    """The absolute path of a name that a file in `folder` gives. Raises UserError for what is no path."""
    try:
        path = (folder / name).resolve()
        path.exists()  # complains of names that are too long
        return path
    except (ValueError, OSError, RuntimeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{name[:80]!r}: names no file ({reason})") from None


def find(kind: str, name: str, near: Path) -> Path:
    """An entry by library name, or a file: relative to the folder `near`, where it ends in .yaml or .yml.

    Raises UserError naming the nearest entry.
    """
    if name.endswith((".yaml", ".yml")):
        path = located(near, name)
        if not path.is_file():
            raise UserError(f"{KINDS[kind]}: no such file {path}")
        return path
    known = entries(kind)
    if name not in known:
        raise UserError(f"unknown {KINDS[kind]} {name!r}{nearest(name, known)}")
    return known[name]
