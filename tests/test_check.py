"""`evomerge check`: what it counts."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.check import check, text
from evomerge.cli import main
from evomerge.config import load
from evomerge.errors import UserError
from evomerge.licences import NO_ADVICE
from evomerge.prepare import prepare


def test_counts_are_those_of_the_run(experiment_with: Callable[..., Any]) -> None:
    """Parameters, items, tokens, axes and candidates agree with what a run would prepare."""
    experiment = experiment_with()
    c, p = check(experiment), prepare(experiment)

    assert c.parameters == p.manifest.parameters
    assert c.items == {s: {"sums": n, "words": n} for s, n in (("search", 12), ("select", 6), ("report", 8))}
    assert c.candidates == 12
    (stage,) = c.stages
    assert (stage["method"], stage["groups"], stage["axes"]) == ("task_arithmetic", 1, 2)
    assert stage["names"] == [a.name for a in p.spaces[0].axes]
    assert stage["fixed"] == {"lambda": 1.0}
    assert c.experiment_id == p.experiment_id
    plan = p.plans["words"]
    words = len(plan.prefix) + sum(len(plan.trees[i].tokens) for i in plan.splits["search"])
    assert plan.tokens(plan.splits["search"]) == words < c.tokens_per_candidate
    assert c.seconds_at_least is not None
    assert json.loads(json.dumps(c.to_json()))["dtype"] == "float32"


def test_memory_counts_bank_buffer_and_sketches(experiment_with: Callable[..., Any]) -> None:
    """Three sources and one buffer of fp32; TIES adds sorted magnitudes of every expert."""
    plain = check(experiment_with())
    ties = check(experiment_with(**{"search_space.method": "ties"}))

    elements = prepare(experiment_with()).manifest.elements
    assert plain.memory_bytes == 4 * elements * 4
    assert ties.memory_bytes == plain.memory_bytes + 2 * elements * 4


def test_memory_counts_singular_vectors(experiment_with: Callable[..., Any]) -> None:
    """Of each expert's matrices, three quarters of the shorter side's square; CycleQD has them whatever the space."""
    plain = check(experiment_with())
    axes = {"search_space": {"method": "spectral", "axes": {"band_1": {"low": 0, "high": 1}}}}
    measures = [
        {"name": t, "tasks": [t], "metric": "accuracy", "low": 0, "high": 1, "cells": 4} for t in ("sums", "words")
    ]
    cycle = {"search.algorithm": "cycleqd", "search.population": 4, "fitness.measures": measures}

    # Of each of two layers: q, k, v, o with sides of 16 and 32, and three of the MLP.
    vectors = 2 * (2 * 32 * 24 + 2 * 16 * 12 + 3 * 32 * 24)
    assert check(experiment_with(**axes)).memory_bytes == plain.memory_bytes + 2 * vectors * 4
    assert check(experiment_with(**cycle)).memory_bytes == plain.memory_bytes + 2 * vectors * 4


def test_time_budgets_have_no_number_of_candidates(experiment_with: Callable[..., Any]) -> None:
    """Under a budget of minutes nothing is promised about candidates or seconds."""
    c = check(experiment_with(**{"search.budget": {"minutes": 1.0}}))

    assert (c.candidates, c.seconds_at_least) == (None, None)
    assert "limited by time" in text(c)


def test_text_names_what_people_look_for(experiment_with: Callable[..., Any], tiny_model: Any) -> None:
    """Models, items, work, memory and notes each have their line."""
    expert = tiny_model("llama", 1, name="noted")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (expert / file).unlink()
    lines = text(check(experiment_with(**{"models.experts.one": str(expert)}))).splitlines()

    assert [line.split()[0] for line in lines[:3]] == ["small:", "models", "stage"]
    assert lines[3].strip().startswith("searched: weight in [")
    assert "fixed: lambda 1" in lines[3]
    assert "one.all.weight, two.all.weight" in lines[4]
    assert "24 items: sums 12, words 12" in lines[5]
    assert any(line.startswith("note     expert 'one': no tokenizer files") for line in lines)


def test_licences_are_noted(
    experiment_with: Callable[..., Any], tiny_model: Any, quickstart: Path, tmp_path: Path
) -> None:
    """Unknown and conflicting licences of parents are notes; a pool that agrees has none."""
    base, expert = tiny_model("llama", name="free"), tiny_model("llama", 1, name="bound")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    (expert / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    notes = check(experiment_with(**{"models.base": str(base), "models.experts": {"x": str(expert)}})).notes
    unknown = check(experiment_with(**{"models.experts": {"x": str(expert)}})).notes

    assert notes == ("'x': cc-by-nc-4.0, so the whole merge is non-commercial", NO_ADVICE)
    assert unknown[0].startswith("licence of 'base' unknown")
    assert check(load(quickstart.parent / "quickstart.yaml")).notes == ()


def test_a_choice_of_methods_is_described(experiment_with: Callable[..., Any]) -> None:
    """The methods are named, sketches counted where one of them trims, and what none searches stands as fixed."""
    c = check(experiment_with(**{"search_space.method": ["dare_ties", "ties"]}))
    dare = check(experiment_with(**{"search_space.method": "dare_ties"}))

    assert "3 axes, dare_ties | ties over 1 groups" in text(c)
    assert "searched: method of dare_ties, ties, weight in [-0.5, 1.5]; fixed: density 1" in text(c)
    assert c.memory_bytes > dare.memory_bytes == check(experiment_with()).memory_bytes


def test_options_of_the_method_are_described(experiment_with: Callable[..., Any]) -> None:
    """What the space's params set stands among what is fixed, numbers and words."""
    c = check(experiment_with(**{"search_space.method": "dare_ties", "search_space.params": {"rescale": "l1"}}))

    assert "fixed: density 1, lambda 1, mask_seed 0, rescale l1" in text(c)


