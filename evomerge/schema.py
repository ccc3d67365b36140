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
    # Unknown keys first: a misspelt key usually causes the other complaints. Then the innermost: a list that is too
    # short for its bad entries says less. Last what a mapping gets to hear where it could also have been a name.
    # A key that another member of a union has is unknown to this one only.
    own = [e for e in error.errors() if not (e["type"] == "extra_forbidden" and _known_key(model, e))]
    errors = sorted(
        own or error.errors(),
        key=lambda e: (
            e["type"] != "extra_forbidden",
            -len(_place(e, data)),
            e["type"] == "missing",
            _another_shape(e),
        ),
    )
    first = errors[0]
    place = _place(first, data)
    at = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        key = str(first["loc"][-1])
        return f"unknown key {at!r}{nearest(key, known)}"
    if first["type"] == "missing":
        return f"the key {at!r} is missing"
    if _wanted(model, first):
        wanted = [w for e in errors if _place(e, data) == place if (w := _wanted(model, e))]
        text = f"expected {' or '.join(dict.fromkeys(wanted))}, got {_came(first['input'])}"
    else:
        text = first["msg"].removeprefix("Value error, ")
        if "got" not in text and not isinstance(first["input"], dict | list):
            text = f"{text}, got {first['input']!r}"
    return " ".join((f"{at}: {text}" if at else text).split())[:400]


def _known_key(model: type[BaseModel], error: ErrorDetails) -> bool:
    return str(error["loc"][-1]) in _fields_at(model, error["loc"][:-1])


def _another_shape(error: ErrorDetails) -> bool:
    shapes = ("string_type", "literal_error", "tuple_type", "model_type", "dict_type")
    return error["type"] in shapes and isinstance(error["input"], dict | list)


_RULES = {
    "string_type": "a text",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("dict_type", "mapping_type"), "a mapping, such as {{name: value}}"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list, such as [one, two]"),
    "literal_error": "{expected}",
    "union_tag_invalid": "one of {expected_tags} as {discriminator}",
    "union_tag_not_found": "a mapping with the key {discriminator}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "{min_length} or more entries",
    "too_long": "at most {max_length} entries",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
    "string_pattern_mismatch": "a text that matches {pattern}",
}
"""pydantic's kind of error -> what was expected, with places for its context."""


def _wanted(model: type[BaseModel], error: ErrorDetails) -> str | None:
    """What was expected in the place of an error, None where its own message says so."""
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"a mapping with keys such as {', '.join(list(_fields_at(model, error['loc']))[:6])}"
    rule = _RULES.get(error["type"])
    return None if rule is None else rule.format(**error.get("ctx", {}))


def _came(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return "nothing" if value is None else repr(value)


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


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> tuple[str, ...]:
    """Names (aliases) of the fields of the model that stands at `path`, in its order; empty where there is none."""
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
    models = [t for t in here if isinstance(t, type) and issubclass(t, BaseModel)]
    return tuple(dict.fromkeys(f.alias or n for t in models for n, f in t.model_fields.items()))


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
