"""Puts sites into a model, and checks them once weights are there."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from wina_calib.checkpoint.format import expected_tensors
from wina_calib.checkpoint.reader import check_complete, check_shapes, check_values, norms_match, quantized_tensors
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.weight_sample import ends_name, known_ends, matches, others_name
from wina_calib.errors import CheckpointError, RuntimeLoadError
from wina_calib.masks.score import column_norms
from wina_calib.masks.thresholds import site_sparsity
from wina_calib.model.architecture import Architecture
from wina_calib.runtime import decoder
from wina_calib.runtime.fast_path import attention, blocks, lm_head, norms
from wina_calib.runtime.fast_path import decoder as fast_decoder
from wina_calib.runtime.fast_path import layers as fast_layers
from wina_calib.runtime.modules import GroupState, OtherParameters, SiteState, SparseLinear, site_states
from wina_calib.runtime.patches import compile_guards, continuous_batching, late_stop
from wina_calib.runtime.quantized import QuantizedLinear, QuantizedRowsModule, quantize_head
from wina_calib.runtime.state import RuntimeState
from wina_calib.runtime.watch import Watch
from wina_calib.transforms import plan

logger = logging.getLogger(__name__)

# How many columns of a weight are looked at in a checkpoint that stores none of its elements.
FEW_COLUMNS = 16


def insert_sites(model: PreTrainedModel, arch: Architecture, settings: Settings) -> None:
    """Give every decoder layer a `wina` module and replace its projections."""
    state = RuntimeState(prefill=settings.prefill, first_token=settings.first_token)
    rotated = plan(settings.transform, arch).sites
    layers = model.get_submodule(arch.layers_path)
    for described in arch.layers:
        layer = layers.get_submodule(str(described.index))
        holder = nn.Module()
        for site in described.sites:
            first, form = layer.get_submodule(site.projections[0].module), settings.format_of(described, site)
            turned = first.weight.dtype if site.name in rotated else None
            with torch.device(first.weight.device):
                site_state = SiteState(described.index, site, settings, state, turned, form)
            kind = SparseLinear if form is None else QuantizedLinear
            holder.add_module(site.name, site_state)
            state.sites.append(site_state)
            for group in site_state.groups:
                for i, projection in enumerate(group.projections):
                    dense = layer.get_submodule(projection.module)
                    assert isinstance(dense, nn.Linear)
                    layer.set_submodule(projection.module, kind(dense, site_state, group, i))
        if settings.whole_layers:
            holder.add_module("others", OtherParameters(len(described.small)))
        if settings.vocab and described.index == 0:
            holder.add_module("ends", OtherParameters(len(known_ends(arch, settings))))
        layer.add_module("wina", holder)
    quantize_head(model, arch, settings)
    norms.replace_norms(model, state)
    if rotated or settings.weight_format is not None:
        norm = model.get_submodule(arch.final_norm.module)
        norm.weight = nn.Parameter(norm.weight.detach().unsqueeze(0), requires_grad=False)  # as it is stored
    path, _, name = arch.layers_path.rpartition(".")
    fast_decoder.shorten(
        model.get_submodule(path), arch.embed.removeprefix(f"{path}."), arch.final_norm.module.removeprefix(f"{path}.")
    )
    decoder.install(model.get_submodule(path), state, name)
    model.__dict__["wina_state"] = state
    compile_guards.prefer(model)
    attention.prefer(model)
    for described in arch.layers:
        blocks.shorten(layers.get_submodule(str(described.index)), described)
        fast_layers.shorten(layers.get_submodule(str(described.index)), described)
    lm_head.prefer(model)
    late_stop.install()
    continuous_batching.install(attention.NAME, attention.STOCK)


def check_files(model: PreTrainedModel, arch: Architecture, files: Iterable[str]) -> None:
    """Check that what the files hold has a place in the model, before any of it is read.

    Raises:
        CheckpointError: a tensor has another shape, or belongs to a layer that the model does not have.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layer = re.compile(re.escape(arch.layers_path) + r"\.(\d+)\.")
    for file in files:
        with safe_open(file, framework="pt") as stored:
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in sorted(stored.keys())}
        check_shapes(model.name_or_path, expected, shapes)
        more = next((n for n in shapes if (at := layer.match(n)) and int(at[1]) >= len(arch.layers)), None)
        if more is not None:
            raise CheckpointError(
                f"{model.name_or_path}: holds {more}, but config.json says that there are {len(arch.layers)} layers. Download "
                "config.json again or calibrate again."
            )


