"""The straight line: space -> ask -> recipe -> build -> score -> journal -> tell -> final. Read this first.

Resuming is running again: as long as the journal still has events, `ask` and `score` replay them instead of
writing and evaluating, and the same loop goes on where the last one was cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.budget import Allowance
from evomerge.canonical import encode_array
from evomerge.commit import Committer
from evomerge.config import Experiment
from evomerge.errors import RunError, UserError
from evomerge.history import History
from evomerge.journal import Journal
from evomerge.prepare import Prepared, make_executor, prepare
from evomerge.progress import Progress, Silent
from evomerge.proposal import Genome, Proposal
from evomerge.rundir import JOURNAL, RunDirectory, first_event
from evomerge.score.plan import PlanShape
from evomerge.search import make_optimizer
from evomerge.search.base import Start
from evomerge.session import Candidate, Session


def run(experiment: Experiment, out: Path, progress: Progress | None = None, accept_drift: bool = False) -> History:
    """Run an experiment to its budget in the folder `out`, or go on where an earlier run there stopped.

    Raises UserError for bad input before anything is written; RunError where nothing could be scored.
    """
    progress = progress or Silent()
    first = first_event(out)
    prepared = prepare(experiment, PlanShape(**first["plan_shape"]) if first else None)
    facts = run_facts(prepared, first, out, progress)
    allowance = Allowance.of(experiment.search.budget, prepared.stages, prepared.items["search"].count)
    progress.begin(prepared, allowance)

    with (
        RunDirectory(out) as rundir,
        Journal(out / JOURNAL, accept_drift=accept_drift, on_drift=rundir.drift) as journal,
    ):
        # The journal's file comes first: a folder that has one, even an empty one, is ours to go on with.
        if not journal.events:
            rundir.write_experiment(experiment.to_yaml())
        executor = make_executor(prepared.evaluator(), experiment.workers)
        try:
            session = Session(prepared, journal, Committer(journal, executor, rundir), progress)
            journal.record("run", **facts)
            for items in prepared.items.values():
                journal.record("items", id=items.id, name=items.name, ids=prepared.item_ids(items))

            score_baselines(session)
            for n in range(len(prepared.stages)):
                search_stage(session, n, allowance, rundir)
            winner = choose_winner(session)
            report_on(session, winner)

            journal.record("stop", reason="budget")
        finally:
            executor.close()
    progress.end()
    return History.read(out)


def score_baselines(s: Session) -> None:
    """Score base, experts and uniform merge; they use no randomness, and they bind the objective."""
    group = [
        s.ask(Proposal(next(s.ids), 0, recipe=recipe), stage=-1, role="baseline", name=name)
        for name, recipe in s.prepared.baselines().items()
    ]
    scored = list(s.score(group, s.prepared.items["search"]))
    s.objective = s.bind(scored)
    if s.objective is None:
        reason = next(f"{e.status}: {e.reason}" for _, e in scored if not e.ok)
        raise RunError(f"the base itself could not be scored ({reason}); check the model and the tasks")
    for candidate, evaluation in scored:
        s.keep(candidate, evaluation)


def search_stage(s: Session, n: int, allowance: Allowance, rundir: RunDirectory) -> None:
    """Ask, evaluate, tell, until the stage's budget is spent or the algorithm stops; then score its mean."""
    experiment, space = s.prepared.experiment, s.prepared.spaces[n]
    if n == 0 and experiment.search.probes:
        score_probes(s, allowance, rundir)
    start = best_start(s, n)
    s.journal.record("stage", n=n, inputs={"start": encode_array(start)})
    algorithm, options = experiment.algorithm_of(s.prepared.stages[n])
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([experiment.search.seed, n])))
    optimizer = make_optimizer(algorithm, space.axes, Start(start), rng, s.ids, options)

    asked = sum(c.role == "search" for c in s.candidates)
    while not optimizer.stop() and (left := allowance.left(n, asked, s.journal, rundir)):
        group = [s.ask(p, stage=n, role="search") for p in optimizer.ask(left)]
        asked += len(group)
        for candidate, evaluation in s.score(group, s.prepared.items["search"]):
            optimizer.tell(candidate.proposal, s.keep(candidate, evaluation))

    means = [s.ask(p, stage=n, role="mean") for p in optimizer.recommend(1)]
    for candidate, evaluation in s.score(means, s.prepared.items["search"]):
        s.keep(candidate, evaluation)


