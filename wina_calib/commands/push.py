"""`wina-calib push`."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from wina_calib.commands.logs import load_libraries, log_level
from wina_calib.commands.options import json_option, trust_option
from wina_calib.commands.output import emit, note


@click.command("push")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo", metavar="USER/REPO")
@click.option("--private/--public", default=None, help="Who sees a new repository; the account's default if not given.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to; made if it does not exist.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", "-m", metavar="TEXT", help="Message of the commit.")
@trust_option
@json_option
def command(
    folder: Path,
    repo: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    as_json: bool,
) -> None:
    """Verify the checkpoint DIR, complete its model card, and upload it to the Hugging Face Hub.

    Log in with `hf auth login` first, or set HF_TOKEN. An interrupted push goes on where it stopped; an unchanged
    checkpoint is not sent again.

    \b
    Example:
      wina-calib push demo-sparse USER/demo-sparse --private
    """
    load_libraries()
    from wina_calib.checkpoint.evaluation_file import read_evaluation
    from wina_calib.checkpoint.hub import push

    with log_level("huggingface_hub", logging.ERROR):  # what it says of unchanged files is said below
        done = push(folder, repo, private=private, revision=revision, create_pr=create_pr, message=message)
    text = f"{done.url}: {'pushed' if done.changed else 'unchanged, nothing was uploaded'}."
    if read_evaluation(folder) is None:
        note(
            f"note: the card has no measured quality. `wina-calib evaluate {folder} --save` measures it; then push again."
        )
    emit({"url": done.url, "commit": done.commit, "changed": done.changed}, text, as_json=as_json)
