"""`MaskRule`: how a checkpoint's masks are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wina_calib.masks.mask import Cut, first_token_rows, kept_inputs
from wina_calib.masks.score import stored_norm
from wina_calib.masks.thresholds import threshold_at
from wina_calib.model.architecture import MaskGroup, Site, mask_groups
from wina_calib.transforms import uses_norm


@dataclass(frozen=True)
class MaskRule:
    """How masks are made."""

    score: str = "wina"  # one of `choices.SCORES`
    masks: str = "shared"  # `shared` (one a site, joint norm) or `per-projection`
    exponent: float = 1.0  # power of the column norms
    transform: str = "none"  # resolved transform, as the paper's uses norms on some projections only
    select: str = "threshold"  # `threshold` keeps scores above a threshold, `topk` each token's highest
    first_token: str = "dense"  # whether the first token of a sequence is `dense` or masked as all others

    def groups(self, site: Site) -> tuple[MaskGroup, ...]:
        """Mask groups of a site."""
        return mask_groups(site, self.masks)

    def norm(self, group: MaskGroup, weights: list[Tensor]) -> Tensor:
        """Norm vector (in,) float32 that a group's scores are computed with."""
        score = self.score if uses_norm(self.transform, group) else "teal"
        return stored_norm(score, weights, self.exponent)

    def cut(self, table: Tensor, sparsity: float, width: int, device: torch.device) -> Cut:
        """What a group of `width` inputs is masked with at a site sparsity; `table` (levels,) are its score quantiles."""
        if self.select == "topk":
            return kept_inputs(width, sparsity)
        return torch.tensor(threshold_at(table, sparsity), dtype=torch.float32, device=device)

    def masked_rows(self, x: Tensor) -> Tensor:
        """The rows of x (batch, seq, ...) that masks are made for: first tokens are left out where they are dense."""
        return x[:, 1:] if self.first_token == "dense" else x

    def dense_rows(self, x: Tensor) -> Tensor | None:
        """Rows of x (batch, seq, ...) that are never masked, (batch, seq) bool, or None."""
        return first_token_rows(x) if self.first_token == "dense" else None
