"""The loss of a step, from tokens: what it is for equal models, and in the 16 bits of a GPU."""

import copy

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from wina_calib.recovery.distiller import Distiller

IDS = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student that is a little off its teacher, its layers trained."""
    teacher = tiny.make("llama")
    student = copy.deepcopy(teacher).requires_grad_(False)
    student.model.layers.requires_grad_(True)
    with torch.no_grad():
        for p in student.model.layers.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return student, teacher.requires_grad_(False)


def test_equal_models_are_not_apart(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    student, teacher = models
    equal = Distiller(copy.deepcopy(teacher), teacher, "model.layers", torch.eye(64))(IDS)
    torch.testing.assert_close(equal, torch.zeros(2), atol=1e-6, rtol=0)
    kl, apart = Distiller(student, teacher, "model.layers", torch.eye(64))(IDS).detach()
    assert float(kl) > 1e-4
    assert float(apart) > 1e-4
    assert float(Distiller(student, teacher)(IDS).detach()[1]) == 0


def test_it_is_nearly_the_same_in_16_bits(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    student, teacher = models
    whole = Distiller(student, teacher, "model.layers", torch.eye(64))(IDS)
    whole.sum().backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    for p in (
        *student.model.embed_tokens.parameters(),
        *student.model.norm.parameters(),
        *student.lm_head.parameters(),
    ):
        p.data = p.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = Distiller(student, teacher.bfloat16(), "model.layers", torch.eye(64))(IDS)
    half.sum().backward()
    torch.testing.assert_close(half, whole, rtol=0.1, atol=0.01)
    assert gradients
    for name, p in student.named_parameters():
        if name in gradients:
            assert p.grad.dtype == torch.float32
            assert torch.cosine_similarity(p.grad.flatten(), gradients[name].flatten(), dim=0) > 0.95
