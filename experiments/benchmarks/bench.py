"""Figures measured side by side with what they are compared with, in one process, written beside this file.

    make bench                       # all
    python experiments/benchmarks/bench.py build score      # some

Ratios count; absolute times belong to the machine that is named in the output. Every comparison also checks that
both sides computed the same thing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from evomerge.commit import alike
from evomerge.config import Experiment, load
from evomerge.manifest import Manifest, lay_out
from evomerge.merge.bank import Bank
from evomerge.merge.builder import Builder
from evomerge.merge.live import live_model
from evomerge.merge.methods import METHODS
from evomerge.merge.route import Router
from evomerge.pool import TORCH_DTYPES, ModelPool
from evomerge.prepare import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, Prepared, prepare
from evomerge.progress import Silent
from evomerge.proposal import ItemSet, Job, WorkUnit
from evomerge.recipe import Recipe
from evomerge.run import run, search
from evomerge.rundir import read_telemetry
from evomerge.score.generation import Generation
from evomerge.score.multiple_choice import ChoicePlan, ChoiceTree, MultipleChoice
from evomerge.score.plan import PlanShape, Scorable, Target
from evomerge.space import RuleSpace
from evomerge.tasks.base import Item
from evomerge.tasks.generation import GenerationSpec, Question
from evomerge.tasks.multiple_choice import Choices, MultipleChoiceSpec
from evomerge.workers.fake import FakeEvaluator

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
Row = dict[str, Any]


def timed(f: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds of a call by a clock, after one call that does not count."""
    f()
    seconds = []
    for _ in range(repeats):
        _synchronise()
        start = clock()
        f()
        _synchronise()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def side_by_side(
    f: Callable[[], object], g: Callable[[], object], repeats: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Median seconds of both, called in turn: what else the machine does falls on both alike."""
    f(), g()
    both: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for call, seconds in zip((f, g), both, strict=True):
            _synchronise()
            start = clock()
            call()
            _synchronise()
            seconds.append(clock() - start)
    return statistics.median(both[0]), statistics.median(both[1])


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


# -- a model of about 28 million parameters --------------------------------------------------------------------


def llama_config(vocabulary: int, layers: int, width: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def write_pool(folder: Path, experts: int, dtype: torch.dtype) -> tuple[ModelPool, Manifest]:
    """A random base and experts 1e-3 away from it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config(16384, 12, 384), dtype=dtype)
    model.save_pretrained(folder / "base")
    paths = {}
    for i in range(experts):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 1e-3)
        paths[f"e{i}"] = folder / f"e{i}"
        model.save_pretrained(paths[f"e{i}"])
    pool = ModelPool.open(folder / "base", paths)
    return pool, pool.manifest()


def build() -> list[Row]:
    """Building a candidate in place against a fresh state dict and load_state_dict; other methods against dense."""
    return [_build("float32"), _build("bfloat16")]


def _build(dtype: str) -> Row:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as temporary:
        pool, manifest = write_pool(Path(temporary), 3, TORCH_DTYPES[dtype])
        bank = Bank.load(pool, manifest, device())
        builder = Builder(bank, dtype)
        stored = {
            n: {t.name: c.tensor(t.name).to(device()) for t in manifest.tensors} for n, c in pool.checkpoints.items()
        }
        model = AutoModelForCausalLM.from_pretrained(Path(temporary) / "base", dtype=TORCH_DTYPES[dtype]).to(device())
    weights = itertools.cycle((0.3, 0.4))

    def seconds(method: str, repeats: int) -> float:
        # Two recipes in turn, so that every build changes every block.
        recipes = itertools.cycle([_recipe(method, w, dtype, manifest) for w in (0.3, 0.4)])
        return timed(lambda: builder.build(next(recipes)), repeats)

    def load_fresh() -> None:
        state = _fresh(stored, next(weights))
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)

    ours = seconds("task_arithmetic", 9)
    theirs = timed(load_fresh, 9)
    others = {m: seconds(m, 5) for m in ("ties", "dare_linear", "dare_ties", "slerp")}
    copy = timed(lambda: builder.buffer.copy_(bank.flat["base"]), 9)
    builder.build(_recipe("linear", 1.0, dtype, manifest))  # the copy above went behind the builder's back
    builder.build(_recipe("task_arithmetic", 0.3, dtype, manifest))
    views = builder.views()
    worst = max(float((views[k].float() - v.float()).abs().max()) for k, v in _fresh(stored, 0.3).items())
    return {
        "what": f"build, {manifest.parameters / 1e6:.1f}M parameters, 3 experts, {dtype}",
        "in place ms": ours * 1e3,
        "state dict + load_state_dict ms": theirs * 1e3,
        "ratio": theirs / ours,
        **{f"{m} ms": s * 1e3 for m, s in others.items()},
        **{f"{m} / dense": s / ours for m, s in others.items()},
        # Four vectors read and one written, against a copy's one and one.
        "share of copy bandwidth": 5 * copy / (2 * ours),
        "largest difference": worst,
    }


