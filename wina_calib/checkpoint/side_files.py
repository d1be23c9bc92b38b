"""Tokenizer and other small files that go along."""

from __future__ import annotations

import shutil
from pathlib import Path

from wina_calib.checkpoint.format import EVALUATION_FILE, HEAT_MAP, INDEX_FILE
from wina_calib.model.config import has_own_code
from wina_calib.storage import safe_path

_SKIPPED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".lock")
# Written anew, or true of this one folder only.
_REWRITTEN = ("config.json", INDEX_FILE, "README.md", ".gitattributes", ".gitignore", HEAT_MAP, EVALUATION_FILE)
# Beside it transformers takes a folder for an adapter and loads another model's weights.
_ADAPTER = "adapter_config.json"


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config, licence and other small files as they are.

    Raises:
        CheckpointError: one is a link that leaves the folder: a checkpoint may be published.
    """
    for path in checked_side_files(source):
        shutil.copyfile(path, folder / path.name)


def checked_side_files(folder: Path) -> list[Path]:
    """The same as `side_files`, but refuses a link that leaves the folder.

    Raises:
        CheckpointError: a checkpoint may be published, so what is outside is not copied into it.
    """
    files = side_files(folder)
    for path in files:
        safe_path(folder, path.name)
    return files


def side_files(folder: Path) -> list[Path]:
    """The small files of a model folder that a checkpoint takes over as they are.

    Python files are among them where the model needs them; nothing runs them.
    """
    skipped = _SKIPPED if has_own_code(folder) else (*_SKIPPED, ".py")
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix not in skipped
        and path.name not in (*_REWRITTEN, _ADAPTER)
        and not path.name.endswith(".index.json")
    ]
