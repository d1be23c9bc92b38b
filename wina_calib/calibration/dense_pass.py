"""The dense model over the text; feeds the transforms' statistics."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.masked_layer import MaskedLayer
from wina_calib.common.progress import SILENT, Progress
from wina_calib.masks.rule import MaskRule
from wina_calib.storage.hidden_states import HiddenStates
from wina_calib.storage.resume import NOT_SAVED, Phase
from wina_calib.transforms import Statistics


@torch.no_grad()
def dense_pass(
    stream: LayerStream, statistics: Statistics | None = None, *, phase: Phase = NOT_SAVED, progress: Progress = SILENT
) -> HiddenStates:
    """Run the dense model and return its last hidden states.

    `statistics` sees each site's inputs without first tokens.
    """
    arch = stream.source.architecture
    blocks, seq_len = stream.batches[0].shape
    hidden = stream.embed()
    if phase.done_items and statistics is not None:
        statistics.load_state_dict(phase.tensors())
    for (index, module), done in phase.each(stream.layers, {"hidden": hidden}, stream.blocks, progress):
        with MaskedLayer(arch.layers[index], module, MaskRule("teal"), {}) as layer:
            for batch in stream.mine:
                if statistics is not None:
                    if batch == 0:
                        statistics.update_massive(index, hidden[batch][0])
                    first = batch * blocks * (seq_len - 1)
                    layer.observe = partial(_observe, statistics, index, first)
                hidden[batch] = layer.run(hidden[batch], stream.kwargs(index, batch))
        if statistics is not None:
            statistics.reduce(index, stream.ranks)
        done(f"layer {index + 1}", tensors=None if statistics is None else statistics.state_dict(index))
    return hidden


def _observe(statistics: Statistics, layer: int, first: int, site: str, x: Tensor) -> None:
    statistics.update(layer, site, x[:, 1:].flatten(0, 1), first)
