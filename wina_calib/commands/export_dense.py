"""`wina-calib export-dense`."""

from __future__ import annotations

from pathlib import Path

import click

from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import folder_option, json_option, overwrite_option, revision_option, trust_option
from wina_calib.commands.output import emit


@click.command("export-dense")
@click.argument("checkpoint", metavar="DIR")
@folder_option
@overwrite_option
@revision_option
@trust_option
@json_option
def command(checkpoint: str, output: Path, overwrite: bool, revision: str | None, as_json: bool) -> None:
    """Write the checkpoint DIR as a plain dense model, for tools that do not know wina_calib.

    \b
    Example:
      wina-calib export-dense demo-sparse -o demo-dense
    """
    load_libraries()
    from wina_calib.checkpoint.card_text import trained
    from wina_calib.checkpoint.export_dense import export_dense
    from wina_calib.checkpoint.reader import read_settings
    from wina_calib.model.locate import resolve

    folder, _ = resolve(checkpoint, revision=revision)
    export_dense(folder, output, overwrite=overwrite)
    facts = read_settings(folder).provenance
    how = trained(facts)
    told = (
        f" Its weights were trained ({how.replace('`', '')}): it is another model than the base model." if how else ""
    )
    out = {"folder": str(output)} | ({"recovered": facts["recovered"]} if how else {})
    emit(out, f"{output}: dense model written.{told}", as_json=as_json)
