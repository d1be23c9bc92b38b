"""The transformed weights as a stream of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from wina_calib.checkpoint.side_files import copy_side_files
from wina_calib.checkpoint.writer import header_metadata, write_config, write_index
from wina_calib.common.progress import SILENT, Progress
from wina_calib.model.architecture import Architecture
from wina_calib.model.source import Source
from wina_calib.model.tensor_names import rotation_name
from wina_calib.storage import ShardWriter, plan_shards
from wina_calib.storage.resume import NOT_SAVED, Phase
from wina_calib.storage.safetensors_layout import nbytes
from wina_calib.transforms import Plan, Rotations, apply_layer, embedding_rows, fold_final_norm, head_rows

SHARD_BYTES = 5 << 30
_ROW_BYTES = 64 << 20


def write_weights(
    source: Source,
    plan: Plan,
    rotations: Rotations,
    folder: Path,
    *,
    device: torch.device,
    phase: Phase = NOT_SAVED,
    progress: Progress = SILENT,
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
        progress: hears of every layer.

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
    shards = plan_shards(by_layer(specs, arch), SHARD_BYTES)
    files = {name: shard_file(i, len(shards)) for i, shard in enumerate(shards) for name in shard}
    names = [shard_file(i, len(shards)) for i in range(len(shards))]
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
            progress.step(f"weights: layer {index + 1} of {len(arch.layers)}")
        for name in () if phase.finished else source.end_names():
            if name == norm_name:
                writers[files[name]].write(name, norm)
                continue
            for first, rows in row_chunks(source, name):
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
    copy_side_files(source.opened, folder)
    return untied


def _disk_order(source: Source) -> list[str]:
    names = source.end_names()
    return names + [n for i in range(len(source.architecture.layers)) for n in source.layer_names(i)]


def by_layer(specs: dict[str, Any], arch: Architecture) -> dict[str, Any]:
    """Order tensors by layer, ends first, so that a shard is finished soon after its first layer."""
    prefixes = [layer.prefix for layer in arch.layers]

    def position(name: str) -> tuple[int, str]:
        return next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), -1), name

    return {name: specs[name] for name in sorted(specs, key=position)}


def shard_file(index: int, count: int) -> str:
    """Name of one shard of several."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def row_chunks(source: Source, name: str) -> Any:
    """A tensor's rows, some at a time: the first one's number, and the rows."""
    info = source.shards[name]
    if not info.shape:
        yield 0, source.load(name)
        return
    rows = max(1, _ROW_BYTES // max(1, info.nbytes // max(1, info.shape[0])))
    for first in range(0, info.shape[0], rows):
        yield first, source.load(name, slice(first, min(first + rows, info.shape[0])))
