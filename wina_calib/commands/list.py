"""`wina-calib list`."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from wina_calib.commands.logs import load_libraries, log_level
from wina_calib.commands.options import json_option
from wina_calib.commands.output import emit
from wina_calib.common.text import table

if TYPE_CHECKING:
    from wina_calib.checkpoint.hub import Listed


@click.command("list")
@click.argument("user", required=False)
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1), metavar="N", help="At most so many.")
@json_option
def command(user: str | None, limit: int, as_json: bool) -> None:
    """List the calibrated checkpoints of USER, or of everybody, on the Hugging Face Hub.

    \b
    Example:
      wina-calib list USER
    """
    load_libraries()
    from wina_calib.checkpoint.hub import list_checkpoints

    with log_level("huggingface_hub", logging.ERROR):  # one line says that nobody answers
        listed = list_checkpoints(user, limit=limit)
    emit({"checkpoints": [asdict(model) for model in listed]}, render(listed, user), as_json=as_json)


def render(listed: list[Listed], user: str | None) -> str:
    """The list as text."""
    if not listed:
        return f"No calibrated checkpoints{f' of {user}' if user else ''}."
    rows = [
        [m.repo, m.base_model or "-", "private" if m.private else "public", f"{m.downloads:,}", m.modified]
        for m in listed
    ]
    return table(["checkpoint", "base model", "access", "downloads", "modified"], rows)
