"""CUDA: the product in CUDA (`cluster`) where the card has it, else in Triton; masks and attention in Triton.

Nothing here waits for the device or depends on data, so all may be captured in a CUDA graph. Which launch shape is
best depends on the weight's shape and the card; a short list is measured once, outside of any capture, and `autotune`
remembers the best on disk.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from wina_calib.masks import mask as definition
from wina_calib.runtime.kernels import autotune, cluster, reference
from wina_calib.runtime.kernels.autotune import AnyShape, Config
from wina_calib.runtime.patches.triton_launch import ALIGNMENT, start_again, start_kernel

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Each row has a mask of its own, so at half sparsity two rows read 75 % of the columns and four 94 %: dense products win.
MAX_CHOSEN_ROWS = 1
SLICES_AT_ONCE = 32  # that the sum of partial results adds
MASK_BLOCK = 1024
ATTENTION_BLOCK = 128
HAS_TRITON = importlib.util.find_spec("triton") is not None

_unusable: set[int] = set()


def available() -> bool:
    """Whether Triton can be imported."""
    return HAS_TRITON


@cache
def _device_code() -> Any:
    from wina_calib.runtime.kernels import triton_kernels

    return triton_kernels


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
    """The site product on a contiguous (in, out) weight; arguments as for `dispatch.sparse_site`, of one row."""
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return sparse_site(x, weight_t, norm, threshold, dense_rows, bias)
    shape = _shape_for(x, weight_t)
    if shape is not None:
        return cluster.launch(shape, x, weight_t, norm, threshold, dense_rows, bias)
    config = config_for(x, weight_t) if x.device.index not in _unusable else None
    if config is None:
        return reference.sparse_site(x, weight_t, norm, threshold, dense_rows, bias)
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
    """Enqueue the product of one row with a given launch shape on the current device and stream."""
    code = _device_code()
    width, out = weight_t.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    if overlap is None:
        overlap = _overlaps_launches(x.device.index)
    options = {"launch_pdl": True} if overlap else {}
    slices = -(-width // config.slice)
    grid = (-(-out // config.block_n), slices, 1)
    y = torch.empty(1, out, dtype=x.dtype, device=x.device)
    partial = torch.empty(slices, out, dtype=torch.float32, device=x.device)
    index = torch.empty(grid[0] * slices * config.slice, dtype=torch.int32, device=x.device)
    arguments = (x, norm, threshold, threshold if dense_rows is None else dense_rows, weight_t, partial, index)
    shape = {"SLICE": config.slice, "BLOCK_K": config.block_k, "BLOCK_N": config.block_n, "PDL": overlap}
    shape |= {"HAS_DENSE": dense_rows is not None, "num_warps": config.warps}
    even = {"EVEN_K": width % config.slice == 0, "EVEN_N": out % config.block_n == 0}
    start_kernel(code.gather_row, grid, (*arguments, width, out), **even, **shape, **options)
    # Small blocks spread a short sum over the whole card; a long one prefers fewer programs.
    block, warps = (32, 1) if out < autotune.WIDE_OUTPUTS else (128, 4)
    start_kernel(
        code.combine,
        (-(-out // block), 1, 1),
        (partial, y if bias is None else bias, y, out, out),
        SLICES=slices,
        SLICES_AT_ONCE=SLICES_AT_ONCE,
        BLOCK=block,
        HAS_BIAS=bias is not None,
        PDL=overlap,
        num_warps=warps,
        **options,
    )
    return y


def mask_inputs(x: Tensor, norm: Tensor, threshold: Tensor, dense_rows: Tensor | None = None) -> Tensor:
    """`mask.mask_inputs` for x (rows, in) in one launch and one pass, for the many rows of a prompt."""
    if x.device.index in _unusable or x.numel() == 0 or x.device.index != torch.cuda.current_device():
        return definition.mask_inputs(x, norm, threshold, dense_rows=dense_rows)
    return MaskInputs(norm, threshold)(x, dense_rows)


def mask_of(norm: Tensor, threshold: Tensor, dtype: torch.dtype) -> MaskInputs | None:
    """The mask kernel for inputs of this dtype, or None where there is none."""
    if norm.device.type != "cuda" or dtype not in DTYPES or not available() or norm.device.index in _unusable:
        return None
    return MaskInputs(norm, threshold)


class MaskInputs:
    """`mask_inputs` for one norm and threshold, on the current device and stream.

    It remembers its kernel: of a prompt, starting kernels is most.
    """

    def __init__(self, norm: Tensor, threshold: Tensor) -> None:
        self.norm, self.threshold, self.width = norm, threshold, norm.shape[0]
        self.ready: dict[tuple[torch.dtype, bool], tuple[Any, tuple[object, ...]]] = {}

    def __call__(self, x: Tensor, dense_rows: Tensor | None = None) -> Tensor:
        """`x` (..., in) with its dropped inputs at zero; `dense_rows` has an element a row."""
        x = x.contiguous()
        y = torch.empty_like(x)
        width, has = self.width, dense_rows is not None
        rows = self.threshold if dense_rows is None else dense_rows.contiguous()
        grid = (x.numel() // width, -(-width // MASK_BLOCK), 1)
        given = (x, self.norm, self.threshold, rows, y, width)
        ready = self.ready.get((x.dtype, has))
        if ready is not None and x.data_ptr() % ALIGNMENT == 0:
            start_again(ready, grid, given)
            return y
        ready = start_kernel(_device_code().mask_inputs, grid, given, BLOCK=MASK_BLOCK, HAS_DENSE=has, num_warps=4)
        if ready[1]:
            self.ready[x.dtype, has] = ready
        return y

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"ready": {}}


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query a sequence on a cache as it lies.

    Args:
        query: (batch, heads, 1, size), 16 bits, size a power of two.
        key: (batch, key heads, length, size), its heads a divisor of the query's.
        value: as key.
        mask: (batch, 1, 1, length) bool, the keys that are seen, at least one; None for all.
        scale: factor of the scores.

    Returns:
        (batch, 1, heads, size).
    """
    if query.device.index in _unusable:
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        return attended.transpose(1, 2).contiguous()
    if query.device.type == "cuda" and query.device.index != torch.cuda.current_device():
        with torch.cuda.device(query.device):
            return attend(query, key, value, mask, scale)
    batch, heads, _, size = query.shape
    groups, length = key.shape[1:3]
    y = torch.empty(batch, 1, heads, size, dtype=query.dtype, device=query.device)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    seen = query if mask is None else mask.contiguous()
    group = heads // groups
    _device_code().attend[(groups, batch)](
        query,
        key,
        value,
        seen,
        y,
        length,
        groups,
        scale,
        GROUP=group,
        PADDED=max(16, 1 << (group - 1).bit_length()),
        SIZE=size,
        BLOCK=ATTENTION_BLOCK if size <= 128 else ATTENTION_BLOCK // 2,
        HAS_MASK=mask is not None,
        num_warps=8,
    )
    return y


