"""A dense model whose sites are masked while it trains.

Hooks mask the input of every projection by the rule of `masks/mask.py`. The mask is made anew in every forward pass, is a
constant in the backward pass, and is the same where a layer is computed again: thresholds change between steps only, when
`follow` moves them to the scores that were seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wina_calib.checkpoint.reader import Checkpoint
from wina_calib.errors import UsageError
from wina_calib.masks.mask import keep_mask
from wina_calib.masks.score import scores, stored_norm
from wina_calib.masks.thresholds import site_sparsity, threshold_between
from wina_calib.recovery.sharded import whole

SAMPLE = 1 << 14  # scores of a site that a threshold is moved by
MOVE = 0.2  # share of the way to the threshold that a step's scores call for, in training


class Masked(torch.autograd.Function):
    """Inputs that are not kept set to 0, in the dtype that the product takes; the gradient of what is kept passes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, cut: Tensor, score: str, dense_rows: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Masked x (batch, seq, in), as it is in `dtype`."""
        ctx.dtype = x.dtype
        x = x.to(dtype)
        dropped = keep_mask(x, norm, cut, score, dense_rows).logical_not_()
        ctx.save_for_backward(dropped)
        return x.masked_fill(dropped, 0)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        """The gradient at x."""
        (dropped,) = ctx.saved_tensors
        return outer[0].masked_fill(dropped, 0).to(ctx.dtype), None, None, None, None, None


@dataclass
class _Group:
    """One mask group: its projections' modules, norm (in,), and its sparsity and threshold () by model sparsity."""

    modules: list[nn.Module]
    norm: Tensor
    shares: dict[float, float]
    thresholds: dict[float, Tensor]
    seen: list[Tensor] = field(default_factory=list)
    last: tuple[Tensor, Tensor] | None = None


class MaskedModel:
    """Masks on the sites of a plain model.

    Adapters may have been put into the dense model; `sparsities` are those that can be set.

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
        self._rows: Tensor | None = None
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
                before = made.last[1]
                made.last = None if last else made.last
                return (before, *args[1:])
            if self.follows and not made.seen:
                values, norm = _sampled(self._rule.masked_rows(x.detach()), made.norm)
                made.seen.append(scores(values, norm, self._rule.score))
            cut, kind = made.thresholds[self.sparsity], x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            apply: Any = Masked.apply  # torch does not type it
            masked: Tensor = apply(x, made.norm, cut, self._rule.score, self._dense_rows(x), dtype)
            made.last = None if last else (x, masked)
            return (masked, *args[1:])

        return hook

    def _dense_rows(self, x: Tensor) -> Tensor | None:
        """Rows of x (batch, seq, in) that are never masked, (batch, seq) bool; made once for a shape."""
        if self._rule.first_token == "dense" and (self._rows is None or self._rows.shape != x.shape[:2]):
            self._rows = self._rule.dense_rows(x)
        return self._rows

    @torch.no_grad()
    def follow(self, agree: Callable[[Tensor], Tensor] = lambda cuts: cuts, move: float | None = None) -> None:
        """After a pass: move the thresholds of its sparsity to where they drop what is asked, by the scores that were seen.

        Args:
            agree: the mean of thresholds (groups,) over the processes that train together.
            move: share of the way to there; None is that of training.
        """
        sparsity, share = self.sparsity, MOVE if move is None else move
        assert sparsity is not None
        groups = [g for g in self._groups.values() if g.seen and g.shares[sparsity] > 0]
        if groups:
            wanted = agree(_cuts([g.seen[0] for g in groups], [g.shares[sparsity] for g in groups]))
            now = torch.stack([g.thresholds[sparsity] for g in groups])
            moved = now + (wanted - now) * torch.where(now >= 0, share, 1.0)  # a negative one keeps everything
            moved = torch.where(moved.isfinite(), moved, now)
            torch._foreach_copy_([g.thresholds[sparsity] for g in groups], list(moved.unbind()))
        for group in self._groups.values():
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


def _sampled(x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Some inputs of x (..., in), flat, from all columns alike, with the norms of their columns."""
    width = x.shape[-1]
    step = max(1, x.numel() // SAMPLE)
    while math.gcd(step, width) > 1:  # else some columns are never seen
        step += 1
    some = x.reshape(-1)[::step]
    return some, norm[torch.arange(0, x.numel(), step, device=x.device) % width]


def _cuts(seen: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """For scores (n,) of each group, n alike or not, the value below which a share of them lies: (groups,)."""
    places = [min(len(found) - 1, int(share * len(found))) for found, share in zip(seen, shares, strict=True)]
    if seen[0].device.type == "cpu":
        return torch.stack([found.kthvalue(k + 1).values for found, k in zip(seen, places, strict=True)])
    # One sort of all is much faster on a GPU than a search in each.
    ordered = nn.utils.rnn.pad_sequence(list(seen), batch_first=True, padding_value=math.inf).sort(-1).values
    return ordered.gather(1, torch.tensor(places, device=ordered.device)[:, None])[:, 0]


def _merged(module: Any) -> Tensor:
    """The weight (out, in) of a projection, with what an adapter adds."""
    if not hasattr(module, "get_delta_weight"):
        return whole(module.weight)
    total: Tensor = module.get_base_layer().weight.detach() + sum(
        module.get_delta_weight(n) for n in module.active_adapters
    )
    return total
