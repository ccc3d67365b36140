"""`evomerge check`: compatibility, axes, items, memory and work of an experiment, before anything is spent."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

from evomerge.commit import TOGETHER
from evomerge.config import Experiment
from evomerge.licences import licence_of, remarks
from evomerge.manifest import Manifest
from evomerge.merge.methods import BANDS, METHODS, Method
from evomerge.merge.route import ROOM
from evomerge.pool import DTYPES, TORCH_DTYPES
from evomerge.prepare import Prepared, allowance_of, prepare
from evomerge.search import needs_of
from evomerge.tasks.base import NOTHING, Allowed


@dataclass(frozen=True)
class Check:
    """What `check` prints. Memory in bytes per worker, work per candidate on the search split.

    Tokens and operations are upper bounds, `seconds_at_least` a lower one; answers that models write lie between.
    """

    name: str
    experiment_id: str
    parameters: int
    layers: int
    experts: tuple[str, ...]
    dtype: str
    device: str
    stages: tuple[dict[str, Any], ...]
    items: dict[str, dict[str, int]]
    tokens_per_candidate: int
    least_tokens_per_candidate: int
    flop_per_candidate: float
    candidates: int | None
    memory_bytes: int
    seconds_at_least: float | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def check(experiment: Experiment, allow: Allowed = NOTHING) -> Check:
    """Check everything that `run` checks. Raises UserError with the first thing that is wrong."""
    prepared = prepare(experiment, allow=allow)
    items = prepared.items
    allowance = allowance_of(experiment.search.budget, prepared.experiment, items["search"])
    tokens = sum(p.tokens(p.splits["search"]) for p in prepared.plans.values())
    least = sum(p.least_tokens(p.splits["search"]) for p in prepared.plans.values())
    hops = [_hops(prepared, n) for n in range(len(prepared.stages))]
    per_token = 2.0 * _parameters(prepared.manifest, max(most for _, most in hops))
    least_per_token = 2.0 * _parameters(prepared.manifest, min(fewest for fewest, _ in hops))
    uncounted = [
        f"task {t.name!r}: what it computes is not known and not counted"
        for t in experiment.benchmarks
        if not prepared.plans[t.name].tokens(items["search"].tasks[t.name])
    ]
    total = allowance.total
    seconds = None
    sampled = []
    if experiment.search.items != "full":
        sampled.append(
            f"items are sampled: a candidate takes about {allowance.items_per_candidate} of the "
            f"{items['search'].count} at first; the work above is for all of them"
        )
        algorithms = [prepared.experiment.algorithm_of(stage)[0] for stage in prepared.stages]
        if any(needs_of(a).scope == "incumbents" for a in algorithms):
            sampled.append("who survives a generation is scored on the next one's items too, which counts")
    elif prepared.device == "cpu" and total is not None:
        seconds = total * least_per_token * least / _cpu_flops(experiment.workers.threads) / experiment.workers.count
    return Check(
        name=experiment.name,
        experiment_id=prepared.experiment_id,
        parameters=prepared.manifest.parameters,
        layers=prepared.manifest.layers[prepared.manifest.base],
        experts=tuple(sorted(n for n in prepared.manifest.hashes if n != prepared.manifest.base)),
        dtype=prepared.dtype,
        device=prepared.device,
        stages=tuple(_described(prepared, n) for n in range(len(prepared.stages))),
        items={s: {t: len(p) for t, p in i.tasks.items()} for s, i in items.items()},
        tokens_per_candidate=tokens,
        least_tokens_per_candidate=least,
        flop_per_candidate=per_token * tokens,
        candidates=total,
        memory_bytes=_memory(prepared),
        seconds_at_least=seconds,
        notes=(
            *prepared.notes,
            *uncounted,
            *sampled,
            *_shared(prepared, tokens),
            *remarks({n: licence_of(p) for n, p in prepared.folders.items()}),
        ),
    )


def _described(prepared: Prepared, n: int) -> dict[str, Any]:
    """What a stage searches, and with what."""
    algorithm, _ = prepared.experiment.algorithm_of(prepared.stages[n])
    return {"algorithm": algorithm, "proposes": needs_of(algorithm).proposes, **prepared.spaces[n].describe()}


def _hops(prepared: Prepared, n: int) -> tuple[int, int]:
    """How many layers the candidates of a stage have, at least and at most."""
    algorithm, options = prepared.experiment.algorithm_of(prepared.stages[n])
    if needs_of(algorithm).routes:
        bounds = options.bounds(prepared.manifest)
        return bounds.least, bounds.most
    layers = prepared.manifest.layers[prepared.manifest.base]
    least, most = prepared.spaces[n].describe().get("route", {}).get("hops", (layers, layers))
    return least, most


def _parameters(m: Manifest, hops: int) -> int:
    """Weights that a token meets in a model of so many layers of the pool."""
    layer = sum(t.size for b in m.blocks.values() if b.layer == 0 for t in b.tensors)
    return m.parameters + (hops - m.layers[m.base]) * layer


def _routed(prepared: Prepared) -> bool:
    algorithms = [prepared.experiment.algorithm_of(stage)[0] for stage in prepared.stages]
    return any(needs_of(a).routes for a in algorithms) or any("route" in s.describe() for s in prepared.spaces)


def _shared(prepared: Prepared, tokens: int) -> list[str]:
    """What a worker keeps for routes that begin alike: the states of all tokens behind each of a unit's forks."""
    m = prepared.manifest
    if not _routed(prepared):
        return []
    width = next(t.shape[1] for t in m.tensors if t.block == "embed")
    most = min(ROOM, (TOGETHER - 1) * tokens * width * TORCH_DTYPES[prepared.dtype].itemsize)
    return [f"routes that begin alike share hidden states, about {most / 2**20:,.0f} MiB at most in each worker"]


