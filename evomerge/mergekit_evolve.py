"""Genome files of mergekit-evolve as experiments, to read, edit and run; what cannot be expressed is refused by key.

Format: docs/evolve.md of mergekit 0.1.5 and the classes behind it. A set of weights (and densities) for every run of
`layer_granularity` layers and every filter, CMA-ES over them, lm-eval tasks as what is good.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from evomerge.errors import UserError
from evomerge.hub import folder_of, named
from evomerge.library import located
from evomerge.manifest import RESERVED
from evomerge.schema import validated
from evomerge.yamlio import dump_yaml, load_yaml

COEFFICIENTS = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("weight",),
}
"""mergekit-evolve's methods that are searched here too, under the same names, and what it varies of them."""
FILTERS = {"self_attn": "attention", "mlp": "mlp"}
"""Substring of tensor names -> our module."""
OUTSIDE = {"name": "outside", "match": "all"}
"""What no group of layers holds: embedding, final norm, head."""
HIGHEST_WEIGHT = 1.5
MAX_CONFIG = 10_000_000


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Genome(_Part):
    models: tuple[str, ...] = Field(min_length=1)
    merge_method: str
    base_model: str | None = None
    tokenizer_source: str | None = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: tuple[str, ...] | None = None
    smooth: bool = False


class _Task(_Part):
    name: str
    weight: float = 1.0
    metric: str = "acc,none"


