"""The paper's error bounds (arXiv 2505.19427v2, section 3.3 and 3.4): its lemma, its theorem, and its synthetic experiment.

Dropping inputs d = x * (1 - m) costs `||W d||^2 = sum_j d_j^2 c_j^2 + sum_{i != j} d_i d_j W_i . W_j`. With orthogonal columns
the second sum, the cross term, is 0 (Lemma 3.1), and keeping the largest `|x_j| c_j` is the best of all masks of its size.
Without, it is not: `counterexample` finds where it fails.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from wina_calib.common.text import percent, table
from wina_calib.errors import UsageError
from wina_calib.masks.mask import keep_top
from wina_calib.studies.defaults import SYNTHETIC_DEPTH, SYNTHETIC_SEEDS, SYNTHETIC_WIDTH
from wina_calib.transforms.eigen import eigenvectors, gram

SPARSITIES = (0.25, 0.4, 0.5, 0.65)
LEMMA, THEOREM = "lemma 3.1", "theorem 3.2"
METHODS = ("teal", "wina")
# Mean errors of the paper's Table 2, in the order of SPARSITIES.
PAPER = {
    (LEMMA, "teal"): (1.68, 3.41, 4.86, 7.55),
    (LEMMA, "wina"): (0.70, 1.73, 2.70, 4.75),
    (THEOREM, "teal"): (0.73, 1.44, 2.04, 3.02),
    (THEOREM, "wina"): (0.38, 0.76, 1.09, 1.76),
}
_SMALL = 7  # columns of the matrices whose masks are all tried
_TIE = 1e-9


def measured_error(weight: Tensor, dropped: Tensor) -> Tensor:
    """Squared output error `||W d||^2` of dropped inputs: weight (out, in), dropped (..., in) -> (...)."""
    return torch.nn.functional.linear(dropped, weight).square().sum(-1)


def theoretical_error(norms: Tensor, dropped: Tensor) -> Tensor:
    """Lemma 3.1: `sum_j d_j^2 c_j^2`, the squared output error if columns are orthogonal.

    Args:
        norms: (in,) column norms.
        dropped: (..., in) what the mask took away, `x * (1 - m)`.

    Returns:
        (...) squared errors. What `measured_error` has more or less than this is the cross term.
    """
    return (dropped * norms).square().sum(-1)


def accumulated_bound(inherited: float, own: float) -> float:
    """Theorem 3.2, one step: bound on the squared error of a layer whose input is in error already.

    The error is u + v, with u what the layer makes of its input's error and v what its own mask adds, so that
    `||u + v||^2 <= (1 + a) ||u||^2 + (1 + 1/a) ||v||^2` for every a > 0. The best a gives `(||u|| + ||v||)^2`. It holds for
    sums over tokens as well as for one.

    Args:
        inherited: `||u||^2`.
        own: `||v||^2`; the theorem takes Lemma 3.1's value for it, which is exact where columns are orthogonal.
    """
    return (math.sqrt(inherited) + math.sqrt(own)) ** 2


def orthogonal_columns(weight: Tensor) -> Tensor:
    """Rotate a weight (out, in) by its right singular vectors, `W V`, float64: its columns become orthogonal."""
    return weight.double() @ eigenvectors(gram([weight], None, weight.device))


def column_lengths(weight: Tensor) -> Tensor:
    """Column norms (in,) in float64."""
    return weight.double().square().sum(0).sqrt()


@dataclass(frozen=True)
class Setting:
    """The synthetic experiment. The paper gives the initialisation, the transform and the seeds, but neither sizes nor depth.

    Weights are square, from a Kaiming normal distribution (variance 2 / width), and get orthogonal columns by `W V`; inputs
    are standard normal. Errors are L2 norms of the output's deviation. They grow with the root of the width, so compare the
    ratio of two methods with the paper's, not the errors.
    """

    width: int = SYNTHETIC_WIDTH  # inputs and outputs of every layer
    depth: int = SYNTHETIC_DEPTH  # linear layers of the network for Theorem 3.2; Lemma 3.1 has one
    inputs: int = 16  # input vectors a network, over which its error is averaged
    seeds: int = SYNTHETIC_SEEDS  # networks
    sparsities: tuple[float, ...] = SPARSITIES  # shares of inputs that every layer drops

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.inputs, self.seeds) < 1:
            raise UsageError("width, depth, inputs and seeds must be at least 1.")
        if not self.sparsities or not all(0.0 < s < 1.0 and self.drops(s) for s in self.sparsities):
            raise UsageError(
                f"sparsities are {self.sparsities}; expected shares of {self.width} inputs between 0 and 1."
            )

    def drops(self, sparsity: float) -> int:
        """Inputs that a layer drops."""
        return min(round(sparsity * self.width), self.width - 1)


@dataclass(frozen=True)
class Cell:
    """Error of one method at one sparsity: mean and standard deviation over the seeds, and the paper's mean or None."""

    theory: str
    method: str
    sparsity: float
    mean: float
    std: float
    paper: float | None


