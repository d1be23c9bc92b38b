"""`wina-calib bounds`."""

from __future__ import annotations

from typing import Any

import click

from wina_calib.choices import MASKS, SCORES, TRANSFORMS
from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import (
    Share,
    device_option,
    dtype_option,
    heldout_option,
    json_option,
    revision_option,
    trust_option,
)
from wina_calib.commands.output import bars, emit
from wina_calib.errors import UsageError
from wina_calib.studies.defaults import (
    BOUNDS_TOKENS,
    BOUNDS_TRANSFORMS,
    SYNTHETIC_DEPTH,
    SYNTHETIC_SEEDS,
    SYNTHETIC_WIDTH,
)


@click.command("bounds")
@click.argument("model", metavar="[DIR]", required=False)
@click.option(
    "--synthetic", "is_synthetic", is_flag=True, help="Repeat the paper's experiment on random networks instead."
)
@click.option(
    "--seeds", type=int, metavar="N", help=f"Networks of the synthetic experiment.  [default: {SYNTHETIC_SEEDS}]"
)
@click.option("--width", type=int, metavar="N", help=f"Their inputs and outputs.  [default: {SYNTHETIC_WIDTH}]")
@click.option("--depth", type=int, metavar="N", help=f"Their layers, for Theorem 3.2.  [default: {SYNTHETIC_DEPTH}]")
@click.option(
    "--transform",
    "transforms",
    multiple=True,
    type=click.Choice((*TRANSFORMS, "residual")),
    help=f"Transform to try on a model folder; may be repeated.  [default: {', '.join(BOUNDS_TRANSFORMS)}]",
)
@click.option(
    "--sparsity", "-s", type=Share(), metavar="S", help="Model sparsity; the calibrated one, or 0.5 by default."
)
@click.option("--score", type=click.Choice(SCORES), help="Score, for a model folder.  [default: wina]")
@click.option("--masks", type=click.Choice(MASKS), help="Masks, for a model folder.  [default: shared]")
@heldout_option("--data")
@click.option("--tokens", type=int, metavar="N", help=f"Tokens to use.  [default: {BOUNDS_TOKENS}]")
@device_option
@dtype_option
@revision_option
@trust_option
@json_option
def command(
    model: str | None,
    is_synthetic: bool,
    seeds: int | None,
    width: int | None,
    depth: int | None,
    as_json: bool,
    device: str,
    dtype: str,
    **measured: Any,
) -> None:
    """Compare the paper's error bounds (Lemma 3.1, Theorem 3.2) with measured errors at every site.

    DIR is a calibrated checkpoint, measured with its own masks, or a model folder, a Hub repository or `demo`: there every
    token keeps its top k inputs, under each transform in turn. The cross term says how far columns are from orthogonal.

    \b
    Examples:
      wina-calib bounds --synthetic
      wina-calib bounds demo --tokens 2048
      wina-calib bounds demo --transform none --transform paper --masks per-projection
    """
    sizes: dict[str, Any] = {k: v for k, v in {"seeds": seeds, "width": width, "depth": depth}.items() if v is not None}
    options = {k: v for k, v in measured.items() if v not in (None, ())}
    if is_synthetic:
        if model is not None or options:
            given = "DIR" if model is not None else f"--{next(iter(options))}".replace("transforms", "transform")
            raise UsageError(f"--synthetic uses no model: leave out {given}, or --synthetic.")
        load_libraries()
        from wina_calib.studies.bounds.lemmas import Setting, render_synthetic, synthetic

        result = synthetic(Setting(**sizes))
        emit(result.to_dict(), render_synthetic(result), as_json=as_json)
        return
    if model is None or sizes:
        missing = "Give a model folder or a calibrated checkpoint, or --synthetic."
        raise UsageError(missing if model is None else f"--{next(iter(sizes))} belongs to --synthetic.")
    load_libraries()
    from wina_calib.studies.bounds.measure import model_bounds, render

    with bars() as progress:
        results = model_bounds(model, device=device, dtype=dtype, progress=progress, **options)
    emit({"model": model, "results": [r.to_dict() for r in results]}, render(results), as_json=as_json)
