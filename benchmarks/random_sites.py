"""Sites of known shapes with random quantized weights, for benchmarks of products."""

import torch
from transformers import Qwen3Config

from wina_calib.model.loading import describe_config
from wina_calib.quantization.formats import Quantized
from wina_calib.studies.flops import find_config

QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


def config_of(name):
    """The config of a model's shape."""
    return Qwen3Config(**QWEN3_8B) if name == "qwen3-8b" else find_config(name)


def shapes_of(name):
    """Inputs and outputs of a decoder layer's sites."""
    return [(site.width, site.out_features) for site in describe_config(config_of(name)).layers[0].sites]


def random_site(form, width, out, device):
    """A weight (width, out) of random codes."""
    made = {}
    for name, (dtype, shape) in form.specs(width, (out,)).items():
        if name == "scales":
            made[name] = torch.full(shape, 0.003, dtype=dtype, device=device)
        else:
            made[name] = torch.randint(-127, 128, shape, device=device).to(dtype)
    return Quantized.of(form, made)
