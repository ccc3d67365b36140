"""Models by hub id: `org/name` or `org/name@revision`, fetched into the hub's own cache and pinned to a commit.

A name is resolved to a commit once, when a run is prepared; its experiment.yaml then says `org/name@<commit>`, and
whoever reads that gets the same bytes, from the cache without asking the network. Only weights in safetensors,
configuration and tokenizer files are fetched, by name. Tokens are huggingface_hub's business; none is printed.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from evomerge.errors import UserError
from evomerge.library import located

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>(?!.*\.\.)[A-Za-z0-9][\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")

WANTED = (
    *("config.json", "generation_config.json", "model.safetensors", "model-*.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    *("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md"),
)
"""Files of a model that are read here. Pickles, code and further formats of the same weights stay where they are."""
MAX_FILES = 1000
"""Files of one model; the largest have some 200."""
SMALL = 50_000_000
"""Bytes that a file other than weights may have."""


class HubId(str):
    """A hub id as a file gave it; `instead_of` is the folder that it would have meant, were there one."""

    instead_of: Path | None = None


def named(folder: Path, name: str) -> str:
    """What a file in `folder` means by the name of a model: an absolute path, or a hub id as it stands.

    An id is what looks like one and whose first part is no folder here. Raises UserError for what is neither.
    """
    path = located(folder, name)
    if path.exists() or not _ID.fullmatch(name) or (folder / name.partition("/")[0]).is_dir():
        return str(path)
    out = HubId(name)
    out.instead_of = path
    return out


def pinned(name: str) -> str:
    """The same model with its commit: `org/name@<commit>`; paths and pinned ids as they are. May ask the hub."""
    if Path(name).is_absolute() or not (found := _ID.fullmatch(name)) or _COMMIT.fullmatch(found["revision"] or ""):
        return name
    return f"{found['repo']}@{_commit(found['repo'], found['revision'], name)}"


def folder_of(name: str | Path) -> Path:
    """The local folder of a model that `named` or `pinned` gave, fetched first where it is a hub id.

    Raises UserError in one line for models that are missing, private, gated, without safetensors or too large.
    """
    name = name if isinstance(name, str) else str(name)
    found = None if Path(name).is_absolute() or Path(name).is_dir() else _ID.fullmatch(name)
    if found is None:
        return Path(name)
    from huggingface_hub import snapshot_download

    commit = _COMMIT.fullmatch(found["revision"] or "")
    sha = commit[0] if commit else _commit(found["repo"], found["revision"], name)
    _check_listing(found["repo"], sha, name)
    with _told(found["repo"], found["revision"], name):
        folder = snapshot_download(found["repo"], revision=sha, allow_patterns=list(WANTED), ignore_patterns="*/*")
    return Path(folder)


def name_of(folder: Path) -> str:
    """The pinned id of a folder in the hub's cache, the absolute path of any other: what works on another host."""
    repo, snapshots = folder.parent.parent.name, folder.parent.name
    if snapshots == "snapshots" and repo.startswith("models--") and _COMMIT.fullmatch(folder.name):
        return f"{repo.removeprefix('models--').replace('--', '/', 1)}@{folder.name}"
    return str(folder.resolve())


def _commit(repo: str, revision: str | None, name: str) -> str:
    """The commit of a revision, by the hub or offline by the cache."""
    from huggingface_hub import HfApi

    with _told(repo, revision, name):
        sha = HfApi().resolve_revision(repo, revision=revision).resolved
    if not _COMMIT.fullmatch(sha):
        raise UserError(f"{name}: the hub names no commit for it, but {sha[:60]!r}")
    return sha


def _check_listing(repo: str, sha: str, name: str) -> None:
    """Raise UserError before a download that would fail: no safetensors, too many or too large files."""
    from huggingface_hub import constants, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    with _told(repo, sha, name):
        # The smallest file brings the listing of the commit into the cache; offline both are there already.
        folder = Path(snapshot_download(repo, revision=sha, allow_patterns="config.json"))
    try:
        files = {f.path: f.size for f in get_cached_repo_tree(repo, revision=sha)}
    except CachedRepoTreeNotFoundError:  # filled by an older huggingface_hub; nothing will be fetched
        return
    wanted = {p: n for p, n in files.items() if "/" not in p and any(fnmatch(p, w) for w in WANTED)}
    if not any(p.endswith(".safetensors") for p in wanted):
        pickles = sorted(p for p in files if p.endswith((".bin", ".pt", ".pth", ".ckpt")))
        what = f"only pickled weights ({pickles[0]}), which can run code and are not read" if pickles else "no weights"
        raise UserError(f"{name}: holds {what}; choose a model or revision with model.safetensors")
    if len(wanted) > MAX_FILES:
        raise UserError(f"{name}: lists {len(wanted)} files; a model has at most {MAX_FILES}")
    for path, size in wanted.items():
        if size > SMALL and not path.endswith(".safetensors"):
            raise UserError(f"{name}: {path} has {size} bytes; expected at most {SMALL}")
    missing = sum(n for p, n in wanted.items() if not (folder / p).exists())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f"{name}: needs {missing / 2**30:.1f} GiB more, but {constants.HF_HUB_CACHE} has {free / 2**30:.1f} GiB "
            "free; make room or set HF_HOME"
        )


@contextlib.contextmanager
def _told(repo: str, revision: str | None, name: str) -> Iterator[None]:
    """huggingface_hub's errors in one line each, with what to do. Never their own text, which may quote headers."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP client's
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    page = re.sub(r"//[^/@]*@", "//", constants.ENDPOINT) + f"/{repo}"
    folder = getattr(name, "instead_of", None)
    no_folder = "no such folder here" if folder is None else f"no folder {folder}"
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{name}: is gated; accept its terms at {page} and set HF_TOKEN to a token of the account that did"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{name}: has no revision {revision or 'main'!r}; see {page}/tree/main for what there is"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: {no_folder} and no such model at {page}; if it is private, set HF_TOKEN to a token "
            "that may read it"
        ) from None
    except (LocalEntryNotFoundError, RevisionResolutionError, OfflineModeIsEnabled) as e:
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{name}: {no_folder}, and HF_HUB_OFFLINE is set while the model is not wholly in the cache "
                f"{constants.HF_HUB_CACHE}; unset it, or fetch the model there first"
            ) from None
        if isinstance(e.__cause__, HfHubHTTPError):
            raise UserError(f"{name}: {_refused(e.__cause__, page)}") from None
        raise UserError(
            f"{name}: {no_folder}, and {page} cannot be reached ({type(e.__cause__ or e).__name__}); check the "
            "connection or HF_ENDPOINT, or set HF_HUB_OFFLINE=1 where the model is in the cache"
        ) from None
    except HfHubHTTPError as e:
        raise UserError(f"{name}: {_refused(e, page)}") from None
    except HTTPError as e:
        raise UserError(f"{name}: the download from {page} broke off ({type(e).__name__}); try again") from None
    except HFValidationError:
        raise UserError(f"{name}: is neither a folder nor a hub id; expected org/name or org/name@revision") from None
    except OSError as e:
        raise UserError(f"{name}: cannot be fetched ({e.strerror or type(e).__name__})") from None


def _refused(e: Exception, page: str) -> str:
    status = getattr(getattr(e, "response", None), "status_code", "an error")
    if status in (401, 403):
        return f"{page} answered {status}; set HF_TOKEN to a valid token that may read it"
    return f"{page} answered {status}; try again later"
