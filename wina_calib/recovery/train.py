"""The training itself: steps of distillation under masks, saved on the way, the best weights kept.

Where a step is not a number it is skipped; `MAX_SKIPPED` in a row end the training with the last good state kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from wina_calib.calibration.layer_stream import Head
from wina_calib.common.progress import Progress
from wina_calib.errors import NumericError
from wina_calib.model.architecture import Architecture
from wina_calib.quantization.formats import WeightFormat
from wina_calib.recovery.loss import divergence, rows_of
from wina_calib.recovery.masked_model import MaskedModel
from wina_calib.recovery.options import RecoverOptions
from wina_calib.recovery.plan import TrainingPlan
from wina_calib.recovery.straight_through import quantize_in_training, stop_quantizing
from wina_calib.storage.resume import Phase

MAX_SKIPPED = 8
WARM_UP = 0.05  # share of the steps in which the learning rate rises
LOWEST = 0.1  # of the highest learning rate, at the end
CLIP = 1.0
QUANTIZED = 0.3  # share of the steps, the last ones, that compute with quantized weights
NORMS_EVERY = 10
CHECKS = (0.0, 0.5, 1.0)  # of the steps, where held-out text is looked at


class Distiller(nn.Module):
    """The sparse model beside the dense one: ids (batch, seq) in, mean divergence out."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.student = student
        self.__dict__["teacher"] = teacher  # no child: it is not trained, cast or shared

    def forward(self, ids: Tensor) -> Tensor:
        """Mean KL(dense || sparse) a token, nats."""
        teacher: PreTrainedModel = self.__dict__["teacher"]
        with torch.no_grad():
            dense = teacher.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        sparse = self.student.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        heads = Head(self.student, self.student.get_decoder()), Head(teacher, teacher.get_decoder())
        return (
            divergence(sparse, dense, *heads, rows_of(self.student.config.get_text_config().vocab_size)) / ids.numel()
        )


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        steps: done.
        skipped: of these, without effect as they were not a number.
        seconds: they took, those of earlier runs too.
        held_out: divergence on held-out text at each sparsity, by step.
        best: the step whose weights were kept.
    """

    steps: int
    skipped: int
    seconds: float
    held_out: dict[int, list[float]]
    best: int


@dataclass
class Training:
    """A training under way.

    Attributes:
        student: the model that is trained; its trained weights are float32.
        teacher: the dense model.
        masks: on the student.
        architecture: of the student.
        ids: (sequences, seq) text to train on.
        held_out: (sequences, seq) text to choose the best weights by.
        options: of the recovery.
        plan: what was planned.
        sparsities: trained in turn.
        phase: where the state is saved.
        report: hears of it.
        device: that computes.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    masks: MaskedModel
    architecture: Architecture
    ids: Tensor
    held_out: Tensor
    options: RecoverOptions
    plan: TrainingPlan
    sparsities: tuple[float, ...]
    phase: Phase
    report: Progress
    device: torch.device

    def run(self) -> Trained:
        """Train, and leave the best weights in the student."""
        bf16 = self.device.type == "cuda"
        self._engine = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=self.device.type == "cpu")
        self._weights = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), lr=self.plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self._best = {name: p.detach().clone() for name, p in self._weights.items()}
        values = self._restore()
        distiller, optimizer = self._engine.prepare(Distiller(self.student, self.teacher), self._optimizer)
        try:
            return self._steps(distiller, optimizer, values)
        finally:
            if self._quantizes:
                stop_quantizing(self.student)

    def _steps(self, distiller: Any, optimizer: Any, values: dict[str, Any]) -> Trained:
        held = {int(k): list(map(float, v)) for k, v in values.get("held_out", {}).items()}
        skipped, in_a_row, before = int(values.get("skipped", 0)), 0, float(values.get("seconds", 0.0))
        start, first, done = time.monotonic(), self.phase.step, self.phase.step
        best = int(values.get("best", 0))
        checks = {round(share * self.plan.steps) for share in CHECKS}
        self.report.phase("train", self.plan.steps - first)
        if not held:
            held[0] = self._held_out_losses()
            self.report.note(f"divergence on held-out text before: {self._shown(held[0])}")
        for step in range(first, self.plan.steps):
            if self._is_over(before + time.monotonic() - start):
                break
            if self._is_quantized(step) and not self._quantizes:
                self._quantize()
            loss = self._step(distiller, optimizer, step)
            if math.isfinite(loss):
                in_a_row = 0
            else:
                skipped, in_a_row = skipped + 1, in_a_row + 1
                if in_a_row >= MAX_SKIPPED:
                    raise NumericError(
                        f"{in_a_row} steps in a row were not a number. Give a lower --lr than {self.plan.learning_rate:g}."
                    )
            done = step + 1
            seconds = before + time.monotonic() - start
            speed = (done - first) * self.options.batch * self.ids.shape[1] / max(1e-9, seconds - before)
            self.report.step(f"divergence {loss:.4f} at {self.masks.sparsity:g}, {speed:,.0f} tokens a second")
            if done in checks:
                best = self._check(done, held, best)
            state = {"held_out": held, "skipped": skipped, "seconds": seconds, "best": best}
            self.phase.save(done, passing=self._saved(), values=state)
        if done not in held:
            best = self._check(done, held, best)
        self._take(self._best)
        return Trained(done, skipped, before + time.monotonic() - start, held, best)

    def _step(self, distiller: Any, optimizer: Any, step: int) -> float:
        """One optimizer step; its loss, or NaN where it was left out."""
        self.student.train()
        self.masks.sparsity, self.masks.follows = self.sparsities[step % len(self.sparsities)], True
        for group in optimizer.param_groups:
            group["lr"] = self.plan.learning_rate * _schedule(step, self.plan.steps)
        rows = self._rows(step)
        parts = rows[self._engine.process_index :: self._engine.num_processes].split(self.plan.micro_batch)
        total = 0.0
        for some in parts:
            loss = distiller(self.ids[some].to(self.device)) / len(parts)
            self._engine.backward(loss)
            total += float(loss.detach())
        norm = self._engine.clip_grad_norm_(list(self._weights.values()), CLIP)
        fine = math.isfinite(total) and bool(torch.isfinite(torch.as_tensor(norm)))
        if fine:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.masks.follow(lambda cut: self._engine.reduce(cut, "mean"))
        if step % NORMS_EVERY == 0:
            self.masks.refresh_norms()
        return total if fine else math.nan

    def _rows(self, step: int) -> Tensor:
        """Which sequences a step takes: all once in a random order, then all again in another."""
        count, batch = len(self.ids), self.options.batch
        places = range(step * batch, (step + 1) * batch)
        orders = {p // count: _order(count, self.options.seed, p // count) for p in places}
        return torch.tensor([int(orders[p // count][p % count]) for p in places])

    def _check(self, step: int, held: dict[int, list[float]], best: int) -> int:
        held[step] = self._held_out_losses()
        self.report.note(f"divergence on held-out text after {step} steps: {self._shown(held[step])}")
        if merit(held[step], held[0]) < merit(held[best], held[0]):
            self._best = {name: p.detach().clone() for name, p in self._weights.items()}
            return step
        return best

    def _shown(self, losses: list[float]) -> str:
        return ", ".join(f"{loss:.4f} at {s:g}" for s, loss in zip(self.sparsities, losses, strict=True))

    @torch.no_grad()
    def _held_out_losses(self) -> list[float]:
        """Mean divergence on held-out text at each sparsity, with weights as they will be stored."""
        self.masks.refresh_norms()
        self.student.eval()
        self.masks.follows = False
        distiller, found = Distiller(self.student, self.teacher), []
        with self._quantizing(after=self._quantizes), self._engine.autocast():
            for sparsity in self.sparsities:
                self.masks.sparsity = sparsity
                losses = [float(distiller(some.to(self.device))) for some in self.held_out.split(self.plan.micro_batch)]
                found.append(sum(losses) / len(losses))
        return found

    _quantizes = False

    @property
    def _form(self) -> WeightFormat | None:
        return WeightFormat(self.options.bits, self.options.group_size) if self.options.bits else None

    def _is_quantized(self, step: int) -> bool:
        return bool(self.options.bits) and not self.plan.adapters and step >= (1 - QUANTIZED) * self.plan.steps

    def _quantize(self) -> None:
        assert self._form is not None
        quantize_in_training(self.student, self.architecture, self._form)
        self._quantizes = True

    @contextmanager
    def _quantizing(self, *, after: bool) -> Iterator[None]:
        """With quantized weights where bits were asked for; then, or if that fails, as `after` says."""
        if self._form is None or self.plan.adapters:
            yield
            return
        if not self._quantizes:
            self._quantize()
        try:
            yield
        finally:
            if not after and self._quantizes:
                stop_quantizing(self.student)
                self._quantizes = False

    def _is_over(self, seconds: float) -> bool:
        return bool(self.options.max_time) and seconds >= 60 * self.options.max_time

    def _saved(self) -> dict[str, Tensor]:
        out = {f"masks/{name}": value for name, value in self.masks.state().items()}
        for name, p in self._weights.items():
            out |= {f"weight/{name}": p.detach(), f"best/{name}": self._best[name]}
            out |= {f"{key}/{name}": torch.as_tensor(v) for key, v in self._optimizer.state[p].items()}
        return out

    def _restore(self) -> dict[str, Any]:
        """Take what an earlier run saved; its small values."""
        if not self.phase.step:
            return {}
        saved = self.phase.tensors()
        self._take(_part(saved, "weight/"))
        self._best = {name: t.to(self.device) for name, t in _part(saved, "best/").items()}
        self.masks.load_state(_part(saved, "masks/"))
        for name, p in self._weights.items():
            state = {key: saved[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self._optimizer.state[p] = {k: v if k == "step" else v.to(self.device) for k, v in state.items()}
        return self.phase.values

    @torch.no_grad()
    def _take(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._weights.items():
            p.copy_(values[name])


def _part(saved: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in saved.items() if name.startswith(prefix)}


def merit(losses: Sequence[float], before: Sequence[float]) -> float:
    """Mean share of its divergence that each sparsity is left with; infinite where one has more than before."""
    shares = [loss / start if start > 0 else 1.0 for loss, start in zip(losses, before, strict=True)]
    return sum(shares) / len(shares) if max(shares) <= 1 else math.inf


def _schedule(step: int, steps: int) -> float:
    """Share of the highest learning rate: up in the first steps, down along a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _order(count: int, seed: int, epoch: int) -> Sequence[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed((seed << 20) + epoch)).tolist()
    return order
