"""Reference models and texts that stand beside the checkout, where they are."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "models").is_dir(), reason="needs the reference models and texts of ../shared, which is not here"
)
