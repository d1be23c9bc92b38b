"""Products with a matrix quantized by rows, as lm_head's (`rows` of `quantized.cu`)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from wina_calib.quantization.formats import QuantizedRows, WeightFormat
from wina_calib.runtime.kernels import codes_card, nvrtc
from wina_calib.runtime.kernels.codes_card import FACTORS, TYPES, VECTOR_BYTES, WARP, sides

# Rows up to which a product is made from codes.
MAX_ROWS = 16
# Warps and steps of 64 codes in flight, blocks of a processor, inputs in shared memory.
WARPS, STEPS, BLOCKS, INPUT_BYTES = 8, 8, 1, 96 << 10
UNIT, TILE = 64, 16


def serves(x: Tensor, weight: QuantizedRows) -> bool:
    """Whether the code can read these: up to `MAX_ROWS` rows, of a width that is a multiple of 64."""
    codes = weight.codes
    if x.device.type != "cuda" or x.device != codes.device or x.dtype not in TYPES:
        return False
    rows, width = x.shape[:-1].numel(), codes.shape[1]
    plain = codes.is_contiguous() and weight.scales.is_contiguous() and codes.data_ptr() % VECTOR_BYTES == 0
    return 0 < rows <= MAX_ROWS and plain and width % UNIT == 0 and 2 * sides(x.dtype) * width <= INPUT_BYTES


def product(x: Tensor, weight: QuantizedRows) -> Tensor:
    """The product (..., vocab) of x (..., hidden) with a matrix quantized by rows, which `serves`."""
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return product(x, weight)
    out, width = weight.codes.shape
    rows = x.reshape(-1, width).contiguous()
    y = torch.empty(rows.shape[0], out, dtype=x.dtype, device=x.device)
    step = min(FACTORS // sides(x.dtype), INPUT_BYTES // (2 * sides(x.dtype) * width))
    for first in range(0, rows.shape[0], step):
        part = rows[first : first + step]
        given = (part, weight.codes, weight.scales, y[first : first + step])
        _rows(x.device.index, x.dtype, width, out, part.shape[0])(*(t.data_ptr() for t in given))
    return y.view(*x.shape[:-1], out)


@cache
def _rows(index: int, dtype: torch.dtype, width: int, out: int, rows: int) -> nvrtc.Launch:
    constants = {"ROWS": rows, "WARPS": WARPS, "STEPS": STEPS}
    function = nvrtc.load(codes_card.build(index, dtype, WeightFormat(8), constants), "rows")
    processors = torch.cuda.get_device_properties(index).multi_processor_count
    blocks = min(-(-out // (TILE * WARPS)), processors * BLOCKS)
    shared = 2 * rows * sides(dtype) * width + 4 * rows
    threads = WARPS * WARP
    return nvrtc.Launch(function, (blocks, 1, 1), threads, shared, 4, (width, out), overlap=codes_card.overlaps(index))
