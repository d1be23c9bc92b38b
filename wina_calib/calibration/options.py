"""The options of a calibration, defined once: Python arguments, command line flags and their help all come from here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from wina_calib.choices import (
    BITS,
    BUDGET_FILES,
    BUDGETS,
    DTYPES,
    FIRST_TOKEN,
    GROUP_SIZES,
    MASKS,
    PREFILL,
    SCORES,
    SELECT,
    TRANSFORMS,
    is_sparsity,
)
from wina_calib.corpus.sources import check_spec, data_specs
from wina_calib.errors import UsageError

WEIGHTS = ("full", "reference")
LOOPS = ("closed", "open")
DEFAULT_ANCHORS = (0.2, 0.4, 0.65)
QUICK = {"samples": 12, "grid": (0.25, 0.5)}  # what --quick takes in place of the defaults
# Options that say where, how and from where a calibration is made; what comes out does not depend on their words.
OPERATIONAL = frozenset(
    {"overwrite", "restart", "keep_state", "device", "micro_batch", "revision", "trust_remote_code"}
)


def option(default: Any, help: str, **extra: Any) -> Any:
    """Declare an option: its default, its help, and for the command line `choices`, `flag`, `multiple`, `share` or `metavar`."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of `wina-calib calibrate` and `wina_calib.calibrate`."""

    sparsity: float | None = option(
        None,
        "Model sparsity to calibrate for, in [0, 1); by default the largest within --max-ppl-rise.",
        flag="-s",
        metavar="S",
        share=True,
    )
    max_ppl_rise: float = option(
        0.05,
        "Rise of perplexity over the dense model's that chooses the sparsity; with --bits over the quantized model's.",
        metavar="R",
        share=True,
    )
    quick: bool = option(
        False, "A first look: a third of the text and fewer sparsities. A calibration without it usually bears more."
    )
    transform: str = option(
        "auto",
        "Orthogonal transform of the weights; auto takes the best one without run-time cost that is exact here.",
        choices=(*TRANSFORMS, "residual"),
    )
    budget: str = option(
        "global",
        "How sparsity is spread over sites: global (least predicted loss), uniform, greedy (the "
        "papers', slow), a budget file, which sets the sparsity too, or another checkpoint of the model, whose spread is "
        "taken at every sparsity.",
        metavar="NAME|FILE|DIR",
    )
    min: tuple[str, ...] = option(
        (),
        "Lowest sparsity of a site, for all or for a pattern: layers.0-3.*=0.1.",
        multiple=True,
        metavar="[PATTERN=]S",
    )
    max: tuple[str, ...] = option(
        (), "Highest sparsity of a site, likewise; 0.95 by default.", multiple=True, metavar="[PATTERN=]S"
    )
    grid: tuple[float, ...] = option(
        DEFAULT_ANCHORS, "Model sparsities, besides the asked one, at which thresholds are fitted.", metavar="S,S,..."
    )
    data: tuple[str, ...] = option(
        (),
        "Calibration text: builtin, builtin:chat, a catalogue name, hub:NAME[:config][:split][:column], or a file or folder of "
        "text, source code, .jsonl or .parquet; rows of messages are rendered by the chat template. Repeat to mix evenly. By "
        "default builtin, for a model with a chat template builtin:chat too.",
        multiple=True,
        metavar="SPEC",
    )
    samples: int = option(36, "Blocks of text; at least 8,000 tokens in all, 6,000 with --quick.", metavar="N")
    seq_len: int = option(512, "Tokens a block; cut to what the model takes.", metavar="N")
    seed: int = option(0, "Seed of every random choice.", metavar="N")
    score: str = option("wina", "What is compared with the threshold.", choices=SCORES)
    masks: str = option("shared", "One mask a site, or the papers' one a projection.", choices=MASKS)
    exponent: float = option(1.0, "Power of the column norms in the score.", metavar="P")
    select: str = option(
        "threshold",
        "What is kept: scores above a threshold, or each token's highest (topk; exact sparsity, but no fast kernel).",
        choices=SELECT,
    )
    loop: str = option(
        "closed", "Fit thresholds on what the sparse model computes, or on the dense model's inputs.", choices=LOOPS
    )
    first_token: str = option(
        "dense", "Whether the first token of a sequence is computed densely, or masked too.", choices=FIRST_TOKEN
    )
    prefill: str = option("sparse", "Whether prompts are masked too, or computed densely.", choices=PREFILL)
    bits: int = option(
        0,
        "Quantize the sites' weights, and lm_head's to 8 bits: 4 (GPTQ, scales in groups) or 8; 0 leaves them as they are.",
        metavar="0|4|8",
    )
    group_size: int = option(64, "Outputs that share a scale at 4 bits: 64, or 32 for small models.", metavar="64|32")
    symmetric: bool = option(
        False, "At 4 bits, groups without a zero of their own: 1.5 % fewer bits (3 % of groups of 32)."
    )
    keep_head: bool = option(False, "Leave lm_head, and an embedding tied to it, as it is where weights are quantized.")
    keep_16_bit: tuple[str, ...] = option(
        (),
        "Sites whose weights are left as they are where the others are quantized, by pattern: layers.*.attn_*, layers.0.*.",
        multiple=True,
        metavar="PATTERN",
    )
    weights: str = option(
        "full",
        "Write the weights too, or only refer to the base model's (a few megabytes; needs transform none).",
        choices=WEIGHTS,
    )
    device: str = option("auto", "Compute device: auto, cpu, cuda, cuda:1 ...", metavar="DEVICE")
    dtype: str = option("auto", "Compute dtype; auto is the model's on a GPU, float32 on a CPU.", choices=DTYPES)
    micro_batch: int = option(0, "Blocks computed together; 0 chooses by length.", metavar="N")
    overwrite: bool = option(False, "Replace an existing output folder.")
    restart: bool = option(False, "Drop the state of a run that was stopped, and start over.")
    keep_state: bool = option(False, "Keep the state when done; it is in .NAME.state beside the output folder NAME.")
    revision: str | None = option(None, "Branch, tag or commit of a Hub model.", metavar="REV")
    trust_remote_code: bool = option(False, "Run Python code that the model folder brings. Read it first.")

    def __post_init__(self) -> None:
        problems = [
            (
                self.sparsity is None or is_sparsity(self.sparsity),
                f"sparsity is {self.sparsity!r:.80}; expected a number in [0, 1)",
            ),
            (
                all(0.0 < s < 1.0 for s in self.grid),
                f"grid is {', '.join(map(str, self.grid))}; expected numbers in (0, 1)",
            ),
            (
                isinstance(self.max_ppl_rise, int | float) and 0.0 < self.max_ppl_rise < math.inf,
                f"max-ppl-rise is {self.max_ppl_rise!r:.80}; expected a number above 0, such as 0.05",
            ),
            (
                _is_budget(self.budget),
                f"budget is {str(self.budget)!r:.80}; expected {', '.join(BUDGETS)}, a budget file that ends in one of "
                f"{', '.join(BUDGET_FILES)}, or the folder of a calibrated checkpoint",
            ),
            (self.samples >= 1, f"samples is {self.samples}; expected at least 1"),
            (self.seq_len >= 16, f"seq-len is {self.seq_len}; expected at least 16"),
            (0 <= self.seed < 1 << 32, f"seed is {self.seed}; expected a whole number from 0 to {(1 << 32) - 1}"),
            (self.micro_batch >= 0, f"micro-batch is {self.micro_batch}; expected 0 or more"),
            (0.0 <= self.exponent < math.inf, f"exponent is {self.exponent}; expected a number from 0 up"),
            (self.bits in (0, *BITS), f"bits is {self.bits}; expected 0, 4 or 8"),
            (self.group_size in GROUP_SIZES, f"group-size is {self.group_size}; expected 32 or 64"),
            (self.group_size == 64 or self.bits == 4, "group-size has no meaning without --bits 4"),
            (not self.symmetric or self.bits == 4, "symmetric has no meaning without --bits 4"),
            (not self.keep_head or self.bits > 0, "keep-head has no meaning without --bits"),
            (not self.keep_16_bit or self.bits > 0, "keep-16-bit has no meaning without --bits"),
            (not self.bits or self.loop == "closed", "weights are quantized in closed loop; leave --loop open out"),
            (
                not self.bits or self.weights == "full",
                "quantized weights cannot stay in the base model; leave --weights reference or --bits out",
            ),
        ]
        problems += [
            (value in choices, f"{name} is {value!r}; expected one of {', '.join(choices)}")
            for name, value, choices in self._choices()
        ]
        wrong = [message for fine, message in problems if not fine]
        if wrong:
            raise UsageError("; ".join(wrong) + ".")
        for spec in self.data:
            check_spec(spec)

    @property
    def anchors(self) -> tuple[float, ...]:
        """Ascending model sparsities at which thresholds are fitted: the grid and the asked one."""
        asked = (self.sparsity,) if self.sparsity else ()
        return tuple(sorted({*self.grid, *asked})) or DEFAULT_ANCHORS

    def _choices(self) -> Sequence[tuple[str, Any, tuple[str, ...]]]:
        return [
            (f.name.replace("_", "-"), getattr(self, f.name), f.metadata["choices"])
            for f in fields(self)
            if "choices" in f.metadata
        ]


