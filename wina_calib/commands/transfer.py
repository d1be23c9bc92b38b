"""`wina-calib transfer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import (
    Fractions,
    device_option,
    dtype_option,
    heldout_option,
    json_option,
    overwrite_option,
    tokens_option,
    trust_option,
)
from wina_calib.commands.output import bars, check_files, emit, note
from wina_calib.studies.defaults import TRANSFER_SAMPLES


@click.command("transfer")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option(
    "--sparsity", "-s", "sparsities", type=Fractions(), default=(), metavar="S,S,...",
    help="Model sparsities; the one DST was calibrated for by default.",
)  # fmt: skip
@heldout_option("--heldout")
@tokens_option()
@click.option(
    "--data", multiple=True, metavar="SPEC", help="Text of the dense pass; DST's calibration text by default."
)
@click.option("--samples", default=TRANSFER_SAMPLES, show_default=True, metavar="N", help="Blocks of the dense pass.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
    help="Only write SRC's budget as a budget file for DST, which need not be calibrated.",
)  # fmt: skip
@overwrite_option
@device_option
@dtype_option
@trust_option
@json_option
def command(
    source: str,
    target: str,
    sparsities: tuple[float, ...],
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Put the budget and thresholds of one calibrated model on another, and measure what that costs.

    Layers are matched by relative depth. SRC's budget is used with DST's own score tables, with quantiles of DST's dense
    scores on a few blocks, and SRC's thresholds as they are, beside DST's own calibration. No folder is changed.

    \b
    Examples:
      wina-calib transfer small-sparse large-sparse -s 0.5,0.65
      wina-calib transfer small-sparse LARGE_MODEL -o budget.yaml
      wina-calib calibrate LARGE_MODEL -o large-sparse --budget budget.yaml
    """
    if output is not None and len(sparsities) > 1:
        raise click.UsageError("a budget file holds one sparsity: give one with -s.")
    load_libraries()
    from wina_calib.budgets import write_budget
    from wina_calib.studies.transfer import budget_file, render, transfer

    if output is not None:
        check_files([output], overwrite=overwrite)
        budget = budget_file(source, target, sparsities[0] if sparsities else None)
        write_budget(output, budget)
        text = f"{output}: the budget of {source} at sparsity {budget.sparsity:g} for {target}"
        emit({"file": str(output), "sparsity": budget.sparsity}, text, as_json=as_json)
        return
    with bars() as progress:
        done = transfer(source, target, sparsities=sparsities, progress=progress, **options)
    for way, reason in done.skipped.items():
        note(f"note: {way} is left out. {reason}")
    emit(done.to_dict(), render(done), as_json=as_json)
