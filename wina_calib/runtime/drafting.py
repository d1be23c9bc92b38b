"""A calibrated model as the draft of its dense original, through transformers' own assisted generation.

The sparse model writes a few tokens ahead, and the dense one reads them all in one pass and keeps those that it would have
written itself: what comes out is the dense model's text. It is faster where a pass over a few tokens takes about as long as one
over a single token, as it does where reading the weights takes the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from wina_calib.errors import UsageError
from wina_calib.model.folder import calibration_of, code_is_trusted, load_config
from wina_calib.model.locate import load_tokenizer, resolve
from wina_calib.runtime.fast_path import lm_head

# Tokens that are written ahead at most. Each costs a step of the sparse model, and is lost with any before it that is not kept.
AHEAD = 5


@dataclass
class Drafted:
    """Tokens that were written ahead, and how many of them the dense model kept."""

    tokens: int = 0
    kept: int = 0
    passes: int = 0


def load_base(
    base: str | Path,
    draft: PreTrainedModel,
    tokenizer: Any,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
) -> PreTrainedModel:
    """Load the dense model that a calibrated one drafts for.

    Raises:
        UsageError: it is calibrated itself, or its tokens are others than the draft's.
    """
    folder, _ = resolve(base)
    config = load_config(folder)
    if calibration_of(config):
        raise UsageError(
            f"{base} is calibrated itself. --draft-for takes the dense model that the text is to come from."
        )
    own, others = load_tokenizer(folder).get_vocab(), tokenizer.get_vocab()
    sizes = config.get_text_config().vocab_size, draft.config.get_text_config().vocab_size
    if own != others or sizes[0] != sizes[1]:
        other = next((token for token, number in others.items() if own.get(token) != number), None)
        what = f"{other!r} is not the same token in both" if other is not None else f"{sizes[1]} tokens, not {sizes[0]}"
        raise UsageError(
            f"{base} has other tokens than the draft ({what}), which cannot write them ahead. Give the model that the draft was "
            "calibrated from."
        )
    trusted = code_is_trusted()
    dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=device_map, trust_remote_code=trusted
    )
    lm_head.prefer(dense)
    return dense.eval()


@contextmanager
def drafting(dense: PreTrainedModel, draft: PreTrainedModel, prompt: int) -> Iterator[tuple[dict[str, Any], Drafted]]:
    """For the length of the context, count what is drafted and kept.

    Yields:
        what `dense.generate` is to be given besides, and the counts.
    """
    drafted = Drafted()
    settings = draft.generation_config
    before = settings.num_assistant_tokens, settings.num_assistant_tokens_schedule
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = AHEAD, "constant"

    def count(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass is over the last token that is known, or the prompt, and what was written ahead."""
        rows = kwargs["input_ids"].shape[1]
        drafted.tokens += rows - (1 if drafted.passes else prompt)
        drafted.passes += 1

    hook = dense.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield {"assistant_model": draft}, drafted
    finally:
        hook.remove()
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = before
