"""A dense model whose sites are masked while it trains.

Hooks mask the input of every projection by the rule of `masks/mask.py`. The mask is made anew in every forward pass, is a
constant in the backward pass, and is the same where a layer is computed again: thresholds change between steps only, when
`follow` moves them to the scores that were seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wina_calib.checkpoint.reader import Checkpoint
from wina_calib.errors import UsageError
from wina_calib.masks.mask import first_token_rows, mask_inputs
from wina_calib.masks.score import scores, stored_norm
from wina_calib.masks.thresholds import site_sparsity, threshold_between

SAMPLE = 1 << 16  # scores of a site that a threshold is moved by
MOVE = 0.2  # share of the way to the threshold that a step's scores call for


@dataclass
class _Group:
    """One mask group: its projections' modules, norm (in,) and thresholds () by model sparsity."""

    modules: list[nn.Module]
    norm: Tensor
    shares: dict[float, float]
    thresholds: dict[float, Tensor]
    seen: list[Tensor] = field(default_factory=list)
    last: tuple[Tensor, Tensor] | None = None


class MaskedModel:
    """Masks on the sites of a plain model.

    Args:
        model: the dense model; its layers are those of the checkpoint. Adapters may have been put in.
        checkpoint: the calibration.
        sparsities: model sparsities that can be set.

    Raises:
        UsageError: the checkpoint's masks cannot be trained.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, sparsities: tuple[float, ...]) -> None:
        settings = checkpoint.settings
        if not settings.has_kernels:
            raise UsageError(
                f"masks by select {settings.select} and score {settings.score} cannot be trained; calibrate with the defaults."
            )
        self._rule = settings.rule
        self.sparsity: float | None = None
        self.follows = False
        self._groups: dict[str, _Group] = {}
        device = next(model.parameters()).device
        for layer, site in checkpoint.architecture.sites:
            stored = checkpoint.site(layer, site)
            for group in self._rule.groups(site):
                shares = {s: site_sparsity(settings.anchors, stored.budget.numpy(), s) for s in sparsities}
                cuts = {
                    s: threshold_between(stored.tables[group.name], settings.anchors, s, share)
                    for s, share in shares.items()
                }
                made = _Group(
                    [model.get_submodule(layer.prefix + p.module) for p in group.projections],
                    stored.norms[group.name].to(device),
                    shares,
                    {s: torch.tensor(cut, dtype=torch.float32, device=device) for s, cut in cuts.items()},
                )
                self._groups[layer.prefix + group.key] = made
                for module in made.modules:
                    module.register_forward_pre_hook(self._hook(made, last=module is made.modules[-1]))
        self._uses_norms = {key: bool((g.norm != 1).any()) for key, g in self._groups.items()}

    def _hook(self, made: _Group, *, last: bool) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self.sparsity is None:
                return None
            x: Tensor = args[0]
            if made.last is not None and made.last[0] is x:
                masked = made.last[1]
                made.last = None if last else made.last
                return (masked, *args[1:])
            rows = first_token_rows(x) if self._rule.first_token == "dense" else None
            if self.follows and not made.seen:
                made.seen.append(_sampled(scores(self._rule.masked_rows(x.detach()), made.norm, self._rule.score)))
            masked = mask_inputs(x, made.norm, made.thresholds[self.sparsity], self._rule.score, rows)
            made.last = None if last else (x, masked)
            return (masked, *args[1:])

        return hook

    @torch.no_grad()
    def follow(self, agree: Callable[[Tensor], Tensor] = lambda cut: cut) -> None:
        """After a step: move the thresholds of its sparsity to where they drop what is asked, by the scores that were seen.

        Args:
            agree: the mean of a threshold over the processes that train together.
        """
        assert self.sparsity is not None
        for group in self._groups.values():
            if not group.seen:
                continue
            share = group.shares[self.sparsity]
            if share > 0:
                found = group.seen[0].float()
                place = min(len(found) - 1, int(share * len(found)))
                wanted = agree(found.kthvalue(place + 1).values)
                now = group.thresholds[self.sparsity]
                now.add_((wanted - now) * torch.where(now >= 0, MOVE, 1.0))  # a negative one keeps everything
            group.seen.clear()

    @torch.no_grad()
    def refresh_norms(self) -> None:
        """Compute the column norms of the weights as they are now."""
        for key, group in self._groups.items():
            if self._uses_norms[key]:
                weights = [_merged(module) for module in group.modules]
                group.norm.copy_(stored_norm(self._rule.score, weights, self._rule.exponent))

    def state(self) -> dict[str, Tensor]:
        """Thresholds and norms by name, to save."""
        cuts = {f"{key}@{s}": cut for key, g in self._groups.items() for s, cut in g.thresholds.items()}
        return cuts | {f"{key}/norm": group.norm for key, group in self._groups.items()}

    def load_state(self, saved: dict[str, Tensor]) -> None:
        """Take what was saved."""
        for name, cut in self.state().items():
            cut.copy_(saved[name])


def _sampled(found: Tensor) -> Tensor:
    flat = found.flatten()
    return flat[:: max(1, len(flat) // SAMPLE)]


def _merged(module: Any) -> Tensor:
    """The weight (out, in) of a projection, with what an adapter adds."""
    if not hasattr(module, "get_delta_weight"):
        weight: Tensor = module.weight
        return weight.detach()
    total: Tensor = module.get_base_layer().weight.detach() + sum(
        module.get_delta_weight(n) for n in module.active_adapters
    )
    return total
