"""The transformed weights as a stream of shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wina_calib.checkpoint.side_files import copy_side_files
from wina_calib.checkpoint.writer import header_metadata, write_config, write_index
from wina_calib.common.progress import SILENT, Progress
from wina_calib.model.architecture import Architecture
from wina_calib.model.source import Source
from wina_calib.model.tensor_names import rotation_name
from wina_calib.storage import ShardWriter, Specs, plan_shards
from wina_calib.storage.resume import NOT_SAVED, Phase
from wina_calib.storage.safetensors_layout import nbytes
from wina_calib.transforms import Plan, Rotations, apply_layer, embedding_rows, fold_final_norm, head_rows

Spec = tuple[torch.dtype, tuple[int, ...]]
SHARD_BYTES = 5 << 30
_ROW_BYTES = 64 << 20


@dataclass(frozen=True)
class WeightPlan:
    """What a folder of transformed weights will hold."""

    specs: Mapping[str, Spec]  # dtype and shape of every tensor
    shards: Mapping[str, Specs]  # the same by the names of the files
    untied: bool  # whether embedding and lm_head have to be untied
    wide_norm: bool  # whether the final norm's weight is stored as (1, hidden)


class Shelf:
    """Shards of a folder that are open to be written, by which a tensor finds its file.

    Tensors that are `written` are those of an earlier writer. What is closed has an index beside it.
    """

    def __init__(
        self, folder: Path, shards: Mapping[str, Specs], written: Callable[[str], bool], *, quantized: bool = False
    ) -> None:
        self.folder, self.specs = folder, {name: spec for shard in shards.values() for name, spec in shard.items()}
        self._files = {name: file for file, shard in shards.items() for name in shard}
        metadata = header_metadata(quantized=quantized)
        self._writers = {
            file: ShardWriter(folder / file, shard, metadata, list(filter(written, shard)))
            for file, shard in shards.items()
        }

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, in the dtype that is planned for it."""
        self._writers[self._files[name]].write(name, tensor.to(self.specs[name][0]))

    def write_rows(self, name: str, first: int, rows: Tensor) -> None:
        """Write some rows of a tensor, from number `first` on."""
        self._writers[self._files[name]].write_rows(name, first, rows)

    def sync(self) -> None:
        """Force what is written to disk."""
        for writer in self._writers.values():
            writer.sync()

    def close(self) -> None:
        """Close the shards, all of which are whole, and write their index."""
        for writer in self._writers.values():
            writer.close()
        write_index(self.folder, self._files, {name: nbytes(*spec) for name, spec in self.specs.items()})

    def leave(self, *, keep: bool) -> None:
        """Close after an error; with `keep` a later run can go on."""
        for writer in self._writers.values():
            if keep:
                writer.suspend()
            else:
                writer.abort()


def plan_weights(source: Source, plan: Plan, *, untied: bool) -> WeightPlan:
    """Names, dtypes, shapes and files of the transformed weights.

    Where run-time matrices are needed the final norm's weight is stored as (1, hidden): the base model's own class, which
    takes any `model_type` with a warning, then refuses the shape instead of computing without the matrices. `untied` says
    whether embedding and lm_head, tied in the model, become different.
    """
    arch = source.architecture
    specs: dict[str, Spec] = {name: (source.shards[name].dtype, source.shards[name].shape) for name in source.names()}
    for layer in arch.layers:
        for site in plan.sites:
            width = layer.site(site).width
            specs[rotation_name(layer, site)] = (source.dtype, (width, width))
    norm = _norm_name(arch)
    if plan.sites:
        specs[norm] = (specs[norm][0], (1, *specs[norm][1]))
    if untied:
        specs[f"{arch.lm_head}.weight"] = specs[f"{arch.embed}.weight"]
    return WeightPlan(specs, in_files(specs, arch), untied, wide_norm=bool(plan.sites))


