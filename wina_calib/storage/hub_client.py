"""Reading from the Hugging Face Hub, with errors that say what to do. Tokens only pass through to huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import constants, errors, get_session, snapshot_download
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not listed there

from wina_calib.common.text import first_line
from wina_calib.errors import HubError

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "README.md")
HIDDEN = (".[!.]*", "*/.[!.]*")  # what a program kept for itself on another machine
CONFLICT = 412
_PATIENCE = 10.0  # seconds for an answer
# What huggingface_hub raises where a repository lists names such as ../x, or sends what cannot be parsed.
_UNREADABLE = (ValueError, TypeError, KeyError, errors.SafetensorsParsingError)
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN, with an account that may use it."


def fetch(
    repo: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
    local_files_only: bool = False,
) -> tuple[Path, str | None]:
    """Download the files of a model, or find them in the cache.

    Args:
        repo: USER/NAME.
        revision: branch, tag or commit.
        token: as huggingface_hub takes it.
        subfolder: only this folder of the repository.
        local_files_only: take what the cache has, without a look at the network.

    Returns:
        The repository's folder in the cache (not the subfolder), and the commit.

    Raises:
        HubError: it cannot be had; the message says why.
    """
    patterns = [(PurePosixPath(subfolder) / pattern).as_posix() for pattern in MODEL_FILES]
    asked = "was not asked (local_files_only)" if local_files_only else "did not answer"
    with readable_errors(repo, revision, cached=f"not all of it is in the cache, and {constants.ENDPOINT} {asked}"):
        place = snapshot_download(
            repo,
            revision=revision,
            token=token,
            allow_patterns=patterns,
            ignore_patterns=list(HIDDEN),
            local_files_only=local_files_only,
        )
    folder = Path(place)
    return folder, folder.name if folder.parent.name == "snapshots" else None


def check_reachable() -> None:
    """Ask the Hub for nothing, once: where nobody answers, its client would try again for half a minute.

    Raises:
        what `readable_errors` turns into one line.
    """
    get_session().head(constants.ENDPOINT, timeout=_PATIENCE)


def is_repo_name(text: str) -> bool:
    """Whether a text is a name that the Hub takes: no path, and nothing that leaves a folder made of it."""
    try:
        validate_repo_id(text)
    except errors.HFValidationError:
        return False
    return _NAME.fullmatch(text) is not None


@contextmanager
def readable_errors(repo: str, revision: str | None = None, *, cached: str = "", kept: str = "") -> Iterator[None]:
    """Turn huggingface_hub's errors into one line about `repo` with the remedy.

    Args:
        repo: what it is about.
        revision: what was asked for.
        cached: for what the cache could have given, what to say where nobody answers.
        kept: how things stand where nobody answers, for what only a Hub can do.
    """
    try:
        yield
    except Exception as error:
        if not _from_hub(error):
            raise
        raise HubError(f"{repo}: {_reason(error, revision, cached, kept)}") from None


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error came with."""
    response = getattr(error, "response", None)
    return response.status_code if response is not None else None


def _from_hub(error: BaseException) -> bool:
    """Whether an error is the Hub's or the network's, and not the local disk's or ours."""
    hub = (
        errors.HFValidationError,
        errors.LocalEntryNotFoundError,
        errors.LocalTokenNotFoundError,
        errors.RevisionResolutionError,
        ConnectionError,
        TimeoutError,
    )
    if _is_unreadable(error):
        return True
    # The HTTP client below huggingface_hub changed its name between versions; its errors did not.
    return isinstance(error, hub) or any(kind.__name__ == "HTTPError" for kind in type(error).__mro__)


def _is_unreadable(error: BaseException) -> bool:
    return isinstance(error, _UNREADABLE) and not isinstance(error, errors.HfHubHTTPError | errors.HFValidationError)


def _reason(error: BaseException, revision: str | None, cached: str, kept: str) -> str:
    if _is_unreadable(error):
        return f"what the Hub has of it cannot be used ({first_line(error)}). Tell who keeps the repository."
    cause = next((e for e in _chain(error) if isinstance(e, errors.HfHubHTTPError)), error)
    status = status_of(cause)
    if isinstance(cause, errors.GatedRepoError):
        return f"access to it is granted on request. Ask for it on {constants.ENDPOINT}. {_LOGIN}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}. Give a branch, tag or commit that it has."
    if isinstance(cause, errors.RemoteEntryNotFoundError):
        return "a file that should be there is missing. Is it a model repository, complete and pushed?"
    if status in (401, 403) or isinstance(cause, errors.LocalTokenNotFoundError):
        return f"the Hub refused the token, or there is none ({status or 'not logged in'}). {_LOGIN}"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private. Check the name. {_LOGIN}"
    if isinstance(cause, errors.HFValidationError):
        return "this is no repository name. Expected USER/NAME of letters, digits, '-', '_' and '.'."
    if status == CONFLICT:
        return "it was changed by another push meanwhile. Push again."
    if status is not None:
        return f"the Hub answered {status}. Try again later."
    offline = constants.HF_HUB_OFFLINE or isinstance(cause, errors.OfflineModeIsEnabled)
    if cached and offline:
        return "HF_HUB_OFFLINE is set, and the cache does not have all that is needed. Unset it, or fetch it once while online."
    if cached:
        return f"{cached}. Check the network, or fetch it once while online."
    if offline:
        return f"HF_HUB_OFFLINE is set{kept}. Unset it and run the same command again."
    return f"{constants.ENDPOINT} did not answer{kept}. Check the network and run the same command again."


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
