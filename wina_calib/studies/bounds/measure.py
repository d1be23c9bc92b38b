"""The paper's error bounds beside the measured errors, for every site of a model, with and without orthogonal columns.

The dense and the sparse model run side by side, one layer in memory at a time. Each site's inputs in both give what its own
mask costs (Lemma 3.1 against the measured error) and what has accumulated by then (Theorem 3.2 against the measured error).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from wina_calib.calibration.compute import Compute
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.masked_layer import DenseRows, MaskedLayer
from wina_calib.checkpoint.dequantized import weights_of
from wina_calib.checkpoint.reader import Checkpoint, open_any, open_checkpoint
from wina_calib.common.bars import Hearing, hearing
from wina_calib.common.devices import pick_device, pick_dtype
from wina_calib.common.progress import Estimate, Part
from wina_calib.common.text import percent, table
from wina_calib.corpus.sources import Data, data_specs
from wina_calib.errors import UsageError
from wina_calib.masks.mask import Cut, kept_inputs
from wina_calib.masks.rule import MaskRule
from wina_calib.masks.thresholds import site_sparsity, threshold_between
from wina_calib.model.architecture import Layer, MaskGroup
from wina_calib.model.locate import resolve
from wina_calib.model.source import Source, fitting_length, source_of
from wina_calib.studies.bounds.lemmas import accumulated_bound, column_lengths, theoretical_error
from wina_calib.studies.bounds.transformed_source import see_through
from wina_calib.studies.defaults import BOUNDS_TOKENS, BOUNDS_TRANSFORMS
from wina_calib.studies.evaluate import evaluation_blocks

_SEQ_LEN = 512
_ROUNDING = 1e-5
_NOTHING = 1e-12

Cuts = Callable[[Layer], Mapping[str, Cut]]


@dataclass(frozen=True)
class SiteBound:
    """Squared errors of one mask group, summed over tokens, as shares of the dense output's square `||W x||^2`."""

    layer: int  # index of the decoder layer
    site: str  # name of the site
    group: str  # `shared`, or the projection that has a mask of its own
    sparsity: float  # share of inputs dropped
    theory: float  # Lemma 3.1, `sum_j x_j^2 c_j^2` over dropped inputs: what the mask costs if columns are orthogonal
    measured: float  # `||W (x - masked x)||^2`, what it costs
    inherited: float  # `||W (x - dense x)||^2`, what masks before this site cost here
    # Theorem 3.2, `(sqrt(inherited) + sqrt(theory))^2`; a bound on `accumulated` if columns are orthogonal
    bound: float
    accumulated: float  # `||W (masked x) - W (dense x)||^2`, what all masks so far cost

    @property
    def cross(self) -> float:
        """The cross term `sum_{i != j} d_i d_j W_i . W_j`: what is measured beyond the lemma, for want of orthogonality."""
        return self.measured - self.theory

    @property
    def cross_share(self) -> float:
        """The cross term over the lemma's value; 0 where what is dropped is nothing but rounding."""
        return self.cross / self.theory if self.theory > _NOTHING else 0.0

    @property
    def holds(self) -> bool:
        """Whether the theorem's bound holds, up to rounding."""
        return self.accumulated <= self.bound * (1 + _ROUNDING)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"cross": self.cross, "cross_share": self.cross_share, "holds": self.holds}


@dataclass(frozen=True)
class ModelBounds:
    """Bounds and errors of every site of a model under one transform."""

    model: str  # name as given
    transform: str  # resolved transform
    score: str  # how inputs are scored
    masks: str  # one mask a site or one a projection
    select: str  # `thresholds` of a calibrated checkpoint, or each token's `top-k` as in the paper
    sparsity: float  # model sparsity asked for
    tokens: int  # tokens measured; first tokens of blocks are never masked and not among them
    sites: tuple[SiteBound, ...]  # one entry a mask group, in order of the layers

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"sites": [site.to_dict() for site in self.sites]}


