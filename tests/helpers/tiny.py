"""Tiny random models of every supported family, built from configs without a network."""

import inspect
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import wina_calib

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
EXPERT_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 320,
}
EXPERTS = MixtralConfig(**EXPERT_SIZES, num_local_experts=2)
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
# What this transformers calls the argument and the output with keys and values.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def given(cache: Any) -> dict[str, Any]:
    """Arguments of a forward pass with a cache."""
    return {CACHE: cache}


def cache_of(output: Any) -> Any:
    """The cache in what a forward pass returned."""
    return getattr(output, CACHE)


def make(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of a family with non-trivial biases and norm weights, in eval mode."""
    torch.manual_seed(seed)
    config_class, extra = _CONFIGS[family]
    model = AutoModelForCausalLM.from_config(config_class(**(_SIZES | extra | overrides)), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 320 tokens that puts BOS before a text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["a short text about nothing, and another one about the weather of that day"] * 20, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save(family: str, folder: Path, *, shard: str = "60KB", **overrides: Any) -> PreTrainedModel:
    """Save a tiny model with its tokenizer as a sharded model folder; returns the model."""
    model = make(family, **overrides)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return model


def calibrate(model: Path, folder: Path, text: Path, **others: Any) -> None:
    """Calibrate a tiny model on a text file, with a uniform budget and three anchors unless told otherwise."""
    options = {"budget": "uniform", "samples": 64, "seq_len": 128, "sparsity": 0.5, "grid": (0.25, 0.5, 0.65)}
    wina_calib.calibrate(model, folder, data=str(text), **(options | others))


def text_file(folder: Path, *, words: int = 12_000, seed: int = 0) -> Path:
    """A text file of random words."""
    rng = random.Random(seed)
    known = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(300)]
    path = folder / "text.txt"
    path.write_text(" ".join(rng.choices(known, k=words)))
    return path
