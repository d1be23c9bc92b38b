"""What to expect of a calibrated model: the rise of perplexity at any sparsity, by what was measured on held-out text.

Calibration runs the sparse model at every anchor on text that nothing was fitted on. Between anchors the rise of the loss goes
with a power of the sparsity, and so it does beyond them. Everything here is numbers; `Verdict` is what is kept and shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wina_calib.budgets import Cells
from wina_calib.common.monotone import curve, slopes
from wina_calib.common.text import give_or_take, percent, share, table, whole

Values = NDArray[np.float64]

SHOWN = (0.25, 0.4, 0.5, 0.65)  # sparsities whose rise is told
ASKED_RISES = (0.01, 0.05, 0.1)  # rises of perplexity whose sparsity is told
TOO_MUCH = 0.1
OFF = 0.01  # difference of achieved and asked sparsity from which it is told
HELD_OUT, VERDICT, QUICK = "held_out", "verdict", "quick"  # keys of the provenance
A_FIRST_LOOK = "a first look (--quick) on a third of the text: a full calibration usually bears a little more"
OTHER_TEXT = "text of another kind than the calibration's may cost more"
CHEAPER = (
    "groups of 32 (--group-size 32) if these are of 64, a lower sparsity, --keep-16-bit for the projections that suffer "
    "most, or --bits 8 cost less, and `wina-calib recover` with --bits trains some of it back"
)
_DERIVED = ("quantizing", "quick", "error", "errors")  # of a verdict, from what stands beside it in the provenance
_ROWS = ("anchors", "loss_rise", "kl", "achieved")
_SPREAD = 0.15  # what the ratio of loss rise and divergence differs by from anchor to anchor
_CORRELATED = 2.0  # tokens of a text are worth so many times fewer independent ones
_POWER, _POWERS = 3.5, (1.5, 8.0)  # of sparsity, that rises of the loss go by
_FAR, _HALVINGS = 20.0, 60  # logarithms of sparsity


@dataclass(frozen=True)
class HeldOut:
    """The sparse model beside the dense one on held-out text, at each anchor.

    Attributes:
        anchors: model sparsities asked for, ascending, above 0.
        loss_rise: rise of the loss, nats a token.
        kl: KL divergence from the dense model, nats a token.
        achieved: model sparsity there.
        tokens: predicted tokens.
        data: the text.
        unmasked: loss rise and divergence at sparsity 0, where the weights are quantized; else 0.
        errors: standard errors of `loss_rise`, by how sequences differ; () where that is not known.
    """

    anchors: tuple[float, ...]
    loss_rise: tuple[float, ...]
    kl: tuple[float, ...]
    achieved: tuple[float, ...]
    tokens: int
    data: tuple[str, ...]
    unmasked: tuple[float, float] = (0.0, 0.0)
    errors: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, raw: object) -> HeldOut | None:
        """From a checkpoint's facts; None where they hold no such thing."""
        if not isinstance(raw, dict):
            return None
        try:
            anchors, loss, kl, achieved = rows = [tuple(map(float, raw[name])) for name in _ROWS]
            first, second = map(float, raw["unmasked"])
            errors = tuple(map(float, raw.get("errors", ())))
            told = int(raw["tokens"]), tuple(map(str, raw["data"]))
            held = cls(anchors, loss, kl, achieved, *told, (first, second), errors)
            same = len(set(map(len, rows))) == 1 and len(anchors) > 0 and len(errors) in (0, len(anchors))
            fine = all(math.isfinite(value) for row in (*rows, held.unmasked, errors) for value in row) and all(
                0 < a < 1 for a in anchors
            )
            return held if same and fine and list(anchors) == sorted(set(anchors)) else None
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    @property
    def loss(self) -> tuple[float, ...]:
        """The rise of the loss at each anchor as far as its noise allows, positive and ascending; `base` is in it."""
        return self._loss[1:]

    @property
    def base(self) -> float:
        """The rise of the loss at sparsity 0: what quantizing the weights alone costs."""
        return self._loss[0]

    @property
    def base_rise(self) -> float:
        """The same as a relative rise of perplexity."""
        return math.expm1(min(self.base, 700.0))

    @property
    def _loss(self) -> tuple[float, ...]:
        if not self.unmasked[1]:
            return 0.0, *smoothed(self.loss_rise, self.kl, self.tokens)
        return smoothed((self.unmasked[0], *self.loss_rise), (self.unmasked[1], *self.kl), self.tokens)

    def rise_at(self, sparsity: float) -> float:
        """Predicted relative rise of perplexity at a model sparsity."""
        masked = math.exp(min(self._log_loss(math.log(sparsity)), 700.0)) if sparsity > 0 else 0.0
        return math.expm1(min(self.base + masked, 700.0))

    def error_at(self, sparsity: float) -> float:
        """Standard error of `rise_at`: 0.004 is 0.4 points; 0 where nothing was measured.

        A rise is drawn to what the divergence says as its noise demands (`smoothed`): what sequences differ by counts as far as
        the rise itself is trusted, and what the ratio of the two differs by as far as it is not.
        """
        if sparsity <= 0 or not self.tokens:
            return 0.0
        kl = np.maximum(self.kl, 1e-9)
        noise = _noise(kl, self.tokens)
        trusted = _SPREAD**2 / (_SPREAD**2 + noise)
        seen = np.square(self.errors / kl) if self.errors else noise
        off = kl * np.sqrt(trusted**2 * seen + ((1 - trusted) * _SPREAD) ** 2)
        at = np.interp(math.log(sparsity), np.log(self.anchors), np.log(off))
        return float((1 + self.rise_at(sparsity)) * math.exp(at))

    def sparsity_for(self, rise: float) -> float:
        """The largest model sparsity whose predicted rise of perplexity is at most `rise`; not above the last anchor."""
        left = math.log1p(rise) - self.base
        if left <= 0:
            return 0.0
        low, high = -_FAR, math.log(self.anchors[-1])
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._log_loss(middle) < math.log(left) else (low, middle)
        return math.exp(high)

    def choose(self, rise: float) -> float:
        """`sparsity_for`, in whole percent; the rise counts on top of what quantizing the weights costs."""
        return whole(self.sparsity_for((1 + rise) * math.exp(self.base) - 1))

    def achieved_at(self, sparsity: float) -> float:
        """Model sparsity to expect where `sparsity` is asked: the difference is that of the anchors around it."""
        off = np.interp(sparsity, self.anchors, np.subtract(self.achieved, self.anchors))
        return float(sparsity + off) if sparsity > 0 else 0.0

    def _log_loss(self, log_sparsity: float) -> float:
        """Logarithm of the rise of the loss that masks alone make: a smooth curve through the anchors, powers beside them."""
        xs, ys, found = self._curve
        low, high = np.clip(found[[0, -1]], *_POWERS)
        beside = low * min(log_sparsity - xs[0], 0.0) + high * max(log_sparsity - xs[-1], 0.0)
        return curve(log_sparsity, xs, ys, found) + float(beside)

    @cached_property
    def _curve(self) -> tuple[list[float], list[float], Values]:
        """Logarithms of sparsities and loss rises, and the curve's slopes there."""
        xs = [math.log(a) for a in self.anchors]
        ys = [math.log(max(value - self.base, 1e-9 * (i + 1))) for i, value in enumerate(self.loss)]
        return xs, ys, slopes(xs, ys) if len(xs) > 1 else np.array([_POWER])


