"""A checkpoint's quantized weights as a dense model's, for what computes with dense layers or writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wina_calib.checkpoint.format import head_names, packed_name
from wina_calib.checkpoint.reader import Checkpoint, check_packed, settings_of
from wina_calib.checkpoint.settings import Settings
from wina_calib.model.architecture import Architecture, Layer, MaskGroup
from wina_calib.model.folder import ModelFolder, open_folder
from wina_calib.model.locate import weights_folder
from wina_calib.model.source import Source, source_of
from wina_calib.model.tensor_names import is_packed, is_rotation
from wina_calib.quantization.formats import Quantized, QuantizedRows, WeightFormat
from wina_calib.storage import Shards
from wina_calib.storage.safetensors_layout import TensorInfo, nbytes


def weights_of(checkpoint: Checkpoint, *, verified: bool = False) -> Source:
    """The weights of a checkpoint as a dense model, its own or its base model's; what calibration added is left aside.

    Args:
        checkpoint: of either kind.
        verified: whether a look at all weights, that they are those of the calibration, was taken before.

    Raises:
        CheckpointError: they are not those of the calibration, or damaged.
        ModelFolderError, HubError: the base model cannot be had.
    """
    opened = checkpoint.opened if verified else checkpoint.verify_weights()
    if opened.is_reference:
        opened = open_folder(weights_folder(opened))
    return source_of(opened, str(opened.path), calibrated=True, view=dense_view)


def open_weights(folder: Path | str) -> Source:
    """Open weights that lie in a folder, a checkpoint's or a model's, as a dense model."""
    return source_of(open_folder(Path(folder)), str(folder), calibrated=True, view=dense_view)


def dense_view(opened: ModelFolder, arch: Architecture, shards: Shards) -> Shards:
    """The tensors of a folder under the names of a dense model's; those of a folder without quantized weights as they are."""
    if not any(map(is_packed, shards)):
        return shards
    settings = settings_of(opened)
    form = settings.weight_format
    check_packed(opened.path, arch, settings, shards)
    return shards if form is None else DequantizedShards(shards, arch, settings, form)


@dataclass(frozen=True)
class _Part:
    """Outputs `first` to before `stop` of a mask group."""

    layer: Layer
    group: MaskGroup
    first: int
    stop: int


class DequantizedShards(Shards):
    """A checkpoint's tensors, quantized ones as dense weights: float32 when loaded, described in the model's dtype."""

    def __init__(self, stored: Shards, arch: Architecture, settings: Settings, form: WeightFormat) -> None:
        self._stored, self._form, self._settings = stored, form, settings
        self._norm = f"{arch.final_norm.module}.weight"
        self._parts: dict[str, _Part] = {}
        self._head: dict[str, tuple[str, str]] = {}
        dtype = stored[self._norm].dtype
        codes, scales = head_names(arch)
        hidden = {codes, scales} if settings.head_bits == 8 else set()
        infos = {name: info for name, info in stored.items() if not is_packed(name) and name not in hidden}
        if not any(map(is_rotation, stored)):
            infos[self._norm] = _info(infos[self._norm], self._norm, dtype, (arch.hidden_size,))
        for layer, site in arch.sites:
            if settings.format_of(layer, site) is None:
                continue
            for group in settings.rule.groups(site):
                first = 0
                for p in group.projections:
                    name = f"{layer.prefix}{p.module}.weight"
                    self._parts[name] = _Part(layer, group, first, first + p.out_features)
                    file = stored[packed_name(layer, group, "codes")]
                    infos[name] = _info(file, name, dtype, (p.out_features, p.in_features))
                    first += p.out_features
        if hidden:
            name = f"{codes.removesuffix('.codes')}.weight"
            self._head[name] = (codes, scales)
            infos[name] = _info(stored[codes], name, dtype, (arch.vocab_size, arch.hidden_size))
        super().__init__(stored.folder, infos)

    def load(self, name: str, *, rows: slice | Tensor | None = None) -> Tensor:
        """Read one tensor or some of its rows; see `Shards.load`."""
        if name in self._parts:
            weight = self._weight(self._parts[name])
            return weight if rows is None else weight[rows]
        if name in self._head:
            codes, scales = (self._stored.load(part, rows=rows) for part in self._head[name])
            return QuantizedRows(codes, scales).dequantize()
        if name == self._norm:
            return self._stored.load(name).view(self[name].shape)
        return self._stored.load(name, rows=rows)

    def _weight(self, part: _Part) -> Tensor:
        """Weights (out, in) float32 of one projection."""
        outs = [p.out_features for p in part.group.projections]
        names = self._form.specs(part.group.projections[0].in_features, outs)
        tensors = {name: self._stored.load(packed_name(part.layer, part.group, name)) for name in names}
        return Quantized.of(self._form, tensors).outputs(part.first, part.stop).whole(torch.float32)


def _info(like: TensorInfo, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorInfo:
    """What is said of a tensor that is made of another: it has no bytes of its own, but a size."""
    return TensorInfo(name, dtype, shape, like.file, 0, nbytes(dtype, shape))
