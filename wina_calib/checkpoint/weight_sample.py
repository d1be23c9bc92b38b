"""A few elements of every parameter that is not quantized, by which a loaded model shows that it has its calibration's weights.

All of a model's weights take as long to read again as to load. A merged adapter, training or another layer changes nearly
every element, so a few of each parameter tell; a cast to another dtype rounds them in a known way.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from wina_calib.checkpoint.settings import SAMPLES, Settings
from wina_calib.model.architecture import Architecture, Layer
from wina_calib.storage import Shards

# By what dtypes weights may have gone, one after the other, since they were calibrated.
CASTS = (torch.float32, torch.bfloat16, torch.float16)


def places(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which elements (SAMPLES,) of a weight (rows, columns): rows in ascending order, columns all over."""
    number = torch.arange(SAMPLES)
    return number * rows // SAMPLES, (number * 40_503 + 7_919) % columns


def sample(weight: Tensor, out: int | None = None) -> Tensor:
    """The elements (SAMPLES,) of a weight (out, in) or a vector (out,), float32 on its device.

    `out` is the number of rows that it had when it was calibrated; of those that are gone since there are no elements.
    """
    matrix = weight.detach().reshape(weight.shape[0] if weight.ndim else 1, -1)
    rows, columns = places(out or len(matrix), matrix.shape[1])
    there = int((rows < len(matrix)).sum())
    rows, columns = (index[:there].to(weight.device) for index in (rows, columns))
    return matrix[rows, columns].float()


def others_name(layer: Layer) -> str:
    """Name of the tensor with elements of a layer's parameters that are no site's weights, in the order of `Layer.small`."""
    return f"{layer.prefix}wina.others.sample"


def ends_name(arch: Architecture) -> str:
    """Name of the tensor with elements of `known_ends`: in the first layer, as only names in a layer are known to be added."""
    return f"{arch.layers[0].prefix}wina.ends.sample"


def known_ends(arch: Architecture, settings: Settings) -> tuple[str, ...]:
    """Names of the parameters outside of the layers whose elements are stored: all that are not quantized."""
    quantized = f"{arch.embed if arch.tied else arch.lm_head}.weight"
    return tuple(name for name in arch.ends if settings.head_bits != 8 or name != quantized)


def stored_samples(shards: Shards, arch: Architecture, settings: Settings) -> dict[str, Tensor]:
    """The tensors `sample` of weights on disk, each (parameters, SAMPLES): of all sites, of layers, of what lies outside."""
    samples = {}
    for layer, site in arch.sites if settings.samples else ():
        of_site = [_stored(shards, f"{layer.prefix}{p.module}.weight") for p in site.projections]
        samples[f"{layer.prefix}wina.{site.name}.sample"] = torch.stack(of_site)
    for layer in arch.layers:
        samples[others_name(layer)] = torch.stack([_stored(shards, f"{layer.prefix}{name}") for name in layer.small])
    norm = f"{arch.final_norm.module}.weight"  # its shape is another on disk where there are run-time matrices
    ends = [sample(shards.load(n).flatten()) if n == norm else _stored(shards, n) for n in known_ends(arch, settings)]
    samples[ends_name(arch)] = torch.stack(ends)
    return samples


def _stored(shards: Shards, name: str) -> Tensor:
    shape = shards[name].shape
    if len(shape) != 2:
        return sample(shards.load(name))
    rows, columns = places(*shape)
    wanted, position = rows.unique(return_inverse=True)
    return shards.load(name, rows=wanted)[position, columns].float()


def matches(stored: Tensor, weight: Tensor, out: int | None = None) -> bool:
    """Whether a weight has the elements `stored` (SAMPLES,) of `out` rows, up to the rounding of casts to other dtypes."""
    own, dtype = sample(weight, out).cpu(), weight.dtype
    stored = stored.cpu()[: len(own)]
    return any(
        torch.equal(stored.to(first).to(second).to(dtype).float(), own) for first, second in product(CASTS, CASTS)
    )
