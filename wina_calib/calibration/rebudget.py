"""Choose a calibrated checkpoint's budget anew, and put it into the checkpoint: no weights are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wina_calib.budgets import (
    Budget,
    Cells,
    Curves,
    Setting,
    Target,
    Totals,
    fixed_cells,
    totals,
)
from wina_calib.budgets.anchors import Bounds, solve, solve_rows, spread
from wina_calib.budgets.count import count_cells, model_key
from wina_calib.budgets.file import file_budget
from wina_calib.budgets.model import Floats
from wina_calib.calibration.choose_budget import Allocation, measured_pairs
from wina_calib.calibration.job import Job
from wina_calib.calibration.options import make_options
from wina_calib.checkpoint.format import WINA_FILE, SiteTensors, expected_tensors
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.checkpoint.settings import INTERPOLATED, REBUDGETED, Settings
from wina_calib.checkpoint.writer import write_index, write_json, write_wina_file
from wina_calib.common.atomic import staged_files
from wina_calib.common.devices import default_micro_batch, pick_device, pick_dtype
from wina_calib.common.progress import Progress, Silent
from wina_calib.corpus.blocks import load_blocks
from wina_calib.errors import BudgetError, CheckpointError, CorpusError, UsageError
from wina_calib.masks.thresholds import threshold_between
from wina_calib.model.config import config_file, read_config
from wina_calib.model.locate import load_tokenizer, weights_folder
from wina_calib.model.source import open_source
from wina_calib.transforms import plan


@dataclass(frozen=True)
class Request:
    """What a budget is asked to be.

    Attributes:
        file: a budget file to start from instead of the stored budget.
        target: what the budget must meet; None keeps the model sparsity.
        settings: cells to set and pin.
        frozen: patterns of cells to pin at what they have.
        lowest: lower bounds of free cells, each `[PATTERN=]SPARSITY`.
        highest: upper bounds, likewise.
    """

    file: str | None = None
    target: Target | None = None
    settings: tuple[Setting, ...] = ()
    frozen: tuple[str, ...] = ()
    lowest: tuple[str, ...] = ()
    highest: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Choice:
    """A budget chosen for a checkpoint.

    Attributes:
        opened: the checkpoint.
        cells: its element counts.
        curves: its predicted loss rises; None where calibration computed no gradients.
        budget: the site sparsities.
        sparsity: their model sparsity.
        name: how they were chosen, for the checkpoint's settings.
        bounds: bounds of free cells.
        fixed: (layers, sites), NaN where a cell is free; None where all are.
        kind: `stored` (the checkpoint's own at this sparsity), `file` (as in a file) or `solved`.
    """

    opened: Checkpoint
    cells: Cells
    curves: Curves | None
    budget: Budget
    sparsity: float
    name: str
    bounds: Bounds
    fixed: Floats | None
    kind: str

    @property
    def totals(self) -> Totals:
        """What the budget costs and is predicted to do."""
        return totals(self.cells, self.budget, self.curves)

    def rows(self, anchors: Sequence[float]) -> Floats:
        """Site sparsities (anchors, layers, sites): this budget at its own sparsity, and what goes with it elsewhere."""
        own = np.array(self.budget.sparsities)
        if self.kind == "stored":
            found = np.stack([self.opened.sparsities(anchor) for anchor in anchors])
        elif self.kind == "file":
            found = spread(anchors, self.cells, own)
        else:
            others = [anchor for anchor in anchors if anchor != self.sparsity]
            solved = iter(solve_rows(self.cells, others, -1.0, self.bounds, self.curves, self.fixed) if others else ())
            found = np.stack([own if anchor == self.sparsity else next(solved) for anchor in anchors])
        for index, anchor in enumerate(anchors):
            if anchor == self.sparsity:
                found[index] = own
        return found

    def at(self, sparsity: float) -> Budget:
        """The budget that goes with this one at another model sparsity; pinned cells stay, or the sparsity is refused.

        Raises:
            BudgetError: pinned cells and bounds leave no room for it.
        """
        if self.kind != "solved":
            return Budget(self.rows([sparsity])[0])
        lower, upper = self.bounds.at(sparsity, strict=False)
        return solve(self.cells, self.curves, Target("sparsity", sparsity), lower, upper, self.fixed)


def choose(opened: Checkpoint, request: Request) -> Choice:
    """Choose site sparsities for a checkpoint.

    Raises:
        BudgetError: the request is impossible, names no cell, or comes from a file for another model.
    """
    settings = opened.settings
    cells = count_cells(opened.architecture, settings.transform)
    curves = stored_curves(opened)
    bounds = Bounds.parse(cells, request.lowest, request.highest)
    if request.file is not None:
        base, own = file_budget(request.file, model_key(opened.architecture, cells), cells)
    else:
        base, own = opened.sparsities(settings.sparsity), settings.sparsity
    fixed = None
    if request.settings or request.frozen:
        fixed = fixed_cells(Budget(base), cells, request.settings, request.frozen)
    target, bounded = request.target, bool(request.lowest or request.highest)
    if target is None and fixed is None and not bounded:
        # A free global budget is what the solver gives at every sparsity, exactly and beyond the anchors too.
        own_kind = "solved" if settings.budget == "global" and curves is not None else "stored"
        kind, name = ("file", "file") if request.file is not None else (own_kind, settings.budget)
        return Choice(opened, cells, curves, Budget(base), own, name, bounds, None, kind)
    if target is None:
        all_pinned = fixed is not None and not np.isnan(fixed).any()
        pinned = Budget(fixed).model_sparsity(cells) if all_pinned and fixed is not None else own
        target = Target("sparsity", pinned)
    lower, upper = bounds.at(target.value if target.kind == "sparsity" else 0.0, strict=True)
    budget = solve(cells, curves, target, lower, upper, fixed)
    sparsity = target.value if target.kind == "sparsity" else budget.model_sparsity(cells)
    if curves is None and fixed is None and not bounded and request.file is None:
        stored = Budget(opened.sparsities(sparsity))
        return Choice(opened, cells, None, stored, sparsity, settings.budget, bounds, None, "stored")
    name = "custom" if fixed is not None or bounded else "uniform" if curves is None else "global"
    return Choice(opened, cells, curves, budget, sparsity, name, bounds, fixed, "solved")


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


@dataclass(frozen=True)
class Refit:
    """How to fit thresholds anew: other data than recorded, and what to compute with."""

    data: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"


def apply(
    choice: Choice, destination: Checkpoint, *, refit: Refit | None = None, progress: Progress | None = None
) -> Settings:
    """Put a budget into a checkpoint: `wina.safetensors`, its index and the settings change, in one step; no weights do.

    Without `refit` the thresholds come from the stored score tables, interpolated between anchors. With it, the closed
    loop runs again on the checkpoint's own weights and its recorded text.

    Args:
        choice: the budget.
        destination: the checkpoint to change; another one than the budget's is possible if it is of the same model.
        refit: fit anew.
        progress: hears how a refit goes on.

    Returns:
        The new settings.

    Raises:
        BudgetError: the checkpoint is of another model.
        OutputError: the folder cannot be written; it is unchanged.
    """
    old = destination.settings
    cells = count_cells(destination.architecture, old.transform)
    mine, theirs = (model_key(c.architecture, n) for c, n in ((choice.opened, choice.cells), (destination, cells)))
    if mine != theirs:
        raise BudgetError(
            f"the budget is for {mine.model_type} with {mine.layers} layers ({mine.fingerprint}); {destination.folder} "
            f"holds {theirs.model_type} with {theirs.layers} layers ({theirs.fingerprint})."
        )
    kept = set(old.fitted_anchors)
    added = {choice.sparsity} if choice.sparsity > 0 else set()
    anchors = tuple(sorted(kept | added))
    how = "fitted anew" if refit else "from stored tables"
    provenance = old.provenance | {INTERPOLATED: [] if refit else sorted(added - kept), REBUDGETED: how}
    settings = replace(old, sparsity=choice.sparsity, anchors=anchors, budget=choice.name, provenance=provenance)
    rows = choice.rows(anchors)
    if refit is None:
        tensors = _interpolated(destination, settings, rows)
    else:
        tensors, facts = _refitted(destination, settings, rows, refit, progress or Silent())
        settings = replace(settings, provenance=settings.provenance | facts)
    _write(destination, settings, tensors)
    return settings


def _interpolated(opened: Checkpoint, settings: Settings, rows: Floats) -> dict[str, Tensor]:
    """All calibration tensors for new anchors, tables interpolated between the old ones."""
    known, tensors = opened.settings.anchors, dict[str, Tensor]()
    own = settings.anchors.index(settings.sparsity) if settings.sparsity > 0 else None
    for layer, site in opened.architecture.sites:
        position = layer.sites.index(site)
        stored = opened.site(layer, site)
        budget = rows[:, layer.index, position].astype(np.float32)  # as it is stored: loading computes the same
        tables = {name: _between(table, known, settings.anchors) for name, table in stored.tables.items()}
        sparsity = 0.0 if own is None else float(budget[own])
        changed = SiteTensors(
            norms=stored.norms,
            tables=tables,
            thresholds={
                name: torch.tensor(threshold_between(table, settings.anchors, settings.sparsity, sparsity))
                for name, table in tables.items()
            },
            budget=torch.from_numpy(budget.copy()),
            error=_between(stored.error[:, None], known, settings.anchors)[:, 0],
            curve=stored.curve,
        )
        tensors |= changed.named(layer.prefix, site.name)
    return tensors


def _between(values: Tensor, known: Sequence[float], anchors: Sequence[float]) -> Tensor:
    """Rows (anchors, ...) linear between the rows (known, ...); the ends' beyond them."""
    found = []
    for anchor in anchors:
        above = next((i for i, a in enumerate(known) if a >= anchor), len(known) - 1)
        below = max(above - 1, 0) if known[above] > anchor else above
        share = (anchor - known[below]) / (known[above] - known[below]) if above != below else 0.0
        found.append(values[below] + (values[above] - values[below]) * max(share, 0.0))
    return torch.stack(found)


def _refitted(
    opened: Checkpoint, settings: Settings, rows: Floats, refit: Refit, report: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All calibration tensors from a new closed loop; what changed of the provenance."""
    facts = opened.settings.provenance
    data = refit.data or tuple(map(str, facts.get("data", ())))
    seq_len, blocks = (int(facts.get(name, 0)) for name in ("seq_len", "blocks"))
    if not data or seq_len < 2 or blocks < 1:
        raise UsageError(f"{opened.folder} does not say what text it was calibrated on. Give it with --data.")
    weights = weights_folder(opened.folder)
    source = open_source(str(weights), calibrated=True)
    seed, samples = int(facts.get("seed", 0)), int(facts.get("samples", blocks))
    tokenizer = load_tokenizer(weights)
    text = load_blocks(data, tokenizer, samples=samples, seq_len=seq_len, seed=seed, min_tokens=1)
    if not refit.data and text.fingerprint != facts.get("data_fingerprint"):
        raise CorpusError(
            f"{', '.join(data)} is not the text that {opened.folder} was calibrated on any more. Give text with --data."
        )
    device = pick_device(refit.device)
    options = make_options(
        {"sparsity": settings.sparsity, "grid": settings.anchors, "score": settings.score, "masks": settings.masks}
        | {"exponent": settings.exponent, "select": settings.select, "first_token": settings.first_token}
        | {"loop": str(facts.get("loop", "closed")), "data": data, "samples": samples, "seq_len": seq_len, "seed": seed}
    )
    job = Job(
        source=source,
        options=options,
        transform=plan(settings.transform, source.architecture),
        blocks=text,
        device=device,
        dtype=pick_dtype(refit.dtype, source.dtype, device),
        micro_batch=default_micro_batch(device, seq_len, source.architecture.width),
        report=report,
    )
    tensors, _ = job.fit(source, Allocation(rows))
    curves = {name: tensor for name, tensor in opened.tensors.items() if name.endswith(".curve")}
    changed = {"data": list(data), "data_fingerprint": text.fingerprint, "blocks": len(text.ids)}
    return tensors | curves, changed


def _write(opened: Checkpoint, settings: Settings, tensors: dict[str, Tensor]) -> None:
    folder = opened.folder
    names = set(expected_tensors(opened.architecture, opened.settings))
    sizes = {name: info.nbytes for name, info in opened.shards.items() if name not in names}
    files = {name: info.file.name for name, info in opened.shards.items() if name not in names}
    raw = read_config(folder)
    with staged_files(folder) as staged:
        write_wina_file(staged / WINA_FILE, tensors)
        added = {name: tensor.nbytes for name, tensor in tensors.items()}
        write_index(staged, files | dict.fromkeys(tensors, WINA_FILE), sizes | added)
        write_json(staged / config_file(folder).name, raw | {"quantization_config": settings.to_dict()})
    open_checkpoint(folder)
