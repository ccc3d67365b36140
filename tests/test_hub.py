"""Hub ids against a real HTTP server that speaks the few endpoints huggingface_hub asks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from evomerge.hub import name_of, named, pinned
from evomerge.yamlio import load_yaml

TOKEN = "hf_thisIsSecret"
OLD, NEW = "a" * 40, "b" * 40


@dataclass
class Repo:
    """One model: commit -> folder, revision -> commit, and who may read it."""

    commits: dict[str, Path]
    revisions: dict[str, str]
    access: str = "public"


@dataclass
class Hub:
    """A running server, and what it was asked."""

    url: str
    repos: dict[str, Repo]
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty hub on a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for k, v in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(k.replace("_", "-"), v)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            this.asked.append(path)
            parts = path.removeprefix("api/models/").split("/")
            repo = this.repos.get("/".join(parts[:2]))
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if repo is None or (repo.access == "private" and not known):
                return self.answer(401, X_Error_Code="RepoNotFound")
            if not path.startswith("api/"):  # org/name/resolve/commit/file
                if repo.access == "gated" and not known:
                    return self.answer(403, X_Error_Code="GatedRepo")
                file = repo.commits[parts[3]] / "/".join(parts[4:])
                data = file.read_bytes()
                etag = hashlib.sha256(data).hexdigest()
                return self.answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=parts[3])
            if len(parts) > 2 and parts[2] == "tree":
                files = [p for p in sorted(repo.commits[parts[3]].rglob("*")) if p.is_file()]
                rows = [
                    {"type": "file", "path": str(p.relative_to(repo.commits[parts[3]])), "size": p.stat().st_size}
                    | {"oid": hashlib.sha1(p.read_bytes()).hexdigest()}
                    for p in files
                ]
                return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            sha = repo.revisions.get("/".join(parts[3:]) or "main")
            if sha is None:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            info = {"id": "/".join(parts[:2]), "sha": sha, "siblings": [], "tags": [], "downloads": 0, "likes": 0}
            return self.answer(200, json.dumps(info | {"private": False}).encode(), Content_Type="application/json")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    this = Hub(f"http://127.0.0.1:{server.server_port}", {})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield this
    server.shutdown()
    server.server_close()


Ask = Callable[..., list[str]]

PROGRAM = """
import sys
from evomerge.errors import UserError
from evomerge.hub import folder_of, pinned
for name in sys.argv[1:]:
    try:
        print("ok", pinned(name), folder_of(pinned(name)))
    except UserError as e:
        print("refused", e)
