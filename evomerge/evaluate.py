"""Recipes -> Evaluations: build, score, catch failure, time. The worker's side of the loop."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.hub import folder_of
from evomerge.manifest import Manifest
from evomerge.merge.bank import Bank
from evomerge.merge.builder import Builder
from evomerge.merge.gradient import RECOMPUTE_ABOVE, activation_bytes, inner_products, recomputed
from evomerge.merge.live import inference, live_model, load_tokenizer
from evomerge.merge.pipeline import BuildError
from evomerge.merge.route import Router
from evomerge.pool import ModelPool
from evomerge.proposal import Evaluation, Gradients, Job, Scores, Telemetry, WorkUnit
from evomerge.score import make_scorer
from evomerge.score.model import Altered, NonFinite
from evomerge.score.plan import Differentiable, Plan, Scorable


@dataclass(frozen=True)
class EvaluatorSpec:
    """All that a worker needs, picklable: paths and pinned hub ids travel, weights never do."""

    base: str
    experts: Mapping[str, str]
    manifest: Manifest
    dtype: str
    plans: Mapping[str, Plan]
    device: str
    threads: int


class MergeEvaluator:
    """Holds the resident bank, one live model and the compiled plans."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        """Load everything once. Raises UserError for a pool that changed since it was checked."""
        self.device = torch.device(spec.device)
        inference(self.device, spec.threads)
        experts = {n: folder_of(p) for n, p in spec.experts.items()}
        self._pool = ModelPool.open(folder_of(spec.base), experts, spec.manifest.base)
        self._manifest, self._dtype, self._plans = spec.manifest, spec.dtype, spec.plans
        self._open()
        cuda = self.device.type == "cuda"
        self._device_name = torch.cuda.get_device_name(self.device) if cuda else "cpu"
        self._scorers = {kind: make_scorer(kind) for kind in {p.kind for p in spec.plans.values()}}

    def _open(self) -> None:
        """Read the weights, and put a live model over a buffer for merges of them."""
        base = self._pool.checkpoints[self._pool.base].path
        self._builder = Builder(Bank.load(self._pool, self._manifest, self.device), self._dtype)
        model = live_model(base, self._builder.views(), self._dtype)
        self._router = Router(model, self._pool, self._builder)
        self._candidate = Scorable(model, load_tokenizer(base), self._router.distance)

    def evaluate(self, unit: WorkUnit) -> list[tuple[Evaluation, Telemetry]]:
        """One result per job, in order. Never raises for a bad candidate.

        Where routes of a unit begin alike, what they have in common is computed once.
        """
        paths = [job.recipe.path for job in unit.jobs]
        out = []
        for i, job in enumerate(unit.jobs):
            self._router.shared.expect(paths[i], paths[i + 1 :])
            result = self._one(job)
            if result[0].status == "failed:oom" and self._router.shared.used:  # others' states may have been too much
                self._router.shared.clear()
                result = self._one(job)
            out.append(result)
        self._router.shared.clear()
        return out

    def _one(self, job: Job) -> tuple[Evaluation, Telemetry]:
        start = time.perf_counter()
        built = start
        changed = 0
        try:
            changed = self._builder.build(job.recipe)
            self._router.follow(job.recipe)
            built = time.perf_counter()
            scores: Scores = {task: self._scored(task, positions) for task, positions in job.items.tasks.items()}
            result = Evaluation("ok", scores, gradients=self._gradients(job) if job.gradients else None)
        except (BuildError, NonFinite) as e:
            result = Evaluation("failed:nan", reason=str(e))
        except Altered as e:
            self._open()  # a route's layers are the resident weights themselves
            result = Evaluation("failed:error", reason=str(e)[:500])
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            result = Evaluation("failed:oom", reason="out of device memory")
        except MemoryError:
            result = Evaluation("failed:oom", reason="out of memory")
        except Exception as e:
            if "can't allocate memory" in str(e):
                result = Evaluation("failed:oom", reason="out of memory")
            else:
                reason = " ".join(f"{type(e).__name__}: {e}".split())
                result = Evaluation("failed:error", reason=reason[:500])
        end = time.perf_counter()
        return result, Telemetry(
            build_seconds=max(built - start, 0.0),
            score_seconds=end - max(built, start),
            peak_mb=self._peak_mb(),
            device=self._device_name,
            changed_blocks=changed,
        )

    def _scored(self, task: str, positions: tuple[int, ...]) -> Mapping[str, NDArray[np.float32]]:
        plan = self._plans[task]
        scorer = self._scorers[plan.kind]
        with self._router.sharing((plan.id, positions)) if scorer.stateless else nullcontext():
            return scorer.score(self._candidate, plan, positions)

    def _gradients(self, job: Job) -> Gradients:
        """Of the job's tasks, for what is built. Raises NonFinite."""
        model, bank = self._candidate.model, self._builder.bank
        out = {}
        for task, metric in job.gradients:
            plan = self._plans[task]
            scorer = self._scorers[plan.kind]
            assert isinstance(scorer, Differentiable)
            size = activation_bytes(bank.manifest, plan.shape.batch_tokens, self._builder.buffer.itemsize)
            with (
                inner_products(model, bank) as products,
                recomputed(model) if size > RECOMPUTE_ABOVE else nullcontext(),
            ):
                for part in scorer.mean_in_parts(self._candidate, plan, job.items.tasks[task], metric):
                    part.backward()
            out[task] = products.cpu().numpy().astype(np.float32)
            if not np.isfinite(out[task]).all():
                raise NonFinite(f"task {task!r}: its gradient is NaN or infinite")
        return out

    def _peak_mb(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def pick_device(wanted: str) -> str:
    """`auto` is the first CUDA device where there is one, else the CPU."""
    if wanted != "auto":
        return wanted
    return "cuda:0" if torch.cuda.is_available() else "cpu"
