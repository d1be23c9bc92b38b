"""Where and how to compute: device, dtype, and how many blocks at a time."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils import deterministic

from wina_calib.common.distributed import local_device
from wina_calib.common.text import first_line
from wina_calib.errors import UsageError

SPARE_BYTES = 64 << 20
# At most so many tokens at a time, and so many numbers at the widest site.
_MICRO_BATCH = {"cpu": (2048, 1 << 23), "cuda": (16_384, 1 << 28)}
_BACKWARD = {"cpu": (1024, 1 << 22), "cuda": (8192, 1 << 27)}
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU; of several processes each takes one of its own."""
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        device = torch.device(local_device() if name in ("auto", "cuda") else name)
        torch.zeros(1, device=device, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {first_line(error)}") from error
    return device


def pick_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is the stored dtype on an accelerator and float32 on a CPU, where 16-bit products are mostly slow."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return torch.float32 if device.type == "cpu" else stored


def default_micro_batch(device: torch.device, seq_len: int, width: int) -> int:
    """Blocks of this length that are computed together on a device, in a model whose widest site has `width` inputs."""
    return _blocks(_MICRO_BATCH.get(device.type, _MICRO_BATCH["cpu"]), seq_len, width)


def backward_batch(device: torch.device, seq_len: int, width: int) -> int:
    """Blocks of this length that go backward together; arguments as for `default_micro_batch`."""
    return _blocks(_BACKWARD.get(device.type, _BACKWARD["cpu"]), seq_len, width)


def _blocks(most: tuple[int, int], seq_len: int, width: int) -> int:
    tokens, numbers = most
    return max(1, min(tokens, numbers // width) // seq_len)


def keep_in_memory(device: torch.device, states: int, nbytes: int) -> bool:
    """Whether so many hidden states of `nbytes` bytes each stay in memory; else they go to files.

    On a CPU two of them may, and a little more; on an accelerator up to 40 % of the memory that is free.
    """
    if device.type == "cuda":
        return states * nbytes < 0.4 * torch.cuda.mem_get_info(device)[0]
    return (states - 2) * nbytes <= SPARE_BYTES


@contextmanager
def fixed_order(device: torch.device) -> Iterator[None]:
    """Make a GPU add in a fixed order: without this the backward pass of attention gives other last bits each time."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    tensors: Any = deterministic
    filled = tensors.fill_uninitialized_memory
    workspace = os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")  # torch asks for it before matrix products, which do not change
    torch.use_deterministic_algorithms(True)
    tensors.fill_uninitialized_memory = False  # else every new tensor is written twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        tensors.fill_uninitialized_memory = filled
        if workspace is None:
            del os.environ[_WORKSPACE]


def has_16_bit_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this 16-bit dtype on this processor, and is on."""
    return bool(torch.backends.mkldnn.enabled) and _processor_has_16_bit_products(dtype)


@cache
def _processor_has_16_bit_products(dtype: torch.dtype) -> bool:
    check = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return check is not None and bool(getattr(torch.ops.mkldnn, check, bool)())


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else str(device)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()
