"""The projections of one mask group whose weights are quantized, as one: one mask, one product."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from wina_calib.quantization.formats import Quantized
from wina_calib.runtime.forward_pass import Pass
from wina_calib.runtime.kernels import dispatch
from wina_calib.runtime.packed import rows_for


class QuantizedGroup:
    """The product of all projections of a mask group. It refers to the group's tensors, which are its state's own.

    Args:
        sizes: outputs of each projection.
        weight: of all of them.
        norm: (in,) float32.
        threshold: () float32.
        rotation: run-time matrix (in, in) or None.
    """

    def __init__(
        self, sizes: Sequence[int], weight: Quantized, norm: Tensor, threshold: Tensor, rotation: Tensor | None
    ) -> None:
        self.sizes, self.weight, self.norm, self.threshold = tuple(sizes), weight, norm, threshold
        self.rotation = rotation

    def serves(self, x: Tensor, now: Pass) -> bool:
        """Whether in this pass this computes the product of x."""
        return now.served

    def part(self, position: int, x: Tensor, now: Pass) -> Tensor:
        """Output (..., out) of one projection for x (..., in), without bias.

        The first that is asked for x computes all; the others take theirs, the last one clears up.
        """
        if len(self.sizes) == 1:
            return self.product(x, now)
        if position == 0 or now.x is not x or now.group is not self:
            now.x, now.group, now.out = x, self, self.product(x, now).split_with_sizes(self.sizes, dim=-1)
        out: Tensor = now.out[position]
        if position == len(self.sizes) - 1:
            now.x = now.group = now.out = None
        return out

    def product(self, x: Tensor, now: Pass) -> Tensor:
        """Outputs (..., sum of outs) of all projections for x (..., in), without bias."""
        if self.rotation is not None:
            x = x @ self.rotation.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        if now.dense:
            out = dispatch.dense_quantized_site(rows, self.weight)
        else:
            dense = rows_for(now.dense_rows, x)
            flat = None if dense is None else dense.reshape(-1)
            out = dispatch.quantized_site(rows, self.weight, self.norm, self.threshold, flat)
        return out.view(*x.shape[:-1], out.shape[-1])
