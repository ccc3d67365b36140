"""Files from strangers: nothing in them runs, writes elsewhere, grows without bound or carries a secret out."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from evomerge import journal as journals
from evomerge.canonical import decode_array
from evomerge.cli import main
from evomerge.errors import RunError, UserError
from evomerge.history import History, load_resolved
from evomerge.journal import read, seal
from evomerge.prepare import Prepared
from evomerge.report.status import status
from evomerge.run import run
from evomerge.workers.fake import FakeEvaluator

With = Callable[..., Any]
CANARY = "hf_canary0123456789abcdef"


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def resealed(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change events and give them a right checksum again, as an attacker would."""
    events, _ = read(out / "journal.jsonl")
    for e in events:
        change(e)
    (out / "journal.jsonl").write_bytes(b"".join(seal(e) for e in events))


# -- no code runs ---------------------------------------------------------------------------------------------


def test_pickles_in_every_place(run_copy: Path, experiment_with: With, tmp_path: Path, tiny_model: Any) -> None:
    """Pickle payloads in a model folder, a journal, in finished.jsonl and in telemetry are never executed."""
    mark = tmp_path / "executed"
    payload = pickle.dumps(Payload(mark))
    expert = tiny_model("llama", 14, name="expert")
    (expert / "pytorch_model.bin").write_bytes(payload)
    (expert / "model.safetensors").write_bytes(payload)
    text = base64.b64encode(payload).decode()
    whole = (run_copy / "journal.jsonl").read_bytes()
    evil = {"recipe_id": "x", "items": "y", "status": "ok", "reason": "", "scores": {"sums": {"accuracy": text}}}
    (run_copy / "finished.jsonl").write_bytes(payload + b"\n" + seal(evil))
    (run_copy / "telemetry.jsonl").write_bytes(payload + b"\n")
    (run_copy / "journal.jsonl").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(UserError, match="not a whole safetensors file"):
        run(experiment_with(**{"models.experts.one": str(expert)}), tmp_path / "out")
    run(experiment_with(), run_copy)
    assert (run_copy / "journal.jsonl").read_bytes() == whole
    (run_copy / "journal.jsonl").write_bytes(payload + b"\n")
    with pytest.raises(UserError, match="line 1: damaged"):
        run(experiment_with(), run_copy)
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists(), "the payload works"


@pytest.mark.parametrize("kind", ["|O", "object", "<U4", "<f2", "|V8", "<m8"])
def test_arrays_hold_numbers_only(kind: str) -> None:
    """A journalled array of any other type than the three that are written is refused."""
    data = {"dtype": kind, "shape": [1], "b64": base64.b64encode(b"\0" * 8).decode()}

    with pytest.raises(ValueError, match="not an encoded array"):
        decode_array(data)


# -- sealed lies ----------------------------------------------------------------------------------------------

NUMBERS = {"dtype": "<f4", "shape": [12], "b64": base64.b64encode(b"\0" * 48).decode()}
LIES: dict[str, tuple[str, dict[str, Any]]] = {
    "no scores": ("told", {"scores": None}),
    "scores of a failure": ("told", {"status": "failed:nan"}),
    "a list": ("told", {"scores": [1]}),
    "text": ("told", {"scores": "x"}),
    "a missing task": ("told", {"scores": {"sums": {"cross_entropy": NUMBERS}}}),
    "wrong length": (
        "told",
        {"scores": {t: {"cross_entropy": {**NUMBERS, "shape": [3, 4]}} for t in ("sums", "words")}},
    ),
    "objects": ("told", {"scores": {"sums": {"cross_entropy": {**NUMBERS, "dtype": "|O"}}}}),
    "a huge shape": ("told", {"scores": {"sums": {"cross_entropy": {**NUMBERS, "shape": [10**30, 0]}}}}),
    "no genome": ("asked", {"genome": "x"}),
    "a genome of text": ("asked", {"genome": {**NUMBERS, "dtype": "<U1"}}),
    "a long genome": ("asked", {"genome": {**NUMBERS, "dtype": "<f8", "shape": [6]}}),
    "nan": ("asked", {"genome": {"dtype": "<f8", "shape": [2], "b64": "AAAAAAAA+H8AAAAAAAD4fw=="}}),
    "outside": ("asked", {"genome": {"dtype": "<f8", "shape": [2], "b64": "AAAAAAAAAEAAAAAAAAAAQA=="}}),
    "an unknown candidate": ("told", {"id": 10**9}),
    "no items": ("told", {"items": None}),
    "numerics": ("run", {"numerics": 3}),
    "shape": ("run", {"plan_shape": {"evil": 1}}),
    "plan": ("run", {"plan_shape": None}),
    "manifest": ("run", {"manifest": {"base": []}}),
    "budget": ("run", {"budget": []}),
    "a budget of another kind": ("run", {"budget": {"hours": 3}}),
    "final": ("final", {"winner": "x"}),
    "kind": ("stage", {"kind": "stop"}),
}


