"""Operands and limits shared by the tests of the CPU and of the CUDA kernels."""

import torch

from wina_calib.quantization.formats import Quantized

# Relative error of the output vector against float64, by dtype.
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = list(LIMITS)

ADVERSARIAL = ["plain", "nothing", "everything", "one", "ties", "huge", "small", "cancelling", "clustered"]


def operands(rows, width, out, dtype, *, seed=0, device="cpu"):
    """x, weight_t, norm, threshold: about 55 % of the inputs are dropped."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    weight_t = (torch.randn(width, out, generator=generator) / width**0.5).to(dtype)
    norm = torch.exp(0.3 * torch.randn(width, generator=generator))
    return tuple(t.to(device) for t in (x, weight_t, norm, torch.tensor(0.75)))


def adversarial(case, width, out, dtype, device="cpu"):
    """x, weight_t, norm, threshold of one row for a named hard case."""
    x, weight_t, norm, threshold = operands(1, width, out, dtype, seed=3)
    score = x[0].float().abs() * norm
    if case == "nothing":
        threshold = score.max()
    elif case == "everything":
        threshold = torch.tensor(-1.0)
    elif case == "one":
        threshold = score.sort().values[-2]
    elif case == "ties":
        x = torch.where(torch.arange(width) % 3 == 0, 0.5, 1.0)[None].to(dtype)
        norm = torch.ones(width)
        threshold = torch.tensor(0.5)
    elif case in ("huge", "small"):
        scale = {"huge": 2.0**10, "small": 2.0**-9}[case]
        x, threshold = x * scale, threshold * scale
    elif case == "cancelling":
        # Neighbours cancel to an eighth: partial results rounded to 16 bits would show.
        x[0, 1::2] = x[0, : width // 2 * 2 : 2]
        norm[1::2] = norm[: width // 2 * 2 : 2]
        weight_t[1::2] = -weight_t[: width // 2 * 2 : 2] * 0.875
    elif case == "clustered":
        # All kept inputs next to each other, as in one slice of a split.
        x[0] = torch.where(torch.arange(width) // max(1, width // 8) == 3, x[0].sign() * 2, 0.001).to(dtype)
    return tuple(t.to(device) for t in (x, weight_t, norm, threshold))


def exact(x, weight_t, norm, threshold, dense_rows=None, bias=None):
    """The product in float64, its mask from the float32 score."""
    keep = x.float().abs() * norm > threshold
    if dense_rows is not None:
        keep = keep | dense_rows[:, None]
    y = (x.double() * keep) @ weight_t.double()
    return y if bias is None else y + bias.double()


def error(y, expected):
    """Relative error in the Euclidean norm; the plain norm of `y` where the expected result is zero."""
    assert y.shape == expected.shape
    scale = expected.norm()
    return ((y.double() - expected).norm() / (scale if scale > 0 else 1)).item()


def random_weight(form, width, out, seed=0):
    """Codes and zeros of all values, scales of either sign and some hundredfold of others."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (dtype, shape) in form.specs(width, (out,)).items():
        if name == "scales":
            found[name] = (0.01 * torch.exp(torch.randn(shape, generator=generator))).to(dtype)
            found[name] *= torch.randint(0, 2, shape, generator=generator).to(dtype) * 2 - 1
        else:
            low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
            found[name] = torch.randint(low, high, shape, generator=generator).to(dtype)
    if form.bits == 4:
        found["scales"][0, 0] = 0.0
    return Quantized.of(form, found)
