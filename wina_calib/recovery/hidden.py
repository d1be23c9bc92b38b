"""How far the sparse model's hidden states are from the dense one's, after each layer: a loss beside the divergence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

SAME = 0.05  # relative distance of embeddings that a rotation leaves, where they are the same but for rounding
_ROWS = 1 << 15  # of the embeddings, at most


@contextmanager
def layer_outputs(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs (batch, seq, hidden) of layers, in order, as they are made within the context."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(keep))
        yield outputs


def distance(student: list[Tensor], teacher: list[Tensor], turn: Tensor | None) -> Tensor:
    """Mean over layers and tokens of the squared distance from the dense model's hidden state, over that one's square.

    First tokens count for nothing: they are computed densely, and are many times as large.

    Args:
        student: of each layer (batch, seq, hidden).
        teacher: likewise.
        turn: (hidden, hidden) takes the dense model's states to the student's axes; None where they are the same.
    """
    parts = []
    for sparse, dense in zip(student, teacher, strict=True):
        with torch.no_grad():
            target = (dense if turn is None else dense @ turn.to(dense.dtype))[:, 1:].float()
            scale = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        parts.append(((sparse[:, 1:].float() - target).square().sum(-1) / scale).mean())
    return torch.stack(parts).mean()


@torch.no_grad()
def rotation_between(dense: Tensor, student: Tensor) -> Tensor | None:
    """The rotation (hidden, hidden) that takes the dense model's residual stream to the student's, by their embeddings.

    Args:
        dense: (vocabulary, hidden) embeddings.
        student: the same, in the student's axes.

    Returns:
        None where there is none: another model, or one whose stream was changed in another way.
    """
    a, b = (e[:: max(1, len(e) // _ROWS)].double().cpu() for e in (dense, student))
    left, _, right = torch.linalg.svd(a.t() @ b)
    rotation: Tensor = left @ right
    if float((a @ rotation - b).norm()) > SAME * float(b.norm()):
        return None
    return rotation.float().to(student.device)
