"""`wina-calib evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import (
    Share,
    device_option,
    dtype_option,
    heldout_option,
    json_option,
    revision_option,
    tokens_option,
    trust_option,
)
from wina_calib.commands.output import bars, emit, note
from wina_calib.common.text import fixed, give_or_take, percent, rise, table
from wina_calib.errors import UsageError

if TYPE_CHECKING:
    from wina_calib.studies.against import QuantizedRow
    from wina_calib.studies.evaluate import Evaluation


@click.command("evaluate")
@click.argument("checkpoint", metavar="DIR")
@heldout_option("--data")
@click.option("--sparsity", "-s", type=Share(), metavar="S", help="Model sparsity; the calibrated one by default.")
@tokens_option()
@click.option(
    "--against",
    metavar="FORMAT,...",
    help="Also measure the dense weights quantized alone, by GPTQ on the calibration text: int8, int4, int3, or in groups of 32 "
    "int4-32, int3-32.",
)
@click.option("--save", is_flag=True, help="Keep the result in DIR, for its model card and report.")
@click.option("--tasks", metavar="NAME,...", help="Run tasks of the lm-eval harness instead (extra lm-eval).")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Examples of each task; all by default.")
@click.option(
    "--include-path", type=click.Path(path_type=Path, exists=True), metavar="DIR", help="Folder of further task files."
)
@device_option
@dtype_option
@revision_option
@trust_option
@json_option
def command(
    checkpoint: str,
    data: tuple[str, ...],
    sparsity: float | None,
    tokens: int,
    against: str | None,
    save: bool,
    tasks: str | None,
    limit: int | None,
    include_path: Path | None,
    device: str,
    dtype: str,
    revision: str | None,
    as_json: bool,
) -> None:
    """Measure what sparsity costs in quality: DIR against itself at sparsity 0.

    \b
    Example:
      wina-calib evaluate demo-sparse --sparsity 0.4
    """
    if tasks is not None and save:
        raise UsageError("--save keeps perplexities; it does not go with --tasks.")
    if tasks is not None and against is not None:
        raise UsageError("--against compares perplexities; it does not go with --tasks.")
    load_libraries()
    if tasks is not None:
        from wina_calib.studies.lm_eval_tasks import evaluate_tasks, render_tasks

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        scores = evaluate_tasks(
            checkpoint,
            names,
            sparsity=sparsity,
            limit=limit,
            include_path=include_path,
            revision=revision,
            device=device,
            dtype=dtype,
        )
        emit({"tasks": [asdict(score) for score in scores]}, render_tasks(scores), as_json=as_json)
        return
    from wina_calib.checkpoint.card import write_card
    from wina_calib.checkpoint.card_metadata import CARD, split_card
    from wina_calib.checkpoint.evaluation_file import save_evaluation
    from wina_calib.checkpoint.reader import open_checkpoint
    from wina_calib.model.locate import resolve
    from wina_calib.studies.against import check_dense, check_names
    from wina_calib.studies.evaluate import evaluate

    formats = [name.strip() for name in (against or "").split(",") if name.strip()]
    check_names(formats)
    folder, commit = resolve(checkpoint, revision=revision)
    if save and commit is not None:
        raise UsageError("--save writes into the checkpoint's folder; give a local one, such as `hf download` makes.")
    if formats:
        check_dense(open_checkpoint(folder))
    if save and (folder / CARD).is_file():
        split_card(folder / CARD)  # what people wrote there may be no card: better said before the work
    with bars() as progress:
        result = evaluate(
            folder,
            data=data,
            sparsity=sparsity,
            tokens=tokens,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    for warning in result.warnings:
        note(f"warning: {warning}")
    if save:
        note(f"kept in {save_evaluation(folder, result.to_dict())}")
        write_card(folder)
    beside = _quantized(folder, formats, result, tokens, device, dtype) if formats else ()
    facts = result.to_dict() | ({"against": [asdict(row) for row in beside]} if formats else {})
    emit(facts, "\n\n".join([render(result), *([_against(beside, result)] if beside else [])]), as_json=as_json)


def _quantized(
    folder: Path, formats: list[str], result: Evaluation, tokens: int, device: str, dtype: str
) -> tuple[QuantizedRow, ...]:
    from wina_calib.checkpoint.reader import open_checkpoint
    from wina_calib.common.devices import pick_device
    from wina_calib.model.locate import load_tokenizer
    from wina_calib.studies.against import quantized_rows
    from wina_calib.studies.evaluate import evaluation_blocks

    opened = open_checkpoint(folder)
    blocks = evaluation_blocks(result.data, load_tokenizer(folder), tokens, opened.settings.seq_len)
    with bars() as progress:
        return quantized_rows(opened, formats, blocks, device=pick_device(device), dtype=dtype, progress=progress)


def _against(beside: tuple[QuantizedRow, ...], result: Evaluation) -> str:
    """Sparsity beside quantization, by the bits that are read."""
    rows = [["sparse", f"{result.bits_read:.2f}", fixed(result.sparse_ppl), rise(result.sparse_ppl, result.dense_ppl)]]
    rows += [[row.name, f"{row.bits_read:.2f}", fixed(row.ppl), rise(row.ppl, result.dense_ppl)] for row in beside]
    return table(["", "bits read", "perplexity", ""], rows)


def render(result: Evaluation) -> str:
    """An evaluation as text."""
    own = "dense" if result.weights is None else f"{result.weights}, 0 %"
    rows = [
        [
            "perplexity",
            fixed(result.dense_ppl),
            fixed(result.sparse_ppl),
            rise(result.sparse_ppl, result.dense_ppl) + give_or_take(result.rise_error or 0.0),
        ],
        [f"KL from {own} (nats/token)", "0.000", f"{result.kl:.3f}", ""],
        ["top-1 agreement", "100.0 %", percent(result.top1_agreement), ""],
        ["model sparsity", "0.0 %", percent(result.model_sparsity), f"asked {percent(result.sparsity)}"],
        ["read fraction", "100.0 %", percent(result.read_fraction), "lm_head included"],
        ["read fraction, decoder", "100.0 %", percent(result.read_fraction_decoder), ""],
        ["bits read a decoder weight", f"{result.bits_stored:.2f}", f"{result.bits_read:.2f}", ""],
    ]
    if result.weights is not None:  # quantized: what it is at sparsity 0 is no dense model of 16 bits
        rows = [[name, "" if first == "100.0 %" and "read" in name else first, *rest] for name, first, *rest in rows]
    original = f"; original model's perplexity: {result.base_ppl:.3f}" if result.base_ppl_comparable else ""
    return (
        table(["", own, "sparse", ""], rows)
        + f"\n{result.tokens:,} tokens of {', '.join(result.data)}{original}"
        + _over_the_original(result)
    )


def _over_the_original(result: Evaluation) -> str:
    """Of a checkpoint with quantized weights, what is known of its rise over the original model."""
    if result.weights is None:
        return ""
    if result.base_ppl_comparable:
        return f"\nrise over the original model: {rise(result.sparse_ppl, result.base_ppl)}"
    told = f"\nrises are over its own {result.weights} weights at sparsity 0"
    if result.quantizing_rise is None:
        return f"{told}, not over the original model"
    cost = f"{100 * result.quantizing_rise:+.1f} %"
    return f"{told}; quantizing alone cost {cost} over the original model, on calibration's held-out text"
