"""What quantizing alone costs: the dense weights of a checkpoint in 3, 4 and 8 bits, beside its own figures."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch

from wina_calib.calibration.compute import Compute
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.likelihood import next_token_nll, perplexity
from wina_calib.calibration.masked_layer import MaskedLayer
from wina_calib.calibration.quantize_sites import Quantizer, check_format
from wina_calib.checkpoint.dequantized import weights_of
from wina_calib.checkpoint.local_paths import data_here
from wina_calib.checkpoint.reader import Checkpoint
from wina_calib.common.devices import default_micro_batch, pick_dtype
from wina_calib.common.progress import SILENT, Estimate, Part, Progress
from wina_calib.corpus.blocks import Blocks, load_blocks
from wina_calib.errors import UsageError
from wina_calib.model.source import Source
from wina_calib.quantization.bits import bits_read
from wina_calib.quantization.formats import WeightFormat

FORMATS = {
    "int8": WeightFormat(8),
    "int4": WeightFormat(4, 64),
    "int4-32": WeightFormat(4, 32),
    "int3": WeightFormat(3, 64),
    "int3-32": WeightFormat(3, 32),
}


@dataclass(frozen=True)
class QuantizedRow:
    """A checkpoint's dense model with quantized weights, lm_head left out: its perplexity, and bits read a decoder weight."""

    name: str
    bits_read: float
    ppl: float


def check_names(names: Sequence[str]) -> None:
    """Raise UsageError where a name is no format to compare with."""
    wrong = [name for name in names if name not in FORMATS]
    if wrong:
        raise UsageError(f"--against: {wrong[0]!r} is no format of weights here; known are {', '.join(FORMATS)}.")


def check_dense(opened: Checkpoint) -> None:
    """Raise UsageError where a checkpoint's weights are quantized already."""
    if opened.settings.weight_format is not None:
        raise UsageError(f"{opened.folder} holds quantized weights; --against needs a checkpoint without --bits.")


def quantized_rows(
    opened: Checkpoint,
    names: Sequence[str],
    held: Blocks,
    *,
    device: torch.device,
    dtype: str = "auto",
    progress: Progress = SILENT,
) -> tuple[QuantizedRow, ...]:
    """Quantize a checkpoint's dense weights on its calibration text, and measure each on other text.

    Raises:
        UsageError: a name is not known, or the weights are quantized already.
    """
    check_names(names)
    check_dense(opened)
    settings = opened.settings
    source = weights_of(opened, verified=True)  # `evaluate` has loaded them
    for name in names:
        check_format(source.architecture, FORMATS[name])
    facts = settings.provenance
    text = load_blocks(
        data_here(facts),
        source.tokenizer(),
        samples=int(facts.get("blocks", 1)),
        seq_len=settings.seq_len,
        seed=int(facts.get("seed", 0)),
        min_tokens=2,
    )
    batch = default_micro_batch(device, settings.seq_len, source.architecture.width)
    compute = Compute(device, pick_dtype(dtype, source.dtype, device), batch)
    rows, layers = [], len(source.architecture.layers)
    progress.planned(Estimate(tuple(Part(f"quantize to {name}", layers) for name in names)))
    for name in names:
        form = FORMATS[name]
        progress.phase(f"quantize to {name}", layers)
        ppl = _perplexity(source, opened, form, text, held, compute, progress)
        sites = [site for _, site in source.architecture.sites]
        bits = bits_read((s.weights, form.bits_a_weight([p.out_features for p in s.projections]), 0.0) for s in sites)
        rows.append(QuantizedRow(name, bits, ppl))
    return tuple(rows)


@torch.no_grad()
def _perplexity(
    source: Source,
    opened: Checkpoint,
    form: WeightFormat,
    text: Blocks,
    held: Blocks,
    compute: Compute,
    progress: Progress,
) -> float:
    """Perplexity on `held` of weights that are quantized, layer by layer, on what those before make of `text`."""
    stream, beside = LayerStream(source, text.ids, compute), LayerStream(source, held.ids, compute)
    start, measured = stream.embed(), beside.embed()
    quantizer = Quantizer(form, None)
    states = [start, *quantizer.begin(stream, start).values()]
    for index, module in stream.layers():
        layer, original = source.architecture.layers[index], deepcopy(module)
        with MaskedLayer(layer, module, opened.settings.rule, stream.rotations(index)) as masked:
            quantizer.quantize_layer(masked, original)
            beside.run(masked, measured)
        progress.step(f"layer {index + 1}")
    for state in states:
        state.clear()
    ppl = perplexity(float(next_token_nll(beside, measured).double().mean()))
    measured.clear()
    return ppl
