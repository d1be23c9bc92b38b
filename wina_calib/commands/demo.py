"""`wina-calib demo`."""

from __future__ import annotations

from pathlib import Path

import click

from wina_calib.commands.calibrate import stoppable, summary
from wina_calib.commands.evaluate import render
from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import json_option
from wina_calib.commands.output import bars, emit, note
from wina_calib.errors import StateError

PROMPTS = ("The history of the city", "def read_file(path):")


@click.command("demo")
@click.option(
    "-o", "--output", default="demo-sparse", show_default=True, type=click.Path(path_type=Path), help="Folder to write."
)
@click.option("--samples", default=48, show_default=True, metavar="N", help="Blocks of calibration text.")
@click.option("--seq-len", default=512, show_default=True, metavar="N", help="Tokens a block.")
@json_option
def command(output: Path, samples: int, seq_len: int, as_json: bool) -> None:
    """Calibrate the bundled 5.5 M-parameter model at 50 %, evaluate it, and let it write.

    The model is a toy, which shows how it goes and not how good it is. An existing output folder is replaced. Nothing is
    downloaded.

    \b
    Example:
      wina-calib demo -o demo-sparse
    """
    load_libraries()
    from wina_calib.calibration.run import Result, calibrate
    from wina_calib.checkpoint.card import write_card
    from wina_calib.checkpoint.evaluation_file import save_evaluation
    from wina_calib.runtime.generate import generate
    from wina_calib.studies.evaluate import evaluate

    def calibrated(*, restart: bool) -> Result:
        return calibrate(
            "demo",
            output,
            sparsity=0.5,
            progress=progress,
            samples=samples,
            seq_len=seq_len,
            overwrite=True,
            restart=restart,
        )

    with bars() as progress, stoppable():
        try:
            result = calibrated(restart=False)
        except StateError:  # what was stopped here was another run
            result = calibrated(restart=True)
    note("evaluate")
    quality = evaluate(output, tokens=16_384)
    save_evaluation(output, quality.to_dict())
    write_card(output)
    texts = [generate(output, prompt, new=40, sample=True).text for prompt in PROMPTS]
    shown = "\n\n".join(
        [
            render(quality),
            "The sparse model writes:\n\n" + "\n".join(f"  {' '.join(text.split())}" for text in texts),
            "This was a toy of 5.5 M parameters. Next:\n"
            f"  wina-calib inspect {output}\n"
            f"  wina-calib evaluate {output} --sparsity 0.65\n"
            f'  wina-calib generate {output} "Once upon a time"\n'
            "  wina-calib calibrate MODEL -o DIR --sparsity 0.5     # your own model",
        ]
    )
    emit({"calibration": summary(result), "evaluation": quality.to_dict(), "texts": texts}, shown, as_json=as_json)