"""


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Environment variables of a user with an empty cache and no token, whose hub is the server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return kept | home | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}


@pytest.fixture
def ask(environment: dict[str, str]) -> Ask:
    """ask(*names, **environment) -> what became of each name, in a process of its own; settings are read at import."""

    def run(*names: str, **more: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *names], env=environment | more, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == len(names), "one line each"
        return lines

    return run


@pytest.fixture
def models(hub: Hub, tiny_model: Any, tmp_path: Path) -> Hub:
    """public/tiny with two commits and a branch, lab/gated, lab/private and lab/pickled."""
    old, new = (Path(shutil.copytree(tiny_model("llama", s), tmp_path / f"commit-{s}")) for s in (0, 1))
    (new / "pytorch_model.bin").write_bytes(b"pickle")
    (new / "modeling_own.py").write_text("raise SystemExit")
    (new / "original").mkdir()
    (new / "original" / "model.safetensors").write_bytes(b"twice")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    hub.repos["public/tiny"] = Repo({OLD: old, NEW: new}, {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW})
    hub.repos["lab/gated"] = Repo({OLD: old}, {"main": OLD}, "gated")
    hub.repos["lab/private"] = Repo({OLD: old}, {"main": OLD}, "private")
    hub.repos["lab/pickled"] = Repo({OLD: pickled}, {"main": OLD})
    return hub


def test_ids_are_fetched_and_pinned(models: Hub, ask: Ask) -> None:
    """A name gives the commit of its revision; weights, config and tokenizer come, pickles and code do not."""
    lines = ask("public/tiny", "public/tiny@v1")

    folders = []
    for line, sha in zip(lines, (NEW, OLD), strict=True):
        status, name, folder = line.split()
        assert (status, name) == ("ok", f"public/tiny@{sha}")
        source = models.repos["public/tiny"].commits[sha]
        assert (Path(folder) / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        assert name_of(Path(folder)) == name
        folders.append(Path(folder))
    names = {str(p.relative_to(folders[0])) for p in folders[0].rglob("*") if p.is_file()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} | (
        {"generation_config.json"} & names
    )


def test_pinned_models_come_from_the_cache(models: Hub, ask: Ask) -> None:
    """What was fetched once needs no network again: neither pinned ids online nor any known name offline."""
    ask("public/tiny")
    models.asked.clear()
    models.repos["public/tiny"].revisions["main"] = OLD  # the branch moved on

    assert ask(f"public/tiny@{NEW}")[0].startswith(f"ok public/tiny@{NEW} ")
    assert ask("public/tiny", HF_HUB_OFFLINE="1")[0].startswith(f"ok public/tiny@{NEW} ")
    assert models.asked == []
    assert ask("public/tiny")[0].startswith(f"ok public/tiny@{OLD} ")


def test_refusals(models: Hub, ask: Ask) -> None:
    """Gated, private, missing, unknown revision, pickled: each has its own line with what to do, online."""
    names = ("lab/gated", "lab/private", "lab/none", "public/tiny@v9", "lab/pickled")
    gated, private, none, revision, pickled = ask(*names)

    assert f"lab/gated@{OLD}: is gated; accept its terms at {models.url}/lab/gated and set HF_TOKEN" in gated
    for line in (private, none):
        assert "no such folder here and no such model at" in line
        assert "if it is private, set HF_TOKEN" in line
    assert "public/tiny@v9: has no revision 'v9'" in revision
    assert "only pickled weights (pytorch_model.bin)" in pickled
    assert not any(line.startswith("ok") for line in (gated, private, none, revision, pickled))
    assert not any(p.endswith(("bin", "py")) for p in models.asked)


def test_a_token_opens_gated_and_private_models(models: Hub, ask: Ask) -> None:
    """With HF_TOKEN both are fetched; the token is never printed."""
    assert all(line.startswith("ok") for line in ask("lab/gated", "lab/private", HF_TOKEN=TOKEN))


def test_offline_without_cache(models: Hub, ask: Ask) -> None:
    """HF_HUB_OFFLINE asks nobody and says so, also for a commit; a hub that is down is another line."""
    for line in ask("public/tiny", f"public/tiny@{NEW}", HF_HUB_OFFLINE="1"):
        assert "HF_HUB_OFFLINE is set while the model is not wholly in the cache" in line
    assert models.asked == []
    assert "cannot be reached" in ask("public/tiny", HF_ENDPOINT="http://127.0.0.1:9")[0]


def test_a_run_names_commits(
    models: Hub, small_experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """experiment.yaml names the commits; reading, resuming offline, export and verification never ask the network."""
    from huggingface_hub import constants

    from evomerge.config import load
    from evomerge.export.hf import write_hf
    from evomerge.export.verify import open_recipe_pool, verify
    from evomerge.history import History, load_resolved
    from evomerge.recipe import Recipe
    from evomerge.run import run

    monkeypatch.setattr(constants, "ENDPOINT", models.url)
    template = models.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    data = json.loads(small_experiment.read_text())
    data["models"] = {"base": "public/tiny@v1", "experts": {"one": "public/tiny"}}
    for task in data["fitness"]["tasks"]:
        task["splits"] = {s: str(small_experiment.parent / f) for s, f in task["splits"].items()}
    data["search"]["budget"] = {"evaluations": 4}
    out = tmp_path / "run"
    run(load(data), out)
    commits = {"base": f"public/tiny@{OLD}", "experts": {"one": f"public/tiny@{NEW}"}}
    assert load_yaml(out / "experiment.yaml")["models"] == commits

    models.repos["public/tiny"].revisions["main"] = OLD
    models.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    history = run(load_resolved(out, {"search.budget.evaluations": 5}), out)
    assert load_yaml(out / "experiment.yaml")["models"] == commits
    pool, manifest = open_recipe_pool(history.winner, History.read(out).source_paths())
    merged = write_hf(tmp_path / "merged", history.winner, pool, manifest)
    assert verify(merged).ok
    assert models.asked == []
    paths = {s["path"] for s in load_yaml(merged / "recipe.yaml")["sources"].values()}
    assert {f"public/tiny@{OLD}"} <= paths <= {f"public/tiny@{OLD}", f"public/tiny@{NEW}"}
    loaded = Recipe.load(merged / "recipe.yaml")  # `evomerge merge` takes ids as well
    assert {s.path for s in loaded.sources.values()} == paths


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("org/name", True),
        ("org/name@main", True),
        ("org/name@refs/pr/4", True),
        ("./org/name", False),
        ("../org/name", False),
        ("models/base", False),
        ("org", False),
        ("org/name/more", False),
        ("org/name@../../x", False),
        ("org/..", False),
        ("org/name@", False),
    ],
)
def test_what_looks_like_an_id(name: str, is_id: bool, tmp_path: Path) -> None:
    """Names of two parts are ids, unless the first is a folder here: then a typing error stays a path."""
    (tmp_path / "models").mkdir()

    assert named(tmp_path, name) == (name if is_id else str((tmp_path / name).resolve()))


def test_folders_come_first(tmp_path: Path) -> None:
    """A local folder of the same name is meant before any hub is asked, and it is not pinned."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    path = named(tmp_path, "org/name")

    assert path == str(tmp_path / "org" / "name")
    assert pinned(path) == path
    assert name_of(tmp_path / "org" / "name") == path
