"""What the kernels on quantized weights share: facts of the card, and how their code is compiled."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wina_calib.quantization.formats import Quantized, WeightFormat
from wina_calib.runtime.kernels import nvrtc
from wina_calib.runtime.kernels.cluster import CAPABILITY as CLUSTERS

SOURCES = Path(__file__).parent / "sources"
SOURCE = SOURCES / "quantized.cu"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WARP = 32
# Bytes that a thread reads at once, of which columns of codes must be a multiple.
VECTOR_BYTES = 16
# Rows that a kernel takes at a time: columns of the second factor, of which float32 needs two a row.
FACTORS = 8


@cache
def overlaps(index: int) -> bool:
    """Whether blocks form clusters, and kernels may start while the one before drains."""
    return torch.cuda.get_device_capability(index) >= CLUSTERS


@cache
def room(index: int) -> int:
    """Bytes of shared memory that a block may have."""
    properties: Any = torch.cuda.get_device_properties(index)  # torch names only some of them in its types
    return int(properties.shared_memory_per_block_optin)


def sides(dtype: torch.dtype) -> int:
    """Numbers of float16 that stand for an input."""
    return 2 if dtype == torch.float32 else 1


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """Where tensors lie; 0 for none."""
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def places(weight: Quantized) -> tuple[int, ...]:
    """Where codes, scales and zeros lie."""
    return addresses(weight.codes, weight.scales, weight.zeros)


def build(
    index: int, dtype: torch.dtype, form: WeightFormat, constants: dict[str, int], source: Path = SOURCE
) -> bytes:
    """Machine code for a card, a dtype of inputs and a format."""
    major, minor = torch.cuda.get_device_capability(index)
    hopper = int(overlaps(index))
    kind = {"BITS": form.bits, "GROUP": form.group_size, "ZEROS": int(form.bits == 4 and form.zero_point)}
    kind |= {"TYPE": TYPES[dtype], "CLUSTERED": hopper, "OVERLAP": hopper}
    return nvrtc.build(source, f"sm_{major}{minor}", kind | constants)
