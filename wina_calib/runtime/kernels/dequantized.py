"""Products of many rows: the weight is dequantized, some outputs at a time, for the library's product."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wina_calib.quantization.formats import Quantized, WeightFormat
from wina_calib.runtime.kernels import codes_card, nvrtc
from wina_calib.runtime.kernels.codes_card import places

# Bytes at a time; outputs, of which a tile begins at a multiple; threads of a block, bytes of each.
TILE_BYTES, TILE_OUTPUTS = 256 << 20, 128
TILE_THREADS, TILE_PART = 256, 8


def product(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """The product (rows, out) of x (rows, in) on the current device."""
    out, width = weight.out_features, weight.width
    step = max(TILE_OUTPUTS, TILE_BYTES // (width * x.dtype.itemsize) // TILE_OUTPUTS * TILE_OUTPUTS)
    room = torch.empty(width * min(step, out), dtype=x.dtype, device=x.device)
    if out <= step:
        whole = dequantized(weight, 0, out, room)
        return torch.mm(x, whole) if bias is None else torch.addmm(bias, x, whole)
    y = torch.empty(x.shape[0], out, dtype=x.dtype, device=x.device)
    for start in range(0, out, step):
        stop = min(start + step, out)
        tile, result = dequantized(weight, start, stop, room), y[:, start:stop]
        if bias is None:
            torch.mm(x, tile, out=result)
        else:
            torch.addmm(bias[start:stop], x, tile, out=result)
    return y


def dequantized(weight: Quantized, start: int, stop: int, room: Tensor) -> Tensor:
    """Weights (in, stop - start) of some outputs: products in float32, rounded to the dtype of `room` once.

    Args:
        weight: quantized, which `quantized_cuda` serves.
        start: the first output, a multiple of `TILE_OUTPUTS`.
        stop: the output after the last, a multiple of the group size.
        room: (numbers,) on the current device, contiguous, of which the result is made.
    """
    made = room[: weight.width * (stop - start)].view(weight.width, stop - start)
    known = weight.format, weight.width, weight.out_features
    _dequantize(room.device.index, room.dtype, *known, start, stop)(*places(weight), made.data_ptr())
    return made


class ManyRows:
    """`product` with one weight on the current device. It remembers its kernel: of a prompt, starting kernels is most."""

    def __init__(self, weight: Quantized, bias: Tensor | None) -> None:
        self.weight, self.bias, self.places = weight, bias, places(weight)
        self.shape = weight.width, weight.out_features
        self.ready: dict[torch.dtype, nvrtc.Launch] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """The product (rows, out) of x (rows, in)."""
        width, out = self.shape
        if width * out * x.dtype.itemsize > TILE_BYTES:
            return product(x, self.weight, self.bias)
        run = self.ready.get(x.dtype)
        if run is None:
            run = _dequantize(x.device.index, x.dtype, self.weight.format, width, out, 0, out)
            self.ready[x.dtype] = run
        whole = torch.empty(self.shape, dtype=x.dtype, device=x.device)
        run(*self.places, whole.data_ptr())
        return torch.mm(x, whole) if self.bias is None else torch.addmm(self.bias, x, whole)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has other tensors, and is replaced by who made it."""
        return self.__dict__ | {"ready": {}, "places": ()}


@cache
def _dequantize(
    index: int, dtype: torch.dtype, form: WeightFormat, width: int, out: int, start: int, stop: int
) -> nvrtc.Launch:
    parts = (stop - start) * form.bits // (8 * TILE_PART)
    grid = (-(-parts // TILE_THREADS), width, 1)
    function = _dequantizer(index, dtype, form)
    return nvrtc.Launch(function, grid, TILE_THREADS, 0, 4, (out, start, stop), overlap=codes_card.overlaps(index))


@cache
def _dequantizer(index: int, dtype: torch.dtype, form: WeightFormat) -> ctypes.c_void_p:
    return nvrtc.load(codes_card.build(index, dtype, form, {"ROWS": 1, "WARPS": 1, "TILE": 1}), "dequantize")