def test_objectives_over_several_units_are_noted(experiment_with: Callable[..., Any], small_experiment: Path) -> None:
    """A plain mean of accuracy and cross-entropy is allowed and told; with weights of their own it is meant so."""
    tasks = json.loads(small_experiment.read_text())["fitness"]["tasks"]
    mixed = [{**tasks[0], "metric": "accuracy"}, tasks[1]]
    weighted = [{**mixed[0], "weight": 2.0}, mixed[1]]

    [note] = [n for n in check(experiment_with(**{"fitness.tasks": mixed})).notes if n.startswith("fitness: ")]
    assert "loss adds different units (accuracy of sums, cross_entropy of words)" in note
    for fine in (tasks, weighted):
        assert not any("units" in n for n in check(experiment_with(**{"fitness.tasks": fine})).notes)


def test_layer_swapping_is_described(experiment_with: Callable[..., Any]) -> None:
    """Sources that are given are fixed, numbers of layers have bounds."""
    lines = text(check(experiment_with(search_space={"layer_swap": {"outer": "one", "embed": "base"}})))

    assert "5 axes, layer_swap over 2 groups" in lines
    assert "bottom in [0, 1]" in lines
    assert "fixed: outer one, embed base" in lines


def test_a_budget_too_small_for_its_stages(experiment_with: Callable[..., Any]) -> None:
    """Item evaluations that do not pay for one candidate are refused."""
    with pytest.raises(UserError, match="stage 1 gets no candidate"):
        check(experiment_with(**{"search.budget": {"item_evaluations": 20}}))


def test_check_touches_no_gpu(experiment_with: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device of cpu no CUDA call is made."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)

    assert check(experiment_with()).device == "cpu"


def test_adaptive_items_with_a_floor_are_noted(experiment_with: Callable[..., Any]) -> None:
    """A hinge is paid by chance on few items; without one, or with all items, there is nothing to say."""
    adaptive = {"search.items": {"policy": "adaptive", "start": 10}}
    hinge = {"fitness.floor": {"penalty": 3.0}}

    assert any("take a larger start" in n for n in check(experiment_with(**adaptive, **hinge)).notes)
    for fine in (adaptive, hinge):
        assert not any("larger start" in n for n in check(experiment_with(**fine)).notes)


def test_the_collector_is_back_after_check(capsys: pytest.CaptureFixture[str]) -> None:
    """The command turns the search for cyclic garbage off for itself only, also where it refuses something."""
    assert main(["check", "quickstrat"]) == 2
    assert gc.isenabled()
