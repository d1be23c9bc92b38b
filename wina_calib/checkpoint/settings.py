"""What config.json says of a calibration: the `quantization_config` of a checkpoint."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from wina_calib.checkpoint.facts import INTERPOLATED, sound_facts
from wina_calib.choices import BITS, FIRST_TOKEN, GROUP_SIZES, MASKS, PREFILL, SCORES, SELECT, is_sparsity
from wina_calib.errors import CheckpointError
from wina_calib.masks.rule import MaskRule
from wina_calib.model.architecture import Layer, Site
from wina_calib.model.folder import METHOD
from wina_calib.quantization.bits import UNQUANTIZED_BITS
from wina_calib.quantization.formats import WeightFormat

FORMAT_VERSION = "1.0"
SAMPLES = 32  # elements of each projection's weight that are stored
QUANTIZED_VERSION = "2.0"  # of checkpoints with quantized weights, the newest that is read
_QUANTIZED = ("bits", "group_size", "zero_point", "head_bits", "modules_to_not_convert")


@dataclass(frozen=True)
class Settings:
    """A calibration's settings, one to one the JSON object in config.json (with `quant_method` added)."""

    sparsity: float  # model sparsity asked for; the stored thresholds are those for it
    anchors: tuple[float, ...]  # ascending model sparsities at which tables and budget are stored; see `fitted_anchors`
    score: str = "wina"  # how inputs are scored
    masks: str = "shared"  # one mask a site or one a projection
    exponent: float = 1.0  # power of the column norms in the score
    transform: str = "none"  # resolved orthogonal transform
    budget: str = "uniform"  # how site sparsities were chosen
    prefill: str = "sparse"  # whether inputs that fill an empty cache are masked too
    select: str = "threshold"  # whether scores above a threshold are kept, or each token's highest
    first_token: str = "dense"  # whether the first token of a sequence is computed densely
    # site sparsities at which predicted loss curves are stored; empty where there are none
    curve_levels: tuple[float, ...] = ()
    weights: str = ""  # fingerprint of the weights that this belongs to
    # elements of each projection's weight that are stored, to know the weights by when they are loaded
    samples: int = 0
    whole_layers: bool = False  # whether elements of the layers' other parameters are stored too
    # rows that the embedding had, where elements of what lies outside of the layers are stored too; else 0
    vocab: int = 0
    # base model, data, seed, versions, command, dense perplexity
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: str = FORMAT_VERSION  # version of the format, `major.minor`
    bits: int = UNQUANTIZED_BITS  # of the sites' weights: 4, 8, or 16 where they are not quantized
    group_size: int = 64  # outputs that share a scale at 4 bits
    zero_point: bool = True  # whether such a group has a zero of its own
    head_bits: int = UNQUANTIZED_BITS  # of lm_head's weights, and of the embedding's where it is tied: 8, or 16
    # projections that are left as they are where the others are quantized, whole sites of them
    modules_to_not_convert: tuple[str, ...] = ()

    @property
    def rule(self) -> MaskRule:
        """How masks are made."""
        return MaskRule(self.score, self.masks, self.exponent, self.transform, self.select, self.first_token)

    @property
    def base_model(self) -> str:
        """What the base model was called; `unknown` where the provenance does not say."""
        name = self.provenance.get("base_model")
        return name if isinstance(name, str) else "unknown"

    @property
    def data(self) -> tuple[str, ...]:
        """Data specs of the calibration text; empty where the provenance does not say."""
        specs = self.provenance.get("data")
        return tuple(spec for spec in specs if isinstance(spec, str)) if isinstance(specs, list | tuple) else ()

    @property
    def weight_format(self) -> WeightFormat | None:
        """How the sites' weights are quantized; None where they are not."""
        return None if self.bits == UNQUANTIZED_BITS else WeightFormat(self.bits, self.group_size, self.zero_point)

    @property
    def weights_name(self) -> str | None:
        """What the sites' quantized weights are called: `int4`, `int8`; None where they are not quantized."""
        return None if self.bits == UNQUANTIZED_BITS else f"int{self.bits}"

    def format_of(self, layer: Layer, site: Site) -> WeightFormat | None:
        """How the weights of one site are quantized; None where they are not."""
        kept = f"{layer.prefix}{site.projections[0].module}" in self.modules_to_not_convert
        return None if kept else self.weight_format

    @property
    def seq_len(self) -> int:
        """Tokens of a calibration block; 2048 where the provenance does not say."""
        return int(self.provenance.get("seq_len", 2048))

    @property
    def has_kernels(self) -> bool:
        """Whether masks are those that the fast kernels make: scores from magnitudes, above a threshold."""
        return self.select == "threshold" and self.score in ("wina", "teal")

    @property
    def fitted_anchors(self) -> tuple[float, ...]:
        """The anchors at which thresholds were fitted: not those that a budget chosen later put between or beyond them."""
        named = self.provenance.get(INTERPOLATED)
        return tuple(a for a in self.anchors if not isinstance(named, list | tuple) or a not in named) or self.anchors

    def unfitted(self, sparsity: float) -> str | None:
        """What to tell of a model sparsity above those that thresholds were fitted at; None up to there, as 0 drops nothing."""
        highest = self.fitted_anchors[-1]
        if sparsity <= highest:
            return None
        return (
            f"sparsity {sparsity:g} lies above {highest:g}, the highest at which thresholds were fitted. Calibrate "
            "with it in --grid, or fit it with `wina-calib budget DIR --sparsity S --apply DIR --refit`."
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if self.weight_format is None:
            values = {k: v for k, v in values.items() if k not in _QUANTIZED}
        return {"quant_method": METHOD} | values

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Settings:
        """Read and check the JSON object.

        Raises:
            CheckpointError: a value is missing or wrong, or the format is of a newer major version.
        """
        version = str(raw.get("format_version", ""))
        major = version.partition(".")[0]
        if not re.fullmatch("[0-9]{1,4}", major):
            raise CheckpointError(
                f"quantization_config: format_version is {version!r:.40}, expected {FORMAT_VERSION!r}."
            )
        if int(major) > int(QUANTIZED_VERSION.partition(".")[0]):
            raise CheckpointError(
                f"the checkpoint has format {version:.40}, this wina_calib reads up to {QUANTIZED_VERSION}. "
                "Update: pip install -U wina-calib."
            )
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in known}
        if isinstance(values.get("provenance"), dict):
            values["provenance"] = sound_facts(values["provenance"])
        try:
            settings = cls(**values)
        except TypeError as error:
            raise CheckpointError(f"quantization_config: {error}. Calibrate again.") from error
        settings.check()
        return settings

    def check(self) -> None:
        """Raise CheckpointError where a value is out of its range."""
        problems = [
            (is_sparsity(self.sparsity), f"sparsity is {self.sparsity!r:.80}, expected a number in [0, 1)"),
            (
                isinstance(self.anchors, tuple)
                and len(self.anchors) > 0
                and all(map(is_sparsity, self.anchors))
                and list(self.anchors) == sorted(set(self.anchors)),
                f"anchors are {self.anchors!r:.80}, expected ascending numbers in [0, 1)",
            ),
            (isinstance(self.exponent, int | float) and abs(self.exponent) < 1e9, f"exponent is {self.exponent!r:.80}"),
            (
                isinstance(self.curve_levels, tuple) and all(map(is_sparsity, self.curve_levels)),
                f"curve_levels are {self.curve_levels!r:.80}, expected numbers in [0, 1)",
            ),
            (isinstance(self.provenance, dict), "provenance is not an object"),
            (
                type(self.samples) is int and self.samples in (0, SAMPLES),
                f"samples is {self.samples!r:.80}, expected 0 or {SAMPLES}",
            ),
            (type(self.vocab) is int and self.vocab >= 0, f"vocab is {self.vocab!r:.80}, expected a number of rows"),
            (type(self.whole_layers) is bool, f"whole_layers is {self.whole_layers!r:.80}, expected true or false"),
            (
                isinstance(self.modules_to_not_convert, tuple)
                and all(isinstance(name, str) for name in self.modules_to_not_convert),
                f"modules_to_not_convert is {self.modules_to_not_convert!r:.80}, expected names of projections",
            ),
            (isinstance(self.weights, str), f"weights is {self.weights!r:.80}, expected a fingerprint"),
            (isinstance(self.budget, str), f"budget is {self.budget!r:.80}"),
            (isinstance(self.transform, str), f"transform is {self.transform!r:.80}"),
        ]
        problems += [
            (value in known, f"{name} is {value!r:.80}, expected one of {', '.join(known)}")
            for name, value, known in (
                ("score", self.score, SCORES),
                ("masks", self.masks, MASKS),
                ("prefill", self.prefill, PREFILL),
                ("select", self.select, SELECT),
                ("first_token", self.first_token, FIRST_TOKEN),
            )
        ]
        problems += [
            (type(value) is int and value in known, f"{name} is {value!r:.80}, expected {' or '.join(map(str, known))}")
            for name, value, known in (
                ("bits", self.bits, (*BITS, UNQUANTIZED_BITS)),
                ("group_size", self.group_size, GROUP_SIZES),
                ("head_bits", self.head_bits, (8, UNQUANTIZED_BITS)),
            )
        ]
        problems.append(
            (type(self.zero_point) is bool, f"zero_point is {self.zero_point!r:.80}, expected true or false")
        )
        wrong = [message for fine, message in problems if not fine]
        if wrong:
            raise CheckpointError(f"quantization_config of config.json: {'; '.join(wrong)}. Calibrate again.")
