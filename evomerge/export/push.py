"""Uploads a finished export to the hub, through huggingface_hub. The token is the hub client's business alone:
it comes from the environment or `hf auth login`, and is neither read into our data nor printed."""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import RunError, UserError


def check_push(repo: str) -> str:
    """The account that would push to `repo` (ORG/NAME). Raises UserError where it cannot; asks the hub once.

    Meant to run before the expensive build.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise UserError(f"--push {repo!r}: no name of a repository ({e})") from None
    if "/" not in repo:
        raise UserError(f"--push {repo!r}: expected ORG/NAME, or USER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push: HF_HUB_OFFLINE is set; unset it, or export without --push")
    if get_token() is None:
        raise UserError("--push: not logged in to the hub; run `hf auth login`, or set HF_TOKEN")
    try:
        return str(HfApi().whoami().get("name", "unknown"))
    except Exception as e:
        raise UserError(f"--push {repo}: {_reason(e)}") from None


def push(folder: Path, repo: str, private: bool) -> str:
    """Create the repository where it is missing and upload the folder; returns its address.

    Files of the same names are replaced, others stay. `private` is for a repository that is created. Raises
    RunError in one line; the folder remains.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a merge made by evomerge")
    except Exception as e:
        raise RunError(
            f"{folder} is written, but not pushed: {_reason(e)}; push it later with: hf upload {repo} {folder}"
        ) from None
    return str(address)


def _reason(error: Exception) -> str:
    """What went wrong on the way to the hub, in a few words of ours: server texts may say anything."""
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        words = {
            401: "the hub does not accept the token (401); run `hf auth login` again, or set another HF_TOKEN",
            403: "the token may not write there (403); use one with write access to this namespace",
            404: "the hub finds no such place (404); check the name and the token's access",
            409: "the hub reports a conflict (409); try again",
            429: "the hub asks for patience (429); try again later",
        }
        return words.get(status, f"the hub answered {status}; try again later")
    if isinstance(error, ValueError) and "README.md" in str(error):
        return "the hub refuses the metadata at the top of README.md; mend it there"
    if isinstance(error, HTTPError | InvalidURL | OSError):
        return f"the hub cannot be reached ({type(error).__name__}); check the network and HF_ENDPOINT, then try again"
    return f"the hub's client failed ({type(error).__name__})"
