"""Streaming one layer at a time gives the full model's hidden states and logits, bit for bit."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from wina_calib.calibration.compute import Compute
from wina_calib.calibration.dense_pass import dense_pass
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.likelihood import next_token_nll
from wina_calib.model.source import open_source
from wina_calib.storage.hidden_states import HiddenStates

VARIANTS = {
    "llama": {},
    "llama-tied-bias": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama-3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "phi3": {},
    "phi3-part-rotated": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    },
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "olmo2": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_streaming_is_bit_equal(variant: str, tmp_path: Path) -> None:
    model = tiny.save(variant.partition("-")[0], tmp_path / "m", **VARIANTS[variant])
    source = open_source(str(tmp_path / "m"))
    ids = torch.randint(4, 300, (5, 24), generator=torch.Generator().manual_seed(0))
    stream = LayerStream(source, ids, Compute(torch.device("cpu"), torch.float32, 2))
    with torch.no_grad():
        expected = [model(b, output_hidden_states=True, use_cache=False) for b in ids.split(2)]
        hidden = stream.embed()
        for index, module in stream.layers():
            for batch in range(len(stream.batches)):
                assert torch.equal(hidden[batch], expected[batch].hidden_states[index])
                hidden[batch] = module(hidden[batch], **stream.kwargs(index, batch))
        for _, head in stream.heads():
            for batch in range(len(stream.batches)):
                assert torch.equal(head(hidden[batch]), expected[batch].logits)
    loss = torch.nn.functional.cross_entropy(expected[0].logits[0, :-1], ids[0, 1:], reduction="none")
    assert torch.allclose(next_token_nll(stream, hidden)[0], loss, atol=1e-5)


@torch.no_grad()
def test_a_decoder_that_gives_more_than_hidden_states(tmp_path: Path) -> None:
    if "gemma4_unified_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such family")
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    config = CONFIG_MAPPING["gemma4_unified_text"](**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "m")
    ids = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    source = open_source(str(tmp_path / "m"))
    stream = LayerStream(source, ids, Compute(torch.device("cpu"), torch.float32))
    hidden = dense_pass(stream)
    for _, head in stream.heads():
        assert torch.equal(head(hidden[1]), model(ids[1:]).logits)


def test_only_two_layers_are_ever_loaded(llama: Path) -> None:
    ids = torch.ones(1, 8, dtype=torch.long)
    stream = LayerStream(open_source(str(llama)), ids, Compute(torch.device("cpu"), torch.float32))
    for index, _ in stream.layers():
        loaded = [i for i, m in enumerate(stream.modules) if not next(m.parameters()).is_meta]
        assert loaded == [index]
    assert all(p.is_meta for m in stream.modules for p in m.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_on_disk_are_bit_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    store = HiddenStates(tmp_path, torch.device("cpu"))
    values = [torch.randn(2, 5, 7).to(dtype) for _ in range(3)]
    for i, value in enumerate(values):
        store[i] = value
    store[1] = values[1] * 2
    assert torch.equal(store[0], values[0])
    assert torch.equal(store[1], values[1] * 2)
    store.clear()
    assert list(tmp_path.iterdir()) == []
