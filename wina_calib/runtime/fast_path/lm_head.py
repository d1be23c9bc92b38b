"""The input of lm_head, laid out so that torch multiplies it fast.

`generate` asks for the logits of a prompt's last token alone. That token is a slice whose leading strides are the whole
prompt's, which torch takes for a batch of products: in bfloat16 on a CPU it copies all of lm_head first, for 0.4 s of a
vocabulary of 32,000 by 2048 (docs/performance-notes.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def prefer(model: PreTrainedModel) -> None:
    """Let a model's lm_head see each input as one matrix."""
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Module) and _as_matrix not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_as_matrix)


def _as_matrix(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if torch.compiler.is_compiling() or not args or not args[0].is_cpu:
        return None
    x, *rest = args
    return x.reshape(-1, x.shape[-1]).view(x.shape), *rest
