"""The modules that make a loaded model sparse: a state for every site, and linear layers that ask it for their product.

A decoder layer calls q, k and v one after another with the same input. The first call computes what all of a mask group's
projections give, the others take their part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from wina_calib.families import MaskGroup, Site
from wina_calib.runtime.state import RuntimeState, SiteCount
from wina_calib.score import keep_mask
from wina_calib.settings import Settings
from wina_calib.tables import LEVELS, site_sparsity, threshold_between


class Float32Buffers(nn.Module):
    """Keeps floating-point buffers in float32 when the model is cast; rotations follow the model."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype and name != "rotation":
                self._buffers[name] = before.to(after.device)
        return self


class GroupState(Float32Buffers):
    """Norm (in,), threshold () and quantile tables (anchors, levels) of one mask group."""

    norm: Tensor
    threshold: Tensor
    table: Tensor

    def __init__(self, width: int, anchors: int) -> None:
        super().__init__()
        self.register_buffer("norm", torch.ones(width, dtype=torch.float32))
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.register_buffer("table", torch.zeros(anchors, len(LEVELS), dtype=torch.float32))


class SiteState(Float32Buffers):
    """One site of a loaded model: what calibration stored for it, and the sparse product of its projections."""

    budget: Tensor

    def __init__(
        self, layer: int, site: Site, settings: Settings, state: RuntimeState, rotation_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        anchors = len(settings.anchors)
        self.layer, self.site, self.settings, self.state = layer, site, settings, state
        self.groups: tuple[MaskGroup, ...] = settings.rule.groups(site)
        self.register_buffer("budget", torch.zeros(anchors, dtype=torch.float32))
        self.register_buffer("error", torch.zeros(anchors, dtype=torch.float32))
        if settings.curve_levels:
            self.register_buffer("curve", torch.zeros(len(settings.curve_levels), dtype=torch.float32))
        if rotation_dtype is not None:
            self.register_buffer("rotation", torch.zeros(site.width, site.width, dtype=rotation_dtype))
        for group in self.groups:
            self.add_module(group.name, GroupState(site.width, anchors))
        self.asked = float("nan")
        self._seen: Tensor | None = None
        self._masked: dict[str, Tensor] = {}

    def group(self, name: str) -> GroupState:
        """State of a mask group: `shared` or a projection's name."""
        return self._modules[name]  # type: ignore[return-value]

    def set_sparsity(self, model_sparsity: float, sparsity: float | None = None) -> float:
        """Set the thresholds for a model sparsity; the site's own comes from its budget unless given.

        Returns:
            the site's sparsity.
        """
        anchors = self.settings.anchors
        own = site_sparsity(anchors, self.budget.cpu().numpy(), model_sparsity) if sparsity is None else sparsity
        for group in self.groups:
            state = self.group(group.name)
            state.threshold.fill_(threshold_between(state.table.cpu(), anchors, model_sparsity, own))
        self.asked = own
        return own

    def product(self, projection: SparseLinear, x: Tensor) -> Tensor:
        """Output (..., out) of one projection for the site's input x (..., in)."""
        group = self.group(projection.group)
        first = projection.leads
        if first or self._seen is not x:
            self._seen, self._masked = x, {}
        inputs = self._masked.get(projection.group)
        if inputs is None:
            inputs = self._masked[projection.group] = self._mask(group, x)
        if projection.ends:
            self._seen, self._masked = None, {}
        return linear(inputs, projection.weight, projection.bias)

    def _mask(self, group: GroupState, x: Tensor) -> Tensor:
        rotation = self._buffers.get("rotation")
        turned = x if rotation is None else x @ rotation.to(x.dtype)
        if self.state.all_dense:
            return turned
        dense_rows = self.state.dense_rows
        if dense_rows is not None and dense_rows.shape != x.shape[:-1]:
            dense_rows = dense_rows.reshape(x.shape[:-1]) if dense_rows.numel() == x.shape[:-1].numel() else None
        keep = keep_mask(turned, group.norm, group.threshold, self.settings.score, dense_rows)
        if self.state.counts is not None:
            count = self.state.counts.setdefault((self.layer, self.site.name), SiteCount())
            count.seen += keep.numel()
            count.dropped += keep.numel() - int(keep.sum())
        return turned.masked_fill(~keep, 0)


class SparseLinear(nn.Linear):
    """A projection of a sparse site. Saves and loads as the linear layer that it replaces."""

    site: SiteState

    def __init__(self, dense: nn.Linear, site: SiteState, group: MaskGroup, position: int) -> None:
        with torch.device("meta"):
            super().__init__(dense.in_features, dense.out_features, bias=dense.bias is not None)
        self.weight, self.bias = dense.weight, dense.bias
        self.__dict__["site"] = site  # a neighbour, not a child: its buffers belong to the layer's `wina` module
        self.group = group.name
        projections = [p for g in site.groups for p in g.projections]
        self.leads = group.projections[position] is projections[0]
        self.ends = group.projections[position] is projections[-1]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear uses
        """Sparse product of the site's input (..., in) and this projection: (..., out)."""
        return self.site.product(self, input)


def site_states(model: nn.Module) -> list[SiteState]:
    """All sites of a loaded sparse model in order."""
    return [module for module in model.modules() if isinstance(module, SiteState)]


def model_weighted(sites: Sequence[SiteState], values: Sequence[float]) -> float:
    """Weight-averaged value over sites: site sparsities give the model sparsity."""
    weights = [s.site.weights for s in sites]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