def score_probes(s: Session, allowance: Allowance, rundir: RunDirectory) -> None:
    """Score a few telling points before the first stage; a search that starts in the wrong basin stays there."""
    probes = s.prepared.spaces[0].probes()
    if len(probes) > allowance.left(0, 0, s.journal, rundir) / 4:
        return
    group = [s.ask(Proposal(next(s.ids), 0, genome=g), stage=0, role="search", name="probe") for g in probes]
    for candidate, evaluation in s.score(group, s.prepared.items["search"]):
        s.keep(candidate, evaluation)


def best_start(s: Session, n: int) -> Genome:
    """Where stage n begins: the best candidate so far that its space can express, else the space's default."""
    for candidate in s.ranked():
        try:
            return s.prepared.spaces[n].encode(candidate.recipe, s.prepared.manifest)
        except ValueError:  # another method, such as a baseline's
            continue
    return s.prepared.spaces[n].default


def choose_winner(s: Session) -> Candidate:
    """Re-score the best, the means and the baselines on the select split; the best there is the winner."""
    ranked = s.ranked()
    finalists = {c.id: c for c in ranked[: s.prepared.experiment.search.finalists]}
    finalists |= {c.id: c for c in ranked if c.role in ("baseline", "mean")}
    group = [finalists[i] for i in sorted(finalists)]
    scored = list(s.score(group, s.prepared.items["select"]))
    objective = s.bind(scored)
    if objective is None:
        raise RunError("the base could not be scored on the select split; see the journal for the reason")
    losses = {c.id: float(objective.losses(e.scores)[0]) for c, e in scored if e.scores is not None}
    winner = min(losses, key=lambda i: (losses[i], i))
    s.journal.record("final", finalists=sorted(losses), losses={str(i): x for i, x in losses.items()}, winner=winner)
    return finalists[winner]


def report_on(s: Session, winner: Candidate) -> None:
    """Score winner and baselines on the report split: the only look at it."""
    group = [c for c in s.candidates if c.role == "baseline" or c.id == winner.id]
    for _ in s.score(group, s.prepared.items["report"]):
        pass


def run_facts(prepared: Prepared, first: Mapping[str, Any] | None, out: Path, progress: Progress) -> dict[str, Any]:
    """The `run` event. Raises UserError where `out` holds another experiment."""
    facts = {
        "experiment_id": prepared.experiment_id,
        "manifest": prepared.manifest.to_json(),
        "dtype": prepared.dtype,
        "plan_shape": prepared.plan_shape.to_json(),
        "numerics": prepared.numerics(),
        "budget": prepared.experiment.search.budget.model_dump(exclude_none=True),
    }
    if first is None:
        return facts
    if first["experiment_id"] != facts["experiment_id"]:
        raise UserError(f"{out}: holds another experiment; choose another folder with --out, or remove this one")
    if first["budget"] != facts["budget"]:
        raise UserError(f"{out}: its budget is {first['budget']}, not {facts['budget']}; a run keeps its budget")
    now = prepared.numerics()
    if first["numerics"] != now:
        # The journal stays the authority: what it holds is told as recorded, new scores may differ in last bits.
        changed = [k for k in now if first["numerics"].get(k) != now[k]]
        progress.note(f"resuming with another {', '.join(changed)} than the run began with; last bits may differ")
        facts["numerics"] = first["numerics"]
    return facts