def _memory(prepared: Prepared) -> int:
    """Resident weights of one worker: the bank as stored, the buffer, and where needed sorted magnitudes and singular
    vectors (of those the most that they may be)."""
    m = prepared.manifest
    size = TORCH_DTYPES[prepared.dtype].itemsize
    methods: list[Method] = []
    for stage, space in zip(prepared.experiment.stages, prepared.spaces, strict=True):
        needs = needs_of(prepared.experiment.algorithm_of(stage)[0])
        methods += space.methods if needs.proposes == "genomes" else [METHODS[n] for n in needs.methods]
    sketches = m.elements if any(method.sparsify == "top_k" for method in methods) else 0
    if any(method.bands for method in methods):
        kept = 1 - 1 / len(BANDS)
        sides = [min(t.shape) for t in m.tensors if t.matrix]
        sketches += sum(side * math.ceil(kept * side) for side in sides)
    sources, stored = sum(map(m.elements_of, m.hashes)), DTYPES[max(m.tensors, key=lambda t: t.size).dtype].itemsize
    # Layers that a route goes through in another dtype than the stored one are copies.
    copies = sources * size if stored != size and _routed(prepared) else 0
    return sources * stored + m.elements * size + copies + 4 * len(m.experts) * sketches


def _cpu_flops(threads: int) -> float:
    """Operations per second of a matrix product here, a ceiling that small models stay well below."""
    import torch

    torch.set_num_threads(threads)
    a = torch.ones(512, 512)
    torch.mm(a, a)
    start = time.perf_counter()
    n = 0
    while time.perf_counter() - start < 0.05:
        torch.mm(a, a)
        n += 1
    return n * 2 * 512**3 / (time.perf_counter() - start)


def _range(name: str, bounds: list[Any]) -> str:
    if all(isinstance(b, str) for b in bounds):
        return f"{name} of {', '.join(bounds)}"
    return f"{name} in [{bounds[0]:g}, {bounds[1]:g}]"


def _route(r: dict[str, Any]) -> str:
    models = ", ".join(f"{name} ({layers} layers)" for name, layers in r["models"].items())
    what = {"indicator": "slots", "slices": "slices at most"}.get(r["encoding"], "layers")
    scales = {"slots": "a scale each", "pairs": "a scale for each pair of layers", "none": "no scales"}[r["scales"]]
    low, high = r["hops"]
    hops = f"{low}" if low == high else f"{low} to {high}"
    first = next(iter(r["models"]))
    text = (
        f"{r['encoding']} of {models}: {r['slots']} {what}, {scales}, {hops} hops, ends and both outer layers {first}'s"
    )
    if r["encoding"] == "indicator":
        text += f"; cma-es begins with {first} alone, random points take half of the slots"
    return text


def text(c: Check) -> str:
    """For people."""
    lines = [
        f"{c.name}: fits together ({c.experiment_id[:12]})",
        f"models   {c.parameters:,} parameters, {c.layers} layers, experts {', '.join(c.experts)}; "
        f"merged in {c.dtype} on {c.device}",
    ]
    for n, s in enumerate(c.stages, 1):
        if s["proposes"] == "recipes":
            lines.append(f"stage {n}  no axes: {s['algorithm']} mixes the models itself")
            continue
        over = f"{s['method']} over {s['groups']} groups of blocks" if s["groups"] else s["method"]
        lines.append(f"stage {n}  {s['axes']} axes, {over}")
        if "route" in s:
            lines.append(f"         {_route(s['route'])}")
        searched = ", ".join(_range(c, bounds) for c, bounds in s["bounds"].items())
        fixed = ", ".join(f"{c} {v}" if isinstance(v, str | bool) else f"{c} {v:g}" for c, v in s["fixed"].items())
        lines.append(f"         searched: {searched}" + (f"; fixed: {fixed}" if fixed else ""))
        names = s["names"]
        lines.append(f"         {', '.join(names[:4])}" + (f", ... {names[-1]}" if len(names) > 5 else ""))
    for split, tasks in c.items.items():
        lines.append(f"{split:<8} {sum(tasks.values())} items: " + ", ".join(f"{t} {n}" for t, n in tasks.items()))
    less = c.least_tokens_per_candidate < c.tokens_per_candidate or any("route" in s for s in c.stages)
    bound = "up to " if less else ""
    lines.append(
        f"work     {bound}{c.tokens_per_candidate:,} tokens, {c.flop_per_candidate / 1e9:,.1f} GFLOP per candidate, "
        + (f"{c.candidates} candidates" if c.candidates is not None else "limited by time or items")
    )
    lines.append(f"memory   {c.memory_bytes / 2**20:,.0f} MiB of weights per worker, activations apart")
    if c.seconds_at_least is not None:
        lines.append(f"time     at least {c.seconds_at_least:,.0f} s at this CPU's matrix-product speed")
    lines += [f"note     {n}" for n in c.notes]
    return "\n".join(lines)
