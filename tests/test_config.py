"""Experiment files: what they may say, where their paths point, and one line for everything else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import config
from evomerge.check import check, text
from evomerge.config import Experiment, StagedSpec, load, parse_overrides
from evomerge.errors import UserError
from evomerge.fitness import FitnessSpec, resolve_fitness
from evomerge.library import entries
from evomerge.search import make_options
from evomerge.space import SpaceSpec
from evomerge.yamlio import MAX_BYTES, dump_yaml

Data = dict[str, Any]

GOOD: Data = {
    "name": "my-merge",
    "models": {"base": "models/base", "experts": {"math": "models/math", "code": "/abs/code"}},
    "search_space": "per-layer",
    "fitness": {"tasks": [{"name": "facts", "data": "facts.jsonl"}]},
    "search": {"algorithm": "cma-es", "seed": 1, "budget": {"evaluations": 300}},
}
SPACE: Data = {"axes": {"weight": {"low": 0.0, "high": 1.0}}}


def task(**data: Any) -> Data:
    return {"fitness": {"tasks": [{"name": "facts", "data": "facts.jsonl", **data}]}}


def stages(*rows: Data) -> Data:
    return {"search_space": {"stages": list(rows)}}


def message(source: Any, overrides: Data | None = None) -> str:
    """The one line that a bad experiment gets."""
    with pytest.raises(UserError) as caught:
        load(source, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def written(folder: Path, data: Data | str, name: str = "exp.yaml") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else dump_yaml(data))
    return path


# -- good files --------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and data resolve against the experiment's folder, wherever the command is called; absolute ones stay."""
    folder = tmp_path / "sub"
    (folder / "models").mkdir(parents=True)
    path = written(folder, {**GOOD, **task(splits={"search": 0.5, "select": 0.5, "report": "../r.jsonl"})})
    monkeypatch.chdir(tmp_path)

    e = load("sub/exp.yaml")

    assert e == load(path)
    assert e.models.base == str(folder / "models" / "base")
    assert e.models.experts == {"math": str(folder / "models" / "math"), "code": "/abs/code"}
    assert e.tasks[0].data == str(folder / "facts.jsonl")
    assert e.tasks[0].splits == {"search": 0.5, "select": 0.5, "report": str(tmp_path / "r.jsonl")}


def test_hub_ids_stay_as_they_stand(tmp_path: Path) -> None:
    """A name of two parts without such a folder is a hub id; reading the file asks nobody."""
    models = {"base": "org/base@v1", "experts": {"math": "org/math", "code": "./org/code"}}
    e = load(written(tmp_path, {**GOOD, "models": models}))

    assert e.models.base == "org/base@v1"
    assert e.models.experts == {"math": "org/math", "code": str(tmp_path / "org" / "code")}


def test_plain_data_is_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment given as a mapping has no file; its paths start where the process stands. It is not changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    before = copy.deepcopy(GOOD)

    assert load(GOOD, {"search.seed": 5}).models.base == str(tmp_path / "models" / "base")
    assert before == GOOD


