"""The table of methods is consistent data."""

from __future__ import annotations

import re

import pytest

from evomerge.merge.methods import METHODS
from evomerge.recipe import check_value


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_consistent(name: str) -> None:
    """A row is found by its name, cites its paper, and its defaults are within its own ranges."""
    method = METHODS[name]

    assert method.name == name
    assert re.search(r"arXiv \d{4}\.\d{4,5}|doi 10\.\d+/", method.source)
    assert {*method.per_source, *method.per_block} == set(method.coefficients)
    assert "weight" in method.per_source
    assert not set(method.coefficients) & set(method.options)
    for c, x in method.coefficients.items():
        assert x.low <= x.default <= x.high
        check_value(method, c, x.default)
    for o, (default, allowed) in method.options.items():
        assert default in allowed
        check_value(method, o, default)


def test_promised_methods() -> None:
    """Linear, task arithmetic and TIES are there and verified."""
    assert {n: METHODS[n].status for n in ("linear", "task_arithmetic", "ties")} == dict.fromkeys(
        ("linear", "task_arithmetic", "ties"), "verified"
    )


def test_compositions_differ() -> None:
    """No two rows are the same composition of primitives."""
    rows = [(m.delta, m.sparsify, m.consensus, m.combine) for m in METHODS.values()]

    assert len(set(rows)) == len(rows)
