"""What a budget is: element counts, loss curves, sparsities, and the totals that follow from them."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wina_calib.errors import BudgetError

Floats = NDArray[np.float64]

_SITE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def _frozen(array: ArrayLike, dtype: type[np.generic]) -> NDArray[Any]:
    copy = np.array(array, dtype=dtype)
    copy.setflags(write=False)
    return copy


DENSE_BITS = 16.0


@dataclass(frozen=True, eq=False)
class Cells:
    """Element counts of everything that decoding one token reads; a cell is one (layer, site).

    Raises:
        BudgetError: shapes do not agree, or a count is not positive.
    """

    sites: tuple[str, ...]  # names of the sites, in column order
    weights: NDArray[np.int64]  # (layers, sites) int64, elements of the sparse weights of each cell, all positive
    other_decoder: int = 0  # elements of the decoder that are always read (norms, biases)
    lm_head: int = 0  # elements of the output head, always read
    # elements of matrices that a transform adds at run time; the dense model has none of them
    runtime_matrices: int = 0
    # of an element of the sparse weights on average, with its part of scales; the dense model's elements all have 16
    bits: float = DENSE_BITS
    head_bits: float = DENSE_BITS  # of an element of the output head
    # (layers, sites) the same of each cell, where some are stored otherwise than others
    site_bits: Floats | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _frozen(self.weights, np.int64))
        if self.weights.ndim != 2 or self.weights.shape[1] != len(self.sites) or not self.weights.size:
            raise BudgetError(
                f"weights has shape {self.weights.shape}, expected (layers, {len(self.sites)}) for sites {self.sites}"
            )
        bad_names = [name for name in self.sites if not _SITE_NAME.fullmatch(name)]
        if bad_names or len(set(self.sites)) != len(self.sites):
            raise BudgetError(f"site names must be distinct and match {_SITE_NAME.pattern}, found {self.sites}")
        if (self.weights <= 0).any() or min(self.other_decoder, self.lm_head, self.runtime_matrices) < 0:
            raise BudgetError("element counts of cells must be positive and the other counts not negative")
        if self.site_bits is not None:
            object.__setattr__(self, "site_bits", _frozen(self.site_bits, np.float64))
            object.__setattr__(self, "bits", float((self.weights * self.site_bits).sum() / self.sparse_total))

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.weights.shape[0])

    @property
    def sparse_total(self) -> int:
        """Elements of all sparse weights."""
        return int(self.weights.sum())

    def name(self, layer: int, site: int) -> str:
        """The cell's name in files and messages, `layers.3.attn_in`."""
        return f"layers.{layer}.{self.sites[site]}"

    def names(self) -> list[str]:
        """All cell names, layer by layer."""
        return [self.name(layer, site) for layer in range(self.layers) for site in range(len(self.sites))]

    def fingerprint(self) -> str:
        """Hash of the sparse weights' sizes: equal for models that a budget can be moved between."""
        text = json.dumps([list(self.sites), self.weights.tolist()], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def read_fraction_at(self, sparsity: ArrayLike, *, lm_head: bool = True) -> float:
        """Share of the dense model's bytes that decoding a token reads at a sparsity.

        Run-time matrices are counted as read, the denominator is the dense model, which has none.

        Args:
            sparsity: of the model, or (layers, sites) of each site. Where sites are stored in different numbers of bits, only
                the latter is exact: the former stands for the same sparsity everywhere.
            lm_head: whether the output head is counted on both sides.
        """
        head = self.lm_head if lm_head else 0
        read = self._read(sparsity) / DENSE_BITS + self._always(lm_head=lm_head)
        return read / (self.sparse_total + self.other_decoder + head)

    def bits_read_at(self, sparsity: ArrayLike) -> float:
        """Bits of the decoder's weights, run-time matrices included, that a token reads, over the number of sparse weights.

        `sparsity` is as for `read_fraction_at`.
        """
        return (self._read(sparsity) + DENSE_BITS * self.runtime_matrices) / self.sparse_total

    def sparsity_at(self, read_fraction: float) -> float:
        """Model sparsity that gives a read fraction (lm_head included); may lie outside [0, 1)."""
        read = read_fraction * (self.sparse_total + self.other_decoder + self.lm_head)
        return 1.0 - (read - self._always()) / (self.sparse_total * self.bits / DENSE_BITS)

    def sparsity_at_bits(self, bits_read: float) -> float:
        """Model sparsity that reads so many bits a weight, see `bits_read_at`; may lie outside [0, 1)."""
        return 1.0 - (bits_read * self.sparse_total - DENSE_BITS * self.runtime_matrices) / (
            self.sparse_total * self.bits
        )

    def _read(self, sparsity: ArrayLike) -> float:
        """Bits of the sparse weights that are read at a sparsity, as for `read_fraction_at`."""
        kept: Floats = 1.0 - np.asarray(sparsity, dtype=np.float64)
        if kept.ndim == 0:
            return self.sparse_total * self.bits * float(kept)
        return float((self.weights * (self.bits if self.site_bits is None else self.site_bits) * kept).sum())

    def _always(self, *, lm_head: bool = True) -> float:
        """What is read whatever is dropped, in elements of 16 bits."""
        head = self.lm_head * self.head_bits / DENSE_BITS if lm_head else 0.0
        return self.other_decoder + head + self.runtime_matrices


@dataclass(frozen=True, eq=False)
class Curves:
    """Predicted rise of the loss when one cell alone is made sparse.

    Raises:
        BudgetError: shapes do not agree, a value is not finite, or a curve does not start at 0.
    """

    levels: Floats  # (L,) site sparsities, ascending from 0, at most 1
    # (layers, sites, L) predicted loss rise in nats per token; 0 at level 0, never negative, convex or not
    loss: Floats
    # (n, 2) sums of cells' rises and the rises of the whole that go with them, positive, ascending; may be empty. It
    # changes predictions and no order between budgets.
    measured: Floats = field(default_factory=lambda: np.empty((0, 2)))

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", _frozen(self.levels, np.float64))
        object.__setattr__(self, "loss", _frozen(self.loss, np.float64))
        levels, loss = self.levels, self.loss
        if levels.ndim != 1 or levels.size < 2 or loss.ndim != 3 or loss.shape[2] != levels.size:
            raise BudgetError(
                f"curves need levels (L >= 2,) and loss (layers, sites, L), found {levels.shape} and {loss.shape}"
            )
        if not (np.isfinite(levels).all() and np.isfinite(loss).all()):
            raise BudgetError("curves hold a value that is not finite: repeat the pass that made them")
        if levels[0] != 0 or levels[-1] > 1 or (np.diff(levels) <= 1e-9).any():
            raise BudgetError(f"curve levels must ascend from 0 to at most 1, found {levels.tolist()}")
        if (loss[..., 0] != 0).any() or (loss < 0).any():
            raise BudgetError("a curve must be 0 at level 0 and nowhere negative")
        object.__setattr__(self, "measured", _frozen(self.measured, np.float64))
        known = self.measured
        if known.ndim != 2 or known.shape[1] != 2 or not (np.isfinite(known).all() and (known > 0).all()):
            raise BudgetError(f"measured rises must be positive pairs, found {known.tolist()!r:.80}")
        if (np.diff(known[:, 0]) <= 0).any() or (np.diff(known[:, 1]) < 0).any():
            raise BudgetError(f"measured rises must ascend, found {known.tolist()!r:.80}")

    def at(self, sparsities: ArrayLike) -> Floats:
        """Loss rise of each cell at its sparsity, linear between levels; past the last level the last slope goes on.

        Returns:
            (layers, sites) nats per token.
        """
        asked = np.asarray(sparsities, dtype=np.float64)
        if asked.shape != self.loss.shape[:2]:
            raise BudgetError(f"curves are for {self.loss.shape[:2]} (layers, sites), the budget has {asked.shape}")
        left = np.clip(np.searchsorted(self.levels, asked, side="right") - 1, 0, self.levels.size - 2)
        share = (asked - self.levels[left]) / (self.levels[left + 1] - self.levels[left])
        below = np.take_along_axis(self.loss, left[..., None], axis=2)[..., 0]
        above = np.take_along_axis(self.loss, left[..., None] + 1, axis=2)[..., 0]
        return np.maximum(below + share * (above - below), 0.0)

    def total(self, rise: float) -> float:
        """Loss rise of the whole for the sum of its cells' rises: through the measured pairs, in their logarithms.

        Below the first pair and above the last one the ratio of the two stays.
        """
        if not len(self.measured) or rise <= 0:
            return rise
        sums, wholes = np.log(self.measured).T
        return rise * math.exp(float(np.interp(math.log(rise), sums, wholes - sums)))

    def scaled(self, factor: float) -> "Curves":
        """The same curves times a factor, for a prediction that was measured at one sparsity."""
        if not (math.isfinite(factor) and factor > 0):
            raise BudgetError(f"the factor of the curves must be positive and finite, found {factor}")
        return Curves(self.levels, self.loss * factor)


def perplexity_rise(loss_rise: float) -> float:
    """Relative rise of perplexity, exp(loss) - 1, for a loss rise in nats per token."""
    return math.expm1(min(loss_rise, 700.0))  # expm1 overflows above 709; such a model is broken either way


@dataclass(frozen=True, eq=False)
class Budget:
    """One site sparsity for each (layer, site).

    Raises:
        BudgetError: a sparsity is outside [0, 1) or not finite; the message names layer and site column.
    """

    sparsities: Floats  # (layers, sites) float64, each in [0, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsities", _frozen(self.sparsities, np.float64))
        if self.sparsities.ndim != 2:
            raise BudgetError(f"a budget has shape (layers, sites), found {self.sparsities.shape}")
        outside = np.argwhere(~((self.sparsities >= 0) & (self.sparsities < 1)))
        if len(outside):
            layer, site = (int(i) for i in outside[0])
            found = self.sparsities[layer, site]
            raise BudgetError(f"layer {layer}, site {site}: sparsity {found} is outside [0, 1)")

    def model_sparsity(self, cells: Cells) -> float:
        """Weight-averaged site sparsity."""
        if self.sparsities.shape != cells.weights.shape:
            raise BudgetError(f"the budget has shape {self.sparsities.shape}, the model {cells.weights.shape}")
        return float((cells.weights * self.sparsities).sum() / cells.sparse_total)

    def read_fraction(self, cells: Cells) -> float:
        """Read share of the dense model, lm_head and run-time matrices included."""
        return cells.read_fraction_at(self._counted(cells))

    def read_fraction_decoder(self, cells: Cells) -> float:
        """Read share of the dense model's decoder layers, run-time matrices included."""
        return cells.read_fraction_at(self._counted(cells), lm_head=False)

    def _counted(self, cells: Cells) -> ArrayLike:
        """What the bytes read follow from: the model sparsity, unless sites differ in bits."""
        return self.model_sparsity(cells) if cells.site_bits is None else self.sparsities

    def speedup_limit(self, cells: Cells) -> float:
        """How many times faster than dense a batch-1 decode can be when only bytes count."""
        return 1.0 / self.read_fraction(cells)

    def predicted_loss(self, curves: Curves) -> float:
        """Predicted loss rise, nats per token."""
        return curves.total(float(curves.at(self.sparsities).sum()))


@dataclass(frozen=True)
class Totals:
    """What a budget costs and is predicted to do; the rises are None without curves."""

    model_sparsity: float
    read_fraction: float
    read_fraction_decoder: float
    speedup_limit: float
    loss_rise: float | None
    perplexity_rise: float | None


def totals(cells: Cells, budget: Budget, curves: Curves | None = None) -> Totals:
    """All totals of a budget."""
    loss = None if curves is None else budget.predicted_loss(curves)
    return Totals(
        model_sparsity=budget.model_sparsity(cells),
        read_fraction=budget.read_fraction(cells),
        read_fraction_decoder=budget.read_fraction_decoder(cells),
        speedup_limit=budget.speedup_limit(cells),
        loss_rise=loss,
        perplexity_rise=None if loss is None else perplexity_rise(loss),
    )
