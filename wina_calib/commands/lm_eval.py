"""`wina-calib lm-eval`."""

from __future__ import annotations

import sys

import click

from wina_calib.commands.logs import load_libraries


@click.command("lm-eval", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def command(args: tuple[str, ...]) -> None:
    """Run the lm-eval harness on calibrated checkpoints: its own ARGS, with wina_calib imported first.

    Plain `lm_eval` does not know the checkpoint format and refuses it. Needs `pip install 'wina-calib[lm-eval]'`.

    \b
    Example:
      wina-calib lm-eval run --model hf --model_args pretrained=demo-sparse --tasks arc_easy
    """
    load_libraries()
    from wina_calib.studies.lm_eval_tasks import require_harness

    require_harness()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *args]
    cli_evaluate()
