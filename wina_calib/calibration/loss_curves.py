"""What the loss feels of each site's sparsity: curves from one streamed backward pass.

To second order, dropping inputs of one site makes the model diverge by half the mean square of `sum_j g_j x_j (1 - m_j)`,
with g the gradient of the summed loss at the site's input and labels drawn from the model's own predictions (its Fisher
information; labels of the data give another matrix, which predicts worse). Terms between sites and between tokens are
left out. The loss on text rises by that and by a first-order part, the mean of `-sum_j g_j x_j (1 - m_j)` with the text's own
labels: mostly negative, as dropping inputs makes a model less sure of itself, and not in all sites alike.

Forward once, keeping every layer's input; then layer by layer from the last: forward again, and backward to the layer's
input for both kinds of labels, with one layer in memory at a time. In products of matrices that is four forward passes over the
tokens used; attention's backward costs more than two of its forward, and the curves have their own work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from wina_calib.budgets import Curves
from wina_calib.budgets.model import Floats
from wina_calib.calibration.dropped_levels import CURVE_LEVELS, dropped_ranks, dropped_sums, first_dropped, ranks
from wina_calib.calibration.layer_stream import LayerStream, head_parts
from wina_calib.calibration.likelihood import loss_gradients
from wina_calib.calibration.masked_layer import DenseRows, MaskedLayer
from wina_calib.common.devices import fixed_order
from wina_calib.common.progress import SILENT, Part, Progress
from wina_calib.errors import NumericError
from wina_calib.masks.histogram import ScoreHistogram
from wina_calib.masks.mask import rows_together
from wina_calib.masks.rule import MaskRule
from wina_calib.masks.score import scores
from wina_calib.model.architecture import Architecture, Layer, MaskGroup
from wina_calib.storage.hidden_states import HiddenStates
from wina_calib.storage.resume import NOT_SAVED, Phase

MAX_TOKENS = 32_768
SHARE = 0.45  # of all calibration tokens, at most: three forward passes over all of them
REFERENCE = 0.6  # site sparsity at which the first-order part is compared with the divergence
_SPREAD = 0.3  # what their ratio differs by from site to site, as found on two models
_RATIOS = (-0.75, 3.0)

# Phases, and what each costs in dense passes through the layers, or through lm_head.
_DENSE, _GRADIENTS_PHASE, _CURVES = (
    f"find where to drop: {what}" for what in ("forward pass", "lm_head", "backward pass")
)
_COUNTED, _HEAD, _BACKWARD = 1.4, 4.5, 4.4
CURVE_PASSES = _COUNTED + _BACKWARD
_GRADIENTS = ("sampled", "text")  # names of the gradients that are saved, by their labels

Observe = Callable[[int, MaskGroup, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class LossCurves:
    """What is felt of every site's sparsity, alone, at `CURVE_LEVELS`, in nats a token.

    Attributes:
        divergence: rise of the KL divergence, to second order.
        first_order: (layers, sites) rise of the loss on the text at `REFERENCE`, to first order; of either sign.
        tokens: tokens that both are means over.
    """

    divergence: Curves
    first_order: Floats
    tokens: int

    @property
    def loss(self) -> Curves:
        """Rise of the loss on text: every site's divergence times a factor.

        A mean of terms of both signs is far noisier than a mean of squares, so only one number of the first-order curve is
        used: its ratio to the divergence at one sparsity, shrunk as its own noise demands. That variance is known, as the
        divergence is half the mean square of what the first-order part is the mean of.
        """
        divergence = self.divergence.loss[..., CURVE_LEVELS.index(REFERENCE)]
        positive = np.maximum(divergence, np.finfo(np.float64).tiny)
        trusted = divergence / (divergence + 2 / (self.tokens * _SPREAD**2))
        ratio = np.clip(trusted * self.first_order / positive, *_RATIOS)
        return Curves(self.divergence.levels, self.divergence.loss * (1 + ratio[..., None]))


class _Tapped(MaskedLayer):
    """Masks nothing, and keeps a handle on what each mask group reads, apart from any other use of that input."""

    def __init__(self, layer: Layer, module: nn.Module, rule: MaskRule, rotations: Mapping[str, Tensor]) -> None:
        super().__init__(layer, module, rule, rotations)
        self.taps: dict[str, Tensor] = {}

    def mask_inputs(self, group: MaskGroup, x: Tensor, dense_rows: DenseRows = "first") -> Tensor:
        self.taps[group.key] = tap = x.view_as(x)
        return tap


def usable_tokens(tokens: int) -> int:
    """How many of the calibration tokens the curves are measured on."""
    return min(MAX_TOKENS, int(tokens * SHARE))


def curve_parts(arch: Architecture, dtype: torch.dtype, batches: int, forward: float, head: float) -> tuple[Part, ...]:
    """The phases of `measure_curves`.

    Args:
        arch: the model.
        dtype: compute dtype.
        batches: micro-batches.
        forward: cost of one dense pass through the layers.
        head: cost of the logits of all tokens.
    """
    layers = len(arch.layers)
    return (
        Part(_DENSE, layers, _COUNTED * forward),
        Part(_GRADIENTS_PHASE, batches + head_parts(arch, dtype), _HEAD * head),
        Part(_CURVES, layers, _BACKWARD * forward),
    )


def measure_curves(
    stream: LayerStream,
    rule: MaskRule,
    *,
    seed: int,
    phase: Phase = NOT_SAVED,
    progress: Progress = SILENT,
    observe: Observe = lambda layer, group, x, g: None,
) -> LossCurves:
    """Predict the loss rise of every site alone at `CURVE_LEVELS`.

    Args:
        stream: the dense model, transformed already, and the tokens to use.
        rule: how masks are made.
        seed: of the sampled labels.
        phase: where every layer's inputs, and on the way back the gradients, are saved; after that the result.
        progress: hears of three phases, and of every layer in them.
        observe: sees what each mask group reads and the gradient there for sampled labels, (blocks, seq, in) each,
            as `observe(layer, group, x, g)`; rows that are never masked are left out.

    Returns:
        The curves.

    Raises:
        NumericError: logits or gradients are NaN or infinite.
    """
    count = len(stream.source.architecture.layers)
    if phase.finished:
        curves = phase.tensors()["curves"].numpy()
    else:
        thresholds, inputs = _forward(stream, rule, phase, progress)
        last = inputs.pop(count)
        curves = _backward(stream, rule, seed, thresholds, inputs, last, phase, progress, observe)
        phase.finish(tensors={"curves": torch.from_numpy(curves)})
        last.clear()
    if not np.isfinite(curves).all():
        raise NumericError(
            f"gradients are NaN or infinite in {stream.dtype}. Try --dtype float32, or --budget uniform."
        )
    divergence = np.maximum.accumulate(curves[..., 1:], axis=2)
    return LossCurves(Curves(np.array(CURVE_LEVELS), divergence), curves[..., 0], stream.tokens)


def _forward(
    stream: LayerStream, rule: MaskRule, phase: Phase, progress: Progress
) -> tuple[dict[int, dict[str, Tensor]], dict[int, HiddenStates]]:
    """Thresholds (levels - 1,) at the levels above 0 of every layer's mask groups; every layer's inputs, and outputs."""
    levels = torch.tensor(CURVE_LEVELS[1:], dtype=torch.float64)
    arch = stream.source.architecture
    thresholds: dict[int, dict[str, Tensor]] = {}
    inputs = {0: stream.embed()}
    if phase.done_items:
        inputs[0].clear()
        inputs = {i: stream.store() for i in range(len(arch.layers) + 1) if phase.has(f"input{i}")}
        for name, value in phase.tensors().items():
            kind, where, key = name.split(":")
            if kind == "threshold":
                thresholds.setdefault(int(where), {})[key] = value.to(stream.device)
    begun = min(phase.done_items, len(arch.layers))
    if begun < len(arch.layers):
        progress.phase(_DENSE, len(arch.layers) - begun)
    steps = phase.each(lambda _: stream.layers(begun), lambda: _named(inputs), stream.blocks, progress)
    for (index, module), done in steps:
        outputs = stream.store()
        histograms: dict[str, ScoreHistogram] = {}
        with torch.no_grad(), MaskedLayer(arch.layers[index], module, rule, stream.rotations(index)) as layer:

            def observe(
                site: str, x: Tensor, layer: MaskedLayer = layer, into: dict[str, ScoreHistogram] = histograms
            ) -> None:
                for group in layer.groups[site]:
                    layer.count(group, rule.masked_rows(x), into[group.key])

            layer.observe = observe
            for group in (g for groups in layer.groups.values() for g in groups):
                histograms[group.key] = ScoreHistogram(stream.device)
            for batch in stream.mine:
                outputs[batch] = layer.run(inputs[index][batch], stream.kwargs(index, batch))
        for histogram in histograms.values():
            stream.ranks.add(histogram.counts)
        thresholds[index] = {key: h.quantiles(levels).float().to(stream.device) for key, h in histograms.items()}
        inputs[index + 1] = outputs
        done(
            f"layer {index + 1}",
            tensors={f"threshold:{index}:{key}": value for key, value in thresholds[index].items()},
        )
    return thresholds, inputs


def _backward(
    stream: LayerStream,
    rule: MaskRule,
    seed: int,
    thresholds: dict[int, dict[str, Tensor]],
    inputs: dict[int, HiddenStates],
    last: HiddenStates,
    phase: Phase,
    progress: Progress,
    observe: Observe,
) -> Floats:
    """First order and divergence, (layers, sites, 1 + levels); the inputs are cleared on the way."""
    arch = stream.source.architecture
    count = len(arch.layers)
    curves = np.zeros((count, len(arch.layers[0].sites), 1 + len(CURVE_LEVELS)))
    begun = max(phase.done_items - count, 0)
    if begun:
        gradients = stream.store(), stream.store()
        for name, value in phase.tensors().items():
            kind, where, _ = name.split(":")
            if kind == "loss":
                curves[int(where)] = value.numpy()
    else:
        progress.phase(_GRADIENTS_PHASE, len(stream.mine) + head_parts(arch, stream.dtype))
        gradients = loss_gradients(stream, last, seed, progress)
    progress.phase(_CURVES, count - begun)
    named = dict(zip(_GRADIENTS, gradients, strict=True))
    steps = phase.each(
        lambda _: stream.layers(0, count - begun, backward=True),
        named if begun else {},
        stream.blocks,
        progress,
        more=lambda: _named(inputs) | {f"input{count}": last} | named,
        begun=count + begun,
    )
    for (index, module), done in steps:
        layer = _layer_curves(stream, rule, index, module, inputs[index], gradients, thresholds[index], observe)
        curves[index] = layer
        inputs.pop(index).clear()
        done(f"layer {index + 1}", tensors={f"loss:{index}:": torch.from_numpy(layer)})
    for store in gradients:
        store.clear()
    return curves


def _named(inputs: dict[int, HiddenStates]) -> dict[str, HiddenStates]:
    return {f"input{index}": store for index, store in inputs.items()}


def _layer_curves(
    stream: LayerStream,
    rule: MaskRule,
    index: int,
    module: nn.Module,
    inputs: HiddenStates,
    gradients: tuple[HiddenStates, HiddenStates],
    thresholds: dict[str, Tensor],
    observe: Observe,
) -> Floats:
    """First order and divergence, (sites, 1 + levels), of a layer; `gradients` at its outputs become those at its inputs."""
    layer = stream.source.architecture.layers[index]
    nothing = torch.zeros(len(layer.sites), 1 + len(CURVE_LEVELS), dtype=torch.float64)
    sampled, text = gradients
    mine: list[Tensor] = []
    tapped = _Tapped(layer, module, rule, stream.rotations(index))
    with tapped:
        for batch in stream.mine:
            hidden = inputs[batch].detach().requires_grad_()
            with fixed_order(stream.device):
                out = tapped.run(hidden, stream.kwargs(index, batch))
            taps = dict(tapped.taps)
            tapped.taps.clear()
            read = {key: rule.masked_rows(tap.detach()) for key, tap in taps.items()}
            levels: dict[str, list[Tensor]] = {}
            totals = nothing.to(stream.device, copy=True)

            slopes = _back(stream, batch, out, hidden, taps, sampled, again=True)
            for row, site in enumerate(layer.sites):
                dropped: list[Tensor] = []
                for group in tapped.groups[site.name]:
                    x, g = read[group.key], rule.masked_rows(slopes.pop(group.key))
                    observe(index, group, x, g)
                    levels[group.key] = [_levels(tapped, group, part, thresholds[group.key]) for part in _parts(x)]
                    dropped.append(_dropped(x, g, levels[group.key]))
                totals[row, 2:] = torch.stack(dropped).sum(0).square().sum(0) / 2

            slopes = _back(stream, batch, out, hidden, taps, text, again=False)
            for row, site in enumerate(layer.sites):
                for key in (group.key for group in tapped.groups[site.name]):
                    totals[row, 0] -= _lost(read[key], rule.masked_rows(slopes.pop(key)), levels[key])
            mine.append(totals.cpu())
    return (_summed(stream.ranks.gather(mine), nothing) / stream.tokens).numpy()


def _back(
    stream: LayerStream,
    batch: int,
    out: Tensor,
    hidden: Tensor,
    taps: Mapping[str, Tensor],
    gradients: HiddenStates,
    *,
    again: bool,
) -> dict[str, Tensor]:
    """Gradients at the taps from that at `out`, which becomes that at `hidden`; `again` if another one will follow."""
    with fixed_order(stream.device):
        gradient, *slopes = torch.autograd.grad(
            out, [hidden, *taps.values()], gradients[batch].to(out.dtype), retain_graph=again
        )
    gradients[batch] = gradient
    return dict(zip(taps, slopes, strict=True))


def _parts(x: Tensor) -> Iterator[Tensor]:
    """Rows (n, width) of x (blocks, seq, width), a few at a time."""
    return (part for block in x for part in block.split(rows_together(x)))


def _levels(tapped: _Tapped, group: MaskGroup, x: Tensor, thresholds: Tensor) -> Tensor:
    """Which of the levels above 0 is the first to drop each input (rows, width) of a group; uint8."""
    if tapped.rule.select == "topk":
        score = ranks(scores(x, tapped.norms[group.key], tapped.rule.score))
        return first_dropped(score, dropped_ranks(x.shape[-1]).to(x.device))
    return first_dropped(scores(x, tapped.norms[group.key], tapped.rule.score), thresholds)


def _dropped(x: Tensor, g: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Sum of gradient times input over what each level above 0 drops, of each row of x (blocks, seq, in), float64."""
    count = len(CURVE_LEVELS) - 1
    return torch.cat(
        [dropped_sums(product, level, count) for product, level in zip(_products(x, g), levels, strict=True)]
    )


def _lost(x: Tensor, g: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Sum of gradient times input over what is dropped at `REFERENCE` of all rows of x (blocks, seq, in), float64."""
    last = CURVE_LEVELS.index(REFERENCE) - 1
    parts = [product.mul_(level <= last) for product, level in zip(_products(x, g), levels, strict=True)]
    return torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum()


def _products(x: Tensor, g: Tensor) -> Iterator[Tensor]:
    """Gradient times input, (n, in) float32, a few rows at a time."""
    return (g.float() * x.float() for x, g in zip(_parts(x), _parts(g), strict=True))


def _summed(parts: Sequence[Tensor], total: Tensor) -> Tensor:
    """Sum in order, so that it does not depend on who has computed the parts."""
    for part in parts:
        total += part
    return total
