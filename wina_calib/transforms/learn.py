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

# Masked harder than usual sparsities: better there too than training at the sparsity itself.
SPARSITY = 0.75
HELD_OUT = 8
_BATCH = 512
_RATE = 0.1
_MOMENTUM, _SCALE_MEMORY = 0.9, 0.98
_CHECKS = 8
_THRESHOLD_SAMPLE = 16384
_HELD_OUT_ROWS = 512


@dataclass(frozen=True)
class Problem:
    """What one site adds to the cost, with W^T W replaced by its largest part.

    Attributes:
        inputs: (groups, n, d) sampled inputs, every `HELD_OUT`-th row kept for checks.
        factor: (groups, k, d) float32, W^T W is about factor^T factor + tail * I.
        tail: (groups,) float32.
        weight: (groups,) float32, the factor of its cost in the sum.
    """

    inputs: Tensor
    factor: Tensor
    tail: Tensor
    weight: Tensor

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
    basis = times(torch.randn(width, rank, generator=generator))
    for _ in range(2):
        basis = torch.linalg.qr(times(torch.linalg.qr(basis).Q)).Q
    values, vectors = torch.linalg.eigh((basis.T @ times(basis)).double())
    rest = max(trace - float(values.sum()), 0.0)
    tail = rest / (width - rank) if rank < width else 0.0
    factor = (values - tail).clamp_min(0.0).sqrt().float().unsqueeze(1) * (basis @ vectors.float()).T
    return factor, torch.tensor(tail, device=factor.device)


def masked_cost(problem: Problem, rotation: Tensor, rows: Tensor, sparsity: float) -> Tensor:
    """Mean cost (groups,) of masking the given rows at a sparsity, in the basis `rotation` (groups, d, d)."""
    z = problem.inputs[:, rows].float() @ rotation
    turned = problem.factor @ rotation
    with torch.no_grad():
        norm = (turned.square().sum(1, keepdim=True) + problem.tail[:, None, None]).sqrt()
        score = (z * norm).abs()
        flat = score.flatten(1)
        flat = flat[:, :: max(1, flat.shape[1] // _THRESHOLD_SAMPLE) | 1]
        threshold = flat.kthvalue(max(1, int(flat.shape[1] * sparsity)), dim=1).values
        keep = score > threshold[:, None, None]
    dropped = z.masked_fill(keep, 0.0)
    cost = (dropped @ turned.mT).square().sum((1, 2)) + problem.tail * dropped.square().sum((1, 2))
    return problem.weight * cost / len(rows)


@torch.no_grad()
def learn(
    problems: Sequence[Problem],
    start: Tensor,
    *,
    steps: int,
    sites_per_step: int,
    seed: int,
    saved: Mapping[str, Tensor] | None = None,
    save: Callable[[dict[str, Tensor]], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Descend from `start` by Adam on the rotation planes with Cayley steps; keep what does best on held-out rows.

    Args:
        problems: the sites, each with the same number of groups.
        start: (groups, d, d) float64 rotations.
        steps: descent steps.
        sites_per_step: problems drawn, without replacement until all have been, for each step.
        seed: of the draws.
        saved: the state of the same descent at one of its checks, to go on from.
        save: called with that state at each check.
        progress: called with a line at each held-out check.

    Returns:
        rotations (groups, d, d) float64, orthogonal to rounding; their held-out cost (groups,); that of `start`.
    """
    width, device = start.shape[-1], start.device
    generator = torch.Generator().manual_seed(seed)
    identity = torch.eye(width, device=device)
    done, order = 0, list[int]()
    if saved:
        generator.set_state(saved["generator"])
        done, order = int(saved["step"]), saved["order"].tolist()
        rotation, moment, scale = (saved[name].to(device) for name in ("rotation", "moment", "scale"))
        best, best_cost, first_cost = (saved[name].to(device) for name in ("best", "best_cost", "first_cost"))
    else:
        rotation = start.float()
        best, best_cost = start.clone(), held_out_cost(problems, start)
        first_cost = best_cost.clone()
        moment, scale = torch.zeros_like(rotation), torch.zeros_like(rotation)
    for step in range(done + 1, steps + 1):
        drawn = []
        for _ in range(sites_per_step):
            order = order or torch.randperm(len(problems), generator=generator).tolist()
            drawn.append(problems[order.pop()])
        gradient = _gradient(drawn, rotation, generator)
        # The gradient on the rotation planes (i, j) of the turned basis; Adam's moments follow the same planes.
        plane = rotation.mT @ gradient
        plane = plane - plane.mT
        moment.lerp_(plane, 1 - _MOMENTUM)
        scale.lerp_(plane.square(), 1 - _SCALE_MEMORY)
        rate = _RATE * (1 - (step - 1) / steps) / math.sqrt(width)
        turn = moment / (1 - _MOMENTUM**step)
        turn = turn / ((scale / (1 - _SCALE_MEMORY**step)).sqrt() + 1e-12) * (rate / 2)
        rotation = rotation @ torch.linalg.solve(identity + turn, identity - turn)
        if step % max(1, steps // _CHECKS) == 0 or step == steps:
            exact = orthogonalised(rotation)
            rotation = exact.float()
            cost = held_out_cost(problems, exact)
            better = cost < best_cost
            best = torch.where(better[:, None, None], exact, best)
            best_cost = torch.minimum(cost, best_cost)
            if save is not None:
                state = {"rotation": rotation, "moment": moment, "scale": scale, "best": best, "best_cost": best_cost}
                state |= {"first_cost": first_cost, "order": torch.tensor(order, dtype=torch.int64)}
                save(state | {"generator": generator.get_state(), "step": torch.tensor(step)})
            if progress is not None:
                progress(f"step {step} of {steps}: held-out cost {float(cost.mean() / first_cost.mean()):.3f}")
    return best, best_cost, first_cost


@torch.enable_grad()
def _gradient(problems: Sequence[Problem], rotation: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient (groups, d, d) of the problems' summed cost on a random batch of each."""
    point = rotation.detach().requires_grad_()
    costs = [masked_cost(p, point, _train_rows(p, generator), SPARSITY).sum() for p in problems]
    (gradient,) = torch.autograd.grad(torch.stack(costs).sum(), point)
    return gradient


@torch.no_grad()
def held_out_cost(problems: Sequence[Problem], rotation: Tensor) -> Tensor:
    """Cost (groups,) summed over all problems on rows that the descent never sees."""
    costs = [masked_cost(p, rotation.float(), _held_out_rows(p), SPARSITY).double() for p in problems]
    return torch.stack(costs).sum(0)


def orthogonalised(rotation: Tensor) -> Tensor:
    """The float64 orthogonal matrices (..., d, d) closest in columns' order and sign to nearly orthogonal ones."""
    q, r = torch.linalg.qr(rotation.double())
    turned: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return turned


def _held_out_rows(problem: Problem) -> Tensor:
    rows = torch.arange(0, problem.inputs.shape[1], HELD_OUT)
    return rows[:: max(1, len(rows) // _HELD_OUT_ROWS)].to(problem.inputs.device)


def _train_rows(problem: Problem, generator: torch.Generator) -> Tensor:
    """Random rows, none of which is a multiple of `HELD_OUT`."""
    count = problem.inputs.shape[1]
    trained = count - -(-count // HELD_OUT)
    drawn = torch.randint(trained, (min(_BATCH, trained),), generator=generator)
    return (drawn // (HELD_OUT - 1) * HELD_OUT + drawn % (HELD_OUT - 1) + 1).to(problem.inputs.device)
