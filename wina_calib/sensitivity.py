"""What the loss feels of each site's sparsity: curves from one streamed backward pass.

To second order, dropping inputs of one site makes the model diverge by half the mean square of `sum_j g_j x_j (1 - m_j)`,
with g the gradient of the summed loss at the site's input and labels drawn from the model's own predictions (its Fisher
information; labels of the data give another matrix, which predicts worse). Terms between sites and between tokens are
left out. The loss on text rises by that and by a first-order part, the mean of `-sum_j g_j x_j (1 - m_j)` with the text's own
labels: mostly negative, as dropping inputs makes a model less sure of itself, and not in all sites alike.

Forward once, keeping every layer's input; then layer by layer from the last: forward again, and backward to the layer's
input for both kinds of labels. That is four forward passes' work over the tokens used, with one layer in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from wina_calib.budgets import Curves
from wina_calib.budgets.model import Floats
from wina_calib.errors import NumericError
from wina_calib.families import Layer, MaskGroup
from wina_calib.journal import NOT_SAVED, Phase
from wina_calib.masked import MaskedLayer, MaskRule
from wina_calib.score import kept_inputs, scores
from wina_calib.sketch import ScoreHistogram
from wina_calib.streaming import HiddenStates, LayerStream

CURVE_LEVELS = tuple(round(0.025 * i, 3) for i in range(39))
MAX_TOKENS = 32_768
PASSES = 4.0  # forward passes that the work on these tokens is worth
MOST_PASSES = 3.0  # of all calibration tokens: fewer are used where this would be more
_REFERENCE = 0.6  # site sparsity at which the first-order part is compared with the divergence
_SPREAD = 0.3  # what their ratio differs by from site to site, as found on two models
_RATIOS = (-0.75, 3.0)
_ROWS = 256
_NO_LABEL = -100  # cross_entropy leaves such rows out

_GRADIENTS = ("sampled", "text")  # names of the gradients that are saved, by their labels

Observe = Callable[[int, MaskGroup, Tensor, Tensor], None]


@dataclass(frozen=True)
class Rise:
    """Measured quality of a sparse model against the dense one: rise of the loss and KL divergence, nats a token."""

    loss: float
    kl: float


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What is felt of every site's sparsity, alone, at `CURVE_LEVELS`, in nats a token.

    Attributes:
        divergence: rise of the KL divergence, to second order.
        first_order: (layers, sites, levels) rise of the loss on the text, to first order; of either sign.
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
        level = CURVE_LEVELS.index(_REFERENCE)
        divergence = self.divergence.loss[..., level]
        felt = np.maximum(divergence, np.finfo(np.float64).tiny)
        trusted = divergence / (divergence + 2 / (self.tokens * _SPREAD**2))
        ratio = np.clip(trusted * self.first_order[..., level] / felt, *_RATIOS)
        return Curves(self.divergence.levels, self.divergence.loss * (1 + ratio[..., None]))


class _Tapped(MaskedLayer):
    """Masks nothing, and keeps a handle on what each mask group reads, apart from any other use of that input."""

    def __init__(self, layer: Layer, module: nn.Module, rule: MaskRule, rotations: Mapping[str, Tensor]) -> None:
        super().__init__(layer, module, rule, rotations)
        self.taps: dict[str, Tensor] = {}

    def mask(self, group: MaskGroup, x: Tensor) -> Tensor:
        self.taps[group.key] = tap = x.view_as(x)
        return tap


def usable_tokens(tokens: int) -> int:
    """How many of the calibration tokens the curves are measured on."""
    return min(MAX_TOKENS, int(tokens * MOST_PASSES / PASSES))


def measure_curves(
    stream: LayerStream,
    rule: MaskRule,
    *,
    seed: int,
    phase: Phase = NOT_SAVED,
    progress: Callable[[str], None] = lambda _: None,
    observe: Observe = lambda layer, group, x, g: None,
) -> tuple[Sensitivity, HiddenStates]:
    """Predict the loss rise of every site alone at `CURVE_LEVELS`.

    Args:
        stream: the dense model, transformed already, and the tokens to use.
        rule: how masks are made.
        seed: of the sampled labels.
        phase: where every layer's inputs, and on the way back the gradients, are saved; after that the result.
        progress: called twice a layer.
        observe: sees what each mask group reads and the gradient there for sampled labels, (rows, in) each, as
            `observe(layer, group, x, g)`; rows that are never masked are left out.

    Returns:
        The sensitivity, and the dense model's last hidden states.

    Raises:
        NumericError: logits or gradients are NaN or infinite.
    """
    count = len(stream.source.architecture.layers)
    if phase.finished:
        last, found = stream.store(), phase.tensors()["curves"].numpy()
        phase.restore("last", last, stream.mine)
    else:
        thresholds, inputs = _forward(stream, rule, phase, progress)
        last = inputs.pop(count)
        found = _backward(stream, rule, seed, thresholds, inputs, last, phase, progress, observe)
        phase.finish(tensors={"curves": torch.from_numpy(found)}, stores={"last": last})
    if not np.isfinite(found).all():
        raise NumericError(
            f"gradients are NaN or infinite in {stream.dtype}. Try --dtype float32, or --budget uniform."
        )
    divergence = np.maximum.accumulate(found[0], axis=2)
    tokens = sum(ids.numel() for ids in stream.batches)
    return Sensitivity(Curves(np.array(CURVE_LEVELS), divergence), found[1], tokens), last


@torch.no_grad()
def measured_rises(
    dense_stream: LayerStream, dense: HiddenStates, sparse_stream: LayerStream, sparse: Sequence[HiddenStates]
) -> list[Rise]:
    """Compare last hidden states of sparse models with the dense one's, on the blocks that both streams begin with."""
    ids = torch.cat(dense_stream.batches)
    kept, masked = _Blocks(dense_stream, dense), [_Blocks(sparse_stream, states) for states in sparse]
    mine: list[Tensor] = []
    with dense_stream.head() as head:

        def log_probabilities(states: Tensor) -> Tensor:
            return log_softmax(head(states[None])[0].float(), dim=-1)

        for block, tokens in enumerate(ids.to(dense_stream.device)):
            expected = kept.everywhere(block)
            if not masked[0].has(block):
                continue
            totals = torch.zeros(len(sparse), 2, dtype=torch.float64)
            rows = [states[block] for states in masked]
            for first in range(0, len(tokens) - 1, _ROWS):
                labels = tokens[first + 1 : first + 1 + _ROWS, None]
                chunk = slice(first, first + len(labels))
                p = log_probabilities(expected[chunk])
                for total, states in zip(totals, rows, strict=True):
                    q = log_probabilities(states[chunk])
                    rise = (p - q).gather(1, labels).double().sum()
                    divergence = kl_div(q, p, reduction="none", log_target=True).double().sum()
                    total += torch.stack([rise, divergence]).cpu()
            mine.append(totals)
    totals = _summed(dense_stream.ranks.gather(mine), torch.zeros(len(sparse), 2, dtype=torch.float64))
    return [Rise(loss, kl) for loss, kl in (totals / (len(ids) * (ids.shape[1] - 1))).tolist()]