@contextmanager
def open_shards(folder: Path, plan: WeightPlan, phase: Phase) -> Iterator[Shelf]:
    """Open all shards, to go on after the tensors that the phase has.

    They are closed at the end; after an error they are left to be gone on with, or removed where nothing is saved.
    """
    if (phase.done_items or phase.finished) and not all((folder / file).exists() for file in plan.shards):
        phase.forget()
    written = phase.values.get("written", [])
    shelf = Shelf(folder, plan.shards, set(written).__contains__)
    try:
        yield shelf
        shelf.close()
    except BaseException:
        shelf.leave(keep=phase.is_saved)
        raise


def write_layers(
    source: Source, rotations: Rotations, shelf: Shelf, *, device: torch.device, phase: Phase, progress: Progress
) -> None:
    """Transform and write the decoder layers that are not written yet; one is in memory at a time."""
    layers = source.architecture.layers
    written: list[str] = phase.values.get("written", [])
    for layer, done in phase.each(lambda step: layers[step:], {}, {}, progress):
        made = apply_layer(source.architecture, layer.index, source.load_layer(layer.index), rotations, device=device)
        for path, tensor in made.items():
            shelf.write(layer.prefix + path, tensor)
            written.append(layer.prefix + path)
        done(f"weights: layer {layer.index + 1} of {len(layers)}", values={"written": written}, prepare=shelf.sync)


def write_ends(
    source: Source,
    rotations: Rotations,
    plan: WeightPlan,
    shelf: Shelf,
    final_norm: tuple[Tensor | None, Tensor],
    *,
    device: torch.device,
) -> None:
    """Transform and write what is outside of the layers, some rows at a time.

    `final_norm` is the gain that goes into lm_head, if any does, and the weight to store.
    """
    arch, turned = source.architecture, rotations.residual is not None
    norm, head, embed = _norm_name(arch), f"{arch.lm_head}.weight", f"{arch.embed}.weight"
    gain, weight = final_norm
    for name in source.end_names():
        if name == norm:
            shelf.write(norm, weight.unsqueeze(0) if plan.wide_norm else weight)
            continue
        for first, rows in row_chunks(source, name):
            if name == embed and plan.untied:
                shelf.write_rows(head, first, head_rows(rows, gain, rotations, device=device))
            if turned and name == embed:
                rows = embedding_rows(rows, rotations, device=device)
            elif turned and name == head:
                rows = head_rows(rows, gain, rotations, device=device)
            shelf.write_rows(name, first, rows)


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

    The folder is empty, or has as much as `phase` says.

    Returns:
        Whether embedding and lm_head had to be untied.
    """
    arch, norm = source.architecture, source.load(_norm_name(source.architecture))
    folded = fold_final_norm(arch, norm) if rotations.residual is not None else (None, norm)
    weights = plan_weights(source, plan, untied=arch.tied and folded[0] is not None)
    with open_shards(folder, weights, phase) as shelf:
        if not phase.finished:
            write_layers(source, rotations, shelf, device=device, phase=phase, progress=progress)
            write_ends(source, rotations, weights, shelf, folded, device=device)
            phase.finish(values={"written": list(weights.specs)}, prepare=shelf.sync)
    write_config(source, folder, untied=weights.untied, settings=None, runtime=False)
    copy_side_files(source.opened, folder)
    return weights.untied


def _norm_name(arch: Architecture) -> str:
    return f"{arch.final_norm.module}.weight"


def in_files(specs: dict[str, Spec], arch: Architecture) -> dict[str, Specs]:
    """Tensors by the names of their files: ends first, then by layer, so that a file is finished soon after its first one."""
    prefixes = [layer.prefix for layer in arch.layers]

    def position(name: str) -> tuple[int, str]:
        return next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), -1), name

    shards = plan_shards({name: specs[name] for name in sorted(specs, key=position)}, SHARD_BYTES)
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def row_chunks(source: Source, name: str) -> Any:
    """A tensor's rows, some at a time: the first one's number, and the rows."""
    info = source.shards[name]
    if not info.shape:
        yield 0, source.load(name)
        return
    rows = max(1, _ROW_BYTES // max(1, info.nbytes // max(1, info.shape[0])))
    for first in range(0, info.shape[0], rows):
        yield first, source.load(name, slice(first, min(first + rows, info.shape[0])))
