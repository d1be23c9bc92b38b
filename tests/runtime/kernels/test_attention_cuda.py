"""Attention of one token on CUDA, as far as a machine without a card can tell; on one: `test_attention_gpu.py`."""

import pytest
import torch

from wina_calib.runtime.kernels import attention_cuda


@pytest.mark.parametrize(
    ("dtype", "size", "heads", "key_heads", "expected"),
    [
        (torch.bfloat16, 128, 32, 8, True),
        (torch.float16, 128, 64, 8, True),
        (torch.float32, 128, 32, 8, False),
        (torch.bfloat16, 96, 32, 8, False),
        (torch.bfloat16, 128, 32, 2, False),
        (torch.bfloat16, 256, 16, 2, False),
        (torch.bfloat16, 64, 7, 2, False),
    ],
)
def test_what_it_computes(dtype, size, heads, key_heads, expected):
    assert attention_cuda.serves(dtype, size, heads, key_heads) == expected


@pytest.mark.parametrize("key_heads", [1, 8, 16, 32, 64, 100])
def test_a_cluster_shares_the_numbers_of_a_key_head(key_heads):
    cluster = next((blocks for most, blocks in attention_cuda.CLUSTERS if key_heads <= most), 1)
    for size in attention_cuda.SIZES:
        assert size % cluster == 0
