"""The quantized weights as a stream of shards, in place of the dense ones that they are made of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from wina_calib.checkpoint.dense_weights import SHARD_BYTES, by_layer, row_chunks, shard_file
from wina_calib.checkpoint.format import head_names, packed_name, packed_tensors
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.writer import header_metadata, write_index
from wina_calib.model.architecture import Layer, MaskGroup
from wina_calib.model.source import Source
from wina_calib.model.tensor_names import is_rotation
from wina_calib.quantization.formats import Quantized, Spec, quantize_rows
from wina_calib.storage import ShardWriter, plan_shards
from wina_calib.storage.safetensors_layout import nbytes


class QuantizedWeights:
    """Writes a checkpoint's weights, layer after layer as they are quantized; what is not quantized is copied.

    The final norm's weight is stored as (1, hidden): the base model's own class, which takes any `model_type` with a
    warning, then refuses the shape instead of computing with weights that it does not find. An earlier writer has written so
    many of the first `layers`.
    """

    def __init__(self, dense: Source, settings: Settings, folder: Path, layers: int = 0) -> None:
        self._dense, self._settings, self._folder = dense, settings, folder
        self._norm = f"{dense.architecture.final_norm.module}.weight"
        shards = _shards(dense, settings)
        self._specs = {name: spec for shard in shards.values() for name, spec in shard.items()}
        self._files = {name: file for file, shard in shards.items() for name in shard}
        written = tuple(layer.prefix for layer in dense.architecture.layers[:layers])
        self._writers = {
            file: ShardWriter(
                folder / file,
                shard,
                header_metadata(quantized=True),
                [name for name in shard if name.startswith(written)],
            )
            for file, shard in shards.items()
        }

    def write_layer(self, layer: Layer, groups: Iterable[tuple[MaskGroup, Quantized]]) -> None:
        """Write one layer: its quantized mask groups, and all other tensors as they are."""
        for group, quantized in groups:
            for part, tensor in quantized.named().items():
                self._write(packed_name(layer, group, part), tensor)
        for name in self._specs:
            if name.startswith(layer.prefix) and name in self._dense.shards:
                self._write(name, self._dense.load(name))

    def write_ends(self) -> None:
        """Write what lies outside of the decoder layers, close the shards, and write the index."""
        head = _head_weight(self._dense) if self._settings.head_bits == 8 else None
        for name in self._dense.end_names():
            if name == self._norm:
                self._write(name, self._dense.load(name).view(self._specs[name][1]))
                continue
            for first, rows in row_chunks(self._dense, name):
                if name == head:
                    codes, scales = head_names(self._dense.architecture)
                    quantized = quantize_rows(rows)
                    self._writers[self._files[codes]].write_rows(codes, first, quantized.codes)
                    self._writers[self._files[scales]].write_rows(scales, first, quantized.scales)
                else:
                    self._writers[self._files[name]].write_rows(name, first, rows)
        for writer in self._writers.values():
            writer.close()
        write_index(self._folder, self._files, {name: nbytes(*spec) for name, spec in self._specs.items()})

    def sync(self) -> None:
        """Force what was written to the disk."""
        for writer in self._writers.values():
            writer.sync()

    def leave(self, *, keep: bool) -> None:
        """Close after an error; with `keep` a later run can go on."""
        for writer in self._writers.values():
            if keep:
                writer.suspend()
            else:
                writer.abort()

    def _write(self, name: str, tensor: Tensor) -> None:
        self._writers[self._files[name]].write(name, tensor)


def has_shards(dense: Source, settings: Settings, folder: Path) -> bool:
    """Whether all shards of the quantized weights are in a folder, finished or not."""
    return all((folder / file).exists() for file in _shards(dense, settings))


def _shards(dense: Source, settings: Settings) -> dict[str, dict[str, Spec]]:
    """What each file of the quantized weights holds."""
    shards = plan_shards(by_layer(planned(dense, settings), dense.architecture), SHARD_BYTES)
    return {shard_file(i, len(shards)): dict(shard) for i, shard in enumerate(shards)}


def planned(dense: Source, settings: Settings) -> dict[str, Spec]:
    """Dtypes and shapes of all tensors of the quantized weights of a dense model, by name."""
    arch = dense.architecture
    replaced = {
        f"{layer.prefix}{p.module}.weight"
        for layer, site in arch.sites
        if settings.format_of(layer, site) is not None
        for p in site.projections
    }
    if settings.head_bits == 8:
        replaced.add(_head_weight(dense))
    names = [*dense.end_names(), *(n for i in range(len(arch.layers)) for n in dense.layer_names(i))]
    names += filter(is_rotation, dense.shards)
    specs: dict[str, Spec] = {n: (dense.shards[n].dtype, dense.shards[n].shape) for n in names if n not in replaced}
    norm = f"{arch.final_norm.module}.weight"
    specs[norm] = (specs[norm][0], (1, arch.hidden_size))
    return specs | packed_tensors(arch, settings)


def _head_weight(dense: Source) -> str:
    """The matrix that gives the logits: lm_head's, or the embedding's where it is tied."""
    arch = dense.architecture
    return f"{arch.embed if arch.tied else arch.lm_head}.weight"
