"""Tiny random models of every supported family, built from configs without a network."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_CONFIGS = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "phi3": (Phi3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "gemma2": (Gemma2Config, {"head_dim": 16}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 16}),
    "olmo2": (Olmo2Config, {}),
}
FAMILIES = tuple(_CONFIGS)


def make(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random model of a family with non-trivial biases and norm weights, in eval mode."""
    torch.manual_seed(seed)
    config_class, extra = _CONFIGS[family]
    model = AutoModelForCausalLM.from_config(config_class(**(_SIZES | extra | overrides)), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