def _fresh(stored: dict[str, dict[str, torch.Tensor]], weight: float) -> dict[str, torch.Tensor]:
    """Task arithmetic by the book: a new state dict, fp32 inside."""
    out = {}
    for key, base in stored["base"].items():
        wide = base.float()
        total = wide.clone()
        for name, tensors in stored.items():
            if name != "base":
                total += weight * (tensors[key].float() - wide)
        out[key] = total.to(base.dtype)
    return out


def _recipe(method: str, weight: float, dtype: str, manifest: Manifest) -> Recipe:
    """All experts with one weight and density 0.5; of SLERP the first two, one of which has weight 1."""
    row = METHODS[method]
    coefficients = {"weight": weight, **({"density": 0.5} if "density" in row.coefficients else {})}
    sources = dict.fromkeys(manifest.experts, coefficients)
    if row.combine == "spherical":
        sources = {manifest.experts[0]: {"weight": 1.0}, manifest.experts[1]: coefficients}
    rule = {"method": method, "sources": sources}
    return Recipe.model_validate({"dtype": dtype, "merge": [rule]}).canonical(manifest)


# -- scoring ---------------------------------------------------------------------------------------------------


def score() -> list[Row]:
    """Our plan against padded batches with full logits, four multi-token choices, with a shared prefix and without."""
    return [_score(256), _score(0)]


def _live(config: Any) -> Any:
    """A live model with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        AutoModelForCausalLM.from_config(config).save_pretrained(temporary)
        pool = ModelPool.open(Path(temporary), {})
        manifest = pool.manifest()
        builder = Builder(Bank.load(pool, manifest, device()), "float32")
        model = live_model(Path(temporary), builder.views(), "float32")
    builder.build(Recipe.model_validate({"merge": []}).canonical(manifest))
    return model


def _score(prefix: int) -> Row:
    model = _live(llama_config(32000, 4, 384))
    items = _items(np.random.Generator(np.random.PCG64(0)), n=24, prefix=prefix, context=40, answer=6)
    plan = _plan(items, PlanShape(GPU_BATCH_TOKENS if device().type == "cuda" else CPU_BATCH_TOKENS))
    scorer = MultipleChoice()
    positions = tuple(range(len(items)))
    ours = timed(lambda: scorer.choice_logprobs(model, plan, positions), 3)
    theirs = timed(lambda: _padded(model, items), 3)
    pairs = zip(scorer.choice_logprobs(model, plan, positions), _padded(model, items), strict=True)
    return {
        "what": f"score, {len(items)} items, 4 choices of 6 tokens, prefix {prefix}, vocabulary 32000",
        "plan ms": ours * 1e3,
        "padded full logits ms": theirs * 1e3,
        "ratio": theirs / ours,
        "largest difference of a 6-token sum": max(float(np.abs(a - b).max()) for a, b in pairs),
    }


Tokens = list[int]


def _items(
    rng: np.random.Generator, n: int, prefix: int, context: int, answer: int, vocabulary: int = 32000
) -> list[tuple[Tokens, list[Tokens]]]:
    shared = rng.integers(3, vocabulary, prefix).tolist()
    out = []
    for _ in range(n):
        length = int(rng.integers(context // 2, context * 3 // 2))
        choices = [rng.integers(3, vocabulary, answer).tolist() for _ in range(4)]
        out.append((shared + rng.integers(3, vocabulary, length).tolist(), choices))
    return out


class _Words:
    """A tokenizer for numbers separated by blanks, so that token sequences can be chosen freely."""

    bos_token_id = None
    eos_token_id = None

    def decode(self, tokens: Tokens, **_: Any) -> str:
        return " ".join(map(str, tokens))

    def __call__(self, text: str) -> dict[str, Tokens]:
        return {"input_ids": [int(w) for w in text.split()]}


def _plan(items: list[tuple[Tokens, list[Tokens]]], shape: PlanShape) -> ChoicePlan:
    spec = MultipleChoiceSpec(name="bench", splits={"search": "-", "select": "-", "report": "-"})
    records = tuple(
        Item(
            str(i),
            "search",
            str(i),
            str(i),
            Choices(" ".join(map(str, c)), tuple(" " + " ".join(map(str, a)) for a in choices), 0),
        )
        for i, (c, choices) in enumerate(items)
    )
    return MultipleChoice().compile(spec, records, Target(_Words(), 2048, shape))


@torch.inference_mode()
def _padded(model: Any, items: list[tuple[Tokens, list[Tokens]]], batch: int = 8) -> list[np.ndarray]:
    """The usual way: every (context, choice) pair a padded row, logits at every position."""
    place = device()
    rows = [(c + a, len(c), len(a)) for c, choices in items for a in choices]
    sums: list[float] = []
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        longest = max(len(r[0]) for r in part)
        ids = torch.tensor([r[0] + [0] * (longest - len(r[0])) for r in part], device=place)
        mask = torch.tensor([[1] * len(r[0]) + [0] * (longest - len(r[0])) for r in part], device=place)
        logp = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        for i, (tokens, context, answer) in enumerate(part):
            span = torch.arange(context - 1, context + answer - 1)
            sums.append(float(logp[i, span, torch.tensor(tokens[context:])].sum()))
    return [np.array(sums[i * 4 : i * 4 + 4]) for i in range(len(items))]


# -- generation ------------------------------------------------------------------------------------------------


def generation() -> list[Row]:
    """Our greedy decoding against transformers' generate on the same batch, with a shared prefix and without."""
    return [_generation(prefix, ending) for ending in (False, True) for prefix in (256, 0)]


