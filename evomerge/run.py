"""The straight line: space -> ask -> recipe -> build -> score -> journal -> tell -> final. Read this first.

Resuming is running again: as long as the journal still has events, `ask` and `score` replay them instead of
writing and evaluating, and the same loop goes on where the last one was cut off.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.budget import Allowance
from evomerge.canonical import encode_array
from evomerge.commit import Committer
from evomerge.config import Budget, Experiment, fitness_of
from evomerge.errors import RunError, UserError
from evomerge.history import History
from evomerge.items import behind, make_policy
from evomerge.journal import Journal
from evomerge.objective import differentiated, products
from evomerge.pareto import compromise, fronts, order
from evomerge.prepare import Prepared, allowance_of, gradient_shape, make_executor, needed_metrics, prepare
from evomerge.progress import Progress, Silent
from evomerge.proposal import GRADIENT_PRICE, Differentiated, Evaluation, Genome, ItemSet, Proposal, Result, Scores
from evomerge.rundir import BUDGET, EXPERIMENT, JOURNAL, Before, RunDirectory, before
from evomerge.schema import validated
from evomerge.score.plan import PlanShape
from evomerge.search import make_optimizer, needs_of
from evomerge.search.base import Elitist, Selective, Start
from evomerge.session import Candidate, Session, references_of
from evomerge.space import RuleSpace
from evomerge.tasks.base import NOTHING, Allowed

VIOLATED = 1e6
"""Added to by how much constraints are missed: worse than any loss of metrics, and still a number to rank by."""


def run(
    experiment: Experiment,
    out: Path,
    progress: Progress | None = None,
    *,
    accept_drift: bool = False,
    allow: Allowed = NOTHING,
    interrupted: Callable[[], bool] = lambda: False,
) -> History:
    """Run an experiment to its budget in the folder `out`, or go on where an earlier run there stopped.

    A finished run goes on where the budget was raised. Raises UserError for bad input before anything is
    written; RunError where nothing could be scored; Interrupted soon after `interrupted()` turns true.
    """
    earlier = before(out)
    try:
        shape = PlanShape(**earlier.facts["plan_shape"]) if earlier else None
    except TypeError:
        raise UserError(f"{out / JOURNAL}: has no batch shape of this version") from None
    began_with = validated(Budget, earlier.budgets[0], f"{out / JOURNAL}: budget") if earlier else None
    prepared = prepare(experiment, shape, allow, began_with)
    search(prepared, out, progress or Silent(), accept_drift=accept_drift, interrupted=interrupted)
    return History.read(out)


def search(
    prepared: Prepared, out: Path, progress: Progress, *, accept_drift: bool, interrupted: Callable[[], bool]
) -> None:
    """The run itself, from checked input to the journal's last event."""
    experiment, earlier = prepared.experiment, before(out)
    facts, extensions = run_facts(prepared, earlier, out, progress)
    budget = Budget.model_validate(facts["budget"])
    allowance = allowance_of(budget, experiment, prepared.items["search"])

    with (
        RunDirectory(out) as rundir,
        Journal(out / JOURNAL, accept_drift=accept_drift, on_drift=rundir.drift) as journal,
        closing(make_executor(prepared.evaluator(), experiment.workers, prepared.device)) as executor,
        closing(
            Committer(
                journal, executor, rundir, interrupted, needed_metrics(experiment), gradient_shape(prepared.manifest)
            )
        ) as committer,
    ):
        progress.begin(prepared, allowance.extended(extensions[-1]) if extensions else allowance)
        # The journal's file comes first: a folder that has one, even an empty one, is ours to go on with.
        if earlier is None or extensions:
            rundir.write_experiment(experiment.to_yaml())
        session = Session(prepared, journal, committer, progress)
        journal.record("run", **facts)
        for items in prepared.items.values():
            journal.record("items", id=items.id, name=items.name, ids=prepared.item_ids(items))

        score_baselines(session)
        for n in range(len(prepared.stages)):
            stage = StageRun(session, n, allowance, rundir)
            stage.advance(allowance)
        conclude(session, stage)
        for more in extensions:
            journal.record("extended", budget=more.model_dump(exclude_none=True))
            stage.advance(allowance.extended(more))
            conclude(session, stage)
    progress.end()


