"""Which tensors are the model's, derived, run-time matrices, or calibration's."""

from __future__ import annotations

import fnmatch

from wina_calib.model.architecture import Layer

_DERIVED = ("*rotary_emb.inv_freq", "*.masked_bias", "*.attn.bias")


def is_added(name: str) -> bool:
    """Whether a tensor was added by calibration."""
    return ".wina." in name


def is_rotation(name: str) -> bool:
    """Whether a stored tensor is a run-time matrix."""
    return is_added(name) and name.endswith(".rotation")


def is_packed(name: str) -> bool:
    """Whether a stored tensor is a part of a mask group's quantized weights."""
    return is_added(name) and name.endswith((".codes", ".scales", ".zeros"))


def rotation_name(layer: Layer, site: str) -> str:
    """Name of a site's run-time matrix."""
    return f"{layer.prefix}wina.{site}.rotation"


def is_derived(name: str) -> bool:
    """Whether a stored tensor is one that models compute for themselves (old checkpoints keep some)."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _DERIVED)