def _generation(prefix: int, ending: bool, n: int = 24, new: int = 64) -> Row:
    """`ending`: answers end by themselves somewhere before `new` tokens; else all are as long as they may be."""
    candidate = Scorable(_live(llama_config(32000, 4, 384)), _Words(), lambda: 0.0)
    rng = np.random.Generator(np.random.PCG64(0))
    rows = [c for c, _ in _items(rng, n=n, prefix=prefix, context=40, answer=1)]
    spec = GenerationSpec(
        kind="generation", name="bench", splits={"search": "-", "select": "-", "report": "-"}, max_tokens=new
    )
    items = tuple(
        Item(str(i), "search", str(i), str(i), Question(" ".join(map(str, r)), ("-",))) for i, r in enumerate(rows)
    )
    shape = PlanShape(GPU_BATCH_TOKENS if device().type == "cuda" else CPU_BATCH_TOKENS)
    positions = tuple(range(n))

    def compiled(ends: tuple[int, ...]) -> Any:
        return Generation().compile(spec, items, Target(_Words(), 2048, shape, ends))

    ends: tuple[int, ...] = ()
    if ending:  # tokens that the random weights write, until half of what was written is gone
        written = [list(w.tokens) for w in Generation().write(candidate, compiled(()), positions)]
        while sum(len(_until(w, ends)) for w in written) > n * new / 2:
            ends = (*ends, int(rng.choice(_until(written[int(rng.integers(n))], ends) or [0])))
    plan = compiled(ends)

    def ours() -> list[list[int]]:
        return [list(w.tokens) for w in Generation().write(candidate, plan, positions)]

    def theirs() -> list[list[int]]:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows], device=device())
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device())
        with torch.inference_mode():
            out = candidate.model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=new,
                eos_token_id=list(ends) or None,
                pad_token_id=0,
            )[:, longest:].tolist()
        return [_until(r, ends) for r in out]

    # Runs of seconds on a shared machine: the thread's own time, which others' work does not lengthen.
    clock = time.perf_counter if device().type == "cuda" else time.process_time
    fast, slow = side_by_side(ours, theirs, 5, clock)
    mine, other = ours(), theirs()
    return {
        "what": f"generate, {n} items, up to {new} tokens, {'ending early' if ending else 'all'}, prefix {prefix}",
        "ours ms": fast * 1e3,
        "generate ms": slow * 1e3,
        "ratio": slow / fast,
        "tokens": sum(map(len, mine)),
        "items with other tokens": sum(a != b for a, b in zip(mine, other, strict=True)),
    }


def _until(tokens: Tokens, ends: tuple[int, ...]) -> Tokens:
    return tokens[: next((i for i, t in enumerate(tokens) if t in ends), len(tokens))]


