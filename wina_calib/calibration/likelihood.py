"""What a model's last hidden states say about text: losses, their gradients and divergences, by parts of the vocabulary.

lm_head is never in memory as a whole where it is large: every part of its rows is loaded once and sees all tokens. What a
softmax over the whole vocabulary needs, a maximum and a sum, is carried from part to part. Gradients need the rows of some
tokens' labels besides, which are read for these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from wina_calib.calibration.layer_stream import Head, LayerStream, logit_rows
from wina_calib.common.progress import SILENT, Progress
from wina_calib.errors import NumericError
from wina_calib.storage.hidden_states import HiddenStates

_PART_SEED = 1_000_000_007  # sets the generators of a block's labels apart from part to part


@dataclass(frozen=True)
class Rise:
    """Measured quality of a sparse model against the dense one: rise of the loss and KL divergence, nats a token.

    `error` is the standard error of `loss`, by how blocks differ; None of one block.
    """

    loss: float
    kl: float
    error: float | None


@dataclass(frozen=True)
class Quality:
    """A sparse model against the dense one on some text."""

    dense_ppl: float  # perplexity of the dense model
    ppl: float  # of the sparse one
    kl: float  # mean KL divergence from the dense prediction, nats a token
    top1_agreement: float  # share of tokens where both predict the same next token
    tokens: int  # predicted tokens

    @classmethod
    def of(cls, sums: Tensor, tokens: int) -> Quality:
        """From `quality_sums` over so many predicted tokens."""
        dense, sparse, divergence, agreement = (sums / tokens).tolist()
        return cls(perplexity(dense), perplexity(sparse), divergence, agreement, tokens)

    @property
    def rise(self) -> float:
        """Perplexity over the dense model's, minus one."""
        return self.ppl / self.dense_ppl - 1


