"""`wina-calib generate`."""

from __future__ import annotations

from typing import Any

import click
import torch

from wina_calib.commands.options import Share, device_option, json_option, revision_option, trust_option
from wina_calib.commands.output import emit
from wina_calib.common.devices import pick_device
from wina_calib.errors import UsageError
from wina_calib.model.locate import load_tokenizer, resolve
from wina_calib.runtime.load import load


@click.command("generate")
@click.argument("checkpoint", metavar="DIR")
@click.argument("prompt")
@click.option("--sparsity", "-s", type=Share(), metavar="S", help="Model sparsity; the calibrated one by default.")
@click.option(
    "--new", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="Tokens to generate at most."
)
@click.option("--sample/--greedy", default=False, help="Sample, or take the likeliest token.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of sampling.")
@device_option
@revision_option
@trust_option
@json_option
def command(
    checkpoint: str,
    prompt: str,
    sparsity: float | None,
    new: int,
    sample: bool,
    seed: int,
    device: str,
    revision: str | None,
    as_json: bool,
) -> None:
    """Continue PROMPT with the calibrated model in DIR.

    \b
    Example:
      wina-calib generate demo-sparse "The old lighthouse"
    """
    text = generate(
        checkpoint, prompt, sparsity=sparsity, new=new, sample=sample, seed=seed, device=device, revision=revision
    )
    emit({"prompt": prompt, "text": text}, text, as_json=as_json)


def generate(
    checkpoint: str,
    prompt: str,
    *,
    sparsity: float | None = None,
    new: int = 100,
    sample: bool = False,
    seed: int = 0,
    device: str = "auto",
    revision: str | None = None,
) -> str:
    """The prompt and what the model makes of it."""
    folder, _ = resolve(checkpoint, revision=revision)
    place = pick_device(device)
    model = load(folder, sparsity, device_map=place if place.type != "cpu" else None)
    tokenizer: Any = load_tokenizer(folder)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if not inputs["input_ids"].shape[1]:
        raise UsageError("the prompt is empty, and this model's tokenizer puts nothing before a text. Give some text.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(**inputs, max_new_tokens=new, do_sample=sample, pad_token_id=pad)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