@dataclass(frozen=True)
class Verdict:
    """What to expect of a calibrated checkpoint.

    Attributes:
        sparsity: the model sparsity that it is calibrated for.
        limit: the rise of perplexity that chose it; None where the sparsity was asked for.
        rise: predicted relative rise of perplexity there: 0.05 is 5 %.
        rises: the same at the sparsities of `SHOWN`, by their text.
        sparsity_for: largest sparsities for the rises of `ASKED_RISES`, by their text; never above the last anchor.
        achieved: share of inputs dropped on the held-out text where `sparsity` is asked.
        read_fraction: bytes of weights read for a token over the dense model's, lm_head and run-time matrices included.
        speedup: how many times as fast decoding one sequence can be, where only bytes count.
        tokens: held-out tokens that this comes from; 0 where it is predicted from curves alone.
        data: the held-out text.
        quantizing: what quantizing the weights alone costs of `rise`, which is over the original model; not stored here.
        quick: whether it comes from a first look; not stored here.
        error: standard error of `rise`, by how held-out sequences differ; not stored here, and neither are
        errors: those of `rises`.
    """

    sparsity: float
    limit: float | None
    rise: float
    rises: dict[str, float]
    sparsity_for: dict[str, float]
    achieved: float
    read_fraction: float
    speedup: float
    tokens: int
    data: tuple[str, ...]
    quantizing: float = 0.0
    quick: bool = False
    error: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        held: HeldOut,
        cells: Cells,
        sparsity: float,
        limit: float | None = None,
        budget: Callable[[float], ArrayLike] = float,
    ) -> Verdict:
        """From what was measured.

        Args:
            held: that.
            cells: the model's, as they are stored.
            sparsity: asked for.
            limit: rise that it was chosen for.
            budget: (layers, sites) sparsities at a model sparsity; of no matter where all sites have the same bits.
        """
        achieved = held.achieved_at(sparsity)
        read = cells.read_fraction_at(achieved if cells.site_bits is None else budget(min(max(achieved, 0.0), 0.999)))
        return cls(
            sparsity=sparsity,
            limit=limit,
            rise=held.rise_at(sparsity),
            rises={f"{s:g}": held.rise_at(s) for s in SHOWN},
            sparsity_for={f"{r:g}": held.sparsity_for(r) for r in ASKED_RISES},
            achieved=achieved,
            read_fraction=read,
            speedup=1 / read,
            tokens=held.tokens,
            data=held.data,
            **_beside(held, sparsity),
        )

    def to_json(self) -> dict[str, Any]:
        """For people's programs: what is stored and the standard errors."""
        return self.to_dict() | {"error": self.error, "errors": self.errors}

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return {name: value for name, value in asdict(self).items() if name not in _DERIVED} | {"data": list(self.data)}

    @classmethod
    def from_facts(cls, provenance: Mapping[str, Any]) -> Verdict | None:
        """The verdict kept in a checkpoint; None where there is none, or something else in its place."""
        raw = provenance.get(VERDICT)
        if not isinstance(raw, dict) or set(raw) != {f.name for f in fields(cls)} - set(_DERIVED):
            return None
        numbers = [raw[name] for name in ("sparsity", "rise", "achieved", "read_fraction", "speedup", "tokens")]
        maps = [raw["rises"], raw["sparsity_for"]]
        known = [tuple(f"{value:g}" for value in keys) for keys in (SHOWN, ASKED_RISES)]
        if not all(isinstance(m, dict) and tuple(m) == keys for m, keys in zip(maps, known, strict=True)):
            return None
        numbers += [value for m in maps for value in m.values()] + ([] if raw["limit"] is None else [raw["limit"]])
        if not all(isinstance(n, int | float) and abs(n) < 1e300 for n in numbers) or not isinstance(raw["data"], list):
            return None
        held = HeldOut.from_dict(provenance.get(HELD_OUT))
        beside = {} if held is None else _beside(held, raw["sparsity"])
        return cls(**raw | beside | {"quick": provenance.get(QUICK) is True} | {"data": tuple(map(str, raw["data"]))})

    @property
    def warning(self) -> str | None:
        """What to say where the model loses much; None elsewhere."""
        if self.rise <= TOO_MUCH:
            return None
        if self.limit is not None and not self.reaches("0.05"):  # --max-ppl-rise counts on top of it
            masks = (1 + self.rise) / (1 + self.quantizing) - 1
            return (
                f"perplexity is expected to rise by {_rise(self.rise)}: {self.alone.lower()}, and the "
                f"{share(self.sparsity)} sparsity chosen {_rise(masks)} on top. {self._cheaper[0].upper()}{self._cheaper[1:]}"
            )
        better = self.sparsity_for["0.05"]
        return (
            f"perplexity is expected to rise by {_rise(self.rise)} at {share(self.sparsity)} sparsity: much of the "
            f"model's quality is lost. "
            + (
                f"{share(whole(better))} sparsity costs about 5 %"
                if self.reaches("0.05")
                else f"{self.alone}: {self._cheaper}"
            )
        )

    @property
    def _cheaper(self) -> str:
        """What costs less than these quantized weights."""
        return f"{'more text (without --quick), ' if self.quick else ''}{CHEAPER}"

    @property
    def alone(self) -> str:
        """What quantizing costs without any sparsity, in words."""
        return f"Quantizing alone costs {_rise(self.quantizing)}"

    def reaches(self, rise: str) -> bool:
        """Whether a rise of `sparsity_for` is more than what quantizing alone costs."""
        return not self.quantizing or self.sparsity_for[rise] > 0

    def text(self) -> str:
        """For people."""
        return table(["", ""], self.rows())

    def rows(self) -> list[list[str]]:
        """For people, what and how much."""
        costs = ", ".join(
            f"{percent(float(s), 0)}: +{_rise(r)}{give_or_take(self.errors.get(s, 0.0))}" for s, r in self.rises.items()
        )
        shares = ", ".join(
            f"+{percent(float(r), 0)}: {share(whole(s)) if self.reaches(r) else 'none'}"
            for r, s in self.sparsity_for.items()
        )
        source = (
            f"{self.tokens:,} tokens of {', '.join(self.data)}" if self.tokens else "predicted from the loss curves"
        )
        rows = [
            [
                "expected rise of perplexity",
                f"+{_rise(self.rise)}{give_or_take(self.error)} at {share(self.sparsity)} sparsity",
            ],
            ["at other sparsities", costs],
            ["sparsity for a rise of", shares],
            [
                "decoding, one sequence",
                f"{self.speedup:.2f} times as fast by what is read alone, {percent(self.read_fraction, 0)} of the weights' bytes",
            ],
            ["held-out text", f"{source}; {OTHER_TEXT}"],
        ]
        if self.quantizing:
            told = f"+{_rise(self.quantizing)}; it is in the rises above, which are over the original model"
            rows.insert(3, ["quantizing alone", told])
        if self.quick:
            rows.append(["how sure", A_FIRST_LOOK])
        if abs(self.achieved - self.sparsity) > OFF:
            off = f"{percent(self.achieved)} of the inputs there, {share(self.sparsity)} asked: that text differs"
            rows.append(["dropped", off])
        return rows


