"""What lies behind a checkpoint's figures: which inputs matter, how errors grow, where it breaks, what the text does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from wina_calib.calibration.loss_curves import curve_parts
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.common.bars import Hearing, hearing
from wina_calib.common.devices import pick_device, pick_dtype
from wina_calib.common.progress import Estimate, Part
from wina_calib.common.text import percent
from wina_calib.corpus.sources import Data, data_specs
from wina_calib.errors import UsageError
from wina_calib.model.locate import load_tokenizer, resolve
from wina_calib.studies.defaults import (
    DIAGNOSE_AMOUNTS,
    DIAGNOSE_EXTREMES,
    DIAGNOSE_INPUTS,
    DIAGNOSE_PARTS,
    DIAGNOSE_TOKENS,
)
from wina_calib.studies.diagnose.depth import Extreme, Propagation, extremes, extremes_text, propagation
from wina_calib.studies.diagnose.importance import DROPPED, Importance, importance, spearman
from wina_calib.studies.diagnose.subject import Subject
from wina_calib.studies.diagnose.texts import KINDS, Fitted, reason_without, texts, texts_text
from wina_calib.studies.evaluate import evaluation_blocks, load_on

__all__ = ["Diagnosis", "Extreme", "Fitted", "Importance", "Propagation", "diagnose", "spearman"]


@dataclass(frozen=True)
class Diagnosis:
    """What was found of one checkpoint; what was not asked for is None."""

    model: str  # the checkpoint as given
    sparsity: float  # model sparsity of propagation and texts
    tokens: int  # tokens of the text measured on
    data: tuple[str, ...]  # what text
    importance: Importance | None = None  # whether norms tell which inputs matter
    propagation: Propagation | None = None  # how errors grow through depth
    extremes: tuple[Extreme, ...] | None = None  # quality at high sparsities
    texts: tuple[Fitted, ...] | None = None  # thresholds fitted on other text
    # what was asked for and does not apply to this checkpoint, and why
    skipped: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self)
        if self.importance is not None:
            values["importance"]["measured"] = self.importance.measured()
        if self.propagation is not None:
            values["propagation"] |= {"kl_sum": self.propagation.kl_sum, "error_sum": self.propagation.error_sum}
        if self.texts is not None:
            values["texts"] = [asdict(row) | {"drifts": row.drifts} for row in self.texts]
        return values

    def text(self) -> str:
        """Tables for people."""
        parts = [
            f"{self.model}: asked sparsity {percent(self.sparsity)}, {self.tokens:,} tokens of {', '.join(self.data)}",
            None if self.importance is None else self.importance.text(),
            None if self.propagation is None else self.propagation.text(),
            None if self.extremes is None else extremes_text(self.extremes),
            None if self.texts is None else texts_text(self.texts),
            *(f"{name}: left out, {reason}." for name, reason in self.skipped.items()),
        ]
        return "\n\n".join(part for part in parts if part is not None)


def diagnose(
    checkpoint: str | Path,
    *,
    what: Sequence[str] = DIAGNOSE_PARTS,
    sparsity: float | None = None,
    extreme: Sequence[float] = DIAGNOSE_EXTREMES,
    inputs: int = DIAGNOSE_INPUTS,
    amounts: Sequence[int] = DIAGNOSE_AMOUNTS,
    fit_seq_len: int | None = None,
    data: Data = None,
    tokens: int = DIAGNOSE_TOKENS,
    device: str = "auto",
    dtype: str = "auto",
    progress: Hearing = None,
) -> Diagnosis:
    """Examine a calibrated checkpoint; its folder is not changed.

    Args:
        checkpoint: checkpoint folder or Hub id.
        what: any of `DIAGNOSE_PARTS`.
        sparsity: model sparsity of propagation and texts; the calibrated one by default.
        extreme: model sparsities of the extremes.
        inputs: inputs of every site that importance drops one by one.
        amounts: numbers of blocks that texts fits on.
        fit_seq_len: tokens of such a block; the calibration's by default.
        data: text to measure on.
        tokens: tokens to measure on.
        device: compute device.
        dtype: compute dtype.
        progress: as `wina_calib.common.bars.hearing` takes it.

    Raises:
        UsageError: an option is out of range.
        WinaError: checkpoint or text cannot be used.
    """
    unknown = [name for name in what if name not in DIAGNOSE_PARTS]
    if unknown or not what:
        raise UsageError(f"what is {', '.join(what) or 'empty'}; expected some of {', '.join(DIAGNOSE_PARTS)}.")
    opened = open_checkpoint(resolve(checkpoint)[0])
    asked = opened.settings.sparsity if sparsity is None else sparsity
    wrong = [s for s in (asked, *extreme) if not 0.0 < s < 1.0]
    if wrong or tokens < 2 or inputs < 0 or any(a < 1 for a in amounts) or (fit_seq_len or 16) < 16:
        raise UsageError(
            f"sparsities {', '.join(f'{s:g}' for s in (asked, *extreme))}, tokens {tokens}, inputs {inputs}, amounts "
            f"{', '.join(map(str, amounts))}, blocks of {fit_seq_len}; expected sparsities in (0, 1), at least 2 tokens, "
            "0 inputs, amounts of at least 1 and blocks of at least 16."
        )
    reason = reason_without(opened) if "texts" in what else None
    skipped = {} if reason is None else {"texts": reason}
    wanted = set(what) - set(skipped)
    if not wanted:
        raise UsageError(
            f"{checkpoint}: {reason}, so that there is nothing to find out. Ask for some of {', '.join(DIAGNOSE_PARTS[:-1])}."
        )
    place = pick_device(device)
    blocks = evaluation_blocks(data_specs(data), load_tokenizer(opened.opened), tokens, opened.settings.seq_len)
    model = load_on(opened.opened, place, dtype)
    subject = Subject(opened, model, blocks, place, pick_dtype(dtype, model.dtype, place))
    # A caller's no_grad or inference_mode would take away the gradients that importance is told by.
    with hearing(progress) as report, torch.inference_mode(False), torch.enable_grad():
        report.planned(Estimate(_parts(subject, wanted, inputs, extreme, amounts)))
        return Diagnosis(
            model=str(checkpoint),
            sparsity=asked,
            tokens=blocks.tokens,
            data=blocks.data,
            importance=importance(subject, inputs=inputs, progress=report) if "importance" in wanted else None,
            propagation=propagation(subject, asked, report) if "propagation" in wanted else None,
            extremes=extremes(subject, extreme, report) if "extremes" in wanted and extreme else None,
            texts=texts(subject, asked, amounts=amounts, seq_len=fit_seq_len, progress=report)
            if "texts" in wanted
            else None,
            skipped=skipped,
        )


def _parts(
    subject: Subject, wanted: Collection[str], inputs: int, extreme: Sequence[float], amounts: Sequence[int]
) -> tuple[Part, ...]:
    """The phases to come, in forward passes over the text."""
    arch, blocks = subject.opened.architecture, len(subject.blocks.ids)
    layers = len(arch.layers)
    parts: list[Part] = []
    if "importance" in wanted:
        parts += curve_parts(arch, subject.dtype, blocks, 1.0, 0.2)
        if inputs:
            parts.append(Part(DROPPED, layers, layers * len(arch.layers[0].sites) * inputs / blocks))
    if "propagation" in wanted:
        parts.append(Part("propagation", blocks, 2.0 + layers))
    if "extremes" in wanted and extreme:
        parts.append(Part("extremes", blocks, 1.0 + len(extreme)))
    if "texts" in wanted:
        fits = len(KINDS) + len(amounts)
        parts.append(Part("texts", fits, 4.0 * fits))
    return tuple(parts)
