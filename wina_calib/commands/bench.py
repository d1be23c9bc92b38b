"""`wina-calib bench`."""

from __future__ import annotations

from typing import Any

import click

from wina_calib.choices import BITS, DTYPES, GROUP_SIZES
from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import Fractions, device_option, json_option, trust_option
from wina_calib.commands.output import bars, emit
from wina_calib.errors import UsageError
from wina_calib.studies.defaults import BENCH_NEW, BENCH_PROMPT, BENCH_ROUNDS, BENCH_SPARSITIES


@click.command("bench")
@click.argument("model", metavar="[DIR_OR_MODEL]", required=False)
@click.option("--random", metavar="CONFIG", help="Random weights of this preset, config file, folder or Hub id.")
@click.option(
    "--sparsity",
    "-s",
    "sparsities",
    type=Fractions(),
    default=",".join(map(str, BENCH_SPARSITIES)),
    show_default=True,
    metavar="S,S,...",
    help="Model sparsities.",
)
@click.option("--prompt", default=BENCH_PROMPT, show_default=True, metavar="N", help="Tokens of the prompt.")
@click.option("--new", default=BENCH_NEW, show_default=True, metavar="N", help="Tokens to decode in a round.")
@click.option("--rounds", default=BENCH_ROUNDS, show_default=True, metavar="N", help="Rounds of all variants in turn.")
@click.option(
    "--compile/--no-compile", "compiled", default=None, help="Decode compiled, both models; default: on CUDA."
)
@click.option(
    "--bits",
    default="0",
    type=click.Choice(("0", *map(str, BITS))),
    help="Quantize the sparse model's sites, and lm_head to 8 bits; 0 leaves them. Not for calibrated checkpoints.",
)
@click.option(
    "--group-size",
    default=str(GROUP_SIZES[-1]),
    show_default=True,
    type=click.Choice(tuple(map(str, GROUP_SIZES))),
    help="Outputs that share a scale at 4 bits.",
)
@click.option("--kernel-only", is_flag=True, help="Only the site products of one layer (random weights).")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of random weights and tokens.")
@device_option
@click.option(
    "--dtype",
    default="auto",
    type=click.Choice(DTYPES),
    help="Of the weights; auto is the stored one (random: bfloat16) on a GPU, float32 on a CPU.",
)
@trust_option
@json_option
def command(
    model: str | None,
    random: str | None,
    sparsities: tuple[float, ...],
    bits: str,
    group_size: str,
    kernel_only: bool,
    seed: int,
    device: str,
    dtype: str,
    as_json: bool,
    **timing: Any,
) -> None:
    """Time decoding, dense against sparse, in one process.

    DIR_OR_MODEL is a calibrated checkpoint, or a plain model whose thresholds are then fitted to the tokens that are run.
    The weights of both models are the same but for --bits; measurements of the two take turns, medians and quartiles are shown.

    \b
    Examples:
      wina-calib bench demo-sparse --sparsity 0.4
      wina-calib bench --random llama-3-8b --device cuda
      wina-calib bench --random llama-2-7b --kernel-only
      wina-calib bench --random qwen2.5-1.5b --bits 4 --dtype bfloat16 --sparsity 0,0.25,0.4
    """
    name = random or model
    if kernel_only and name is None:
        raise UsageError("give a model, or --random CONFIG for the shapes of a config.")
    load_libraries()
    import torch

    from wina_calib.common.devices import pick_device, pick_dtype
    from wina_calib.studies.bench import bench, products

    if kernel_only and name is not None:
        place = pick_device(device)
        weights = pick_dtype(dtype, torch.bfloat16, place)
        alone = products(name, sparsities=sparsities, device=place, dtype=weights, seed=seed)
        emit(alone.to_dict(), alone.render(), as_json=as_json)
        return
    with bars() as progress:
        result = bench(
            model,
            random=random,
            sparsities=sparsities,
            device=device,
            dtype=dtype,
            bits=int(bits),
            group_size=int(group_size),
            seed=seed,
            progress=progress,
            **timing,
        )
    emit(result.to_dict(), result.render(), as_json=as_json)
