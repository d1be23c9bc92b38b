"""From what a user gave (`demo`, folder, Hub id) to a folder; its tokenizer."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from wina_calib.common.printable import checked_name
from wina_calib.common.text import first_line
from wina_calib.errors import HubError, ModelFolderError, UsageError
from wina_calib.model import no_folder
from wina_calib.model.folder import ModelFolder, code_is_trusted, config_file, is_reference, open_folder
from wina_calib.storage.hub_client import fetch
from wina_calib.storage.places import places_of

DEMO = "demo"
_GGUF = ".gguf"


def load_tokenizer(given: Path | ModelFolder) -> Any:
    """Load the tokenizer of a model folder, opened or not.

    Raises:
        ModelFolderError: there is none that can be loaded.
    """
    folder = weights_folder(given)
    opened = given if isinstance(given, ModelFolder) else None
    if opened is not None:
        opened.check_config()  # transformers asks it for the tokenizer's class
    try:
        with nullcontext() if opened is None else opened.handed_on(as_stored=True):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=code_is_trusted())
        tokenizer("a")  # what its files say may fail only where it is used
    except Exception as error:
        if not code_is_trusted() and "trust_remote_code" in str(error):
            raise ModelFolderError(
                f"{folder} has a tokenizer of Python code, of which nothing has run. Read it, then give --trust-remote-code, or "
                "trust_remote_code=True in Python."
            ) from error
        raise ModelFolderError(
            f"{folder} has no tokenizer that can be loaded ({first_line(error)}). Copy tokenizer.json and "
            "tokenizer_config.json of the model into the folder."
        ) from error
    return tokenizer


def demo_folder() -> Path:
    """Folder of the bundled demo model."""
    return Path(__file__).parent.parent / "data" / "demo-llama-5m"


def given_name(model: object) -> str:
    """What a user gave as a checkpoint or model, as text.

    Raises:
        UsageError: it is neither text nor a path, such as a model that is loaded already, or no UTF-8.
    """
    if isinstance(model, str | Path):
        return checked_name(str(model))
    raise UsageError(f"a {type(model).__name__} was given; give its folder or its Hub id, as text or as a Path.")


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
    local_files_only: bool = False,
) -> tuple[Path, str | None]:
    """Turn `demo`, a local folder or a Hub repository id into a local folder and, for the Hub, a commit.

    Args:
        model: what the user gave.
        revision: branch, tag or commit on the Hub.
        token: as huggingface_hub takes it.
        subfolder: folder inside of it.
        local_files_only: do not ask the network.

    Raises:
        UsageError: it is neither text nor a path.
        ModelFolderError: there is no such folder.
        HubError: the Hub does not give it.
    """
    model = given_name(model)
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise ModelFolderError(f"subfolder is {subfolder!r}; expected a path inside of {model}.")
    path, commit = _root(model, revision, token, subfolder, local_files_only)
    if not (path / subfolder).is_dir():
        raise ModelFolderError(f"{model} has no folder {subfolder!r}.")
    return path / subfolder, commit


def _root(
    model: str, revision: str | None, token: str | bool | None, subfolder: str, local_files_only: bool
) -> tuple[Path, str | None]:
    path = Path(model).expanduser()
    if model == DEMO and not (path / "config.json").is_file():
        return demo_folder(), None
    if path.is_dir():
        refused = no_folder.refused_folder(model, path)
        if refused is not None:
            raise ModelFolderError(refused)
        return path, None
    instead = no_folder.reason(model)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelFolderError(
            instead or f"{model} is not a folder. Give a model folder, a Hub id such as USER/NAME, or `demo`."
        )
    try:
        return fetch(model, revision=revision, token=token, subfolder=subfolder, local_files_only=local_files_only)
    except HubError as error:
        if instead is not None:
            raise ModelFolderError(instead) from None
        if "/" in model:
            raise HubError(f"{error} There is no folder of that name here either.") from None
        raise HubError(f"there is no folder {model} here. As a Hub id, {error}") from None


def gguf_file(model: str | Path) -> Path | None:
    """The GGUF file that a user gave, or the only one of a folder that holds no other model.

    Raises:
        UsageError: it is neither text nor a path, or the folder holds several.
    """
    path = Path(given_name(model)).expanduser()
    if path.is_file() and path.suffix.lower() == _GGUF:
        return path
    if not path.is_dir() or config_file(path).is_file():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == _GGUF)
    if len(files) > 1:
        raise UsageError(f"{path} holds {len(files)} GGUF files. Give one of them, such as {files[0]}.")
    return files[0] if files else None


def weights_folder(
    checkpoint: ModelFolder | Path,
    *,
    base: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder with the weights and the tokenizer of a checkpoint: itself, or its base model's.

    Args:
        checkpoint: the folder of a checkpoint or a model, opened or not.
        base: where the base model is, if not where a checkpoint by reference says.
        token: as huggingface_hub takes it.
        local_files_only: do not ask the network.

    Raises:
        ModelFolderError, HubError: the base model cannot be had.
    """
    if isinstance(checkpoint, Path):
        if not is_reference(checkpoint):
            return checkpoint
        checkpoint = open_folder(checkpoint)
    if not checkpoint.is_reference:
        return checkpoint.path
    name, commit = checkpoint.stored.get("base_model"), checkpoint.stored.get("base_commit")
    if not isinstance(name, str) or not isinstance(commit, str | None):
        raise ModelFolderError(f"{checkpoint.file} names no base model. Download or calibrate it again.")
    if base is not None:
        return resolve(base, token=token, local_files_only=local_files_only)[0]
    if commit is not None:  # of the Hub: no folder here is meant, whatever it is called
        return fetch(name, revision=commit, token=token, local_files_only=local_files_only)[0]
    if name == DEMO:
        return demo_folder()
    here = _base_here(checkpoint, name)
    if here is None:
        raise ModelFolderError(
            f"{checkpoint.path} takes its weights from {name}, which is not here. Put that folder, or a link to it, beside "
            'the checkpoint; in Python, wina_calib.load(..., base="FOLDER") says where it is. `wina-calib inspect '
            "--no-weights` works without it."
        )
    return here


def base_key(weights: str, name: str) -> tuple[str, ...]:
    """What is known of a base model's folder on this machine is kept by the weights made of it and the name published."""
    return ("base model", weights, name)


def _base_here(checkpoint: ModelFolder, name: str) -> Path | None:
    """The folder of a base model that is on no Hub: where it was at last, or beside the checkpoint."""
    weights = str((checkpoint.section or {}).get("weights", ""))
    plain = name not in ("", "..") and name == Path(name).name
    beside = [checkpoint.path.absolute().with_name(name)] if plain else []
    known = [Path(place) for place in (*(places_of(base_key(weights, name)) or ()), name)]
    places = [place for place in known if place.is_absolute()] + beside  # earlier versions wrote the whole path
    return next((place for place in places if place.is_dir() and not is_reference(place)), None)
