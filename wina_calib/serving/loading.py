"""Weights turned to columns as vLLM loads them, so that they are written once and are in memory once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from wina_calib.runtime.kernels import cpu


class Turning(TorchFunctionMode):
    """Copies to weights (out, in) whose memory is by input are made by the processor's own way to turn them.

    Which part of a weight goes where, with or without tensor parallelism, stays with vLLM.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """As torch, but for `copy_` of a matrix to one of its shape whose first dimension is contiguous."""
        if func is Tensor.copy_ and len(args) == 2 and not kwargs and _is_by_input(*args):
            cpu.fill_columns(args[0].t(), args[1].to(args[0].dtype))
            return args[0]
        return func(*args, **(kwargs or {}))


def _is_by_input(weight: Tensor, given: Any) -> bool:
    return weight.ndim == 2 and weight.stride(0) == 1 and isinstance(given, Tensor) and given.shape == weight.shape


def turning(load: Callable[..., Any]) -> Callable[..., Any]:
    """A weight loader that turns what it copies."""

    def turned(*args: Any, **options: Any) -> Any:
        with Turning():
            return load(*args, **options)

    return turned
