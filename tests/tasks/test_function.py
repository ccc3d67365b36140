"""Python functions as tasks: keys, paths and rows. What is called is tested in tests/score/test_function.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import UserError
from evomerge.schema import validated
from evomerge.tasks.function import FunctionSpec
from evomerge.tasks.rows import Row


def spec(**fields: object) -> FunctionSpec:
    data = {"name": "t", "kind": "python", "function": "f.py:score", "data": "x.jsonl", "metrics": {"a": "higher"}}
    return validated(FunctionSpec, {**data, **fields}, "task")


def test_files_are_found_beside_the_experiment(tmp_path: Path) -> None:
    """Function and data get absolute paths; a module's name stays."""
    there = spec(function="sub/f.py:score").resolved(tmp_path)
    module = spec(function="pack.mod:score").resolved(tmp_path)

    assert isinstance(there, FunctionSpec)
    assert isinstance(module, FunctionSpec)
    assert there.function == f"{tmp_path / 'sub/f.py'}:score"
    assert there.data == str(tmp_path / "x.jsonl")
    assert module.function == "pack.mod:score"


def test_the_first_metric_is_searched() -> None:
    """`metric` and `report_metric` default to it; others are known, with their direction."""
    task = spec(metrics={"a": "higher", "b": "lower"})

    assert (task.metric, task.report_metric) == ("a", "a")
    assert (task.sign("a"), task.sign("b")) == (-1.0, 1.0)
    assert spec(metrics={"a": "higher", "b": "lower"}, metric="b").report_metric == "b"
    with pytest.raises(UserError, match="unknown metric 'c'; known: a"):
        spec(metric="c")
    with pytest.raises(UserError, match=r"metrics\.a: .*'higher' or 'lower'"):
        spec(metrics={"a": "up"})
    with pytest.raises(UserError, match="metrics"):
        spec(metrics={})


def test_rows_are_alike_by_all_fields_but_the_id() -> None:
    """Copies with another id, order of keys or case count as one item; NaN is no JSON."""
    task = spec()
    one = task.parse(Row({"id": 1, "x": "A  b", "y": [1]}, "x:1", "x line 1"))
    two = task.parse(Row({"y": [1], "x": "a b", "id": 2}, "x:2", "x line 2"))

    assert one.identity == two.identity
    assert one.identity != task.parse(Row({"x": "a b", "y": [2]}, "x:3", "x line 3")).identity
    assert one.content == {"id": 1, "x": "A  b", "y": [1]}
    with pytest.raises(UserError, match="x line 4: holds NaN"):
        task.parse(Row({"x": float("nan")}, "x:4", "x line 4"))
