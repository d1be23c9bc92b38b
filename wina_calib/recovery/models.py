"""The two models of a recovery: the dense one, and the one that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from wina_calib.common.progress import Progress
from wina_calib.model.architecture import Architecture
from wina_calib.model.folder import code_is_trusted
from wina_calib.recovery.hidden import rotation_between
from wina_calib.recovery.options import RecoverOptions
from wina_calib.recovery.plan import Size, TrainingPlan


def load_plain(folder: Path, device: torch.device, dtype: Any) -> PreTrainedModel:
    """A plain model on a device."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=code_is_trusted(), attn_implementation="sdpa"
    )
    return model.to(device)


def size_of(student: PreTrainedModel, arch: Architecture, teacher: PreTrainedModel) -> Size:
    """What memory depends on."""
    config = student.config.get_text_config()
    projections = [p for _, site in arch.sites for p in site.projections]
    return Size(
        weights=sum(p.numel() for p in student.parameters()),
        trained=sum(p.in_features * p.out_features for p in projections),
        projections=sum(p.in_features + p.out_features for p in projections),
        layers=len(arch.layers),
        width=arch.hidden_size,
        inner=max(site.width for _, site in arch.sites),
        vocabulary=config.vocab_size,
        itemsize=teacher.dtype.itemsize,
    )


def prepared(
    student: PreTrainedModel, arch: Architecture, plan: TrainingPlan, chosen: RecoverOptions, stored: torch.dtype
) -> PreTrainedModel:
    """The student with its trained weights: those of the decoder's layers, or adapters put into it.

    On a GPU what is not trained is as it was stored: a residual stream of 16 bits, as when the model runs.
    """
    student.requires_grad_(False)
    layers: nn.Module = student.get_submodule(arch.layers_path)
    if student.device.type == "cuda":
        trained = set() if plan.adapters else {id(p) for p in layers.parameters()}
        for p in student.parameters():  # and no buffers: positions take 32 bits
            if id(p) not in trained:
                p.data = p.data.to(stored)
    if plan.adapters:
        from peft import LoraConfig, inject_adapter_in_model

        names = [layer.prefix + p.module for layer, site in arch.sites for p in site.projections]
        torch.manual_seed(chosen.seed)
        inject_adapter_in_model(LoraConfig(r=chosen.rank, lora_alpha=chosen.rank, target_modules=names), student)
        for p in student.parameters():
            if p.requires_grad:
                p.data = p.data.float()
    else:
        layers.requires_grad_(True)
    if plan.again:
        enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # the first name since transformers 5.24
    return student


def rotation_to(
    teacher: PreTrainedModel, student: PreTrainedModel, chosen: RecoverOptions, report: Progress
) -> Tensor | None:
    """What takes the dense model's hidden states to the student's axes; None where they are not to be compared."""
    if not chosen.hidden:
        return None
    dense, own = (model.get_input_embeddings().weight for model in (teacher, student))
    rotation = rotation_between(dense, own) if dense.shape == own.shape else None
    if rotation is None:
        report.note("hidden states are left out of the loss: no rotation takes the dense model's to the checkpoint's")
    return rotation
