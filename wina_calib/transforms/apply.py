"""Fold fitted rotations into weights: computed in float64, cast once.

Every function is pure. Large weights are processed in slices, so that the float64 copies stay near `CHUNK_ELEMENTS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from wina_calib.model.architecture import Architecture, Layer, Norm
from wina_calib.transforms.plan import INPUT_SITES, Rotations, is_uniform, norm_gain, unit_weight

CHUNK_ELEMENTS = 1 << 22


def apply_layer(
    arch: Architecture,
    layer: int,
    weights: Mapping[str, Tensor],
    rotations: Rotations,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Transform the weights of one decoder layer.

    Args:
        arch: the model's description; the transform must be exact on it (`plan`).
        layer: index of the decoder layer.
        weights: all its tensors, keyed by their path inside the layer ("self_attn.q_proj.weight").
        rotations: the fitted matrices.
        device: where to compute. Results are on the devices of the tensors that they replace.

    Returns:
        All tensors of the layer in their own dtypes, plus "wina.{site}.rotation" for run-time matrices. A tensor that
        the transform does not touch is the same object.
    """
    described = arch.layers[layer]
    out = dict(weights)
    for name in INPUT_SITES:
        _rotate_input_site(described, name, out, rotations, device)
    _rotate_outputs(described, out, rotations, device)
    return out


def fold_final_norm(arch: Architecture, weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """Split the final norm's stored weight (d,) into the gain for `head_rows` and the weight to store.

    A gain that is the same for all channels commutes with the rotation and stays where it is: (None, weight).
    """
    if is_uniform(weight):
        return None, weight
    return norm_gain(arch.final_norm, weight), unit_weight(arch.final_norm, weight)


def embedding_rows(rows: Tensor, rotations: Rotations, *, device: torch.device | str = "cpu") -> Tensor:
    """Transform any slice (n, d) of the embedding's rows."""
    return _times(rows, None, rotations.residual, device, rows)


def head_rows(rows: Tensor, gain: Tensor | None, rotations: Rotations, *, device: torch.device | str = "cpu") -> Tensor:
    """Transform any slice (n, d) of lm_head's rows, with the gain that `fold_final_norm` returned."""
    return _times(rows, gain, rotations.residual, device, rows)


def folded_gain(layer: Layer, site: str, weights: Mapping[str, Tensor]) -> Tensor | None:
    """The float64 gain (d,) of the norm before an input site; None where the site reads the raw residual stream."""
    norm = _norm_before(layer, site)
    return None if norm is None else norm_gain(norm, weights[f"{norm.module}.weight"])


def _norm_before(layer: Layer, site: str) -> Norm | None:
    return layer.attn_norm if site == "attn_in" else layer.mlp_norm


def _rotate_input_site(
    layer: Layer, site: str, out: dict[str, Tensor], rotations: Rotations, device: torch.device | str
) -> None:
    at_run_time = rotations.sites.get((layer.index, site))
    projections = layer.site(site).projections
    gain = matrix = None
    if at_run_time is not None or rotations.residual is not None:
        # x = gain * u becomes u in the rotated basis: a residual rotation has turned u already, a run-time matrix turns
        # it at the site.
        gain, matrix = folded_gain(layer, site, out), _product(rotations.residual, at_run_time)
        norm = _norm_before(layer, site)
        if norm is not None:
            out[f"{norm.module}.weight"] = unit_weight(norm, out[f"{norm.module}.weight"])
    if at_run_time is not None:
        out[f"wina.{site}.rotation"] = at_run_time.to(out[f"{projections[0].module}.weight"])
    for projection in projections:
        weight = out[f"{projection.module}.weight"]
        # The values are the rows of v_proj, or the last rows of a fused qkv_proj.
        holds_values = rotations.heads is not None and site == "attn_in" and projection is projections[-1]
        start = projection.out_features - (layer.kv_heads * layer.head_dim if holds_values else 0)
        parts = [_times(weight[:start] if holds_values else weight, gain, matrix, device, weight)]
        if rotations.heads is not None and holds_values:
            # From the stored values: the rotations of head and residual are one float64 product, cast once.
            turn = rotations.heads[layer.index].to(device)
            values = _turn_rows(weight[start:].to(device), turn)
            parts.append(_times(values, gain, matrix, device, weight))
            if projection.bias:
                bias = out[f"{projection.module}.bias"]
                turned = _turn_rows(bias[start:].to(device), turn)
                out[f"{projection.module}.bias"] = torch.cat([bias[:start], turned.to(bias)])
        out[f"{projection.module}.weight"] = torch.cat(parts) if holds_values else parts[0]


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first @ second


def _turn_rows(values: Tensor, turn: Tensor) -> Tensor:
    """Rotate the output rows of the value projection, or its bias: v' = v @ turn[head], in float64."""
    split = values.double().reshape(*turn.shape[:2], *values.shape[1:])
    return torch.einsum("hvr,hv...->hr...", turn, split).flatten(0, 1)


def _rotate_outputs(layer: Layer, out: dict[str, Tensor], rotations: Rotations, device: torch.device | str) -> None:
    residual = None if rotations.residual is None else rotations.residual.to(device)
    for site in ("attn_out", "mlp_out"):
        (projection,) = layer.site(site).projections
        heads = rotations.heads[layer.index].to(device) if site == "attn_out" and rotations.heads is not None else None
        key = f"{projection.module}.weight"
        if residual is None and heads is None:
            continue
        weight = out[key].to(device)
        result = torch.empty_like(weight)
        for columns in _slices(weight.shape[1], weight.shape[0], layer.heads // layer.kv_heads * layer.head_dim):
            part = weight[:, columns].double()
            if heads is not None:
                part = _turn_columns(part, heads, columns, layer)
            result[:, columns] = (part if residual is None else residual.T @ part).to(weight)
        out[key] = result.to(out[key])
        if projection.bias and residual is not None:
            bias = out[f"{projection.module}.bias"]
            out[f"{projection.module}.bias"] = (bias.to(device).double() @ residual).to(bias)


def _turn_columns(part: Tensor, heads: Tensor, columns: slice, layer: Layer) -> Tensor:
    """Rotate the o_proj columns (out, groups * queries * head_dim) of whole groups, alike for each query head."""
    group = layer.heads // layer.kv_heads * layer.head_dim
    turn = heads[columns.start // group : columns.stop // group]
    split = part.reshape(len(part), turn.shape[0], layer.heads // layer.kv_heads, layer.head_dim)
    return torch.einsum("ohqv,hvr->ohqr", split, turn).flatten(1)


def _times(
    rows: Tensor, gain: Tensor | None, matrix: Tensor | None, device: torch.device | str, like: Tensor
) -> Tensor:
    """(n, d) -> rows * gain @ matrix, in float64 slices, with the dtype and device of `like`."""
    if gain is None and matrix is None:
        return rows.to(like)
    scale = None if gain is None else gain.to(device)
    right = None if matrix is None else matrix.to(device)
    rows = rows.to(device)
    out = torch.empty(rows.shape, dtype=like.dtype, device=device)
    for part in _slices(rows.shape[0], rows.shape[1], 1):
        values = rows[part].double()
        values = values if scale is None else values * scale
        out[part] = (values if right is None else values @ right).to(out)
    return out.to(like)


def _slices(length: int, width: int, multiple: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // (width * multiple)) * multiple
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