def model_bounds(
    model: str | Path,
    *,
    transforms: Sequence[str] | None = None,
    sparsity: float | None = None,
    score: str | None = None,
    masks: str | None = None,
    data: Data = None,
    tokens: int = BOUNDS_TOKENS,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    progress: Hearing = None,
) -> list[ModelBounds]:
    """Compare bounds and measured errors at every site.

    A calibrated checkpoint is measured as it is, with its own masks. A model folder gets each token's top k, the setting of
    the paper's lemma, with the same sparsity at every site, once under each transform.

    Args:
        model: a model folder, a calibrated checkpoint, a Hub id or `demo`.
        transforms: transforms to try on a model folder; `BOUNDS_TRANSFORMS` by default.
        sparsity: model sparsity; the calibrated one, or 0.5 by default.
        score: `wina` (default) or another of `choices.SCORES`; for a model folder.
        masks: `shared` (default) or `per-projection`; for a model folder.
        data: text, as for `calibrate`.
        tokens: tokens of text to use.
        device: compute device.
        dtype: compute dtype; cross terms of 16-bit products hold rounding errors too.
        revision: branch, tag or commit on the Hub.
        progress: as `wina_calib.common.bars.hearing` takes it; hears of the layers of all transforms.

    Raises:
        UsageError: an option is out of range or does not go with a calibrated checkpoint.
        WinaError: model or text cannot be used.
    """
    if tokens < 2 or (sparsity is not None and not 0.0 <= sparsity < 1.0):
        raise UsageError(f"tokens is {tokens} and sparsity {sparsity}; expected at least 2, and a number in [0, 1).")
    folder, commit = resolve(model, revision=revision)
    read = open_any(folder)
    opened = open_checkpoint(read) if read.is_calibrated else None
    if opened is not None and (transforms or score or masks):
        raise UsageError(
            f"{model} is calibrated: its transform, score and masks are fixed. Give the base model to vary them."
        )
    source = source_of(read, str(model), commit) if opened is None else weights_of(opened)
    place = pick_device(device)
    names = tuple(transforms or BOUNDS_TRANSFORMS)
    total = len(source.architecture.layers) * (len(names) if opened is None else 1)
    with hearing(progress) as report:
        run = _Run(
            source=source,
            name=str(model),
            ids=evaluation_blocks(data_specs(data), source.tokenizer(), tokens, fitting_length(source, _SEQ_LEN)).ids,
            device=place,
            dtype=pick_dtype(dtype, source.dtype, place),
            tell=lambda: report.step("layer"),
        )
        report.planned(Estimate((Part("bounds", total),)))
        report.phase("bounds", total)
        if opened is not None:
            return [run.calibrated(opened, sparsity)]
        share = 0.5 if sparsity is None else sparsity
        return [run.under(name, share, score or "wina", masks or "shared") for name in names]


def render(results: Sequence[ModelBounds]) -> str:
    """The bounds as text."""
    return "\n\n".join(map(_render_one, results))


def _render_one(result: ModelBounds) -> str:
    rows = [
        [
            str(s.layer),
            s.site if s.group == "shared" else f"{s.site}.{s.group}",
            percent(s.sparsity),
            *(f"{value:.4f}" for value in (s.theory, s.measured)),
            f"{s.cross_share:+.1%}",
            *(f"{value:.4f}" for value in (s.inherited, s.bound, s.accumulated)),
            "yes" if s.holds else "no",
        ]
        for s in result.sites
    ]
    headers = [
        "layer", "site", "sparsity", "lemma 3.1", "measured", "cross", "inherited", "theorem 3.2", "accumulated", "holds",
    ]  # fmt: skip
    cross: dict[str, list[float]] = {}
    for site in result.sites:
        cross.setdefault(f"{site.site}.{site.group}", []).append(abs(site.cross_share))
    means = ", ".join(f"{name.removesuffix('.shared')} {sum(v) / len(v):.2%}" for name, v in cross.items())
    held = sum(site.holds for site in result.sites)
    return (
        f"{result.model}, transform {result.transform}: {result.score} scores, {result.masks} masks, {result.select}, "
        f"{result.tokens:,} tokens\n\n{table(headers, rows)}\n\n"
        "Squared errors over the dense output's square. `cross` is what non-orthogonal columns add to the lemma's value.\n"
        f"mean size of the cross term: {means}; the theorem's bound holds at {held} of {len(result.sites)}"
    )


