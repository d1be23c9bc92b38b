"""What a calibration will take, from shapes alone: memory, disk, and the time of its phases beside each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wina_calib.calibration.choose_budget import GREEDY_TOKENS
from wina_calib.calibration.compute import Compute
from wina_calib.calibration.layer_stream import head_parts, head_rows, logit_rows
from wina_calib.calibration.loss_curves import CURVE_PASSES, curve_parts, usable_tokens
from wina_calib.calibration.options import CalibrateOptions
from wina_calib.common.progress import Estimate, Part
from wina_calib.model.architecture import Architecture
from wina_calib.model.source import Source
from wina_calib.transforms import Plan, Statistics, fit_work, needed_sites

LOADED_LATER = 64 << 20  # code that is loaded, and small things that are kept, once the work runs
# Of a plain pass through the layers: one anchor's closed loop, and one anchor in open loop.
CLOSED_LOOP_PASSES = 1.8
OPEN_LOOP_PASSES = 1.2
HELD_OUT_PASSES = 1.1  # held-out text at one anchor
GREEDY_PASSES = 95.0  # to a sparsity of 0.65; each takes a part of a layer
_COLLECTED = 1.3  # a plain pass that keeps a sample of inputs
_COMPARED = 1.5  # what logits that are compared take longer than a product
_COLUMNS = 5.0  # what a product of GPTQ takes longer than one of a plain pass
_LOGITS = 10  # the logits of a part, and all that is computed of them and kept at a time
# Floats a token of a layer's forward pass, and of forward and backward with what is felt at each site: as multiples of the
# residual stream's width and the widest site's.
_FORWARD = 4, 4
_BACKWARD = 26, 16
# Phases by name, as the job announces them.
DENSE, HEAD, STATISTICS, WRITE, GREEDY, FIT, MEASURE = (
    "run the dense model", "run the dense model: lm_head", "collect layer inputs", "write weights",
    "find where to drop: greedy search", "fit thresholds", "measure the sparse model",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What a calibration does, in numbers.

    Attributes:
        compute: where and how it computes.
        seq_len: tokens a block.
        requested: blocks asked for.
        tokens: calibration tokens.
        heldout: tokens that the dense and the sparse models are measured on.
        transform: tokens that the transform is fitted on; 0 where it looks at none.
        thresholds: tokens that thresholds are fitted on.
        curves: tokens that go backward to choose the budget; 0 where none do.
        greedy: tokens of the papers' search; 0 where there is none.
        anchors: sparsities at which thresholds are fitted.
        closed: whether they are fitted in closed loop.
        states: hidden states of all of these that the fit holds at a time.
        backward: blocks that go backward together.
        by_reference: whether no weights are written.
        steps: of the transform's descents; None for its own number.
        bits: of the weights where they are quantized, else 0.
        written: bytes of the checkpoint's weights; 0 where they stay in the base model.
        dense: bytes of the transformed weights that they are quantized from, which are gone in the end.
        resident: bytes that the process takes before the work.
    """

    compute: Compute
    seq_len: int
    requested: int
    tokens: int
    heldout: int
    transform: int
    thresholds: int
    curves: int
    greedy: int
    anchors: int
    closed: bool
    states: int
    backward: int
    by_reference: bool
    steps: int | None
    bits: int
    written: int
    dense: int
    resident: int


