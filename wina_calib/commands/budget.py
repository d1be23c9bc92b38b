"""`wina-calib budget`."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import (
    Share,
    device_option,
    dtype_option,
    json_option,
    overwrite_option,
    revision_option,
    trust_option,
)
from wina_calib.commands.output import bars, check_files, emit, note
from wina_calib.common.atomic import write_file
from wina_calib.common.printable import printable, unfiltered
from wina_calib.common.progress import Progress
from wina_calib.common.text import percent, table
from wina_calib.errors import BudgetError, UsageError, WinaError

if TYPE_CHECKING:
    from wina_calib.budgets import Budget, Target
    from wina_calib.budgets.target import TargetKind
    from wina_calib.calibration.rebudget import Choice, Measure


@click.command("budget")
@click.argument("checkpoint", metavar="DIR")
@click.option("--budget", "file", metavar="FILE", help="Start from a budget file instead of the stored budget.")
@click.option("--sparsity", "-s", type=Share(), metavar="S", help="Target: model sparsity.")
@click.option(
    "--read-fraction", type=Share(), metavar="F", help="Target: bytes read over the dense model's, lm_head in."
)
@click.option(
    "--bits-read",
    type=click.FloatRange(0, min_open=True),
    metavar="B",
    help="Target: bits of decoder weights read for a token, over their number: 8 is 50% of 16 bits.",
)
@click.option(
    "--max-ppl-rise",
    type=Share(),
    metavar="P",
    help="Target: most sparsity with this predicted rise, as 3%; of quantized weights, over them at sparsity 0.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="PATTERN=S", help="Set and pin cells: layers.0-3.*=0.2, or =+0.1."
)
@click.option("--freeze", multiple=True, metavar="PATTERN", help="Pin cells at what they have.")
@click.option("--min", "lowest", multiple=True, metavar="[PATTERN=]S", help="Lowest sparsity of free cells.")
@click.option("--max", "highest", multiple=True, metavar="[PATTERN=]S", help="Highest sparsity of free cells.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the budget: .yaml or .json."
)
@click.option("--apply", "target", metavar="DIR", help="Put the budget into this checkpoint; weights stay untouched.")
@click.option("--refit", is_flag=True, help="With --apply: fit thresholds anew, in closed loop on the recorded text.")
@click.option(
    "--curve",
    is_flag=False,
    flag_value="frontier.csv",
    metavar="[FILE]",
    help="Print the frontier of sparsity and quality and save it (.csv or .json; frontier.csv if no file is named).",
)
@click.option("--measure", is_flag=True, help="With --curve: measure perplexity too.")
@click.option(
    "--data", multiple=True, metavar="SPEC", help="Text for --measure (held-out) or --refit (the recorded one)."
)
@click.option("--tokens", default=16_384, show_default=True, metavar="N", help="Tokens for --measure.")
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="Write an interactive page; needs no network."
)
@overwrite_option
@device_option
@dtype_option
@revision_option
@trust_option
@json_option
def command(
    checkpoint: str,
    file: str | None,
    sparsity: float | None,
    read_fraction: float | None,
    bits_read: float | None,
    max_ppl_rise: float | None,
    settings: tuple[str, ...],
    freeze: tuple[str, ...],
    lowest: tuple[str, ...],
    highest: tuple[str, ...],
    output: Path | None,
    target: str | None,
    refit: bool,
    curve: str | None,
    measure: bool,
    data: tuple[str, ...],
    tokens: int,
    html: Path | None,
    overwrite: bool,
    device: str,
    dtype: str,
    revision: str | None,
    as_json: bool,
) -> None:
    """Show and choose how sparse every site of every layer is.

    DIR is a calibrated checkpoint. All that is needed here is in its wina.safetensors, so a checkpoint without weights,
    from `calibrate --weights reference`, will do; only --refit and --measure read weights. Cells are named
    layers.LAYER.SITE; in patterns LAYER may be a list or range, and * stands for all.

    \b
    Examples:
      wina-calib budget demo-sparse
      wina-calib budget demo-sparse --sparsity 0.6 --set "layers.0.*=0.3" -o budget.yaml
      wina-calib budget demo-sparse --max-ppl-rise 3% --apply demo-sparse
      wina-calib budget demo-sparse --html budget.html
    """
    outputs = [p for p in (output, html, Path(curve) if curve else None) if p is not None]
    _check_options(output, curve, refit=refit, measure=measure, target=target, data=data)
    check_files(outputs, overwrite=overwrite)
    wanted = _target(sparsity, read_fraction, bits_read, max_ppl_rise)
    load_libraries()
    from wina_calib.budgets import Setting, explicit, perplexity_rise, to_json, write_budget
    from wina_calib.budgets.count import model_key
    from wina_calib.calibration.apply_budget import Refit, apply
    from wina_calib.calibration.rebudget import Request, choose, frontier
    from wina_calib.checkpoint.card import write_card
    from wina_calib.checkpoint.reader import open_checkpoint
    from wina_calib.model.locate import resolve

    request = Request(
        file=file,
        target=wanted,
        settings=tuple(Setting.parse_option(text) for text in settings),
        frozen=freeze,
        lowest=lowest,
        highest=highest,
    )
    folder, _ = resolve(checkpoint, revision=revision)
    opened = open_checkpoint(folder)
    choice = choose(opened, request)
    page = _page(choice) if html is not None else ""
    destination = open_checkpoint(Path(target)) if target is not None else None
    unfitted = None if refit else (destination or opened).settings.unfitted(choice.sparsity)
    if unfitted is not None:
        note(f"warning: {unfitted}")
    shown = to_json(choice.cells, choice.budget, choice.curves, fixed=choice.fixed) | {"budget": choice.name}
    text = [_table(choice) + _against(choice) + _verdict(choice)]
    if choice.quantizing:
        shown["quantizing_perplexity_rise"] = perplexity_rise(choice.quantizing)
        shown["predicted_rise_over_original"] = choice.over_original(choice.totals.loss_rise)
    if curve is not None:
        with bars() as progress:
            if measure:
                progress.phase("measure", 10)
            each = _measure(choice, data, tokens, device, dtype, progress) if measure else None
            points = frontier(choice, 0.1 if measure else 0.05, each)
        shown["curve"] = points
        text.append(_points(points) + _against_points(choice))
    if destination is not None:
        with bars() as progress:
            how = Refit(data, device, dtype) if refit else None
            applied = apply(choice, destination, refit=how, progress=progress)
        shown["applied"] = str(destination.folder)
        text.append(f"{destination.folder}: set to {applied.sparsity:.2%} sparsity, budget {applied.budget}.")
        try:
            write_card(destination.folder)
        except WinaError as error:
            note(f"warning: the checkpoint is changed, its README.md is not: {error}")
    if output is not None:
        key, score = model_key(opened.architecture, choice.cells), opened.settings.score
        sums = choice.totals
        rise = (
            "" if sums.perplexity_rise is None else f", predicted perplexity {sums.perplexity_rise:+.2%}{_own(choice)}"
        )
        comment = f"Model sparsity {sums.model_sparsity:.4f}, read fraction {sums.read_fraction:.4f}{rise}."
        write_budget(output, explicit(choice.budget, choice.cells, key, choice.sparsity, score), [comment])
        text.append(f"{output}: budget written.")
    if html is not None:
        write_file(html, page.encode())
        text.append(f"{html}: page written; open it in a browser.")
    if curve is not None:
        write_file(Path(curve), _saved(points, Path(curve)).encode())
        text.append(f"{curve}: frontier written.")
    if destination is None and not outputs and request != Request():
        text.append("Nothing is changed: --apply DIR puts this budget into a checkpoint, -o FILE writes it.")
    emit(shown, "\n".join([text[0], *map(printable, text[1:])]), as_json=as_json, coloured=True)


def _check_options(
    output: Path | None,
    curve: str | None,
    *,
    refit: bool,
    measure: bool,
    target: str | None,
    data: tuple[str, ...],
) -> None:
    """Refuse what cannot be done before anything is."""
    if output is not None:
        from wina_calib.budgets.file import file_kind

        file_kind(output)
    if curve is not None and Path(curve).suffix not in (".csv", ".json"):
        raise UsageError(f"--curve {curve}: the file must end in .csv or .json.")
    if measure and curve is None:
        raise UsageError("--measure belongs to --curve; to measure one budget, apply it and run `wina-calib evaluate`.")
    if refit and target is None:
        raise UsageError("--refit belongs to --apply DIR.")
    if data and not (refit or measure):
        raise UsageError("--data is read by --measure and --refit only.")


def _target(
    sparsity: float | None, read_fraction: float | None, bits_read: float | None, rise: float | None
) -> Target | None:
    from wina_calib.budgets import Target

    values: dict[TargetKind, float | None] = {
        "sparsity": sparsity,
        "read_fraction": read_fraction,
        "bits_read": bits_read,
        "perplexity_rise": rise,
    }
    given = [Target(kind, value) for kind, value in values.items() if value is not None]
    if len(given) > 1:
        raise UsageError(
            "--sparsity, --read-fraction, --bits-read and --max-ppl-rise are one target: give one of them."
        )
    return given[0] if given else None


def _table(choice: Choice) -> str:
    from wina_calib.budgets import render_table, use_ascii, use_color

    stream = unfiltered(sys.stdout)
    return render_table(
        choice.cells,
        choice.budget,
        choice.curves,
        fixed=choice.fixed,
        color=use_color(stream),
        ascii_only=use_ascii(stream),
    )


def _own(choice: Choice) -> str:
    """What predictions are over, where that is not the original model."""
    name = choice.opened.settings.weights_name
    return "" if name is None else f" over its own {name} weights at sparsity 0"


def _against(choice: Choice) -> str:
    """For people, what the predictions of the table are over and what they are over the original model."""
    name, rise = choice.opened.settings.weights_name, choice.over_original(choice.totals.loss_rise)
    if name is None or choice.totals.loss_rise is None:
        return ""
    over = "" if rise is None else f"over the original model {rise:+.2%}, of which {name} alone {_alone(choice)}\n"
    return f"both rises are{_own(choice)}\n{over}"


def _verdict(choice: Choice) -> str:
    """Why `inspect` and the card may tell another rise of the same budget, where they do."""
    from wina_calib.budgets import perplexity_rise

    told, loss = choice.verdict_rise, choice.totals.loss_rise
    if told is None or loss is None:
        return ""
    own = perplexity_rise(loss + choice.quantizing)
    if percent(own) == percent(told):
        return ""
    anchors = ", ".join(percent(anchor, 0) for anchor in choice.opened.settings.fitted_anchors)
    return (
        f"inspect and the card tell {told:+.2%} here. Both hold to what was measured at {anchors}; between these, they go by "
        "that alone, and this by the curves of every site, which also tell of other budgets\n"
    )


def _against_points(choice: Choice) -> str:
    """The same for the frontier's figures."""
    if choice.opened.settings.weights_name is None or choice.totals.loss_rise is None:
        return ""
    told = (
        f"; quantizing alone cost {_alone(choice)} of perplexity over the original model" if choice.quantizing else ""
    )
    return f"\npredicted loss rise:{_own(choice)}{told}"


