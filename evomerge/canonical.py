"""One canonical JSON for everything that is hashed or journalled: sorted keys, no spaces, no NaN."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray


def canonical_json(data: Any) -> str:
    """Equal data gives equal text. Raises ValueError on NaN or infinity, TypeError on non-JSON types."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def digest(data: Any) -> str:
    """sha256 of the canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical_json(data).encode("ascii")).hexdigest()


def encode_array(array: NDArray[Any]) -> dict[str, Any]:
    """An array as JSON: little-endian bytes in base64, exact to the bit (NaN and infinities included)."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "dtype": little.dtype.str,
        "shape": list(little.shape),
        "b64": base64.b64encode(little.tobytes()).decode("ascii"),
    }


_DTYPES = {"<f4", "<f8", "<i8"}


def decode_array(data: Any) -> NDArray[Any]:
    """The inverse of `encode_array`, read-only. Raises ValueError on anything it did not write."""
    if not isinstance(data, dict) or str(data.get("dtype")) not in _DTYPES or set(data) != {"dtype", "shape", "b64"}:
        raise ValueError("not an encoded array")
    shape = data["shape"]
    if not isinstance(data["b64"], str) or not isinstance(shape, list):
        raise ValueError("not an encoded array")
    if not all(type(n) is int and 0 <= n < 2**48 for n in shape):  # True is an int, too
        raise ValueError(f"an encoded array of the shape {shape!r}")
    return np.frombuffer(base64.b64decode(data["b64"], validate=True), dtype=data["dtype"]).reshape(shape)
