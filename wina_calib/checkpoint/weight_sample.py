"""A few elements of every projection's weight, by which a loaded model shows that it has the weights of its calibration.

All of a model's weights take as long to read again as to load. A merged adapter, training or another layer changes nearly
every element, so a few of each projection tell; a cast to another dtype rounds them in a known way.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from wina_calib.checkpoint.settings import SAMPLES
from wina_calib.model.architecture import Architecture
from wina_calib.storage import Shards

# By what dtypes weights may have gone, one after the other, since they were calibrated.
CASTS = (torch.float32, torch.bfloat16, torch.float16)


def places(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which elements (SAMPLES,) of a weight (rows, columns): rows in ascending order, columns all over."""
    number = torch.arange(SAMPLES)
    return number * rows // SAMPLES, (number * 40_503 + 7_919) % columns


def sample(weight: Tensor) -> Tensor:
    """The elements (SAMPLES,) of a weight (out, in), float32 on its device."""
    rows, columns = (index.to(weight.device) for index in places(*weight.shape))
    return weight.detach()[rows, columns].float()


def stored_samples(shards: Shards, arch: Architecture) -> dict[str, Tensor]:
    """The tensors `wina.{site}.sample` (projections, SAMPLES) of all sites, of weights on disk."""
    found = {}
    for layer, site in arch.sites:
        of_site = [_stored(shards, f"{layer.prefix}{p.module}.weight") for p in site.projections]
        found[f"{layer.prefix}wina.{site.name}.sample"] = torch.stack(of_site)
    return found


def _stored(shards: Shards, name: str) -> Tensor:
    rows, columns = places(*shards[name].shape)
    wanted, position = rows.unique(return_inverse=True)
    return shards.load(name, rows=wanted)[position, columns].float()


def matches(stored: Tensor, weight: Tensor) -> bool:
    """Whether a weight (out, in) has the elements `stored` (SAMPLES,), up to the rounding of casts to other dtypes."""
    found, dtype = sample(weight).cpu(), weight.dtype
    stored = stored.cpu()
    return any(
        torch.equal(stored.to(first).to(second).to(dtype).float(), found) for first, second in product(CASTS, CASTS)
    )