def _beside(held: HeldOut, sparsity: float) -> dict[str, Any]:
    """What of a verdict is not stored with it."""
    errors = {f"{s:g}": held.error_at(s) for s in SHOWN}
    return {"quantizing": held.base_rise, "error": held.error_at(sparsity), "errors": errors}


def smoothed(loss: Sequence[float], kl: Sequence[float], tokens: int) -> tuple[float, ...]:
    """Rises of the loss (nats a token) as far as their noise allows, positive and ascending.

    A divergence is a mean of positive terms and known far better than a rise of the loss, whose variance is twice the divergence
    over the tokens. The ratio of the two is alike at all sparsities, so each is drawn to their mean as its noise demands.
    """
    divergence = np.maximum(np.asarray(kl, dtype=np.float64), 1e-9)
    ratio = np.asarray(loss, dtype=np.float64) / divergence
    noise = _noise(divergence, tokens)
    weight = 1 / (noise + _SPREAD**2)
    common = float(np.clip((weight * ratio).sum() / weight.sum(), 0.3, 3.0))
    trusted = _SPREAD**2 / (_SPREAD**2 + noise)
    rises = np.maximum(divergence * (trusted * ratio + (1 - trusted) * common), divergence * 0.2)
    steps = np.maximum.accumulate(rises) * (1 + 1e-6 * np.arange(len(rises)))  # equal ones would have no order
    return tuple(steps.tolist())


def _noise(divergence: Values, tokens: int) -> Values:
    """Variance of the ratio of a measured loss rise and the divergence."""
    found: Values = 2 * _CORRELATED / (max(tokens, 1) * divergence)
    return found


def _rise(value: float) -> str:
    """`0.0213` -> `2.1 %`, `0.32` -> `32 %`."""
    return percent(value, 1 if value < 0.0995 else 0) if value < 100 else f"{100 * value:.1e} %"