@pytest.mark.parametrize("accept", [False, True], ids=["", "accept drift"])
@pytest.mark.parametrize("lie", LIES)
def test_sealed_lies_are_refused(lie: str, accept: bool, run_copy: Path, experiment_with: With) -> None:
    """Events with a right checksum and a wrong content are refused in one line, in resuming and in reading."""
    kind, update = LIES[lie]
    last = [e["seq"] for e in read(run_copy / "journal.jsonl")[0] if e["kind"] == kind and e.get("id", 10) == 10][-1]
    resealed(run_copy, lambda e: e.update(update) if e["seq"] == last else None)

    with pytest.raises((UserError, RunError)) as caught:
        run(experiment_with(), run_copy, accept_drift=accept)
    assert len(str(caught.value).splitlines()) == 1
    with contextlib.suppress(UserError):
        history = History.read(run_copy)
        for number in history.entries:
            history.recipe(number)


def test_foreign_telemetry_is_left_out(run_copy: Path, experiment_with: With) -> None:
    """Lines of another shape in the telemetry harm neither status nor a resume."""
    lines = ['{"run_seconds": "x"}', '{"proposal": 1}', '{"proposal": 1, "run_seconds": null}', "[" * 5000, "{}"]
    with (run_copy / "telemetry.jsonl").open("a") as f:
        f.write("\n".join(lines) + "\n")
    s = status(run_copy)
    run(experiment_with(), run_copy)

    assert s["run_seconds"] > 0


# -- no write elsewhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["journal.jsonl", "finished.jsonl", "telemetry.jsonl", "experiment.tmp", ".lock", "exports"]
)
def test_links_in_a_run_directory_are_refused(name: str, run_copy: Path, experiment_with: With, tmp_path: Path) -> None:
    """A run directory from a stranger cannot make a resume write through a link."""
    precious = tmp_path / "precious"
    if (run_copy / name).exists():
        shutil.copyfile(run_copy / name, precious)
        (run_copy / name).unlink()
    else:
        precious.write_text("mine")
    before = precious.read_bytes()
    (run_copy / name).symlink_to(precious)

    with pytest.raises(UserError, match=rf"{name}: is a link"):
        run(experiment_with(**{"search.budget": {"evaluations": 13}}), run_copy)
    assert precious.read_bytes() == before


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "../up", "/etc/x", "a/b", ""])
def test_names_lead_nowhere(name: str, experiment_with: With) -> None:
    """An experiment's name becomes a folder below runs/ and can name no other one."""
    with pytest.raises(UserError, match="name"):
        experiment_with(name=name)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".."])
def test_shards_stay_in_their_folder(shard: str, tiny_model: Any, experiment_with: With, tmp_path: Path) -> None:
    """An index cannot name a file elsewhere."""
    folder = tiny_model("llama", 14, name="sharded")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))

    with pytest.raises(UserError, match=r"leads out of the folder|missing shard"):
        run(experiment_with(**{"models.experts.one": str(folder)}), tmp_path / "out")