class _Softmax:
    """Logarithms of the softmax's denominators, (blocks, seq), and the logits of given labels, over all parts so far."""

    def __init__(self, labels: Tensor, device: torch.device) -> None:
        self.labels = labels.to(device)
        self.total = torch.full(labels.shape, -torch.inf, device=device)
        self.chosen = torch.zeros(labels.shape, device=device)

    def add(self, rows: tuple[int, slice], logits: Tensor, first: int) -> None:
        """See the logits (rows, part) of some tokens, of the vocabulary from `first` on."""
        self.total[rows] = torch.logaddexp(self.total[rows], logits.logsumexp(-1))
        labels = self.labels[rows] - first
        here = (labels >= 0) & (labels < logits.shape[1])
        own = logits.gather(1, labels.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.chosen[rows] = torch.where(here, own, self.chosen[rows])

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the labels, (blocks, seq)."""
        return self.total - self.chosen


def perplexity(loss: float) -> float:
    """Of a mean loss in nats a token; finite."""
    return math.exp(min(loss, 700.0))


def standard_error(rises: Tensor) -> float | None:
    """Of the mean of rises of the loss (blocks,), each of one block's tokens under both models; None of one block."""
    return float(rises.double().std() / math.sqrt(len(rises))) if len(rises) > 1 else None


@torch.no_grad()
def quality_sums(
    sparse: Tensor,
    dense: Tensor,
    labels: Tensor,
    sparse_head: Callable[[Tensor], Tensor],
    dense_head: Callable[[Tensor], Tensor],
    rows: int,
) -> Tensor:
    """Sums over tokens, float64 (4,): dense loss, sparse loss, KL divergence, agreement.

    Both decoders' outputs are (tokens, hidden), `labels` (tokens,) come next; heads take (1, rows, hidden), `rows` at a time.
    """
    out = torch.zeros(4, dtype=torch.float64)
    for s, d, target in zip(sparse.split(rows), dense.split(rows), labels.split(rows), strict=True):
        q, p = log_softmax(sparse_head(s[None])[0].float(), -1), log_softmax(dense_head(d[None])[0].float(), -1)
        parts = [
            -p.gather(1, target[:, None]).double().sum(),
            -q.gather(1, target[:, None]).double().sum(),
            kl_div(q, p, reduction="none", log_target=True).double().sum(),
            (p.argmax(-1) == q.argmax(-1)).double().sum(),
        ]
        out += torch.stack(parts).cpu()
    return out


@torch.no_grad()
def next_token_nll(stream: LayerStream, hidden: HiddenStates, progress: Progress = SILENT) -> Tensor:
    """Negative log-likelihood in nats of every predicted token, from the last layer's hidden states: (blocks, seq_len - 1)."""
    ids = _own_ids(stream)
    softmax = _Softmax(ids[:, 1:], stream.device)
    for first, head in stream.heads():
        for row, states in enumerate(states for batch in stream.mine for states in hidden[batch]):
            for rows in _chunks(stream, states[:-1]):
                softmax.add((row, rows), _logits(head, states[rows]), first)
        progress.step("lm_head")
    return torch.stack(stream.ranks.gather(list(softmax.nll.cpu())))


def loss_gradients(
    stream: LayerStream, last: HiddenStates, seed: int, progress: Progress = SILENT
) -> tuple[HiddenStates, HiddenStates]:
    """Gradients of the summed loss at the last hidden states: with labels sampled from the model, with the text's own.

    Both are the mean gradient of a logit under the model's own predictions, less the gradient of the label's logit.

    Raises:
        NumericError: logits are NaN or infinite.
    """
    gradients, sampled = _expected(stream, last, seed, progress)
    text = stream.store()
    for batch, drawn in zip(stream.mine, sampled.split(len(stream.batches[0])), strict=False):
        hidden, following = last[batch], stream.batches[batch].to(stream.device).roll(-1, 1)
        both = gradients[batch], gradients[batch].clone()
        for block, states in enumerate(hidden):
            for rows in _chunks(stream, states):
                labels = torch.stack([drawn[block, rows], following[block, rows]])
                for gradient, own in zip(both, _label_gradients(stream, states[rows], labels), strict=True):
                    gradient[block, rows] -= own
        both[1][:, -1] = 0  # nothing follows the last token
        gradients[batch], text[batch] = (gradient.to(hidden.dtype) for gradient in both)
        progress.step("")
    return gradients, text


@torch.no_grad()
def measured_rises(
    dense_stream: LayerStream,
    dense: HiddenStates,
    sparse_stream: LayerStream,
    sparse: Sequence[HiddenStates],
    progress: Progress = SILENT,
) -> list[Rise]:
    """Compare last hidden states of sparse models with the dense one's, on the blocks that both streams begin with."""
    ids, device = torch.cat(dense_stream.batches), dense_stream.device
    kept, masked = _Blocks(dense_stream, dense), [_Blocks(sparse_stream, states) for states in sparse]
    count, predicted = len(ids), ids.shape[1] - 1
    models = [_Softmax(ids[:, 1:], device) for _ in range(1 + len(sparse))]
    # Mean difference of dense and sparse logits under the dense model, as sums of exp(logit - highest so far).
    highest = torch.full((count, predicted), -torch.inf, device=device)
    sums = torch.zeros(1 + len(sparse), count, predicted, dtype=torch.float64, device=device)
    for first, head in dense_stream.heads():
        for block in range(count):
            expected = kept.everywhere(block)
            if not masked[0].has(block):
                continue
            states = [expected, *(state[block] for state in masked)]
            for rows in _chunks(dense_stream, expected[:-1]):
                here = block, rows
                logits = _logits(head, states[0][rows])
                models[0].add(here, logits, first)
                top = torch.maximum(highest[here], logits.amax(-1))
                sums[(slice(None), *here)] *= (highest[here] - top).exp().double()
                highest[here] = top
                weight = (logits - top[:, None]).exp_()
                sums[(0, *here)] += weight.sum(-1).double()
                for number, (model, state) in enumerate(zip(models[1:], states[1:], strict=True), 1):
                    other = _logits(head, state[rows])
                    model.add(here, other, first)
                    sums[(number, *here)] += ((logits - other).mul_(weight)).sum(-1).double()
        progress.step("lm_head")
    mine = [block for block in range(count) if masked[0].has(block)]
    parts = torch.stack(dense_stream.ranks.gather([_rise(models, sums, block).cpu() for block in mine])) / predicted
    means = parts.mean(0).tolist()
    return [Rise(loss, kl, standard_error(parts[:, number, 0])) for number, (loss, kl) in enumerate(means)]


def label_generator(seed: int, block: int, device: torch.device, part: int = 0) -> torch.Generator:
    """The generator of one block's labels: they do not depend on which process draws them."""
    return torch.Generator(device).manual_seed((seed + 1) * 1_000_003 + block + part * _PART_SEED)


def _expected(stream: LayerStream, last: HiddenStates, seed: int, progress: Progress) -> tuple[HiddenStates, Tensor]:
    """Of this process's tokens: mean gradient of a logit at the last hidden state; labels from the model, (blocks, seq).

    The mean is float32, over all parts of the vocabulary so far, and so is the softmax. The label is the one whose
    probability divided by a draw of its own from the exponential distribution is largest, which is how torch.multinomial
    draws too.
    """
    shape = _own_ids(stream).shape
    total, best = (torch.full(shape, -torch.inf, device=stream.device) for _ in range(2))
    labels = torch.zeros(shape, dtype=torch.int64, device=stream.device)
    extremes = torch.zeros(2, device=stream.device)
    means, size = stream.store(), len(stream.batches[0])
    for part, (first, head) in enumerate(stream.heads()):
        for batch in stream.mine:
            hidden = last[batch]
            mean = means[batch] if part else torch.zeros(hidden.shape, device=stream.device)
            for block, states in enumerate(hidden):
                generator = label_generator(seed, batch * size + block, stream.device, part)
                for rows in _chunks(stream, states):
                    here = (batch - stream.mine[0]) * size + block, rows
                    leaf = states[rows].detach()[None].requires_grad_()
                    output = head(leaf)[0].float()
                    logits = output.detach()
                    extremes = torch.maximum(extremes, torch.stack(torch.aminmax(logits)).abs())  # NaN stays
                    drawn = torch.empty_like(logits).exponential_(generator=generator).log_()
                    value, label = torch.sub(logits, drawn, out=drawn).max(-1)
                    labels[here] = torch.where(value > best[here], label + first, labels[here])
                    best[here] = torch.maximum(value, best[here])
                    now = torch.logaddexp(total[here], logits.logsumexp(-1))
                    share = torch.sub(logits, now[:, None], out=drawn).exp_()
                    (gradient,) = torch.autograd.grad(output, leaf, share)
                    mean[block, rows] *= (total[here] - now).exp()[:, None]
                    mean[block, rows] += gradient[0]
                    total[here] = now
            means[batch] = mean
        progress.step("lm_head")
    if not bool(torch.isfinite(extremes).all()):
        raise NumericError(f"the dense model's logits are NaN or infinite in {stream.dtype}. Try --dtype float32.")
    return means, labels


def _label_gradients(stream: LayerStream, states: Tensor, labels: Tensor) -> list[Tensor]:
    """Gradients (rows, hidden) of the logits of labels (kinds, rows) at states (rows, hidden), of each kind of labels."""
    known, places = torch.unique(labels, return_inverse=True)
    leaf = states.detach()[None].requires_grad_()
    with stream.head(known) as head:
        chosen = head(leaf)[0].float().gather(1, places.t()).sum(0)
        return [torch.autograd.grad(own, leaf, retain_graph=True)[0][0] for own in chosen]


def _rise(models: Sequence[_Softmax], sums: Tensor, block: int) -> Tensor:
    """Summed rise of the loss and KL divergence of a block, (sparse models, 2) float64."""
    dense = models[0]
    rises = []
    for model, total in zip(models[1:], sums[1:], strict=True):
        normal = (model.total[block] - dense.total[block]).double()
        loss = normal + (dense.chosen[block] - model.chosen[block]).double()
        rises.append(torch.stack([loss.sum(), (total[block] / sums[0, block] + normal).sum()]))
    return torch.stack(rises)


def _logits(head: Head, states: Tensor) -> Tensor:
    """Float32 logits (rows, part) of states (rows, hidden)."""
    return head(states[None])[0].float()


def _chunks(stream: LayerStream, states: Tensor) -> Iterator[slice]:
    """The rows of states (seq, hidden), a few at a time."""
    rows = logit_rows(stream.source.architecture, stream.dtype)
    return (slice(first, min(first + rows, len(states))) for first in range(0, len(states), rows))


def _own_ids(stream: LayerStream) -> Tensor:
    """This process's tokens (blocks, seq)."""
    mine = [stream.batches[batch] for batch in stream.mine]
    return torch.cat(mine) if mine else stream.batches[0][:0]


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
