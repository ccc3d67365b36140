"""Typed reading of strangers' data: pydantic's errors turned into one line that names the nearest key."""

from __future__ import annotations

import types
import typing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from evomerge.errors import UserError, nearest

T = TypeVar("T", bound=BaseModel)


def validated(model: type[T], data: Any, where: str) -> T:
    """Validate plain data. Raises UserError: `where`, the field's path, the rule, the value that came."""
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a mapping of keys, got {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as e:
        raise UserError(f"{where}: {_first_line(model, data, e)}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None


def _first_line(model: type[BaseModel], data: Any, error: ValidationError) -> str:
    # Unknown keys first: a misspelt key usually causes the other complaints. Last what a mapping gets to hear
    # where it could also have been a name ("should be a valid string").
    errors = sorted(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", _another_shape(e)))
    first = errors[0]
    at = ".".join(_place(first, data))
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        key = str(first["loc"][-1])
        return f"unknown key {at!r}{nearest(key, known)}"
    if first["type"] == "missing":
        return f"the key {at!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if "got" in message or isinstance(first["input"], dict | list) else f", got {first['input']!r}"
    text = f"{at}: {message}{got}" if at else f"{message}{got}"
    return " ".join(text.split())[:400]


def _another_shape(error: ErrorDetails) -> bool:
    shapes = ("string_type", "literal_error", "tuple_type", "model_type", "dict_type")
    return error["type"] in shapes and isinstance(error["input"], dict | list)


def _place(error: ErrorDetails, data: Any) -> list[str]:
    """The keys and positions that lead to the error. pydantic's own path also names the tried union members."""
    out: list[str] = []
    here, missing = data, error["type"] == "missing"
    for i, part in enumerate(error["loc"]):
        listed = isinstance(here, list | tuple) and isinstance(part, int) and part < len(here)
        if listed or (isinstance(here, dict) and part in here):
            here = here[part]
        elif not (missing and i == len(error["loc"]) - 1):
            continue
        out.append(str(part))
    return out


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> set[str]:
    """Names (aliases) of the fields of the model that stands at `path`; empty where there is none."""
    here: list[Any] = [model]
    for part in path:
        found = [
            m
            for t in here
            if isinstance(t, type) and issubclass(t, BaseModel)
            for name, field in t.model_fields.items()
            if part in (name, field.alias)
            for m in _members(field.annotation)
        ]
        tagged = [t for t in here if _kind(t) == part]
        # Positions in lists and keys of mappings are no fields: stay where we are.
        here = found or tagged or here
    out: set[str] = set()
    for t in here:
        if isinstance(t, type) and issubclass(t, BaseModel):
            out |= {f.alias or n for n, f in t.model_fields.items()}
    return out


def _kind(model: Any) -> Any:
    """The tag of a member of a tagged union, whose models say in a field `kind` what they are."""
    if not (isinstance(model, type) and issubclass(model, BaseModel)) or "kind" not in model.model_fields:
        return None
    values = typing.get_args(model.model_fields["kind"].annotation)
    return values[0] if len(values) == 1 else None


def _members(annotation: Any) -> list[Any]:
    """The model classes an annotation may hold: through unions, Annotated, mappings and sequences."""
    origin = typing.get_origin(annotation)
    if origin is None:
        return [annotation]
    if origin in (typing.Union, types.UnionType, typing.Annotated, dict, list, tuple) or isinstance(origin, type):
        return [m for a in typing.get_args(annotation) for m in _members(a)]
    return []
