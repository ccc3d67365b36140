"""Canonical JSON, hashes and arrays as text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.canonical import canonical_json, decode_array, digest, encode_array

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(data=JSON)
def test_canonical_json_reads_back(data: Any) -> None:
    """The text is ASCII, reads back to equal data, and writing that again gives the same text."""
    text = canonical_json(data)

    assert text.isascii()
    assert json.loads(text) == data
    assert canonical_json(json.loads(text)) == text


def test_order_of_keys_does_not_matter() -> None:
    """Equal mappings give equal hashes; values and types change them."""
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(x) for x in ({"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": True}, {"a": None})}) == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_non_finite_numbers_are_refused(bad: Any) -> None:
    """NaN and infinities have no canonical JSON."""
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(bad)


@pytest.mark.parametrize(
    "array",
    [
        np.array([0.1, -0.0, np.nan, np.inf, -np.inf, 5e-324]),
        np.array([[1.5, 2.5], [np.nan, 3.0]], np.float32),
        np.array([2**62, -1], np.int64),
        np.zeros((0,)),
        np.zeros((3, 0), np.float32),
        np.arange(6.0).reshape(2, 3).T,
        np.arange(10.0)[::2],
        np.array([1.0, 2.0], ">f8"),
    ],
)
def test_arrays_are_exact(array: np.ndarray[Any, Any]) -> None:
    """An array survives JSON bit for bit in shape, type and content, from any memory layout; read-only."""
    back = decode_array(json.loads(canonical_json(encode_array(array))))

    assert back.shape == array.shape
    assert back.dtype.kind == array.dtype.kind
    assert back.tobytes() == np.ascontiguousarray(array).astype(back.dtype).tobytes()
    assert not back.flags.writeable


GOOD = encode_array(np.array([1.0, 2.0]))


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        "x",
        {},
        {**GOOD, "more": 1},
        {k: v for k, v in GOOD.items() if k != "shape"},
        {**GOOD, "dtype": "|O"},
        {**GOOD, "dtype": ["<f8"]},
        {**GOOD, "dtype": "<f2"},
        {**GOOD, "b64": "####"},
        {**GOOD, "b64": 3},
        {**GOOD, "b64": "AAAA"},
        {**GOOD, "shape": [3]},
        {**GOOD, "shape": [-1]},
        {**GOOD, "shape": 2},
        {**GOOD, "shape": ["2"]},
        {**GOOD, "shape": [2.0]},
        {**GOOD, "shape": [True, 2]},
        {**GOOD, "shape": [10**400]},
    ],
)
def test_foreign_arrays_are_refused(bad: Any) -> None:
    """Whatever encode_array did not write is a ValueError, and no object array is ever made."""
    with pytest.raises(ValueError, match=r"array|base64|buffer|reshape|padding|Only base64"):
        decode_array(bad)