@dataclass(frozen=True)
class _Run:
    """What the measurements of one model share."""

    source: Source
    name: str
    ids: Tensor
    device: torch.device
    dtype: torch.dtype
    tell: Callable[[], None]

    def calibrated(self, opened: Checkpoint, sparsity: float | None) -> ModelBounds:
        settings = opened.settings
        asked = settings.sparsity if sparsity is None else sparsity

        def cuts(layer: Layer) -> dict[str, Cut]:
            cut_by_group: dict[str, Cut] = {}
            for site in layer.sites:
                stored = opened.site(layer, site)
                own = site_sparsity(settings.anchors, stored.budget.numpy(), asked)
                for group in settings.rule.groups(site):
                    value = threshold_between(stored.tables[group.name], settings.anchors, asked, own)
                    chosen = stored.thresholds[group.name] if sparsity is None else torch.tensor(value)
                    top = settings.select == "topk"
                    cut_by_group[group.key] = (
                        kept_inputs(site.width, own) if top else chosen.to(self.device, torch.float32)
                    )
            return cut_by_group

        return self._result(settings.rule, asked, self._measure(self.source, settings.rule, cuts))

    def under(self, transform: str, share: float, score: str, masks: str) -> ModelBounds:
        source = see_through(self.source, transform, self.ids, device=self.device, dtype=self.dtype)
        rule = MaskRule(score, masks, transform=source.transform, select="topk")

        def cuts(layer: Layer) -> dict[str, Cut]:
            groups = (group for site in layer.sites for group in rule.groups(site))
            return {group.key: kept_inputs(group.projections[0].in_features, share) for group in groups}

        return self._result(rule, share, self._measure(source, rule, cuts))

    def _result(self, rule: MaskRule, sparsity: float, sites: tuple[SiteBound, ...]) -> ModelBounds:
        tokens, select = len(self.ids) * (self.ids.shape[1] - 1), "top-k" if rule.select == "topk" else "thresholds"
        return ModelBounds(self.name, rule.transform, rule.score, rule.masks, select, sparsity, tokens, sites)

    @torch.no_grad()
    def _measure(self, source: Source, rule: MaskRule, cuts: Cuts) -> tuple[SiteBound, ...]:
        arch = source.architecture
        stream = LayerStream(source, self.ids, Compute(self.device, self.dtype))
        dense, sparse = stream.embed(), stream.store()
        sparse.copy_from(dense)
        bounds: list[SiteBound] = []
        for index, module in stream.layers():
            with _Watched(arch.layers[index], module, rule, stream.rotations(index)) as layer:
                layer.cuts = dict(cuts(arch.layers[index]))
                sums = {group: _Sums(layer.weights(group)) for groups in layer.groups.values() for group in groups}
                for batch in range(len(stream.batches)):
                    kwargs = stream.kwargs(index, batch)
                    dense[batch], reads = layer.watch(dense[batch], kwargs, sparse=False)
                    sparse[batch], masked = layer.watch(sparse[batch], kwargs, sparse=True)
                    for group, own in sums.items():
                        own.add(reads[group][0], *masked[group])
                bounds += [own.bound(index, group) for group, own in sums.items()]
            self.tell()
        return tuple(bounds)


class _Watched(MaskedLayer):
    """Keeps what every mask group reads, and what of it passes: all, or what the masks let through."""

    sparse = False

    def __enter__(self) -> _Watched:
        super().__enter__()
        return self

    def watch(
        self, hidden: Tensor, kwargs: Mapping[str, Any], *, sparse: bool
    ) -> tuple[Tensor, dict[MaskGroup, tuple[Tensor, Tensor]]]:
        """Run the layer; return its output, and of each group what it reads and what passes, (batch, seq, width) each."""
        self.sparse, self.seen = sparse, dict[MaskGroup, tuple[Tensor, Tensor]]()
        return self.run(hidden, kwargs), self.seen

    def mask_inputs(self, group: MaskGroup, x: Tensor, dense_rows: DenseRows = "first") -> Tensor:
        kept = super().mask_inputs(group, x, dense_rows) if self.sparse else x
        self.seen[group] = (x, kept)
        return kept


class _Sums:
    """Sums of squares over tokens for one mask group, in float64."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = [weight.float() for weight in weights]
        self._norms = column_lengths(torch.cat(list(weights)))
        self._sums = torch.zeros(5, dtype=torch.float64, device=self._norms.device)
        self._dropped = self._inputs = 0

    def add(self, dense: Tensor, x: Tensor, kept: Tensor) -> None:
        """Add a micro-batch: the group's inputs in the dense model, in the sparse one, and what of these passes."""
        y, x, kept = (t[:, 1:].flatten(0, 1).float() for t in (dense, x, kept))
        own, before = x - kept, x - y
        self._dropped += int((kept == 0).sum())
        self._inputs += kept.numel()
        self._sums[0] += theoretical_error(self._norms, own.double()).sum()
        for weight in self._weights:
            v, u, whole = linear(own, weight), linear(before, weight), linear(y, weight)
            self._sums[1:] += torch.stack([t.double().square().sum() for t in (v, u, u - v, whole)])

    def bound(self, layer: int, group: MaskGroup) -> SiteBound:
        """The sums as shares of the dense output's square."""
        *errors, whole = self._sums.tolist()
        theory, measured, inherited, accumulated = (error / whole if whole else 0.0 for error in errors)
        return SiteBound(
            layer=layer,
            site=group.site,
            group=group.name,
            sparsity=self._dropped / max(1, self._inputs),
            theory=theory,
            measured=measured,
            inherited=inherited,
            bound=accumulated_bound(inherited, theory),
            accumulated=accumulated,
        )
