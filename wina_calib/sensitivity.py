"""What the loss feels of each site's sparsity: curves from one streamed backward pass.

To second order, dropping inputs of one site raises the loss by half the mean square of `sum_j g_j x_j (1 - m_j)`, with
g the gradient of the summed loss at the site's input and labels drawn from the model's own predictions (its Fisher
information; labels of the data give another matrix, which predicts worse). Terms between sites and between tokens are
left out.

Forward once, keeping every layer's input; then layer by layer from the last: forward again, and backward to the layer's
input. That is three forward passes' work over the tokens used, with one layer in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from wina_calib.budgets import Curves
from wina_calib.errors import NumericError
from wina_calib.families import Layer, MaskGroup
from wina_calib.journal import NOT_SAVED, Phase
from wina_calib.masked import MaskedLayer, MaskRule
from wina_calib.score import kept_inputs, scores
from wina_calib.sketch import ScoreHistogram
from wina_calib.streaming import HiddenStates, LayerStream

CURVE_LEVELS = tuple(round(0.025 * i, 3) for i in range(39))
MAX_TOKENS = 32_768
PASSES = 3.0  # forward passes that the work on these tokens is worth
_ROWS = 256

Observe = Callable[[int, MaskGroup, Tensor, Tensor], None]


@dataclass(frozen=True)
class Rise:
    """Measured quality of a sparse model against the dense one: rise of the loss and KL divergence, nats a token."""

    loss: float
    kl: float


class _Tapped(MaskedLayer):
    """Masks nothing, and keeps a handle on what each mask group reads, apart from any other use of that input."""

    def __init__(self, layer: Layer, module: nn.Module, rule: MaskRule, rotations: Mapping[str, Tensor]) -> None:
        super().__init__(layer, module, rule, rotations)
        self.taps: dict[str, Tensor] = {}

    def mask(self, group: MaskGroup, x: Tensor) -> Tensor:
        self.taps[group.key] = tap = x.view_as(x)
        return tap


def measure_curves(
    stream: LayerStream,
    rule: MaskRule,
    *,
    seed: int,
    phase: Phase = NOT_SAVED,
    progress: Callable[[str], None] = lambda _: None,
    observe: Observe = lambda layer, group, x, g: None,
) -> tuple[Curves, HiddenStates]:
    """Predict the loss rise of every site alone at `CURVE_LEVELS`.

    Args:
        stream: the dense model, transformed already, and the tokens to use.
        rule: how masks are made.
        seed: of the sampled labels.
        phase: where every layer's inputs, and on the way back the gradients, are saved; after that the result.
        progress: called twice a layer.
        observe: sees what each mask group reads and the loss's gradient there, (rows, in) each, as
            `observe(layer, group, x, g)`; rows that are never masked are left out.

    Returns:
        The curves in nats a token, and the dense model's last hidden states.

    Raises:
        NumericError: logits or gradients are NaN or infinite.
    """
    count = len(stream.source.architecture.layers)
    if phase.finished:
        last, loss = stream.store(), phase.tensors()["curves"].numpy()
        phase.restore("last", last, stream.mine)
    else:
        thresholds, inputs = _forward(stream, rule, phase, progress)
        last = inputs.pop(count)
        loss = _backward(stream, rule, seed, thresholds, inputs, last, phase, progress, observe)
        phase.finish(tensors={"curves": torch.from_numpy(loss)}, stores={"last": last})
    if not np.isfinite(loss).all():
        raise NumericError(
            f"gradients are NaN or infinite in {stream.dtype}. Try --dtype float32, or --budget uniform."
        )
    return Curves(np.array(CURVE_LEVELS), np.maximum.accumulate(loss, axis=2)), last


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
        inputs = {i: stream.store() for i in range(len(arch.layers) + 1) if phase.has(f"input{i}")}
        for i, store in inputs.items():
            phase.restore(f"input{i}", store, stream.mine)
        for name, value in phase.tensors().items():
            kind, where, key = name.split(":")
            if kind == "threshold":
                thresholds.setdefault(int(where), {})[key] = value.to(stream.device)
    for index, module, _ in stream.layers(min(phase.step, len(arch.layers))):
        outputs = stream.store()
        histograms: dict[str, ScoreHistogram] = {}
        with torch.no_grad(), MaskedLayer(arch.layers[index], module, rule, _rotations(stream, index)) as layer:

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
) -> np.ndarray:
    """Curves (layers, sites, levels); the inputs are cleared on the way."""
    arch = stream.source.architecture
    count = len(arch.layers)
    loss = np.zeros((count, len(arch.layers[0].sites), len(CURVE_LEVELS)))
    done = max(phase.step - count, 0)
    if done:
        gradients = stream.store()
        phase.restore("gradients", gradients, stream.mine)
        for name, value in phase.tensors().items():
            kind, where, _ = name.split(":")
            if kind == "loss":
                loss[int(where)] = value.numpy()
    else:
        gradients = _loss_gradients(stream, last, seed)
    for index, module, _ in stream.layers(0, count - done, backward=True):
        loss[index] = _layer_curves(stream, rule, index, module, inputs[index], gradients, thresholds[index], observe)
        inputs.pop(index).clear()
        phase.save(
            2 * count - index,
            tensors={f"loss:{index}:": torch.from_numpy(loss[index].copy())},
            stores=_named(inputs) | {f"input{count}": last, "gradients": gradients},
        )
        progress(f"sensitivity of layer {index + 1}")
    gradients.clear()
    return loss


def _named(inputs: dict[int, HiddenStates]) -> dict[str, HiddenStates]:
    return {f"input{index}": store for index, store in inputs.items()}


def _loss_gradients(stream: LayerStream, last: HiddenStates, seed: int) -> HiddenStates:
    """Gradients of the summed loss, with labels sampled from the model, at the last hidden states."""
    gradients = stream.store()
    with stream.head() as head:
        for batch in stream.mine:
            hidden = last[batch]
            out = torch.empty_like(hidden)
            first = batch * len(stream.batches[0])
            for block, (row, gradient) in enumerate(zip(hidden, out, strict=True), first):
                generator = label_generator(seed, block, stream.device)
                for states, chunk in zip(row.split(_ROWS), gradient.split(_ROWS), strict=True):
                    leaf = states.detach()[None].requires_grad_()
                    logits = head(leaf)[0].float()
                    if not bool(torch.isfinite(logits).all()):
                        raise NumericError(
                            f"the dense model's logits are NaN or infinite in {stream.dtype}. Try --dtype float32."
                        )
                    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                    chunk.copy_(torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), leaf)[0][0])
            gradients[batch] = out
    return gradients


def label_generator(seed: int, block: int, device: torch.device) -> torch.Generator:
    """The generator of one block's labels: they do not depend on which process draws them."""
    return torch.Generator(device).manual_seed((seed + 1) * 1_000_003 + block)


