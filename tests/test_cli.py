"""Every command through `main`: exit status, what goes to stdout, what goes to stderr."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from evomerge.cli import main
from evomerge.history import History
from evomerge.recipe import Recipe
from evomerge.yamlio import load_yaml

Capsys = pytest.CaptureFixture[str]


def call(capsys: Capsys, *words: object) -> tuple[int, str, str]:
    """Exit status, stdout, stderr without transformers' progress bars."""
    capsys.readouterr()
    try:
        status = main([str(w) for w in words])
    except SystemExit as e:  # argparse
        status = int(e.code or 0)
    out, err = capsys.readouterr()
    return status, out, "".join(line for line in err.splitlines(True) if "it/s]" not in line)


def data(capsys: Capsys, *words: object) -> Any:
    """What a command prints with --json; it must print nothing else on stdout."""
    status, out, err = call(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out)


def complaint(capsys: Capsys, status: int, *words: object) -> str:
    """The one line on stderr of a command that fails."""
    got, out, err = call(capsys, *words)
    assert (got, out) == (status, ""), err
    assert err.startswith("evomerge: ")
    assert err.count("\n") == 1
    return err


# -- run and resume -------------------------------------------------------------------------------------------


def test_run_prints_the_table_and_where_it_lies(
    small_experiment: Path, finished_run: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """Progress on stderr, the table on stdout, exit 0; the journal is that of the same experiment."""
    status, out, err = call(capsys, "run", small_experiment, "--out", tmp_path / "out")

    assert status == 0
    assert out.startswith("accuracy on the report split, 95% intervals\n")
    assert f"run directory: {tmp_path / 'out'}" in out
    assert f"page: {tmp_path / 'out/report.html'}" in out
    assert "<h1>small: evomerge run</h1>" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "small: " in err
    assert "12 candidates" in err
    assert "best #" in err
    assert (tmp_path / "out/journal.jsonl").read_bytes() == (finished_run / "journal.jsonl").read_bytes()


def test_run_goes_to_a_folder_by_name_and_exports(
    small_experiment: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --out the folder is runs/NAME; an experiment that asks for an export gets it once."""
    monkeypatch.chdir(tmp_path)
    words = ("run", small_experiment, "--set", "search.budget.evaluations=4", "--set", "export.format=hf")
    first = data(capsys, *words)
    record = (tmp_path / "runs/small/exports/hf/evomerge.json").read_bytes()

    assert first["dir"] == "runs/small"
    assert data(capsys, *words) == first
    assert (tmp_path / "runs/small/exports/hf/evomerge.json").read_bytes() == record


def test_resume_finishes_a_cut_run(run_copy: Path, capsys: Capsys) -> None:
    """resume needs the folder only and ends in the same bytes and the same table."""
    whole = (run_copy / "journal.jsonl").read_bytes()
    table = data(capsys, "report", run_copy)["table"]
    (run_copy / "journal.jsonl").write_bytes(whole[: len(whole) // 3])

    assert data(capsys, "resume", run_copy)["table"] == table
    assert (run_copy / "journal.jsonl").read_bytes() == whole


@pytest.mark.parametrize("allowed", [[], ["--allow-code", "--allow-test-set"]])
def test_interruption_prints_the_way_back(
    small_experiment: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch, allowed: list[str]
) -> None:
    """Ctrl-C is exit 130 with the line that goes on, permissions included, and that line works."""
    from evomerge.workers.inline import InlineExecutor

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(InlineExecutor, "wait", interrupt)
        status, out, err = call(capsys, "run", small_experiment, "--out", tmp_path / "out", *allowed)

    assert (status, out) == (130, "")
    way_back = " ".join(["evomerge resume", str(tmp_path / "out"), *allowed])
    assert err.endswith(f"evomerge: interrupted; go on with: {way_back}\n")
    assert call(capsys, "resume", tmp_path / "out", *allowed)[0] == 0


def test_a_run_that_cannot_score_its_base_fails(
    small_experiment: Path, tiny_model: Any, tmp_path: Path, capsys: Capsys
) -> None:
    """Good input but no result: exit 1, one last line that says why."""
    sick = tiny_model("llama", name="sick")
    tensors = load_file(sick / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, sick / "model.safetensors")
    status, out, err = call(capsys, "run", small_experiment, "--out", tmp_path / "out", "--set", f"models.base={sick}")

    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("evomerge: the base itself could not be scored")


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (("run", "no-such"), "unknown experiment 'no-such'"),
        (("run", "gone.yaml"), "no such file"),
        (("run", "{experiment}", "--set", "search.seed"), "expected key=value"),
        (("run", "{experiment}", "--set", "search.algoritm=random"), "algoritm"),
        (("run", "{experiment}", "--set", "search.algorithm=cma"), "did you mean 'cma-es'?"),
        (("run", "{experiment}", "--set", "serch.seed=1"), "unknown key 'serch'; did you mean 'search'?"),
        (("run", "{experiment}", "--set", "search.budget.evaluations=0"), "search.budget.evaluations"),
        (("run", "{experiment}", "--set", "models.experts.one=/gone"), "/gone: no such model folder"),
        (("run", "{experiment}", "--set", "search_space=per-layr"), "did you mean 'per-layer'?"),
        (("run", "{experiment}", "--set", "search_space.axes.weight={low: 1, high: 0}"), "`low < high` must hold"),
        (("run", "{experiment}", "--out", "{run}", "--set", "search.seed=9"), "holds another experiment"),
        (("run", "{experiment}", "--out", "{run}", "--set", "search.budget.evaluations=9"), "it can only be raised"),
        (("resume", "gone"), "is no run directory"),
        (("check", "{experiment}", "--set", "fitness.tasks=[]"), "fitness"),
        (("status", "gone"), "is no run directory"),
        (("show", "{run}", "17"), "no candidate 17; there are 0 to 16"),
        (("show", "{run}", "best"), "a candidate is a number or 'winner', got 'best'"),
        (("report", "gone"), "is no run directory"),
        (("export", "{run}", "99", "--to", "x"), "no candidate 99"),
        (("export", "{run}", "--to", "{run}"), "exists and is not empty"),
        (("export", "{run}", "--format", "mergekit", "--to", "{experiment}"), "exists; choose another --to"),
        (("merge", "gone.yaml", "--to", "x"), "cannot be read"),
        (("merge", "{experiment}", "--to", "x"), "unknown key"),
        (("score", "gone", "skills"), "no such model folder"),
        (("score", "{model}", "skils"), "unknown fitness 'skils'; did you mean 'skills'?"),
        (("score", "{model}", "skills", "--device", "cuda:7"), "cuda"),
        (("verify", "{model}"), "expected a folder that evomerge exported"),
    ],
    ids=lambda v: "-".join(v[:1] + v[-1:])[:40] if isinstance(v, tuple) else "",
)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    fragment: str,
    small_experiment: Path,
    finished_run: Path,
    tiny_model: Any,
    capsys: Capsys,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit 2, one line on stderr, nothing on stdout, and nothing half-written."""
    monkeypatch.chdir(tmp_path)
    before = (finished_run / "journal.jsonl").read_bytes()
    places = {"experiment": small_experiment, "run": finished_run, "model": tiny_model("llama")}

    assert fragment in complaint(capsys, 2, *(w.format(**places) if "{" in w and ":" not in w else w for w in words))
    assert list(tmp_path.iterdir()) == []
    assert (finished_run / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "words", [(), ("rn",), ("run",), ("export", "x"), ("export", "x", "--to", "y", "--format", "gguf"), ("list", "x")]
)
def test_wrong_usage(words: tuple[str, ...], capsys: Capsys) -> None:
    """argparse's own refusals are exit 2 on stderr too."""
    status, out, err = call(capsys, *words)

    assert (status, out) == (2, "")
    assert err.startswith("usage: evomerge")


# -- reading --------------------------------------------------------------------------------------------------


def test_status(finished_run: Path, capsys: Capsys) -> None:
    """For people and as JSON."""
    s = data(capsys, "status", finished_run)
    status, out, err = call(capsys, "status", finished_run)

    assert (status, err) == (0, "")
    assert s["phase"] == "finished"
    assert out.startswith("small: finished; 12 of 12 asked candidates scored")


def test_unfinished_runs_have_no_winner_to_show(run_copy: Path, capsys: Capsys) -> None:
    """status and report work on a live run; show and export of a winner say how to get one."""
    lines = (run_copy / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (run_copy / "journal.jsonl").write_bytes(b"".join(lines[:20]))

    assert data(capsys, "status", run_copy)["phase"] in ("baselines", "searching")
    assert data(capsys, "report", run_copy)["table"] == []
    assert "nothing is scored on the report split yet" in call(capsys, "report", run_copy)[1]
    assert data(capsys, "report", run_copy, "--split", "search")["table"]
    for words in (("show", run_copy), ("export", run_copy, "--to", run_copy.parent / "x")):
        assert f"finish it with `evomerge resume {run_copy}`" in complaint(capsys, 2, *words)


def test_damaged_run_directories(run_copy: Path, capsys: Capsys) -> None:
    """A journal damaged in its middle is bad input for every command that reads it."""
    content = bytearray((run_copy / "journal.jsonl").read_bytes())
    content[len(content) // 2] ^= 1
    (run_copy / "journal.jsonl").write_bytes(content)

    for command in ("status", "show", "report", "resume"):
        assert "damaged" in complaint(capsys, 2, command, run_copy)


def test_show(finished_run: Path, capsys: Capsys) -> None:
    """The winner by default, any candidate by number; the text is the recipe."""
    winner = History.read(finished_run).winner_id

    assert data(capsys, "show", finished_run)["id"] == winner
    assert data(capsys, "show", finished_run, "winner")["winner"] is True
    shown = data(capsys, "show", finished_run, "5")
    assert (shown["id"], shown["role"]) == (5, "search")
    assert Recipe.from_yaml(call(capsys, "show", finished_run, "5")[1]).recipe == 1


def test_report_table(finished_run: Path, capsys: Capsys) -> None:
    """`table` has one row per model, task and the mean, with the promised fields."""
    report = data(capsys, "report", finished_run)
    rows = report["table"]

    assert {tuple(r) for r in rows} == {("model", "task", "metric", "split", "score", "low", "high", "n")}
    models, tasks = ("base", "one", "two", "uniform", "winner"), ("sums", "words", "mean")
    assert [(r["model"], r["task"]) for r in rows] == [(m, t) for m in models for t in tasks]
    assert all(r["low"] <= r["score"] <= r["high"] for r in rows)
    assert {r["n"] for r in rows if r["task"] != "mean"} == {8}
    assert {(r["metric"], r["split"]) for r in rows} == {("accuracy", "report")}
    assert {c["model"] for c in report["comparisons"]} == set(models) - {"winner"}
    assert report["winner"] == History.read(finished_run).winner_id
    assert set(report["optimism"]) == {"search", "select", "report"}


def test_report_on_another_split(finished_run: Path, capsys: Capsys) -> None:
    """--split names the split; the text shows it."""
    rows = data(capsys, "report", finished_run, "--split", "select")["table"]

    assert {r["split"] for r in rows} == {"select"}
    assert {r["n"] for r in rows if r["task"] != "mean"} == {6}
    assert "on the select split" in call(capsys, "report", finished_run, "--split", "select")[1]


def test_report_writes_the_page(run_copy: Path, tmp_path: Path, capsys: Capsys) -> None:
    """Beside the journal, or where --html says, in place of an older one; the table is printed as ever."""
    elsewhere = tmp_path / "new" / "page.html"
    _, table, err = call(capsys, "report", run_copy)
    call(capsys, "report", run_copy, "--html", elsewhere)

    assert table.startswith("accuracy on the report split")
    assert err == f"page: {run_copy / 'report.html'}\n"
    assert elsewhere.read_bytes() == (run_copy / "report.html").read_bytes()
    assert call(capsys, "resume", run_copy)[0] == 0  # the page is no stranger in the folder
    assert (run_copy / "report.html").read_bytes() == elsewhere.read_bytes()


def test_report_where_no_page_can_be_written(run_copy: Path, tmp_path: Path, capsys: Capsys) -> None:
    """A name that is no page's is refused before anything; a place that cannot be written costs no table."""
    assert "ends in .html" in complaint(capsys, 2, "report", run_copy, "--html", run_copy / "journal.jsonl")
    (tmp_path / "file").write_text("", encoding="utf-8")
    status, table, err = call(capsys, "report", run_copy, "--html", tmp_path / "file" / "page.html")

    assert status == 1
    assert table.startswith("accuracy on the report split")
    assert "choose another place for the page with --html PATH" in err


def test_a_page_that_cannot_be_written_takes_nothing_from_the_run(run_copy: Path, capsys: Capsys) -> None:
    """The run is whole in its journal: exit 0, its table, and how to make the page elsewhere."""
    (run_copy / "report.html").unlink(missing_ok=True)
    (run_copy / "report.html").mkdir()
    status, out, err = call(capsys, "resume", run_copy)

    assert status == 0
    assert out.startswith("accuracy on the report split")
    assert f"no page: {run_copy / 'report.html'}: cannot be written" in err


def test_check(small_experiment: Path, capsys: Capsys) -> None:
    """The estimate, for people and as JSON; --set applies."""
    c = data(capsys, "check", small_experiment, "--set", "search.budget.evaluations=99")
    status, out, _ = call(capsys, "check", small_experiment)

    assert c["candidates"] == 99
    assert status == 0
    assert out.startswith("small: fits together (")


# -- models ---------------------------------------------------------------------------------------------------


def test_export_verify_and_score(finished_run: Path, tmp_path: Path, small_experiment: Path, capsys: Capsys) -> None:
    """A winner is exported, verifies, and scores from its folder, and from its recipe, as in the run."""
    target = tmp_path / "winner"
    fitness = tmp_path / "fitness.yaml"
    source = load_yaml(small_experiment)["fitness"]
    for task in source["tasks"]:
        task["splits"] = {s: str(small_experiment.parent / f) for s, f in task["splits"].items()}
    fitness.write_text(json.dumps(source))
    status, out, _ = call(capsys, "export", finished_run, "--to", target)
    verified = data(capsys, "verify", target)
    folder = data(capsys, "score", target, fitness, "--device", "cpu")["scores"]
    recipe = data(capsys, "score", target / "recipe.yaml", fitness, "--device", "cpu", "--split", "report")["scores"]

    assert status == 0
    assert f"check it with: evomerge verify {target}" in out
    assert verified["ok"]
    assert verified["differing"] == []
    table = {(r["task"], r["metric"], r["split"]): r["score"] for r in folder}
    assert len(table) == 3 * 2 * 5
    for r in data(capsys, "report", finished_run)["table"]:
        if r["model"] == "winner" and r["task"] != "mean":
            assert table[r["task"], "accuracy", "report"] == r["score"]
    assert {(r["task"], r["metric"], r["split"]): r["score"] for r in recipe}.items() <= table.items()


def test_verify_fails_on_a_changed_export(finished_run: Path, tmp_path: Path, capsys: Capsys) -> None:
    """What does not agree with its record is exit 1, with the reason on stdout as data."""
    target = tmp_path / "winner"
    call(capsys, "export", finished_run, "--to", target)
    tensors = {n: t.clone() for n, t in load_file(target / "model.safetensors").items()}
    tensors["model.norm.weight"] += 1
    save_file(tensors, target / "model.safetensors")
    status, out, err = call(capsys, "verify", target)

    assert (status, err) == (1, "")
    assert "1 differ" in out
    assert "the first is model.norm.weight" in out


def test_export_as_mergekit(finished_run: Path, tmp_path: Path, capsys: Capsys) -> None:
    """A configuration file of the winner, and of a candidate by number."""
    written = data(capsys, "export", finished_run, "6", "--format", "mergekit", "--to", tmp_path / "m.yml")
    config = load_yaml(tmp_path / "m.yml")

    assert written == {"candidate": 6, "format": "mergekit", "path": str(tmp_path / "m.yml")}
    assert config["merge_method"] == "task_arithmetic"
    assert len(config["models"]) == 2


def test_export_refuses_sources_that_changed(
    small_experiment: Path, finished_run: Path, run_copy: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """A run whose models are not what they were exports nothing."""
    text = (run_copy / "experiment.yaml").read_text()
    (run_copy / "experiment.yaml").write_text(text.replace(str(small_experiment.parent / "one"), "/tmp/gone-model"))

    assert "no such model folder" in complaint(capsys, 2, "export", run_copy, "--to", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_shown_recipe_merges_to_the_export(finished_run: Path, tmp_path: Path, capsys: Capsys) -> None:
    """`show` > recipe.yaml, `merge recipe.yaml` gives the same weights as `export`."""
    (tmp_path / "recipe.yaml").write_text(call(capsys, "show", finished_run)[1])
    merged = data(capsys, "merge", tmp_path / "recipe.yaml", "--to", tmp_path / "merged")
    call(capsys, "export", finished_run, "--to", tmp_path / "exported")

    assert merged["recipe_id"] == History.read(finished_run).winner.id
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("merged", "exported")]
    assert weights[0] == weights[1]
    assert data(capsys, "verify", tmp_path / "merged")["ok"]


def write_recipe(path: Path, tiny_model: Callable[..., Path], **fields: Any) -> Path:
    sources = {"base": {"path": str(tiny_model("llama"))}, "x": {"path": str(tiny_model("llama", 1))}}
    merge = [{"method": "linear", "sources": {"x": {}}}]
    path.write_text(json.dumps({"recipe": 1, "sources": sources, "merge": merge, **fields}))
    return path


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"merge": None, "route": {"hops": [{"from": "x", "layer": 2}]}},
         "r.yaml: route, hop 1: 'x' has layers 0 to 1, not 2"),
        ({"merge": None, "route": {"hops": [{"from": "y", "layer": 0}]}}, "unknown source 'y'"),
        ({"merge": None, "route": {"hops": []}}, "route.hops: expected 1 or more entries"),
        ({"tokenizer": {"policy": "union"}}, "policy 'union' is not built"),
        ({"merge": [{"method": "linear", "sources": {"x": {"weight": 0}}}]}, "all weights of linear are 0"),
        ({"merge": [{"method": "slurp", "sources": {"x": {}}}]}, "unknown method 'slurp'; did you mean 'slerp'"),
        ({"merge": [{"match": {"layers": [1, 7]}, "method": "linear", "sources": {"x": {}}}]},
         "r.yaml: merge rule 1: layers [1, 7] go past the last one: the model has 2 layers"),
        ({"sources": {"base": {}, "x": {}}}, "the recipe gives no folder"),
    ],
    ids=["hop too deep", "hop from nowhere", "no hops", "tokenizer", "zero weights", "method", "layers", "no folder"],
)  # fmt: skip
def test_recipes_that_cannot_be_built(
    fields: dict[str, Any], fragment: str, tiny_model: Any, tmp_path: Path, capsys: Capsys
) -> None:
    """merge and score refuse them in one line and write nothing."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_model, **fields)

    assert fragment in complaint(capsys, 2, "merge", recipe, "--to", tmp_path / "out")
    assert fragment in complaint(capsys, 2, "score", recipe, "skills")
    assert not (tmp_path / "out").exists()


def test_bad_weights_fail_in_one_line(tiny_model: Any, tmp_path: Path, capsys: Capsys) -> None:
    """Merging or scoring NaN weights is exit 1: the input was read, the work failed."""
    sick = tiny_model("llama", 1, name="sick")
    tensors = load_file(sick / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, sick / "model.safetensors")
    sources = {"base": {"path": str(tiny_model("llama"))}, "x": {"path": str(sick)}}
    recipe = write_recipe(tmp_path / "r.yaml", tiny_model, sources=sources)

    assert "NaN or infinite weights in final_norm; nothing was written" in complaint(
        capsys, 1, "merge", recipe, "--to", tmp_path / "out"
    )
    for model in (recipe, sick):
        assert "NaN or infinite weights in final_norm" in complaint(capsys, 1, "score", model, "skills")
    assert not (tmp_path / "out").exists()


# -- what there is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("methods", {"linear", "task_arithmetic", "ties"}),
        ("algorithms", {"cma-es", "random"}),
        ("tasks", {"multiple_choice", "generation", "perplexity", "weights"}),
        ("presets", {"gsm8k", "mgsm-de", "svamp", "arc", "mmlu", "xcopa-it", "blimp"}),
        ("spaces", {"one-weight-per-expert", "per-layer", "ties", "coarse-to-fine"}),
        ("fitness", {"skills"}),
        ("experiments", {"quickstart"}),
    ],
)
def test_list(what: str, names: set[str], capsys: Capsys) -> None:
    """Every library lists its entries with a word about each."""
    rows = data(capsys, "list", what)
    status, out, err = call(capsys, "list", what)

    assert names <= {r["name"] for r in rows}
    assert all(r["about"] for r in rows)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == len(rows)


@pytest.mark.parametrize("what", ["experiment", "recipe", "space", "stages", "fitness"])
def test_schema(what: str, capsys: Capsys) -> None:
    """A JSON Schema of an object with properties."""
    status, out, _ = call(capsys, "schema", what)
    schema = json.loads(out)

    top = schema["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    assert status == 0
    assert top["type"] == "object"
    assert top["properties"]


def test_json_has_no_nan(run_copy: Path, capsys: Capsys) -> None:
    """What --json prints is JSON to every reader: no NaN, no Infinity."""
    for words in (("status", run_copy), ("show", run_copy, "0"), ("report", run_copy)):
        out = call(capsys, *words, "--json")[1]

        assert not re.search(r"\b(NaN|Infinity)\b", out)


# -- as a process ---------------------------------------------------------------------------------------------


def test_help_is_light() -> None:
    """`evomerge --help`, and reading a library, load none of the heavy packages."""
    code = (
        "import sys\nfrom evomerge.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "main(['list', 'experiments'])\n"
        "print(sorted({'torch', 'transformers', 'cma', 'ray', 'optuna', 'plotly', 'scipy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert out.splitlines()[-1] == "[]"
    assert "quickstart" in out


def test_a_closed_pipe_is_no_traceback(finished_run: Path) -> None:
    """`evomerge show | head -0` ends without a word."""
    command = f"{sys.executable} -m evomerge show {finished_run} --json | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)

    assert result.stderr == ""


def test_score_takes_the_fitness_of_an_experiment(small_experiment: Path, tiny_model: Any, capsys: Capsys) -> None:
    """Where the fitness stands inline in an experiment file, that file will do."""
    scores = data(capsys, "score", tiny_model("llama", 0), small_experiment, "--split", "select")["scores"]

    assert {row["task"] for row in scores} == {"sums", "words"}
