"""Imports point downwards only, search and merge do not know each other, and start-up is light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "evomerge"


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LEVELS = tuple(
    tuple(line.split())
    for line in """
    errors canonical architectures merge.methods merge.masks merge export report report.figures
    yamlio schema library files manifest stock tasks.rows tasks.test_sets journal pareto search.archive report.html
    hub
    recipe pool licences tasks.base tasks.presets mergekit_evolve
    proposal merge.bank merge.live merge.geometry tasks.prompts tasks.perplexity tasks.weights tasks.function
    tasks.structure tasks.lm_eval tasks.multiple_choice tasks.generation report.coefficients
    tasks
    space score.plan workers rundir merge.pipeline merge.gradient
    search.base score score.attention score.model score.prompts merge.builder commit
    merge.route workers.inline workers.fake workers.units
    search.optuna_study search.recipes search.surrogate search.elite
    search.cmaes search.random_search search.ga search.greedy_soup search.frank_wolfe search.nsga2 search.tpe search.gp
    search.niches search.route_ga search.map_elites search.cycleqd search.adam
    search.nsga3 search.map search.auto
    search.bayesian_map search.nested_map
    workers.local workers.ray workers.child score.multiple_choice score.perplexity score.weights evaluate
    score.structure score.generation score.function score.lm_eval
    search layer_swap route_space fitness
    config
    objective budget items
    refusals importance
    prepare
    progress history standalone check inspect_pool
    report.routes
    session warm export.mergekit export.record report.results report.status
    run export.card export.push report.archive report.compare report.front report.pool_page
    export.hf report.page
    export.verify
    export.write
    api
    cli __init__
    __main__
    """.strip().splitlines()
)
"""Bottom first. A module imports from lower levels only, lazily too; a new module goes where it fits."""

HEAVY = words("torch transformers safetensors cma ray optuna plotly scipy psutil huggingface_hub pyarrow lm_eval")
IMPURE = words(
    """
    pool stock merge.masks merge.bank merge.geometry merge.live merge.pipeline merge.builder merge.gradient merge.route
    score.attention score.model score.multiple_choice score.perplexity score.weights score.generation score.function
    score.structure score.lm_eval
    evaluate standalone check workers.child workers.ray export.hf export.verify report.results report.compare
    report.archive report.front report.page report.pool_page inspect_pool licences export.write export.card export.push
    """
)
"""May load heavy packages when they are imported; all others must not, so that the command line starts fast."""
PURE = tuple(name for level in LEVELS for name in level if name not in IMPURE)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(p): p for p in sorted(PACKAGE.rglob("*.py")) if "_library" not in p.parts}


@cache
def imports(module: str, *, top: bool = False) -> frozenset[str]:
    """Dotted names that a module imports; with `top` only what importing it runs."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update(a.name for a in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module is not None:
                assert child.level == 0, f"{module}: imports are absolute"
                found.add(child.module)
                found.update(f"{child.module}.{a.name}" for a in child.names)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not (top and (function or typing)):
                visit(child)

    visit(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    return frozenset(found)


def own(module: str, *, top: bool = False) -> set[str]:
    """The modules of this package that a module imports."""
    return {n.removeprefix("evomerge.") for n in imports(module, top=top)} & set(MODULES)


def level_of(module: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if module in names)


def test_the_levels_name_every_module() -> None:
    """A new module is given its level here, once."""
    named = [n for names in LEVELS for n in names]

    assert len(named) == len(set(named))
    assert set(MODULES) <= set(named), "these modules have no level yet"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    """A module imports modules of lower levels only, at the top and within functions."""
    upwards = {n for n in own(module) if n != module and level_of(n) >= level_of(module)}

    assert upwards == set()


def reached(module: str, *, top: bool = False) -> set[str]:
    """Everything of this package that a module imports, directly or through others."""
    out: set[str] = set()
    todo = [module]
    while todo:
        for n in own(todo.pop(), top=top) - out:
            out.add(n)
            todo.append(n)
    return out


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] == "search"])
def test_search_knows_no_weights(module: str) -> None:
    """Search sees vectors, losses and item ids: no pool, no merging beyond the table of methods, no scoring."""
    seen = reached(module)

    assert "pool" not in seen
    assert {n for n in seen if n.startswith("merge")} <= {"merge", "merge.methods"}
    assert not {n for n in seen if n.startswith(("score", "workers", "export"))}
    assert not {n for n in imports(module) if n.split(".")[0] == "torch"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] == "merge"])
def test_merging_knows_no_search(module: str) -> None:
    """Merging sees tensors and a recipe: no search, no spaces, no configuration, no loop."""
    seen = reached(module)

    assert not seen & {"config", "run", "session", "journal", "space", "prepare", "objective", "budget"}
    assert not {n for n in seen if n.startswith(("search", "score", "workers"))}


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_nothing_heavy(module: str) -> None:
    """Pure modules, and all they import at the top, load no torch, pycma or other heavy package."""
    heavy = {(m, n.split(".")[0]) for m in {module, *reached(module, top=True)} for n in imports(m, top=True)}

    assert {(m, n) for m, n in heavy if n in HEAVY} <= {("workers.local", "psutil")}


def test_one_module_knows_ray() -> None:
    """Ray is imported in one file at most."""
    assert {m for m in MODULES if any(n.split(".")[0] == "ray" for n in imports(m))} <= {"workers.ray"}


LIGHT = """
import json, sys
sys.argv = ["evomerge", *sys.argv[1:]]
from evomerge.cli import main
try:
    main()
except SystemExit as e:
    assert not e.code, e.code
print("MODULES", json.dumps(sorted({n.partition(".")[0] for n in sys.modules})))
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["list", "methods"], ["list", "algorithms"], ["list", "tasks"], ["list", "presets"], ["schema"]],
)
def test_start_up_is_light(arguments: list[str]) -> None:
    """Help and lists load none of torch, transformers, cma, ray, optuna and plotly."""
    done = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=True)

    text, _, names = done.stdout.rpartition("MODULES ")
    loaded = set(json.loads(names))
    assert text.strip()
    assert "evomerge" in loaded
    assert not loaded & {"torch", "transformers", "cma", "ray", "optuna", "plotly", "safetensors"}
