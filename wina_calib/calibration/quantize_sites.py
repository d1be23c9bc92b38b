"""Quantizes the sites of a layer under calibration, and hands their weights to what writes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from wina_calib.budgets.count import count_cells
from wina_calib.budgets.patterns import select
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.masked_layer import MaskedLayer
from wina_calib.calibration.options import CalibrateOptions
from wina_calib.checkpoint.quantized_weights import QuantizedWeights
from wina_calib.errors import BudgetError, NumericError, UsageError
from wina_calib.model.architecture import Architecture, Layer, MaskGroup, Site
from wina_calib.quantization.formats import Quantized, WeightFormat
from wina_calib.quantization.gptq import HessianSum, quantize


class Quantizer:
    """Quantizes one site after another by GPTQ on the inputs that it is shown.

    `into` writes the weights, in the first process alone; `kept` projections, of whole sites, are left as they are.
    """

    def __init__(self, form: WeightFormat, into: QuantizedWeights | None, kept: Iterable[str] = ()) -> None:
        self._form, self._into, self._kept = form, into, frozenset(kept)
        self._done: list[tuple[MaskGroup, Quantized]] = []

    def sync(self) -> None:
        """Force what was written to the disk."""
        if self._into is not None:
            self._into.shelf.sync()

    def write(self, layer: Layer) -> None:
        """Write a layer, all of whose sites were quantized."""
        if self._into is not None:
            self._into.write_layer(layer, self._done)
        self._done = []

    def quantize(self, stream: LayerStream, masked: MaskedLayer, site: Site, inputs: Iterable[Tensor]) -> None:
        """Quantize a site in place, unless it is left as it is.

        Inputs are (batch, seq, width), not masked, of this process's micro-batches.

        Raises:
            NumericError: weights or inputs are NaN or infinite.
        """
        if f"{masked.layer.prefix}{site.projections[0].module}" in self._kept:
            return
        groups = masked.groups[site.name]
        sums = [HessianSum(site.width, stream.device) for _ in groups]
        ranks = stream.ranks
        for x in inputs:
            for group, total in zip(groups, sums, strict=True):
                with _named(masked, site.name):
                    total.add(masked.mask_inputs(group, x), ranks.from_first)
        for total in sums:
            if total.unit is None:  # none of the text is this process's
                total.unit = ranks.from_first(1.0)
        for group, total in zip(groups, sums, strict=True):
            ranks.add(total.parts)
            made = self._quantized(stream, masked, group, total.total)
            masked.replace(group, made)
            self._done.append((group, made.to(torch.device("cpu"))))

    def _quantized(self, stream: LayerStream, masked: MaskedLayer, group: MaskGroup, hessian: Tensor) -> Quantized:
        """A group's weights, quantized by the first process for all."""
        width, outs = hessian.shape[0], [p.out_features for p in group.projections]
        if stream.ranks.is_first:
            weight_t = torch.cat(masked.weights(group)).t()
            with _named(masked, group.site):
                made = quantize(weight_t, hessian, self._form)
            if stream.ranks.size == 1:
                return made
            tensors: Mapping[str, Tensor] = made.named()
        else:
            specs = self._form.specs(width, outs)
            tensors = {n: torch.empty(shape, dtype=dtype, device=stream.device) for n, (dtype, shape) in specs.items()}
        return Quantized.of(self._form, {n: stream.ranks.from_owner(t, 0) for n, t in tensors.items()})


@contextmanager
def _named(masked: MaskedLayer, site: str) -> Iterator[None]:
    """Let a NumericError say where it came about."""
    try:
        yield
    except NumericError as error:
        raise NumericError(f"layer {masked.layer.index}, {site}: {error}") from error


def weight_format(options: CalibrateOptions) -> WeightFormat | None:
    """How weights are to be quantized; None where they are not."""
    return WeightFormat(options.bits, options.group_size, not options.symmetric) if options.bits else None


def check_format(arch: Architecture, form: WeightFormat, kept: Sequence[str] = ()) -> None:
    """Raise UsageError where the outputs of a projection do not divide into the format's groups; those `kept` need not."""
    for layer, site in arch.sites:
        if f"{layer.prefix}{site.projections[0].module}" not in kept:
            form.specs(site.width, [p.out_features for p in site.projections])


def kept_modules(options: CalibrateOptions, arch: Architecture) -> tuple[str, ...]:
    """Names of the projections that the options' patterns leave as they are.

    Raises:
        UsageError: a pattern matches nothing, or nothing is left to be quantized.
    """
    cells = count_cells(arch, "none")
    chosen = np.zeros(cells.weights.shape, dtype=np.bool_)
    for pattern in options.keep_16_bit:
        try:
            chosen |= select(pattern, cells)
        except BudgetError as error:
            raise UsageError(f"--keep-16-bit: {error}.") from error
    if chosen.all():
        raise UsageError("--keep-16-bit leaves nothing to quantize. Leave --bits out, or name fewer sites.")
    return tuple(
        f"{layer.prefix}{projection.module}"
        for layer in arch.layers
        for site, is_kept in zip(layer.sites, chosen[layer.index], strict=True)
        if is_kept
        for projection in site.projections
    )
