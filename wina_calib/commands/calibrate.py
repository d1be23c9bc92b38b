"""`wina-calib calibrate`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wina_calib.calibration.options import CalibrateOptions, make_options
from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import flags, folder_option, json_option
from wina_calib.commands.output import bars, emit, note

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