def score_baselines(s: Session) -> None:
    """Score base, experts and uniform merge, which bind the objective, then given recipes; none uses randomness."""
    items = s.prepared.items["search"]
    group = [
        s.ask(Proposal(next(s.ids), 0, recipe=recipe), stage=-1, role="baseline", name=name)
        for name, recipe in s.prepared.baselines().items()
    ]
    scored = s.score(group, items)
    s.references = references_of(scored)
    if s.references is None:
        reason = next(f"{e.status}: {e.reason}" for _, e in scored if not e.ok)
        raise RunError(f"the base itself could not be scored ({reason}); check the model and the tasks")
    note_unsolved(s, [e.scores for _, e in scored if e.scores is not None])
    given = [
        s.ask(Proposal(next(s.ids), 0, recipe=recipe), stage=-1, role="given") for recipe in s.prepared.given_recipes()
    ]
    for candidate, evaluation in [*scored, *s.score(given, items)]:
        s.keep(candidate, evaluation, items)


def note_unsolved(s: Session, baselines: list[Scores]) -> None:
    """Name tasks that no baseline solves at all: mostly a prompt or a pattern is wrong, and a search mends neither."""
    experiment = s.prepared.experiment
    for t in experiment.benchmarks:
        if t.sign(t.metric) < 0 and not any(scores[t.name][t.metric].any() for scores in baselines):
            s.progress.note(
                f"every baseline scores 0 on {t.name!r}: look at its prompt, what is extracted and what is right; all "
                f"metrics: evomerge score {experiment.models.base} {s.journal.path.parent / EXPERIMENT} --split search"
            )


