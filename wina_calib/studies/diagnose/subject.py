"""A loaded checkpoint under examination: its thresholds can be put aside and back, and its layers watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wina_calib.checkpoint.reader import Checkpoint
from wina_calib.common.progress import SILENT, Progress
from wina_calib.corpus.blocks import Blocks
from wina_calib.masks.mask import KEEP_ALL
from wina_calib.recovery.hidden import layer_outputs
from wina_calib.runtime.load import runtime_state, set_sparsity, sparse_sites
from wina_calib.runtime.modules import SiteState
from wina_calib.runtime.state import SiteCount
from wina_calib.studies.evaluate import Measured, block_sums


@dataclass(frozen=True)
class Subject:
    """A checkpoint, its loaded model, and the text it is measured on."""

    opened: Checkpoint
    model: PreTrainedModel
    blocks: Blocks
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of one site by mask group, and the site sparsity that they are meant for."""

    sparsity: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Watched:
    """What masks do to a model."""

    quality: Measured  # as `evaluate` measures it
    layers: tuple[float, ...]  # relative error `||h - dense h|| / ||dense h||` of the hidden states after each layer


def thresholds_at(model: PreTrainedModel, sparsity: float) -> list[Thresholds]:
    """Set a model sparsity, and return the thresholds of every site that it gives."""
    set_sparsity(model, sparsity)
    return [
        Thresholds(site.asked, {g.name: float(site.group(g.name).threshold) for g in site.groups})
        for site in sparse_sites(model)
    ]


def put(model: PreTrainedModel, thresholds: Sequence[Thresholds]) -> None:
    """Set the thresholds of every site."""
    for site, own in zip(sparse_sites(model), thresholds, strict=True):
        site.set_thresholds(own.sparsity, own.values)


def only(sites: Sequence[SiteState], thresholds: Sequence[Thresholds], layer: int) -> list[Thresholds]:
    """The thresholds of one layer's sites, and none elsewhere."""
    return [
        own if site.layer == layer else Thresholds(0.0, dict.fromkeys(own.values, KEEP_ALL))
        for site, own in zip(sites, thresholds, strict=True)
    ]


@torch.no_grad()
def watch(
    subject: Subject, variants: Mapping[str, Sequence[Thresholds]], progress: Progress = SILENT
) -> dict[str, Watched]:
    """Run the text densely and with each variant's thresholds, and compare hidden states after every layer.

    Afterwards the model has the last variant's thresholds.
    """
    model, blocks = subject.model, subject.blocks
    sites, state = sparse_sites(model), runtime_state(model)
    sums = {name: _Sums(len(subject.opened.architecture.layers)) for name in variants}
    layers = model.get_submodule(subject.opened.architecture.layers_path).children()
    with layer_outputs(layers) as outputs:

        def run(ids: Tensor) -> tuple[list[Tensor], Tensor]:
            outputs.clear()
            last = model.get_decoder()(input_ids=ids[None, :-1], use_cache=False).last_hidden_state
            return list(outputs), last

        for index, ids in enumerate(blocks.ids.to(model.device)):
            with state.densely():
                dense, end = run(ids)
            for name, thresholds in variants.items():
                put(model, thresholds)
                with state.counting() as counts:
                    sparse, last = run(ids)
                sums[name].add(counts, block_sums(model, end, last, ids), dense, sparse)
            progress.step(f"block {index + 1}")
    return {name: own.result(sites, blocks) for name, own in sums.items()}


class _Sums:
    """Sums of one variant over blocks."""

    def __init__(self, layers: int) -> None:
        self._quality = torch.zeros(4, dtype=torch.float64)
        self._error, self._whole = (torch.zeros(layers, dtype=torch.float64) for _ in range(2))
        self._counts: dict[tuple[int, str], SiteCount] = {}

    def add(
        self,
        counts: Mapping[tuple[int, str], SiteCount],
        quality: Tensor,
        dense: Sequence[Tensor],
        sparse: Sequence[Tensor],
    ) -> None:
        for key, count in counts.items():
            own = self._counts.setdefault(key, SiteCount())
            own.seen, own.dropped = own.seen + count.seen, own.dropped + count.dropped
        self._quality += quality
        pairs = [(d.float(), s.float()) for d, s in zip(dense, sparse, strict=True)]
        self._error += torch.stack([(s - d).square().sum(dtype=torch.float64) for d, s in pairs]).cpu()
        self._whole += torch.stack([d.square().sum(dtype=torch.float64) for d, _ in pairs]).cpu()

    def result(self, sites: Sequence[SiteState], blocks: Blocks) -> Watched:
        quality = Measured.from_sums(self._quality, self._counts, sites, blocks)
        return Watched(quality, tuple((self._error / self._whole).sqrt().tolist()))
