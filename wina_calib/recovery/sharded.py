"""Weights that are spread over the processes of a training (FSDP of torch): each holds a part of every decoder layer's.

A layer's weights are whole while it computes. What is kept between steps, optimizer and all, are the parts, plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def spread(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Leave each process its part of the layers' weights; gradients come out as the average over processes, in parts too."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def part(weight: Tensor) -> Tensor:
    """This process's part of a weight, sharing its memory; a weight that is not spread, itself."""
    return weight.to_local().detach() if isinstance(weight, DTensor) else weight


def whole(weight: Tensor) -> Tensor:
    """A weight as a whole. Where it is spread, every process calls this."""
    return weight.full_tensor().detach() if isinstance(weight, DTensor) else weight.detach()


def whole_of(own: Tensor, weight: Tensor) -> Tensor:
    """The whole of which `own` is this process's part, cut as the weight is; every process calls this."""
    if not isinstance(weight, DTensor) or not own.ndim:
        return own
    mesh, places = weight.device_mesh, weight.placements
    made = DTensor.from_local(own, mesh, places, run_check=False, shape=weight.shape, stride=weight.stride())
    return made.full_tensor()


def part_of(value: Tensor, weight: Tensor) -> Tensor:
    """This process's part of a whole that all have, cut as the weight is."""
    if not isinstance(weight, DTensor) or not value.ndim:
        return value
    cut = distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
    return cut.to_local()