def test_spaces_and_fitness_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A space or fitness named as a file is found beside the experiment, its own paths beside itself."""
    (tmp_path / "lib").mkdir()
    written(tmp_path / "lib", task(data="d.jsonl")["fitness"], "fit.yaml")
    written(tmp_path / "lib", {"stages": [{"space": "one.yaml", "share": 1}]}, "staged.yaml")
    written(tmp_path / "lib", SPACE, "one.yaml")
    path = written(tmp_path, {**GOOD, "search_space": "lib/staged.yaml", "fitness": "lib/fit.yaml"})
    monkeypatch.chdir("/")

    e = load(path)

    assert e.tasks[0].data == str(tmp_path / "lib" / "d.jsonl")
    assert isinstance(e.stages[0].space, SpaceSpec)
    assert e.stages[0].space.axes["weight"].high == 1.0


@pytest.mark.parametrize("name", entries("experiments"))
def test_library_experiments_load(name: str) -> None:
    """Every packaged experiment loads by name, with models and data that are there."""
    e = load(name)

    assert e.description
    assert all((Path(p) / "config.json").is_file() for p in (e.models.base, *e.models.experts.values()))
    for one in e.tasks:
        assert one.data is None or Path(one.data).is_file()


@pytest.mark.parametrize("name", entries("fitness"))
def test_library_fitness_loads(name: str, tmp_path: Path) -> None:
    """Every packaged fitness loads by name from anywhere, with data that is there."""
    fitness = resolve_fitness(name, tmp_path)

    assert isinstance(fitness, FitnessSpec)
    assert fitness.description
    assert all(Path(t.data).is_file() for t in fitness.tasks if t.data)


def test_resolved_experiment_reads_back_equal(tmp_path: Path) -> None:
    """What a run directory keeps says everything: loaded from another folder it is the same experiment."""
    data = copy.deepcopy(GOOD) | {"search_space": "coarse-to-fine", "workers": {"count": 3, "device": "cpu"}}
    data["name"] = "1e3"
    data["search"] |= {"sigma": 0.25, "population": 8}
    e = load(written(tmp_path, data))
    (tmp_path / "elsewhere").mkdir()

    back = load(written(tmp_path / "elsewhere", e.to_yaml()))

    assert back == e
    assert isinstance(back.search_space, StagedSpec)
    assert back.name == "1e3"


def test_one_space_is_one_stage() -> None:
    """A plain space is a single stage with the whole budget and the search's own algorithm and settings."""
    e = load(GOOD, {"search.sigma": 0.3})

    (stage,) = e.stages
    name, options = e.algorithm_of(stage)
    assert (stage.share, name, options.sigma, options.population) == (1.0, "cma-es", 0.3, None)


def test_stage_settings_override_those_of_the_search() -> None:
    """A stage's own settings and algorithm win over the search's."""
    rows = [
        {"space": SPACE, "share": 0.5, "settings": {"population": 6}},
        {"space": SPACE, "share": 0.5, "algorithm": "random"},
    ]
    e = load({**GOOD, **stages(*rows)}, {"search.population": 12})

    assert [(n, o.population) for n, o in map(e.algorithm_of, e.stages)] == [("cma-es", 6), ("random", 12)]


# -- overrides ---------------------------------------------------------------------------------------------


def test_overrides_replace_single_values() -> None:
    """Dotted keys reach any depth, make what is missing, and win over the file."""
    e = load(GOOD, {"search.seed": 9, "workers.count": 4, "name": "other", "models.experts.third": "/m3"})

    assert (e.search.seed, e.workers.count, e.name) == (9, 4, "other")
    assert list(e.models.experts) == ["math", "code", "third"]


def test_override_texts_are_yaml() -> None:
    """Values of --set are read as YAML: numbers, texts with `=`, lists, mappings and nothing."""
    pairs = ["a.b=2", "c=x=y", "d=[1, 2]", "e={f: 1e-3}", "g="]

    assert parse_overrides(pairs) == {"a.b": 2, "c": "x=y", "d": [1, 2], "e": {"f": 0.001}, "g": None}


@pytest.mark.parametrize(
    ("pair", "words"), [("seed", "expected key=value"), ("=3", "expected key=value"), ("a=[", "--set a line 1")]
)
def test_bad_override_texts(pair: str, words: str) -> None:
    """A --set without a key or a value, or with broken YAML, is refused in one line."""
    with pytest.raises(UserError) as caught:
        parse_overrides([pair])

    assert words in str(caught.value)


def test_overrides_are_checked_as_the_file_is() -> None:
    """A misspelt key or a path through a plain value is refused as it would be in the file."""
    assert "unknown key 'workers.cuont'; did you mean 'count'?" in message(GOOD, {"workers.cuont": 2})
    assert "--set name.first: 'name' is no mapping" in message(GOOD, {"name.first": 1})


# -- bad files -----------------------------------------------------------------------------------------------

