"""The quantized weights as a stream of shards, in place of the dense ones that they are made of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from wina_calib.checkpoint.dense_weights import Shelf, in_files, row_chunks
from wina_calib.checkpoint.format import head_names, packed_name, packed_tensors
from wina_calib.checkpoint.settings import Settings
from wina_calib.model.architecture import Layer, MaskGroup
from wina_calib.model.source import Source
from wina_calib.model.tensor_names import is_rotation
from wina_calib.quantization.formats import Quantized, Spec, quantize_rows
from wina_calib.storage import Specs


class QuantizedWeights:
    """Writes a checkpoint's weights, layer after layer as they are quantized; what is not quantized is copied.

    The final norm's weight is stored as (1, hidden): the base model's own class, which takes any `model_type` with a
    warning, then refuses the shape instead of computing with weights that it does not find. An earlier writer has written so
    many of the first `layers`.
    """

    def __init__(self, dense: Source, settings: Settings, folder: Path, layers: int = 0) -> None:
        self._dense, self._settings = dense, settings
        self._norm = f"{dense.architecture.final_norm.module}.weight"
        written = tuple(layer.prefix for layer in dense.architecture.layers[:layers])
        self.shelf = Shelf(
            folder, planned_shards(dense, settings), lambda name: name.startswith(written), quantized=True
        )

    def write_layer(self, layer: Layer, groups: Iterable[tuple[MaskGroup, Quantized]]) -> None:
        """Write one layer: its quantized mask groups, and all other tensors as they are."""
        for group, quantized in groups:
            for part, tensor in quantized.named().items():
                self.shelf.write(packed_name(layer, group, part), tensor)
        for name in self.shelf.specs:
            if name.startswith(layer.prefix) and name in self._dense.shards:
                self.shelf.write(name, self._dense.load(name))

    def write_ends(self) -> None:
        """Write what lies outside of the decoder layers, close the shards, and write the index."""
        head = _head_weight(self._dense) if self._settings.head_bits == 8 else None
        for name in self._dense.end_names():
            if name == self._norm:
                self.shelf.write(name, self._dense.load(name).view(self.shelf.specs[name][1]))
                continue
            for first, rows in row_chunks(self._dense, name):
                if name == head:
                    codes, scales = head_names(self._dense.architecture)
                    quantized = quantize_rows(rows)
                    self.shelf.write_rows(codes, first, quantized.codes)
                    self.shelf.write_rows(scales, first, quantized.scales)
                else:
                    self.shelf.write_rows(name, first, rows)
        self.shelf.close()


def has_shards(dense: Source, settings: Settings, folder: Path) -> bool:
    """Whether all shards of the quantized weights are in a folder, finished or not."""
    return all((folder / file).exists() for file in planned_shards(dense, settings))


def planned_shards(dense: Source, settings: Settings) -> dict[str, Specs]:
    """Dtypes and shapes of all tensors of the quantized weights of a dense model, by file."""
    arch = dense.architecture
    replaced = {
        f"{layer.prefix}{p.module}.weight"
        for layer, site in arch.sites
        if settings.format_of(layer, site) is not None
        for p in site.projections
    }
    if settings.head_bits == 8:
        replaced.add(_head_weight(dense))
    names = [*dense.names(), *filter(is_rotation, dense.shards)]
    specs: dict[str, Spec] = {n: (dense.shards[n].dtype, dense.shards[n].shape) for n in names if n not in replaced}
    norm = f"{arch.final_norm.module}.weight"
    specs[norm] = (specs[norm][0], (1, arch.hidden_size))
    return in_files(specs | packed_tensors(arch, settings), arch)


def _head_weight(dense: Source) -> str:
    """The matrix that gives the logits: lm_head's, or the embedding's where it is tied."""
    arch = dense.architecture
    return f"{arch.embed if arch.tied else arch.lm_head}.weight"
