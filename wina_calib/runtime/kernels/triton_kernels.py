# Triton reads annotations as its own types, so device functions have none.
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# ruff: noqa: ANN001, ANN202
"""Device code: a gather product over the kept columns, then a fixed-order sum of its partial results.

The first kernel splits the inputs in slices. A program compacts the kept indices of one slice into a list of its own,
then reads only those rows of the column-contiguous weight, for one block of outputs. Programs of one or two warps win:
their barriers cost nothing, and the memory latency of one is hidden by the many others on the processor.
The second kernel adds the slices in a fixed order, so that results repeat bit for bit and no atomics are needed.

Imported only when Triton is there. The loops are `for` loops: in a `while` loop the compiler moves indices and inputs
through shared memory at every step, with barriers that halve the speed.
"""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    HAS_PDL = True
except ImportError:  # an older Triton: kernels start one after the other
    HAS_PDL = False

    @triton.jit
    def gdc_wait() -> None:
        """Wait for nothing."""
        pass

    @triton.jit
    def gdc_launch_dependents() -> None:
        """Start nothing."""
        pass


@triton.jit
def gather_row(
    X,
    NORM,
    THRESHOLD,
    DENSE,
    WEIGHT,
    PARTIAL,
    LIST,
    K,
    N,
    SLICE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One input row. X (K,), NORM (K,), WEIGHT (K, N) contiguous; PARTIAL (slices, N) float32; LIST scratch int32."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    first = part * SLICE
    inner = tl.arange(0, SLICE)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = tl.arange(0, BLOCK_K)
    if EVEN_K:
        norm = tl.load(NORM + first + inner, eviction_policy="evict_last")
    else:
        norm = tl.load(NORM + first + inner, mask=first + inner < K, other=0.0, eviction_policy="evict_last")
    if PDL:
        # Nothing that an earlier kernel of a forward pass may have written is touched before this.
        gdc_wait()
        gdc_launch_dependents()
    threshold = tl.load(THRESHOLD)
    if HAS_DENSE:
        threshold = tl.where(tl.load(DENSE) != 0, -1.0, threshold)
    if EVEN_K:
        x = tl.load(X + first + inner)
        keep = (tl.abs(x.to(tl.float32)) * norm <= threshold) == 0
    else:
        valid = first + inner < K
        x = tl.load(X + first + inner, mask=valid, other=0.0)
        keep = ((tl.abs(x.to(tl.float32)) * norm <= threshold) == 0) & valid
    ones = keep.to(tl.int32)
    count = tl.sum(ones, 0)
    own = LIST + (block * tl.num_programs(1) + part).to(tl.int64) * SLICE
    tl.store(own + tl.cumsum(ones, 0) - 1, inner, mask=keep)
    tl.debug_barrier()
    inputs = X + first
    weights = WEIGHT + first.to(tl.int64) * N
    total = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    k = tl.load(own + offsets, mask=offsets < count, other=0)
    for i in tl.range(0, count, BLOCK_K, num_stages=1):
        inside = i + offsets < count
        v = tl.load(inputs + k, mask=inside, other=0.0).to(tl.float32)
        mask = inside[:, None] if EVEN_N else inside[:, None] & (columns < N)[None, :]
        w = tl.load(
            weights + k[:, None].to(tl.int64) * N + columns[None, :],
            mask=mask,
            other=0.0,
            eviction_policy="evict_first",
        )
        # The next indices travel while the weights of this step do.
        later = i + BLOCK_K + offsets
        k = tl.load(own + later, mask=later < count, other=0)
        total += w.to(tl.float32) * v[:, None]
    tl.store(PARTIAL + part * N + columns, tl.sum(total, 0), mask=columns < N)


@triton.jit
def combine(
    PARTIAL,
    BIAS,
    Y,
    N,
    SIZE,
    SLICES: tl.constexpr,
    SLICES_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Y (SIZE,) = PARTIAL (SLICES, SIZE) summed over slices in order, plus BIAS (N,) repeated over rows."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    offsets = tl.arange(0, SLICES_AT_ONCE)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    y = tl.zeros([BLOCK], dtype=tl.float32)
    for s in tl.static_range(0, SLICES, SLICES_AT_ONCE):
        mask = (s + offsets < SLICES)[:, None] & inside[None, :]
        y += tl.sum(tl.load(PARTIAL + (s + offsets)[:, None] * SIZE + at[None, :], mask=mask, other=0.0), 0)
    if HAS_BIAS:
        y += tl.load(BIAS + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def mask_inputs(
    X,
    NORM,
    THRESHOLD,
    DENSE,
    Y,
    K,
    BLOCK: tl.constexpr,
    HAS_DENSE: tl.constexpr,
):
    """Y (rows, K) = X with its dropped inputs at zero, in one pass. NORM (K,), DENSE (rows,)."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < K
    threshold = tl.load(THRESHOLD)
    if HAS_DENSE:
        threshold = tl.where(tl.load(DENSE + row) != 0, -1.0, threshold)
    x = tl.load(X + row.to(tl.int64) * K + at, mask=inside, other=0.0)
    norm = tl.load(NORM + at, mask=inside, other=0.0, eviction_policy="evict_last")
    dropped = tl.abs(x.to(tl.float32)) * norm <= threshold
    tl.store(Y + row.to(tl.int64) * K + at, tl.where(dropped, 0.0, x).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def attend(
    Q,
    KEYS,
    VALUES,
    MASK,
    OUT,
    LENGTH,
    HEADS,
    SCALE,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """One query a sequence. Q, OUT (batch, HEADS * GROUP, SIZE); KEYS, VALUES (batch, HEADS, LENGTH, SIZE).

    MASK (batch, LENGTH) bool says which keys are seen. A program computes the GROUP query heads of one key head.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    group = tl.arange(0, PADDED)
    inner = tl.arange(0, SIZE)
    offsets = tl.arange(0, BLOCK)
    pair = sequence.to(tl.int64) * HEADS + head
    own = (pair * GROUP + group)[:, None] * SIZE + inner[None, :]
    q = tl.load(Q + own, mask=(group < GROUP)[:, None], other=0.0)
    highest = tl.full([PADDED], -1e30, tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    y = tl.zeros([PADDED, SIZE], tl.float32)
    for i in range(0, LENGTH, BLOCK):
        at = i + offsets
        seen = at < LENGTH
        places = (pair * LENGTH + at)[:, None] * SIZE + inner[None, :]
        k = tl.load(KEYS + places, mask=seen[:, None], other=0.0)
        v = tl.load(VALUES + places, mask=seen[:, None], other=0.0)
        if HAS_MASK:
            seen = seen & (tl.load(MASK + sequence.to(tl.int64) * LENGTH + at, mask=seen, other=0) != 0)
        score = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * SCALE, -1e30)
        above = tl.maximum(highest, tl.max(score, 1))
        weight = tl.where(seen[None, :], tl.exp(score - above[:, None]), 0.0)
        before = tl.exp(highest - above)
        total = total * before + tl.sum(weight, 1)
        y = y * before[:, None] + tl.dot(weight.to(v.dtype), v)
        highest = above
    tl.store(OUT + own, (y / total[:, None]).to(OUT.dtype.element_ty), mask=(group < GROUP)[:, None])
