"""What a calibration's result depends on: the same identity on the same machine gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from wina_calib.calibration.choose_budget import budget_files, is_file
from wina_calib.calibration.job import Job
from wina_calib.calibration.options import OPERATIONAL
from wina_calib.checkpoint.format import model_names
from wina_calib.checkpoint.side_files import side_files
from wina_calib.corpus.blocks import Blocks
from wina_calib.version import versions

# Raised where a phase gives something else from the same input, so that no result is made of both.
FORMAT = 2
_LEFT_OUT = OPERATIONAL | {"dtype"}  # what dtype, device and micro-batch come to is in the identity


def identity(job: Job, base: Blocks) -> dict[str, Any]:
    """Everything that the result of a job depends on, in plain values. All weights are read for it."""
    source, options, device = job.source, asdict(job.options), job.compute.device
    return {
        "format": FORMAT,
        "model": {
            "name": source.name,
            "commit": source.commit,
            "weights": source.shards.fingerprint(model_names(source.shards, source.architecture)),
            "config": hashlib.sha256(json.dumps(source.raw_config, sort_keys=True).encode()).hexdigest(),
            "files": _digest(side_files(source.opened)),
        },
        "text": {"calibration": job.blocks.fingerprint, "perplexity": base.fingerprint},
        "options": {name: value for name, value in options.items() if name not in _LEFT_OUT},
        "budget_file": budget_digest(job.options.budget),
        "compute": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "dtype": str(job.compute.dtype).removeprefix("torch."),
            "micro_batch": job.compute.micro_batch,
            "threads": torch.get_num_threads(),
        },
        "versions": versions(),
    }


def budget_digest(budget: str) -> str | None:
    """SHA-256 (hex) of the files of a `--budget` value; None where it is a method."""
    return _digest(budget_files(budget)) if is_file(budget) else None


def _digest(paths: Iterable[Path]) -> str:
    """SHA-256 (hex) of files' names and bytes."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
