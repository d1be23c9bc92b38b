"""What a calibration found, written as a checkpoint: tensors, settings, and where it came from."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from wina_calib.budgets import budget_at
from wina_calib.budgets.count import count_cells
from wina_calib.calibration.choose_budget import allowed
from wina_calib.calibration.dropped_levels import CURVE_LEVELS
from wina_calib.calibration.fit_thresholds import at_sparsity
from wina_calib.calibration.job import Begun, Job
from wina_calib.checkpoint.by_reference import write_reference
from wina_calib.checkpoint.format import model_names, stored_cells
from wina_calib.checkpoint.local_paths import published, published_command, remember
from wina_calib.checkpoint.quantized_weights import QuantizedWeights
from wina_calib.checkpoint.settings import SAMPLES, Settings
from wina_calib.checkpoint.side_files import copy_side_files
from wina_calib.checkpoint.verdict import HELD_OUT, QUICK, VERDICT, HeldOut, Verdict
from wina_calib.checkpoint.weight_sample import stored_samples
from wina_calib.checkpoint.writer import write_calibration
from wina_calib.corpus.blocks import Blocks
from wina_calib.model.locate import DEMO
from wina_calib.storage import Shards
from wina_calib.version import versions


def write_result(
    job: Job, folder: Path, begun: Begun, tensors: dict[str, Tensor], base: Blocks, measured: dict[str, Any]
) -> Settings:
    """Write what was fitted beside the weights; gives the checkpoint's settings."""
    dense = begun.dense
    held = HeldOut.from_dict(measured[HELD_OUT])
    assert held is not None
    asked, limit = job.options.sparsity, None
    if asked is None:
        limit = job.options.max_ppl_rise
        lowest, highest = allowed(job.options, count_cells(dense.architecture, job.transform.name))
        asked = min(max(held.choose(limit), lowest), highest)
        tensors = at_sparsity(tensors, dense.architecture, job.rule, job.options.anchors, asked)
    stored, settings = dense.shards, replace(job.settings, sparsity=asked)
    if settings.weight_format is not None:
        QuantizedWeights(dense, settings, folder, len(dense.architecture.layers)).write_ends()
        copy_side_files(dense.opened, folder)
        stored = Shards.open(folder)
    budget = partial(budget_at, job.options.anchors, begun.chosen.rows)
    verdict = Verdict.of(held, stored_cells(dense.architecture, settings), asked, limit, budget)
    settings = replace(
        settings,
        curve_levels=CURVE_LEVELS if begun.chosen.curves is not None else (),
        weights=stored.fingerprint(model_names(stored, dense.architecture)),
        samples=SAMPLES if settings.weight_format is None else 0,
        whole_layers=True,
        vocab=dense.architecture.vocab_size,
        provenance=_provenance(job, begun, base) | measured | {VERDICT: verdict.to_dict()},
    )
    tensors = {**tensors, **stored_samples(dense.shards, dense.architecture, settings)}
    is_local = job.source.commit is None and job.source.name != DEMO
    base_model = job.source.folder if is_local else None
    remember(settings.weights, settings.provenance, base_model=base_model, data=job.blocks.data)
    if job.options.weights == "reference":
        write_reference(folder, tensors, settings, job.source)
    else:
        write_calibration(folder, tensors, settings, job.source, untied=begun.untied, runtime=not job.transform.is_free)
    return settings


def _provenance(job: Job, begun: Begun, base: Blocks) -> dict[str, Any]:
    return {
        "base_model": job.source.name if job.source.commit is not None else published(job.source.name),
        "base_commit": job.source.commit,
        "base_ppl": begun.base_ppl,
        "base_ppl_data": list(base.data),
        "base_ppl_tokens": base.tokens,
        "base_ppl_fingerprint": base.fingerprint,
        "data": list(map(published, job.blocks.data)),
        "data_fingerprint": job.blocks.fingerprint,
        "samples": job.blocks.requested,
        "blocks": len(job.blocks.ids),
        "seq_len": job.blocks.ids.shape[1],
        "seed": job.options.seed,
        "loop": job.options.loop,
        "compute_dtype": str(job.compute.dtype).removeprefix("torch."),
        "untied": begun.untied,
        "command": _command(),
        "versions": versions(),
    } | ({QUICK: True} if job.options.quick else {})


def _command() -> str:
    program = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path("python")
    ours = program.name == "wina-calib" or program.parts[-2:] == ("wina_calib", "__main__.py")
    return published_command(["wina-calib", *sys.argv[1:]]) if ours else "wina_calib.calibrate"