def _is_budget(value: str | Path) -> bool:
    """Whether a value can name a budget: one of `BUDGETS`, a file by its ending, or a folder."""
    path = Path(value)
    return value in BUDGETS or path.suffix.lower() in BUDGET_FILES or path.is_dir()


def check_names(options: type, values: Iterable[str]) -> None:
    """Raise UsageError unless all are names of fields of a dataclass of options."""
    known = {f.name for f in fields(options)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}.")


def make_options(values: dict[str, Any]) -> CalibrateOptions:
    """Build options from Python keyword arguments, forgiving about single values and paths.

    Raises:
        UsageError: a name is not an option, or a value is out of range.
    """
    check_names(CalibrateOptions, values)
    if values.get("quick"):
        defaults = {f.name: f.default for f in fields(CalibrateOptions)}
        values = values | {
            name: own for name, own in QUICK.items() if values.get(name, defaults[name]) == defaults[name]
        }
    grid = values.get("grid", DEFAULT_ANCHORS)
    try:
        grid = (float(grid),) if isinstance(grid, str | int | float) else tuple(map(float, grid))
    except (TypeError, ValueError):
        raise UsageError(f"grid is {grid!r:.80}; expected numbers in (0, 1), such as (0.25, 0.5).") from None
    values = values | {"data": data_specs(values.get("data")), "grid": grid}
    for name in ("min", "max", "keep_16_bit"):
        given = values.get(name, ())
        values[name] = (str(given),) if isinstance(given, str | int | float) else tuple(map(str, given))
    return CalibrateOptions(**values)
