"""Attention of one new token on CUDA with all that a layer does between two products (`attend.cu`).

Heads are normed where the model does so, turned by rotary embedding and put into the cache, and attend to what the cache holds
before them: one kernel, whose time depends on the places that are filled and not on the cache's size. For cards whose blocks
form clusters, Hopper and later. Nothing here waits for the device, so it may be captured in a CUDA graph.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from wina_calib.runtime.kernels import nvrtc
from wina_calib.runtime.kernels.cluster import CAPABILITY, TYPES, VECTOR_BYTES, WARP

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "sources" / "attend.cu"
DTYPES = (torch.bfloat16, torch.float16)
SIZES = (32, 64, 128, 256)
# Query heads of a key head, and their numbers, which a block holds in shared memory.
MAX_GROUP, MAX_WIDTH = 8, 1024
WARPS = 8
# Blocks of a cluster, so that about as many blocks as processors read the cache.
CLUSTERS = ((16, 8), (32, 4), (64, 2))
MANY_HEADS_CLUSTER = 1


_constant: Callable[[Callable[[int], bool]], Callable[[int], bool]] = torch.compiler.assume_constant_result


@_constant
def available(index: int) -> bool:
    """Whether the card of this number runs the code. The first question compiles, in half a second."""
    return _available(index)


@cache
def _available(index: int) -> bool:
    if os.environ.get("WINA_CALIB_NATIVE") == "0" or torch.cuda.get_device_capability(index) < CAPABILITY:
        return False
    try:
        with torch.cuda.device(index):
            _launch(index, torch.bfloat16, 64, 4, 8, 256, normed=False, masked=True, epsilon=0.0, scale=1.0)
    except (OSError, RuntimeError) as error:
        logger.info("no attention in CUDA on this card, Triton's is used: %s", error)
        return False
    return True


def serves(dtype: torch.dtype, size: int, heads: int, key_heads: int) -> bool:
    """Whether the code computes heads of this size and number."""
    group = heads // key_heads
    fits = heads % key_heads == 0 and group <= MAX_GROUP and group * size <= MAX_WIDTH
    return dtype in DTYPES and size in SIZES and fits


def attend(
    heads: Tensor,
    cosine: Tensor,
    sine: Tensor,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    mask: Tensor | None,
    epsilon: float,
    scale: float,
) -> Tensor:
    """Put a token into the cache and attend to what is there. All of one 16-bit dtype, contiguous, at 16 bytes.

    Args:
        heads: query heads, key heads and value heads side by side, of `size` numbers each.
        cosine: (..., size) of the rotary embedding at the token's place.
        sine: as cosine.
        query_gain: (size,) of the norm of a query's head; None where there is none.
        key_gain: likewise of a key's.
        keys: (1, key heads, length, size), written at `position`.
        values: as keys.
        position: () int64, the token's place.
        mask: (..., length) bool, which of the places before it are seen; None for all.
        epsilon: of the norms.
        scale: factor of the scores.

    Returns:
        (1, 1, heads * size).
    """
    if heads.device.index != torch.cuda.current_device():
        with torch.cuda.device(heads.device):
            return attend(heads, cosine, sine, query_gain, key_gain, keys, values, position, mask, epsilon, scale)
    _, key_heads, length, size = keys.shape
    count = heads.numel() // size - 2 * key_heads
    y = torch.empty(1, 1, count * size, dtype=heads.dtype, device=heads.device)
    kernel = heads.device.index, heads.dtype, size, count // key_heads, key_heads, length
    given = heads, cosine, sine, query_gain, key_gain, keys, values, position, mask, y
    run = _launch(*kernel, normed=query_gain is not None, masked=mask is not None, epsilon=epsilon, scale=scale)
    run(*(0 if t is None else t.data_ptr() for t in given))
    return y


@cache
def _launch(
    index: int,
    dtype: torch.dtype,
    size: int,
    group: int,
    key_heads: int,
    length: int,
    *,
    normed: bool,
    masked: bool,
    epsilon: float,
    scale: float,
) -> nvrtc.Launch:
    cluster = next((blocks for most, blocks in CLUSTERS if key_heads <= most), MANY_HEADS_CLUSTER)
    major, minor = torch.cuda.get_device_capability(index)
    code = nvrtc.build(
        SOURCE, f"sm_{major}{minor}", constants(dtype, size, group, cluster, normed=normed, masked=masked)
    )
    bits = struct.unpack("ii", struct.pack("ff", epsilon, scale))
    grid = (cluster, key_heads, 1)
    return nvrtc.Launch(nvrtc.load(code, "attend"), grid, WARPS * WARP, 0, 10, (length, *bits))


def constants(dtype: torch.dtype, size: int, group: int, cluster: int, *, normed: bool, masked: bool) -> dict[str, int]:
    """What the code is compiled with."""
    shape = {"SIZE": size, "GROUP": group, "CLUSTER": cluster, "WARPS": WARPS, "UNROLL": 4 if group <= 4 else 2}
    return shape | {"TYPE": TYPES[dtype], "NORMS": int(normed), "MASKED": int(masked)}


def reads(*given: Tensor | None) -> bool:
    """Whether tensors, the first nine that `attend` takes, lie as the code reads them: all but place and mask by 16 bytes."""
    *vectors, position, mask = given
    if any(t is not None and (not t.is_contiguous() or t.data_ptr() % VECTOR_BYTES) for t in vectors):
        return False
    return position is not None and position.dtype == torch.int64 and (mask is None or mask.is_contiguous())
