"""The papers' block-wise greedy budgets (TEAL, arXiv 2408.14690, algorithm 1), computing only what a step changes.

In every layer all sites start at sparsity 0. A step raises one of them by an amount inverse to its size: the one after
which the layer's output, with all sparsities so far, is nearest to the dense one on the last part of each block. Every
layer ends at the same sparsity, and the path to it gives the budgets at all sparsities before.

The papers run the whole layer for every candidate of every step. Here a candidate reruns what comes after its site, on the
tokens that the error is measured on where that is enough, and a candidate is tried again only when its last known rise of
the error is the smallest (lazy evaluation: rises grow with sparsity, nearly).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from wina_calib.budgets.model import Floats
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.masked_layer import DenseRows, MaskedLayer, replayed
from wina_calib.common.progress import SILENT, Progress
from wina_calib.masks.histogram import ScoreHistogram
from wina_calib.masks.rule import MaskRule
from wina_calib.masks.thresholds import LEVELS
from wina_calib.model.architecture import SITES, Layer, MaskGroup, Site
from wina_calib.storage.hidden_states import HiddenStates
from wina_calib.storage.resume import NOT_SAVED, Phase

STEP = 0.05  # rise of a site as large as a square matrix of the hidden size
LAST_FRACTION = 0.25  # share of each block, its end, that the error is measured on
HIGHEST = 0.98
# A known rise may have shrunk by so much since. On 2,048 tokens all 1,144 steps of a 14 M model were the papers' with it, and
# 878 of the demo model's 882; the other four took a candidate whose rise was at most 1.2 times the smallest.
MARGIN = 1.2
_ATTN_IN, _ATTN_OUT, _MLP_IN, _MLP_OUT = SITES


@dataclass
class Cost:
    """Work of a search in passes of one layer over all tokens, and what the papers' algorithm needs for as many steps."""

    passes: float = 0.0
    reference: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class _Trial:
    """Error of a candidate, and the parts of the state that it changes."""

    error: float
    state: dict[str, HiddenStates]

    def clear(self) -> None:
        for store in self.state.values():
            store.clear()


@dataclass(frozen=True)
class GreedyBudget:
    """Site sparsities (anchors, layers, sites) and the work that they took."""

    rows: Floats
    cost: Cost


class _TailLayer(MaskedLayer):
    """A masked layer that can run on the last tokens of each block, where no row is a first token."""

    tail = False

    def mask_inputs(self, group: MaskGroup, x: Tensor, dense_rows: DenseRows = "first") -> Tensor:
        return super().mask_inputs(group, x, None if self.tail else dense_rows)

    @contextmanager
    def on_tail(self) -> Iterator[None]:
        self.tail = True
        try:
            yield
        finally:
            self.tail = False


@torch.no_grad()
def greedy(
    stream: LayerStream,
    rule: MaskRule,
    anchors: Sequence[float],
    *,
    lazy: bool = True,
    phase: Phase = NOT_SAVED,
    progress: Progress = SILENT,
) -> GreedyBudget:
    """Search every layer's site sparsities on the dense model's inputs.

    `anchors` are here those of every layer. A `lazy` search tries a candidate again only when it may be the best; else every
    step tries all.
    """
    arch = stream.source.architecture
    hidden, cost = stream.embed(), Cost(**phase.values)
    rows = np.zeros((len(anchors), len(arch.layers), len(SITES)))
    for name, value in phase.tensors().items():
        rows[:, int(name)] = value.numpy()
    stores = {"hidden": hidden}
    for (index, module), done in phase.each(stream.layers, stores, stream.blocks, progress):
        layer = arch.layers[index]
        following = stream.store()
        masked = _TailLayer(layer, module, rule, stream.rotations(index))
        with masked:
            search = _Search(stream, masked, hidden, cost)
            search.dense_pass(following)
            path = search.path(anchors[-1], lazy=lazy)
            search.clear()
        hidden.clear()
        stores["hidden"] = hidden = following
        rows[:, index] = np.stack([np.interp(anchors, path[:, 0], column) for column in path[:, 1:].T], axis=1)
        new = {str(index): torch.from_numpy(rows[:, index].copy())}
        done(f"greedy search of layer {index + 1}", tensors=new, values=asdict(cost))
    hidden.clear()
    return GreedyBudget(rows, cost)