class _File(_Part):
    genome: _Genome
    tasks: tuple[_Task, ...] = Field(min_length=1)
    limit: int | None = Field(None, gt=0)
    num_fewshot: int | None = Field(None, ge=0)
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True

    @field_validator("tasks", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return [{"name": t} if isinstance(t, str) else t for t in value] if isinstance(value, list) else value


def is_genome_file(data: Any) -> bool:
    """True for what looks like a mergekit-evolve file."""
    return isinstance(data, dict) and {"genome", "tasks"} <= set(data)


def to_experiment(path: Path, name: str, include_path: Path | None = None) -> dict[str, Any]:
    """The experiment that a genome file describes, as plain data with absolute paths.

    `include_path` is mergekit-evolve's `--task-search-path`. Raises UserError naming the key that has no equivalent.
    """
    file = validated(_File, load_yaml(path), str(path))
    _refuse(file, str(path))
    models = _models(file.genome, path)
    return {
        "name": name,
        "models": {**models, "dtype": "bfloat16"},
        "search_space": _space(file.genome, models["base"], f"{path}: genome"),
        "fitness": {"tasks": [_task(t, file, include_path) for t in file.tasks]},
        "search": {"algorithm": "cma-es", "seed": 0, "sigma": 0.166667, "budget": {"evaluations": 100}},
        "workers": {"backend": "local", "count": 1, "device": "auto"},
    }


def to_yaml(experiment: Mapping[str, Any], source: str) -> str:
    """The experiment as a file, headed by what differs from mergekit-evolve."""
    groups = experiment["search_space"]["groups"]
    notes = [
        f"From mergekit-evolve's {source}. Differences:",
        "- weights are bounded (there they are free, and their absolute value counts where they must not be negative);",
        "- candidates are scored on the search split (60% of the documents), not on all; the others choose the winner",
        "  and report on it;",
        "- tasks are averaged by their weights, not summed, which ranks alike.",
    ]
    if experiment["search_space"]["method"] == "dare_ties":
        notes.append("- masks are the same for every candidate (mask_seed), not drawn anew.")
    if not any("include_path" in t for t in experiment["fitness"]["tasks"]):
        notes.append(
            "- as there, tasks are searched on the documents that lm-eval reports on, which takes --allow-test-set; "
            "better is `data: training` in each task that has such documents."
        )
    if isinstance(groups, dict) or groups[-1] == OUTSIDE:
        notes.append(
            "- embedding, final norm and head have weights of their own (there: those of the first and the last slice)."
        )
    return "".join(f"# {line}\n" for line in notes) + dump_yaml(dict(experiment))


def _refuse(file: _File, where: str) -> None:
    """Raises UserError for keys whose meaning has no equivalent here."""
    g = file.genome
    if g.merge_method not in COEFFICIENTS:
        raise UserError(
            f"{where}: genome.merge_method: {g.merge_method!r} is not searched here; use {', '.join(COEFFICIENTS)}"
        )
    if g.base_model is None or (g.merge_method == "linear" and g.base_model in g.models):
        why = "differences to it are merged"
        if g.merge_method == "linear":
            why = "give one that is no model of the average; its config, tokenizer and baseline are needed all the same"
        raise UserError(f"{where}: genome.base_model: {g.base_model or 'missing'}; {why}")
    if g.merge_method == "slerp" and len({*g.models} - {g.base_model}) != 1:
        raise UserError(f"{where}: genome.models: slerp is between the base and one other model, got {list(g.models)}")
    for key, wrong, instead in (
        ("genome.smooth", g.smooth, "weights that are interpolated over layers; drop it, or use layer_granularity"),
        ("genome.tokenizer_source", g.tokenizer_source not in (None, "base"), "another tokenizer than the base's"),
        ("genome.normalize", g.normalize is True and g.merge_method == "task_arithmetic", "task_arithmetic divided by"
         " the sum of weights; drop it, or use linear"),
        ("shuffle", file.shuffle, "a shuffle; splits are cut by a hash of each document already"),
        ("random_init", file.random_init, "a random start; drop it"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"{where}: {key}: there is no equivalent of {instead}")
    for name in g.filters or ():
        if name not in FILTERS:
            raise UserError(f"{where}: genome.filters: only {' and '.join(FILTERS)} have an equivalent, got {name!r}")
    if any(t.weight == 0 for t in file.tasks):
        raise UserError(f"{where}: tasks: a weight of 0 has no equivalent; drop the task")


def _models(g: _Genome, path: Path) -> dict[str, Any]:
    """Base and experts with absolute folders or hub ids; experts are named by their last part."""
    assert g.base_model is not None
    models = [_model(m, path) for m in g.models]
    base = _model(g.base_model, path)
    experts: dict[str, str] = {}
    for model in models:
        if model == base:
            continue  # its difference to itself is nothing
        name = re.sub(r"[^A-Za-z0-9_-]", "-", Path(model.partition("@")[0]).name)
        if name in RESERVED:
            name += "-model"
        while name in experts:
            name += "-2"
        experts[name] = model
    if not experts:
        raise UserError(f"{path}: genome.models: only the base; name at least one other model")
    return {"base": base, "experts": experts}


def _model(name: str, path: Path) -> str:
    """A folder beside the file or, as mergekit takes it, in the working folder; else a hub id."""
    for place in (path.parent, Path.cwd()):
        folder = located(place, name)
        if folder.is_dir():
            return str(folder)
    model = named(path.parent, name)
    if Path(model).is_absolute():
        raise UserError(f"{path}: genome: {name!r} is neither a folder nor a model's id on the hub")
    return name


def _space(g: _Genome, base: str, where: str) -> dict[str, Any]:
    weight = {
        "low": -HIGHEST_WEIGHT if g.allow_negative_weights else 0.0,
        "high": HIGHEST_WEIGHT,
        "default": round(1 / len(g.models), 6),
    }
    if g.merge_method == "slerp":  # between the base and one other the weight is mergekit's t
        weight = {"low": 0.0, "high": 1.0, "default": 0.5}
    axes: dict[str, Any] = {"weight": weight}
    if "density" in COEFFICIENTS[g.merge_method]:
        axes["density"] = {"low": 0.0001, "high": 1.0, "default": 1.0}
    space: dict[str, Any] = {"method": g.merge_method, "groups": _groups(g, base, where), "axes": axes}
    if g.merge_method in ("linear", "ties"):
        space["params"] = {"normalize": True if g.normalize is None else g.normalize}
    if g.merge_method == "dare_ties":
        space["params"] = {"normalize": bool(g.normalize), "rescale": "l1"}
    return space


def _groups(g: _Genome, base: str, where: str) -> Any:
    """The sets of weights as groups of blocks; earlier groups come first, as earlier filters do."""
    modules = [FILTERS[f] for f in dict.fromkeys(g.filters or ())]
    if g.layer_granularity < 1:
        if not modules:
            return "all"
        return [*({"name": m, "match": {"module": m}} for m in modules), {"name": "rest", "match": "all"}]
    layers, step = _layers(base), g.layer_granularity
    if layers % step:
        raise UserError(f"{where}.layer_granularity: {step} does not divide the {layers} layers of {base}")
    if not modules:
        return {"buckets": layers // step}
    out: list[dict[str, Any]] = []
    for first in range(0, layers, step):
        run = [first, first + step - 1]
        at = f"layers.{run[0]}-{run[1]}"
        out += [{"name": f"{at}.{m}", "match": {"layers": run, "module": m}} for m in modules]
        out.append({"name": f"{at}.rest", "match": {"layers": run}})
    return [*out, OUTSIDE]


def _layers(model: str) -> int:
    """Of a folder, or of a hub's model, which is fetched for that: a run needs it all the same."""
    path = folder_of(model) / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise ValueError("too large")
        layers = json.loads(path.read_text(encoding="utf-8"))["num_hidden_layers"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: names no number of layers ({type(e).__name__}: {e})") from None
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"{path}: num_hidden_layers should be a number of layers, got {layers!r}")
    return layers


def _task(task: _Task, file: _File, include_path: Path | None) -> dict[str, Any]:
    metric, _, chosen = task.metric.partition(",")
    twice = sum(t.name == task.name for t in file.tasks) > 1
    out: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9_.-]", "-", f"{task.name}-{metric}" if twice else task.name),
        "kind": "lm_eval",
        "task": task.name,
        "metric": metric,
        "weight": abs(task.weight),
        "apply_chat_template": file.apply_chat_template,
        "fewshot_as_multiturn": file.fewshot_as_multiturn,
    }
    if task.weight < 0:  # its way to say that lower is better
        out["metrics"] = {metric: "lower"}
    if chosen not in ("", "none"):
        out["filter"] = chosen
    for key in ("num_fewshot", "limit"):
        if (value := getattr(file, key)) is not None:
            out[key] = value
    if include_path is not None:
        out["include_path"] = str(include_path.resolve())
    return out
