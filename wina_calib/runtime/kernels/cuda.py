"""CUDA kernels: the host side of `_triton`, its launch shapes and their tuning.

Nothing here waits for the device or depends on data, so the product may be captured in a CUDA graph. Which launch
shape is best depends on the weight's shape and the card; `config_for` measures a short list once, outside of any
capture, and `autotune` remembers it on disk.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wina_calib.runtime.kernels import autotune
from wina_calib.runtime.kernels.autotune import Config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# With more rows than this hardly a column is dropped by all of them, and the dense product wins.
MAX_SPARSE_ROWS = 8
COMBINE_BLOCK = 128
COMBINE_STEP = 16


@cache
def available() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def _device_code() -> Any:
    from wina_calib.runtime.kernels import _triton

    return _triton


@cache
def _overlaps_launches(index: int) -> bool:
    """Whether kernels may start while the one before drains (programmatic dependent launch: Hopper and later)."""
    return torch.version.hip is None and _device_code().HAS_PDL and torch.cuda.get_device_capability(index) >= (9, 0)


def sparse_site(
    x: Tensor,
    weight_t: Tensor,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The site product on a contiguous (in, out) weight; arguments as for `kernels.sparse_site`, at most 8 rows."""
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return sparse_site(x, weight_t, norm, threshold, dense_rows, bias)
    config = config_for(x, weight_t)
    return launch(config, x, weight_t, norm, threshold, dense_rows, bias)


def launch(
    config: Config,
    x: Tensor,
    weight_t: Tensor,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    overlap: bool | None = None,
) -> Tensor:
    """Enqueue the product with a given launch shape on the current device and stream."""
    code = _device_code()
    rows, width = x.shape
    out = weight_t.shape[1]
    if x.stride(1) != 1:
        x = x.contiguous()
    if overlap is None:
        overlap = _overlaps_launches(x.device.index)
    options = {"launch_pdl": True} if overlap else {}
    slices = -(-width // config.slice)
    grid = (-(-out // config.block_n), slices)
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    partial = torch.empty(slices, rows, out, dtype=torch.float32, device=x.device)
    index = torch.empty(grid[0] * slices * config.slice, dtype=torch.int32, device=x.device)
    arguments = (x, norm, threshold, threshold if dense_rows is None else dense_rows, weight_t, partial, index)
    shape = {"SLICE": config.slice, "BLOCK_K": config.block_k, "BLOCK_N": config.block_n, "PDL": overlap}
    shape |= {"HAS_DENSE": dense_rows is not None, "num_warps": config.warps}
    if rows == 1:
        even = {"EVEN_K": width % config.slice == 0, "EVEN_N": out % config.block_n == 0}
        code.gather_row[grid](*arguments, width, out, **even, **shape, **options)
    else:
        # Matrix units take 16 rows at a time; the rows past the real ones are zeros in registers, never in memory.
        code.gather_rows[grid](*arguments, width, out, x.stride(0), ROWS=rows, PADDED=16, **shape, **options)
    code.combine[(-(-rows * out // COMBINE_BLOCK),)](
        partial,
        y if bias is None else bias,
        y,
        out,
        rows * out,
        SLICES=slices,
        STEP=COMBINE_STEP,
        BLOCK=COMBINE_BLOCK,
        HAS_BIAS=bias is not None,
        PDL=overlap,
        num_warps=4,
        **options,
    )
    return y


def config_for(x: Tensor, weight_t: Tensor) -> Config:
    """The launch shape for these operands: remembered, else measured now, else (in a capture) a rule's."""
    rows, width = x.shape
    out = weight_t.shape[1]
    if rows > 1:
        return autotune.rows_config(x.element_size())
    key = autotune.key_of(torch.cuda.get_device_name(x.device), width, out, x.dtype)
    known = autotune.recall(key)
    if known is not None:
        return known
    default = autotune.default_config(width, out, x.element_size())
    if torch.cuda.is_current_stream_capturing() or os.environ.get("WINA_CALIB_AUTOTUNE") == "0":
        return default
    best = _fastest(weight_t, autotune.candidates(width, out, x.element_size()))
    autotune.remember(key, best)
    return best


def _fastest(weight_t: Tensor, candidates: list[Config]) -> Config:
    """Time each candidate on this weight with normal inputs of which 58 % are dropped, the cache cold."""
    device = weight_t.device
    width = weight_t.shape[0]
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(1, width, generator=generator, device=device).to(weight_t.dtype)
    norm = torch.ones(width, device=device)
    threshold = torch.full((), 0.8, device=device)
    cache_size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    flush = torch.empty(2 * cache_size, dtype=torch.uint8, device=device)

    def run(config: Config) -> float:
        events = []
        launch(config, x, weight_t, norm, threshold)
        for _ in range(autotune.REPEATS):
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()  # type: ignore[no-untyped-call]
            launch(config, x, weight_t, norm, threshold)
            end.record()  # type: ignore[no-untyped-call]
            events.append((start, end))
        torch.cuda.synchronize(device)
        times = sorted(start.elapsed_time(end) for start, end in events)  # type: ignore[no-untyped-call]
        return float(times[len(times) // 2])

    return autotune.fastest(candidates, run)