@dataclass
class _Search:
    """The search in one layer.

    `state` holds, for the last tokens of each block, what the sparsities so far make: the inputs of `attn_out` and
    `mlp_out`, and `attended`, the attention block's output.
    """

    stream: LayerStream
    masked: _TailLayer
    hidden: HiddenStates
    cost: Cost
    tables: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, HiddenStates] = field(default_factory=dict)
    error: float = 0.0

    @property
    def layer(self) -> Layer:
        return self.masked.layer

    def dense_pass(self, following: HiddenStates) -> None:
        """Run the layer densely: outputs go to `following`; score quantiles and the state without masks are kept."""
        groups = [group for site in self.layer.sites for group in self.masked.groups[site.name]]
        histograms = {group.key: ScoreHistogram(self.stream.device) for group in groups}
        self.state = {name: self.stream.store() for name in ("target", _ATTN_OUT, "attended", _MLP_OUT)}
        seen: dict[str, Tensor] = {}
        rule = self.masked.rule

        def observe(site: str, x: Tensor) -> None:
            seen[site] = self._tail(x)
            for group in self.masked.groups[site]:
                self.masked.count(group, rule.masked_rows(x), histograms[group.key])

        self.masked.observe = observe
        for batch in self.stream.mine:
            out = self.masked.run(self.hidden[batch], self.stream.kwargs(self.layer.index, batch))
            following[batch] = out
            self.state["target"][batch] = self._tail(out).clone()
            for site in (_ATTN_OUT, _MLP_OUT):
                self.state[site][batch] = seen[site].clone()
            self.state["attended"][batch] = self._product(_ATTN_OUT, seen[_ATTN_OUT])
        self.masked.observe = None
        for histogram in histograms.values():
            self.stream.ranks.add(histogram.counts)
        self.tables = {key: histogram.quantiles(LEVELS).float() for key, histogram in histograms.items()}

    def path(self, sparsity: float, *, lazy: bool) -> Floats:
        """Sparsity of the layer and of its sites, (steps + 1, 1 + sites), from 0 until `sparsity` is reached."""
        sites = self.layer.sites
        sizes = np.array([site.weights for site in sites], dtype=np.float64)
        steps = STEP * self.stream.source.architecture.hidden_size**2 / sizes
        current = np.zeros(len(sites))
        path = [np.zeros(1 + len(sites))]
        rises: dict[int, float] = {}
        while path[-1][0] < sparsity:
            waiting = {i for i in range(len(sites)) if current[i] + steps[i] <= HIGHEST}
            best: tuple[int, _Trial] | None = None
            while waiting:
                candidate = min(waiting, key=lambda i: (rises.get(i, -np.inf), i))
                if lazy and best is not None and MARGIN * rises[best[0]] <= rises.get(candidate, -np.inf):
                    break
                waiting.remove(candidate)
                trial = self._try(sites[candidate], float(current[candidate] + steps[candidate]))
                rises[candidate] = trial.error**2 - self.error**2  # squares of unrelated errors add
                if best is None or rises[candidate] < rises[best[0]]:
                    best, trial = (candidate, trial), best[1] if best else _Trial(0.0, {})
                trial.clear()
            if best is None:
                break
            current[best[0]] += steps[best[0]]
            self._accept(sites[best[0]], float(current[best[0]]), best[1])
            path.append(np.array([sizes @ current / sizes.sum(), *current]))
            self.cost.steps += 1
            self.cost.reference += sum(len(site.projections) for site in sites)
        return np.array(path)

    def clear(self) -> None:
        """Free the space of the state."""
        for store in self.state.values():
            store.clear()

    def _try(self, site: Site, sparsity: float) -> _Trial:
        """The layer's output error with one site at another sparsity; only what comes after the site is computed."""
        position = SITES.index(site.name)
        changed = {_ATTN_IN: (_ATTN_OUT, "attended", _MLP_OUT), _ATTN_OUT: ("attended", _MLP_OUT), _MLP_IN: (_MLP_OUT,)}
        new = {name: self.stream.store() for name in changed.get(site.name, ())}
        before = dict(self.masked.cuts)
        self._set(site, sparsity)
        tried: list[tuple[float, int]] = []
        for batch in self.stream.mine:
            hidden, kwargs = self.hidden[batch], self.stream.kwargs(self.layer.index, batch)
            if _ATTN_OUT in new:
                new[_ATTN_OUT][batch] = self._tail(self.masked.input_of(_ATTN_OUT, hidden, kwargs)).clone()
            if "attended" in new:
                new["attended"][batch] = self._product(_ATTN_OUT, (self.state | new)[_ATTN_OUT][batch])
            attended = (self.state | new)["attended"][batch]
            with self.masked.on_tail(), self.masked.replay_attention(attended):
                if _MLP_OUT in new:
                    self.masked.observe = partial(_keep, new[_MLP_OUT], batch)
                    out = self.masked.run(self._tail(hidden), kwargs)
                    self.masked.observe = None
                else:
                    mlp = self.masked.module.get_submodule(self.layer.mlp)
                    with replayed(mlp, self._product(_MLP_OUT, self.state[_MLP_OUT][batch])):
                        out = self.masked.run(self._tail(hidden), kwargs)
            errors = (out - self.state["target"][batch]).float().norm(dim=1)
            tried.append((float(errors.double().sum()), errors.numel()))
        self.masked.cuts = before
        sizes = [s.weights for s in self.layer.sites]
        fraction = self._tail_length / self.stream.batches[0].shape[1]
        everywhere = sizes[0] if position == 0 else 0
        self.cost.passes += (everywhere + fraction * sum(sizes[max(position, 1) :])) / sum(sizes)
        tried = self.stream.ranks.gather(tried)
        return _Trial(sum(total for total, _ in tried) / sum(count for _, count in tried), new)

    def _accept(self, site: Site, sparsity: float, trial: _Trial) -> None:
        self._set(site, sparsity)
        for name, store in trial.state.items():
            self.state[name].clear()
            self.state[name] = store
        self.error = trial.error

    def _set(self, site: Site, sparsity: float) -> None:
        for group in self.masked.groups[site.name]:
            table, rule = self.tables[group.key], self.masked.rule
            self.masked.cuts[group.key] = rule.cut(table, sparsity, site.width, self.stream.device)

    def _product(self, site: str, x: Tensor) -> Tensor:
        """Output of a site with one projection for inputs on the last tokens, past the hooks."""
        (group,) = self.masked.groups[site]
        projection = self.masked.module.get_submodule(group.projections[0].module)
        with self.masked.on_tail():
            y: Tensor = projection.forward(self.masked.mask_inputs(group, x))
            return y

    @property
    def _tail_length(self) -> int:
        seq = self.stream.batches[0].shape[1]
        return seq - max(1, int(seq * (1 - LAST_FRACTION)))

    def _tail(self, x: Tensor) -> Tensor:
        return x[:, -self._tail_length :]


def _keep(store: HiddenStates, batch: int, site: str, x: Tensor) -> None:
    """An observer that stores the input of the MLP's last projection."""
    if site == _MLP_OUT:
        store[batch] = x
