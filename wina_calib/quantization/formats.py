"""Formats of a mask group's weights in 4 and 8 bits, stored by input so that a dropped input skips its bytes and scales.

The weights W (out, in) of a mask group's projections lie side by side along their outputs.

int4, by input: `codes` uint8 (in, out / 2) and `scales` float16 (in, out / group_size). A group is `group_size` consecutive
outputs of one input. Of its bytes, byte i holds output i in the low and output i + group_size / 2 in the high nibble.
Weight = scale * (code - zero) with codes 0 to 15; the zero is 8, or stored: `zeros` uint8 (in, ceil(groups / 2)), two a byte,
the even group in the low nibble, an unused last nibble 0. Scales may be negative. No group belongs to two projections.

int8: `codes` int8 (in, out) and `scales` float32 (out,). Weight = scale * code.

int8 by rows, for lm_head and embeddings: `codes` int8 (vocab, hidden) and `scales` float32 (vocab,).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wina_calib.choices import BITS, GROUP_SIZES
from wina_calib.errors import UsageError

MEASURED_BITS = (3, *BITS)  # codes of 3 bits are measured, in nibbles in memory; no checkpoint holds them
LIMIT_8 = 127
TILE_ELEMENTS = 1 << 20  # dequantized at a time

Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of mask groups are stored."""

    bits: int  # 4 or 8; 3 only to be measured
    group_size: int = 64  # outputs that share a scale; of no meaning at 8 bits
    zero_point: bool = True  # whether groups have a zero of their own; of no meaning at 8 bits

    def __post_init__(self) -> None:
        if self.bits not in MEASURED_BITS:
            raise UsageError(f"weights of {self.bits!r} bits are not known; there are 4 and 8.")
        if self.bits != 8 and self.group_size not in GROUP_SIZES:
            raise UsageError(f"groups of {self.group_size!r} outputs are not known; there are 32 and 64.")

    @property
    def highest_code(self) -> int:
        """Codes of groups go from 0 to this one."""
        return (1 << self.bits) - 1

    @property
    def symmetric_zero(self) -> int:
        """The zero of groups that have none of their own."""
        return 1 << (self.bits - 1)

    def specs(self, width: int, outs: Sequence[int]) -> dict[str, Spec]:
        """Dtypes and shapes of the tensors that hold projections of `outs` outputs each on `width` inputs, by their names.

        Raises:
            UsageError: a projection's outputs do not divide into groups.
        """
        out = sum(outs)
        if self.bits == 8:
            return {"codes": (torch.int8, (width, out)), "scales": (torch.float32, (out,))}
        odd = next((size for size in outs if size % self.group_size), None)
        if odd is not None:
            raise UsageError(
                f"a projection has {odd} outputs, which do not divide into groups of {self.group_size}. "
                f"Choose another group size ({' or '.join(map(str, GROUP_SIZES))}), or 8 bits."
            )
        groups = out // self.group_size
        parts: dict[str, Spec] = {"codes": (torch.uint8, (width, out // 2)), "scales": (torch.float16, (width, groups))}
        if self.zero_point:
            parts["zeros"] = (torch.uint8, (width, -(-groups // 2)))
        return parts

    def stored_bits(self, width: int, outs: Sequence[int]) -> int:
        """Bits of all tensors of such a group."""
        return sum(8 * dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.specs(width, outs).values())

    def bits_a_weight(self, outs: Sequence[int]) -> float:
        """Bits that a kept input reads, scales and zeros included, over its weights; int8's scales are read always."""
        if self.bits == 3:  # as it would be stored
            return 3 + (19 if self.zero_point else 16) / self.group_size
        return self.stored_bits(1, outs) / sum(outs) if self.bits == 4 else 8.0


@dataclass(frozen=True)
class Quantized:
    """Weights of one mask group in a format; tensors as the module's text says."""

    format: WeightFormat
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @property
    def width(self) -> int:
        """Inputs."""
        return int(self.codes.shape[0])

    @property
    def out_features(self) -> int:
        """Outputs of all projections."""
        return int(self.codes.shape[1]) * (1 if self.format.bits == 8 else 2)

    def named(self) -> dict[str, Tensor]:
        """The tensors by their names."""
        found = {"codes": self.codes, "scales": self.scales}
        return found if self.zeros is None else found | {"zeros": self.zeros}

    @classmethod
    def of(cls, form: WeightFormat, tensors: Mapping[str, Tensor]) -> Quantized:
        """From tensors by their names."""
        return cls(form, tensors["codes"], tensors["scales"], None if form.bits == 8 else tensors.get("zeros"))

    def to(self, device: torch.device) -> Quantized:
        """The same on a device."""
        return Quantized.of(self.format, {name: tensor.to(device) for name, tensor in self.named().items()})

    def outputs(self, first: int, stop: int) -> Quantized:
        """The weights of outputs from `first` to before `stop`, a projection's: views, but for zeros that begin in mid-byte."""
        if self.format.bits == 8:
            return Quantized(self.format, self.codes[:, first:stop], self.scales[first:stop])
        size = self.format.group_size
        groups = slice(first // size, stop // size)
        zeros = None if self.zeros is None else pack_zeros(unpack_zeros(self.zeros, self.scales.shape[1])[:, groups])
        return Quantized(self.format, self.codes[:, first // 2 : stop // 2], self.scales[:, groups], zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32, inputs: slice = slice(None)) -> Tensor:
        """Weights (inputs, out): products in float32, rounded to `dtype` once."""
        codes, scales = self.codes[inputs], self.scales
        if self.format.bits == 8:
            return (codes.float() * scales).to(dtype)
        values = unpack_codes(codes, self.format.group_size).to(torch.int16)
        scales = scales[inputs].float().unsqueeze(-1)
        if self.zeros is None:
            values -= self.format.symmetric_zero
        else:
            values -= unpack_zeros(self.zeros[inputs], scales.shape[1]).to(torch.int16).unsqueeze(-1)
        return (values.float() * scales).flatten(1).to(dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """All weights, some inputs at a time: which inputs, and their weights (n, out)."""
        step = max(1, TILE_ELEMENTS // max(1, self.out_features))
        for first in range(0, self.width, step):
            inputs = slice(first, min(first + step, self.width))
            yield inputs, self.dequantize(dtype, inputs)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All weights (out, in), row-major."""
        weight = torch.empty(self.out_features, self.width, dtype=dtype, device=self.codes.device)
        for inputs, tile in self.tiles(dtype):
            weight[:, inputs] = tile.t()
        return weight


def pack_codes(values: Tensor, group_size: int) -> Tensor:
    """Codes uint8 (in, groups, group_size) of 0 to 15 as bytes (in, groups * group_size / 2)."""
    low, high = values.split(group_size // 2, dim=-1)
    packed: Tensor = low | high << 4
    return packed.flatten(-2).contiguous()


def unpack_codes(codes: Tensor, group_size: int) -> Tensor:
    """Bytes (in, out / 2) as codes uint8 (in, groups, group_size)."""
    by_group = codes.unflatten(-1, (-1, group_size // 2))
    return torch.cat([by_group & 15, by_group >> 4], dim=-1)


def pack_zeros(zeros: Tensor) -> Tensor:
    """Zeros uint8 (in, groups) of 0 to 15 as bytes (in, ceil(groups / 2))."""
    if zeros.shape[-1] % 2:
        zeros = torch.cat([zeros, zeros.new_zeros(*zeros.shape[:-1], 1)], dim=-1)
    return (zeros[..., ::2] | zeros[..., 1::2] << 4).contiguous()


def unpack_zeros(packed: Tensor, groups: int) -> Tensor:
    """Bytes (in, ceil(groups / 2)) as zeros uint8 (in, groups)."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :groups]


@dataclass(frozen=True)
class QuantizedRows:
    """A matrix in int8 with a scale a row: `codes` int8 (rows, width), `scales` float32 (rows,)."""

    codes: Tensor
    scales: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (rows, width): products in float32, rounded to `dtype` once."""
        return (self.codes.float() * self.scales.unsqueeze(-1)).to(dtype)


def quantize_rows(matrix: Tensor) -> QuantizedRows:
    """A matrix (rows, width) in int8, the largest magnitude of each row at 127."""
    values = matrix.float()
    scales = values.abs().amax(-1) / LIMIT_8
    steps = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    return QuantizedRows((values / steps).round_().clamp_(-LIMIT_8, LIMIT_8).to(torch.int8), scales)
