"""A decoder layer run with masks on its sites' inputs, as far as a chosen site, for calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from wina_calib.common.memory import Growth
from wina_calib.masks.histogram import ScoreHistogram
from wina_calib.masks.mask import Cut, mask_inputs, rows_together
from wina_calib.masks.rule import MaskRule
from wina_calib.masks.score import scores
from wina_calib.model.architecture import Layer, MaskGroup, Projection, Site
from wina_calib.quantization.formats import Quantized
from wina_calib.runtime.kernels import dispatch

# Rows that are never masked: (...) bool, none, or the first token of each sequence as the rule says.
DenseRows = Tensor | Literal["first"] | None
# Sees a site's name and its input (batch, seq, width), rotated, not masked.
Observe = Callable[[str, Tensor], None]


class _Stop(Exception):
    """Carries the input of the site at which a run ends."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class MaskedLayer:
    """One loaded decoder layer with hooks on its projections; a context manager that always removes them.

    Args:
        layer: the layer's description.
        module: the layer with its weights.
        rule: how masks are made.
        rotations: run-time matrices (width, width) by site name: `x' = x @ rotation` before score and product.
    """

    def __init__(self, layer: Layer, module: nn.Module, rule: MaskRule, rotations: Mapping[str, Tensor]) -> None:
        self.layer, self.module, self.rule, self.rotations = layer, module, rule, dict(rotations)
        self.groups = {site.name: rule.groups(site) for site in layer.sites}
        self.norms = {
            group.key: rule.norm(group, self.weights(group)) for groups in self.groups.values() for group in groups
        }
        self.cuts: dict[str, Cut] = {}
        self.stop_at: str | None = None
        self.observe: Observe | None = None
        self._handles: list[Any] = []
        self._last: dict[str, tuple[Tensor, Tensor]] = {}
        self._growth = Growth()

    def __enter__(self) -> MaskedLayer:
        for groups in self.groups.values():
            for group in groups:
                for i, projection in enumerate(group.projections):
                    hook = self._hook(group, first=i == 0 and group is groups[0])
                    module = self.module.get_submodule(projection.module)
                    self._handles.append(module.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last.clear()

    def weights(self, group: MaskGroup) -> list[Tensor]:
        """Weights of a group's projections, each (out, in)."""
        return [self.weight(p) for p in group.projections]

    def weight(self, projection: Projection) -> Tensor:
        """Weight of one projection, (out, in)."""
        return self.module.get_parameter(f"{projection.module}.weight")

    def replace(self, group: MaskGroup, quantized: Quantized) -> None:
        """Put a group's dequantized weights in place of its own, and their norms."""
        first, weights = 0, []
        for projection in group.projections:
            part = quantized.outputs(first, first + projection.out_features).whole(torch.float32)
            self.weight(projection).data.copy_(part)
            weights.append(part)
            first += projection.out_features
        self.norms[group.key] = self.rule.norm(group, weights)

    def run(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The layer's output (batch, seq, hidden) with the masks of the cuts set so far."""
        self._growth.check()
        try:
            output: Tensor = self.module(hidden, **kwargs)
            return output
        finally:
            self._last.clear()

    def input_of(self, site: str, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Run up to a site and return its input (batch, seq, width), rotated, not masked."""
        self.stop_at = site
        try:
            self.run(hidden, kwargs)
        except _Stop as stop:
            return stop.x
        finally:
            self.stop_at = None
        raise AssertionError(f"layer {self.layer.index} never reached {site}")

    def replay_attention(self, output: Tensor) -> AbstractContextManager[None]:
        """Let the attention block return `output` instead of computing it."""
        return replayed(self.module.get_submodule(self.layer.attention), (output, None))

    def mask_inputs(self, group: MaskGroup, x: Tensor, dense_rows: DenseRows = "first") -> Tensor:
        """Return x (..., width) with the group's mask, if it has a cut.

        Args:
            group: the mask group.
            x: its input.
            dense_rows: (...) bool, rows that are never masked; `first` are those that the rule keeps in (batch, seq, width).
        """
        if group.key not in self.cuts:
            return x
        if isinstance(dense_rows, str):
            dense_rows = self.rule.dense_rows(x)
        cut, norm, score = self.cuts[group.key], self.norms[group.key], self.rule.score
        if isinstance(cut, Tensor) and score in ("wina", "teal"):  # `teal` is the same with norms of 1
            return dispatch.mask_inputs(x, norm, cut, dense_rows)
        return mask_inputs(x, norm, cut, score, dense_rows)

    def count(self, group: MaskGroup, x: Tensor, into: ScoreHistogram) -> None:
        """Add the scores of a group's inputs (..., width) to a histogram, a few rows at a time."""
        for rows in x.flatten(0, -2).split(rows_together(x)):
            into.update(scores(rows, self.norms[group.key], self.rule.score))

    def output_error(self, site: Site, x: Tensor) -> float:
        """Relative error `||W (x - masked x)|| / ||W x||` of a site on some of its inputs (batch, seq, width)."""
        lost = kept = 0.0
        for group in self.groups[site.name]:
            dropped = x - self.mask_inputs(group, x)
            for weight in self.weights(group):
                lost += float(linear(dropped, weight).float().square().sum())
                kept += float(linear(x, weight).float().square().sum())
        return (lost / kept) ** 0.5 if kept else 0.0

    def _hook(self, group: MaskGroup, *, first: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            x = args[0]
            seen = self._last.get(group.site)
            if seen is None or seen[0] is not x:
                rotation = self.rotations.get(group.site)
                seen = self._last[group.site] = (x, x if rotation is None else x @ rotation)
            if first and self.stop_at == group.site:
                raise _Stop(seen[1])
            if first and self.observe is not None:
                self.observe(group.site, seen[1])
            masked = self._last.get(group.key + "/masked")
            if masked is None or masked[0] is not x:
                masked = self._last[group.key + "/masked"] = (x, self.mask_inputs(group, seen[1]))
            return (masked[1],)

        return hook


@contextmanager
def replayed(module: nn.Module, outputs: Any) -> Iterator[None]:
    """Let a module return `outputs` instead of computing them."""
    module.forward = lambda *args, **kwargs: outputs
    try:
        yield
    finally:
        del module.forward
