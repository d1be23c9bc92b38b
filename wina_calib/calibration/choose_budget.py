"""Which site sparsities a calibration fits at every anchor: uniform, greedy, global, of a file or of another checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wina_calib.budgets import Cells
from wina_calib.budgets.anchors import Bounds, solve_rows, spread
from wina_calib.budgets.count import count_cells, model_key
from wina_calib.budgets.file import file_budget
from wina_calib.budgets.model import Floats
from wina_calib.calibration.dropped_levels import CURVE_LEVELS
from wina_calib.calibration.greedy import greedy
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.loss_curves import CURVE_PASSES, LossCurves, measure_curves, usable_tokens
from wina_calib.calibration.options import CalibrateOptions
from wina_calib.checkpoint.format import WINA_FILE
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.choices import BUDGETS
from wina_calib.common.progress import SILENT, Progress
from wina_calib.errors import BudgetError
from wina_calib.masks.rule import MaskRule
from wina_calib.model.architecture import Architecture
from wina_calib.model.folder import config_file
from wina_calib.storage.resume import NOT_SAVED, Phase

GREEDY_TOKENS = 8192


@dataclass(frozen=True)
class ChosenBudget:
    """What a calibration fits."""

    rows: Floats  # (anchors, layers, sites) site sparsities
    curves: LossCurves | None = None  # what is felt of every site's sparsity; None where no gradients were computed
    facts: dict[str, Any] = field(default_factory=dict)  # what the choice cost, for the provenance


def settle(options: CalibrateOptions, arch: Architecture, cells: Cells) -> CalibrateOptions:
    """Check budget, bounds and sparsity before any work; a budget file sets the sparsity, a checkpoint does where none is asked.

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
        if options.sparsity:
            solve_rows(cells, (options.sparsity,), options.sparsity, bounds, None)
        elif options.sparsity is None:
            allowed(options, cells)
        return options
    if options.min or options.max:
        raise BudgetError(f"--min and --max do not apply to a budget file: edit {options.budget}, or leave them out.")
    if (other := _checkpoint(options, arch, cells)) is not None:
        return options if options.sparsity is not None else replace(options, sparsity=other.settings.sparsity)
    _, own = file_budget(options.budget, model_key(arch, cells), cells)
    if options.sparsity is not None and abs(options.sparsity - own) > 0.005:
        raise BudgetError(
            f"{options.budget} has model sparsity {own:.4f}, asked is {options.sparsity}. Leave --sparsity out, "
            "or choose another budget with `wina-calib budget`."
        )
    return replace(options, sparsity=own)


def allowed(options: CalibrateOptions, cells: Cells) -> tuple[float, float]:
    """Lowest and highest model sparsity that quality may choose: between them every budget keeps the bounds.

    Raises:
        BudgetError: the bounds hold at no anchor.
    """
    if not (options.min or options.max):
        return 0.0, options.anchors[-1]
    lower, upper = Bounds.parse(cells, options.min, options.max).at(0.0, strict=True)
    least, most = (float((cells.weights * values).sum() / cells.sparse_total) for values in (lower, upper))
    fine = [anchor for anchor in options.anchors if least <= anchor <= most]
    if not fine:
        raise BudgetError(
            f"--min and --max leave room for model sparsities from {least:.3f} to {most:.3f}, and none of --grid lies there "
            f"({', '.join(f'{anchor:g}' for anchor in options.anchors)}). Give --sparsity or another --grid."
        )
    return fine[0], fine[-1]


def allocate(
    options: CalibrateOptions,
    arch: Architecture,
    cells: Cells,
    rule: MaskRule,
    tokens: int,
    stream: Callable[[int], LayerStream],
    *,
    phase: Phase = NOT_SAVED,
    progress: Progress = SILENT,
) -> ChosenBudget:
    """Choose the site sparsities of every anchor.

    `tokens` are those that there are; `stream` opens the transformed dense model on at most so many of them.

    Raises:
        BudgetError: a bound or a budget file cannot be used.
    """
    bounds = Bounds.parse(cells, options.min, options.max)
    asked = -1.0 if options.sparsity is None else options.sparsity  # no anchor is
    if options.budget == "uniform":
        return ChosenBudget(solve_rows(cells, options.anchors, asked, bounds, None))
    if options.budget == "greedy":
        some = stream(GREEDY_TOKENS)
        searched = greedy(some, rule, options.anchors, phase=phase, progress=progress)
        facts = asdict(searched.cost) | {"layers": len(arch.layers), "tokens": some.tokens}
        return ChosenBudget(searched.rows, facts={"greedy": facts})
    used = stream(usable_tokens(tokens))
    curves = measure_curves(used, rule, seed=options.seed, phase=phase, progress=progress)
    if (other := _checkpoint(options, arch, cells)) is not None:
        rows = np.array([other.sparsities(anchor) for anchor in options.anchors])
    elif is_file(options.budget):
        rows = spread(options.anchors, cells, file_budget(options.budget, model_key(arch, cells), cells)[0])
    else:
        rows = solve_rows(cells, options.anchors, asked, bounds, curves.loss)
    facts = {"curve_tokens": used.tokens, "passes": CURVE_PASSES * used.tokens / tokens}
    return ChosenBudget(rows, curves, facts)


def is_file(budget: str) -> bool:
    """Whether a `--budget` value is a file or a folder rather than a method."""
    return budget not in BUDGETS


def budget_files(budget: str) -> list[Path]:
    """The files that a `--budget` value stands for."""
    path = Path(budget)
    if not is_file(budget):
        return []
    return [config_file(path), path / WINA_FILE] if path.is_dir() else [path]


def _checkpoint(options: CalibrateOptions, arch: Architecture, cells: Cells) -> Checkpoint | None:
    """The calibrated checkpoint whose site sparsities are to be taken; None where `--budget` is no folder.

    Raises:
        BudgetError: it is of a model of another shape.
    """
    if not is_file(options.budget) or not Path(options.budget).is_dir():
        return None
    opened = open_checkpoint(Path(options.budget))
    if count_cells(opened.architecture, "none").fingerprint() != cells.fingerprint():
        raise BudgetError(
            f"the sites of {opened.folder} have other sizes than this model's. Give a checkpoint of the same model, or "
            "--budget global."
        )
    return opened


def stored_name(options: CalibrateOptions) -> str:
    """How a checkpoint's settings say that its budget was chosen."""
    if is_file(options.budget):
        return "file"
    return "custom" if options.min or options.max else options.budget