def test_targets_in_the_way(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--out and --to overwrite nothing: files, full folders and links to them are refused with status 2."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for name in ("full", "file", "link", "full/../full"):
        for form in ("hf", "mergekit"):
            command = ["export", str(finished_run), "--format", form, "--to", str(tmp_path / name)]
            assert main(command) == 2
            assert "exists" in capsys.readouterr().err
        experiment = finished_run / "experiment.yaml"
        assert main(["run", str(experiment), "--out", str(tmp_path / name)]) == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "link", "mine"]
    capsys.readouterr()


# -- bounds ---------------------------------------------------------------------------------------------------


def test_long_lines_are_bounded(run_copy: Path, experiment_with: With, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line beyond the limit is never read whole: refused in the journal, left out of finished.jsonl."""
    longest = max(len(line) for line in (run_copy / "journal.jsonl").read_bytes().splitlines())
    monkeypatch.setattr(journals, "MAX_LINE", longest + 10)
    (run_copy / "finished.jsonl").write_bytes(b'{"x":"' + b"x" * 10 * longest + b'"}\n')
    run(experiment_with(), run_copy)
    with (run_copy / "journal.jsonl").open("ab") as f:
        f.write(b'{"x":"' + b"x" * 10 * longest + b'"}\n')

    with pytest.raises(UserError, match=r"line \d+: damaged \(a line of \d+ bytes\)"):
        run(experiment_with(), run_copy)


def test_deep_nesting(run_copy: Path, experiment_with: With) -> None:
    """A line nested beyond Python's depth is damage, not a crash."""
    with (run_copy / "journal.jsonl").open("ab") as f:
        f.write(b"[" * 100_000 + b"]" * 100_000 + b"\n")

    with pytest.raises(UserError, match="damaged"):
        run(experiment_with(), run_copy)


# -- secrets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["inline", pytest.param("local", marks=pytest.mark.slow)])
def test_no_secret_in_any_file(
    backend: str,
    experiment_with: With,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A token in the environment appears in no file of a run or an export, nor in what is printed on failures."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, CANARY)
    out = tmp_path / "out"
    run(experiment_with(**{"workers.backend": backend, "search.budget": {"evaluations": 4}}), out)
    for form in ("hf", "mergekit"):
        assert main(["export", str(out), "--format", form, "--to", str(tmp_path / form)]) == 0
    assert main(["status", str(out)]) == 0
    assert main(["report", str(out), "--json"]) == 0
    resealed(out, lambda e: e.update(LIES["a list"][1]) if e["kind"] == "told" else None)
    assert main(["resume", str(out)]) == 2
    assert main(["show", str(out)]) == 2
    (out / "journal.jsonl").write_bytes(b"junk\n" * 3)
    assert main(["resume", str(out)]) == 2

    printed = capfd.readouterr()
    assert CANARY not in printed.out + printed.err
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 10
    for file in files:
        assert CANARY.encode() not in file.read_bytes(), file


# -- a worker that grows --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_candidate_that_allocates_without_bound(
    experiment_with: With, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It becomes failed:oom at the limit, its worker is replaced, and every other candidate is scored."""
    monkeypatch.setattr(Prepared, "evaluator", lambda self: partial(FakeEvaluator, failures={7: "grow"}))
    history = run(experiment_with(**{"workers.backend": "local", "workers.memory_gb": 0.6}), tmp_path / "out")

    assert history.entry(7).results["search"].status == "failed:oom"
    assert "0.6 GiB" in history.entry(7).results["search"].reason
    assert {e.results["search"].status for e in history.entries.values() if e.id != 7} == {"ok"}
    assert history.stopped


def test_the_resolved_experiment_is_read_like_any_other(run_copy: Path) -> None:
    """experiment.yaml of a stranger's run directory goes through the same bounded reader."""
    text = (run_copy / "experiment.yaml").read_text()
    for evil in ("!!python/object/apply:os.system ['true']", "a: &a [1]\nb: *a", "name: 1\nname: 2"):
        (run_copy / "experiment.yaml").write_text(evil)
        with pytest.raises(UserError):
            load_resolved(run_copy)
    (run_copy / "experiment.yaml").write_text(text)
    assert load_resolved(run_copy).name == "small"
