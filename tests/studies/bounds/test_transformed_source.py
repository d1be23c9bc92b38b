"""A model seen through a transform computes what the model computes."""

from pathlib import Path

import pytest
import tiny
import torch

from wina_calib.calibration.compute import Compute
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.masked_layer import MaskedLayer
from wina_calib.corpus.blocks import load_blocks
from wina_calib.masks.rule import MaskRule
from wina_calib.model.source import Source, open_source
from wina_calib.studies.bounds.transformed_source import see_through
from wina_calib.transforms import plan

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("transform", ["paper", "stacked", "auto"])
def test_a_model_seen_through_a_transform_is_the_same_model(
    family: str, transform: str, text: Path, tmp_path: Path
) -> None:
    tiny.save(family, tmp_path / "m")
    source = open_source(str(tmp_path / "m"))
    ids = load_blocks((str(text),), source.tokenizer(), samples=4, seq_len=64, seed=0, min_tokens=2).ids
    seen = see_through(source, transform, ids, device=CPU, dtype=torch.float32)
    assert seen.transform == plan(transform, source.architecture).name
    dense, turned = (last_states(model, ids) for model in (source, seen))
    back = turned if seen.turned.residual is None else turned @ seen.turned.residual.float().T
    assert torch.allclose(back, dense, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def last_states(source: Source, ids: torch.Tensor) -> torch.Tensor:
    stream = LayerStream(source, ids, Compute(CPU, torch.float32, 4))
    hidden = stream.embed()[0]
    for index, module in stream.layers():
        rotations = {site: q.float() for site, q in source.rotations(index).items()}
        with MaskedLayer(source.architecture.layers[index], module, MaskRule(), rotations) as layer:
            hidden = layer.run(hidden, stream.kwargs(index, 0))
    return hidden
