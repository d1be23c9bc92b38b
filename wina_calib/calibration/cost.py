"""What a calibration will take: memory, passes over the tokens, disk. Computed before the work from shapes alone."""

from __future__ import annotations

import torch

from wina_calib.calibration.layer_stream import head_rows, logit_rows
from wina_calib.common.progress import Estimate
from wina_calib.model.architecture import Architecture
from wina_calib.model.source import Source
from wina_calib.transforms import Plan, Statistics, needed_sites

LOADED_LATER = 64 << 20  # code that is loaded, and small things that are kept, once the work runs
CLOSED_LOOP_PASSES = 1.6  # of a plain forward pass, for one anchor
_LOGITS = 10  # the logits of a part, and all that is computed of them and kept at a time
# Floats a token of a layer's forward pass, and of forward and backward with what is felt at each site: as multiples of the
# residual stream's width and the widest site's.
_FORWARD = 4, 4
_BACKWARD = 26, 16


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
    transform_tokens: int,
    dtype: torch.dtype,
    resident: int,
    backward_tokens: int = 0,
    backward_states: int = 0,
    felt_bytes: int = 0,
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
        transform_tokens: tokens that it is fitted on.
        dtype: compute dtype.
        resident: bytes that the process takes before the work.
        backward_tokens: tokens that go backward together to choose the budget; 0 where none do.
        backward_states: bytes of the hidden states and gradients in memory meanwhile.
        felt_bytes: bytes of all of these, wherever they are.
    """
    arch = source.architecture
    sample = statistics = 0
    if needed_sites(transform.name, arch):
        planned = Statistics(arch, transform.name, tokens=transform_tokens)
        sample, statistics = planned.sample_bytes(), planned.nbytes()
    # While a layer runs, the next is read as it is on disk; while it is loaded, it is there in both dtypes.
    stored, computed = (arch.layer_weights * each.itemsize for each in (source.dtype, dtype))
    running = computed + stored
    loading = running + (stored if dtype != source.dtype else 0)
    part = head_rows(arch, dtype)
    head = part * arch.hidden_size * dtype.itemsize
    hidden = states * hidden_bytes(arch, tokens, dtype)

    def working(rows: int, floats: tuple[int, int]) -> int:
        return 4 * rows * (floats[0] * arch.hidden_size + floats[1] * arch.width)

    phases = {
        "load": loading + hidden * in_memory,
        "forward": running + working(micro_batch * seq_len, _FORWARD) + max(hidden * in_memory, sample),
        "transform": 2 * stored + statistics,
        "backward": running + working(backward_tokens, _BACKWARD) + backward_states,
        "logits": head + 4 * _LOGITS * logit_rows(arch, dtype) * part + max(hidden * in_memory, backward_states),
    }
    weights = sum(site.weights for _, site in arch.sites)
    blocks = tokens // seq_len
    notes = (f"{requested} blocks asked, the text gives {blocks}; all are used",) if blocks < requested else ()
    return Estimate(
        memory_bytes=resident + LOADED_LATER + max(phases.values()),
        hidden_bytes=hidden,
        disk_bytes=sum(info.nbytes for info in source.shards.values()) + 2 * max(hidden, felt_bytes),
        tokens=tokens,
        passes=passes,
        flops=2.0 * weights * tokens * passes,
        notes=notes,
    )
