"""From trained weights to the checkpoint that is given back: written as a plain model, and calibrated as any."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from wina_calib.calibration.cost import CLOSED_LOOP_PASSES
from wina_calib.calibration.loss_curves import CURVE_PASSES, usable_tokens
from wina_calib.calibration.run import calibrate
from wina_calib.checkpoint.local_paths import remember
from wina_calib.checkpoint.reader import Checkpoint
from wina_calib.checkpoint.side_files import copy_side_files
from wina_calib.checkpoint.writer import write_json
from wina_calib.common.distributed import Ranks
from wina_calib.common.progress import Progress
from wina_calib.corpus.blocks import MIN_TOKENS
from wina_calib.errors import OutputError
from wina_calib.model.folder import code_is_trusted, open_folder, read_config
from wina_calib.model.locate import DEMO
from wina_calib.recovery.options import SELF, RecoverOptions
from wina_calib.recovery.plan import TrainingPlan
from wina_calib.recovery.record import Trained
from wina_calib.recovery.sharded import whole
from wina_calib.recovery.text import data_of
from wina_calib.storage import Shards


@torch.no_grad()
def trained_weights(student: PreTrainedModel, plan: TrainingPlan, ranks: Ranks) -> dict[str, Tensor]:
    """The trained weights by their names in a plain model, on the CPU; adapters are merged.

    Every process calls this; only the first one gets them.
    """
    if plan.adapters:
        for module in list(student.modules()):
            if hasattr(module, "get_delta_weight"):
                module.merge()
    found = {}
    for name, p in student.named_parameters():
        if (p.requires_grad or plan.adapters) and ".lora_" not in name:
            value = whole(p)
            if ranks.is_first:
                found[name.replace(".base_layer.", ".")] = value.cpu()
    return found


def write_trained(weights: Mapping[str, Tensor], dense: Path, folder: Path) -> None:
    """Write trained weights as a plain model folder, in the dtype that they had.

    `dense` are the checkpoint's weights as a plain model, untrained.

    Raises:
        OutputError: the disk is full.
    """
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=stored_dtype(dense), trust_remote_code=code_is_trusted())
    plain.load_state_dict(weights, strict=False)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        plain.save_pretrained(folder)
    except SafetensorError as error:  # the library's own, with the system's in its text
        if "No space left" not in str(error):
            raise
        raise OutputError(f"{folder}: the disk is full. Free space, and run the same command again.") from error
    copy_side_files(open_folder(dense), folder)


def stored_dtype(dense: Path) -> torch.dtype:
    """The dtype of a plain model's weights on disk."""
    shards = Shards.open(dense)
    return shards[next(name for name in shards if name.endswith("_proj.weight"))].dtype


def blocks_of(provenance: Mapping[str, Any], seq_len: int) -> int:
    """Blocks of `seq_len` tokens to calibrate on: the checkpoint's, but enough for more than `--quick`."""
    return max(int(provenance.get("samples", 128)), -(-MIN_TOKENS // seq_len))


def grid_of(opened: Checkpoint, sparsities: tuple[float, ...]) -> tuple[float, ...]:
    """The anchors that trained weights are calibrated at: the checkpoint's and those that were trained."""
    return tuple(sorted({*(a for a in opened.settings.anchors if a > 0), *sparsities}))


def calibration_passes(opened: Checkpoint, sparsities: tuple[float, ...]) -> float:
    """Tokens that go through the model where trained weights are calibrated, each as often as it does."""
    settings = opened.settings
    tokens = blocks_of(settings.provenance, settings.seq_len) * settings.seq_len
    fitted = 1 + CLOSED_LOOP_PASSES * len(grid_of(opened, sparsities))
    return tokens * fitted + usable_tokens(tokens) * CURVE_PASSES


def calibrate_trained(
    weights: Path,
    made: Path,
    opened: Checkpoint,
    chosen: RecoverOptions,
    sparsities: tuple[float, ...],
    trained: Trained,
    base: Path,
    report: Progress,
) -> None:
    """Fit thresholds for the trained weights, with the site sparsities that they were trained under.

    `opened` is the checkpoint that was given, `base` the dense model's folder, `made` the folder to write.
    """
    settings, provenance = opened.settings, opened.settings.provenance
    calibrate(
        weights,
        made,
        progress=report,
        budget=str(opened.folder),
        transform="none",
        grid=grid_of(opened, sparsities),
        data=data_of(chosen, opened),
        samples=blocks_of(provenance, settings.seq_len),
        seq_len=settings.seq_len,
        score=settings.score,
        masks=settings.masks,
        exponent=settings.exponent,
        first_token=settings.first_token,
        prefill=settings.prefill,
        sparsity=settings.sparsity if settings.sparsity in sparsities else sparsities[-1],
        overwrite=True,
        device=chosen.device,
        **({"bits": chosen.bits, "group_size": chosen.group_size} if chosen.bits else {}),
    )
    facts = asdict(trained) | {"sparsities": list(sparsities), "tokens": trained.steps * chosen.batch * chosen.seq_len}
    del facts["losses"]
    config = read_config(made)
    section = config["quantization_config"]
    facts["data"] = [SELF] if chosen.data == (SELF,) else section["provenance"]["data"]
    section["provenance"] |= {
        "recovered": facts,
        "base_model": provenance.get("base_model", base.name),
        "base_commit": provenance.get("base_commit"),
    }
    write_json(made / "config.json", config)
    if provenance.get("base_commit") is None and provenance.get("base_model") != DEMO:
        remember(section["weights"], section["provenance"], base_model=base)
