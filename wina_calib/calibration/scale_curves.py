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
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.likelihood import measured_rises
from wina_calib.calibration.loss_curves import CURVE_PASSES
from wina_calib.checkpoint.reader import Checkpoint
from wina_calib.common.progress import SILENT, Progress
from wina_calib.errors import BudgetError, CheckpointError
from wina_calib.model.architecture import Architecture
from wina_calib.storage.hidden_states import HiddenStates

_FACTOR_SPREAD = 0.3  # how far ratios of measured and predicted loss rises may differ from anchor to anchor
_FACTORS = (0.2, 5.0)
SCALED_TO = 0.5  # model sparsity up to whose anchor the curves are scaled to the measured loss rise


def scaled_curves(
    chosen: ChosenBudget,
    anchors: Sequence[float],
    stream: LayerStream,
    states: Sequence[HiddenStates],
    progress: Progress = SILENT,
    *,
    quantized: bool = False,
) -> tuple[Curves | None, dict[str, Any]]:
    """Scale the curves by one factor, so that they predict the loss rises measured at the anchors up to `SCALED_TO`.

    Args:
        chosen: what was fitted.
        anchors: model sparsities.
        stream: the calibration tokens; its first blocks are those of the curves.
        states: last hidden states of the sparse model at each anchor.
        progress: hears of every part of lm_head.
        quantized: the sparse model's weights are, and the dense one's are not: a part of all rises is no sparsity's.

    Returns:
        The curves, and for the provenance what was predicted and measured; None and nothing where there are no curves.
    """
    if chosen.felt is None or chosen.stream is None or chosen.dense is None:
        return None, chosen.facts
    rises = measured_rises(chosen.stream, chosen.dense, stream, states, progress)
    chosen.dense.clear()
    curves = chosen.felt.loss
    predicted, divergence = (
        [Budget(row).predicted_loss(felt) for row in chosen.rows] for felt in (curves, chosen.felt.divergence)
    )
    low = [i for i, anchor in enumerate(anchors) if anchor <= SCALED_TO] or [0]
    other = unmasked_rise([rise.loss for rise in rises], predicted) if quantized else 0.0
    measured = [rise.loss - other for rise in rises]
    factor = scale([measured[i] for i in low], [predicted[i] for i in low])
    tokens = chosen.stream.tokens
    facts = {
        "anchors": list(anchors),
        "tokens": tokens,
        "passes": CURVE_PASSES * tokens / stream.tokens,
        "factor": factor,
        "factor_at": [anchors[i] for i in low],
        "predicted": [factor * value for value in predicted],
        "predicted_kl": divergence,
        "loss_rise": measured,
        "kl": [rise.kl for rise in rises],
    }
    if quantized:
        facts["quantized_rise"] = other
    return curves.scaled(factor), {"prediction": facts}


def unmasked_rise(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """The part of measured loss rises that sparsity 0 would show, on the line through the two least predicted ones.

    Of one anchor alone nothing is known: 0, as where the line says that it is negative.
    """
    if len(measured) < 2 or predicted[1] <= predicted[0]:
        return 0.0
    slope = (measured[1] - measured[0]) / (predicted[1] - predicted[0])
    return min(max(0.0, measured[0] - slope * predicted[0]), max(0.0, measured[0]))


def scale(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """Geometric mean of the ratios of measured and predicted rises; 1 without any.

    A ratio far off says nothing: a random model may not feel sparsity, and few tokens may even show a fall.
    """
    ratios = [m / p for m, p in zip(measured, predicted, strict=True) if p > 0 and 0.05 < m / p < 20]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0


def measured_pairs(facts: Mapping[str, Any]) -> Floats:
    """What the scaled curves of a calibration sum up to at its anchors, and the loss rises that go with it, (n, 2).

    The first-order part of the loss weighs most where little is dropped, so that no one factor fits all anchors. A rise here is
    the measured one as far as its noise allows: its variance is twice the divergence over the tokens, against what ratios
    of measured and predicted rises differ by at all, `_FACTOR_SPREAD`.

    Args:
        facts: `prediction` of a checkpoint's provenance.

    Raises:
        BudgetError: they are not such facts.
    """
    if not facts:
        return np.empty((0, 2))
    try:
        sums, rises, kl = (np.array(facts[key], dtype=np.float64) for key in ("predicted", "loss_rise", "kl"))
        rows = np.stack([sums, rises, np.maximum(kl, 0.0)], axis=1)[(sums > 0) & (np.diff(sums, prepend=0.0) > 0)]
        noise = 2 * rows[:, 2] / (float(facts["tokens"]) * rows[:, 0] ** 2)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise BudgetError(f"the measured loss rises cannot be read: {error!r:.80}") from None
    trusted = _FACTOR_SPREAD**2 / (_FACTOR_SPREAD**2 + noise)
    ratio = np.clip(1 + trusted * (rows[:, 1] / rows[:, 0] - 1), *_FACTORS)
    return np.stack([rows[:, 0], np.maximum.accumulate(rows[:, 0] * ratio)], axis=1)


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
