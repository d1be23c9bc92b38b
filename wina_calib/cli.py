"""The command line: `wina-calib COMMAND`. Each command has a module in `wina_calib.commands`."""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import sys
import warnings
from typing import Any

import click
from click.shell_completion import CompletionItem

from wina_calib.commands.logs import INTERRUPTED, log_level
from wina_calib.common.printable import printable_output
from wina_calib.errors import WinaError
from wina_calib.version import __version__

# What each one does, as its own help begins: read from here, the list of commands needs no import of any.
COMMANDS = {
    "calibrate": "Fit sparsity thresholds to MODEL and write a sparse-ready checkpoint.",
    "budget": "Show and choose how sparse every site of every layer is.",
    "recover": "Train the sparse checkpoint DIR for a short time, so that it predicts as its dense original does.",
    "evaluate": "Measure what sparsity costs in quality: DIR against itself at sparsity 0.",
    "compare": "Put methods side by side: MODEL calibrated with each, measured on the same text at the same sparsities.",
    "transfer": "Put the budget and thresholds of one calibrated model on another, and measure what that costs.",
    "diagnose": "Look behind the figures of a calibrated checkpoint.",
    "inspect": "Say what is in a calibrated checkpoint, verified.",
    "generate": "Answer or continue PROMPT with the calibrated model in DIR.",
    "demo": "Calibrate the bundled 5.5 M-parameter model at 50 %, evaluate it, and let it write.",
    "export-dense": "Write the checkpoint DIR as a plain dense model, for tools that do not know wina_calib.",
    "push": "Verify the checkpoint DIR, complete its model card, and upload it to the Hugging Face Hub.",
    "list": "List the calibrated checkpoints of USER, or of everybody, on the Hugging Face Hub.",
    "info": "Say what the checkpoint USER/REPO on the Hugging Face Hub is, without downloading weights.",
    "report": "Say how much of DIR can be dropped, where, and what it costs; draw it as PNG and one HTML page.",
    "lm-eval": "Run the lm-eval harness on calibrated checkpoints: its own ARGS, with wina_calib imported first.",
    "bench": "Time decoding, dense against sparse, in one process.",
    "flops": "Count what a token costs at some sparsities, from a config alone.",
    "bounds": "Compare the paper's error bounds (Lemma 3.1, Theorem 3.2) with measured errors at every site.",
}


class _Lazy(click.Group):
    """Imports a command's module when it is needed."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command; all that it prints passes the filter for text of others."""
        with printable_output():
            return super().main(*args, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"wina_calib.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if near and args[0] not in COMMANDS and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{args[0]}'. Did you mean '{near[0]}'?")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the names of commands from the table alone: a shell waits for it."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [CompletionItem(name) for name in COMMANDS if name.startswith(incomplete)]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except WinaError as error:
            _say(error, f"Error: {error}")
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as interrupt:
            _say(interrupt, str(interrupt) or INTERRUPTED)
            ctx.exit(130)
        except (click.exceptions.Exit, click.Abort):  # RuntimeErrors, of which nothing is to be said
            raise
        except (MemoryError, RuntimeError) as error:
            from wina_calib.common.memory import ran_out

            if "home directory" in str(error):  # what Python says of a path that begins with ~
                _say(
                    error,
                    "Error: a path begins with ~, and no home folder is known here (HOME is not set). Give it whole.",
                )
                ctx.exit(2)
            if not ran_out(error):
                raise
            _say(error, "Error: out of memory. Give --micro-batch 1, or smaller --samples or --seq-len.")
            ctx.exit(1)
        except UnicodeEncodeError as error:
            _say(error, f"Error: {error.object[:200]!r} holds bytes that are no UTF-8 text. Rename what is called so.")
            ctx.exit(2)
        except OSError as error:
            if error.errno == errno.ENOENT and not error.filename:  # what the system says of a path without a beginning
                _say(error, "Error: the folder that this was started in is gone. Go to another one.")
                ctx.exit(1)
            _say(error, f"Error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
            ctx.exit(1)


def _say(error: BaseException, text: str) -> None:
    """Say what went wrong, once where several processes share the work."""
    if not getattr(error, "silent", False):
        click.echo(text, err=True)


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"wina-calib {__version__}")
        ctx.exit()


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
@click.option("--verbose", "-v", is_flag=True, help="Log what transformers and wina_calib do.")
@click.option("--quiet", "-q", is_flag=True, help="No progress, notes or warnings on standard error.")
def main(verbose: bool, quiet: bool) -> None:
    """Calibrate activation sparsity once; load the sparse-ready checkpoint anywhere.

    \b
    Start with:
      wina-calib demo
      wina-calib calibrate MODEL -o DIR --sparsity 0.5

    Completion of commands, options and files in bash; zsh_source and fish_source serve other shells:

    \b
      eval "$(_WINA_CALIB_COMPLETE=bash_source wina-calib)"
    """
    if verbose and quiet:
        raise click.UsageError("--verbose and --quiet do not go together.")
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="%(message)s")
    click.get_current_context().with_resource(log_level("wina_calib", level))
    if quiet:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    main()
