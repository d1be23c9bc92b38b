"""The training itself: steps of distillation under masks, saved on the way, the best weights kept.

A step depends on its number and on what the last save holds, so that a run that was stopped goes on as if it had not been.
Where a step is not a number it is skipped; `MAX_SKIPPED` in a row end the training with the last good state kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from wina_calib.common.distributed import Ranks
from wina_calib.common.progress import Progress
from wina_calib.corpus.blocks import fingerprint
from wina_calib.errors import StateError
from wina_calib.model.architecture import Architecture
from wina_calib.quantization.formats import WeightFormat
from wina_calib.recovery.batches import Batches
from wina_calib.recovery.distiller import Distiller
from wina_calib.recovery.masked_model import MaskedModel
from wina_calib.recovery.options import SELF, RecoverOptions
from wina_calib.recovery.plan import TrainingPlan
from wina_calib.recovery.record import MAX_SKIPPED, Log, Trained, merit
from wina_calib.recovery.sharded import part, part_of, spread, whole_of
from wina_calib.recovery.straight_through import straight_through
from wina_calib.storage.resume import Phase

LOOK_EVERY = {"cpu": 1}  # steps after which their losses are looked at; on a device that means waiting for it
WARM_UP = 0.05  # share of the steps in which the learning rate rises
LOWEST = 0.02  # of the highest learning rate, at the end
CLIP = 1.0
QUANTIZED = 0.3  # share of the steps, the last ones, that compute with quantized weights
NORMS_EVERY = 10
SAVE_AFTER = 30.0  # seconds of training that are worth a save
SETTLING = 8  # passes over a little text that thresholds are fitted by, before held-out text is looked at
PROBE = 4  # steps whose time says how many fit into a limit of time
CHECKS = (0.0, 0.5, 1.0)  # of the steps, where held-out text is looked at
# Of the way from the first weights to the last; less is often better on text that is not known.
SHARES = (1.0, 0.8, 0.6)


@dataclass
class Training:
    """A training under way."""

    student: PreTrainedModel  # the model that is trained; its trained weights are float32
    teacher: PreTrainedModel  # the dense model
    masks: MaskedModel  # on the student
    architecture: Architecture  # of the student
    ids: Tensor  # (sequences, seq) text to train on
    held_out: Tensor  # (sequences, seq) text to choose the best weights by
    options: RecoverOptions  # of the recovery
    plan: TrainingPlan  # what was planned
    sparsities: tuple[float, ...]  # that are trained
    in_turn: tuple[float, ...]  # the sparsities of a round of steps
    turn: Tensor | None  # takes the dense model's hidden states to the student's axes; None where they are not compared
    phase: Phase  # where the state is saved
    ranks: Ranks  # the processes that train together
    report: Progress  # hears of it
    device: torch.device  # that computes

    def run(self) -> Trained:
        """Train, and leave the best weights in the student."""
        bf16 = self.device.type == "cuda"
        self._engine = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=self.device.type == "cpu")
        if self.plan.sharded:
            spread(self.student.get_submodule(self.architecture.layers_path).children(), self.device)
        self._trained = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        self._weights = {name: part(p) for name, p in self._trained.items()}
        self._optimizer: Any = torch.optim.AdamW(
            self._weights.values(), lr=self.plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._start = {name: p.detach().cpu().clone() for name, p in self._weights.items()}
        self._best = {name: p.detach().clone() for name, p in self._weights.items()}
        written = self.options.data == (SELF,)  # anew in each run, and not to the bit
        text = None if written else fingerprint(torch.cat([self.ids, self.held_out]))
        self._given = {"text": text, "adapters": self.plan.adapters}
        self._text = Batches(self.ids, self.options.batch, self.options.seed)
        values = self._restore()
        self._kept, self._share = list(map(float, values.get("kept", []))), float(values.get("share", 1.0))
        self._planned = int(values.get("planned", self.plan.steps))
        layers = None if self.turn is None else self.architecture.layers_path
        distiller = Distiller(self.student, self.teacher, layers, self.turn)
        if not self.plan.sharded:
            distiller = self._engine.prepare_model(distiller, device_placement=False)
        return self._steps(distiller, values)

    def _steps(self, distiller: nn.Module, values: dict[str, Any]) -> Trained:
        held = {int(k): list(map(float, v)) for k, v in values.get("held_out", {}).items()}
        log, before = Log([], int(values.get("skipped", 0))), float(values.get("seconds", 0.0))
        start, first, done = time.monotonic(), self.phase.done_items, self.phase.done_items
        best = int(values.get("best", 0))
        every = LOOK_EVERY.get(self.device.type, MAX_SKIPPED)
        self.report.phase("train", self.plan.steps - first)
        if not held:
            held[0] = self._kept = self._held_out_losses()
            self.report.note(f"divergence on held-out text before: {self._shown(held[0])}")
        opened = time.monotonic()
        while done < self._planned and not self._is_over(before + time.monotonic() - start):
            step = done
            log.waiting.append(self._step(distiller, step))
            done = step + 1
            if done % every == 0:
                log.look(self._engine, self.plan.learning_rate)
            seconds = before + time.monotonic() - start
            speed = (done - first) * self.options.batch * self.ids.shape[1] / max(1e-9, seconds - before)
            last = (
                f"divergence {log.losses[-1]:.4f} at {self._turn(first + len(log.losses) - 1):g}, "
                if log.losses
                else ""
            )
            self.report.step(f"{last}{speed:,.0f} tokens a second")
            if done == PROBE and self.options.max_time:
                log.look(self._engine, self.plan.learning_rate)
                left = 60 * self.options.max_time - before - (2 + len(SHARES)) * (opened - start)  # for the checks
                self._planned = self.ranks.from_first(self._fitting(left, (time.monotonic() - opened) / (done - first)))
            if done in {round(share * self._planned) for share in CHECKS}:
                log.look(self._engine, self.plan.learning_rate)
                best = self._check(done, held, best, last=done == self._planned)
            state: dict[str, Any] = {"held_out": held, "skipped": log.skipped, "seconds": seconds, "best": best}
            state |= {"planned": self._planned, "kept": self._kept, "share": self._share} | self._given
            if self.ranks.from_first(seconds - before >= SAVE_AFTER):
                self.phase.save(done, passing=self._saved, values=state)
        log.look(self._engine, self.plan.learning_rate)
        if done not in held:
            best = self._check(done, held, best, last=True)
        self._take(self._best)
        seconds = before + time.monotonic() - start
        return Trained(done, log.skipped, seconds, held, best, self._share, self._kept, log.losses)

    def _step(self, distiller: nn.Module, step: int) -> Tensor:
        """One optimizer step; (2,): its divergence, and 1, or 0 where it was not a number and left out."""
        self.student.train()
        self.masks.sparsity, self.masks.follows = self._turn(step), True
        for group in self._optimizer.param_groups:
            group["lr"] = self.plan.learning_rate * _schedule(step, self._planned)
        parts = self._parts(step)
        sequences = sum(map(len, parts))
        total = torch.zeros((), device=self.device)
        with self._rounded(step), self._engine.autocast():
            for number, some in enumerate(parts, 1):
                with nullcontext() if number == len(parts) else self._engine.no_sync(distiller):
                    kl, apart = distiller(some) * (len(some) / sequences)
                    self._engine.backward(kl + self.options.hidden * apart)
                total += kl.detach()
        fine = self._clip().isfinite()
        self._optimizer.found_inf = fine.logical_not().float()  # read by fused steps, which then change nothing
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.masks.follow(lambda cuts: self._engine.reduce(cuts, "mean"))
        if step % NORMS_EVERY == 0:
            self.masks.refresh_norms()
        return torch.stack([total, fine.float()])

    def _clip(self) -> Tensor:
        """Clip the gradients; their norm."""
        if self.plan.sharded:
            for name, p in self._trained.items():
                self._weights[name].grad = None if p.grad is None else part(p.grad)
                p.grad = None
        weights = list(self._weights.values())
        norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        if self.plan.sharded:
            norm = self._engine.reduce(norm.square(), "sum").sqrt()
        nn.utils.clip_grads_with_norm_(weights, CLIP, norm)
        return norm

    def _parts(self, step: int) -> Sequence[Tensor]:
        """This process's sequences of a step, (batch, seq) computed together."""
        own: Sequence[Tensor] = self._text.rows(step)[self.ranks.rank :: self.ranks.size].split(self.plan.micro_batch)
        return [some.to(self.device) for some in own]

    def _turn(self, step: int) -> float:
        """The sparsity of a step."""
        return self.in_turn[step % len(self.in_turn)]

    def _check(self, step: int, held: dict[int, list[float]], best: int, *, last: bool = False) -> int:
        """Look at held-out text, and keep the weights if they are the best so far; at the end also those on the way there."""
        now = {name: p.detach().clone() for name, p in self._weights.items()}
        for share in SHARES if last else (1.0,):
            self._take({name: torch.lerp(self._start[name].to(self.device), p, share) for name, p in now.items()})
            losses = self._held_out_losses()
            if share == 1:
                held[step] = losses
            what = f"after {step} steps" + ("" if share == 1 else f", {share:.0%} of the way")
            self.report.note(f"divergence on held-out text {what}: {self._shown(losses)}")
            if merit(losses, held[0]) < merit(self._kept, held[0]):
                self._best = {name: p.detach().clone() for name, p in self._weights.items()}
                self._kept, self._share, best = losses, share, step
        self._take(now)
        return best

    def _shown(self, losses: list[float]) -> str:
        return ", ".join(f"{loss:.4f} at {s:g}" for s, loss in zip(self.sparsities, losses, strict=True))

    @torch.no_grad()
    def _held_out_losses(self) -> list[float]:
        """Mean divergence on held-out text at each sparsity, with weights as they will be stored and thresholds for these."""
        self.masks.refresh_norms()
        self.student.eval()
        distiller = Distiller(self.student, self.teacher)
        total = torch.zeros(len(self.sparsities), device=self.device)
        parts = self.held_out.split(self.plan.micro_batch)
        with self._rounded(), self._engine.autocast():
            for number, sparsity in enumerate(self.sparsities):
                self._settle(sparsity)
                for place in range(self.ranks.rank, len(parts) + self.ranks.rank, self.ranks.size):
                    some = parts[place % len(parts)]  # past the last one for nothing: every process passes as often
                    share = len(some) / len(self.held_out) if place < len(parts) else 0.0
                    total[number] += distiller(some.to(self.device))[0] * share
        sums: list[float] = self._engine.reduce(total, "sum").tolist()
        return sums

    def _settle(self, sparsity: float) -> None:
        """Fit the thresholds of a sparsity to the weights as they are: to the average of what the later passes call for."""
        self.masks.sparsity, self.masks.follows = sparsity, True
        for number in range(SETTLING):
            self.student.get_decoder()(input_ids=self._parts(number)[0], use_cache=False)
            self.masks.follow(
                lambda cuts: self._engine.reduce(cuts, "mean"), move=1 / max(1, number + 1 - SETTLING // 2)
            )
        self.masks.follows = False

    def _rounded(self, step: int | None = None) -> AbstractContextManager[None]:
        """Where bits were asked for, weights as they will be stored: in the last steps, and where no step is given."""
        if not self.options.bits or self.plan.adapters:
            return nullcontext()
        if step is not None and step < (1 - QUANTIZED) * self._planned:
            return nullcontext()
        form = WeightFormat(self.options.bits, self.options.group_size)
        return straight_through(self.student, self.architecture, form)

    def _fitting(self, left: float, each: float) -> int:
        """Steps that fit into the seconds that are left, at so many each: the learning rate falls over these."""
        fitting = max(PROBE, int(left / each))
        if fitting < self._planned:
            self.report.note(f"{fitting} steps fit into {self.options.max_time:g} minutes")
        return min(self._planned, fitting)

    def _is_over(self, seconds: float) -> bool:
        limit = self.options.max_time
        return bool(limit) and self.ranks.from_first(seconds >= 60 * limit)

    def _saved(self) -> dict[str, Tensor]:
        out = {f"masks/{name}": value for name, value in self.masks.state().items()}
        for name, p in self._weights.items():
            mine = {"weight": p.detach(), "best": self._best[name]} | self._optimizer.state[p]
            out |= {f"{key}/{name}": whole_of(value, self._trained[name]) for key, value in mine.items()}
        return out

    def _restore(self) -> dict[str, Any]:
        """Take what an earlier run saved; its small values."""
        if not self.phase.done_items:
            return {}
        told = {"text": "its text", "adapters": "what is trained, which free memory decides,"}
        other = [what for name, what in told.items() if self.phase.values.get(name) != self._given[name]]
        if other:
            raise StateError(
                f"the training that was stopped cannot be gone on with: {' and '.join(other)} is another now. Make it as it "
                "was, or add --restart to start over."
            )
        saved = {
            name: part_of(value, self._trained.get(name.partition("/")[2], value))
            for name, value in self.phase.tensors().items()
        }
        self._take(_part(saved, "weight/"))
        self._best = {name: t.to(self.device) for name, t in _part(saved, "best/").items()}
        self.masks.load_state(_part(saved, "masks/"))
        for name, p in self._weights.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self._optimizer.state[p] = {key: saved[f"{key}/{name}"].to(self.device) for key in keys}
        return self.phase.values

    @torch.no_grad()
    def _take(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._weights.items():
            p.copy_(values[name])


def _part(saved: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in saved.items() if name.startswith(prefix)}


def _schedule(step: int, steps: int) -> float:
    """Share of the highest learning rate: up in the first steps, down along a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
