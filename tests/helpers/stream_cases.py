"""A model opened as a stream of layers, and tokens to run through it."""

from pathlib import Path

import torch

from wina_calib.calibration.compute import Compute
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.model.source import open_source

CPU = torch.device("cpu")


def open_stream(folder: Path, ids: torch.Tensor, *, micro_batch: int = 2, spill: Path | None = None) -> LayerStream:
    return LayerStream(open_source(str(folder)), ids, Compute(CPU, torch.float32, micro_batch, spill=spill))


def some_ids(blocks: int = 3, seq: int = 20) -> torch.Tensor:
    return torch.randint(4, 300, (blocks, seq), generator=torch.Generator().manual_seed(0))
