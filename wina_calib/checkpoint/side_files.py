"""Tokenizer and other small files that go along."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from wina_calib.checkpoint.format import EVALUATION_FILE, HEAT_MAP, INDEX_FILE
from wina_calib.checkpoint.local_paths import without_paths
from wina_calib.checkpoint.writer import write_json
from wina_calib.common.printable import checked_name
from wina_calib.errors import CheckpointError
from wina_calib.model.folder import ADAPTER_FILE, CONFIG_BYTES, ModelFolder
from wina_calib.storage import read_json, safe_path

_SKIPPED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".lock")
# Written anew, or true of this one folder only.
_REWRITTEN = ("config.json", INDEX_FILE, "README.md", ".gitattributes", ".gitignore", HEAT_MAP, EVALUATION_FILE)
# Beside config.json, the files that may name Python classes.
_CODE_CONFIGS = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)


def copy_side_files(source: ModelFolder, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config, licence and other small files as they are.

    Raises:
        CheckpointError: one is a link that leaves the folder: a checkpoint may be published.
    """
    check_side_files(source)
    for path in side_files(source):
        place = folder / path.name
        shutil.copyfile(path, place)
        if path.name.endswith("_config.json"):
            _take_paths_out(place)


def _take_paths_out(path: Path) -> None:
    """Take the folder that a tokenizer was once loaded from out of its config; any other file stays as it is."""
    try:
        config = read_json(path)
    except CheckpointError:
        return
    if isinstance(config, dict) and without_paths(config) != config:
        write_json(path, without_paths(config))


def check_side_files(folder: ModelFolder) -> None:
    """Refuse what no checkpoint could hold, before it is copied.

    Raises:
        CheckpointError: a link leaves the folder: a checkpoint may be published, so nothing outside goes into it.
        UsageError: a name is no text.
    """
    for path in side_files(folder):
        checked_name(str(path))
        safe_path(folder.path, path.name)


def side_files(folder: ModelFolder) -> list[Path]:
    """The small files of a model folder that a checkpoint takes over as they are.

    Python files are among them where model or tokenizer are made of them; nothing runs them.
    """
    code = code_files(folder)
    other_configs = folder.stored.get("configuration_files")
    left_out = {*_REWRITTEN, ADAPTER_FILE, *(other_configs if isinstance(other_configs, list) else ())}
    return [
        path
        for path in sorted(folder.path.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and (path.name in code if path.suffix == ".py" else path.suffix not in _SKIPPED)
        and path.name not in left_out
        and not path.name.endswith(".index.json")
    ]


def code_files(folder: ModelFolder) -> set[str]:
    """Names of the Python files that a folder's model, tokenizer and processors are made of, with all that these import."""
    maps = [folder.auto_map, *(_auto_map(folder.path / name) for name in _CODE_CONFIGS)]
    values = [value for named in maps for value in named.values()]
    places = [place for value in values for place in (value if isinstance(value, list) else [value])]
    # REPOSITORY--MODULE.CLASS is the code of another repository.
    modules = {str(place).partition(".")[0] for place in places if place and "--" not in str(place)}
    names: set[str] = set()
    for module in modules:
        path = folder.path / f"{module}.py"
        if path.name == f"{module}.py" and path.is_file():
            names |= {path.name, *_imported(path)}
    return names


def _auto_map(path: Path) -> dict[str, Any]:
    raw = read_json(path, max_bytes=CONFIG_BYTES) if path.is_file() else None
    named = raw.get("auto_map") if isinstance(raw, dict) else None
    return named if isinstance(named, dict) else {"AutoTokenizer": named} if isinstance(named, list) else {}


def _imported(path: Path) -> list[str]:
    """Names of the files that a Python file imports, as transformers finds them; it copies no others either."""
    try:
        return [Path(file).name for file in get_relative_import_files(path)]
    except (OSError, ValueError):  # it imports what is not there, and cannot be loaded from this folder either
        return []
