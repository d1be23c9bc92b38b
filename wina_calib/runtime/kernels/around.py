"""What a decode step has around a site's product, and may be computed in its kernel: norms, gated activations, sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu


@dataclass(frozen=True)
class Around:
    """What a site's input is made by, and what its result is added to.

    Attributes:
        gain: (in,) weight of the RMSNorm that makes the input; None where there is none.
        epsilon: of the norm.
        gated: the input is SiLU of the first half of what is given, times the second.
        added: (..., out) to which the result is added, rounded before; None where there is none.
    """

    gain: Tensor | None = None
    epsilon: float = 0.0
    gated: bool = False
    added: Tensor | None = None

    @property
    def kind(self) -> int:
        """Of the input, as the code in CUDA has it."""
        return 1 if self.gain is not None else 2 if self.gated else 0

    def input(self, x: Tensor) -> Tensor:
        """The site's input (..., in), each step rounded to the dtype of x (..., in, or twice as many)."""
        if self.gain is not None:
            unit = x.float()
            unit = unit * torch.rsqrt(unit.pow(2).mean(-1, keepdim=True) + self.epsilon)
            return self.gain * unit.to(x.dtype)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return silu(gate) * up
        return x

    def result(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """All of it by operators, for a `product` of the input."""
        y = product(self.input(x))
        return y if self.added is None else self.added + y


PLAIN = Around()
