"""Pushing to the hub: against a local server that speaks its endpoints, with a canary for a token."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from evomerge.cli import main
from evomerge.errors import RunError, UserError
from evomerge.export.push import check_push, push

CANARY = "hf_CanaryTokenThatMustNotBeSeen"


class Hub(ThreadingHTTPServer):
    """Repositories by name, each file's content; `answers` overrides the status of a path's beginning."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.answers: dict[str, int] = {}
        self.calls: list[str] = []
        self.cards: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, data: Any, status: int = 200) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _serve(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.server.calls.append(path)
        for start, status in self.server.answers.items():
            if path.startswith(start):
                # A server may say anything, the token that it was sent included.
                return self._answer({"error": f"no, {self.headers.get('Authorization')}"}, status)
        if self.headers.get("Authorization") != f"Bearer {CANARY}":
            return self._answer({"error": "who?"}, 401)
        if path == "/api/whoami-v2":
            return self._answer({"name": "tester", "type": "user", "orgs": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.server.created.append(asked)
            known = repo in self.server.files
            self.server.files.setdefault(repo, {})
            return self._answer({"url": f"{self.server.url}/{repo}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            return self._answer({"errors": [], "warnings": []})
        repo = "/".join(path.split("/")[3:5])
        if path == f"/api/models/{repo}/preupload/main" and repo in self.server.files:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if path == f"/api/models/{repo}/commit/main" and repo in self.server.files:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
            return self._answer({"commitUrl": f"{self.server.url}/{repo}/commit/1", "commitOid": "1" * 40})
        return self._answer({"error": "not found"}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
    monkeypatch.setenv("HF_TOKEN", CANARY)
    for name in ("HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("process", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "as a process"])
def test_export_and_push(
    process: bool, finished_run: Path, tmp_path: Path, hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    """One command builds, uploads every file as it is, warns of unknown licences, and never shows the token."""
    target = tmp_path / "merged"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / "hf")}
    command = ["export", str(finished_run), "--to", str(target), "--push", "org/my-merge", "--private", "--json"]
    if process:
        code = subprocess.run([sys.executable, "-m", "evomerge", *command], env=environment, check=False).returncode
    else:
        code = main(command)
    out, err = capfd.readouterr()

    assert code == 0, err
    assert json.loads(out)["pushed"] == f"{hub.url}/org/my-merge"
    assert hub.files["org/my-merge"] == contents(target)
    assert hub.cards == [(target / "README.md").read_text()]
    assert {"README.md", "model.safetensors", "recipe.yaml", "evomerge.json"} <= set(hub.files["org/my-merge"])
    assert hub.created == [
        {"name": "my-merge", "organization": "org", "visibility": "private"}
        | {k: v for k, v in hub.created[0].items() if k == "type"}
    ]
    assert "note: licence of 'base', 'one', 'two' unknown" in err
    assert hub.calls.index("/api/whoami-v2") < hub.calls.index("/api/repos/create")
    assert CANARY not in out + err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()


def test_pushing_again_replaces_the_files(hub: Hub, tmp_path: Path) -> None:
    """A repository that exists is used; what else lies in it stays."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("one")
    push(folder, "org/name", private=False)
    hub.files["org/name"]["other.txt"] = b"stays"
    (folder / "README.md").write_text("two")
    address = push(folder, "org/name", private=False)

    assert address == f"{hub.url}/org/name"
    assert hub.files["org/name"] == {"README.md": b"two", "other.txt": b"stays"}
    assert "visibility" not in hub.created[0]


@pytest.mark.parametrize(
    ("repo", "fragment"),
    [
        ("name", "expected ORG/NAME"),
        ("a/b/c", "no name of a repository"),
        ("org/na me", "no name of a repository"),
        ("../x", "no name of a repository"),
        ("org/x--y", "no name of a repository"),
    ],
)
def test_names_are_checked_without_the_hub(repo: str, fragment: str, hub: Hub) -> None:
    """A name that cannot be one is refused before anything is asked."""
    with pytest.raises(UserError, match=fragment):
        check_push(repo)
    assert hub.calls == []


def test_who_is_not_logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token, a wrong token, and the offline switch each have their line."""
    assert check_push("org/name") == "tester"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"does not accept the token \(401\)"):
        check_push("org/name")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="not logged in to the hub; run `hf auth login`"):
        check_push("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_push("org/name")


def test_a_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is one line about the network."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(UserError, match=r"cannot be reached \(ConnectError\)"):
        check_push("org/name")


@pytest.mark.parametrize(
    ("path", "status", "fragment"),
    [
        ("/api/repos/create", 403, "may not write there (403)"),
        ("/api/models/org/name/preupload", 403, "may not write there (403)"),
        ("/api/models/org/name/commit", 401, "does not accept the token (401)"),
        ("/api/repos/create", 500, "the hub answered 500"),
        ("/api/validate-yaml", 400, "refuses the metadata at the top of README.md"),
    ],
)
def test_refusals_while_pushing(path: str, status: int, fragment: str, hub: Hub, tmp_path: Path) -> None:
    """Each refusal is one line without the server's words, and says how to push the finished folder later."""
    (tmp_path / "README.md").write_text("x")
    hub.answers[path] = status
    if path == "/api/repos/create":
        hub.answers["/api/models/org/name"] = 404
    with pytest.raises(RunError) as caught:
        push(tmp_path, "org/name", private=False)

    assert fragment in str(caught.value)
    assert f"hf upload org/name {tmp_path}" in str(caught.value)
    assert CANARY not in str(caught.value)


def test_who_may_not_push_builds_nothing(
    finished_run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check comes before the build: exit 2, one line, no folder."""
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    wanted = [["--push", "org/name"], ["--push", "name"], ["--private"], ["--push", "org/n", "--format", "mergekit"]]
    for more in wanted:
        assert main(["export", str(finished_run), "--to", str(tmp_path / "out"), *more]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
