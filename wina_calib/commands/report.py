"""`wina-calib report`."""

from __future__ import annotations

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
    """Draw the checkpoint DIR: budget, scores and thresholds, errors and quality, as PNG and one HTML page.

    Needs `pip install 'wina-calib[plots]'`.

    \b
    Example:
      wina-calib report demo-sparse -o report
    """
    load_libraries()
    from wina_calib.model.locate import resolve
    from wina_calib.studies.report import write_report

    folder, _ = resolve(checkpoint, revision=revision)
    page = write_report(folder, output, overwrite=overwrite)
    emit({"page": str(page)}, f"{page}: report written.", as_json=as_json)
