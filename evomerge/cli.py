"""The command line: thin. Progress goes to stderr, data to stdout.

Exit status: 0 fine, 1 failed, 2 wrong usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import RunError, UserError

if TYPE_CHECKING:
    from evomerge.history import History
    from evomerge.tasks.base import Allowed


FOLLOW_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, dispatch, turn errors into one line and an exit status."""
    args = _parser().parse_args(argv)
    atexit.register(gc.freeze)  # else Python searches torch's million objects for garbage before it exits: 0.8 s
    try:
        return int(args.call(args))
    except UserError as e:
        print(f"evomerge: {_line(e)}", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"evomerge: {_line(e)}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        out = getattr(args, "resume_with", None)
        print(f"\nevomerge: interrupted; go on with: {out}" if out else "\nevomerge: interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM set a flag that the loop looks at between commits; a second Ctrl-C stops at once."""
    stop = False

    def ask_to_stop(number: int, _frame: Any) -> None:
        nonlocal stop
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop = True

    before = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No search for cyclic garbage, which takes 0.7 s of the imports of torch and transformers and finds nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _line(e: Exception) -> str:
    return " ".join(str(e).split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evomerge", description="Evolutionary merge-recipe optimizer for language models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, call: Callable[[argparse.Namespace], int], help_: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
        p.set_defaults(call=call)
        return p

    def with_allow(p: argparse.ArgumentParser) -> argparse.ArgumentParser:
        p.add_argument("--allow-code", action="store_true", help="run code that the experiment names (python: tasks)")
        p.add_argument("--allow-test-set", action="store_true", help="search on known benchmark test sets all the same")
        return p

    def with_json(p: argparse.ArgumentParser) -> argparse.ArgumentParser:
        p.add_argument("--json", action="store_true", help="print JSON")
        return p

    p = with_allow(with_json(command("run", _run, "search for the best recipe; the same folder resumes")))
    p.add_argument("experiment", help="an experiment file, or the name of a library entry")
    p.add_argument("--out", type=Path, help="run directory (default runs/NAME)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. search.seed=2")
    p.add_argument("--accept-drift", action="store_true", help="resume although asked genomes differ from the journal")
    p.add_argument("--warm-start", type=Path, metavar="PATH", help="score another run's finalists, or a recipe, first")

    p = with_allow(with_json(command("resume", _resume, "go on with a run, with the same result as never interrupted")))
    p.add_argument("dir", type=Path)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. search.budget.evaluations=900")
    p.add_argument("--accept-drift", action="store_true", help="resume although asked genomes differ from the journal")

    p = with_allow(with_json(command("check", _check, "check an experiment and estimate its memory and work")))
    p.add_argument("experiment")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")

    p = with_json(command("inspect", _inspect, "compare a pool: delta norms, cosines, sign conflicts, differences"))
    p.add_argument("pool", help="an experiment (file or library name), a recipe.yaml, or the base's folder")
    p.add_argument("experts", nargs="*", type=Path, help="folders of experts, behind the base's folder")
    p.add_argument("--html", type=Path, metavar="PATH", help="write a page with pictures too")

    p = with_json(command("status", _status, "how far a run is"))
    p.add_argument("dir", type=Path)
    p.add_argument("--follow", action="store_true", help="print again every few seconds until the run is finished")

    p = with_json(command("compare", _compare, "two runs side by side"))
    p.add_argument("dir", type=Path)
    p.add_argument("other", type=Path)
    p.add_argument("--split", choices=("search", "select", "report"), default="report")

    p = with_json(command("front", _front, "the non-dominated candidates of a run for several objectives"))
    p.add_argument("dir", type=Path)
    pick = p.add_mutually_exclusive_group()
    pick.add_argument("--prefer", action="append", metavar="OBJECTIVE=WEIGHT", help="pick by weights of objectives")
    pick.add_argument("--knee", action="store_true", help="pick where giving up little gains most")
    pick.add_argument("--best", metavar="TASK", help="pick the best on one task, among those that meet --where")
    p.add_argument("--where", action="append", default=[], metavar="TASK>=X", help="with --best; may be repeated")

    p = with_json(command("archive", _archive, "the best candidate of every cell of a fitness's measures"))
    p.add_argument("dir", type=Path)

    p = with_json(command("show", _show, "one candidate with its recipe and scores"))
    p.add_argument("dir", type=Path)
    p.add_argument("id", nargs="?", help="number of the candidate, or winner (default)")

    p = with_json(command("report", _report, "the table of baselines and winner, and the page with the figures"))
    p.add_argument("dir", type=Path)
    p.add_argument("--split", choices=("search", "select", "report"), default="report", help="of the printed table")
    p.add_argument("--html", type=Path, metavar="PATH", help="where the page goes (default DIR/report.html)")

    p = with_json(command("export", _export, "write candidates as checkpoints or mergekit configurations"))
    p.add_argument("dir", type=Path)
    p.add_argument("id", nargs="*", help="numbers of candidates, or winner (default); several go below --to")
    p.add_argument("--front", action="store_true", help="all members of the front")
    p.add_argument("--format", choices=("hf", "mergekit"), default="hf")
    p.add_argument("--to", type=Path, required=True, metavar="PATH")
    p.add_argument("--push", metavar="ORG/NAME", help="upload the checkpoint to the hub, too; needs `hf auth login`")
    p.add_argument("--private", action="store_true", help="with --push: a repository that is created is private")

    p = with_json(command("import", _import, "write an experiment from a mergekit-evolve genome file"))
    p.add_argument("genome", type=Path)
    p.add_argument("--to", type=Path, required=True, metavar="EXPERIMENT.yaml")
    p.add_argument("--include-path", type=Path, metavar="DIR", help="folder with lm-eval task files of your own")

    p = with_json(command("merge", _merge, "build one recipe into a checkpoint, without a search"))
    p.add_argument("recipe", type=Path)
    p.add_argument("--to", type=Path, required=True, metavar="PATH")

    p = with_allow(with_json(command("score", _score, "score one model folder or recipe")))
    p.add_argument("model", type=Path, help="a model folder or a recipe.yaml")
    p.add_argument("fitness", help="a fitness or experiment file, or the name of a library entry")
    p.add_argument("--split", action="append", choices=("search", "select", "report"), help="default: all three")
    p.add_argument("--device", default="auto")

    p = command("verify", _verify, "rebuild an export and compare tensors and scores with its record")
    with_allow(with_json(p))
    p.add_argument("path", type=Path)

    p = with_json(command("list", _list, "what there is"))
    p.add_argument("what", choices=("methods", "algorithms", "tasks", "presets", "spaces", "fitness", "experiments"))

    p = command("schema", _schema, "the JSON Schema of a file format, for editors")
    p.add_argument(
        "what", choices=("experiment", "recipe", "space", "stages", "fitness"), nargs="?", default="experiment"
    )
    return parser


def _print(args: argparse.Namespace, data: Any, text: Callable[[], str]) -> None:
    print(json.dumps(_finite(data), indent=1) if args.json else text())


def _finite(data: Any) -> Any:
    """NaN and infinities as null: JSON has neither."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {str(k): _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    return data


# -- runs ---------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    from evomerge.config import load, parse_overrides

    overrides = parse_overrides(args.set)
    if args.warm_start is not None:
        from evomerge.warm import given_by

        overrides["search.warm_start"] = given_by(args.warm_start, load(args.experiment, overrides))
    experiment = load(args.experiment, overrides)
    return _go(args, experiment, args.out or Path("runs") / experiment.name)


def _resume(args: argparse.Namespace) -> int:
    from evomerge.config import parse_overrides
    from evomerge.history import load_resolved

    return _go(args, load_resolved(args.dir, parse_overrides(args.set)), args.dir)


def _go(args: argparse.Namespace, experiment: Any, out: Path) -> int:
    from evomerge.commit import Interrupted
    from evomerge.export.write import write_asked
    from evomerge.progress import Terminal
    from evomerge.report.page import write_page
    from evomerge.report.results import results, text_table
    from evomerge.run import run

    allowed = [f"--{flag.replace('_', '-')}" for flag in ("allow_code", "allow_test_set") if getattr(args, flag)]
    args.resume_with = " ".join(["evomerge resume", str(out), *allowed])
    try:
        with _stoppable() as interrupted:
            history = run(
                experiment,
                out,
                Terminal(),
                accept_drift=args.accept_drift,
                allow=_allowed(args),
                interrupted=interrupted,
            )
    except Interrupted:
        raise KeyboardInterrupt from None
    write_asked(history, experiment.export.format)
    try:
        page = f"page: {write_page(history)}"
    except RunError as e:  # takes nothing from the run, which is whole in its journal
        page = f"no page: {_line(e)}; make one with: evomerge report {out} --html PATH"
        print(f"evomerge: {page}", file=sys.stderr)
    _print(
        args,
        {"dir": str(out), **results(history).to_json()},
        lambda: (
            f"{text_table(history)}\n\n{page}\nrun directory: {out}\n"
            f"next: evomerge show {out}, evomerge export {out} --to PATH"
        ),
    )
    return 0


def _allowed(args: argparse.Namespace) -> Allowed:
    from evomerge.tasks.base import Allowed

    return Allowed(code=args.allow_code, test_sets=args.allow_test_set)


def _check(args: argparse.Namespace) -> int:
    with _uncollected():
        from evomerge.check import check, text
        from evomerge.config import load, parse_overrides

        c = check(load(args.experiment, parse_overrides(args.set)), _allowed(args))
    _print(args, c.to_json(), lambda: text(c))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from evomerge.files import new_file
    from evomerge.inspect_pool import inspect_pool
    from evomerge.report.pool_page import pool_page, pool_text

    if args.html is not None and args.html.exists():
        raise UserError(f"{args.html}: exists; choose another --html")
    inspection = inspect_pool(*_pool(args.pool, args.experts))
    if args.html is not None:
        new_file(args.html, pool_page(inspection))
    _print(args, inspection.to_json(), lambda: pool_text(inspection))
    return 0


def _pool(pool: str, experts: Sequence[Path]) -> tuple[tuple[str, Path], dict[str, Path]]:
    """((name of the base, its folder), experts) of an experiment, a recipe or of folders on the command line."""
    from evomerge.config import is_experiment, load
    from evomerge.export.verify import is_recipe, recipe_paths
    from evomerge.hub import folder_of, named
    from evomerge.recipe import Recipe

    if experts:
        names: list[str] = []
        folders = [folder_of(named(Path.cwd(), str(p))) for p in (pool, *experts)]
        for given in (pool, *map(str, experts)):
            name = Path(given).resolve().name.partition("@")[0]
            names.append(name if name not in names else f"{name}-{len(names)}")
        return (names[0], folders[0]), dict(zip(names[1:], folders[1:], strict=True))
    if Path(pool).is_dir():
        raise UserError(f"{pool}: is the base; name the experts' folders behind it")
    if is_recipe(Path(pool)) and not is_experiment(Path(pool)):
        recipe = Recipe.load(Path(pool))
        paths = {n: folder_of(p) for n, p in recipe_paths(recipe).items()}
        return (recipe.base, paths.pop(recipe.base)), paths
    models = load(pool).models
    return ("base", folder_of(models.base)), {n: folder_of(p) for n, p in models.experts.items()}


def _status(args: argparse.Namespace) -> int:
    from evomerge.report.status import status, status_text
    from evomerge.rundir import before

    if args.follow and before(args.dir) is None:
        print(f"evomerge: waiting for a run in {args.dir}; Ctrl-C stops", file=sys.stderr, flush=True)
        while before(args.dir) is None:
            time.sleep(FOLLOW_SECONDS)
    while True:
        s = status(args.dir)
        _print(args, s, lambda s=s: status_text(s))  # type: ignore[misc]
        if not args.follow or s["phase"] == "finished":
            return 0
        sys.stdout.flush()
        time.sleep(FOLLOW_SECONDS)


def _compare(args: argparse.Namespace) -> int:
    from evomerge.history import History
    from evomerge.report.compare import compare, compare_text

    c = compare(History.read(args.dir), History.read(args.other), args.split)
    _print(args, c, lambda: compare_text(c))
    return 0


def _candidate(history: History, wanted: str | None) -> int:
    if wanted in (None, "winner"):
        if history.winner_id is None:
            history.winner  # noqa: B018 (raises the error that says what to do)
        assert history.winner_id is not None
        return history.winner_id
    assert wanted is not None
    if not wanted.isdigit():
        raise UserError(f"a candidate is a number or 'winner', got {wanted!r}")
    return history.entry(int(wanted)).id


def _show(args: argparse.Namespace) -> int:
    from evomerge.history import History
    from evomerge.report.status import candidate, candidate_text

    history = History.read(args.dir)
    data = candidate(history, _candidate(history, args.id))
    _print(args, data, lambda: candidate_text(history, data))
    return 0


def _front(args: argparse.Namespace) -> int:
    from evomerge.history import History
    from evomerge.report.front import best_where, front, front_text, knee, preferred
    from evomerge.report.status import candidate, candidate_text

    history = History.read(args.dir)
    if args.where and not args.best:
        raise UserError("--where goes with --best TASK")
    if not (args.prefer or args.knee or args.best):
        data = front(history)
        _print(args, data, lambda: front_text(data))
        return 0
    if args.prefer:
        weights = {}
        for text in args.prefer:
            name, _, weight = text.partition("=")
            try:
                weights[name] = float(weight)
            except ValueError:
                raise UserError(f"--prefer {text}: expected OBJECTIVE=WEIGHT, for example math=2") from None
        number = preferred(history, weights)
    else:
        number = knee(history) if args.knee else best_where(history, args.best, args.where)
    picked = candidate(history, number)
    _print(args, picked, lambda: candidate_text(history, picked))
    return 0


def _archive(args: argparse.Namespace) -> int:
    from evomerge.history import History
    from evomerge.report.archive import archive, archive_text

    data = archive(History.read(args.dir))
    _print(args, data, lambda: archive_text(data))
    return 0


def _report(args: argparse.Namespace) -> int:
    from evomerge.history import History
    from evomerge.report.page import write_page
    from evomerge.report.results import results, text_table

    if args.html is not None and args.html.suffix != ".html":
        raise UserError(f"--html {args.html}: expected a file name that ends in .html")
    history = History.read(args.dir)
    _print(args, results(history, args.split).to_json(), lambda: text_table(history, args.split))
    sys.stdout.flush()
    try:
        page = write_page(history, args.html)
    except RunError as e:
        raise RunError(f"{_line(e)}; choose another place for the page with --html PATH") from None
    print(f"page: {page}", file=sys.stderr)
    return 0


# -- models -------------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> int:
    from evomerge.export.push import check_push, push
    from evomerge.export.write import write_export
    from evomerge.history import History

    history = History.read(args.dir)
    if args.front or len(args.id) > 1:
        return _export_several(args, history)
    number = _candidate(history, args.id[0] if args.id else None)
    if args.push is None and args.private:
        raise UserError("--private goes with --push ORG/NAME")
    if args.push is not None:
        if args.format != "hf":
            raise UserError("--push uploads a checkpoint; leave out --format, or take hf")
        check_push(args.push)
    write_export(history, number, args.format, args.to)
    data = {"candidate": number, "format": args.format, "path": str(args.to)}
    lines = [f"wrote candidate {number} to {args.to}"]
    if args.format == "hf":
        lines.append(f"check it with: evomerge verify {args.to}")
    if args.push is not None:
        _warn_before_push(args.to)
        data["pushed"] = push(args.to, args.push, args.private)
        lines.append(f"pushed to {data['pushed']}")
    _print(args, data, lambda: "\n".join(lines))
    return 0


def _export_several(args: argparse.Namespace, history: History) -> int:
    """Every candidate in a folder or file of its own below --to, named by its number."""
    from evomerge.export.write import write_export

    if args.push is not None:
        raise UserError("--push uploads one candidate; name one, or leave out --push")
    if args.front and args.id:
        raise UserError("--front names the candidates already; leave out the numbers")
    if args.front:
        history.winner  # noqa: B018 (raises the error that says what to do)
    numbers = dict.fromkeys(history.front if args.front else (_candidate(history, i) for i in args.id))
    ending = ".yml" if args.format == "mergekit" else ""
    paths = {n: args.to / f"{n}{ending}" for n in numbers}
    for path in paths.values():
        if path.exists():
            raise UserError(f"{path}: exists; choose another --to")
    args.to.mkdir(parents=True, exist_ok=True)
    for number, path in paths.items():
        write_export(history, number, args.format, path)
    data = [{"candidate": n, "format": args.format, "path": str(p)} for n, p in paths.items()]
    _print(args, data, lambda: "\n".join(f"wrote candidate {n} to {p}" for n, p in paths.items()))
    return 0


def _warn_before_push(folder: Path) -> None:
    """What others will see, or may not be allowed to have; said, not refused."""
    from evomerge.export.hf import RECIPE, RECORD
    from evomerge.export.verify import recipe_paths
    from evomerge.hub import folder_of
    from evomerge.licences import licence_of, remarks
    from evomerge.recipe import Recipe

    paths = recipe_paths(Recipe.load(folder / RECIPE))
    notes = remarks({n: licence_of(folder_of(p)) for n, p in paths.items()})
    for note in [*notes, f"{RECIPE} and {RECORD} name the parents' folders on this machine"]:
        print(f"evomerge: note: {note}", file=sys.stderr)


def _import(args: argparse.Namespace) -> int:
    from evomerge.config import load
    from evomerge.files import new_file
    from evomerge.mergekit_evolve import to_experiment, to_yaml

    name = re.sub(r"[^A-Za-z0-9_-]", "-", args.to.stem)
    experiment = to_experiment(args.genome, name, args.include_path)
    load(experiment)
    new_file(args.to, to_yaml(experiment, args.genome.name))
    flag = "--allow-test-set" if args.include_path is None else "--allow-code"
    _print(
        args,
        {"path": str(args.to), "experiment": experiment},
        lambda: f"wrote {args.to}; read it, then: evomerge check {args.to} {flag}",
    )
    return 0


def _merge(args: argparse.Namespace) -> int:
    from evomerge.export.hf import write_hf
    from evomerge.export.verify import open_recipe_pool, recipe_paths
    from evomerge.merge.pipeline import BuildError
    from evomerge.recipe import Recipe

    recipe = Recipe.load(args.recipe)
    if (reason := recipe.unsupported()) is not None:
        raise UserError(f"{args.recipe}: {reason}")
    pool, manifest = open_recipe_pool(recipe, recipe_paths(recipe))
    canonical = recipe.canonical(manifest, str(args.recipe))
    try:
        write_hf(args.to, canonical, pool, manifest)
    except BuildError as e:
        raise RunError(f"{args.recipe}: {e}; nothing was written") from None
    _print(args, {"recipe_id": canonical.id, "path": str(args.to)}, lambda: f"wrote {canonical.id[:12]} to {args.to}")
    return 0


def _score(args: argparse.Namespace) -> int:
    from evomerge.config import fitness_of, is_experiment, load
    from evomerge.evaluate import pick_device
    from evomerge.export.verify import is_recipe, open_recipe_pool, recipe_paths
    from evomerge.fitness import resolve_fitness
    from evomerge.prepare import check_device
    from evomerge.recipe import Recipe
    from evomerge.report.results import interval
    from evomerge.standalone import score_folder, score_recipe
    from evomerge.tasks.base import SPLITS

    if args.fitness.endswith((".yaml", ".yml")) and is_experiment(Path(args.fitness)):
        fitness = fitness_of(load(args.fitness))
    else:
        fitness = resolve_fitness(args.fitness, Path.cwd())
    device = pick_device(args.device)
    check_device(device)
    splits = tuple(args.split or SPLITS)
    if is_recipe(args.model):
        recipe = Recipe.load(args.model)
        pool, manifest = open_recipe_pool(recipe, recipe_paths(recipe))
        canonical = recipe.canonical(manifest, str(args.model))
        scores = score_recipe(canonical, pool, fitness, splits=splits, device=device, allow=_allowed(args))
    else:
        scores = score_folder(args.model, fitness, splits=splits, device=device, allow=_allowed(args))
    rows = []
    benchmarks = {t.name for t in fitness.benchmarks}
    for split, tasks in scores.items():
        for task, metrics in tasks.items():
            for metric, column in metrics.items():
                # What is no benchmark is no sample either: exact, without an interval.
                score, low, high = interval(column) if task in benchmarks else (float(column[0]),) * 3
                rows.append(
                    {"task": task, "metric": metric, "split": split, "score": score, "low": low, "high": high}
                    | {"n": len(column)}
                )

    def text() -> str:
        lines = [f"{'task':<12} {'split':<7} {'metric':<14} {'score':>8}  95% interval      n"]
        lines += [
            f"{r['task']:<12} {r['split']:<7} {r['metric']:<14} {r['score']:>8.4f}  [{r['low']:.3f}, {r['high']:.3f}]"
            f"{r['n']:>6}"
            for r in rows
        ]
        return "\n".join(lines)

    _print(args, {"model": str(args.model), "scores": rows}, text)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from evomerge.export.verify import verify

    v = verify(args.path, _allowed(args))

    def text() -> str:
        lines = [f"{args.path}: {v.tensors} tensors rebuilt, {len(v.differing)} differ"]
        if v.scores:
            lines.append(f"{len(v.scores)} scores repeated, largest difference {max(v.scores.values()):.2g}")
        lines += list(v.problems) or ["everything agrees with the record"]
        return "\n".join(lines)

    _print(args, v.to_json(), text)
    return 0 if v.ok else 1


# -- what there is ------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    from evomerge.library import entries
    from evomerge.yamlio import load_yaml

    rows: list[dict[str, str]] = []
    if args.what == "methods":
        from evomerge.merge.methods import METHODS

        rows = [{"name": m.name, "status": m.status, "about": m.source} for m in METHODS.values()]
    elif args.what == "algorithms":
        from evomerge.search import ALGORITHMS
        from evomerge.search.auto import AUTO

        rows = [{"name": n, "about": a.about} for n, a in ALGORITHMS.items()]
        rows.append({"name": AUTO, "about": "one of these, by axes, objectives and budget; `check` says which and why"})
    elif args.what == "tasks":
        from evomerge.tasks import KINDS

        rows = [{"name": n, "about": k.about} for n, k in KINDS.items()]
    elif args.what == "presets":
        from evomerge.tasks.presets import preset_files

        for stem, (file, path) in preset_files().items():
            rows += [{"name": n, "about": file.description, "path": str(path)} for n in file.names(stem)]
    else:
        kind = "search_spaces" if args.what == "spaces" else args.what
        for name, path in entries(kind).items():
            data = load_yaml(path)
            rows.append({"name": name, "about": str((data or {}).get("description", "")), "path": str(path)})
    width = max((len(r["name"]) for r in rows), default=0)
    _print(args, rows, lambda: "\n".join(f"{r['name']:<{width}}  {r['about']}" for r in rows))
    return 0


def _schema(args: argparse.Namespace) -> int:
    from pydantic import BaseModel

    from evomerge.config import Experiment, StagedSpec
    from evomerge.fitness import FitnessSpec
    from evomerge.recipe import Recipe
    from evomerge.space import SpaceSpec

    models: dict[str, type[BaseModel]] = {
        "experiment": Experiment,
        "recipe": Recipe,
        "space": SpaceSpec,
        "stages": StagedSpec,
        "fitness": FitnessSpec,
    }
    print(json.dumps(models[args.what].model_json_schema(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
