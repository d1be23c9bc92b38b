"""`wina-calib calibrate`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from wina_calib.calibration.options import CalibrateOptions, make_options
from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import flags, folder_option, json_option
from wina_calib.commands.output import bars, emit, note
from wina_calib.common.text import percent, share, whole

if TYPE_CHECKING:
    from wina_calib.calibration.run import Result


@click.command("calibrate")
@click.argument("model")
@folder_option
@flags(CalibrateOptions)
@json_option
def command(model: str, output: Path, as_json: bool, **options: Any) -> None:
    """Fit sparsity thresholds to MODEL and write a sparse-ready checkpoint.

    MODEL is a Hugging Face model folder, a Hub repository such as USER/NAME, or `demo`, the bundled demo model.

    \b
    Example:
      wina-calib calibrate demo -o demo-sparse --sparsity 0.5
    """
    make_options(options)  # what is wrong with them is told before libraries are loaded
    load_libraries()
    from wina_calib.calibration.run import calibrate

    with bars() as progress, stoppable():
        result = calibrate(model, output, progress=progress, **options)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one reports
        return
    if result.settings.provenance["untied"]:
        note(
            "note: lm_head no longer shares the embeddings' weights (the final norm's gain went into it), so the checkpoint "
            "has more of them than the model"
        )
    if (warning := result.verdict.warning) is not None:
        better = whole(result.verdict.sparsity_for["0.05"])
        place = quote(str(output))
        mend = f": wina-calib budget {place} --sparsity {better:.2f} --apply {place}"
        note(f"warning: {warning}{mend if result.verdict.reaches('0.05') else '.'}")
    emit(summary(result), told(result), as_json=as_json)


def summary(result: Result) -> dict[str, Any]:
    """A finished calibration for JSON."""
    facts = result.settings.to_dict()
    verdict = result.verdict
    return {"folder": str(result.folder), **facts, "verdict": verdict.to_json(), "warning": verdict.warning}


def told(result: Result) -> str:
    """A finished calibration for people: what it is, what to expect, and what to do next."""
    verdict, folder = result.verdict, result.folder
    prompt = "What is a lighthouse?" if _chats(folder) else "Once upon a time"
    whose = "the quantized model's at sparsity 0" if verdict.quantizing else "the dense model's"
    why = (
        ""
        if verdict.limit is None
        else f", the most that keeps perplexity within {percent(verdict.limit)} of {whose} (--max-ppl-rise)"
    )
    return "\n".join(
        [
            f"{folder}: calibrated for {share(verdict.sparsity)} sparsity{why}.",
            "",
            verdict.text(),
            "",
            "next:",
            f"  wina-calib evaluate {quote(str(folder))} --data YOUR_TEXT --save",
            f'  wina-calib generate {quote(str(folder))} "{prompt}"',
        ]
    )


def _chats(folder: Path) -> bool:
    """Whether a checkpoint's files hold a chat template; its tokenizer is not loaded, which may run code."""
    from wina_calib.storage import read_json

    config = folder / "tokenizer_config.json"
    stored = read_json(config) if config.is_file() else None
    return (folder / "chat_template.jinja").is_file() or (
        isinstance(stored, dict) and bool(stored.get("chat_template"))
    )


@contextmanager
def stoppable() -> Iterator[None]:
    """Take a request to end, as schedulers and torchrun send it, like Ctrl-C: what is finished stays usable."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
