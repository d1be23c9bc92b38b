"""Puts a chosen budget into a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wina_calib.budgets import Budget, budget_at
from wina_calib.budgets.count import model_key
from wina_calib.budgets.model import Floats
from wina_calib.calibration import phases
from wina_calib.calibration.choose_budget import ChosenBudget
from wina_calib.calibration.compute import Compute
from wina_calib.calibration.held_out import held_out_blocks
from wina_calib.calibration.job import Job
from wina_calib.calibration.options import make_options
from wina_calib.calibration.rebudget import Choice
from wina_calib.checkpoint.dequantized import weights_of
from wina_calib.checkpoint.facts import INTERPOLATED, REBUDGETED
from wina_calib.checkpoint.format import WINA_FILE, SiteTensors, expected_tensors, stored_cells
from wina_calib.checkpoint.local_paths import data_here, is_path_of_here, published, remember
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.verdict import HELD_OUT, VERDICT, HeldOut, Verdict
from wina_calib.checkpoint.weight_sample import ends_name, others_name
from wina_calib.checkpoint.writer import write_index, write_json, write_wina_file
from wina_calib.common.atomic import staged_files
from wina_calib.common.devices import default_micro_batch, pick_device, pick_dtype
from wina_calib.common.progress import SILENT, Progress
from wina_calib.corpus.blocks import load_blocks
from wina_calib.corpus.sources import is_local
from wina_calib.errors import BudgetError, CorpusError, UsageError
from wina_calib.masks.thresholds import threshold_between
from wina_calib.model.folder import config_file
from wina_calib.transforms import plan


@dataclass(frozen=True)
class Refit:
    """How to fit thresholds anew: other data than recorded, and what to compute with."""

    data: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"


def apply(
    choice: Choice, destination: Checkpoint, *, refit: Refit | None = None, progress: Progress = SILENT
) -> Settings:
    """Put a budget into a checkpoint: `wina.safetensors`, its index and the settings change, in one step; no weights do.

    Without `refit` the thresholds come from the stored score tables, interpolated between anchors. With it, the closed loop
    runs again on the checkpoint's own weights and its recorded text. `destination` may be another checkpoint than the
    budget's if it is of the same model.

    Returns:
        The new settings.

    Raises:
        BudgetError: the checkpoint is of another model.
        OutputError: the folder cannot be written; it is unchanged.
    """
    old = destination.settings
    cells = stored_cells(destination.architecture, old)
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
        tensors, facts = _refitted(destination, settings, rows, refit, progress)
        settings = replace(settings, provenance=settings.provenance | facts)
    held = HeldOut.from_dict(settings.provenance.get(HELD_OUT)) if refit else _expected(choice, old, rows, anchors)
    told = {}
    if held is not None:
        verdict = Verdict.of(held, cells, choice.sparsity, budget=partial(budget_at, anchors, rows))
        told = {HELD_OUT: held.to_dict(), VERDICT: verdict.to_dict()}
    facts = {name: value for name, value in settings.provenance.items() if name not in (HELD_OUT, VERDICT)}
    settings = replace(settings, provenance=facts | told)
    _write(destination, settings, tensors)
    if refit is not None and refit.data:
        remember(settings.weights, settings.provenance, base_model=None, data=refit.data)
    return settings


def _expected(choice: Choice, old: Settings, rows: Floats, anchors: Sequence[float]) -> HeldOut | None:
    """What to expect of a budget that nothing was fitted for: as measured if it is the old one, else by the curves, if any."""
    held = HeldOut.from_dict(choice.opened.settings.provenance.get(HELD_OUT))
    if choice.name == old.budget and choice.fixed is None and choice.kind != "file":
        return held
    if choice.curves is None or held is None:
        return None
    loss = tuple(held.base + Budget(row).predicted_loss(choice.curves) for row in rows)
    off = tuple(held.achieved_at(anchor) for anchor in anchors)
    return HeldOut(tuple(anchors), loss, loss, off, 0, held.data, (held.base, held.base))


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
            sample=stored.sample,
        )
        tensors |= changed.named(layer.prefix, site.name)
    others = (*map(others_name, opened.architecture.layers), ends_name(opened.architecture))
    return tensors | {name: opened.tensors[name] for name in others if name in opened.tensors}


def _between(values: Tensor, known: Sequence[float], anchors: Sequence[float]) -> Tensor:
    """Rows (anchors, ...) linear between the rows (known, ...); the ends' beyond them."""
    rows = []
    for anchor in anchors:
        above = next((i for i, a in enumerate(known) if a >= anchor), len(known) - 1)
        below = max(above - 1, 0) if known[above] > anchor else above
        share = (anchor - known[below]) / (known[above] - known[below]) if above != below else 0.0
        rows.append(values[below] + (values[above] - values[below]) * max(share, 0.0))
    return torch.stack(rows)