BAD: list[tuple[Data, str]] = [
    # keys
    ({"serch": {}}, "unknown key 'serch'; did you mean 'search'?"),
    ({"Name": "x"}, "unknown key 'Name'; did you mean 'name'?"),
    ({"zzz": 1}, "unknown key 'zzz'; known: description, export, fitness"),
    ({"models.bass": "x"}, "unknown key 'models.bass'; did you mean 'base'?"),
    ({"workers.timeout": 3}, "unknown key 'workers.timeout'; did you mean 'timeout_seconds'?"),
    ({"search.budget.evaluation": 3}, "unknown key 'search.budget.evaluation'; did you mean 'evaluations'?"),
    ({"search.seeed": 3}, "cma-es has no setting 'seeed'; did you mean 'seed'?"),
    ({"search.popluation": 8}, "cma-es has no setting 'popluation'; did you mean 'population'?"),
    (task(Metric="accuracy"), "unknown key 'fitness.tasks.0.Metric'; did you mean 'metric'?"),
    ({"fitness": {"task": []}}, "unknown key 'fitness.task'; did you mean 'tasks'?"),
    # names of things
    ({"name": "a/b"}, "name: expected a text that matches"),
    ({"search.algorithm": "cmaes"}, "search.algorithm: unknown algorithm 'cmaes'; did you mean 'cma-es'?"),
    ({"search_space": "per-layr"}, "unknown search space 'per-layr'; did you mean 'per-layer'?"),
    ({"search_space": "nowhere.yaml"}, "search space: no such file"),
    ({"fitness": "skill"}, "unknown fitness 'skill'; did you mean 'skills'?"),
    ({"fitness": "nowhere.yml"}, "fitness: no such file"),
    ({"search_space": {**SPACE, "method": "task_arithmetics"}}, "did you mean 'task_arithmetic'?"),
    (task(metric="acuracy"), "fitness.tasks.0: unknown metric 'acuracy'; did you mean 'accuracy'?"),
    (task(kind="generative"), "fitness.tasks.0: kind: should be one of multiple_choice"),
    ({"workers.backend": "slurm"}, "workers.backend"),
    ({"workers.device": "gpu"}, "workers.device"),
    ({"export.format": "gguf"}, "export.format"),
    ({"models.dtype": "int8"}, "models.dtype"),
    # models
    ({"models.experts": {}}, "models.experts"),
    ({"models.experts": {"base": "x"}}, "the name 'base' is reserved"),
    ({"models.experts": {"uniform": "x"}}, "the name 'uniform' is reserved"),
    ({"models.experts": {"a b": "x"}}, "'a b'"),
    ({"models.experts": {"Math": 3}}, "models.experts.Math: expected a text, got 3"),
    # spaces
    ({"search_space": {"axes": {"weight": {"low": 1, "high": 0}}}}, "`low < high` must hold, but got (low=1, high=0)"),
    ({"search_space": {**SPACE, "params": {"lambda": "big"}}}, "lambda"),
    ({"search_space": 3}, "search_space"),
    (stages(), "search_space: stages"),
    (stages({"space": SPACE, "share": 0.5}), "stages: shares must sum to 1, got 0.5"),
    (stages({"space": SPACE, "share": 0}), "stages.0.share"),
    (stages({"space": "ties", "share": 1, "setings": {}}), "'stages.0.setings'; did you mean 'settings'?"),
    (stages({"space": "tis", "share": 1}), "unknown search space 'tis'; did you mean 'ties'?"),
    (stages({"space": "coarse-to-fine", "share": 1}), "a stage cannot be staged itself"),
    (
        stages({"space": {"axes": {"weight": {"low": 1, "high": 0}}}, "share": 1}),
        "stages.0.space.axes.weight: `low < high` must hold",
    ),
    (stages({"space": SPACE, "share": 1, "algorithm": "radnom"}), "unknown algorithm 'radnom'; did you mean 'random'?"),
    (stages({"space": SPACE, "share": 1, "settings": {"sigmaa": 1}}), "no setting 'sigmaa'; did you mean 'sigma'?"),
    # fitness
    ({"fitness": {"tasks": []}}, "fitness.tasks"),
    ({"fitness": {}}, "the key 'fitness.tasks' is missing"),
    ({"fitness": 3}, "fitness"),
    ({"fitness": {"tasks": [{"name": "a", "data": "x"}, {"name": "a", "data": "y"}]}}, "the names must differ"),
    ({"fitness": {"tasks": [{"name": "a"}]}}, "shares are cut from `data`, which is missing"),
    (task(splits={"search": 0.5, "select": 0.5}), "expected search, select, report, got search, select"),
    (task(splits={"search": 0.5, "select": 0.5, "report": 0.5}), "sum to at most 1"),
    (task(splits={"serach": 0.5, "select": 0.2, "report": 0.2}), "'serach'"),
    (task(weight=0), "fitness.tasks.0.weight"),
    ({**task(), "fitness.floor": {"penalty": 0}}, "fitness.floor.penalty"),
    ({**task(), "fitness.objective": "best"}, "fitness.objective"),
    # search
    ({"search.budget": {"evaluations": 0}}, "search.budget.evaluations: expected more than 0, got 0"),
    ({"search.budget": {"minutes": -1}}, "search.budget.minutes"),
    ({"search.budget": {}}, "exactly one of evaluations, minutes, item_evaluations is needed, got none"),
    ({"search.budget": {"evaluations": 5, "minutes": 1}}, "got ['evaluations', 'minutes']"),
    ({"search.budget": 5}, "search.budget"),
    ({"search.seed": -1}, "search.seed"),
    ({"search.seed": "x"}, "search.seed"),
    ({"search.finalists": 0}, "search.finalists"),
    ({"search.sigma": "wide"}, "sigma should be a number, got 'wide'"),
    ({"search.sigma": 0}, "sigma"),
    ({"search.population": 2.5}, "population should be a whole number, got 2.5"),
    ({"search.algorithm": "random", "search.sigma": 0.2}, "random has no setting 'sigma'"),
    ({"workers.count": 0}, "workers.count"),
    ({"workers.timeout_seconds": 0}, "workers.timeout_seconds"),
]


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_experiments_get_one_line(overrides: Data, words: str) -> None:
    """Every kind of bad input is refused in one line that names the place, the rule, or the nearest name."""
    assert words in message(GOOD, overrides)


