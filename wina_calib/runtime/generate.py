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

from wina_calib.checkpoint.reader import open_calibrated
from wina_calib.common.devices import pick_device
from wina_calib.common.text import first_line
from wina_calib.errors import UsageError
from wina_calib.model.locate import load_tokenizer, resolve
from wina_calib.runtime.drafting import Drafted, drafting, load_base
from wina_calib.runtime.load import load_opened, set_sparsity


@dataclass(frozen=True)
class Generated:
    """What a model wrote."""

    text: str  # of a chat the answer, else the prompt and what follows it
    chat: bool  # whether the prompt was put as a user's turn
    prompt_tokens: int  # tokens of the prompt, the template's included
    tokens: int  # new tokens
    ended: bool  # whether the model ended by itself, and not at the most tokens that it might write
    # of all new tokens but those of the first pass, which the prompt is read in; None where it is alone
    tokens_per_second: float | None
    drafted: int | None = None  # tokens that a draft wrote ahead; None without one
    kept: int | None = None  # how many of these the dense model kept


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
    draft_for: str | Path | None = None,
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
        draft_for: the dense model, a folder or Hub id, that is to write the text with the checkpoint as its draft.
        show: called with pieces of `text` as they come.

    Raises:
        UsageError: the prompt is empty or no text, the template does not take it, or the dense model has other tokens.
    """
    for what, text in (("prompt", prompt), ("system's turn", system)):
        _check_text(what, text or "")
    folder, _ = resolve(checkpoint, revision=revision)
    opened = open_calibrated(folder)
    tokenizer: Any = load_tokenizer(opened)
    chat = bool(tokenizer.chat_template) and not raw
    if system is not None and not chat:
        missing = "goes with no --raw" if tokenizer.chat_template else "needs a chat template, which this model has not"
        raise UsageError(f"--system {missing}. Leave it out, or put its text into the prompt.")
    inputs = chat_inputs(tokenizer, prompt, system) if chat else text_inputs(tokenizer, prompt)
    place = pick_device(device)
    where = place if place.type != "cpu" else None
    model = load_opened(opened, dtype=dtype, device_map=where)
    if sparsity is not None:
        set_sparsity(model, sparsity)
    dense = None if draft_for is None else load_base(draft_for, model, tokenizer, dtype=dtype, device_map=where)
    torch.manual_seed(seed)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    length = inputs["input_ids"].shape[1]
    clock = _Clock(tokenizer, show, skip_prompt=chat)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = {"max_new_tokens": new, "do_sample": sample, "pad_token_id": pad, "streamer": clock}
    drafted: Drafted | None = None
    if dense is None:
        out = model.generate(**inputs, **options)
    else:
        with drafting(dense, model, length) as (more, drafted):
            out = dense.generate(**inputs, **options, **more)
        drafted.kept = out.shape[1] - length - drafted.passes
    written = out[0, length:]
    text = str(tokenizer.decode(written if chat else out[0], skip_special_tokens=True))
    rate = clock.tokens_per_second
    counts = (None, None) if drafted is None else (drafted.tokens, drafted.kept)
    ended = _ends(model if dense is None else dense, written, new)
    return Generated(text, chat, length, len(written), ended, rate, *counts)


def _check_text(what: str, text: str) -> None:
    """Raise UsageError where a text holds what no tokenizer takes, such as bytes of another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the {what} is no UTF-8 text, from character {error.start + 1} on. Convert it.") from None


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
        self._tokens: list[int] = []
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token after another."""
        if self._prompt_seen:
            self._times.append(time.perf_counter())
            self._tokens.append(value.numel())
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
        """Tokens after those of the first pass over the time that they took."""
        if len(self._times) < 2:
            return None
        return sum(self._tokens[1:]) / (self._times[-1] - self._times[0])