@dataclass(frozen=True)
class Optimality:
    """How often WINA's mask is the best of all masks of its size, on small random matrices."""

    columns: int  # inputs of the matrices
    cases: int  # matrix, input and number of kept inputs tried
    orthogonal: float  # share of cases in which WINA's mask is the best, with orthogonal columns
    random: float  # the same, with columns as they come


@dataclass(frozen=True)
class Counterexample:
    """A matrix without orthogonal columns on which WINA's mask is not the best."""

    weight: tuple[tuple[float, ...], ...]  # rows of W
    x: tuple[float, ...]  # input
    kept_by_wina: int  # index of the one input that WINA keeps
    best: int  # index of the one input that is best to keep
    wina_error: float  # squared output error of WINA's mask
    best_error: float  # squared output error of the best mask


@dataclass(frozen=True)
class SyntheticResult:
    """The synthetic experiment's outcome."""

    setting: Setting
    cells: tuple[Cell, ...]
    optimality: Optimality
    counterexample: Counterexample

    @property
    def wina_below_teal(self) -> bool:
        """Whether WINA's mean error is the smaller one in every cell."""
        means = {(c.theory, c.method, c.sparsity): c.mean for c in self.cells}
        return all(means[t, "wina", s] < mean for (t, method, s), mean in means.items() if method == "teal")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"wina_below_teal": self.wina_below_teal}


def synthetic(setting: Setting | None = None) -> SyntheticResult:
    """Repeat the paper's Table 2 for WINA and TEAL, and try all masks of small matrices."""
    chosen = setting or Setting()
    errors = {
        (theory, m): torch.zeros(chosen.seeds, len(chosen.sparsities)) for theory in (LEMMA, THEOREM) for m in METHODS
    }
    for seed in range(chosen.seeds):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(chosen.inputs, chosen.width, generator=generator, dtype=torch.float64)
        shape, deviation = (chosen.width, chosen.width), math.sqrt(2.0 / chosen.width)
        network = [
            orthogonal_columns(torch.randn(shape, generator=generator, dtype=torch.float64) * deviation)
            for _ in range(chosen.depth)
        ]
        for theory, layers in ((LEMMA, network[:1]), (THEOREM, network)):
            for method, (i, s) in itertools.product(METHODS, enumerate(chosen.sparsities)):
                errors[theory, method][seed, i] = network_error(layers, x, method, chosen.width - chosen.drops(s))
    cells = tuple(
        Cell(
            theory, method, s, float(mean), float(std), dict(zip(SPARSITIES, PAPER[theory, method], strict=True)).get(s)
        )
        for (theory, method), by_seed in errors.items()
        for s, mean, std in zip(chosen.sparsities, by_seed.mean(0), by_seed.std(0, correction=0), strict=True)
    )
    return SyntheticResult(chosen, cells, optimality(), counterexample())


def network_error(layers: Sequence[Tensor], x: Tensor, method: str, keep: int) -> float:
    """Mean L2 deviation of a linear network's output when every layer keeps the `keep` best inputs of each row.

    Args:
        layers: weights (out, in), first layer first.
        x: (rows, in).
        method: `wina` scores by `|x| c`, `teal` by `|x|`.
        keep: inputs kept by every layer.
    """
    dense = sparse = x
    for weight in layers:
        score = sparse.abs() * column_lengths(weight) if method == "wina" else sparse.abs()
        dense, sparse = dense @ weight.T, (sparse * keep_top(score, keep)) @ weight.T
    return float((dense - sparse).norm(dim=-1).mean())