@pytest.mark.parametrize("key", ["name", "models", "search_space", "fitness", "search"])
def test_missing_keys_are_named(key: str) -> None:
    """Each key that an experiment needs is asked for by name; a space with what there is."""
    more = "; name one of `evomerge list spaces`, or write one inline" if key == "search_space" else ""
    assert message({k: v for k, v in GOOD.items() if k != key}).endswith(f"the key {key!r} is missing{more}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "exp.yaml line 2, column 1: the key 'name' stands here twice"),
        ("name: &n a\ndescription: *n\n", "exp.yaml line 2, column 14: aliases (*name) are not accepted"),
        ("name: [\n", "exp.yaml line 2"),
        ("", "expected a mapping of keys, got NoneType"),
        ("- a\n", "expected a mapping of keys, got list"),
        ("#" * (MAX_BYTES + 1), f"{MAX_BYTES + 1} bytes of YAML"),
    ],
    ids=["duplicate", "alias", "broken", "empty", "list", "oversized"],
)
def test_bad_yaml_is_refused_by_file(tmp_path: Path, text: str, words: str) -> None:
    """Duplicate keys, aliases, broken and oversized files are refused with file, line and column."""
    assert words in message(written(tmp_path, text))


def test_bad_library_files_are_named(tmp_path: Path) -> None:
    """A mistake in a space or fitness file names that file, not the experiment."""
    written(tmp_path, {"axis": {}}, "space.yaml")
    written(tmp_path, {"tasks": [{"nam": "x"}]}, "fit.yaml")
    space = written(tmp_path, {**GOOD, "search_space": "space.yaml"}, "a.yaml")
    fit = written(tmp_path, {**GOOD, "fitness": "fit.yaml"}, "b.yaml")

    assert "space.yaml: unknown key 'axis'; did you mean 'axes'?" in message(space)
    assert "fit.yaml: unknown key 'tasks.0.nam'; did you mean 'name'?" in message(fit)


def test_a_stage_that_names_its_own_file_is_refused(tmp_path: Path) -> None:
    """A staged space cannot contain itself, and saying so does not recurse without end."""
    written(tmp_path, {"stages": [{"space": "self.yaml", "share": 1}]}, "self.yaml")

    assert "a stage cannot be staged itself" in message(written(tmp_path, {**GOOD, "search_space": "self.yaml"}))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quickstrat", "unknown experiment 'quickstrat'; did you mean 'quickstart'?"),
        ("none.yaml", "experiment: no such file"),
        ("..", "unknown experiment '..'"),
    ],
)
def test_unknown_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    """A name that is no library entry, and a file that is not there, are refused by name."""
    monkeypatch.chdir(tmp_path)

    assert words in message(name)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers(), max_size=2)
)
FULL: Data = json.loads(json.dumps(GOOD)) | {"search_space": {**SPACE, "groups": {"buckets": 2}}}


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(p for k, v in inner for p in places(v, (*at, k)))]


