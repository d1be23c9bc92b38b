"""What a calibration will take: memory, passes over the tokens, disk. Computed before the work from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wina_calib.families import Architecture
from wina_calib.source import Source
from wina_calib.transforms import Plan, Statistics, needed_sites

BASE_BYTES = 600 << 20
CLOSED_LOOP_PASSES = 1.6  # of a plain forward pass, for one anchor
_LOGIT_ROWS = 1024  # 256 rows of logits, their probabilities and gradients


@dataclass(frozen=True)
class Estimate:
    """Predicted cost.

    Attributes:
        memory_bytes: peak resident memory.
        hidden_bytes: hidden states, in memory or on disk.
        disk_bytes: size of the checkpoint.
        tokens: calibration tokens.
        passes: forward passes over these tokens.
        flops: floating-point operations of all passes.
        notes: what the user should know, such as fewer blocks than asked.
    """

    memory_bytes: int
    hidden_bytes: int
    disk_bytes: int
    tokens: int
    passes: float
    flops: float
    notes: tuple[str, ...] = ()


def layer_elements(arch: Architecture) -> int:
    """Elements of the largest decoder layer's sites."""
    return max(sum(site.weights for site in layer.sites) for layer in arch.layers)


def hidden_bytes(arch: Architecture, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one hidden state of all tokens."""
    return tokens * arch.hidden_size * dtype.itemsize


def estimate(
    source: Source,
    *,
    tokens: int,
    requested: int,
    seq_len: int,
    micro_batch: int,
    passes: float,
    states: int,
    in_memory: bool,
    transform: Plan,
    dtype: torch.dtype,
) -> Estimate:
    """Predict the cost of a calibration.

    Args:
        source: the model.
        tokens: calibration tokens.
        requested: blocks asked for.
        seq_len: tokens a block.
        micro_batch: blocks computed together.
        passes: forward passes over these tokens that all the work is worth.
        states: hidden states of all tokens that the fit holds at a time.
        in_memory: whether in memory rather than in files.
        transform: the transform to fit.
        dtype: compute dtype.
    """
    arch = source.architecture
    statistics = 0
    if needed_sites(transform.name, arch):
        statistics = Statistics(arch, transform.name, tokens=tokens).nbytes()
    layer = layer_elements(arch) * max(dtype.itemsize, source.dtype.itemsize)
    head = arch.vocab_size * arch.hidden_size * dtype.itemsize
    width = max(arch.hidden_size, *(s.width for _, s in arch.sites))
    hidden = states * hidden_bytes(arch, tokens, dtype)
    working = micro_batch * seq_len * 4 * width * 4 + _LOGIT_ROWS * arch.vocab_size * 4
    weights = sum(site.weights for _, site in arch.sites)
    blocks = tokens // seq_len
    notes = (f"{requested} blocks asked, the text gives {blocks}; all are used",) if blocks < requested else ()
    return Estimate(
        memory_bytes=BASE_BYTES + max(2 * layer, head) + (hidden if in_memory else 0) + working + statistics,
        hidden_bytes=hidden,
        disk_bytes=sum(info.nbytes for info in source.shards.values()),
        tokens=tokens,
        passes=passes,
        flops=2.0 * weights * tokens * passes,
        notes=notes,
    )


def human_bytes(count: float) -> str:
    """`1234567` -> `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