class StageRun:
    """One stage of the search, from its start to the end of its budget; the last one may be extended."""

    def __init__(self, s: Session, n: int, allowance: Allowance, rundir: RunDirectory) -> None:
        self.s, self.n, self.rundir = s, n, rundir
        experiment = s.prepared.experiment
        self.algorithm, options = experiment.algorithm_of(s.prepared.stages[n])
        needs = needs_of(self.algorithm, options)
        # Algorithms that propose recipes begin from no point; runs that began before they skipped these have them.
        if n == 0 and experiment.search.probes and (needs.proposes == "genomes" or s.journal.asked_as("probe")):
            score_probes(s, allowance, rundir)
        inputs = build_on_found(s, n)
        space = s.spaces[n]
        start, *others = starts(s, n)
        inputs["start"] = encode_array(start)
        if others:
            inputs["others"] = [encode_array(g) for g in others]
        s.journal.record("stage", n=n, inputs=inputs)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([experiment.search.seed, n])))
        fitness = fitness_of(experiment)
        begin = Start(
            start,
            others=tuple(others),
            objectives=len(fitness.goals),
            constrained=bool(fitness.constraints),
            recall=s.journal.asked,
            manifest=s.prepared.manifest,
            dtype=s.prepared.dtype,
            columns=s.prepared.columns() if needs.per_item_scores else (),
            geometry=s.prepared.geometry() if needs.geometry else None,
            lag=experiment.search.lag,
            measures=fitness.dimensions,
            sampled=experiment.search.items != "full",
            note=s.progress.note,
        )
        self.gradients = differentiated(fitness) if needs.gradients else ()
        self.optimizer = make_optimizer(self.algorithm, space.axes, begin, rng, s.ids, options)
        self.policy = make_policy(experiment.search.items, s.whole, (experiment.search.seed, n), s.losses_on)
        self.latest: dict[int, dict[int, Result]] = {}
        """What was told of the last two generations and of their incumbents, by number and candidate."""
        self.sampled = begin.sampled
        self.items = s.whole
        """What the last candidates began on."""

    def advance(self, allowance: Allowance) -> None:
        """Ask, evaluate, tell, until the budget is spent or the algorithm stops; then score its mean.

        By generations, or in steady state with a fixed lag: then a new proposal is asked whenever the oldest
        outstanding one is told, so what it sees does not depend on who finished first. Where candidates are scored on
        samples of the items, incumbents are scored on each new sample before newcomers are compared with them, and the
        best of the last generation are scored in full together with the mean.
        """
        s = self.s
        lag = s.prepared.experiment.search.lag
        outstanding: deque[Candidate] = deque()
        recent: list[Evaluation] = []
        while True:
            asked = sum(c.role == "search" for c in s.candidates.values()) + len(outstanding)
            left = 0
            incumbents = self._incumbents()
            gradients = self._differentiated()
            if not self.optimizer.stop():
                price = self.policy.price * (1 + GRADIENT_PRICE * bool(gradients))
                spent = s.spent + price * len(incumbents)
                left = allowance.left(self.n, asked, s.journal, self.rundir, spent=spent, price=price)
            room = left if lag is None else min(left, lag - len(outstanding))
            group = [s.ask(p, stage=self.n, role="search") for p in self._proposals(room, lag)]
            outstanding += group
            if not outstanding:
                break
            items = self.policy.first(outstanding[0].proposal.group)
            if items.id == self.items.id:
                incumbents = []
            self.items = items
            s.submit([*incumbents, *group], items, gradients=gradients)
            before = s.committer.evaluated
            self._renew(incumbents, items, outstanding[0].proposal.group)
            members, results = [], {}
            for _ in range(len(outstanding) if lag is None else 1):
                candidate = outstanding.popleft()
                fresh = not s.journal.replaying
                evaluation = s.commit(candidate, items, gradients=gradients)
                members.append(candidate)
                results[candidate.id] = self._told(candidate, evaluation, items)
                recent.append(evaluation if fresh else Evaluation("ok"))
            results = self._on_more_items(members, results)
            for candidate in members:
                self.optimizer.tell(candidate.proposal, results[candidate.id])
            s.spent += s.committer.evaluated - before
            # A single candidate that fails says nothing about the run.
            stop_where_most_fail(recent, max(len(group), 4) if lag is None else 2 * lag)
        means = [s.ask(p, stage=self.n, role="mean") for p in self.optimizer.recommend(1)]
        for candidate, evaluation in s.score([*self._best_of_latest(), *means], s.whole):
            s.keep(candidate, evaluation, s.whole)

    def ended_by(self) -> str:
        """What ended `advance`: the algorithm with its own reasons, else the budget."""
        reasons = ", ".join(f"{name} {value:g}" for name, value in sorted(self.optimizer.stop().items()))
        return f"{self.algorithm} ({reasons})" if reasons else BUDGET

    def _differentiated(self) -> Differentiated:
        """What the next proposals are differentiated by."""
        wanted = not isinstance(self.optimizer, Selective) or self.optimizer.differentiates
        return self.gradients if wanted else ()

    def _incumbents(self) -> list[Candidate]:
        """Who competes with the next generation and so has to be scored on its items."""
        if not self.sampled or not isinstance(self.optimizer, Elitist):
            return []
        return [self.s.candidates[i] for i in self.optimizer.incumbents()]

    def _renew(self, incumbents: list[Candidate], items: ItemSet, group: int) -> None:
        """Tell the optimizer its incumbents' results on a generation's items."""
        if not incumbents:
            return
        assert isinstance(self.optimizer, Elitist)
        s = self.s
        results = {c.id: self._told(c, s.commit(c, items), items) for c in incumbents}
        self.latest[group] = results
        self.optimizer.renew(results)

    def _on_more_items(self, members: list[Candidate], results: dict[int, Result]) -> dict[int, Result]:
        """Results of a generation's members after all rungs that the policy asks for, comparable with one another.

        Losses on different items do not compare, so whoever stopped on a rung comes behind all that went on.
        """
        s, group = self.s, members[0].proposal.group
        stopped: list[dict[int, Result]] = []
        while wanted := self.policy.more(group, len(stopped), results):
            rung = len(stopped) + 1
            stopped.append({i: r for i, r in results.items() if i not in wanted})
            climbing = [c for c in members if c.id in wanted]
            for c in climbing:
                s.submit([c], wanted[c.id], rung=rung)
            scored = [(c, s.commit(c, wanted[c.id], rung=rung)) for c in climbing]
            results = {c.id: self._told(c, e, wanted[c.id]) for c, e in scored}
        for rest in reversed(stopped):
            moved = behind({i: r.losses for i, r in rest.items()}, [r.losses for r in results.values()])
            results |= {i: replace(r, losses=moved[i]) for i, r in rest.items()}
        self.latest.setdefault(group, {}).update(results)
        self.latest = dict(list(self.latest.items())[-2:])
        return results

    def _best_of_latest(self) -> list[Candidate]:
        """The best of the last generation that are not scored on all items yet, as many as finalists are wanted.

        Of the one before it where the budget cut the last one short.
        """
        s = self.s
        latest = max(reversed(self.latest.values()), key=len, default={})
        able = [i for i, r in latest.items() if np.isfinite(r.losses).all()]
        if not able:
            return []
        best = order(np.array([latest[i].losses for i in able]))[: s.prepared.experiment.search.finalists]
        return [s.candidates[i] for i in sorted(able[b] for b in best) if not s.candidates[i].whole]

    def _told(self, c: Candidate, e: Evaluation, items: ItemSet) -> Result:
        """What the algorithm is told of a candidate, which is kept: the derivative by the genome where it was asked
        for; where it does not know constraints, a loss above all that keep them."""
        prepared, r = self.s.prepared, self.s.keep(c, e, items)
        if e.gradients is not None:
            space, genome = self.s.spaces[self.n], c.proposal.genome
            assert isinstance(space, RuleSpace)
            assert genome is not None
            by_block = products(fitness_of(prepared.experiment), e.gradients)
            r = replace(r, gradient=np.array([space.gradient(genome, g, prepared.manifest) for g in by_block]))
        if r.violation == 0.0 or self.optimizer.needs.constraints:
            return r
        return replace(r, losses=np.full_like(r.losses, VIOLATED + r.violation))

    def _proposals(self, room: int, lag: int | None) -> list[Proposal]:
        """At most `room` proposals: one generation's, or in steady state of as many as there is room for."""
        out = self.optimizer.ask(room) if room else []
        while lag is not None and len(out) < room and (more := self.optimizer.ask(room - len(out))):
            out += more
        return out