@settings(max_examples=150, deadline=None)
@given(at=st.sampled_from([p for p in places(FULL) if p]), value=VALUES, rename=st.booleans())
def test_mutated_experiments_raise_only_user_errors(at: tuple[Any, ...], value: Any, rename: bool) -> None:
    """A good experiment with any one value replaced or key renamed loads, or is refused in one line."""
    data = copy.deepcopy(FULL)
    inner: Any = data
    for key in at[:-1]:
        inner = inner[key]
    if rename and isinstance(inner, dict):
        inner[str(value)] = inner.pop(at[-1])
    else:
        inner[at[-1]] = value

    try:
        outcome: Any = load(data)
    except UserError as e:
        outcome = str(e)
    assert isinstance(outcome, Experiment) or (outcome and "\n" not in outcome)


# -- identity --------------------------------------------------------------------------------------------------

HASHES = {"base": "a" * 64, "math": "b" * 64, "code": "c" * 64}


def identity(overrides: Data | None = None, hashes: Data = HASHES, plans: Data | None = None, dtype: str = "f") -> str:
    return load(GOOD, overrides).identity(hashes, plans or {"facts": "p1"}, dtype)


@pytest.mark.parametrize(
    "overrides",
    [
        {"search.budget.evaluations": 7},
        {"search.budget": {"minutes": 5}},
        {"workers": {"count": 8, "backend": "inline", "device": "cpu", "timeout_seconds": 1}},
        {"export.format": "hf"},
        {"name": "other"},
        {"description": "text"},
        {"models.base": "/elsewhere"},
        {"fitness": {"description": "text", "tasks": [{"name": "facts", "data": "/elsewhere.jsonl"}]}},
        {"search.sigma": 1 / 6},
    ],
    ids=lambda o: next(iter(o)),
)
def test_identity_leaves_out_what_changes_no_result(overrides: Data) -> None:
    """Budget, workers, export, name, texts, paths and spelled-out defaults leave the experiment's id."""
    assert identity(overrides) == identity()


@pytest.mark.parametrize(
    "overrides",
    [
        {"search.seed": 2},
        {"search.finalists": 3},
        {"search.sigma": 0.2},
        {"search.algorithm": "random"},
        {"search_space": "ties"},
        {"search_space": "coarse-to-fine"},
        task(metric="probability"),
        task(weight=2.0),
        {"fitness": {"objective": "recovered_gain", **task()["fitness"]}},
        {"fitness": {"floor": {}, **task()["fitness"]}},
    ],
    ids=lambda o: next(iter(o)),
)
def test_identity_has_what_determines_results(overrides: Data) -> None:
    """Seed, finalists, algorithm, settings, space and fitness change the experiment's id."""
    assert identity(overrides) != identity()


def test_later_settings_leave_earlier_runs_their_identity() -> None:
    """A setting that came later counts only where it is not at its default."""
    small = {"search.algorithm": "map", "search.budget": {"evaluations": 40}}

    plain = {"population": 10, "design": 2.0, "r2": 0.5}
    assert config._plain_algorithm("map", make_options("map", {})) == ["map", plain]
    assert identity({**small, "search.gradients": False}) == identity(small)
    assert identity({**small, "search.gradients": True}) != identity(small)


def test_identity_has_models_items_and_type() -> None:
    """Other weights, other items or another dtype are another experiment."""
    ids = {identity(), identity(hashes={**HASHES, "math": "d"}), identity(plans={"facts": "p2"}), identity(dtype="b")}

    assert len(ids) == 4


def test_a_space_is_needed_where_axes_are_searched(small_experiment: Path) -> None:
    """Algorithms that mix the models themselves do without; others say what to name."""
    data = json.loads(small_experiment.read_text())
    del data["search_space"]
    file = small_experiment.with_name("no-space.yaml")
    file.write_text(json.dumps(data))

    with pytest.raises(UserError, match="the key 'search_space' is missing; name one of"):
        load(file)
    mixed = load(file, {"search": {"algorithm": "greedy-soup", "budget": {"evaluations": 9}}})
    assert mixed.axes_of(mixed.stages[0], 3) == "no axes"
    assert "no axes: greedy-soup mixes the models itself" in text(check(mixed))
