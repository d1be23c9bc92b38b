"""Versions of what computes."""

from __future__ import annotations

import platform

import torch
import transformers

import wina_calib


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "wina_calib": wina_calib.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
