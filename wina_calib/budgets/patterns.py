"""Naming cells: `layers.0-3.*`, `layers.*.mlp_out`, and setting them: `layers.5.attn_in=0.4`, `...=+0.1`."""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from wina_calib.budgets.model import Budget, Cells, Floats
from wina_calib.errors import BudgetError

_NUMBER = re.compile(r"[+-]?([0-9]{1,40}(\.[0-9]{0,400})?|\.[0-9]{1,400})([eE][+-]?[0-9]{1,3})?")
_LAYERS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def shown(text: str) -> str:
    """A user's text for a message: quoted, printable, at most 60 characters."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def parse_number(text: str) -> float:
    """A finite decimal number, or a percentage: `0.45` or `45%`.

    Raises:
        BudgetError: anything else, infinities and NaN included.
    """
    plain = text.removesuffix("%").rstrip()
    value = float(plain) if _NUMBER.fullmatch(plain) else math.nan
    if not math.isfinite(value):
        raise BudgetError(f"{shown(text)} is not a number: write a decimal like 0.45, or 45%")
    return value / 100 if text.endswith("%") else value


@dataclass(frozen=True)
class Setting:
    """A pattern and what its cells are set to."""

    pattern: str  # which cells, see `select`
    value: float  # the sparsity, or what is added to the present one
    relative: bool = False  # whether `value` is added. Written with a sign (`+0.1`, `-5%`).

    @classmethod
    def parse(cls, pattern: str, value: str) -> "Setting":
        """From the two texts of a file's line.

        Raises:
            BudgetError: the value is not a number.
        """
        text = value.strip()
        return cls(pattern.strip(), parse_number(text), relative=text[:1] in ("+", "-"))

    @classmethod
    def parse_option(cls, text: str) -> "Setting":
        """From `PATTERN=VALUE`, as `--set` takes it.

        Raises:
            BudgetError: there is no `=`, or the value is not a number.
        """
        pattern, equals, value = text.partition("=")
        if not equals:
            raise BudgetError(f"{shown(text)}: expected PATTERN=VALUE, for example layers.0-3.*=0.2")
        return cls.parse(pattern, value)


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word[:60], known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"


def _select_layers(pattern: str, part: str, layers: int) -> set[int]:
    if part == "*":
        return set(range(layers))
    numbers: set[int] = set()
    for item in part.split(","):
        match = _LAYERS.fullmatch(item)
        if not match:
            raise BudgetError(f"{shown(pattern)}: {shown(item)} is no layer: write 5, 0-3, 0,2,7-9 or *")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if first > last:
            raise BudgetError(f"{shown(pattern)}: the layers {item} run backwards, write {last}-{first}")
        if last >= layers:
            raise BudgetError(f"{shown(pattern)}: there is no layer {last}, the model has layers 0-{layers - 1}")
        numbers.update(range(first, last + 1))
    return numbers


def _select_sites(pattern: str, part: str, sites: Sequence[str]) -> set[int]:
    columns: set[int] = set()
    for item in part.split(","):
        # Brackets and question marks are no part of the grammar; as literals they match no site and are refused.
        plain = re.fullmatch(r"[a-z0-9_*]+", item)
        matched = {index for index, name in enumerate(sites) if plain and fnmatchcase(name, item)}
        if not matched:
            raise BudgetError(f"{shown(pattern)}: no site {shown(item)}; {_nearest(item, sites)}")
        columns |= matched
    return columns


def select(pattern: str, cells: Cells) -> NDArray[np.bool_]:
    """The cells that a pattern names.

    Args:
        pattern: `layers.LAYERS.SITES`. LAYERS is `*`, or a comma list of numbers and ranges (`0,2,7-9`, ends included).
            SITES is a comma list of site names, in which `*` stands for any characters. `*` alone names all cells.
        cells: the model.

    Returns:
        (layers, sites) bool, at least one True.

    Raises:
        BudgetError: the pattern does not parse or matches nothing; the message names the nearest known names.
    """
    parts = ["layers", "*", "*"] if pattern == "*" else pattern.split(".")
    if parts[0] != "layers":
        near = difflib.get_close_matches(pattern[:60], cells.names()[:400], n=2) or ["layers.0-3.*"]
        raise BudgetError(f"{shown(pattern)} names no cell: write layers.LAYERS.SITES, such as {' or '.join(near)}")
    if len(parts) != 3:
        raise BudgetError(f"{shown(pattern)} has {len(parts)} parts, a pattern has three: layers.LAYERS.SITES")
    layers = _select_layers(pattern, parts[1], cells.layers)
    sites = _select_sites(pattern, parts[2], cells.sites)
    chosen = np.zeros(cells.weights.shape, dtype=np.bool_)
    chosen[np.ix_(sorted(layers), sorted(sites))] = True
    return chosen


def apply_settings(base: Floats, settings: Iterable[Setting], cells: Cells) -> Floats:
    """Settings applied one after the other: a later one sees, and wins over, what earlier ones made.

    Args:
        base: (layers, sites) sparsities to start from.
        settings: what to change.
        cells: the model.

    Returns:
        (layers, sites), all in [0, 1).

    Raises:
        BudgetError: a pattern matches nothing, or a cell ends outside [0, 1).
    """
    values = np.array(base, dtype=np.float64)
    for setting in settings:
        chosen = select(setting.pattern, cells)
        values[chosen] = values[chosen] + setting.value if setting.relative else setting.value
        outside = np.argwhere(chosen & ~((values >= 0) & (values < 1)))
        if len(outside):
            layer, site = (int(i) for i in outside[0])
            raise BudgetError(
                f"{cells.name(layer, site)}: {shown(setting.pattern)} makes its sparsity {values[layer, site]:.6g},"
                " which is outside [0, 1)"
            )
    return values


def fixed_cells(base: Budget, cells: Cells, settings: Sequence[Setting] = (), frozen: Sequence[str] = ()) -> Floats:
    """What a solver must keep: cells that settings set and cells frozen at what they have.

    Args:
        base: the budget before; relative settings and frozen cells start from it.
        cells: the model.
        settings: cells to set and pin.
        frozen: patterns of cells to pin at their value in `base`; a setting of the same cell wins.

    Returns:
        (layers, sites) with NaN where a cell is free, as `solve_global` takes it.

    Raises:
        BudgetError: as `apply_settings`.
    """
    values = apply_settings(base.sparsities, settings, cells)
    pinned = np.zeros(cells.weights.shape, dtype=np.bool_)
    for pattern in [*(setting.pattern for setting in settings), *frozen]:
        pinned |= select(pattern, cells)
    return np.where(pinned, values, np.nan)
