"""`keep_mask` and `mask_inputs`: the definition that every kernel is tested against; top-k."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wina_calib.masks.score import scores

KEEP_ALL = -1.0
Cut = Tensor | int  # a threshold, scalar float32, or how many inputs each row keeps
_TOGETHER = {"cpu": 1 << 20, "cuda": 1 << 24}  # on a GPU, starting the work on a million takes longer than the work


def keep_mask(x: Tensor, norm: Tensor, cut: Cut, score: str = "wina", dense_rows: Tensor | None = None) -> Tensor:
    """Boolean mask of the inputs that are kept: score above the threshold or among the highest, or any in a dense row.

    A NaN counts as kept, so that it shows in the output as it does in a dense model.

    Args:
        x: (..., in).
        norm: (in,) float32.
        cut: scalar float32 tensor, the threshold; a negative one keeps everything. Or how many each row keeps.
        score: one of `choices.SCORES`.
        dense_rows: boolean tensor of the leading shape of x; rows that are never masked.
    """
    scored = scores(x, norm, score)
    keep = (scored <= cut).logical_not_() if isinstance(cut, Tensor) else keep_top(scored, cut)
    return keep if dense_rows is None else keep | dense_rows.unsqueeze(-1)


def mask_inputs(x: Tensor, norm: Tensor, cut: Cut, score: str = "wina", dense_rows: Tensor | None = None) -> Tensor:
    """Return x with the inputs that are not kept set to +0. Kept values are unchanged, bit for bit."""
    return x.masked_fill(keep_mask(x, norm, cut, score, dense_rows).logical_not_(), 0)


def kept_inputs(width: int, sparsity: float) -> int:
    """How many of `width` inputs top-k selection keeps at a site sparsity: the nearest whole number, at least one."""
    return max(1, width - int(sparsity * width + 0.5))


def keep_top(score: Tensor, keep: int) -> Tensor:
    """Boolean mask (..., in) of the `keep` largest scores of each row; among equal ones the first are kept.

    A NaN counts as kept, so that it shows in the output as it does in a dense model.
    """
    if keep >= score.shape[-1]:
        return torch.ones_like(score, dtype=torch.bool)
    last = _ascending(score, score.shape[-1] - keep)
    kept = (score < last).logical_not_()
    if not torch.compiler.is_compiling() and int(kept.sum()) == keep * kept[..., 0].numel():
        return kept  # no equal scores at the border, as nearly always
    above, equal = (score <= last).logical_not_(), score == last
    room = keep - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def _ascending(score: Tensor, position: int) -> Tensor:
    """The value (..., 1) at a position of each row in ascending order, NaN last."""
    if score.device.type == "cpu" and score.dtype == torch.float32 and not torch.compiler.is_compiling():
        # NumPy's partition takes a tenth of the time of torch's selection.
        parted = np.partition(score.detach().numpy(), position, axis=-1)
        return torch.from_numpy(parted[..., position : position + 1])
    return score.kthvalue(position + 1, dim=-1, keepdim=True).values


def rows_together(x: Tensor) -> int:
    """How many rows of x (..., width) are looked at together, so that copies of them take little memory."""
    return max(1, _TOGETHER.get(x.device.type, _TOGETHER["cpu"]) // x.shape[-1])


def first_token_rows(x: Tensor) -> Tensor:
    """Rows that are never masked: the first token of every sequence. x: (batch, seq, ...) -> (batch, seq) bool."""
    rows = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    rows[:, 0] = True
    return rows
