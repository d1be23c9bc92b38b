"""Predictions scaled to measured loss rises; curves to and from tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wina_calib.budgets import Budget, Curves
from wina_calib.budgets.model import Floats
from wina_calib.calibration.choose_budget import ChosenBudget
from wina_calib.checkpoint.reader import Checkpoint
from wina_calib.checkpoint.verdict import HeldOut, smoothed
from wina_calib.errors import BudgetError, CheckpointError
from wina_calib.model.architecture import Architecture

SCALED_TO = 0.5  # model sparsity up to whose anchor the curves are scaled to the measured loss rise


def scaled_curves(chosen: ChosenBudget, held: HeldOut) -> tuple[Curves | None, dict[str, Any]]:
    """Scale the curves by one factor, so that they predict the loss rises measured at the anchors up to `SCALED_TO`.

    Returns:
        The curves, and for the provenance what was predicted and measured; None and how the budget was chosen where there are
        no curves.
    """
    if chosen.curves is None:
        return None, chosen.facts
    curves = chosen.curves.loss
    predicted, divergence = (
        [Budget(row).predicted_loss(either) for row in chosen.rows] for either in (curves, chosen.curves.divergence)
    )
    low = [i for i, anchor in enumerate(held.anchors) if anchor <= SCALED_TO] or [0]
    factor = scale([held.loss[i] - held.base for i in low], [predicted[i] for i in low])
    facts = chosen.facts | {
        "anchors": list(held.anchors),
        "tokens": held.tokens,
        "factor": factor,
        "factor_at": [held.anchors[i] for i in low],
        "predicted": [factor * value for value in predicted],
        "predicted_kl": divergence,
        # what quantizing the weights costs is no sparsity's
        "loss_rise": [loss - held.base for loss in held.loss_rise],
        "kl": [max(kl - held.unmasked[1], 0.0) for kl in held.kl],
    }
    if held.unmasked[1]:
        facts["quantized_rise"] = held.base
    return curves.scaled(factor), {"prediction": facts}


def scale(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """Geometric mean of the ratios of measured and predicted rises; 1 without any.

    A ratio far off says nothing: a random model may not feel sparsity, and few tokens may even show a fall.
    """
    ratios = [m / p for m, p in zip(measured, predicted, strict=True) if p > 0 and 0.05 < m / p < 20]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0


def measured_pairs(facts: Mapping[str, Any]) -> Floats:
    """What the scaled curves of a calibration sum up to at its anchors, and the loss rises that go with it, (n, 2).

    The first-order part of the loss weighs most where little is dropped, so that no one factor fits all anchors. A rise is the
    measured one as far as its noise allows, as in the verdict (`smoothed`).

    Raises:
        BudgetError: they are not such facts.
    """
    if not facts:
        return np.empty((0, 2))
    try:
        sums, rises, kl = (np.array(facts[key], dtype=np.float64) for key in ("predicted", "loss_rise", "kl"))
        if not sums.shape == rises.shape == kl.shape == (len(sums),):
            raise ValueError(f"shapes {sums.shape}, {rises.shape}, {kl.shape}")
        pairs = np.stack([sums, np.array(smoothed(rises.tolist(), kl.tolist(), int(facts["tokens"])))], axis=1)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BudgetError(f"the measured loss rises cannot be read: {error!r:.80}") from None
    return pairs[(sums > 0) & (np.diff(sums, prepend=0.0) > 0)]


def curve_tensors(arch: Architecture, curves: Curves | None) -> dict[str, Tensor]:
    """The curves as tensors of a checkpoint, (levels,) float32 for each site."""
    if curves is None:
        return {}
    return {
        f"{layer.prefix}wina.{site.name}.curve": torch.tensor(curves.loss[layer.index, i], dtype=torch.float32)
        for layer in arch.layers
        for i, site in enumerate(layer.sites)
    }


def stored_curves(opened: Checkpoint) -> Curves | None:
    """The predicted loss rises (layers, sites, levels) that a checkpoint holds."""
    levels = opened.settings.curve_levels
    if not levels:
        return None
    prefix_names = [[f"{layer.prefix}wina.{s.name}.curve" for s in layer.sites] for layer in opened.architecture.layers]
    loss = np.array([[opened.tensors[name].double().numpy() for name in names] for names in prefix_names])
    try:
        facts = opened.settings.provenance.get("prediction")
        return Curves(np.array(levels), loss, measured_pairs(facts if isinstance(facts, dict) else {}))
    except BudgetError as error:
        raise CheckpointError(f"{opened.folder}: {error}. Calibrate again.") from error
