"""What to say of a name that leads to no model folder: another kind of file, an output still being made, a slip of the pen."""

from __future__ import annotations

import difflib
import fcntl
import os
from pathlib import Path

from wina_calib.errors import StateError
from wina_calib.storage.resume_files import STATE, is_useful, read_record, state_folder

_EXPECTED = "Give a model folder, a Hub id such as USER/NAME, or `demo`."
_GGUF = (
    "GGUF, llama.cpp's format of quantized weights: only `calibrate` takes it. Give the model that it was made of, a folder or "
    "Hub id with safetensors."
)
_CLOSE = 0.75  # how alike names are that one may be meant for the other


def reason(model: str) -> str | None:
    """What is there instead of a folder, as one sentence or two; None where nothing is known of it."""
    path = Path(model).expanduser()
    if path.is_file():
        return _file(model, path)
    under_way = being_made(path)
    if under_way is not None:
        return under_way
    near = nearest(path)
    if near is not None:
        return f"there is no folder {model} here; did you mean {near}?"
    return f"there is no file {model} here." if path.suffix.lower() == ".gguf" else None


def refused_folder(model: str, folder: Path) -> str | None:
    """Why a folder can be no model's, from the names of its files alone; None where it may be one."""
    if (folder / "config.json").is_file():
        return None
    names = sorted(path.name for path in folder.glob("*.gguf"))
    return f"{model} has no config.json, but {names[0]}, which is {_GGUF}" if names else None


def being_made(path: Path) -> str | None:
    """What to say of an output whose state is there and that is not; None where there is none."""
    state = state_folder(path.absolute())
    if not is_useful(state):
        return None
    done = max(state.glob(f"*/{STATE}"), key=lambda file: file.stat().st_mtime)
    try:
        at = f", at step {int(read_record(done)['step'])} of {done.parent.name}"
    except (StateError, KeyError, TypeError, ValueError):
        at = ""
    if _is_locked(path.absolute()):
        return f"{path} is still being made{at}. Wait for the command that makes it."
    return (
        f"{path} was not finished: its making was stopped{at}, and what is finished is kept in {state.name} beside it. Run "
        "the command that made it again to go on."
    )


def nearest(path: Path) -> Path | None:
    """The folder whose name is most like that of a path that is not there, in the same place; None without one."""
    try:
        names = [entry.name for entry in os.scandir(path.parent) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return None
    folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(path.name.casefold(), folded, n=1, cutoff=_CLOSE)
    return path.parent / folded[close[0]] if close else None


def _file(model: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            begins = file.read(4)
    except OSError:
        begins = b""
    if begins == b"GGUF" or path.suffix == ".gguf":
        return f"{model} is a file in {_GGUF}"
    if path.suffix in (".safetensors", ".bin", ".json"):
        return f"{model} is one file. Give the folder that it lies in, with config.json and the tokenizer."
    return f"{model} is a file, not a folder. {_EXPECTED}"


def _is_locked(target: Path) -> bool:
    """Whether a process is writing `target` now."""
    try:
        descriptor = os.open(target.with_name(f".{target.name}.lock"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