def stop_where_most_fail(recent: list[Evaluation], window: int) -> None:
    """Raise RunError where more than half of the last `window` fresh evaluations failed; forget them else.

    What a journal replays does not count, so a run whose cause was mended goes on when it is resumed.
    """
    if len(recent) < window:
        return
    failed = [e for e in recent if not e.ok]
    if len(failed) > len(recent) / 2:
        reasons = Counter(f"{e.status} {e.reason}".strip() for e in failed)
        most = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3))
        raise RunError(f"{len(failed)} of the last {len(recent)} candidates failed ({most}); mend that, then resume")
    recent.clear()


def conclude(s: Session, last: StageRun) -> None:
    """Choose the winner on select, look at it once on report; then say what ended the last stage."""
    report_on(s, choose_winner(s))
    if s.journal.replaying:
        s.journal.take("stop")  # its reason stands: earlier versions wrote the budget, whatever it was
    else:
        s.journal.record("stop", reason=last.ended_by())


def score_probes(s: Session, allowance: Allowance, rundir: RunDirectory) -> None:
    """Score a few telling points before the first stage; a search that starts in the wrong basin stays there."""
    probes = s.prepared.spaces[0].probes()
    if len(probes) > allowance.left(0, 0, s.journal, rundir, price=s.whole.count) / 4:
        return
    before = s.committer.evaluated
    group = [s.ask(Proposal(next(s.ids), 0, genome=g), stage=0, role="search", name="probe") for g in probes]
    for candidate, evaluation in s.score(group, s.whole):
        s.keep(candidate, evaluation, s.whole)
    s.spent += s.committer.evaluated - before


def build_on_found(s: Session, n: int) -> dict[str, Any]:
    """Where stage n has routes through what was merged before it: put the best merge so far there, and name it."""
    if n == 0:
        return {}
    found = next((c for c in s.ranked() if c.recipe.route is None), None)
    space = s.spaces[n] if found is None else s.spaces[n].around(found.recipe)
    if found is None or space is s.spaces[n]:
        return {}
    s.spaces[n] = space
    return {"merged": found.id}


def starts(s: Session, n: int) -> list[Genome]:
    """Where stage n begins: the best candidate so far that its space can express, else the space's default.

    With several objectives the other such candidates of the front so far follow.
    """
    space = s.spaces[n]
    found: list[Genome] = []
    ranked = s.ranked()
    several = len(fitness_of(s.prepared.experiment).goals) > 1
    level = fronts(np.array([c.losses for c in ranked])) if several else np.arange(len(ranked))
    for candidate, dominated in zip(ranked, level, strict=True):
        if found and (dominated or not several):
            break
        try:
            found.append(space.encode(candidate.recipe, s.prepared.manifest))
        except ValueError:  # another method, such as a baseline's
            continue
    return found or [space.default]