def _forward(
    stream: LayerStream, rule: MaskRule, phase: Phase, progress: Callable[[str], None]
) -> tuple[dict[int, dict[str, Tensor]], dict[int, HiddenStates]]:
    """Thresholds (levels - 1,) at the levels above 0 of every layer's mask groups; every layer's inputs, and outputs."""
    levels = torch.tensor(CURVE_LEVELS[1:], dtype=torch.float64)
    arch = stream.source.architecture
    thresholds: dict[int, dict[str, Tensor]] = {}
    inputs = {0: stream.embed()}
    if phase.step:
        inputs[0].clear()
        inputs = {i: stream.store() for i in range(len(arch.layers) + 1) if phase.has(f"input{i}")}
        for i, store in inputs.items():
            phase.restore(f"input{i}", store, stream.mine)
        for name, value in phase.tensors().items():
            kind, where, key = name.split(":")
            if kind == "threshold":
                thresholds.setdefault(int(where), {})[key] = value.to(stream.device)
    for index, module in stream.layers(min(phase.step, len(arch.layers))):
        outputs = stream.store()
        histograms: dict[str, ScoreHistogram] = {}
        with torch.no_grad(), MaskedLayer(arch.layers[index], module, rule, stream.rotations(index)) as layer:

            def observe(
                site: str, x: Tensor, layer: MaskedLayer = layer, found: dict[str, ScoreHistogram] = histograms
            ) -> None:
                for group in layer.groups[site]:
                    found[group.key].update(scores(rule.masked_rows(x), layer.norms[group.key], rule.score))

            layer.observe = observe
            for group in (g for groups in layer.groups.values() for g in groups):
                histograms[group.key] = ScoreHistogram(stream.device)
            for batch in stream.mine:
                outputs[batch] = layer.run(inputs[index][batch], stream.kwargs(index, batch))
        for histogram in histograms.values():
            stream.ranks.add(histogram.counts)
        thresholds[index] = {key: h.quantiles(levels).float().to(stream.device) for key, h in histograms.items()}
        inputs[index + 1] = outputs
        phase.save(
            index + 1,
            tensors={f"threshold:{index}:{key}": value for key, value in thresholds[index].items()},
            stores=_named(inputs),
        )
        progress(f"dense pass of layer {index + 1}")
    return thresholds, inputs