def _refitted(
    opened: Checkpoint, settings: Settings, rows: Floats, refit: Refit, report: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All calibration tensors from a new closed loop; what changed of the provenance."""
    facts = opened.settings.provenance
    data = refit.data or data_here(facts)
    seq_len, blocks = (int(facts.get(name, 0)) for name in ("seq_len", "blocks"))
    if not data or seq_len < 2 or blocks < 1:
        raise UsageError(f"{opened.folder} does not say what text it was calibrated on. Give it with --data.")
    if missing := [spec for spec in data if is_path_of_here(spec) and not is_local(spec)]:
        raise CorpusError(
            f"{missing[0]}, which {opened.folder} was calibrated on, is not here. Give that or other text with --data."
        )
    source = weights_of(opened)
    seed, samples = int(facts.get("seed", 0)), int(facts.get("samples", blocks))
    tokenizer = source.tokenizer()
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
        compute=Compute(
            device,
            pick_dtype(refit.dtype, source.dtype, device),
            default_micro_batch(device, seq_len, source.architecture.width),
        ),
        report=report,
    )
    tensors, measured = phases.fit(job, source, ChosenBudget(rows), held_out_blocks(tokenizer, seq_len))
    held = _beside_the_original(measured[HELD_OUT], HeldOut.from_dict(facts.get(HELD_OUT)))
    kept = {name: tensor for name, tensor in opened.tensors.items() if name.endswith((".curve", ".sample"))}
    changed = {"data": list(map(published, data)), "data_fingerprint": text.fingerprint, "blocks": len(text.ids)}
    return tensors | kept, changed | {HELD_OUT: held}


def _beside_the_original(measured: dict[str, Any], before: HeldOut | None) -> dict[str, Any]:
    """What was measured beside a checkpoint's own weights as it is beside the original model, from which quantizing took more."""
    if before is None or not before.unmasked[1]:
        return measured
    loss, kl = before.unmasked
    rows = {"loss_rise": [loss + own for own in measured["loss_rise"]], "kl": [kl + own for own in measured["kl"]]}
    return measured | rows | {"unmasked": list(before.unmasked)}


def _write(opened: Checkpoint, settings: Settings, tensors: dict[str, Tensor]) -> None:
    folder = opened.folder
    names = set(expected_tensors(opened.architecture, opened.settings))
    sizes = {name: info.nbytes for name, info in opened.shards.items() if name not in names}
    files = {name: info.file.name for name, info in opened.shards.items() if name not in names}
    with staged_files(folder) as staged:
        write_wina_file(staged / WINA_FILE, tensors, quantized=settings.weight_format is not None)
        added = {name: tensor.nbytes for name, tensor in tensors.items()}
        write_index(staged, files | dict.fromkeys(tensors, WINA_FILE), sizes | added)
        write_json(
            staged / config_file(folder).name, opened.opened.stored | {"quantization_config": settings.to_dict()}
        )
    open_checkpoint(folder)
