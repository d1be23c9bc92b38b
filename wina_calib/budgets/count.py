"""Element counts of a model, from which budgets and read fractions are computed."""

from __future__ import annotations

import numpy as np

from wina_calib.budgets.file import ModelKey
from wina_calib.budgets.model import Cells
from wina_calib.model.architecture import SITES, Architecture
from wina_calib.transforms import run_time_weights


def count_cells(arch: Architecture, transform: str) -> Cells:
    """Element counts that budgets and read fractions are computed from."""
    weights = np.array([[site.weights for site in layer.sites] for layer in arch.layers])
    norms = sum(
        arch.hidden_size
        for layer in arch.layers
        for norm in (layer.attn_norm, layer.mlp_norm, *layer.post_norms)
        if norm
    )
    biases = sum(p.out_features for _, site in arch.sites for p in site.projections if p.bias)
    return Cells(
        sites=SITES,
        weights=weights,
        other_decoder=norms + biases + arch.hidden_size,
        lm_head=arch.vocab_size * arch.hidden_size,
        runtime_matrices=run_time_weights(transform, arch),
    )


def model_key(arch: Architecture, cells: Cells) -> ModelKey:
    """What ties a budget file to a model."""
    return ModelKey.of(arch.model_type, arch.hidden_size, cells)
