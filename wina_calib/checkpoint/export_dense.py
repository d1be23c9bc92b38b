"""A calibrated checkpoint as a plain dense model folder, for tools that do not know wina_calib."""

from __future__ import annotations

from pathlib import Path

from wina_calib.checkpoint.dequantized import dense_view
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.checkpoint.side_files import copy_side_files
from wina_calib.checkpoint.writer import header_metadata, write_index, write_json
from wina_calib.common.atomic import check_output, output_folder
from wina_calib.errors import UnsupportedModel
from wina_calib.model.folder import base_config, is_reference
from wina_calib.model.locate import weights_folder
from wina_calib.model.tensor_names import is_added, is_rotation
from wina_calib.storage import ShardWriter


def export_dense(folder: Path, output: Path, *, overwrite: bool = False) -> None:
    """Write a checkpoint's weights without what calibration added, quantized ones dequantized.

    Raises:
        UnsupportedModel: the checkpoint needs run-time matrices.
    """
    check_output(output, overwrite=overwrite, keep=folder, made=("config.json",))
    opened = open_checkpoint(folder)
    if is_reference(folder):
        raise UnsupportedModel(f"{folder} holds no weights: the dense model is {weights_folder(folder)} itself.")
    if any(map(is_rotation, opened.shards)):
        raise UnsupportedModel(
            f"{folder} needs run-time matrices (transform {opened.settings.transform}); no plain dense model equals it. "
            "Calibrate with --transform global or none."
        )
    shards = dense_view(opened.opened, opened.architecture, opened.shards)
    files = {name: info.file.name for name, info in shards.items() if not is_added(name)}
    with output_folder(output, overwrite=overwrite) as target:
        for file in sorted(set(files.values())):
            names = [name for name in shards if files.get(name) == file]
            specs = {name: (shards[name].dtype, shards[name].shape) for name in names}
            with ShardWriter(target / file, specs, header_metadata()) as writer:
                for name in names:
                    writer.write(name, shards.load(name).to(specs[name][0]))
        write_index(target, files, {name: shards[name].nbytes for name in files})
        config = base_config(opened.opened.raw)
        copy_side_files(opened.opened, target)
        write_json(target / "config.json", config)
