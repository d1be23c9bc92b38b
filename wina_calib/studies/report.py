"""A report on a checkpoint: figures as PNG and one HTML page that holds them all and needs no network."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wina_calib.budgets import Budget, Curves
from wina_calib.calibration.scale_curves import stored_curves
from wina_calib.checkpoint.evaluation_file import read_evaluation
from wina_calib.checkpoint.facts import REBUDGETED
from wina_calib.checkpoint.format import stored_cells
from wina_calib.checkpoint.local_paths import published, published_facts
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.checkpoint.verdict import HELD_OUT, HeldOut
from wina_calib.common import plots
from wina_calib.common.atomic import check_output, output_folder
from wina_calib.common.text import percent
from wina_calib.masks.thresholds import LEVELS
from wina_calib.model.architecture import SITES
from wina_calib.studies.answers import Answer, answers

PAGE = "index.html"
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2933}"
    "img{max-width:100%;height:auto}figure{margin:1.5rem 0}figcaption{color:#52606d}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}"
    "th{font-weight:600;min-width:9rem}"
    "td:last-child{overflow-wrap:anywhere}"
)


@dataclass(frozen=True)
class Figure:
    """A picture: its file name, a line of explanation, its PNG bytes."""

    file: str
    caption: str
    png: bytes


def write_report(checkpoint: Path, output: Path, *, overwrite: bool = False) -> Path:
    """Draw a checkpoint's report.

    Returns:
        The page.

    Raises:
        UsageError: matplotlib is missing.
        CheckpointError: the checkpoint is damaged.
        OutputError: the folder exists or cannot be written.
    """
    plots.require()
    check_output(output, overwrite=overwrite, made=("index.html",))
    opened = open_checkpoint(checkpoint)
    with output_folder(output, overwrite=overwrite) as target:
        figures = tuple(draw(opened))
        for figure in figures:
            (target / figure.file).write_bytes(figure.png)
        (target / PAGE).write_text(page(opened, figures), "utf-8")
    return output / PAGE


def draw(opened: Checkpoint) -> Iterator[Figure]:
    """All figures of a checkpoint: budget, quality, fit, and each layer's scores."""
    settings, arch = opened.settings, opened.architecture
    sparsities = opened.sparsities(settings.sparsity)
    title = f"site sparsity at model sparsity {settings.sparsity:g}"
    yield Figure("budget.png", "Share of inputs that each site drops.", plots.heat_map(sparsities, SITES, title))
    frontier = _frontier(opened)
    if frontier is not None:
        yield frontier
    anchor = int(np.argmin([abs(anchor - settings.sparsity) for anchor in settings.anchors]))  # the nearest one
    errors = np.array([[float(opened.site(a, b).error[anchor]) for b in a.sites] for a in arch.layers])
    at = settings.anchors[anchor]
    caption = (
        "Error of each site's output when its masked inputs are left out, relative to its dense output, at "
        f"{'the fitted' if at in settings.fitted_anchors else 'an interpolated'} sparsity {percent(at)}."
    )
    yield Figure("error.png", caption, plots.lines(errors, SITES, "output error by site", "relative error"))
    levels = LEVELS.numpy()
    for layer in arch.layers:
        quantiles: dict[str, NDArray[np.float64]] = {}
        thresholds: dict[str, float] = {}
        for site in layer.sites:
            stored = opened.site(layer, site)
            for name, scores in stored.tables.items():
                key = site.name if len(stored.tables) == 1 else f"{site.name}.{name}"
                quantiles[key] = scores[anchor].double().numpy()
                thresholds[key] = float(stored.thresholds[name])
        png = plots.densities(quantiles, levels, thresholds, f"layer {layer.index}: scores and thresholds")
        caption = f"Layer {layer.index}: how the scores of inputs spread; below the line they are dropped."
        yield Figure(f"scores-{layer.index:03d}.png", caption, png)


def predicted_rise(opened: Checkpoint, curves: Curves | None, model_sparsity: float) -> float | None:
    """Predicted rise of the loss (nats/token) at a model sparsity; None without curves."""
    return None if curves is None else Budget(opened.sparsities(model_sparsity)).predicted_loss(curves)


