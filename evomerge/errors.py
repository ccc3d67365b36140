"""The two errors that reach the command line, and the wording helper they share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one line that says what was expected, what came and what to do next. Exit code 2."""


class RunError(RuntimeError):
    """Good input, but the work failed. One line, exit code 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest of `known`, else "; known: ..." (at most 12 names).

    Closest are those that the word is the beginning of.
    """
    names = sorted(known)
    close = [n for n in names if word and n.startswith(word)] or difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return "; known: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
