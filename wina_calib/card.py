"""The model card of a checkpoint, made from its facts."""

from __future__ import annotations

from pathlib import Path

from wina_calib.checkpoint import read_settings


def write_card(folder: Path) -> None:
    """Write README.md into a checkpoint folder."""
    settings = read_settings(folder)
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- wina
- activation-sparsity
- arxiv:2505.19427
---
# {settings.provenance['base_model']}, sparse-ready

Calibrated by wina_calib for {settings.sparsity:.0%} activation sparsity.

```python
import wina_calib
model = wina_calib.load("{folder.name}")
```
"""
    (folder / "README.md").write_text(text, "utf-8")
