"""llama.cpp's side of `against_llama_cpp.py`: makes GGUF files of a shape, and decodes as it is told on standard input.

    python benchmarks/llama_cpp_process.py make CONFIG.json FOLDER Q4_0 Q4_K_M
    python benchmarks/llama_cpp_process.py serve FILE THREADS

Runs wherever `llama_cpp` (the package llama-cpp-python), `gguf` and numpy are; nothing of wina_calib is needed.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

CONTEXT = 512
PIECES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
PIECES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def write_random(config, path):
    """A GGUF file of float16 with random weights of a Llama or Qwen2 config (config.json as a dict)."""
    kind = {"llama": "llama", "qwen2": "qwen2"}[config["model_type"]]
    hidden, inner, layers = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, vocabulary = config["num_attention_heads"], config["vocab_size"]
    key_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or hidden // heads
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta") or 10000.0)
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    random = np.random.default_rng(0)

    def add(name, *shape):
        writer.add_tensor(name, (random.standard_normal(shape, dtype=np.float32) * 0.02).astype(np.float16))

    def add_ones(name):
        writer.add_tensor(name, np.ones(hidden, np.float32))

    queries, keys = heads * size, key_heads * size
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    shapes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    add("token_embd.weight", vocabulary, hidden)
    add_ones("output_norm.weight")
    if not config.get("tie_word_embeddings"):
        add("output.weight", vocabulary, hidden)
    for i in range(layers):
        for name, shape in shapes.items():
            add(f"blk.{i}.{PIECES[name]}.weight", *shape)
            if kind == "qwen2" and name in ("q_proj", "k_proj", "v_proj"):
                writer.add_tensor(f"blk.{i}.{PIECES[name]}.bias", np.zeros(shape[0], np.float32))
        add_ones(f"blk.{i}.attn_norm.weight")
        add_ones(f"blk.{i}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(config_file, folder, kinds):
    """Random weights of a config in each of the kinds, by llama.cpp's own quantizing."""
    folder = Path(folder)
    whole = folder / "f16.gguf"
    wanted = [kind for kind in kinds if not (folder / f"{kind}.gguf").is_file()]
    if wanted and not whole.is_file():
        write_random(json.loads(Path(config_file).read_text()), whole)
    for kind in wanted:
        options = llama_cpp.llama_model_quantize_default_params()
        options.nthread = 2
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        made = folder / f"{kind}.part"
        if llama_cpp.llama_model_quantize(str(whole).encode(), str(made).encode(), ctypes.byref(options)):
            sys.exit(f"llama.cpp cannot quantize {whole} to {kind}")
        made.rename(folder / f"{kind}.gguf")


def serve(path, threads):
    """Read lines `COUNT`, `prompt COUNT` or `reset COUNT` and answer each with milliseconds.

    A count alone is that many tokens, one at a time, the likeliest next one chosen after each: milliseconds of a token. A prompt
    is computed in one batch from an empty cache: milliseconds of all. After a reset the cache holds that many tokens.
    """
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_threads, options.n_threads_batch = 2 * CONTEXT, CONTEXT, threads, threads
    options.no_perf = True
    context = llama_cpp.llama_init_from_model(model, options)
    memory = llama_cpp.llama_get_memory(context)
    greedy = llama_cpp.llama_sampler_init_greedy()

    def decode(count):
        tokens = (llama_cpp.llama_token * count)(*range(5, 5 + count))
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, count)):
            sys.exit("llama.cpp cannot decode: the context is full")
        llama_cpp.llama_sampler_sample(greedy, context, -1)  # waits for the logits

    _say(llama_cpp.llama_print_system_info().decode().strip())
    for line in sys.stdin:
        word, _, rest = line.strip().rpartition(" ")
        count = int(rest)
        if word in ("prompt", "reset"):
            llama_cpp.llama_memory_clear(memory, True)
        times, each = (1, count) if word else (count, 1)
        before = time.perf_counter()
        for _ in range(times):
            decode(each)
        _say(f"{1e3 * (time.perf_counter() - before) / times}")


def _say(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        serve(sys.argv[2], int(sys.argv[3]))
