"""A prompt, as the model's chat template wants it, and what a calibrated model makes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from wina_calib.common.devices import pick_device
from wina_calib.common.text import first_line
from wina_calib.errors import UsageError
from wina_calib.model.locate import load_tokenizer, resolve
from wina_calib.runtime.load import load


@dataclass(frozen=True)
class Generated:
    """What a model wrote.

    Attributes:
        text: of a chat the answer, else the prompt and what follows it.
        chat: whether the prompt was put as a user's turn.
        prompt_tokens: tokens of the prompt, the template's included.
        tokens: new tokens.
        ended: whether the model ended by itself, and not at the most tokens that it might write.
        tokens_per_second: of all new tokens but the first, which the prompt is read for; None where there is one alone.
    """

    text: str
    chat: bool
    prompt_tokens: int
    tokens: int
    ended: bool
    tokens_per_second: float | None


def generate(
    checkpoint: str | Path,
    prompt: str,
    *,
    raw: bool = False,
    system: str | None = None,
    sparsity: float | None = None,
    new: int = 100,
    sample: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    show: Callable[[str], None] | None = None,
) -> Generated:
    """Load a checkpoint and let it answer or continue a prompt.

    Args:
        checkpoint: a calibrated checkpoint's folder or Hub id.
        prompt: the text; a user's turn where the model has a chat template.
        raw: continue the text as it is, template or not.
        system: the system's turn before it.
        sparsity: model sparsity; None is the calibrated one.
        new: most tokens to write.
        sample: draw tokens, instead of taking the likeliest.
        seed: of drawing.
        device: `auto`, `cpu`, `cuda` ...
        dtype: of the weights; `auto` is the stored one.
        revision: branch, tag or commit on the Hub.
        show: called with pieces of `text` as they come.

    Raises:
        UsageError: the prompt is empty, or the template does not take it.
    """
    folder, _ = resolve(checkpoint, revision=revision)
    tokenizer: Any = load_tokenizer(folder)
    chat = bool(tokenizer.chat_template) and not raw
    if system is not None and not chat:
        missing = "goes with no --raw" if tokenizer.chat_template else "needs a chat template, which this model has not"
        raise UsageError(f"--system {missing}. Leave it out, or put its text into the prompt.")
    inputs = chat_inputs(tokenizer, prompt, system) if chat else text_inputs(tokenizer, prompt)
    place = pick_device(device)
    model = load(folder, sparsity, dtype=dtype, device_map=place if place.type != "cpu" else None)
    torch.manual_seed(seed)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    length = inputs["input_ids"].shape[1]
    clock = _Clock(tokenizer, show, skip_prompt=chat)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(**inputs, max_new_tokens=new, do_sample=sample, pad_token_id=pad, streamer=clock)
    written = out[0, length:]
    text = str(tokenizer.decode(written if chat else out[0], skip_special_tokens=True))
    rate = clock.tokens_per_second
    return Generated(text, chat, length, len(written), ended=_ends(model, written, new), tokens_per_second=rate)


def text_inputs(tokenizer: Any, prompt: str) -> dict[str, Tensor]:
    """A text as the model reads it: ids and attention mask (1, tokens)."""
    inputs = dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
    if not inputs["input_ids"].shape[1]:
        raise UsageError("the prompt is empty, and this model's tokenizer puts nothing before a text. Give some text.")
    return inputs


def chat_inputs(tokenizer: Any, prompt: str, system: str | None = None) -> dict[str, Tensor]:
    """A user's turn by the tokenizer's chat template, up to where the answer begins: ids and attention mask (1, tokens).

    Raises:
        UsageError: the template does not take it.
    """
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": prompt})
    try:
        made = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except Exception as error:  # a template is a program of the model's, and may raise anything
        raise UsageError(
            f"the model's chat template does not take this ({first_line(error)}). Leave --system out, or give --raw."
        ) from error
    ids = made["input_ids"]
    return {"input_ids": ids, "attention_mask": made.get("attention_mask", torch.ones_like(ids))}


def _ends(model: Any, written: Tensor, most: int) -> bool:
    """Whether a text ended with one of the model's end tokens, and not by its length."""
    ends = model.generation_config.eos_token_id
    known = set(ends if isinstance(ends, list) else [ends])
    return len(written) < most or (len(written) > 0 and int(written[-1]) in known)


class _Clock(TextStreamer):
    """Hands text on as it comes, and measures how fast."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None] | None, *, skip_prompt: bool) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self._show = show
        self._times: list[float] = []
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token after another."""
        if self._prompt_seen:
            self._times.append(time.perf_counter())
        self._prompt_seen = True
        if self._show is not None:
            super().put(value)

    def end(self) -> None:
        """Hand on what is left."""
        if self._show is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a piece on."""
        assert self._show is not None
        self._show(text)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first over the time that they took."""
        if len(self._times) < 2:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])
