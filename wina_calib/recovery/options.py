"""The options of a recovery, defined once: Python arguments, command line flags and their help all come from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wina_calib.calibration.options import check_names, option
from wina_calib.corpus.sources import check_spec, data_specs
from wina_calib.errors import UsageError

SELF = "self"  # data that the dense model writes itself
TRAINED = ("auto", "all", "sharded", "adapters")
# Weights, and the highest learning rate that hurt no model of that size at any sparsity tried.
LEARNING_RATES = ((3e8, 1e-4), (1e9, 3e-5), (4e9, 1e-5), (float("inf"), 5e-6))
ADAPTER_FACTOR = 10  # low-rank adapters start at zero and bear more


@dataclass(frozen=True)
class RecoverOptions:
    """Options of `wina-calib recover` and `wina_calib.recover`."""

    base: str | None = option(
        None, "The dense model to learn from; None is the one that the checkpoint was made from.", metavar="MODEL"
    )
    data: tuple[str, ...] = option(
        (),
        "Training text, as for calibrate, or `self`: text that the dense model writes. The calibration's by default.",
        multiple=True,
        metavar="SPEC",
    )
    tokens: int = option(
        2_500_000, "Tokens to train on; the text is gone through again where it is shorter.", metavar="N"
    )
    seq_len: int = option(1024, "Tokens a sequence.", metavar="N")
    batch: int = option(8, "Sequences a step.", metavar="N")
    sparsities: tuple[float, ...] = option(
        (), "Model sparsities trained in turn; the checkpoint's own by default.", metavar="S,S,..."
    )
    turns: tuple[int, ...] = option(
        (),
        "How many steps in a row each of the sparsities gets, from the lowest on; one by default.",
        metavar="N,N,...",
        counts=True,
    )
    hidden: float = option(
        1.0, "Weight of the layers' hidden states in the loss, beside the divergence of predictions.", metavar="W"
    )
    lr: float = option(0.0, "Highest learning rate; 0 chooses by the model's size.", metavar="RATE")
    train: str = option(
        "auto",
        "What is trained: all decoder weights; where memory is short, these spread over the processes of torchrun, or low-rank "
        "adapters.",
        choices=TRAINED,
    )
    rank: int = option(64, "Rank of adapters.", metavar="N")
    bits: int = option(
        0, "Quantize in the last part of the training and afterwards: 4 or 8; 0 does not.", metavar="BITS"
    )
    group_size: int = option(64, "Outputs that share a scale at 4 bits: 64 or 32.", metavar="N")
    tasks: tuple[str, ...] = option(
        (),
        "File of tasks that are solved before and after: JSON lines with query, choices and gold, or with context and "
        "continuation.",
        multiple=True,
        metavar="FILE",
    )
    task_items: int = option(200, "Items of each file of tasks, from its beginning; 0 takes all.", metavar="N")
    max_time: float = option(0.0, "Minutes of training at most; 0 sets no limit.", metavar="MINUTES")
    seed: int = option(0, "Seed of every random choice.", metavar="N")
    device: str = option("auto", "Compute device: auto, cpu, cuda, cuda:1 ...", metavar="DEVICE")
    micro_batch: int = option(0, "Sequences computed together; 0 chooses by memory.", metavar="N")
    overwrite: bool = option(False, "Replace an existing output folder.")
    restart: bool = option(False, "Drop the state of a run that was stopped, and start over.")
    trust_remote_code: bool = option(False, "Run Python code that the model folder brings. Read it first.")

    def __post_init__(self) -> None:
        problems = [
            (self.tokens >= self.seq_len, f"tokens is {self.tokens}; expected at least one sequence of {self.seq_len}"),
            (self.seq_len >= 16, f"seq-len is {self.seq_len}; expected at least 16"),
            (self.batch >= 1, f"batch is {self.batch}; expected at least 1"),
            (
                all(isinstance(s, int | float) and 0 < s < 1 for s in self.sparsities),
                f"sparsities are {self.sparsities}; expected numbers in (0, 1)",
            ),
            (
                not self.turns or (len(self.turns) == len(self.sparsities) and min(self.turns) >= 1),
                f"turns are {self.turns}; expected a number from 1 on for each of the sparsities {self.sparsities}",
            ),
            (0 <= self.hidden < 1e6, f"hidden is {self.hidden}; expected a number from 0 on"),
            (self.task_items >= 0, f"task-items is {self.task_items}; expected 0 or more"),
            (0 <= self.lr < 1, f"lr is {self.lr}; expected a number in [0, 1)"),
            (self.train in TRAINED, f"train is {self.train!r}; expected one of {', '.join(TRAINED)}"),
            (self.rank >= 1, f"rank is {self.rank}; expected at least 1"),
            (self.bits in (0, 4, 8), f"bits is {self.bits}; expected 0, 4 or 8"),
            (self.group_size in (32, 64), f"group-size is {self.group_size}; expected 32 or 64"),
            (self.group_size == 64 or self.bits == 4, "group-size has no meaning without --bits 4"),
            (self.max_time >= 0, f"max-time is {self.max_time}; expected 0 or more minutes"),
            (self.micro_batch >= 0, f"micro-batch is {self.micro_batch}; expected 0 or more"),
            (SELF not in self.data or self.data == (SELF,), f"data {SELF} goes with no other data"),
        ]
        wrong = [message for fine, message in problems if not fine]
        if wrong:
            raise UsageError("; ".join(wrong) + ".")
        for spec in self.data:
            if spec != SELF:
                check_spec(spec)

    @property
    def in_turn(self) -> tuple[float, ...]:
        """The sparsities of a round of steps."""
        turns = self.turns or (1,) * len(self.sparsities)
        return tuple(s for s, n in zip(self.sparsities, turns, strict=True) for _ in range(n))

    def learning_rate(self, weights: int, *, adapters: bool) -> float:
        """The highest learning rate for a model of so many weights."""
        chosen = next(rate for most, rate in LEARNING_RATES if weights <= most)
        return self.lr or chosen * (ADAPTER_FACTOR if adapters else 1)


def make_options(values: dict[str, Any]) -> RecoverOptions:
    """Build options from Python keyword arguments, forgiving about single values and paths.

    Raises:
        UsageError: a name is not an option, or a value is out of range.
    """
    check_names(RecoverOptions, values)
    sparsities = values.get("sparsities", ())
    sparsities = (sparsities,) if isinstance(sparsities, int | float) else tuple(sparsities)
    data, tasks = values.get("data") or (), values.get("tasks") or ()
    plain = {
        "data": data_specs(data) if data else (),
        "sparsities": tuple(sorted(sparsities)),
        "turns": tuple(values.get("turns", ())),
        "tasks": (str(tasks),) if isinstance(tasks, str | Path) else tuple(map(str, tasks)),
    }
    return RecoverOptions(**values | plain)
