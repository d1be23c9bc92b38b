"""File names, tensor names and shapes that docs/format.md promises."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wina_calib.checkpoint.settings import Settings
from wina_calib.masks.thresholds import LEVELS
from wina_calib.model.architecture import Architecture
from wina_calib.model.tensor_names import is_added, is_derived, is_rotation
from wina_calib.storage import Shards

WINA_FILE = "wina.safetensors"
HEAT_MAP = "wina_budget.png"
INDEX_FILE = "model.safetensors.index.json"
EVALUATION_FILE = "wina_evaluation.json"


@dataclass(frozen=True)
class SiteTensors:
    """What is stored for one site: see `docs/format.md`."""

    norms: dict[str, Tensor]
    tables: dict[str, Tensor]
    thresholds: dict[str, Tensor]
    budget: Tensor
    error: Tensor
    curve: Tensor | None = None
    sample: Tensor | None = None

    def named(self, prefix: str, site: str) -> dict[str, Tensor]:
        """Tensors by their full names, float32."""
        path = f"{prefix}wina.{site}"
        out = {f"{path}.budget": self.budget, f"{path}.error": self.error}
        if self.curve is not None:
            out[f"{path}.curve"] = self.curve
        if self.sample is not None:
            out[f"{path}.sample"] = self.sample
        for group, norm in self.norms.items():
            out |= {
                f"{path}.{group}.norm": norm,
                f"{path}.{group}.table": self.tables[group],
                f"{path}.{group}.threshold": self.thresholds[group],
            }
        return {name: tensor.to(torch.float32).contiguous() for name, tensor in out.items()}


def expected_tensors(arch: Architecture, settings: Settings) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that calibration adds to a checkpoint, run-time matrices left out."""
    anchors, levels = len(settings.anchors), len(LEVELS)
    out: dict[str, tuple[int, ...]] = {}
    for layer, site in arch.sites:
        path = f"{layer.prefix}wina.{site.name}"
        out |= {f"{path}.budget": (anchors,), f"{path}.error": (anchors,)}
        if settings.curve_levels:
            out[f"{path}.curve"] = (len(settings.curve_levels),)
        if settings.samples:
            out[f"{path}.sample"] = (len(site.projections), settings.samples)
        for group in settings.rule.groups(site):
            out |= {
                f"{path}.{group.name}.norm": (site.width,),
                f"{path}.{group.name}.table": (anchors, levels),
                f"{path}.{group.name}.threshold": (),
            }
    return out


def model_names(shards: Shards, arch: Architecture) -> list[str]:
    """Names of a model's weights on disk, which its fingerprint covers: run-time matrices too."""
    tied = f"{arch.lm_head}.weight" if arch.tied else None
    return sorted(n for n in shards if not is_derived(n) and n != tied and (not is_added(n) or is_rotation(n)))
