"""Bounded YAML: strangers' files are read without aliases, duplicate keys, deep nesting or surprises.

PyYAML's safe loader runs no code, but it expands alias bombs, keeps the last of two equal keys in silence
and reads `1e-3` as a string. All three are mended here, and the size is capped before parsing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import UserError

MAX_BYTES = 4_000_000
MAX_DEPTH = 40


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not accepted", problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH}", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} stands here twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 as PyYAML reads it wants a dot in every float; people write 1e-3.
_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(*_FLOAT)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text. Raises UserError naming `where`, line and column."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        at = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{at}: {e.problem}") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as e:
        # Beside YAMLError, PyYAML lets through whatever an explicit tag on a wrong value runs into (`!!bool x`).
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{where}: not readable as YAML ({reason})") from None


def load_yaml(path: Path) -> Any:
    """Read one YAML file of at most MAX_BYTES. Raises UserError in one line."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size} bytes of YAML; at most {MAX_BYTES} are read")
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(*_FLOAT)  # so that the text "1e3" is quoted


def dump_yaml(data: Any) -> str:
    """Write YAML that `parse_yaml` reads back to equal data: no aliases, keys in the given order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
