"""The version of this package, and those of what computes: the only place either is written."""

import platform

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of what computes."""
    import torch
    import transformers

    return {
        "wina_calib": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
