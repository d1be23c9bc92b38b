"""What a checkpoint was measured to do: one evaluation, kept in its folder as `wina_evaluation.json`.

It names the calibration that it belongs to, so that figures never outlive the thresholds they were measured with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wina_calib.checkpoint.format import EVALUATION_FILE, WINA_FILE
from wina_calib.checkpoint.local_paths import published
from wina_calib.common.atomic import write_file
from wina_calib.common.text import finite
from wina_calib.errors import CheckpointError
from wina_calib.storage import Shards, read_json

FORMAT = "wina-evaluation/1"
_NUMBERS = (
    "sparsity", "model_sparsity", "dense_ppl", "sparse_ppl", "kl", "top1_agreement", "read_fraction",
    "read_fraction_decoder", "tokens",
)  # fmt: skip


def save_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> Path:
    """Keep an evaluation in a checkpoint's folder; the model card shows it.

    Raises:
        OutputError: the folder cannot be written.
    """
    figures = finite(evaluation)
    told = {"data": [published(str(spec)) for spec in figures["data"]]} if "data" in figures else {}
    record = {"format": FORMAT, "calibration": calibration_fingerprint(folder), **figures, **told}
    path = folder / EVALUATION_FILE
    write_file(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The evaluation in a folder; None where there is none, or it belongs to other thresholds.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return None
    record = read_json(path)
    sound = (
        isinstance(record, dict)
        and record.get("format") == FORMAT
        and all(isinstance(record.get(key), int | float) for key in _NUMBERS)
        and isinstance(record.get("data"), list)
    )
    if not isinstance(record, dict) or not sound:
        raise CheckpointError(f"{path} is damaged. Delete it, or run `wina-calib evaluate {folder} --save` again.")
    return record if record.get("calibration") == calibration_fingerprint(folder) else None


def calibration_fingerprint(folder: Path) -> str:
    """Fingerprint of everything that calibration stored, thresholds and budget included."""
    shards = Shards.open(folder)
    return shards.fingerprint([name for name, info in shards.items() if info.file.name == WINA_FILE])
