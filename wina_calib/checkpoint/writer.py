"""Write a checkpoint: weights as a stream, the fitted tensors, index, config and side files; see `docs/format.md`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wina_calib
from wina_calib.checkpoint.evaluation_file import EVALUATION_FILE
from wina_calib.checkpoint.reader import HEAT_MAP, INDEX_FILE, WINA_FILE
from wina_calib.checkpoint.settings import FORMAT_VERSION, Settings
from wina_calib.model.architecture import Architecture
from wina_calib.model.config import RUNTIME_TYPE, has_own_code, read_config
from wina_calib.model.source import Source
from wina_calib.model.tensor_names import rotation_name
from wina_calib.storage import Shards, ShardWriter, plan_shards, safe_path
from wina_calib.storage.resume import NOT_SAVED, Phase
from wina_calib.storage.safetensors_layout import nbytes
from wina_calib.transforms import Plan, Rotations, apply_layer, embedding_rows, fold_final_norm, head_rows

SHARD_BYTES = 5 << 30
_ROW_BYTES = 64 << 20
_SKIPPED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".lock")
# Written anew, or true of this one folder only.
_REWRITTEN = ("config.json", INDEX_FILE, "README.md", ".gitattributes", ".gitignore", HEAT_MAP, EVALUATION_FILE)
# Beside it transformers takes a folder for an adapter and loads another model's weights.
_ADAPTER = "adapter_config.json"


def write_weights(
    source: Source,
    plan: Plan,
    rotations: Rotations,
    folder: Path,
    *,
    device: torch.device,
    phase: Phase = NOT_SAVED,
    progress: Callable[[str], None] = lambda _: None,
) -> bool:
    """Write the transformed weights, config and side files as a dense model folder; one layer is in memory at a time.

    Where run-time matrices are needed the final norm's weight is stored as (1, hidden): the base model's own class, which
    takes any `model_type` with a warning, then refuses the shape instead of computing without the matrices.

    Args:
        source: the original model.
        plan: the transform.
        rotations: its matrices.
        folder: an empty folder, or one with as much as `phase` says.
        device: where the weights are transformed.
        phase: where it is saved which tensors are written.
        progress: called for every layer.

    Returns:
        Whether embedding and lm_head had to be untied.
    """
    arch = source.architecture
    norm_name = f"{arch.final_norm.module}.weight"
    gain, norm = (
        fold_final_norm(arch, source.load(norm_name))
        if rotations.residual is not None
        else (None, source.load(norm_name))
    )
    untied = arch.tied and gain is not None
    head = f"{arch.lm_head}.weight"
    specs = {name: (source.shards[name].dtype, source.shards[name].shape) for name in _disk_order(source)}
    for layer in arch.layers:
        for site in plan.sites:
            width = layer.site(site).width
            specs[rotation_name(layer, site)] = (source.dtype, (width, width))
    if plan.sites:
        norm = norm.unsqueeze(0)
        specs[norm_name] = (specs[norm_name][0], tuple(norm.shape))
    if untied:
        specs[head] = specs[f"{arch.embed}.weight"]
    shards = plan_shards(_by_layer(specs, arch), SHARD_BYTES)
    files = {name: _shard_file(i, len(shards)) for i, shard in enumerate(shards) for name in shard}
    names = [_shard_file(i, len(shards)) for i in range(len(shards))]
    if (phase.step or phase.finished) and not all((folder / name).exists() for name in names):
        phase.forget()
    written: list[str] = phase.values.get("written", [])
    writers = {
        name: ShardWriter(folder / name, shard, header_metadata(), [n for n in written if n in shard])
        for name, shard in zip(names, shards, strict=True)
    }

    def sync() -> None:
        for writer in writers.values():
            writer.sync()

    try:
        for layer in () if phase.finished else arch.layers[phase.step :]:
            index = layer.index
            done = apply_layer(arch, index, source.load_layer(index), rotations, device=device)
            for path, tensor in done.items():
                name = layer.prefix + path
                writers[files[name]].write(name, tensor.to(specs[name][0]))
                written.append(name)
            phase.save(index + 1, values={"written": written}, prepare=sync)
            progress(f"weights: layer {index + 1} of {len(arch.layers)}")
        for name in () if phase.finished else source.end_names():
            if name == norm_name:
                writers[files[name]].write(name, norm)
                continue
            for first, rows in _row_chunks(source, name):
                out = rows
                if name == f"{arch.embed}.weight":
                    if untied:
                        writers[files[head]].write_rows(head, first, head_rows(rows, gain, rotations, device=device))
                    out = embedding_rows(rows, rotations, device=device) if rotations.residual is not None else rows
                elif name == head and rotations.residual is not None:
                    out = head_rows(rows, gain, rotations, device=device)
                writers[files[name]].write_rows(name, first, out)
        if not phase.finished:
            phase.finish(values={"written": list(specs)}, prepare=sync)
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            if phase.is_saved:
                writer.suspend()
            else:
                writer.abort()
        raise
    write_index(folder, files, {name: nbytes(*spec) for name, spec in specs.items()})
    write_config(source, folder, untied=untied, settings=None, runtime=False)
    copy_side_files(source.folder, folder)
    return untied


def write_calibration(
    folder: Path, tensors: Mapping[str, Tensor], settings: Settings, source: Source, *, untied: bool, runtime: bool
) -> None:
    """Add the fitted tensors to a folder of weights; index and config last."""
    write_wina_file(folder / WINA_FILE, tensors)
    weights = {name: info for name, info in Shards.open(folder).items() if info.file.name != WINA_FILE}
    files = {name: info.file.name for name, info in weights.items()} | dict.fromkeys(tensors, WINA_FILE)
    sizes = {name: info.nbytes for name, info in weights.items()}
    write_index(folder, files, sizes | {name: tensor.nbytes for name, tensor in tensors.items()})
    write_config(source, folder, untied=untied, settings=settings, runtime=runtime)


def write_wina_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `wina.safetensors`, in order of layers and names; the order in which the tensors come does not change it."""
    names = sorted(
        tensors, key=lambda name: [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", name)]
    )
    specs = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
    with ShardWriter(path, specs, header_metadata()) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def header_metadata() -> dict[str, str]:
    """Metadata of every safetensors header that is written."""
    return {
        "format": "pt",
        "producer": "wina_calib",
        "producer_version": wina_calib.__version__,
        "wina_format": FORMAT_VERSION,
    }


def write_index(folder: Path, files: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Write the index: names in order, total size in bytes."""
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(files.items()))}
    write_json(folder / INDEX_FILE, index)


def write_config(source: Source, folder: Path, *, untied: bool, settings: Settings | None, runtime: bool) -> None:
    """Write config.json: the base model's own, with what calibration changed.

    A checkpoint that needs run-time matrices gets a `model_type` of its own, so that nothing loads it as if it were dense.
    """
    raw = read_config(source.folder)
    if untied:
        raw["tie_word_embeddings"] = False
    if settings is not None:
        raw["quantization_config"] = settings.to_dict()
        if runtime:
            raw["model_type"] = RUNTIME_TYPE + str(raw["model_type"])
            raw["architectures"] = [f"Wina{name}" for name in raw.get("architectures") or ()]
    write_json(folder / "config.json", raw)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, the same bytes for the same value."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


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


def _disk_order(source: Source) -> list[str]:
    names = source.end_names()
    return names + [n for i in range(len(source.architecture.layers)) for n in source.layer_names(i)]


def _by_layer(specs: dict[str, Any], arch: Architecture) -> dict[str, Any]:
    """Order tensors by layer, ends first, so that a shard is finished soon after its first layer."""
    prefixes = [layer.prefix for layer in arch.layers]

    def position(name: str) -> tuple[int, str]:
        return next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), -1), name

    return {name: specs[name] for name in sorted(specs, key=position)}


def _shard_file(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _row_chunks(source: Source, name: str) -> Any:
    info = source.shards[name]
    if not info.shape:
        yield 0, source.load(name)
        return
    rows = max(1, _ROW_BYTES // max(1, info.nbytes // max(1, info.shape[0])))
    for first in range(0, info.shape[0], rows):
        yield first, source.load(name, slice(first, min(first + rows, info.shape[0])))
