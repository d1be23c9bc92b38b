"""`wina-calib flops`."""

from __future__ import annotations

import click

from wina_calib.choices import TRANSFORMS
from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import Fractions, json_option, revision_option
from wina_calib.commands.output import emit
from wina_calib.studies.defaults import FLOPS_CONTEXT, FLOPS_SPARSITIES


@click.command("flops")
@click.argument("model", metavar="MODEL_OR_CONFIG")
@click.option(
    "--sparsity",
    "-s",
    type=Fractions(),
    default=",".join(map(str, FLOPS_SPARSITIES)),
    show_default=True,
    metavar="S,S,...",
    help="Model sparsities.",
)
@click.option(
    "--transform",
    type=click.Choice((*TRANSFORMS, "residual")),
    help="Transform whose run-time matrices are counted; a calibrated checkpoint's own by default, else none.",
)
@click.option(
    "--context", default=FLOPS_CONTEXT, show_default=True, metavar="N", help="Tokens that attention looks at."
)
@revision_option
@json_option
def command(
    model: str, sparsity: tuple[float, ...], transform: str | None, context: int, revision: str | None, as_json: bool
) -> None:
    """Count what a token costs at some sparsities, from a config alone.

    MODEL_OR_CONFIG is llama-2-7b, llama-3-8b, llama-3-70b, qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-7b, phi-4, tinyllama-1.1b, demo,
    a config file, a model folder or a Hub repository such as USER/NAME (only its config.json is fetched).

    \b
    Example:
      wina-calib flops llama-3-8b --sparsity 0.25,0.4,0.5,0.65 --transform paper
    """
    load_libraries()
    from wina_calib.studies.flops import flops, render

    result = flops(model, sparsities=sparsity, transform=transform, context=context, revision=revision)
    emit(result.to_dict(), render(result), as_json=as_json)
