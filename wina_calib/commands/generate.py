"""`wina-calib generate`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from wina_calib.choices import DTYPES
from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import Share, device_option, json_option, revision_option, trust_option
from wina_calib.commands.output import emit, note
from wina_calib.errors import UsageError

if TYPE_CHECKING:
    from wina_calib.runtime.generate import Generated


@click.command("generate")
@click.argument("checkpoint", metavar="DIR")
@click.argument("prompt")
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the model's chat template.")
@click.option("--system", metavar="TEXT", help="What the system says before PROMPT, by the chat template.")
@click.option("--sparsity", "-s", type=Share(), metavar="S", help="Model sparsity; the calibrated one by default.")
@click.option(
    "--new", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="Tokens to generate at most."
)
@click.option("--sample/--greedy", default=False, help="Sample, or take the likeliest token.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of sampling.")
@click.option("--draft-for", metavar="BASE", help="Write BASE's own text faster: DIR drafts, the dense BASE decides.")
@device_option
@click.option("--dtype", default="auto", type=click.Choice(DTYPES), help="Of the weights; auto is the stored one.")
@revision_option
@trust_option
@json_option
def command(
    checkpoint: str, prompt: str, raw: bool, system: str | None, new: int, as_json: bool, **options: Any
) -> None:
    """Answer or continue PROMPT with the calibrated model in DIR.

    Where the model has a chat template, PROMPT is a user's turn and what is printed is the answer; else, and with --raw, the
    text goes on. In a terminal it appears as it is written.

    With --draft-for the text is that of the dense model BASE: DIR, calibrated from it, writes a few tokens ahead, BASE reads them
    in one pass and keeps those that it would have written itself.

    \b
    Examples:
      wina-calib generate demo-sparse "The old lighthouse"
      wina-calib generate chat-sparse "What is a lighthouse?" --system "Be brief." --new 200
      wina-calib generate chat-sparse "What is a lighthouse?" --draft-for chat
    """
    if raw and system is not None:
        raise UsageError("--raw uses no chat template, so that --system has no place. Leave one of them out.")
    load_libraries()
    from wina_calib.runtime.generate import generate

    streams = sys.stdout.isatty() and not as_json
    show = (lambda piece: click.echo(piece, nl=False)) if streams else None
    done = generate(checkpoint, prompt, raw=raw, system=system, new=new, show=show, **options)
    if streams:
        click.echo()
    else:
        emit({"prompt": prompt, **asdict(done)}, done.text, as_json=as_json)
    note(speed(done, new))


def speed(done: Generated, most: int) -> str:
    """How much was written how fast, and whether it was cut."""
    rate = "" if done.tokens_per_second is None else f", {done.tokens_per_second:.1f} tokens/s"
    kept = (
        ""
        if not done.drafted or done.kept is None
        else f", {done.kept} of {done.drafted} drafted tokens kept ({done.kept / done.drafted:.0%})"
    )
    cut = "" if done.ended else f"; cut at {most}, --new N lets it write more"
    return f"[{done.prompt_tokens} tokens read, {done.tokens} written{rate}{kept}{cut}]"