def _backward(
    stream: LayerStream,
    rule: MaskRule,
    seed: int,
    thresholds: dict[int, dict[str, Tensor]],
    inputs: dict[int, HiddenStates],
    last: HiddenStates,
    phase: Phase,
    progress: Callable[[str], None],
    observe: Observe,
) -> Floats:
    """Divergence and first order, (2, layers, sites, levels); the inputs are cleared on the way."""
    arch = stream.source.architecture
    count = len(arch.layers)
    found = np.zeros((2, count, len(arch.layers[0].sites), len(CURVE_LEVELS)))
    done = max(phase.step - count, 0)
    if done:
        gradients = stream.store(), stream.store()
        for name, store in zip(_GRADIENTS, gradients, strict=True):
            phase.restore(name, store, stream.mine)
        for name, value in phase.tensors().items():
            kind, where, _ = name.split(":")
            if kind == "loss":
                found[:, int(where)] = value.numpy()
    else:
        gradients = _loss_gradients(stream, last, seed)
    for index, module in stream.layers(0, count - done, backward=True):
        layer = _layer_curves(stream, rule, index, module, inputs[index], gradients, thresholds[index], observe)
        found[:, index] = layer
        inputs.pop(index).clear()
        phase.save(
            2 * count - index,
            tensors={f"loss:{index}:": torch.from_numpy(layer)},
            stores=_named(inputs) | {f"input{count}": last} | dict(zip(_GRADIENTS, gradients, strict=True)),
        )
        progress(f"sensitivity of layer {index + 1}")
    for store in gradients:
        store.clear()
    return found


def _named(inputs: dict[int, HiddenStates]) -> dict[str, HiddenStates]:
    return {f"input{index}": store for index, store in inputs.items()}


def _loss_gradients(stream: LayerStream, last: HiddenStates, seed: int) -> tuple[HiddenStates, HiddenStates]:
    """Gradients of the summed loss at the last hidden states: with labels sampled from the model, with the text's own."""
    both = stream.store(), stream.store()
    with stream.head() as head:
        for batch in stream.mine:
            hidden, ids = last[batch], stream.batches[batch]
            out = torch.empty_like(hidden), torch.empty_like(hidden)
            following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], _NO_LABEL)], dim=1).to(stream.device)
            for block in range(len(hidden)):
                generator = label_generator(seed, batch * len(stream.batches[0]) + block, stream.device)
                for first in range(0, hidden.shape[1], _ROWS):
                    rows = block, slice(first, first + _ROWS)
                    leaf = hidden[rows].detach()[None].requires_grad_()
                    logits = head(leaf)[0].float()
                    if not bool(torch.isfinite(logits).all()):
                        raise NumericError(
                            f"the dense model's logits are NaN or infinite in {stream.dtype}. Try --dtype float32."
                        )
                    sampled = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                    for gradient, labels in zip(out, (sampled, following[rows]), strict=True):
                        loss = cross_entropy(logits, labels, reduction="sum", ignore_index=_NO_LABEL)
                        gradient[rows] = torch.autograd.grad(loss, leaf, retain_graph=True)[0][0]
            for store, gradient in zip(both, out, strict=True):
                store[batch] = gradient
    return both


