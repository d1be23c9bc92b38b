"""Write what calibration adds to a folder of weights: the fitted tensors, index and config; see `docs/format.md`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from wina_calib.checkpoint.format import INDEX_FILE, WINA_FILE
from wina_calib.checkpoint.local_paths import without_paths
from wina_calib.checkpoint.settings import FORMAT_VERSION, QUANTIZED_VERSION, Settings
from wina_calib.model.folder import RUNTIME_TYPE
from wina_calib.model.source import Source
from wina_calib.storage import Shards, ShardWriter
from wina_calib.version import __version__


def write_calibration(
    folder: Path, tensors: Mapping[str, Tensor], settings: Settings, source: Source, *, untied: bool, runtime: bool
) -> None:
    """Add the fitted tensors to a folder of weights; index and config last."""
    write_wina_file(folder / WINA_FILE, tensors, quantized=settings.weight_format is not None)
    weights = {name: info for name, info in Shards.open(folder).items() if info.file.name != WINA_FILE}
    files = {name: info.file.name for name, info in weights.items()} | dict.fromkeys(tensors, WINA_FILE)
    sizes = {name: info.nbytes for name, info in weights.items()}
    write_index(folder, files, sizes | {name: tensor.nbytes for name, tensor in tensors.items()})
    write_config(source, folder, untied=untied, settings=settings, runtime=runtime)


def write_wina_file(path: Path, tensors: Mapping[str, Tensor], *, quantized: bool = False) -> None:
    """Write `wina.safetensors`, in order of layers and names; the order in which the tensors come does not change it."""
    names = sorted(
        tensors, key=lambda name: [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", name)]
    )
    specs = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
    with ShardWriter(path, specs, header_metadata(quantized=quantized)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def header_metadata(*, quantized: bool = False) -> dict[str, str]:
    """Metadata of every safetensors header that is written, in a checkpoint with quantized weights or another."""
    return {
        "format": "pt",
        "producer": "wina_calib",
        "producer_version": __version__,
        "wina_format": QUANTIZED_VERSION if quantized else FORMAT_VERSION,
    }


def write_index(folder: Path, files: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Write the index: names in order, total size in bytes."""
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(files.items()))}
    write_json(folder / INDEX_FILE, index)


def write_config(source: Source, folder: Path, *, untied: bool, settings: Settings | None, runtime: bool) -> None:
    """Write config.json: the base model's own, with what calibration changed.

    A checkpoint with run-time matrices or quantized weights gets a `model_type` of its own, so that nothing loads it as if
    it were dense.
    """
    raw = without_paths(source.raw_config)
    if untied:
        raw["tie_word_embeddings"] = False
    if settings is not None:
        raw["quantization_config"] = settings.to_dict()
        if runtime or settings.weight_format is not None:
            raw["model_type"] = RUNTIME_TYPE + source.config.model_type
            raw["architectures"] = [f"Wina{MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)].__name__}"]
    write_json(folder / "config.json", raw)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, the same bytes for the same value."""
    path.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
