"""A model seen through a transform without writing it, for measurements that need its decoder layers alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wina_calib.calibration.compute import Compute
from wina_calib.calibration.dense_pass import dense_pass
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.model.source import Source
from wina_calib.transforms import Rotations, Statistics, apply_layer, embedding_rows, fit, needed_sites, plan


@dataclass(frozen=True)
class TransformedSource(Source):
    """A source whose embedding and decoder layers are transformed as they are read; what comes after them is not."""

    transform: str = "none"  # the resolved transform
    turned: Rotations = Rotations()  # its fitted rotations

    def load_layer(self, index: int) -> dict[str, Tensor]:
        """Read one decoder layer, transformed, without its run-time matrices."""
        done = apply_layer(self.architecture, index, super().load_layer(index), self.turned)
        return {name: tensor for name, tensor in done.items() if not name.startswith("wina.")}

    def rotations(self, index: int) -> dict[str, Tensor]:
        """A layer's run-time matrices by site name."""
        return {site: q for (layer, site), q in self.turned.sites.items() if layer == index}

    def load(self, name: str, rows: slice | Tensor | None = None) -> Tensor:
        """Read one tensor; rows of the embedding are transformed."""
        loaded = super().load(name, rows)
        is_embedding = name == f"{self.architecture.embed}.weight"
        return embedding_rows(loaded, self.turned) if is_embedding and self.turned.residual is not None else loaded


def see_through(
    source: Source, transform: str, ids: Tensor, *, device: torch.device, dtype: torch.dtype
) -> TransformedSource:
    """Fit a transform and return the model as it looks with it.

    The first of each block of `ids` (blocks, seq_len) is left out by transforms that look at activations.

    Raises:
        TransformError: the transform is not exact on this model, or the tokens are too few.
    """
    name = plan(transform, source.architecture).name
    statistics = None
    if needed_sites(name, source.architecture):
        statistics = Statistics(source.architecture, name, tokens=len(ids) * (ids.shape[1] - 1))
        dense_pass(LayerStream(source, ids, Compute(device, dtype)), statistics)
    rotations = fit(name, source.architecture, source.load_layer, statistics, device=device)
    return TransformedSource(**vars(source), transform=name, turned=rotations)
