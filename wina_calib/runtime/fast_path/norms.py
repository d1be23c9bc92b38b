"""RMSNorms of a sparse model: the stock model's seven operators, or fewer.

On a CPU, between products of megabytes, each of the operators finds its code gone from the caches: the one row of a decode
step is one pass in C. On a GPU starting them takes longer than their work: torch's own kernel for it and a product are two.
Both sum in another order than the seven, as sparse products do, and serve where these do: not where nothing is dropped,
which is the dense model to the bit, nor with gradients, nor in compiled steps.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from wina_calib.runtime.kernels import native, native_build
from wina_calib.runtime.state import RuntimeState, copied

logger = logging.getLogger(__name__)


class Norm(nn.Module):
    """`weight * (x / rms(x))`, rounded to x's dtype before the weight. Saves and loads as the norm that it replaces."""

    weight: nn.Parameter
    state: RuntimeState

    def __init__(self, weight: nn.Parameter, epsilon: float, state: RuntimeState) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, epsilon
        self.__dict__["state"] = state

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The norm of (..., width)."""
        weight = self.weight
        if not torch.compiler.is_compiling() and self._is_plain(hidden_states, weight):
            if hidden_states.is_cpu:
                return native.norm(hidden_states, weight, self.variance_epsilon)
            unit = rms_norm(hidden_states, weight.shape, None, self.variance_epsilon)
            return weight * unit.to(hidden_states.dtype)  # autocast makes it float32
        unit = hidden_states.to(torch.float32)
        unit = unit * torch.rsqrt(unit.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return weight * unit.to(hidden_states.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of it alone belongs to the same model."""
        return copied(self, memo, self.state)

    def extra_repr(self) -> str:
        """As transformers' norms."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"

    def _is_plain(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the norm of x (..., width) may differ in last bits, and has a faster way."""
        now = self.state.now()
        if not now.drops:
            return False
        if type(x) is not Tensor or x.dtype is not weight.dtype or x.shape[-1:] != weight.shape[-1:]:
            return False
        if weight.dim() != 1 and (weight.numel() != weight.shape[-1] or not x.is_cpu):  # as a rotation's norm is stored
            return False
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return False
        if x.is_cpu:
            one = x.shape[:2].numel() == 1 and now.dense_rows is None
            return one and weight.is_cpu and native.available(x.dtype)
        return x.is_cuda and x.device == weight.device


def replace_norms(model: nn.Module, state: RuntimeState) -> None:
    """Put `Norm` in the place of every module that computes the same to the bit."""
    known: dict[tuple[type, torch.Size, float], bool] = {}
    for path, module in list(model.named_modules()):
        weight, epsilon = module._parameters.get("weight"), getattr(module, "variance_epsilon", None)
        if weight is None or not isinstance(epsilon, float):
            continue
        kind = type(module), weight.shape, epsilon
        if kind not in known:
            try:
                known[kind] = _computes_same(module, epsilon)
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # it takes more arguments, say
                logger.debug("%s is kept: %s", path, error)
                known[kind] = False
        if known[kind]:
            model.set_submodule(path, Norm(weight, epsilon, state).train(module.training))


@torch.no_grad()
def _computes_same(stock: nn.Module, epsilon: float) -> bool:
    """Whether a module is what `Norm` stands for: its only tensor a vector, its outputs equal in both dtypes."""
    names = [name for name, _ in (*stock.named_parameters(), *stock.named_buffers())]
    if names != ["weight"] or stock.get_parameter("weight").dim() != 1:
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    shape = 2, 4, stock.get_parameter("weight").numel()
    x, weight = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    for dtype in native_build.DTYPES:
        probe = copy.deepcopy(stock).to_empty(device="cpu").to(dtype)
        probe.get_parameter("weight").copy_(weight[0])
        norm = Norm(nn.Parameter(weight[0].to(dtype)), epsilon, RuntimeState())
        if not torch.equal(probe(x.to(dtype)), norm(x.to(dtype))):
            return False
    return True
