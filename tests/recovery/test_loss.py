"""The divergence that is trained on, and its gradient."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from wina_calib.calibration.likelihood import quality_sums
from wina_calib.recovery.loss import divergence


def states(seed: int) -> Tensor:
    return torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(seed))


WEIGHT = torch.randn(30, 8, generator=torch.Generator().manual_seed(9))


def head(hidden: Tensor) -> Tensor:
    return torch.tanh(hidden @ WEIGHT.t())


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_div(log_softmax(head(student), -1), log_softmax(head(teacher), -1), reduction="sum", log_target=True)


def test_value_and_gradient_are_those_of_the_whole_logits() -> None:
    teacher = states(1)
    found, expected = states(2).requires_grad_(), states(2).requires_grad_()
    value = divergence(found, teacher, head, head, rows=4)
    (3 * value).backward()
    (3 * plain(expected, teacher)).backward()
    torch.testing.assert_close(value, plain(expected, teacher))
    torch.testing.assert_close(found.grad, expected.grad)
    with torch.no_grad():
        torch.testing.assert_close(divergence(states(2), teacher, head, head, rows=100), plain(states(2), teacher))


def test_sums_are_over_all_tokens() -> None:
    student, teacher = states(2).flatten(0, 1), states(1).flatten(0, 1)
    labels = torch.arange(14)
    dense_loss, loss, kl, agreement = quality_sums(student, teacher, labels, head, head, rows=5).tolist()
    torch.testing.assert_close(kl, plain(student, teacher).item(), rtol=1e-5, atol=1e-5)
    chances = log_softmax(head(teacher), -1), log_softmax(head(student), -1)
    for value, chance in zip((dense_loss, loss), chances, strict=True):
        torch.testing.assert_close(value, -chance[labels, labels].sum().item(), rtol=1e-5, atol=1e-5)
    assert agreement == (chances[0].argmax(-1) == chances[1].argmax(-1)).sum()
