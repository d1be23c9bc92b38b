"""A Llama-shaped checkpoint of random weights in bfloat16, written layer by layer in little memory."""

import json
from pathlib import Path

import tiny
import torch
from transformers import LlamaConfig

from wina_calib.storage import ShardWriter


def write(
    folder: Path, *, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, seed: int = 0
) -> Path:
    """Write the folder, one file a layer, with the tests' tokenizer; returns it."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    kv = hidden // heads * kv_heads
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    files: list[dict[str, tuple[int, ...]]] = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()} for i in range(layers)
    ]
    files.append({"model.embed_tokens.weight": (vocab, hidden)})
    files.append({"lm_head.weight": (vocab, hidden), "model.norm.weight": (hidden,)})
    generator = torch.Generator().manual_seed(seed)
    # One draw for all: the values do not matter to speed and memory, but drawing billions would take minutes.
    pool = torch.randn(max(inner * hidden, 1 << 20), generator=generator).mul_(hidden**-0.5).bfloat16()
    weight_map = {}
    for number, shapes in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        with ShardWriter(
            folder / file, {name: (torch.bfloat16, shape) for name, shape in shapes.items()}, {"format": "pt"}
        ) as writer:
            for name, shape in shapes.items():
                weight_map[name] = file
                _write(writer, name, shape, pool, generator)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    return folder


def _write(
    writer: ShardWriter, name: str, shape: tuple[int, ...], pool: torch.Tensor, generator: torch.Generator
) -> None:
    if len(shape) == 1:
        writer.write(name, torch.ones(shape, dtype=torch.bfloat16))
        return
    rows = len(pool) // shape[1]
    start = int(torch.randint(0, shape[1], (), generator=generator))
    turned = pool[: rows * shape[1]].roll(start).view(rows, shape[1])
    for first in range(0, shape[0], rows):
        writer.write_rows(name, first, turned[: shape[0] - first])
