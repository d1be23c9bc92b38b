"""CATS (arXiv 2404.08763) for comparisons: the gate's activation `act(gate(x))` masks up's outputs and down's inputs.

Attention and the gate are dense. Where the activation is masked, what up computes is multiplied by zero and down reads zero:
up's rows and down's columns need not be read, so zeroing the activation is the whole method. It runs as masked dense
products; the runtime has no kernel for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.errors import UnsupportedModel
from wina_calib.masks.histogram import ScoreHistogram
from wina_calib.masks.mask import first_token_rows
from wina_calib.masks.thresholds import LEVELS, threshold_at
from wina_calib.model.architecture import Architecture, Layer
from wina_calib.runtime.state import SiteCount


def gated_share(arch: Architecture) -> float:
    """Share of the sites' weights that gate masks can spare: up and down."""
    width = [layer.site("mlp_out").width for layer in arch.layers]
    spared = sum(
        w * arch.hidden_size + layer.site("mlp_out").weights for w, layer in zip(width, arch.layers, strict=True)
    )
    return spared / sum(site.weights for _, site in arch.sites)


def activation(layer: Layer, module: nn.Module) -> nn.Module:
    """The module of a decoder layer's MLP that computes the gate's activation: its only child without weights.

    Raises:
        UnsupportedModel: there is not just one.
    """
    mlp = module.get_submodule(layer.mlp)
    plain = [child for child in mlp.children() if next(child.parameters(), None) is None]
    if len(plain) != 1:
        raise UnsupportedModel(
            f"{layer.prefix}{layer.mlp} has {len(plain)} activation modules, CATS needs one. Leave the method out."
        )
    return plain[0]


@torch.no_grad()
def fit_gates(stream: LayerStream, sparsities: Sequence[float]) -> Tensor:
    """Thresholds on `abs(act(gate(x)))` in closed loop: each layer sees what the sparse layers before it produce.

    Returns:
        (sparsities, layers) float32.
    """
    arch, start = stream.source.architecture, stream.embed()
    states = [start, *(stream.store() for _ in sparsities[1:])]
    for state in states[1:]:
        state.copy_from(start)
    thresholds = torch.zeros(len(sparsities), len(arch.layers))
    for index, module in stream.layers():
        act = activation(arch.layers[index], module)
        for row, (sparsity, hidden) in enumerate(zip(sparsities, states, strict=True)):
            histogram = ScoreHistogram(stream.device)
            with act.register_forward_hook(lambda _, args, out, seen=histogram: seen.update(out[:, 1:].float().abs())):
                for batch in range(len(stream.batches)):
                    module(hidden[batch], **stream.kwargs(index, batch))
            threshold = threshold_at(histogram.quantiles(LEVELS).float(), sparsity)
            thresholds[row, index] = threshold
            with act.register_forward_hook(lambda _, args, out, t=threshold: mask_gate(out, t)):
                for batch in range(len(stream.batches)):
                    hidden[batch] = module(hidden[batch], **stream.kwargs(index, batch))
    for state in states:
        state.clear()
    return thresholds


def mask_gate(out: Tensor, threshold: float, count: SiteCount | None = None) -> Tensor:
    """Activations (batch, seq, width) with those of magnitude up to the threshold at zero; first tokens stay whole."""
    keep = (out.float().abs() > threshold) | first_token_rows(out).unsqueeze(-1)
    if count is not None:
        count.seen += keep.numel()
        count.dropped += keep.numel() - int(keep.sum())
    return out.masked_fill(~keep, 0)


@contextmanager
def masked_gates(model: PreTrainedModel, arch: Architecture, thresholds: Tensor) -> Iterator[SiteCount]:
    """Mask a dense model's gates by thresholds (layers,) for the length of the context; prefill as decode."""
    layers, count = model.get_submodule(arch.layers_path), SiteCount()
    with ExitStack() as hooks:
        for layer, threshold in zip(arch.layers, thresholds.tolist(), strict=True):
            act = activation(layer, layers.get_submodule(str(layer.index)))
            hook = act.register_forward_hook(lambda _, args, out, t=threshold: mask_gate(out, t, count))
            hooks.enter_context(hook)
        yield count