def hidden_bytes(arch: Architecture, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one hidden state of all tokens."""
    return tokens * arch.hidden_size * dtype.itemsize


def estimate(source: Source, transform: Plan, work: Workload) -> Estimate:
    """Predict the cost of a calibration."""
    arch, compute = source.architecture, work.compute
    parts = work_parts(arch, transform, work)
    passes = sum(part.cost for part in parts)
    weights = sum(site.weights for _, site in arch.sites)
    hidden = work.states * hidden_bytes(arch, work.thresholds, compute.dtype)
    held = (work.anchors + 1) * hidden_bytes(arch, work.heldout, compute.dtype)
    curve_state = hidden_bytes(arch, work.curves, compute.dtype)
    curve_states = (len(arch.layers) + 3) * curve_state
    blocks = work.tokens // work.seq_len
    notes = (
        (f"{work.requested} blocks asked, the text gives {blocks}; all are used",) if blocks < work.requested else ()
    )
    return Estimate(
        parts=parts,
        memory_bytes=work.resident
        + LOADED_LATER
        + _peak(source, transform, work, hidden, held, curve_state, curve_states),
        hidden_bytes=hidden,
        disk_bytes=work.written + work.dense + 2 * max(hidden + held, curve_states),
        kept_bytes=work.written,
        tokens=work.tokens,
        passes=passes / work.tokens,
        flops=2.0 * weights * passes,
        notes=notes,
    )


def work_parts(arch: Architecture, transform: Plan, work: Workload) -> tuple[Part, ...]:
    """The phases of a calibration, with the tokens of a plain pass through all layers that each takes as long as."""
    layers, dtype, heads = len(arch.layers), work.compute.dtype, head_parts(arch, work.compute.dtype)
    weights = sum(site.weights for _, site in arch.sites)
    head = arch.hidden_size * arch.vocab_size / weights  # lm_head of a token
    parts = [Part(DENSE, layers, work.heldout), Part(HEAD, heads, work.heldout * head)]
    if work.transform:
        parts.append(Part(STATISTICS, layers, _COLLECTED * work.transform))
    if not work.by_reference:
        parts += [
            Part(name, steps, flops / (2 * weights))
            for name, steps, flops in fit_work(transform.name, arch, work.steps)
        ]
        turned = 3 * arch.hidden_size if transform.residual else 0
        parts.append(Part(WRITE, layers, turned + 50.0))
    if work.curves:
        batches = -(-work.curves // (work.backward * work.seq_len))
        parts += curve_parts(arch, dtype, batches, work.curves, work.curves * head)
    if work.greedy:
        parts.append(Part(GREEDY, layers, GREEDY_PASSES * work.greedy))
    each = CLOSED_LOOP_PASSES if work.closed else OPEN_LOOP_PASSES
    fit = work.thresholds * (each * work.anchors + (not work.closed))
    if work.bits:
        # The quantized and the original model without masks, two sums of squares, the columns one after another.
        squares = sum(site.width**2 for _, site in arch.sites)
        columns = sum(site.weights * site.width for _, site in arch.sites)
        fit += work.heldout * HELD_OUT_PASSES + 2 * CLOSED_LOOP_PASSES * work.thresholds
        fit += (2 * work.thresholds * squares + _COLUMNS * columns) / weights
    parts.append(Part(FIT, layers, fit + work.heldout * (1 + HELD_OUT_PASSES * work.anchors)))
    parts.append(Part(MEASURE, heads, _COMPARED * work.heldout * head * (1 + work.anchors)))
    return tuple(parts)


def choice_passes(options: CalibrateOptions, tokens: int) -> float:
    """Passes over `tokens` calibration tokens that choosing the budget is worth, lm_head left out."""
    if options.budget == "uniform":
        return 0.0
    if options.budget == "greedy":
        return GREEDY_PASSES * min(1.0, GREEDY_TOKENS / tokens)
    return CURVE_PASSES * usable_tokens(tokens) / tokens


def _peak(
    source: Source, transform: Plan, work: Workload, hidden: int, held_out: int, curve_state: int, curve_states: int
) -> int:
    """Bytes of the phase that needs most."""
    arch, compute = source.architecture, work.compute
    dtype = compute.dtype
    sample = statistics = 0
    if needed_sites(transform.name, arch):
        planned = Statistics(arch, transform.name, tokens=work.transform)
        sample, statistics = planned.sample_bytes(), planned.nbytes()
    # While a layer runs, the next is read as it is on disk; while it is loaded, it is there in both dtypes.
    stored, computed = (arch.layer_weights * each.itemsize for each in (source.dtype, dtype))
    running = computed + stored
    loading = running + (stored if dtype != source.dtype else 0)
    part = head_rows(arch, dtype)
    head = part * arch.hidden_size * dtype.itemsize
    held = hidden if compute.keeps(work.states, hidden // work.states) else 0
    held += held_out if compute.keeps(work.anchors + 1, held_out // (work.anchors + 1)) else 0
    backward_states = curve_states if compute.keeps(len(arch.layers) + 1, curve_state) else 0
    backward_tokens = min(work.curves, work.backward * work.seq_len)

    # Two sums in 64 bits; the Hessian, damped, decomposed and as feedback; a group's weights, their errors, codes and what they
    # were moved to; the original layer.
    quantizing = max(4 * (9 * s.width**2 + 6 * s.weights) for _, s in arch.sites) + computed if work.bits else 0

    def working(rows: int, floats: tuple[int, int]) -> int:
        return 4 * rows * (floats[0] * arch.hidden_size + floats[1] * arch.width)

    return max(
        loading + held,
        running + working(compute.micro_batch * work.seq_len, _FORWARD) + max(held, sample),
        running + quantizing + held,
        2 * stored + statistics,
        running + working(backward_tokens, _BACKWARD) + backward_states,
        head + 4 * _LOGITS * logit_rows(arch, dtype) * part + max(held, backward_states),
    )
