"""Figures of a checkpoint, drawn with matplotlib (extra `plots`). The same data gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wina_calib.errors import UsageError

Floats = NDArray[np.float64]
_INK, _ACCENT, _SECOND = "#1f2933", "#1f5fa8", "#c2571a"


def available() -> bool:
    """Whether figures can be drawn here."""
    return find_spec("matplotlib") is not None


def require() -> None:
    """Raise UsageError where matplotlib is missing."""
    if not available():
        raise UsageError("figures need matplotlib. Install it: pip install 'wina-calib[plots]'.")


def heat_map(values: Floats, sites: Sequence[str], title: str) -> bytes:
    """Site values (layers, sites) in [0, 1] as a PNG of coloured cells with their numbers."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.imshow(values, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_xticks(range(len(sites)), sites)
        axes.set_yticks(range(0, len(values), max(1, len(values) // 16)))
        axes.set_ylabel("layer")
        axes.set_title(title)
        if len(values) <= 40:
            for (row, column), value in np.ndenumerate(values):
                colour = "white" if value > 0.6 else _INK
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(image, ax=axes, label="share of inputs dropped")

    return _png(draw, width=5.5, height=min(12.0, 1.6 + 0.24 * len(values)))


def lines(values: Floats, sites: Sequence[str], title: str, label: str) -> bytes:
    """Site values (layers, sites) as one line a site over the layers."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for column, site in enumerate(sites):
            axes.plot(range(len(values)), values[:, column], marker="o", markersize=3, label=site)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.legend(frameon=False)

    return _png(draw, width=6.5, height=3.6)


def densities(quantiles: Mapping[str, Floats], levels: Floats, thresholds: Mapping[str, float], title: str) -> bytes:
    """Score densities of a layer's mask groups, one panel each, with the threshold as a line.

    Quantiles (levels,) and thresholds are by group; below a threshold of zero nothing is dropped.
    """
    edges = np.linspace(0.0, 1.0, 41)

    def draw(figure: Any) -> None:
        columns = min(4, len(quantiles))
        grid = figure.subplots(-(-len(quantiles) // columns), columns, squeeze=False)
        for axes in grid.flat[len(quantiles) :]:
            axes.set_axis_off()
        for axes, (group, scores) in zip(grid.flat, quantiles.items(), strict=False):
            top = float(np.interp(0.98, levels, scores)) or 1.0
            share = np.diff(np.interp(edges * top, scores, levels))
            axes.bar(edges[:-1] * top, share, width=top / 40, align="edge", color=_ACCENT)
            if thresholds[group] >= 0:
                axes.axvline(thresholds[group], color=_SECOND, linewidth=1.5)
            dropped = float(np.interp(thresholds[group], scores, levels)) if thresholds[group] >= 0 else 0.0
            axes.set_title(f"{group}: {dropped:.0%} dropped", fontsize=9)
            axes.tick_params(labelsize=7)
            axes.set_yticks([])
        figure.suptitle(title)
        figure.supxlabel("score", fontsize=8)

    rows = -(-len(quantiles) // 4)
    return _png(draw, width=9.0, height=1.0 + 1.7 * rows)


def frontier(
    predicted: Sequence[tuple[float, float]], measured: Sequence[tuple[float, float]], dense: float, title: str
) -> bytes:
    """Perplexity over read fraction: (read fraction, perplexity) as predicted and as measured, and the dense model's.

    The axis ends at four times the dense model's perplexity, or above what was measured: what grows beyond would flatten
    the part that is of use.
    """
    highest = [ppl for _, ppl in measured] + [min(ppl, 4 * dense) for _, ppl in predicted]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        if predicted:
            axes.plot(*zip(*sorted(predicted), strict=True), color=_ACCENT, label="predicted")
        if measured:
            axes.plot(*zip(*measured, strict=True), marker="o", linestyle="", color=_SECOND, label="measured")
        axes.axhline(dense, color=_INK, linestyle="--", linewidth=1, label="dense")
        axes.set_xlabel("read fraction (lm_head included)")
        axes.set_ylabel("perplexity")
        axes.set_ylim(0.9 * dense, 1.05 * max(highest, default=dense) + 0.05 * dense)
        axes.set_title(title)
        axes.legend(frameon=False)

    return _png(draw, width=6.5, height=3.6)


def over_bits(lines: Mapping[str, Sequence[tuple[float, float]]], title: str) -> bytes:
    """Rise of perplexity over the bits of decoder weight read for a token: (bits, rise) by what is compared.

    The axis of rises ends at a half: what costs more is of no use.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (name, points) in enumerate(lines.items()):
            axes.plot(*zip(*sorted(points), strict=True), marker="osv^D"[number % 5], markersize=5, label=name)
        axes.set_xscale("log", base=2)
        ticks = (2, 3, 4, 6, 8, 12, 16)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("bits read a decoder weight")
        axes.set_ylabel("rise of perplexity over the dense model's")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_ylim(min(0.0, *(rise for points in lines.values() for _, rise in points)) - 0.01, 0.5)
        axes.grid(alpha=0.3)
        axes.set_title(title)
        axes.legend(frameon=False)

    return _png(draw, width=6.5, height=3.8)


def tradeoffs(
    panels: Mapping[tuple[str, str], Mapping[str, Sequence[tuple[float, float]]]],
    dense: Mapping[str, float],
    title: str,
    *,
    logarithmic: Collection[str] = (),
) -> bytes:
    """Figures of several methods over what they cost, a column for each cost and a row for each figure.

    Args:
        panels: labels (of the x axis, of the y axis) to (x, y) by method.
        dense: the dense model's value by y label, where there is one: that axis ends at four times it.
        title: of the figure.
        logarithmic: labels of y axes that are.
    """
    across, up = list(dict.fromkeys(x for x, _ in panels)), list(dict.fromkeys(y for _, y in panels))

    def draw(figure: Any) -> None:
        from matplotlib.ticker import LogLocator

        grid = figure.subplots(len(up), len(across), sharex="col", sharey="row", squeeze=False)
        for (x, y), methods in panels.items():
            axes = grid[up.index(y), across.index(x)]
            for number, (name, points) in enumerate(methods.items()):
                axes.plot(*zip(*points, strict=True), marker="osv^D"[number // 10 % 5], markersize=4, label=name)
            if y in dense:
                axes.axhline(dense[y], color=_INK, linestyle="--", linewidth=1)
                axes.set_ylim(0.97 * dense[y], 4 * dense[y])
            if y in logarithmic:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
        for axes, label in zip(grid[-1], across, strict=True):
            axes.set_xlabel(label)
        for axes, label in zip(grid[:, 0], up, strict=True):
            axes.set_ylabel(label)
        grid[0, -1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.suptitle(title)

    return _png(draw, width=5.0 * len(across), height=1.0 + 3.2 * len(up))


def _png(draw: Callable[[Any], None], *, width: float, height: float) -> bytes:
    """Run a drawing on a new figure and return it as PNG; no display and no global state is touched."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