@cache
def _key(index: int, width: int, out: int, dtype: torch.dtype) -> str:
    import triton

    return autotune.key_of(index, f"triton {triton.__version__}", width, out, dtype)


def config_for(x: Tensor, weight_t: Tensor) -> Config | None:
    """The launch shape of Triton's kernels for these operands.

    None where no candidate runs, for want of a compiler, say; said once.
    """
    width, out = weight_t.shape
    shapes = autotune.candidates(width, out, x.element_size())
    key = _key(x.device.index, width, out, x.dtype)
    best = autotune.chosen(key, shapes, lambda: _fastest(weight_t, shapes, launch))
    if best is None:
        _unusable.add(x.device.index)
        logger.warning("Triton cannot compile for %s: masked dense products are used instead", x.device)
    return best


def _shape_for(x: Tensor, weight_t: Tensor) -> cluster.Shape | None:
    """The launch shape of the product in CUDA; None where it cannot be used."""
    if not cluster.serves(x, weight_t):
        return None
    width, out = weight_t.shape
    shapes = cluster.candidates(width, out, x.element_size())

    def measure() -> cluster.Shape | None:
        cluster.prepare(shapes, x.device.index, x.dtype, width)
        return _fastest(weight_t, shapes, cluster.launch)

    return autotune.chosen(cluster.key_of(x.device.index, width, out, x.dtype), shapes, measure)


def _fastest(weight_t: Tensor, shapes: Sequence[AnyShape], start: Callable[..., Tensor]) -> AnyShape | None:
    """Time each candidate with normal inputs of which 58 % are dropped, on copies of the weight that no cache holds all."""
    device = weight_t.device
    width = weight_t.shape[0]
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(1, width, generator=generator, device=device).to(weight_t.dtype)
    norm = torch.ones(width, device=device)
    threshold = torch.full((), 0.8, device=device)
    copies = [weight_t, *(weight_t.clone() for _ in range(autotune.copies_of(weight_t.nbytes)))]

    def run(shape: AnyShape) -> float:
        return autotune.time_on_card([partial(start, shape, x, w, norm, threshold) for w in copies], device)

    return autotune.fastest(shapes, run)