def check_loaded(model: PreTrainedModel, arch: Architecture, settings: Settings) -> None:
    """Check that every calibration tensor was in the files, is sound, and belongs to these weights.

    Raises:
        CheckpointError: a tensor is missing or damaged.
        RuntimeLoadError: the weights are not those of the calibration.
    """
    expected = expected_tensors(arch, settings)
    loaded = {n: b for n, b in model.named_buffers() if getattr(b, "_is_hf_initialized", False)}
    buffers = {name: buffer for name, buffer in loaded.items() if name in expected}
    packed = quantized_tensors(model.name_or_path, arch, settings)
    shapes = {name: tuple(buffer.shape) for name, buffer in loaded.items()}
    check_complete(model.name_or_path, {name: shape for name, (_, shape) in packed.items()}, shapes)
    check_values(model.name_or_path, {n: loaded[n] for n in packed if n.endswith(".scales") and not loaded[n].is_meta})
    check_complete(model.name_or_path, expected, shapes)
    here = {name: b for name, b in buffers.items() if not b.is_meta}
    check_values(model.name_or_path, here)
    for site in site_states(model):
        site.asked = site_sparsity(settings.anchors, site.budget.cpu().numpy(), settings.sparsity)
        site.state.watch = Watch()
    if not settings.has_kernels:
        _say_once(f"select {settings.select}, score {settings.score}")
    other = [name for name, same in _compared(model, arch, settings) if not same]
    if other:
        raise RuntimeLoadError(
            f"{model.name_or_path}: {len(other)} weights are not those that the calibration was made for, such as "
            f"{other[0]}. Were they trained or replaced afterwards, or an adapter merged? Calibrate them again."
        )
    for module in model.modules():
        if isinstance(module, GroupState | QuantizedRowsModule):
            module.settle()


def _compared(model: PreTrainedModel, arch: Architecture, settings: Settings) -> Iterator[tuple[str, bool]]:
    """Each parameter, and whether it is that of the calibration, as far as what is stored tells."""
    yield from _compared_ends(model, arch, settings)
    for layer in arch.layers if settings.whole_layers else ():
        others = [f"{layer.prefix}{name}" for name in layer.small]
        parameters = [model.get_parameter(name) for name in others]
        if not any(parameter.is_meta for parameter in parameters):
            yield from zip(others, map(matches, model.get_buffer(others_name(layer)), parameters), strict=True)
    for layer, site in arch.sites:
        state = model.get_submodule(f"{layer.prefix}wina.{site.name}")
        names = [f"{layer.prefix}{p.module}" for p in site.projections]
        few = slice(0, site.width, max(1, site.width // FEW_COLUMNS))
        if state.format is not None:
            for group in (
                settings.rule.groups(site) if settings.score == "wina" and settings.transform != "paper" else ()
            ):
                part = state.get_submodule(group.name)
                if not part.codes.is_meta:
                    fresh = column_norms([part.quantized.dequantize(inputs=few).t()]).pow(settings.exponent)
                    yield f"{layer.prefix}{group.projections[0].module}", norms_match(part.norm[few], fresh)
            continue
        weights = {p.name: model.get_submodule(n).weight for p, n in zip(site.projections, names, strict=True)}
        if any(weight.is_meta for weight in weights.values()):  # it is elsewhere, and comes when it is used
            continue
        if settings.samples:
            yield from zip(names, map(matches, state.sample, weights.values()), strict=True)
        elif settings.score == "wina" and settings.transform != "paper":
            for group in settings.rule.groups(site):
                members = [weights[p.name] for p in group.projections]
                fresh = column_norms([w.detach()[:, few] for w in members]).pow(settings.exponent)
                norm = state.get_submodule(group.name).norm
                yield f"{layer.prefix}{group.projections[0].module}", norms_match(norm[few], fresh)


def _compared_ends(model: PreTrainedModel, arch: Architecture, settings: Settings) -> Iterator[tuple[str, bool]]:
    """Each parameter outside of the layers, and whether it is that of the calibration; rows may have been added or cut off."""
    if not settings.vocab or (samples := model.get_buffer(ends_name(arch))).is_meta:
        return
    for name, stored in zip(known_ends(arch, settings), samples, strict=True):
        parameter = model.get_parameter(name)
        if name == f"{arch.final_norm.module}.weight":
            yield name, parameter.is_meta or matches(stored, parameter.flatten())
        else:
            yield name, parameter.is_meta or matches(stored, parameter, settings.vocab)


@cache
def _say_once(what: str) -> None:
    """One log line a process for masks that no kernel makes."""
    logger.warning("%s: no kernel serves this; masked dense products are used, no faster than dense", what)
