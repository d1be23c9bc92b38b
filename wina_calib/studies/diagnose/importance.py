"""Whether column norms tell which inputs matter: rank correlations with what dropping an input does.

Dropping input j of a mask group for every token costs `c_j^2 E[x_j^2]` of the output, exactly, and raises the loss by
`E[(g_j x_j)^2] / 2` to second order, with g the loss's gradient (see `calibration.loss_curves`). For a sample of inputs the
KL divergence is measured as well, with that input really dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from wina_calib.calibration.compute import Compute
from wina_calib.calibration.layer_stream import Head, LayerStream
from wina_calib.calibration.loss_curves import measure_curves
from wina_calib.checkpoint.dequantized import weights_of
from wina_calib.common.progress import SILENT, Progress
from wina_calib.common.text import table
from wina_calib.masks.score import column_norms
from wina_calib.model.architecture import SITES, MaskGroup, Site
from wina_calib.runtime.load import runtime_state
from wina_calib.studies.defaults import DIAGNOSE_INPUTS
from wina_calib.studies.diagnose.subject import Subject

DROPPED = "inputs dropped one by one"
_KL_TOKENS = 256
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GroupImportance:
    """Rank correlations (Spearman) over the inputs of one mask group."""

    layer: int  # index of the decoder layer
    site: str  # name of the site
    group: str  # `shared`, or the projection that has a mask of its own
    norm_output: float  # column norm with the output's error when an input is dropped
    norm_loss: float  # column norm with the predicted rise of the loss
    magnitude_loss: float  # mean magnitude with it
    product_loss: float  # mean magnitude times column norm with it


@dataclass(frozen=True)
class DroppedInput:
    """One input dropped for every token."""

    layer: int  # index of the decoder layer
    site: str  # name of the site
    input: int  # its index
    norm: float  # its column norm
    magnitude: float  # its mean magnitude
    predicted: float  # predicted rise of the loss, nats a token
    kl: float  # measured KL divergence, nats a token


@dataclass(frozen=True)
class Importance:
    """What norms tell of importance."""

    tokens: int  # tokens of statistics and gradients
    groups: tuple[GroupImportance, ...]  # correlations of every mask group
    dropped: tuple[DroppedInput, ...]  # inputs that were really dropped; empty where inputs are rotated at run time
    kl_tokens: int  # tokens that each of them was measured on

    def measured(self) -> dict[str, dict[str, float]]:
        """Rank correlations with the measured KL divergence over the dropped inputs: of each site, and `all`."""
        correlations = {}
        for name in (*SITES, "all"):
            rows = [d for d in self.dropped if name in (d.site, "all")]
            if len(rows) > 2:
                kl = [d.kl for d in rows]
                correlations[name] = {
                    "norm": spearman([d.norm for d in rows], kl),
                    "magnitude": spearman([d.magnitude for d in rows], kl),
                    "product": spearman([d.magnitude * d.norm for d in rows], kl),
                    "predicted": spearman([d.predicted for d in rows], kl),
                }
        return correlations

    def text(self) -> str:
        """Tables for people."""
        names = ["norm_output", "norm_loss", "magnitude_loss", "product_loss"]
        rows = [
            [str(g.layer), g.site if g.group == "shared" else f"{g.site}.{g.group}"]
            + [f"{getattr(g, name):+.2f}" for name in names]
            for g in self.groups
        ]
        headers = ["layer", "site", "norm, output error", "norm, loss", "magnitude, loss", "magnitude x norm, loss"]
        parts = [
            f"importance, {self.tokens:,} tokens: rank correlations over the inputs of a site with what dropping one does",
            table(headers, rows),
        ]
        measured = self.measured()
        if measured:
            lines = [[site, *(f"{v:+.2f}" for v in own.values())] for site, own in measured.items()]
            parts += [
                f"{len(self.dropped)} inputs dropped one by one, {self.kl_tokens} tokens: rank correlations with the "
                "measured KL divergence",
                table(["site", "norm", "magnitude", "magnitude x norm", "predicted loss"], lines),
            ]
        return "\n\n".join(parts)


def spearman(one: Sequence[float] | Floats, other: Sequence[float] | Floats) -> float:
    """Rank correlation of two series, equal values at their mean rank; NaN where one does not vary."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (one, other)]
    if any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def importance(
    subject: Subject, *, inputs: int = DIAGNOSE_INPUTS, seed: int = 0, progress: Progress = SILENT
) -> Importance:
    """Correlate column norms with the importance of inputs.

    So many `inputs` of every site are dropped one by one, spread evenly over their predicted ranks; 0 for none.
    """
    arch, rule = subject.opened.architecture, subject.opened.settings.rule
    source = weights_of(subject.opened, verified=True)
    ids = subject.blocks.ids
    sums: dict[tuple[int, MaskGroup], _Sums] = {}

    def observe(layer: int, group: MaskGroup, x: Tensor, g: Tensor) -> None:
        sums.setdefault((layer, group), _Sums()).add(x.flatten(0, 1), g.flatten(0, 1))

    stream = LayerStream(source, ids, Compute(subject.device, subject.dtype))
    measure_curves(stream, rule, seed=seed, progress=progress, observe=observe)
    if inputs:
        progress.phase(DROPPED, len(arch.layers))
    groups: list[GroupImportance] = []
    dropped: list[DroppedInput] = []
    free = not any(source.rotations(layer.index) for layer in arch.layers)
    for layer in arch.layers:
        tensors = source.load_layer(layer.index)
        for site in layer.sites:
            figures = {}
            for group in rule.groups(site):
                norm = column_norms(tensors[f"{p.module}.weight"] for p in group.projections).double().numpy()
                figures[group.name] = own = sums[layer.index, group].figures(norm)
                groups.append(own.correlations(layer.index, site.name, group.name))
            if inputs and free:
                dropped += _drop_some(subject, layer.index, site, figures, inputs)
        if inputs:
            progress.step(f"layer {layer.index + 1}")
    return Importance(ids.numel() - len(ids), tuple(groups), tuple(dropped), _kl_ids(subject).numel() - 1)


