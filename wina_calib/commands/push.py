"""`wina-calib push`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from wina_calib.commands.logs import load_libraries, log_level
from wina_calib.commands.options import json_option, trust_option
from wina_calib.commands.output import bars, emit, note, quiet


@click.command("push")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo", metavar="USER/REPO")
@click.option("--private/--public", default=None, help="Who sees a new repository; the account's default if not given.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to; made if it does not exist.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option(
    "--base-model", metavar="USER/NAME", help="The base model on the Hub, where DIR does not say; for the card."
)
@click.option("--message", "-m", metavar="TEXT", help="Message of the commit.")
@trust_option
@json_option
def command(folder: Path, repo: str, base_model: str | None, as_json: bool, **options: Any) -> None:
    """Verify the checkpoint DIR, complete its model card, and upload it to the Hugging Face Hub.

    Log in with `hf auth login` first, or set HF_TOKEN. An interrupted push goes on where it stopped; an unchanged
    checkpoint is not sent again.

    The card names the base model with its licence and languages. Where DIR was calibrated from a local folder nobody knows its
    id: give --base-model, or answer when you are asked.

    \b
    Examples:
      wina-calib push demo-sparse USER/demo-sparse --private
      wina-calib push demo-sparse USER/demo-sparse --base-model USER/BASE
    """
    load_libraries()
    from wina_calib.checkpoint.evaluation_file import read_evaluation
    from wina_calib.checkpoint.hub import check_names, known_base, push_to_hub

    check_names(repo, base_model)  # before anybody is asked
    if base_model is None and known_base(folder) is None:
        base_model = _asked()
    # What the library says of unchanged files is said below.
    with log_level("huggingface_hub", logging.ERROR), bars() as progress:
        done = push_to_hub(folder, repo, base_model=base_model, progress=progress, **options)
    text = f"{done}: {'pushed' if done.changed else 'unchanged, nothing was uploaded'}."
    if read_evaluation(folder) is None:
        note(
            f"note: the card has no measured quality. `wina-calib evaluate {folder} --save` measures it; then push again."
        )
    emit({"url": done, "commit": done.commit, "changed": done.changed}, text, as_json=as_json)


def _asked() -> str | None:
    """The base model's id, from a person at a terminal; elsewhere a note that the card has none."""
    if sys.stdin.isatty() and sys.stderr.isatty() and not quiet():
        try:
            asked: str = click.prompt(
                "Id of the base model on the Hub, USER/NAME (empty: it is on none)",
                default="",
                show_default=False,
                err=True,
            )
        except click.Abort:
            raise KeyboardInterrupt("\nInterrupted; nothing was sent.") from None
        return asked.strip() or None
    note(
        "note: the card names no base model, as nothing here says which one of the Hub it is. --base-model USER/NAME names it."
    )
    return None