def choose_winner(s: Session) -> list[Candidate]:
    """Re-score the best, the means and the baselines on the select split; the best there is the winner.

    With several objectives the winner is the member of the front there that is nearest to the ideal point; the
    other members follow it.
    """
    ranked = s.ranked()
    finalists = {c.id: c for c in ranked[: s.prepared.experiment.search.finalists]}
    finalists |= {c.id: c for c in ranked if c.role in ("baseline", "mean")}
    group = [finalists[i] for i in sorted(finalists)]
    scored = s.score(group, s.prepared.items["select"], together=one_device(s))
    objective = s.bind(scored)
    if objective is None:
        raise RunError("the base could not be scored on the select split; see the journal for the reason")
    ids = [c.id for c, e in scored if e.scores is not None]
    losses = np.array([objective.losses(e.scores) for _, e in scored if e.scores is not None])
    violations = np.array([objective.violation(e.scores) for _, e in scored if e.scores is not None])
    # Where nobody keeps the constraints, whoever misses them least.
    kept = np.flatnonzero(violations <= violations.min())
    best = [int(i) for i in kept[fronts(losses[kept]) == 0]]
    winner = ids[best[compromise(losses[best])]]
    if losses.shape[1] == 1:
        told: dict[str, Any] = {"losses": {str(i): float(x[0]) for i, x in zip(ids, losses, strict=True)}}
    else:
        told = {"losses": {str(i): x.tolist() for i, x in zip(ids, losses, strict=True)}}
        told["front"] = [ids[i] for i in best]
    s.journal.record("final", finalists=ids, winner=winner, **told)
    return [finalists[winner], *(finalists[i] for i in told.get("front", ()) if i != winner)]


def report_on(s: Session, winners: list[Candidate]) -> None:
    """Score the winner, or the whole front, and the baselines on the report split: the only look at it."""
    chosen = {c.id for c in winners}
    group = [c for c in s.candidates.values() if c.role == "baseline" or c.id in chosen]
    s.score(group, s.prepared.items["report"], together=one_device(s))


def one_device(s: Session) -> bool:
    """Whether finalists should go to one worker: on a cluster, last bits may differ between devices."""
    return s.prepared.experiment.workers.backend == "ray"


def run_facts(
    prepared: Prepared, earlier: Before | None, out: Path, progress: Progress
) -> tuple[dict[str, Any], list[Budget]]:
    """The `run` event, and the budgets it was extended by. Raises UserError where `out` holds another experiment."""
    budget = prepared.experiment.search.budget
    facts = {
        "experiment_id": prepared.experiment_id,
        "manifest": prepared.manifest.to_json(),
        "dtype": prepared.dtype,
        "plan_shape": prepared.plan_shape.to_json(),
        "numerics": prepared.numerics(),
        "budget": budget.model_dump(exclude_none=True),
    }
    if earlier is None:
        return facts, []
    first = earlier.facts
    if first["experiment_id"] != facts["experiment_id"]:
        raise UserError(f"{out}: holds another experiment; choose another folder with --out, or remove this one")
    budgets = [validated(Budget, b, f"{out / JOURNAL}: budget") for b in earlier.budgets]
    if budget != budgets[-1]:
        if not budget.exceeds(budgets[-1]):
            raise UserError(f"{out}: its budget is {earlier.budgets[-1]}; it can only be raised, not {facts['budget']}")
        if not earlier.finished:
            raise UserError(f"{out}: finish it with its budget of {earlier.budgets[-1]} before raising that")
        budgets.append(budget)
    facts["budget"] = first["budget"]
    # The journal stays the authority: what it holds is told as recorded, new scores may differ in last bits. Of what it
    # does not name, as earlier versions named less, nothing is known.
    changed = [k for k, v in prepared.numerics().items() if first["numerics"].get(k, v) != v]
    if changed:
        progress.note(f"resuming with another {', '.join(changed)} than the run began with; last bits may differ")
    facts["numerics"] = first["numerics"]
    return facts, budgets[1:]
