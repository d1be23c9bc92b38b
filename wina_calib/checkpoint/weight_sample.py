"""A few elements of every parameter of a decoder's layers, by which a loaded model shows that it has its calibration's weights.

All of a model's weights take as long to read again as to load. A merged adapter, training or another layer changes nearly
every element, so a few of each parameter tell; a cast to another dtype rounds them in a known way.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from wina_calib.checkpoint.settings import SAMPLES
from wina_calib.model.architecture import Architecture, Layer
from wina_calib.storage import Shards

# By what dtypes weights may have gone, one after the other, since they were calibrated.
CASTS = (torch.float32, torch.bfloat16, torch.float16)


def places(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which elements (SAMPLES,) of a weight (rows, columns): rows in ascending order, columns all over."""
    number = torch.arange(SAMPLES)
    return number * rows // SAMPLES, (number * 40_503 + 7_919) % columns


def sample(weight: Tensor) -> Tensor:
    """The elements (SAMPLES,) of a weight (out, in) or a vector (out,), float32 on its device."""
    matrix = weight.detach().reshape(weight.shape[0] if weight.ndim else 1, -1)
    rows, columns = (index.to(weight.device) for index in places(*matrix.shape))
    return matrix[rows, columns].float()


def others_name(layer: Layer) -> str:
    """Name of the tensor with elements of a layer's parameters that are no site's weights, in the order of `Layer.small`."""
    return f"{layer.prefix}wina.others.sample"


def stored_samples(shards: Shards, arch: Architecture) -> dict[str, Tensor]:
    """The tensors `sample` of all sites (projections, SAMPLES) and layers (other parameters, SAMPLES), of weights on disk."""
    samples = {}
    for layer, site in arch.sites:
        of_site = [_stored(shards, f"{layer.prefix}{p.module}.weight") for p in site.projections]
        samples[f"{layer.prefix}wina.{site.name}.sample"] = torch.stack(of_site)
    for layer in arch.layers:
        samples[others_name(layer)] = torch.stack([_stored(shards, f"{layer.prefix}{name}") for name in layer.small])
    return samples


def _stored(shards: Shards, name: str) -> Tensor:
    shape = shards[name].shape
    if len(shape) != 2:
        return sample(shards.load(name))
    rows, columns = places(*shape)
    wanted, position = rows.unique(return_inverse=True)
    return shards.load(name, rows=wanted)[position, columns].float()


def matches(stored: Tensor, weight: Tensor) -> bool:
    """Whether a weight has the elements `stored` (SAMPLES,), up to the rounding of casts to other dtypes."""
    own, dtype = sample(weight).cpu(), weight.dtype
    stored = stored.cpu()
    return any(
        torch.equal(stored.to(first).to(second).to(dtype).float(), own) for first, second in product(CASTS, CASTS)
    )
