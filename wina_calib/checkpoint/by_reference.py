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
from wina_calib.checkpoint.local_paths import base_model_here, remember, without_paths
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.side_files import side_files
from wina_calib.checkpoint.writer import write_index, write_json, write_wina_file
from wina_calib.errors import UsageError
from wina_calib.model.folder import REFERENCE_FILE, ModelFolder, open_folder
from wina_calib.model.loading import ask, open_weights, stored_weights
from wina_calib.model.locate import weights_folder
from wina_calib.model.source import Source
from wina_calib.storage import Shards
from wina_calib.transforms import Plan

FORMAT = "wina-reference/1"


def check_possible(transform: Plan) -> None:
    """Raise UsageError where a transform changes the weights, so that the base model's cannot serve."""
    if transform.name != "none":
        raise UsageError(
            f"weights by reference need untouched weights, but the transform is {transform.name}. "
            "Add --transform none, or leave --weights reference out."
        )


def check_plain(source: Source) -> None:
    """Raise UsageError where the weights to calibrate are not those that lie in the model's folder."""
    if not source.is_plain:
        raise UsageError(
            f"weights by reference need a model that is calibrated as it lies in its folder, but {source.notes[0]}. Leave "
            "--weights reference out."
        )


def write_reference(folder: Path, tensors: Mapping[str, Tensor], settings: Settings, source: Source) -> None:
    """Write a checkpoint that refers to the weights of `source`; `wina_config.json` last."""
    write_wina_file(folder / WINA_FILE, tensors)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_index(folder, dict.fromkeys(tensors, WINA_FILE), sizes)
    reference = {
        "format": FORMAT,
        "base_model": settings.base_model,
        "base_commit": source.commit,
        "config": without_paths(source.raw_config),
        "quantization_config": settings.to_dict(),
    }
    write_json(folder / REFERENCE_FILE, reference)


def complete_folder(
    opened: ModelFolder, *, base: str | None = None, token: str | bool | None = None, local_files_only: bool = False
) -> tuple[ModelFolder, Any]:
    """A folder that transformers can load: the checkpoint's own, or one of links to the base model's weights.

    Args:
        opened: the folder of a checkpoint of either kind.
        base: where the base model is, if not where the checkpoint says.
        token: as huggingface_hub takes it, for the base model.
        local_files_only: do not ask the network for the base model.

    Returns:
        The folder, and what keeps it: None, or an object to hand to `keep_with`.

    Raises:
        CheckpointError: the base model's weights are not those of the calibration.
        ModelFolderError, HubError: the base model cannot be had.
    """
    if not opened.is_reference:
        Shards.open(opened.path)  # refuses missing, cut and hostile files with one message
        return opened, None
    checkpoint = open_checkpoint(opened)
    weights = open_folder(weights_folder(opened, base=base, token=token, local_files_only=local_files_only))
    loading = ask(weights)
    checkpoint.verify_base(weights, open_weights(weights, loading))
    settings = checkpoint.settings
    if base is not None and base_model_here(settings.weights, settings.base_model) is None:
        remember(settings.weights, settings.provenance, base_model=weights.path)  # for commands that cannot be told
    kept = tempfile.TemporaryDirectory(prefix="wina-")
    return _link(checkpoint, weights, stored_weights(weights, loading), Path(kept.name)), kept


def keep_with(model: object, kept: Any) -> None:
    """Keep a temporary folder as long as a model: what is offloaded to disk is read from it."""
    if kept is not None:
        weakref.finalize(model, kept.cleanup)


def _link(opened: Checkpoint, base: ModelFolder, shards: Shards, target: Path) -> ModelFolder:
    """Fill `target` with links, and with the config and index that a whole checkpoint would have."""
    # transformers prefers a file called model.safetensors to an index.
    names = {"model.safetensors": "model-00001-of-00001.safetensors"}
    for path in [*side_files(base), *{info.file for info in shards.values()}]:
        (target / names.get(path.name, path.name)).symlink_to(path.resolve())
    (target / WINA_FILE).symlink_to((opened.folder / WINA_FILE).resolve())
    files = {name: names.get(info.file.name, info.file.name) for name, info in shards.items()}
    files |= dict.fromkeys(opened.shards, WINA_FILE)
    sizes = {name: info.nbytes for name, info in [*shards.items(), *opened.shards.items()]}
    write_index(target, files, sizes)
    whole = ModelFolder(target / "config.json", opened.opened.raw | {"quantization_config": opened.settings.to_dict()})
    write_json(whole.file, whole.stored)
    return whole