def _frontier(opened: Checkpoint) -> Figure | None:
    """Perplexity over read fraction: predicted where curves are stored, and as measured."""
    settings = opened.settings
    cells = stored_cells(opened.architecture, settings)
    measured = read_evaluation(opened.folder)
    dense = float(measured["dense_ppl"]) if measured else float(settings.provenance.get("base_ppl", float("nan")))
    held = HeldOut.from_dict(settings.provenance.get(HELD_OUT))
    # The curves start at sparsity 0, where quantizing has cost something already.
    if measured is None and held is not None:
        dense *= 1 + held.base_rise
    predicted: list[tuple[float, float]] = []
    curves = stored_curves(opened)
    for sparsity in np.linspace(0.0, settings.anchors[-1], 14):
        rise = predicted_rise(opened, curves, float(sparsity))
        if rise is not None and np.isfinite(dense):
            predicted.append((cells.read_fraction_at(opened.dropped(float(sparsity))), dense * float(np.exp(rise))))
    points = [(float(measured["read_fraction"]), float(measured["sparse_ppl"]))] if measured else []
    if not predicted and not points:
        return None
    caption = (
        "Perplexity over the share of bytes read for a token: the line is predicted by calibration, the dot measured. Drawn up "
        "to four times the dense model's."
    )
    return Figure("frontier.png", caption, plots.frontier(predicted, points, dense, "quality over read fraction"))


def page(opened: Checkpoint, figures: tuple[Figure, ...]) -> str:
    """The page, pictures within. Nothing of it runs, and no text of the checkpoint becomes markup."""
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in _facts(opened))
    asked = "".join(_answer(answer) for answer in answers(opened))
    shown = "".join(
        f'<figure><img alt="{escape(f.caption)}" src="data:image/png;base64,{base64.b64encode(f.png).decode()}">'
        f"<figcaption>{_text(f.caption)}</figcaption></figure>\n"
        for f in figures
    )
    name = escape(published(str(opened.settings.provenance.get("base_model", opened.folder.name))))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>Sparsity of {name}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>Sparsity of {name}</h1>\n{asked}<h2>How it was made</h2>\n<table>{rows}</table>\n{shown}</body></html>\n"
    )


def _answer(answer: Answer) -> str:
    heads = "".join(f"<th>{_text(header)}</th>" for header in answer.headers)
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in answer.rows)
    figures = f"<table><tr>{heads}</tr>{rows}</table>" if answer.rows else ""
    return f"<h2>{_text(answer.question)}</h2>\n<p>{_text(answer.says)}</p>\n{figures}\n"


def _text(value: str) -> str:
    """Text for the page; a number and its % stay on one line."""
    return escape(value).replace(" %", "&nbsp;%")


def _facts(opened: Checkpoint) -> list[tuple[str, str]]:
    settings, facts = opened.settings, opened.settings.provenance
    cells = stored_cells(opened.architecture, settings)
    rows: list[tuple[str, Any]] = [
        ("sparsity", f"{percent(settings.sparsity)}, fitted at {', '.join(map(percent, settings.fitted_anchors))}"),
        (
            "read fraction expected",
            f"{percent(cells.read_fraction_at(opened.dropped(settings.sparsity)))} with lm_head",
        ),
        ("transform", f"{settings.transform}, {cells.runtime_matrices:,} run-time weights"),
        ("score, masks, budget", f"{settings.score}, {settings.masks}, {settings.budget}"),
        ("data", ", ".join(map(published, facts.get("data", ())))),
        ("command", str(published_facts(facts).get("command", "unknown"))),
    ]
    later = facts.get(REBUDGETED)
    if later is not None:
        rows.append(("budget chosen later", f"{settings.budget} for {percent(settings.sparsity)}, thresholds {later}"))
    measured = read_evaluation(opened.folder)
    if measured is not None:
        own = "dense" if settings.weights_name is None else f"of its {settings.weights_name} weights at sparsity 0"
        text = f"{measured['dense_ppl']:.3f} {own}, {measured['sparse_ppl']:.3f} sparse at {percent(measured['model_sparsity'])}"
        rows.insert(2, ("perplexity", f"{text}, on {measured['tokens']:,} tokens of {', '.join(measured['data'])}"))
    return [(name, str(value)) for name, value in rows]
