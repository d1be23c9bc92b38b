"""Checkpoints by reference: a folder of a few megabytes with the calibration, whose weights stay in the base model.

`wina_config.json` names the base model and its commit and carries its config; `wina.safetensors` and the index are those of
any checkpoint. Possible where no transform changes the weights.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wina_calib.checkpoint.format import WINA_FILE
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.side_files import side_files
from wina_calib.checkpoint.writer import write_index, write_json, write_wina_file
from wina_calib.errors import UsageError
from wina_calib.model.config import REFERENCE_FILE, is_reference, read_config
from wina_calib.model.locate import weights_folder
from wina_calib.model.source import Source
from wina_calib.storage import Shards, read_json
from wina_calib.transforms import Plan

FORMAT = "wina-reference/1"


def check_possible(transform: Plan) -> None:
    """Raise UsageError where a transform changes the weights, so that the base model's cannot serve."""
    if transform.name != "none":
        raise UsageError(
            f"weights by reference need untouched weights, but the transform is {transform.name}. "
            "Add --transform none, or leave --weights reference out."
        )


def write_reference(folder: Path, tensors: Mapping[str, Tensor], settings: Settings, source: Source) -> None:
    """Write a checkpoint that refers to the weights of `source`; `wina_config.json` last."""
    write_wina_file(folder / WINA_FILE, tensors)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_index(folder, dict.fromkeys(tensors, WINA_FILE), sizes)
    reference = {
        "format": FORMAT,
        "base_model": source.name if source.commit else str(source.folder.absolute()),
        "base_commit": source.commit,
        "config": read_config(source.folder),
        "quantization_config": settings.to_dict(),
    }
    write_json(folder / REFERENCE_FILE, reference)


def complete_folder(
    folder: Path, *, base: str | None = None, token: str | bool | None = None, local_files_only: bool = False
) -> tuple[Path, Any]:
    """A folder that transformers can load: the checkpoint's own, or one of links to the base model's weights.

    Args:
        folder: a checkpoint of either kind.
        base: where the base model is, if not where the checkpoint says.
        token: as huggingface_hub takes it, for the base model.
        local_files_only: do not ask the network for the base model.

    Returns:
        The folder, and what keeps it: None, or an object to hand to `keep_with`.

    Raises:
        CheckpointError: the base model's weights are not those of the calibration.
        ModelFolderError, HubError: the base model cannot be had.
    """
    if not is_reference(folder):
        Shards.open(folder)  # refuses missing, cut and hostile files with one message
        return folder, None
    opened = open_checkpoint(folder)
    weights = weights_folder(folder, base=base, token=token, local_files_only=local_files_only)
    opened.verify_weights(weights)
    kept = tempfile.TemporaryDirectory(prefix="wina-")
    _link(opened, weights, Path(kept.name))
    return Path(kept.name), kept


def keep_with(model: object, kept: Any) -> None:
    """Keep a temporary folder as long as a model: what is offloaded to disk is read from it."""
    if kept is not None:
        weakref.finalize(model, kept.cleanup)


def _link(opened: Checkpoint, weights: Path, target: Path) -> None:
    """Fill `target` with links, and with the config and index that a whole checkpoint would have."""
    shards = Shards.open(weights)
    # transformers prefers a file called model.safetensors to an index.
    names = {"model.safetensors": "model-00001-of-00001.safetensors"}
    for path in [*side_files(weights), *{info.file for info in shards.values()}]:
        (target / names.get(path.name, path.name)).symlink_to(path.resolve())
    (target / WINA_FILE).symlink_to((opened.folder / WINA_FILE).resolve())
    files = {name: names.get(info.file.name, info.file.name) for name, info in shards.items()}
    files |= dict.fromkeys(opened.shards, WINA_FILE)
    sizes = {name: info.nbytes for name, info in [*shards.items(), *opened.shards.items()]}
    write_index(target, files, sizes)
    reference = read_json(opened.folder / REFERENCE_FILE)
    assert isinstance(reference, dict)
    write_json(target / "config.json", reference["config"] | {"quantization_config": opened.settings.to_dict()})