# -- the whole -------------------------------------------------------------------------------------------------


def demo() -> list[Row]:
    """`evomerge run quickstart`, start to table: wall time and the peak resident memory of all its processes."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "evomerge", "run", "quickstart", "--out", f"{temporary}/run", "--json"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - start
        assert process.stdout is not None
        result = json.loads(process.stdout.read())
        means = {s["model"]: s["score"] for s in result["table"] if s["task"] == "mean"}
        return [
            {"what": "quickstart, start to table", "s": seconds, "peak MiB": peak / 2**20}
            | {
                "winner": means["winner"],
                "best expert": max(v for k, v in means.items() if k not in ("winner", "base", "uniform")),
            }
        ]


def _resident(pid: int) -> int:
    try:
        main = psutil.Process(pid)
        return sum(p.memory_info().rss for p in [main, *main.children(recursive=True)])
    except psutil.Error:
        return 0


# -- the driver ------------------------------------------------------------------------------------------------


def overhead() -> list[Row]:
    """Driver and journal per candidate at 100 axes, with evaluations that cost nothing: ask to fsynced result."""
    return [_overhead(a, n) for a in ("cma-es", "random") for n in (100, 10_000)]


def _overhead(algorithm: str, candidates: int) -> Row:
    tensors = [(f"model.layers.{i}.mlp.w", (4, 4), "F32", f"layers.{i}.mlp") for i in range(50)]
    manifest = Manifest(
        "base", {"base": 50, "a": 50, "b": 50}, lay_out(tensors), {"base": "0" * 64, "a": "1" * 64, "b": "2" * 64}
    )
    experiment = Experiment.model_validate(
        {
            "name": "overhead",
            "models": {"base": "-", "experts": {"a": "-", "b": "-"}},
            "search_space": {"groups": "layers", "axes": {"weight": {"low": -0.5, "high": 1.5}}},
            "fitness": {"tasks": [{"name": "t", "splits": dict.fromkeys(("search", "select", "report"), "-")}]},
            "search": {"algorithm": algorithm, "budget": {"evaluations": candidates}, "finalists": 1, "probes": False},
            "workers": {"backend": "inline"},
        }
    )
    items = 100
    splits = {"search": tuple(range(items)), "select": (items,), "report": (items + 1,)}
    none = np.zeros(1, dtype=np.int32)
    tree = ChoiceTree(none, none, none, none, none, none, (1, 1), 0)
    names = tuple(map(str, range(items + 2)))
    plan = ChoicePlan("t", "multiple_choice", PlanShape(), names, splits, none[:0], (tree,) * (items + 2))
    space = RuleSpace(experiment.stages[0].space, manifest, "float32")
    prepared = _Overhead(experiment, manifest, "float32", {"t": plan}, (space,), "cpu", (), {})
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        search(prepared, Path(temporary) / "run", Silent(), accept_drift=False, interrupted=lambda: False)
        seconds = time.perf_counter() - start
        size = (Path(temporary) / "run" / "journal.jsonl").stat().st_size
    return {
        "what": f"driver and journal, {algorithm}, {len(space.axes)} axes, {candidates} candidates, {items} items",
        "ms per candidate": seconds / candidates * 1e3,
        "journal bytes per candidate": size / candidates,
    }


class _Overhead(Prepared):
    def evaluator(self) -> Any:
        return FakeEvaluator


# -- layer routes ----------------------------------------------------------------------------------------------


def routes() -> list[Row]:
    """A late population of a route search in units that share hidden states, against the same one by one."""
    with tempfile.TemporaryDirectory() as temporary:
        pool, manifest = write_pool(Path(temporary), 2, torch.float32)
        return [_routes(pool, manifest, "anywhere", 0), _routes(pool, manifest, "in the later half", 6)]


def _routes(pool: ModelPool, manifest: Manifest, where: str, first: int, candidates: int = 12) -> Row:
    builder = Builder(Bank.load(pool, manifest, device()), "float32")
    router = Router(live_model(pool.checkpoints["base"].path, builder.views(), "float32"), pool, builder)
    rng = np.random.Generator(np.random.PCG64(0))
    children: dict[str, Recipe] = {}
    while len(children) < candidates:
        hops = [{"from": ("base", "e0")[i % 2], "layer": i} for i in range(12)]
        at = int(rng.integers(first, 12))
        hops[at : at + 1] = ([], [{"from": "e1", "layer": at}], [hops[at]] * 2)[int(rng.integers(3))]
        child = Recipe.model_validate({"route": {"hops": hops}}).canonical(manifest)
        children[child.id] = child
    items = _items(np.random.Generator(np.random.PCG64(1)), n=12, prefix=0, context=40, answer=4, vocabulary=16384)
    plan = _plan(items, PlanShape(GPU_BATCH_TOKENS if device().type == "cuda" else CPU_BATCH_TOKENS))
    positions = tuple(range(len(items)))
    scorer = MultipleChoice()
    jobs = [Job(i, 0, r, ItemSet("search", {"bench": positions})) for i, r in enumerate(children.values())]
    units = alike(jobs)

    def scored(units: list[list[Job]]) -> dict[int, list[np.ndarray]]:
        out = {}
        for unit in units:
            for i, job in enumerate(unit):
                router.shared.expect(job.recipe.path, [j.recipe.path for j in unit[i + 1 :]])
                builder.build(job.recipe)
                router.follow(job.recipe)
                with router.sharing(plan.id):
                    out[job.proposal] = scorer.choice_logprobs(router.model, plan, positions)
            router.shared.clear()
        return out

    alone = [[j] for j in jobs]
    together, apart = scored(units), scored(alone)
    ours, theirs = side_by_side(lambda: scored(units), lambda: scored(alone), 2, time.process_time)
    return {
        "what": f"routes, {candidates} children of one path of 12 hops that differ {where}, in {len(units)} units",
        "shared ms": ours * 1e3,
        "one by one ms": theirs * 1e3,
        "ratio": theirs / ours,
        "bitwise equal": all(np.array_equal(a, b) for i in apart for a, b in zip(apart[i], together[i], strict=True)),
    }


def messages() -> list[Row]:
    """Bytes that travel per candidate of the quickstart: a work unit there, its scores back."""
    prepared = prepare(load("quickstart"))
    space, items = prepared.spaces[-1], prepared.items["search"]
    unit = WorkUnit(0, (Job(0, 0, space.decode(space.default, prepared.manifest), items),))
    answer = FakeEvaluator(metrics=tuple(MultipleChoiceSpec.metrics)).evaluate(unit)
    return [
        {"what": f"messages, {len(space.axes)} axes, {items.count} items, {len(MultipleChoiceSpec.metrics)} metrics"}
        | {"bytes there": len(pickle.dumps(unit)), "bytes back": len(pickle.dumps(answer))}
    ]


def workers() -> list[Row]:
    """Candidates per second of one and of two local workers, one thread each, start-up apart; and equal journals."""
    speed, journals = [], []
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as temporary:
            overrides = {"search.budget.evaluations": 60, "search.finalists": 2, "workers.count": count}
            run(load("quickstart", overrides), Path(temporary) / "run")
            lines = [
                t for t in read_telemetry(Path(temporary) / "run" / "telemetry.jsonl") if t.get("items") == "search"
            ]
            journals.append((Path(temporary) / "run" / "journal.jsonl").read_bytes())
        first = 10
        speed.append((len(lines) - first) / (lines[-1]["run_seconds"] - lines[first - 1]["run_seconds"]))
    assert journals[0] == journals[1]
    return [
        {
            "what": "quickstart, candidates per second",
            "one worker": speed[0],
            "two": speed[1],
            "ratio": speed[1] / speed[0],
        }
    ]


BENCHES: dict[str, Callable[[], list[Row]]] = {
    "build": build,
    "score": score,
    "generation": generation,
    "overhead": overhead,
    "routes": routes,
    "messages": messages,
    "workers": workers,
    "demo": demo,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("which", nargs="*", help=f"of {', '.join(BENCHES)}; default all")
    parser.add_argument("--to", type=Path, help="folder for the results (default: beside this file)")
    args = parser.parse_args()
    which = args.which or list(BENCHES)
    if unknown := set(which) - set(BENCHES):
        parser.error(f"unknown benchmark {min(unknown)!r}; known: {', '.join(BENCHES)}")
    torch.set_num_threads(1)
    machine = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{p: version(p) for p in ("torch", "transformers", "numpy", "cma")},
    }
    rows = []
    for name in which:
        for row in BENCHES[name]():
            print(
                "  ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" if k == "what" else f"{k} {v}"
                    for k, v in row.items()
                ),
                flush=True,
            )
            rows.append(row)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    folder = args.to or HERE
    path = folder / f"{machine['date']}-{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
