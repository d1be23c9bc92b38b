"""Learn rotations that make the part of an input that a mask drops matter least.

For a site with weight W and input u, a mask at sparsity s in the basis R keeps the largest `abs(z_j) * c_j` of z = u R and
costs `||W R d||^2`, d being the dropped part of z. The rotation is found by descent on that cost itself, with the mask of
the moment held fixed in the gradient: the elements that a small step moves across the threshold have equal scores on
both sides and cancel. Sums over sites count each site's cost relative to the energy of its output.

All functions work on a batch of independent rotations (groups, d, d): one for the residual stream, one a key/value head
for heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wina_calib.common.devices import has_16_bit_products
from wina_calib.common.progress import SILENT, Progress

# Masked harder than usual sparsities: better there too than training at the sparsity itself.
SPARSITY = 0.75
HELD_OUT = 8
_BATCH = 512
_RATE = 0.15  # the first step's angle
_MOMENTUM = 0.9
# x -> a x + b x^3 + c x^5, twice, brings singular values from 0.1 to 1 between 0.7 and 1.2.
_QUINTIC: tuple[float | Tensor, ...] = 3.4445, -4.7750, 2.0315
_CHECKS = 8
_THRESHOLD_SAMPLE = 16384
_HELD_OUT_ROWS = 512


@dataclass(frozen=True)
class Problem:
    """What one site adds to the cost, with W^T W replaced by its largest part."""

    inputs: Tensor  # (groups, n, d) sampled inputs, every `HELD_OUT`-th row kept for checks
    factor: Tensor  # (groups, k, d) float32, W^T W is about factor^T factor + tail * I
    tail: Tensor  # (groups,) float32
    weight: Tensor  # (groups,) float32, the factor of its cost in the sum

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        return sum(t.nbytes for t in (self.inputs, self.factor, self.tail, self.weight))


def low_rank(
    times: Callable[[Tensor], Tensor], trace: float, width: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Factor a positive matrix G, given by its products, as factor^T factor + tail * I, by subspace iteration.

    Args:
        times: (width, k) -> G @ it, float32.
        trace: of G.
        width: of G.
        rank: k, at most `width`.
        generator: of the first subspace, on the CPU.

    Returns:
        factor (rank, width) and the scalar tail, on the device of the products.
    """
    basis = torch.randn(width, rank, generator=generator)
    for _ in range(3):
        basis = torch.linalg.qr(times(basis)).Q
    values, vectors = torch.linalg.eigh((basis.T @ times(basis)).double())
    rest = max(trace - float(values.sum()), 0.0)
    tail = rest / (width - rank) if rank < width else 0.0
    factor = (values - tail).clamp_min(0.0).sqrt().float().unsqueeze(1) * (basis @ vectors.float()).T
    return factor, torch.tensor(tail, device=factor.device)


@dataclass(frozen=True)
class _Turned:
    """Rows of some sites in a basis: z (groups, sites, rows, d), factor (groups, sites, k, d) and tail (groups, sites, 1, 1).

    Factor and tail are those of the sites' mean costs. `dropped` is 1 where the mask drops an element of z, else 0.
    """

    z: Tensor
    factor: Tensor
    tail: Tensor
    dropped: Tensor


def _turned(problems: Sequence[Problem], rotation: Tensor, rows: Sequence[Tensor]) -> _Turned:
    """Turn as many rows of each site by `rotation`, and mask them; all in its dtype, sums and thresholds in float32."""
    groups, width = rotation.shape[0], rotation.shape[-1]
    x = torch.cat([p.inputs[:, chosen] for p, chosen in zip(problems, rows, strict=True)], dim=1)
    share = torch.stack([p.weight for p in problems], dim=1)[..., None, None] / len(rows[0])
    tail = torch.stack([p.tail for p in problems], dim=1)[..., None, None] * share
    factor = torch.stack([p.factor for p in problems], dim=1) * share.sqrt()
    z = _product(x.to(rotation.dtype), rotation).view(groups, len(problems), -1, width)
    factor = _product(factor.to(rotation.dtype).flatten(1, 2), rotation).view(factor.shape)
    norm = (factor.float().square().sum(2, keepdim=True) + tail).sqrt()
    size = z.abs()
    places = torch.arange(0, size.shape[2] * width, _stride(size.shape[2], width), device=z.device)
    score = size.flatten(2)[..., places].float() * norm.flatten(2)[..., places % width]
    threshold = score.kthvalue(max(1, int(len(places) * SPARSITY)), dim=2).values
    dropped = size <= (threshold[..., None, None] / norm).to(z.dtype)
    return _Turned(z, factor, tail, dropped.to(z.dtype))


