"""Quantizes the sites of a layer under calibration, and hands their weights to what writes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from wina_calib.budgets.count import count_cells
from wina_calib.budgets.patterns import select
from wina_calib.calibration.fit_layer import site_input
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.masked_layer import MaskedLayer
from wina_calib.calibration.options import CalibrateOptions
from wina_calib.checkpoint.quantized_weights import QuantizedWeights
from wina_calib.errors import BudgetError, NumericError, UsageError
from wina_calib.model.architecture import Architecture, MaskGroup, Site
from wina_calib.quantization.formats import Quantized, WeightFormat
from wina_calib.quantization.gptq import InputSums, aimed, quantize
from wina_calib.storage.hidden_states import HiddenStates

# How much of what the quantized layers before have lost a site's weights make up for.
MADE_UP = 0.5


class _Run:
    """Every token run without masks through the layers, whose sites' inputs are shown."""

    def __init__(self, stream: LayerStream, start: HiddenStates) -> None:
        self._stream, self.hidden, self._attention = stream, stream.store(), stream.store()
        self.hidden.copy_from(start)

    def inputs(self, masked: MaskedLayer, site: Site) -> Iterator[Tensor]:
        """The inputs (batch, seq, width) of a site of a layer without cuts, of this process's micro-batches."""
        if site.name.startswith("mlp"):
            self._attend(masked)
        for index in self._stream.mine:
            yield site_input(self._stream, masked, site, self.hidden, self._attention, index)

    def advance(self, masked: MaskedLayer) -> None:
        """Go on with the layer's outputs."""
        self._attend(masked)
        for index in self._stream.mine:
            with masked.replay_attention(self._attention[index]):
                self.hidden[index] = masked.run(self.hidden[index], self._stream.kwargs(masked.layer.index, index))
        self._attention.clear()
        self._attention = self._stream.store()

    def _attend(self, masked: MaskedLayer) -> None:
        """Have the attention block's outputs, of the weights as they are now."""
        if self._attention.indices:
            return
        site = masked.layer.site("attn_out")
        o_proj = masked.module.get_submodule(site.projections[0].module)
        for index, x in zip(self._stream.mine, self.inputs(masked, site), strict=True):
            self._attention[index] = o_proj.forward(x)  # past the hooks


class Quantizer:
    """Quantizes layer after layer by GPTQ, a site at a time, on the inputs that the quantized sites before it make.

    Inputs are not masked: weights that are quantized on masked ones serve masks no better, and such as make up for what masks
    drop are far worse on some models (docs/quantized.md). `into` writes the weights, in the first process alone; `kept`
    projections, of whole sites, are left as they are.
    """

    def __init__(self, form: WeightFormat, into: QuantizedWeights | None, kept: Iterable[str] = ()) -> None:
        self._form, self._into, self._kept = form, into, frozenset(kept)

    def sync(self) -> None:
        """Force what was written to the disk."""
        if self._into is not None:
            self._into.shelf.sync()

    def begin(self, stream: LayerStream, start: HiddenStates) -> dict[str, HiddenStates]:
        """Begin with the states before the first layer; what is returned is kept up to date, and needed to go on later."""
        self._stream, self._quantized_run, self._dense_run = stream, _Run(stream, start), _Run(stream, start)
        return {"quantized": self._quantized_run.hidden, "original": self._dense_run.hidden}

    @torch.no_grad()
    def quantize_layer(self, masked: MaskedLayer, original: nn.Module) -> None:
        """Quantize the sites of the next layer in place, and write them; the layer's cuts are gone afterwards.

        Args:
            masked: the layer.
            original: a copy of it.

        Raises:
            NumericError: weights or inputs are NaN or infinite.
        """
        masked.cuts, layer, done = {}, masked.layer, list[tuple[MaskGroup, Quantized]]()
        with MaskedLayer(layer, original, masked.rule, masked.rotations) as dense:
            for site in layer.sites:
                if f"{layer.prefix}{site.projections[0].module}" not in self._kept:
                    with _named(masked, site.name):
                        done += self._site(masked, dense, site)
            self._quantized_run.advance(masked)
            self._dense_run.advance(dense)
        if self._into is not None:
            self._into.write_layer(layer, done)

    def _site(self, masked: MaskedLayer, dense: MaskedLayer, site: Site) -> list[tuple[MaskGroup, Quantized]]:
        ranks, sums = self._stream.ranks, InputSums(site.width, self._stream.device)
        found, wanted = self._quantized_run.inputs(masked, site), self._dense_run.inputs(dense, site)
        for x, aim in zip(found, wanted, strict=True):
            sums.add(x, (aim.float() - x.float()) * MADE_UP, ranks.from_first)
        if sums.unit is None:  # none of the text is this process's
            sums.unit = ranks.from_first(1.0)
        ranks.add(sums.parts)
        done = []
        for group in masked.groups[site.name]:
            made = self._quantized(masked, group, sums)
            masked.replace(group, made)
            done.append((group, made.to(torch.device("cpu"))))
        return done

    def _quantized(self, masked: MaskedLayer, group: MaskGroup, sums: InputSums) -> Quantized:
        """A group's weights, quantized by the first process for all."""
        stream, outs = self._stream, [p.out_features for p in group.projections]
        if stream.ranks.is_first:
            weight_t, hessian = torch.cat(masked.weights(group)).t(), sums.hessian
            made = quantize(aimed(weight_t, hessian, sums.lacking), hessian, self._form)
            if stream.ranks.size == 1:
                return made
            tensors: Mapping[str, Tensor] = made.named()
        else:
            specs = self._form.specs(sums.width, outs)
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
