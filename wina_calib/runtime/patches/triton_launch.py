"""Triton: starts a compiled kernel without its own launcher."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

REASON = "Triton's launcher looks at every argument and option, which takes longer than many of the kernels"
VERSIONS = "Triton from 3.6 to below 4.0"
ELSEWHERE = "its own launcher starts them"
# Compiled kernels, and the constants that they take after their arguments, by what they were compiled for.
_ready: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}
ALIGNMENT = 16
Given = tuple[Tensor | int, ...]


def start_kernel(
    kernel: Any, grid: tuple[int, int, int], given: Given, **constants: Any
) -> tuple[Any, tuple[object, ...]]:
    """Start a kernel with the arguments `given` and then `constants`, options among them; returns what `start_again` takes.

    Triton's own launch looks at every argument and option, which takes longer than many of the kernels. A kernel that
    it has compiled for aligned tensors of the same dtype and equal numbers is kept and started at once.
    """
    address = 0
    kinds: list[object] = []
    for argument in given:
        if isinstance(argument, Tensor):
            address |= argument.data_ptr()
            kinds.append(argument.dtype)
        else:
            kinds.append(argument)
    if address % ALIGNMENT or not _starts_directly():
        return kernel[grid](*given, **constants), ()
    key = (id(kernel), torch.cuda.current_device(), *kinds, *constants.values())
    ready = _ready.get(key)
    if ready is not None:
        start_again(ready, grid, given)
        return ready
    compiled = kernel[grid](*given, **constants)
    _ready[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(given) :])
    return _ready[key]


def start_again(ready: tuple[Any, tuple[object, ...]], grid: tuple[int, int, int], given: Given) -> None:
    """Start a compiled kernel on the current device and stream with arguments of the kind it was compiled for."""
    kernel, constants = ready
    stream = raw_stream()
    numbers = [v.data_ptr() if isinstance(v, Tensor) else v for v in given]  # of a tensor Triton asks more
    kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *numbers, *constants)


def raw_stream() -> int:
    """The current stream of the current device, as CUDA knows it; torch's public object for it costs microseconds."""
    stream: int = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
    return stream


@cache
def _starts_directly() -> bool:
    """Whether this Triton is of the versions whose compiled kernels are known to take all arguments in order."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
    return (3, 6) <= version < (4, 0) and not triton.knobs.runtime.interpret