def _stride(rows: int, width: int) -> int:
    """Step between sampled elements of (rows, width): without a common divisor with the width it meets every column."""
    step = max(1, rows * width // _THRESHOLD_SAMPLE) | 1
    while math.gcd(step, width) > 1:
        step += 2
    return step


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched product; of one matrix by the plain one, which on a CPU reads transposed ones without a copy."""
    return (left.squeeze(0) @ right.squeeze(0)).view(*left.shape[:-1], right.shape[-1])


@torch.no_grad()
def learn(
    problems: Sequence[Problem],
    start: Tensor,
    *,
    steps: int,
    sites_per_step: int,
    seed: int,
    fixed: int = 0,
    saved: Mapping[str, Tensor] | None = None,
    save: Callable[[dict[str, Tensor]], None] | None = None,
    progress: Progress = SILENT,
) -> tuple[Tensor, Tensor, Tensor]:
    """Descend from `start`, turning all planes alike at each step; keep what does best on held-out rows.

    A step turns by the momentum with its singular values evened out (Muon, Jordan et al. 2024), so that its angle is the
    rate, whatever the width and the scale of the costs.

    Args:
        problems: the sites, alike in groups, rows, width and rank.
        start: (groups, d, d) float64 rotations.
        steps: descent steps.
        sites_per_step: problems drawn, without replacement until all have been, for each step.
        seed: of the draws.
        fixed: so many of the first axes stay where they are.
        saved: the state of the same descent at one of its checks, to go on from.
        save: called with that state at each check.
        progress: hears of every held-out check.

    Returns:
        rotations (groups, d, d) float64, orthogonal to rounding; their held-out cost (groups,); that of `start`.
    """
    device = start.device
    dtype = _fast_dtype(device)
    generator = torch.Generator().manual_seed(seed)
    done, order = 0, list[int]()
    if saved:
        generator.set_state(saved["generator"])
        done, order = int(saved["step"]), saved["order"].tolist()
        rotation, moment = (saved[name].to(device) for name in ("rotation", "moment"))
        best, best_cost, first_cost = (saved[name].to(device) for name in ("best", "best_cost", "first_cost"))
    else:
        rotation = best = start.float().contiguous()
        moment = torch.zeros_like(rotation)
        first_cost = best_cost = held_out_cost(problems, best)
    for step in range(done + 1, steps + 1):
        drawn = []
        for _ in range(sites_per_step):
            order = order or torch.randperm(len(problems), generator=generator).tolist()
            drawn.append(problems[order.pop()])
        plane = _planes(drawn, rotation.to(dtype), [_train_rows(p, generator) for p in drawn])
        plane[:, :fixed] = 0
        plane[:, :, :fixed] = 0
        moment.lerp_(plane, 1 - _MOMENTUM)
        turn = _evened(moment.lerp(plane, 1 - _MOMENTUM).to(dtype)) * (_RATE * (1 - (step - 1) / steps))
        # Orthogonal to the fourth order of the rate and to rounding: made exact at every check.
        rotation = rotation + _product(rotation.to(dtype), turn @ turn / 2 - turn)
        if step in _checked(steps):
            rotation = orthogonalised(rotation)
            cost = held_out_cost(problems, rotation)
            better = cost < best_cost
            best = torch.where(better[:, None, None], rotation, best)
            best_cost = torch.minimum(cost, best_cost)
            if save is not None:
                state = {"rotation": rotation, "moment": moment, "best": best, "best_cost": best_cost}
                state |= {"first_cost": first_cost, "order": torch.tensor(order, dtype=torch.int64)}
                save(state | {"generator": generator.get_state(), "step": torch.tensor(step)})
            progress.step(f"step {step} of {steps}: {float(cost.mean() / first_cost.mean()):.3f} times the first error")
    improved = (best_cost < first_cost)[:, None, None]
    rotations = torch.where(improved, orthogonalised(best.double()), start)
    return rotations, held_out_cost(problems, rotations), first_cost


def checks(steps: int, done: int = 0) -> int:
    """How often a descent of `steps` steps looks at held-out rows after the first `done` of them."""
    return sum(step > done for step in _checked(steps))


def _checked(steps: int) -> set[int]:
    return {*range(0, steps + 1, max(1, steps // _CHECKS)), steps} - {0}


def _planes(problems: Sequence[Problem], rotation: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Half the gradient (groups, d, d) of the sites' summed cost on the planes (i, j) of the turned basis, float32."""
    site = _turned(problems, rotation, rows)
    lost = site.z * site.dropped
    error = lost @ site.factor.mT
    by_z = (error @ site.factor).mul_(site.dropped).add_(lost * site.tail.to(lost.dtype))
    by_factor = error.mT @ lost
    plane = _product(site.z.flatten(1, 2).mT, by_z.flatten(1, 2)).float()
    plane += _product(site.factor.flatten(1, 2).mT, by_factor.flatten(1, 2))
    return plane - plane.mT


def _evened(plane: Tensor) -> Tensor:
    """An antisymmetric matrix (groups, d, d) with all but its smallest singular values brought near 1, by products alone."""
    x: Tensor = plane / plane.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    for first in (True, False):
        square = x @ x  # -x^T x
        fourth = square @ square
        a, b, c = _QUINTIC
        if first:
            # The largest singular value is at most the eighth root of the sum of all eighth powers, and little less.
            size = fourth.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30) ** 0.25
            a, b, c = a / size, b / size**3, c / size**5
        x = a * x + x @ (c * fourth - b * square)
    turn: Tensor = (x - x.mT) / 2
    return turn


