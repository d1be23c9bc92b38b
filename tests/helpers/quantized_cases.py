"""Formats and inputs shared by the tests of the CPU and of the CUDA kernels."""

import torch

from wina_calib.quantization.formats import WeightFormat

FORMATS = [
    WeightFormat(4, 64, zero_point=True),
    WeightFormat(4, 64, zero_point=False),
    WeightFormat(4, 32, zero_point=True),
    WeightFormat(4, 32, zero_point=False),
    WeightFormat(8),
]
CASES = ("plain", "one", "nothing", "everything", "outlier", "tiny")


def inputs(case: str, rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (rows, width), norm and threshold."""
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator)
    norm = torch.exp(0.3 * torch.randn(width, generator=generator))
    if case == "outlier":
        x[:, width // 3] = 1000.0
    elif case == "tiny":
        x *= 2.0**-20
    x = x.to(dtype)
    score = x.float().abs() * norm
    thresholds = {
        "plain": score.median(),
        "one": score.flatten().sort().values[-2] if score.numel() > 1 else torch.tensor(0.0),
        "nothing": score.max(),
        "outlier": score.median(),
        "tiny": score.median(),
    }
    return x, norm, thresholds.get(case, torch.tensor(-1.0))


def exact(x, weight, norm, threshold, dense_rows=None, bias=None):
    keep = x.float().abs() * norm > threshold
    if dense_rows is not None:
        keep |= dense_rows[:, None]
    y = (x.double() * keep) @ weight.dequantize(torch.float32).double()
    return y if bias is None else y + bias.double()
