"""A budget for people's eyes: a layer x site table with a bar and a shade for each cell, and the same as JSON."""

import os
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

from wina_calib.budgets.model import Budget, Cells, Curves, Floats, totals

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR = 6
# A ramp of the 256-colour palette, pale to deep blue; readable on light and dark backgrounds.
_RAMP = (153, 117, 81, 75, 39, 33, 27, 21)


def use_color(stream: IO[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream wants colour: a terminal that is not dumb, and NO_COLOR unset or empty."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def use_ascii(stream: IO[str]) -> bool:
    """Whether a stream's encoding lacks the block characters."""
    try:
        _EIGHTHS.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return True
    return False


def _bar(value: float, *, ascii_only: bool) -> str:
    if ascii_only:
        return ("#" * round(value * _BAR)).ljust(_BAR, ".")
    eighths = round(value * _BAR * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(_BAR, "·")


def _cell(value: float, pinned: bool, *, color: bool, ascii_only: bool) -> str:
    bar = _bar(value, ascii_only=ascii_only)
    if color:
        bar = f"\x1b[38;5;{_RAMP[min(int(value * len(_RAMP)), len(_RAMP) - 1)]}m{bar}\x1b[0m"
    return f"{value:5.3f}{'*' if pinned else ' '}{bar}"


def _percent(value: float) -> str:
    return f"{value:+.2%}" if value < 100 else f"x {value + 1:.3g}"


def render_table(
    cells: Cells,
    budget: Budget,
    curves: Curves | None = None,
    *,
    fixed: Floats | None = None,
    color: bool = False,
    ascii_only: bool = False,
) -> str:
    """The table and its totals.

    Args:
        cells: the model.
        budget: what to show.
        curves: for the predicted rises; without them the two lines are left out.
        fixed: (layers, sites), NaN where free; pinned cells carry a `*`.
        color: shade the bars with terminal colours.
        ascii_only: no characters outside ASCII.

    Returns:
        Lines ending in a newline, none with trailing blanks.
    """
    pinned = np.zeros(cells.weights.shape, dtype=bool) if fixed is None else ~np.isnan(fixed)
    summary = totals(cells, budget, curves)  # first, so that a budget of another shape is refused
    width, label = 6 + _BAR, max(len("layer"), len(str(cells.layers - 1)), len("mean"))
    gap = "  "
    head = [name.ljust(width) for name in cells.sites]
    lines = [f"{'layer':>{label}}{gap}{gap.join([*head, 'mean'])}"]

    def row(name: str, values: Floats, marks: np.ndarray, mean: float) -> str:
        shown = [
            _cell(float(v), bool(m), color=color, ascii_only=ascii_only) for v, m in zip(values, marks, strict=True)
        ]
        return f"{name:>{label}}{gap}{gap.join([*shown, f'{mean:5.3f}'])}"

    weights, values = cells.weights, budget.sparsities
    by_layer = (weights * values).sum(axis=1) / weights.sum(axis=1)
    by_site = (weights * values).sum(axis=0) / weights.sum(axis=0)
    lines += [row(str(i), values[i], pinned[i], float(by_layer[i])) for i in range(cells.layers)]
    lines.append(row("mean", by_site, np.zeros(len(cells.sites), dtype=bool), summary.model_sparsity))
    lines += ["", f"model sparsity          {summary.model_sparsity:.4f}"]
    lines.append(
        f"read fraction           {summary.read_fraction:.4f}  (decoder alone {summary.read_fraction_decoder:.4f})"
    )
    lines.append(f"decode speedup limit    {summary.speedup_limit:.2f}x")
    if summary.loss_rise is not None and summary.perplexity_rise is not None:
        lines.append(f"predicted loss rise     {summary.loss_rise:.4f} nats/token")
        lines.append(f"predicted perplexity    {_percent(summary.perplexity_rise)}")
    if pinned.any():
        lines.append(f"* pinned ({int(pinned.sum())} of {pinned.size} cells)")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def to_json(
    cells: Cells, budget: Budget, curves: Curves | None = None, *, fixed: Floats | None = None
) -> dict[str, Any]:
    """The same content for programs; the rises are null without curves."""
    summary = totals(cells, budget, curves)
    values = budget.sparsities.reshape(-1).tolist()
    pinned = [] if fixed is None else np.flatnonzero(~np.isnan(fixed)).tolist()
    names = cells.names()
    return {
        "cells": dict(zip(names, values, strict=True)),
        "pinned": [names[index] for index in pinned],
        "model_sparsity": summary.model_sparsity,
        "read_fraction": summary.read_fraction,
        "read_fraction_decoder": summary.read_fraction_decoder,
        "speedup_limit": summary.speedup_limit,
        "predicted_loss_rise": summary.loss_rise,
        "predicted_perplexity_rise": summary.perplexity_rise,
    }