@dataclass(frozen=True)
class _Figures:
    """Of every input (in,): column norm, mean magnitude, squared output error, predicted rise of the loss."""

    norm: Floats
    magnitude: Floats
    output: Floats
    loss: Floats

    def correlations(self, layer: int, site: str, group: str) -> GroupImportance:
        return GroupImportance(
            layer=layer,
            site=site,
            group=group,
            norm_output=spearman(self.norm, self.output),
            norm_loss=spearman(self.norm, self.loss),
            magnitude_loss=spearman(self.magnitude, self.loss),
            product_loss=spearman(self.magnitude * self.norm, self.loss),
        )


class _Sums:
    """Sums over tokens of a mask group's inputs: magnitude, square, squared product with the gradient; float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: Tensor | None = None

    def add(self, x: Tensor, g: Tensor) -> None:
        x, g = x.float(), g.float()
        sums = torch.stack([x.abs().double().sum(0), x.double().square().sum(0), (g * x).double().square().sum(0)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.rows += len(x)

    def figures(self, norm: Floats) -> _Figures:
        assert self.sums is not None
        magnitude, square, product = (self.sums / self.rows).cpu().numpy()
        return _Figures(norm, magnitude, norm**2 * square, product / 2)


def _drop_some(
    subject: Subject, layer: int, site: Site, figures: dict[str, _Figures], inputs: int
) -> Iterator[DroppedInput]:
    """Drop some inputs of a site, for all that read it, and measure the KL divergence of each."""
    loss = np.sum([own.loss for own in figures.values()], axis=0)
    norm = np.sqrt(np.sum([own.norm**2 for own in figures.values()], axis=0))
    magnitude = next(iter(figures.values())).magnitude
    order = np.argsort(loss, kind="stable")
    chosen = sorted({int(order[i]) for i in np.linspace(0, len(order) - 1, inputs).round().astype(int)})
    for index, kl in zip(chosen, dropping_kl(subject, layer, site, chosen), strict=True):
        yield DroppedInput(layer, site.name, index, float(norm[index]), float(magnitude[index]), float(loss[index]), kl)


@torch.no_grad()
def dropping_kl(subject: Subject, layer: int, site: Site, inputs: Sequence[int]) -> list[float]:
    """KL divergence from the dense prediction, nats a token, with one input of a site set to zero for every token.

    The first block of the text is used.
    """
    model, ids = subject.model, _kl_ids(subject)
    rows = ids[None].expand(len(inputs) + 1, -1)
    module = model.get_submodule(subject.opened.architecture.layers[layer].prefix.removesuffix("."))
    with runtime_state(model).densely(), _zeroed(module, site, inputs):
        states = model.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state[:, :-1]
    head = Head(model, model.get_decoder())
    dense, *others = (log_softmax(head(row[None])[0].float(), dim=-1) for row in states)
    return [float(kl_div(q, dense, reduction="none", log_target=True).double().sum(-1).mean()) for q in others]


@contextmanager
def _zeroed(module: nn.Module, site: Site, inputs: Sequence[int]) -> Iterator[None]:
    """Row i + 1 of a batch reads the site without input `inputs[i]`; the first row reads it whole."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        for row, index in enumerate(inputs):
            x[row + 1, :, index] = 0
        return (x, *args[1:])

    with ExitStack() as hooks:
        for projection in site.projections:
            hooks.enter_context(module.get_submodule(projection.module).register_forward_pre_hook(hook))
        yield


def _kl_ids(subject: Subject) -> Tensor:
    return subject.blocks.ids[0, :_KL_TOKENS].to(subject.model.device)


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum().astype(np.float64)
    mean: Floats = last - (counts - 1) / 2
    return mean[inverse]
