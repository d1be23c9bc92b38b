"""What each of several processes has of quantized weights, as vLLM splits a layer: by outputs, or by inputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from wina_calib.errors import RuntimeLoadError
from wina_calib.quantization.formats import Quantized, pack_zeros, unpack_zeros

Span = tuple[int, int]


def own_outputs(whole: Sequence[int], own: Sequence[int], rank: int, processes: int) -> list[Span]:
    """Outputs of one process, as spans of the parts that lie side by side.

    A part that has less shards than there are processes, as few key and value heads have, is the same in several of them.

    Args:
        whole: outputs of each part.
        own: how many of them a process has.
        rank: the process.
        processes: how many there are.
    """
    starts = [0, *accumulate(whole)]
    spans = []
    for start, size, share in zip(starts, whole, own, strict=False):
        first = start + rank * (size // share) // processes * share
        spans.append((first, first + share))
    return spans


def take_outputs(weight: Quantized, spans: Sequence[Span]) -> Quantized:
    """The weights of some outputs, side by side.

    Raises:
        RuntimeLoadError: they cut a group of outputs that have one scale.
    """
    size = weight.format.group_size if weight.format.bits == 4 else 1
    cut = next((edge for span in spans for edge in span if edge % size), None)
    if cut is not None:
        raise RuntimeLoadError(
            f"a process would begin or end at output {cut}, within a group of {size} that share a scale. Use fewer processes, "
            "or calibrate with --group-size 32 or 8 bits."
        )
    if list(spans) == [(0, weight.out_features)]:
        return weight
    parts = [weight.outputs(first, stop) for first, stop in spans]
    zeros = None
    if weight.zeros is not None:
        counts = [part.scales.shape[1] for part in parts]
        unpacked = [unpack_zeros(p.zeros, n) for p, n in zip(parts, counts, strict=True) if p.zeros is not None]
        zeros = pack_zeros(torch.cat(unpacked, dim=1))
    scales = torch.cat([part.scales for part in parts], dim=-1)
    return Quantized(weight.format, torch.cat([part.codes for part in parts], dim=1), scales, zeros)


def take_inputs(weight: Quantized, first: int, count: int) -> Quantized:
    """The weights of some inputs; scales of 8 bits belong to outputs and are all needed."""
    named = {
        name: tensor if name == "scales" and weight.format.bits == 8 else tensor.narrow(0, first, count)
        for name, tensor in weight.named().items()
    }
    return Quantized.of(weight.format, named)