def _fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype of products whose rounding is far below the noise of a draw of rows."""
    cuda = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(False) if cuda else has_16_bit_products(torch.bfloat16)
    return torch.bfloat16 if native else torch.float32


@torch.no_grad()
def held_out_cost(problems: Sequence[Problem], rotation: Tensor) -> Tensor:
    """Cost (groups,) summed over all problems on rows that the descent never sees, computed in float32."""
    total = torch.zeros(len(rotation), dtype=torch.float64, device=rotation.device)
    for problem in problems:
        site = _turned([problem], rotation.float(), [_held_out_rows(problem)])
        lost = site.z * site.dropped
        total += (lost @ site.factor.mT).square().sum((1, 2, 3)) + (site.tail * lost.square()).sum((1, 2, 3))
    return total


def orthogonalised(rotation: Tensor) -> Tensor:
    """The orthogonal matrices (..., d, d) with the columns' order and sign of nearly orthogonal ones."""
    q, r = torch.linalg.qr(rotation)
    turned: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return turned.contiguous()  # as it comes back when it was saved: products of other strides round otherwise


def _held_out_rows(problem: Problem) -> Tensor:
    rows = torch.arange(0, problem.inputs.shape[1], HELD_OUT)
    return rows[:: max(1, len(rows) // _HELD_OUT_ROWS)].to(problem.inputs.device)


def _train_rows(problem: Problem, generator: torch.Generator) -> Tensor:
    """Random rows, as many as the width where there are, none of which is a multiple of `HELD_OUT`."""
    count, width = problem.inputs.shape[1:]
    trained = count - -(-count // HELD_OUT)
    drawn = torch.randint(trained, (min(max(_BATCH, width), trained),), generator=generator)
    return (drawn // (HELD_OUT - 1) * HELD_OUT + drawn % (HELD_OUT - 1) + 1).to(problem.inputs.device)