def _layer_curves(
    stream: LayerStream,
    rule: MaskRule,
    index: int,
    module: nn.Module,
    inputs: HiddenStates,
    gradients: HiddenStates,
    thresholds: dict[str, Tensor],
    observe: Observe,
) -> np.ndarray:
    """Curves (sites, levels) of one layer; `gradients` at its outputs become those at its inputs."""
    layer = stream.source.architecture.layers[index]
    mine: list[Tensor] = []
    tokens = sum(ids.numel() for ids in stream.batches)
    tapped = _Tapped(layer, module, rule, _rotations(stream, index))
    with tapped:
        for batch in stream.mine:
            totals = torch.zeros(len(layer.sites), len(CURVE_LEVELS), dtype=torch.float64)
            hidden = inputs[batch].detach().requires_grad_()
            out = tapped.run(hidden, stream.kwargs(index, batch))
            taps = dict(tapped.taps)
            found = torch.autograd.grad(out, [hidden, *taps.values()], gradients[batch].to(out.dtype))
            gradients[batch] = found[0]
            felt = dict(zip(taps, found[1:], strict=True))
            for row, site in enumerate(layer.sites):
                dropped: Tensor | float = 0.0
                for group in tapped.groups[site.name]:
                    x, g = (rule.masked_rows(t[group.key].detach()).flatten(0, 1) for t in (taps, felt))
                    observe(index, group, x, g)
                    score, limits = scores(x, tapped.norms[group.key], rule.score), thresholds[group.key]
                    if rule.select == "topk":
                        score, limits = ranks(score), dropped_ranks(site.width).to(stream.device)
                    dropped = dropped + dropped_sums(g.float() * x.float(), score, limits)
                assert isinstance(dropped, Tensor)
                totals[row, 1:] = dropped.double().square().sum(0).cpu()
            mine.append(totals)
            tapped.taps.clear()
    totals = _summed(stream.ranks.gather(mine), torch.zeros(len(layer.sites), len(CURVE_LEVELS), dtype=torch.float64))
    return (totals / (2 * tokens)).numpy()


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


def _rotations(stream: LayerStream, index: int) -> dict[str, Tensor]:
    return {site: q.to(stream.device, stream.dtype) for site, q in stream.source.rotations(index).items()}


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
