"""Which site sparsities a calibration fits, at every anchor: uniform, the papers' greedy, global, or a budget file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wina_calib.budgets import (
    Budget,
    Cells,
    Curves,
)
from wina_calib.budgets.anchors import Bounds, solve_rows, spread
from wina_calib.budgets.count import model_key
from wina_calib.budgets.file import file_budget
from wina_calib.budgets.model import Floats
from wina_calib.calibration.greedy import greedy
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.likelihood import measured_rises
from wina_calib.calibration.loss_curves import CURVE_LEVELS, PASSES, Sensitivity, measure_curves, usable_tokens
from wina_calib.calibration.options import CalibrateOptions
from wina_calib.errors import BudgetError
from wina_calib.masks.rule import MaskRule
from wina_calib.model.architecture import Architecture
from wina_calib.storage.hidden_states import HiddenStates
from wina_calib.storage.resume import NOT_SAVED, Phase

METHODS = ("global", "greedy", "uniform")
GREEDY_TOKENS = 8192
GREEDY_PASSES = 95.0  # of the tokens it uses, to a sparsity of 0.65; each takes a part of a layer
_FACTOR_SPREAD = 0.3  # how far ratios of measured and predicted loss rises may differ from anchor to anchor
_FACTORS = (0.2, 5.0)
SCALED_TO = 0.5  # model sparsity up to whose anchor the curves are scaled to the measured loss rise


@dataclass(frozen=True)
class Allocation:
    """What a calibration fits.

    Attributes:
        rows: (anchors, layers, sites) site sparsities.
        felt: what is felt of every site's sparsity; None where no gradients were computed.
        stream: the tokens that it comes from.
        dense: the dense model's last hidden states on them.
        facts: what the choice cost, for the provenance.
    """

    rows: Floats
    felt: Sensitivity | None = None
    stream: LayerStream | None = None
    dense: HiddenStates | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def settle(options: CalibrateOptions, arch: Architecture, cells: Cells) -> CalibrateOptions:
    """Check budget, bounds and sparsity before any work; a budget file sets the sparsity.

    Raises:
        BudgetError: the file is for another model, or the bounds leave no room for the sparsity.
    """
    bounds = Bounds.parse(cells, options.min, options.max)
    if not is_file(options.budget):
        if options.budget == "greedy" and (options.min or options.max):
            raise BudgetError("--min and --max have no meaning for the papers' greedy budget. Use global or uniform.")
        if options.budget == "global" and max(options.anchors) > CURVE_LEVELS[-1]:
            raise BudgetError(
                f"a global budget reaches model sparsities up to {CURVE_LEVELS[-1]}, asked is {max(options.anchors)}. "
                "Use --budget uniform for more."
            )
        if options.sparsity > 0:
            solve_rows(cells, (options.sparsity,), options.sparsity, bounds, None)
        return options
    if options.min or options.max:
        raise BudgetError(f"--min and --max do not apply to a budget file: edit {options.budget}, or leave them out.")
    _, own = file_budget(options.budget, model_key(arch, cells), cells)
    default = CalibrateOptions.sparsity
    if options.sparsity != default and abs(options.sparsity - own) > 0.005:
        raise BudgetError(
            f"{options.budget} has model sparsity {own:.4f}, asked is {options.sparsity}. Leave --sparsity out, "
            "or choose another budget with `wina-calib budget`."
        )
    return replace(options, sparsity=own)


def allocate(
    options: CalibrateOptions,
    arch: Architecture,
    cells: Cells,
    rule: MaskRule,
    tokens: int,
    stream: Callable[[int], LayerStream],
    *,
    phase: Phase = NOT_SAVED,
    progress: Callable[[str], None] = lambda _: None,
) -> Allocation:
    """Choose the site sparsities of every anchor.

    Args:
        options: settled options.
        arch: the model's structure.
        cells: its element counts.
        rule: how masks are made.
        tokens: calibration tokens that there are.
        stream: opens the transformed dense model on at most so many of them.
        phase: where the choice is saved on the way.
        progress: called for every layer and pass.

    Raises:
        BudgetError: a bound or a budget file cannot be used.
    """
    bounds = Bounds.parse(cells, options.min, options.max)
    if options.budget == "uniform":
        return Allocation(solve_rows(cells, options.anchors, options.sparsity, bounds, None))
    if options.budget == "greedy":
        some = stream(GREEDY_TOKENS)
        found = greedy(some, rule, options.anchors, phase=phase, progress=progress)
        facts = asdict(found.cost) | {"layers": len(arch.layers), "tokens": some.tokens}
        return Allocation(found.rows, facts={"greedy": facts})
    used = stream(usable_tokens(tokens))
    felt, dense = measure_curves(used, rule, seed=options.seed, phase=phase, progress=progress)
    if is_file(options.budget):
        rows = spread(options.anchors, cells, file_budget(options.budget, model_key(arch, cells), cells)[0])
    else:
        rows = solve_rows(cells, options.anchors, options.sparsity, bounds, felt.loss)
    return Allocation(rows, felt, used, dense)


def scaled_curves(
    chosen: Allocation, anchors: Sequence[float], stream: LayerStream, states: Sequence[HiddenStates]
) -> tuple[Curves | None, dict[str, Any]]:
    """Scale the curves by one factor, so that they predict the loss rises measured at the anchors up to `SCALED_TO`.

    Args:
        chosen: what was fitted.
        anchors: model sparsities.
        stream: the calibration tokens; its first blocks are those of the curves.
        states: last hidden states of the sparse model at each anchor.

    Returns:
        The curves, and for the provenance what was predicted and measured; None and nothing where there are no curves.
    """
    if chosen.felt is None or chosen.stream is None or chosen.dense is None:
        return None, chosen.facts
    rises = measured_rises(chosen.stream, chosen.dense, stream, states)
    chosen.dense.clear()
    curves = chosen.felt.loss
    predicted, divergence = (
        [Budget(row).predicted_loss(felt) for row in chosen.rows] for felt in (curves, chosen.felt.divergence)
    )
    low = [i for i, anchor in enumerate(anchors) if anchor <= SCALED_TO] or [0]
    factor = scale([rises[i].loss for i in low], [predicted[i] for i in low])
    tokens = chosen.stream.tokens
    facts = {
        "anchors": list(anchors),
        "tokens": tokens,
        "passes": PASSES * tokens / stream.tokens,
        "factor": factor,
        "factor_at": [anchors[i] for i in low],
        "predicted": [factor * value for value in predicted],
        "predicted_kl": divergence,
        "loss_rise": [rise.loss for rise in rises],
        "kl": [rise.kl for rise in rises],
    }
    return curves.scaled(factor), {"prediction": facts}


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
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
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


def is_file(budget: str) -> bool:
    """Whether a `--budget` value is a file rather than a method."""
    return budget not in METHODS


def choice_passes(options: CalibrateOptions, tokens: int) -> float:
    """Forward passes over `tokens` calibration tokens that choosing the budget is worth."""
    if options.budget == "uniform":
        return 0.0
    if options.budget == "greedy":
        return GREEDY_PASSES * min(1.0, GREEDY_TOKENS / tokens)
    return PASSES * usable_tokens(tokens) / tokens


def stored_name(options: CalibrateOptions) -> str:
    """How a checkpoint's settings say that its budget was chosen."""
    if is_file(options.budget):
        return "file"
    return "custom" if options.min or options.max else options.budget
