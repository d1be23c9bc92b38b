"""`wina-calib diagnose`."""

from __future__ import annotations

from typing import Any

import click

from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import (
    Counts,
    Fractions,
    Share,
    device_option,
    dtype_option,
    heldout_option,
    json_option,
    tokens_option,
    trust_option,
)
from wina_calib.commands.output import bars, emit
from wina_calib.studies.defaults import (
    DIAGNOSE_AMOUNTS,
    DIAGNOSE_EXTREMES,
    DIAGNOSE_INPUTS,
    DIAGNOSE_PARTS,
    DIAGNOSE_TOKENS,
)


@click.command("diagnose")
@click.argument("checkpoint", metavar="DIR")
@click.option("--what", default=",".join(DIAGNOSE_PARTS), show_default=True, metavar="NAME,...", help="Parts to do.")
@click.option(
    "--sparsity", "-s", type=Share(), metavar="S",
    help="Model sparsity of propagation and texts; the calibrated one by default.",
)  # fmt: skip
@click.option(
    "--extreme", type=Fractions(), default=",".join(map(str, DIAGNOSE_EXTREMES)), show_default=True,
    metavar="S,S,...", help="Model sparsities of the extremes.",
)  # fmt: skip
@click.option(
    "--inputs", default=DIAGNOSE_INPUTS, show_default=True, metavar="N",
    help="Inputs of every site that importance drops one by one.",
)  # fmt: skip
@click.option(
    "--amounts", type=Counts(), default=",".join(map(str, DIAGNOSE_AMOUNTS)), show_default=True,
    metavar="N,N,...", help="Numbers of blocks that texts fits on.",
)  # fmt: skip
@click.option("--fit-seq-len", type=int, metavar="N", help="Tokens of such a block; the calibration's by default.")
@heldout_option("--data")
@tokens_option(DIAGNOSE_TOKENS)
@device_option
@dtype_option
@trust_option
@json_option
def command(checkpoint: str, what: str, amounts: tuple[int, ...], as_json: bool, **options: Any) -> None:
    """Look behind the figures of a calibrated checkpoint.

    \b
    importance   whether column norms tell which inputs matter: rank correlations with the output's error, the loss's
                 gradient, and the KL divergence when inputs are really dropped
    propagation  errors of single sparse layers, at once and at the end, against all layers sparse
    extremes     where and how it breaks at high sparsity
    texts        thresholds fitted on code and on prose, tested on both; fitted on few and on many blocks

    \b
    Examples:
      wina-calib diagnose demo-sparse
      wina-calib diagnose demo-sparse --what propagation -s 0.65 --json
    """
    load_libraries()
    from wina_calib.studies.diagnose import diagnose

    parts = [name.strip() for name in what.split(",") if name.strip()]
    with bars() as progress:
        diagnosis = diagnose(checkpoint, what=parts, amounts=amounts, progress=progress, **options)
    emit(diagnosis.to_dict(), diagnosis.text(), as_json=as_json)
