"""Calibrate a model: a causal language model in, a sparse-ready checkpoint out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wina_calib.allocation import settle
from wina_calib.card import write_card
from wina_calib.cells import count_cells
from wina_calib.checkpoint import WINA_FILE, open_checkpoint
from wina_calib.corpus import HELDOUT_DATA, Blocks, load_blocks
from wina_calib.errors import UsageError
from wina_calib.job import Job
from wina_calib.options import CalibrateOptions, make_options
from wina_calib.output import check_output, output_folder
from wina_calib.placement import default_micro_batch, fitting_length, pick_device, pick_dtype
from wina_calib.progress import Progress, Silent
from wina_calib.reference import check_possible
from wina_calib.settings import Settings
from wina_calib.source import has_own_code, open_source, remote_code
from wina_calib.transforms import plan

BASE_TOKENS = 16_384
BASE_SEQ_LEN = 2048


@dataclass(frozen=True)
class Result:
    """What a calibration made: the folder and the settings in its config."""

    folder: Path
    settings: Settings


def calibrate(model: str | Path, output: str | Path, *, progress: Progress | None = None, **options: Any) -> Result:
    """Calibrate a causal language model and write a sparse-ready checkpoint.

    Args:
        model: a Hugging Face model folder, a Hub repository id, or `demo`.
        output: folder to write; it appears whole or not at all.
        progress: hears the estimate, phases and steps.
        **options: the fields of `CalibrateOptions`: sparsity, transform, data, samples, seq_len ...

    Raises:
        WinaError: with a message that says what to do.

    Example:
        ```python
        wina_calib.calibrate("demo", "demo-sparse", sparsity=0.5)
        ```
    """
    chosen = make_options(options)
    with remote_code(chosen.trust_remote_code):
        return _calibrate(str(model), Path(output), chosen, progress or Silent())


def _calibrate(model: str, target: Path, chosen: CalibrateOptions, progress: Progress) -> Result:
    check_output(target, overwrite=chosen.overwrite)
    source = open_source(model, revision=chosen.revision)
    by_reference = chosen.weights == "reference"
    check_output(target, overwrite=chosen.overwrite, keep=source.folder, made=(WINA_FILE,))
    transform = plan("none" if by_reference and chosen.transform == "auto" else chosen.transform, source.architecture)
    if by_reference:
        check_possible(transform)
    if has_own_code(source.folder) and (by_reference or not transform.is_free):
        what = "weights by reference" if by_reference else f"the run-time matrices of transform {transform.name}"
        raise UsageError(
            f"{model} runs Python code of its own, which does not go with {what}. Leave --weights reference out, and take "
            "--transform none, global, head or auto."
        )
    chosen = settle(chosen, source.architecture, count_cells(source.architecture, transform.name))
    device = pick_device(chosen.device)
    tokenizer = source.tokenizer()
    seq_len = fitting_length(source, chosen.seq_len)
    blocks = load_blocks(chosen.data, tokenizer, samples=chosen.samples, seq_len=seq_len, seed=chosen.seed)
    job = Job(
        source=source,
        options=chosen,
        transform=transform,
        blocks=blocks,
        device=device,
        dtype=pick_dtype(chosen.dtype, source.dtype, device),
        micro_batch=chosen.micro_batch or default_micro_batch(device, seq_len),
        report=progress,
    )
    job.report.planned(job.estimate())
    # A caller's no_grad or inference_mode would take away the gradients that a budget is chosen by.
    with output_folder(target, overwrite=chosen.overwrite) as folder, torch.inference_mode(False), torch.enable_grad():
        settings = job.run(folder, base_blocks(tokenizer, min(seq_len, BASE_SEQ_LEN)))
        open_checkpoint(folder)
        write_card(folder)
    return Result(target, settings)


def base_blocks(tokenizer: Any, seq_len: int) -> Blocks:
    """The stated sample on which the original model's perplexity is kept: built-in held-out text."""
    return load_blocks(
        HELDOUT_DATA, tokenizer, samples=max(1, BASE_TOKENS // seq_len), seq_len=seq_len, seed=0, min_tokens=1
    )
