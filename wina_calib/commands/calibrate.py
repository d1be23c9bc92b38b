"""`wina-calib calibrate`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from wina_calib.calibration.run import Result, calibrate
from wina_calib.commands.options import bar, calibrate_options, emit, folder_option, json_option, note
from wina_calib.common.progress import Estimate, human_bytes


@click.command("calibrate")
@click.argument("model")
@folder_option
@calibrate_options
@json_option
def command(model: str, output: Path, as_json: bool, **options: Any) -> None:
    """Fit sparsity thresholds to MODEL and write a sparse-ready checkpoint.

    MODEL is a Hugging Face model folder, a Hub repository such as USER/NAME, or `demo`, the bundled demo model.

    \b
    Example:
      wina-calib calibrate demo -o demo-sparse --sparsity 0.5
    """
    with Bars() as progress, stoppable():
        result = calibrate(model, output, progress=progress, **options)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one reports
        return
    if result.settings.provenance["untied"]:
        note(
            "note: lm_head no longer shares the embeddings' weights (the final norm's gain went into it), so the checkpoint "
            "has more of them than the model"
        )
    emit(summary(result), f"{result.folder}: calibrated for {result.settings.sparsity:.0%} sparsity.", as_json=as_json)


def summary(result: Result) -> dict[str, Any]:
    """A finished calibration for JSON."""
    return {"folder": str(result.folder), **result.settings.to_dict()}


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


class Bars:
    """Progress of a calibration as an estimate and bars on standard error."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._start = time.monotonic()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def planned(self, estimate: Estimate) -> None:
        """Print what the work will take."""
        note(
            f"plan: {estimate.tokens:,} tokens, {estimate.passes:.1f} forward passes ({estimate.flops / 1e12:,.1f} TFLOP), "
            f"about {human_bytes(estimate.memory_bytes)} of memory, {human_bytes(estimate.disk_bytes)} on disk"
        )
        for line in estimate.notes:
            note(f"note: {line}")

    def phase(self, name: str, steps: int) -> None:
        """Begin a bar."""
        self._close()
        note(f"[{time.monotonic() - self._start:6.1f} s] {name}")
        self._bar = bar(steps, name)

    def step(self, text: str) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def note(self, text: str) -> None:
        """Print a line."""
        note(f"note: {text}")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
