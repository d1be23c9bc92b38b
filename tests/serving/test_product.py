"""The product of a served layer is the reference's, few rows or many, with some rows dense."""

import pytest
import torch

from wina_calib.quantization.formats import WeightFormat
from wina_calib.quantization.scales import quantize_nearest
from wina_calib.runtime.kernels import reference
from wina_calib.serving import product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 3, 17])
@pytest.mark.parametrize("sparse_rows", [0, 1, 4])
@pytest.mark.parametrize("opened", [False, True])
def test_product_is_the_references(dtype: torch.dtype, rows: int, sparse_rows: int, opened: bool) -> None:
    torch.manual_seed(rows)
    x, weight_t = torch.randn(rows, 48).to(dtype), torch.randn(48, 40).to(dtype)
    norm, threshold, bias = torch.rand(48) + 0.5, torch.tensor(0.6), torch.randn(40).to(dtype)
    dense = torch.arange(rows) % 2 == 0 if opened else None
    found = product.product(x, weight_t, norm, threshold, dense, bias, sparse_rows)
    wanted = reference.sparse_site(x.float(), weight_t.float(), norm, threshold, dense, bias.float())
    assert found.dtype == dtype
    assert found.shape == wanted.shape == (rows, 40)
    torch.testing.assert_close(found.float(), wanted, rtol=3 * torch.finfo(dtype).eps, atol=60 * torch.finfo(dtype).eps)


def test_policy_is_a_tensor_with_the_measured_crossover() -> None:
    policy = product.policy_of(first=True, prompts=False, sparse_rows=None, dtype=torch.float32)
    assert policy.tolist() == [1, 0, 1]
    assert product.policy_of(first=False, prompts=True, sparse_rows=7, dtype=torch.bfloat16).tolist() == [0, 1, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_an_operator_is_the_product_and_follows_its_operands(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bits: int, rows: int
) -> None:
    """What is kept from step to step is made anew for another mask or bias; the first row is dense."""
    monkeypatch.setattr(product, "open_rows_now", lambda count, **_: torch.arange(count) == 0)
    torch.manual_seed(rows)
    x, plain = torch.randn(rows, 64).to(dtype), torch.randn(64, 128).to(dtype)
    weights, known, limit = (plain.t(),), plain.float(), 4 * torch.finfo(dtype).eps
    if bits != 16:
        quantized = quantize_nearest(plain.float(), WeightFormat(bits, 64 if bits == 4 else 0, bits == 4))
        weights = quantized.codes, quantized.scales, quantized.zeros
        known, limit = quantized.dequantize(), max(limit, 1e-3)
    policy = product.policy_of(first=True, prompts=False, sparse_rows=None, dtype=dtype)
    operator = product.linear if bits == 16 else product.quantized_linear
    for threshold in (torch.tensor(0.6), torch.tensor(0.1)):
        norm = torch.rand(64) + 0.5
        for bias in (None, torch.randn(128).to(dtype), torch.randn(128).to(dtype)):
            added = None if bias is None else bias.float()
            wanted = reference.sparse_site(x.float(), known, norm, threshold, torch.arange(rows) == 0, added)
            for _ in range(2):
                found = operator(x, *weights, norm, threshold, policy, bias)
                assert found.dtype == dtype
                assert (found.float() - wanted).norm() < limit * wanted.norm()
    assert product.prepare(weights, (norm, threshold, policy)) is product.prepare(weights, (norm, threshold, policy))
