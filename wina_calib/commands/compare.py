"""`wina-calib compare`."""

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
    revision_option,
    tokens_option,
    trust_option,
)
from wina_calib.commands.output import bars, emit, note
from wina_calib.common.text import table
from wina_calib.studies.compare.methods import GROUPS, METHODS, find_methods
from wina_calib.studies.defaults import COMPARE_METHODS, COMPARE_SPARSITIES


@click.command("compare")
@click.argument("model", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for cells and results.")
@click.option(
    "--methods",
    default=",".join(COMPARE_METHODS),
    show_default=True,
    metavar="NAME,...",
    help="Methods or groups of them; -NAME takes one out of those before it.",
)
@click.option("--list", "as_list", is_flag=True, help="Show the methods and their groups, and do nothing else.")
@click.option(
    "--sparsity", "-s", "sparsities", type=Fractions(), default=",".join(map(str, COMPARE_SPARSITIES)),
    show_default=True, metavar="S,S,...", help="Model sparsities.",
)  # fmt: skip
@click.option("--data", multiple=True, metavar="SPEC", help="Calibration text; by default what `calibrate` takes.")
@heldout_option("--heldout")
@click.option(
    "--samples", default=128, show_default=True, metavar="N", help="Calibration blocks; at least 8,000 tokens in all."
)
@click.option("--seq-len", default=2048, show_default=True, metavar="N", help="Tokens a block.")
@tokens_option()
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of every random choice.")
@click.option("--plots", "draw", is_flag=True, help="Draw compare.png and bits.png too (extra plots).")
@device_option
@dtype_option
@revision_option
@trust_option
@json_option
def command(
    model: str | None,
    output: Path | None,
    methods: str,
    as_list: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Put methods side by side: MODEL calibrated with each, measured on the same text at the same sparsities.

    `papers` are WINA, TEAL, CATS and others; `quantized` has the weights in 8 and 4 bits beside the defaults; `ablation` changes
    one part of the defaults at a time. Every finished figure is
    kept in the folder: run the same command again to go on after a stop, or name more methods or sparsities beside the ones
    before. The table has what is named. With other text, tokens, seed, dtype or versions figures are computed anew, and the
    old ones left aside.

    \b
    Examples:
      wina-calib compare demo -o demo-compare --methods wina,teal,ours -s 0.5,0.65
      wina-calib compare demo -o demo-compare --methods ablation
      wina-calib compare demo -o demo-compare --methods quantized -s 0.25,0.4,0.5 --plots
    """
    if as_list:
        rows = [
            [m.name, m.group if m.group in GROUPS else f"ablation: {m.group}", m.budget, m.about]
            for m in METHODS.values()
        ]
        facts = {
            "methods": {m.name: m.about for m in METHODS.values()},
            "groups": {name: [m.name for m in members] for name, members in GROUPS.items()},
            "budgets": {m.name: m.budget for m in METHODS.values()},
        }
        emit(facts, table(["method", "group", "budget", "what it is"], rows), as_json=as_json)
        return
    if model is None or output is None:
        raise click.UsageError("give MODEL and -o DIR, or --list.")
    names = [name.strip() for name in methods.split(",") if name.strip()]
    find_methods(names)  # an unknown one is told before libraries are loaded
    load_libraries()
    from wina_calib.studies.compare.run import compare

    try:
        with bars() as progress:
            comparison = compare(model, output, methods=names, progress=progress, **options)
    except KeyboardInterrupt:
        note(f"Interrupted; finished cells are kept in {output}. The same command goes on from there.")
        raise click.exceptions.Exit(130) from None
    emit(comparison.to_dict(), comparison.text(), as_json=as_json)
