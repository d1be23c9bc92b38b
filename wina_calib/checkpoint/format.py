"""File names, tensor names and shapes that docs/format.md promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from wina_calib.budgets.count import count_cells
from wina_calib.budgets.model import Cells
from wina_calib.checkpoint.settings import SAMPLES, Settings
from wina_calib.checkpoint.weight_sample import ends_name, known_ends, others_name
from wina_calib.errors import UsageError
from wina_calib.masks.thresholds import LEVELS
from wina_calib.model.architecture import Architecture, Layer, MaskGroup, Site
from wina_calib.model.tensor_names import is_added, is_derived, is_packed, is_rotation
from wina_calib.quantization.bits import UNQUANTIZED_BITS
from wina_calib.quantization.formats import Spec
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
    if settings.whole_layers:
        out |= {others_name(layer): (len(layer.small), SAMPLES) for layer in arch.layers}
    if settings.vocab:
        out[ends_name(arch)] = (len(known_ends(arch, settings)), SAMPLES)
    return out


def packed_tensors(arch: Architecture, settings: Settings) -> dict[str, Spec]:
    """Names, dtypes and shapes of all tensors that hold quantized weights, lm_head's too; none where nothing is quantized.

    Raises:
        UsageError: the outputs of a projection do not divide into groups, or what is left as it is are not whole sites.
    """
    if settings.weight_format is None:
        return {}
    _check_kept(arch, settings.modules_to_not_convert)
    out: dict[str, Spec] = {}
    for layer, site in arch.sites:
        form = settings.format_of(layer, site)
        if form is None:
            continue
        for group in settings.rule.groups(site):
            specs = form.specs(site.width, [p.out_features for p in group.projections])
            out |= {packed_name(layer, group, part): spec for part, spec in specs.items()}
    if settings.head_bits == 8:
        codes, scales = head_names(arch)
        out[codes] = (torch.int8, (arch.vocab_size, arch.hidden_size))
        out[scales] = (torch.float32, (arch.vocab_size,))
    return out


def stored_cells(arch: Architecture, settings: Settings) -> Cells:
    """Element counts of a checkpoint, and the bits that they are stored in."""
    cells = count_cells(arch, settings.transform)
    if settings.weight_format is None:
        return cells
    bits = np.array([[_site_bits(settings, layer, site) for site in layer.sites] for layer in arch.layers])
    cells = replace(cells, head_bits=float(settings.head_bits))
    if settings.modules_to_not_convert:
        return replace(cells, site_bits=bits)
    return replace(cells, bits=float((cells.weights * bits).sum() / cells.sparse_total))


def _site_bits(settings: Settings, layer: Layer, site: Site) -> float:
    """Bits that a weight of a site takes, with its part of scales."""
    form = settings.format_of(layer, site)
    if form is None:
        return float(UNQUANTIZED_BITS)
    outs = [[p.out_features for p in group.projections] for group in settings.rule.groups(site)]
    return sum(form.bits_a_weight(own) * sum(own) for own in outs) / site.out_features


def _check_kept(arch: Architecture, names: Sequence[str]) -> None:
    """Raise UsageError unless these are the projections of whole sites."""
    sites = [{f"{layer.prefix}{p.module}" for p in site.projections} for layer, site in arch.sites]
    kept = set(names)
    whole = set().union(*(own for own in sites if own <= kept))
    if odd := sorted(kept - whole):
        raise UsageError(
            f"modules_to_not_convert names {odd[0]!r:.80}, which is no projection of the model, or not all projections that "
            "read the same input."
        )


def packed_name(layer: Layer, group: MaskGroup, part: str) -> str:
    """Name of a part, such as `codes`, of a mask group's quantized weights."""
    return f"{layer.prefix}wina.{group.key}.{part}"


def head_names(arch: Architecture) -> tuple[str, str]:
    """Names of the codes and scales of lm_head in int8; where it is tied they are the embedding's."""
    module = arch.embed if arch.tied else arch.lm_head
    return f"{module}.codes", f"{module}.scales"


def model_names(shards: Shards, arch: Architecture) -> list[str]:
    """Names of a model's weights on disk, which its fingerprint covers: run-time matrices and quantized weights too."""
    tied = f"{arch.lm_head}.weight" if arch.tied else None
    return sorted(
        n for n in shards if not is_derived(n) and n != tied and (not is_added(n) or is_rotation(n) or is_packed(n))
    )
