"""Norms and lm_head of a sparse model: the stock model's values, by a faster way where nothing needs torch's."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from kernel_cases import LIMITS, error
from transformers import DynamicCache, PreTrainedModel

import wina_calib
from wina_calib.runtime.fast_path import lm_head, norms
from wina_calib.runtime.fast_path.norms import Norm, replace_norms
from wina_calib.runtime.kernels import native_build
from wina_calib.runtime.load import runtime_state, set_sparsity
from wina_calib.runtime.state import RuntimeState

PROMPT = torch.arange(4, 13)[None]
# In a model of three layers; Qwen3 norms queries and keys too. Gemma and OLMo round after the weight, not before.
REPLACED = {"llama": 7, "qwen2": 7, "qwen3": 13, "phi3": 7, "mistral": 7, "gemma2": 0, "gemma3": 0, "olmo2": 0}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Counts the norms that are computed in C, or would be where there is a compiler."""
    seen = SimpleNamespace(count=0)

    def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        seen.count += 1
        return Norm(torch.nn.Parameter(weight), epsilon, RuntimeState())(x)

    monkeypatch.setattr(
        norms, "native", SimpleNamespace(available=lambda dtype: True, norm=norm, DTYPES=native_build.DTYPES)
    )
    return seen


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_norms_that_compute_the_same_are_replaced(family: str) -> None:
    model = tiny.make(family)
    ids = torch.randint(4, 300, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        replace_norms(model, RuntimeState())
        assert torch.equal(model(ids).logits, expected)
    assert sum(isinstance(module, Norm) for module in model.modules()) == REPLACED[family]


def decoded(model: PreTrainedModel, ids: torch.Tensor = PROMPT) -> torch.Tensor:
    """Logits of one token after a prompt."""
    cache = DynamicCache()
    model(ids, **tiny.given(cache))
    return model(ids[:, :1], **tiny.given(cache)).logits


def test_one_row_is_computed_in_c_where_something_is_dropped(calibrated: Path, calls: SimpleNamespace) -> None:
    model = wina_calib.load(calibrated, 0.5)
    with torch.no_grad():
        model(PROMPT)
        model(PROMPT[:, :1])  # a first token, which is dense
        assert calls.count == 0
        decoded(model)
        assert calls.count == 7
        decoded(model, PROMPT.expand(2, -1))
        runtime_state(model).kernels = "reference"
        decoded(model)
        runtime_state(model).kernels = "auto"
        set_sparsity(model, 0.0)
        decoded(model)
        assert calls.count == 7
    set_sparsity(model, 0.5)
    decoded(model).sum().backward()
    assert calls.count == 7
    assert model.model.norm.weight.grad is not None


def test_copies_have_norms_of_their_own(calibrated: Path, calls: SimpleNamespace) -> None:
    model = wina_calib.load(calibrated, 0.5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        set_sparsity(model, 0.0)
        calls.count = 0
        with torch.no_grad():
            decoded(other)
        assert calls.count == 7
        set_sparsity(model, 0.5)


def test_a_copy_of_a_norm_alone_belongs_to_the_same_model(calibrated: Path) -> None:
    """Adapters copy the modules that they train."""
    model = wina_calib.load(calibrated, 0.5)
    norm = model.model.norm
    alone = copy.deepcopy(norm)
    assert alone.state is norm.state
    assert alone.weight is not norm.weight
    assert torch.equal(alone.weight, norm.weight)
    other = copy.deepcopy(model)
    assert other.model.norm.state is runtime_state(other) is not norm.state


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_torchs_own_kernel_where_something_is_dropped(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def counted(*args: Any) -> torch.Tensor:
        seen.append(args[0].shape)
        return rms_norm(*args)

    rms_norm = norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", counted)
    state = RuntimeState()
    norm = Norm(torch.nn.Parameter(torch.randn(384, device="cuda").to(dtype)), 1e-6, state)
    x = torch.randn(2, 9, 384, device="cuda").to(dtype)
    with torch.no_grad():
        expected = norm(x)
        assert not seen
        state.masks = True
        assert error(norm(x), expected) <= LIMITS[dtype] / 4
        assert seen == [x.shape]
    norm(x.requires_grad_())
    assert len(seen) == 1


def test_a_norm_that_takes_other_arguments_is_kept() -> None:
    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return x * gate.sigmoid()

    model = torch.nn.ModuleDict({"norm": Gated()})
    replace_norms(model, RuntimeState())
    assert isinstance(model["norm"], Gated)


def test_weights_on_another_device_are_an_error(calibrated: Path) -> None:
    model = wina_calib.load(calibrated, 0.5)
    with torch.no_grad():
        model(torch.randint(4, 300, (1, 9)))
        norm = model.model.norm.to("meta")
        with pytest.raises(RuntimeError, match="device"):
            norm(torch.ones(1, 1, 64)).sum().item()


def test_lm_head_sees_one_matrix() -> None:
    model = tiny.make("llama")
    ids = torch.randint(4, 300, (1, 9))
    seen = []
    with torch.no_grad():
        expected = model(ids, logits_to_keep=1).logits
        lm_head.prefer(model)
        lm_head.prefer(model)
        model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].stride()))
        assert torch.equal(model(ids, logits_to_keep=1).logits, expected)
    assert seen == [(64, 64, 1)]
    assert len(model.lm_head._forward_pre_hooks) == 2