def label_generator(seed: int, block: int, device: torch.device) -> torch.Generator:
    """The generator of one block's labels: they do not depend on which process draws them."""
    return torch.Generator(device).manual_seed((seed + 1) * 1_000_003 + block)


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
    """Divergence and first order, (2, sites, levels), of a layer; `gradients` at its outputs become those at its inputs."""
    layer = stream.source.architecture.layers[index]
    nothing = torch.zeros(2, len(layer.sites), len(CURVE_LEVELS), dtype=torch.float64)
    mine: list[Tensor] = []
    tokens = sum(ids.numel() for ids in stream.batches)
    tapped = _Tapped(layer, module, rule, stream.rotations(index))
    with tapped:
        for batch in stream.mine:
            totals = nothing.clone()
            hidden = inputs[batch].detach().requires_grad_()
            out = tapped.run(hidden, stream.kwargs(index, batch))
            taps, felt = dict(tapped.taps), []
            for store in gradients:
                found = torch.autograd.grad(
                    out, [hidden, *taps.values()], store[batch].to(out.dtype), retain_graph=store is gradients[0]
                )
                store[batch] = found[0]
                felt.append(dict(zip(taps, found[1:], strict=True)))
            for row, site in enumerate(layer.sites):
                dropped: list[Tensor | float] = [0.0, 0.0]
                for group in tapped.groups[site.name]:
                    x, *by_label = (rule.masked_rows(t[group.key].detach()).flatten(0, 1) for t in (taps, *felt))
                    observe(index, group, x, by_label[0])
                    score, limits = scores(x, tapped.norms[group.key], rule.score), thresholds[group.key]
                    if rule.select == "topk":
                        score, limits = ranks(score), dropped_ranks(site.width).to(stream.device)
                    for i, g in enumerate(by_label):
                        dropped[i] = dropped[i] + dropped_sums(g.float() * x.float(), score, limits)
                second, first = dropped
                assert isinstance(second, Tensor)
                assert isinstance(first, Tensor)
                totals[0, row, 1:] = second.double().square().sum(0).cpu() / 2
                totals[1, row, 1:] = -first.double().sum(0).cpu()
            mine.append(totals)
            tapped.taps.clear()
    return (_summed(stream.ranks.gather(mine), nothing) / tokens).numpy()


def dropped_sums(values: Tensor, score: Tensor, thresholds: Tensor) -> Tensor:
    """Sum of each row's values whose score is at most a threshold, for ascending thresholds.

    Args:
        values: (rows, in).
        score: (rows, in) float32.
        thresholds: (levels,) float32, ascending.

    Returns:
        (rows, levels).
    """
    if values.is_cuda:  # a scatter there adds in no fixed order
        return torch.stack([torch.where(score <= t, values, 0).sum(1) for t in thresholds], dim=1)
    bins = values.new_zeros(len(values), len(thresholds) + 1)
    bins.scatter_add_(1, torch.bucketize(score.contiguous(), thresholds), values)
    return bins[:, :-1].cumsum(1)


def ranks(score: Tensor) -> Tensor:
    """Rank of each score (rows, in) in its row, float32, 1 for the one that top-k selection drops first."""
    order = score.argsort(dim=1, descending=True, stable=True)
    position = torch.arange(score.shape[1], 0, -1, dtype=torch.float32, device=score.device)
    return torch.empty_like(score).scatter_(1, order, position.expand_as(score))


def dropped_ranks(width: int) -> Tensor:
    """Highest rank that top-k selection drops of `width` inputs at the levels above 0, (levels - 1,) float32."""
    return torch.tensor([width - kept_inputs(width, level) for level in CURVE_LEVELS[1:]], dtype=torch.float32)


def _summed(parts: Sequence[Tensor], total: Tensor) -> Tensor:
    """Sum in order, so that it does not depend on who has computed the parts."""
    for part in parts:
        total += part
    return total


class _Blocks:
    """Hidden states (seq, hidden) by block; a micro-batch is read once for its blocks in a row."""

    def __init__(self, stream: LayerStream, hidden: HiddenStates) -> None:
        self._stream, self._hidden = stream, hidden
        self._size = len(stream.batches[0])
        self._read: tuple[int, Tensor] | None = None

    def has(self, block: int) -> bool:
        """Whether this process has the block."""
        return block // self._size in self._stream.mine

    def __getitem__(self, block: int) -> Tensor:
        batch, row = divmod(block, self._size)
        if self._read is None or self._read[0] != batch:
            self._read = batch, self._hidden[batch]
        return self._read[1][row]

    def everywhere(self, block: int) -> Tensor:
        """A block of any process."""
        stream = self._stream
        if stream.ranks.size == 1:
            return self[block]
        shape = (stream.batches[0].shape[1], stream.source.architecture.hidden_size)
        own = (
            self[block].contiguous()
            if self.has(block)
            else torch.empty(shape, dtype=stream.dtype, device=stream.device)
        )
        return stream.ranks.from_owner(own, stream.ranks.owner(block // self._size, len(stream.batches)))