def optimality(*, matrices: int = 100, columns: int = _SMALL, seed: int = 0) -> Optimality:
    """Compare WINA's mask with every mask of its size on random square matrices, as they come and with orthogonal columns."""
    generator = torch.Generator().manual_seed(seed)
    best = {"orthogonal": 0, "random": 0}
    for _ in range(matrices):
        weight = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
        x = torch.randn(columns, generator=generator, dtype=torch.float64)
        for name, w in (("orthogonal", orthogonal_columns(weight)), ("random", weight)):
            for keep in range(1, columns):
                wina, smallest = wina_error(w, x, keep), best_mask(w, x, keep)[1]
                best[name] += wina <= smallest * (1 + _TIE) + _TIE
    cases = matrices * (columns - 1)
    return Optimality(columns, cases, best["orthogonal"] / cases, best["random"] / cases)


def wina_error(weight: Tensor, x: Tensor, keep: int) -> float:
    """Squared output error when WINA keeps `keep` inputs of x (in,)."""
    mask = keep_top(x.abs() * column_lengths(weight), keep)
    return float(measured_error(weight, x * ~mask))


def best_mask(weight: Tensor, x: Tensor, keep: int) -> tuple[tuple[int, ...], float]:
    """Try all masks that keep `keep` inputs of x (in,); return the indices kept by the best, and its squared output error."""
    choices = list(itertools.combinations(range(len(x)), keep))
    masks = torch.zeros(len(choices), len(x), dtype=torch.bool).scatter_(1, torch.tensor(choices), True)
    errors = measured_error(weight, x * ~masks)
    first = int(errors.argmin())
    return choices[first], float(errors[first])


def counterexample(*, columns: int = 3, seed: int = 0) -> Counterexample:
    """Search small integer matrices for one on which WINA keeps the wrong input, by scores that are not tied."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        weight = torch.randint(-2, 3, (columns, columns), generator=generator).double()
        x = torch.randint(1, 4, (columns,), generator=generator).double()
        score = x * column_lengths(weight)
        first, second = score.topk(2).values.tolist()
        (best,), error = best_mask(weight, x, 1)
        wina = wina_error(weight, x, 1)
        if first > second + 0.5 and wina > error + 0.5:
            rows = tuple(map(tuple, weight.tolist()))
            return Counterexample(rows, tuple(x.tolist()), int(score.argmax()), best, wina, error)


def render_synthetic(result: SyntheticResult) -> str:
    """The synthetic experiment as text."""
    setting, means = result.setting, {(c.theory, c.method, c.sparsity): c for c in result.cells}
    rows = []
    for (theory, method, s), wina in means.items():
        if method != "wina":
            continue
        teal = means[theory, "teal", s]
        paper = f"{wina.paper / teal.paper:.2f}" if wina.paper and teal.paper else "-"
        errors = [f"{c.mean:.2f} ± {c.std:.2f}" for c in (teal, wina)]
        rows.append([theory, f"{100 * s:g} %", *errors, f"{wina.mean / teal.mean:.2f}", paper])
    example, small = result.counterexample, result.optimality
    return "\n".join(
        [
            f"Linear networks of {setting.width} x {setting.width} with orthogonal columns, {setting.depth} layers for the "
            f"theorem, {setting.seeds} seeds, {setting.inputs} inputs each.",
            "L2 error of the output, mean and deviation over seeds. Sizes are ours (the paper gives none): compare the ratios.",
            "",
            table(["", "sparsity", "TEAL", "WINA", "WINA / TEAL", "paper's ratio"], rows),
            "",
            f"WINA below TEAL in every cell: {'yes' if result.wina_below_teal else 'no'}",
            f"WINA's mask best of all masks of its size, {small.columns} columns, {small.cases} cases: "
            f"{percent(small.orthogonal)} with orthogonal columns, {percent(small.random)} without",
            f"counterexample without: W = {_whole(example.weight)}, x = {_whole(example.x)}, keep one: WINA keeps "
            f"x[{example.kept_by_wina}] with error {example.wina_error:g}, best is x[{example.best}] with "
            f"{example.best_error:g}",
        ]
    )


def _whole(values: Sequence[Any]) -> str:
    return "[" + ", ".join(_whole(v) if isinstance(v, tuple) else f"{v:g}" for v in values) + "]"