def _alone(choice: Choice) -> str:
    from wina_calib.budgets import perplexity_rise

    return f"{perplexity_rise(choice.quantizing):+.2%}"


def _page(choice: Choice) -> str:
    from wina_calib.budgets import render_page
    from wina_calib.budgets.count import model_key

    if choice.curves is None:
        raise BudgetError(
            f"{choice.opened.folder} has no loss curves, from which the page predicts. Calibrate with --budget global."
        )
    lower, upper = choice.bounds.at(0.0, strict=True)
    return render_page(
        choice.cells,
        choice.curves,
        choice.budget,
        model_key(choice.opened.architecture, choice.cells),
        score=choice.opened.settings.score,
        lower=lower,
        upper=upper,
        fixed=choice.fixed,
    )


def _measure(
    choice: Choice, data: tuple[str, ...], tokens: int, device: str, dtype: str, progress: Progress
) -> Measure:
    from wina_calib.common.devices import pick_device
    from wina_calib.studies.evaluate import evaluate_model, load_on

    opened = choice.opened.opened
    model = load_on(opened, pick_device(device), dtype)

    def measure(sparsity: float, budget: Budget) -> tuple[float, float, float]:
        evaluated = evaluate_model(model, opened, data, sparsity=sparsity, tokens=tokens, budget=budget.sparsities)
        progress.step(f"at {percent(sparsity, 0)}")
        return evaluated.sparse_ppl, evaluated.dense_ppl, evaluated.model_sparsity

    return measure


def _points(points: list[dict[str, float | None]]) -> str:
    heads = list(points[0])
    return table(
        [head.replace("_", " ") for head in heads],
        [["-" if p[head] is None else f"{p[head]:.4f}" for head in heads] for p in points],
    )


def _saved(points: list[dict[str, float | None]], path: Path) -> str:
    if path.suffix == ".json":
        return json.dumps(points, indent=2) + "\n"
    out = io.StringIO()
    writer = csv.DictWriter(out, list(points[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    return out.getvalue()
