"""`wina-calib report`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import folder_option, json_option, overwrite_option, revision_option, trust_option
from wina_calib.commands.output import emit


@click.command("report")
@click.argument("checkpoint", metavar="DIR")
@folder_option
@overwrite_option
@revision_option
@trust_option
@json_option
def command(checkpoint: str, output: Path, overwrite: bool, revision: str | None, as_json: bool) -> None:
    """Say how much of DIR can be dropped, where, and what it costs; draw it as PNG and one HTML page.

    The page has the budget, scores and thresholds, errors and quality, layer by layer. Needs `pip install 'wina-calib[plots]'`.

    \b
    Example:
      wina-calib report demo-sparse -o report
    """
    load_libraries()
    from wina_calib.checkpoint.reader import open_checkpoint
    from wina_calib.model.locate import resolve
    from wina_calib.studies.answers import answers
    from wina_calib.studies.report import write_report

    folder, _ = resolve(checkpoint, revision=revision)
    page = write_report(folder, output, overwrite=overwrite)
    told = answers(open_checkpoint(folder))
    text = "\n\n".join([*(answer.text() for answer in told), f"{page}: report written."])
    emit({"page": str(page), "answers": [asdict(answer) for answer in told]}, text, as_json=as_json)
