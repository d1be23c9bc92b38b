"""What a recovery will take, and whether memory can hold it: from shapes alone, before the work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wina_calib.common.memory import available_bytes
from wina_calib.common.text import human_bytes
from wina_calib.errors import UsageError
from wina_calib.recovery.options import RecoverOptions

# Bytes a trained weight: float32 itself, its gradient, and Adam's two means.
TRAINED_BYTES = 16
# Floats a token that a layer keeps while it is computed again: of the residual stream's width, and of the MLP's.
LAYER_FLOATS = 14, 6
SPARE = 0.9
FULL = 4096  # tokens computed together that keep a device busy


@dataclass(frozen=True)
class Size:
    """What memory depends on."""

    weights: int  # all weights of the model, tied ones once
    trained: int  # those of the decoder's projections
    projections: int  # sum over projections of inputs and outputs, for adapters
    layers: int  # decoder layers
    width: int  # of the residual stream
    inner: int  # of the MLP
    vocabulary: int  # tokens
    itemsize: int  # bytes of a weight as stored


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained, and how."""

    adapters: bool  # low-rank adapters, else all decoder weights
    micro_batch: int  # sequences computed together
    again: bool  # layers are computed again in the backward pass, as memory cannot hold what they leave behind
    steps: int  # optimizer steps
    memory_bytes: int  # what all that needs
    learning_rate: float  # the highest
    sharded: bool = False  # decoder weights are spread over the processes

    def describe(self, options: RecoverOptions, available: int) -> str:
        """The plan in one line."""
        what = f"adapters of rank {options.rank}" if self.adapters else "all decoder weights"
        what += ", spread over the processes" if self.sharded else ""
        again = ", layers computed again in the backward pass" if self.again else ""
        return (
            f"{self.steps} steps of {options.batch} x {options.seq_len} tokens, {what}, learning rate "
            f"{self.learning_rate:g}, {self.micro_batch} sequences at a time{again}; about "
            f"{human_bytes(self.memory_bytes)} of {human_bytes(available)} of memory"
        )


def memory_needed(
    size: Size, options: RecoverOptions, *, adapters: bool, micro_batch: int, again: bool, spread: int = 1
) -> int:
    """Bytes that training takes in each process, the dense model's weights counted in.

    `spread` is the number of processes that hold a part of the trained weights each; they come whole from the disk.
    """
    trained = size.projections * options.rank if adapters else size.trained
    kept = size.weights - (0 if adapters else size.trained)
    each = TRAINED_BYTES
    if not adapters:
        each += 4 * (2 if options.bits else 1)  # the best weights so far, and the rounded ones
    weights = (
        trained * max(4, each // spread) + kept * (size.itemsize if adapters else 4) + size.weights * size.itemsize
    )
    tokens = micro_batch * options.seq_len
    layer = LAYER_FLOATS[0] * size.width + LAYER_FLOATS[1] * size.inner
    states = size.layers * size.width * (4 if options.hidden else 1)  # in the loss: both models' and their difference
    activations = tokens * 4 * (states + layer * (1 if again else size.layers))
    logits = 4 * 4 * min(tokens * size.vocabulary, 1 << 27)
    return weights + activations + logits


def plan_training(size: Size, options: RecoverOptions, available: int, processes: int = 1) -> TrainingPlan:
    """The plan whose needs fit: all weights where they do, else these spread over processes, else adapters.

    What the backward pass needs is kept where it fits. `available` are bytes for each of the `processes` that share a step's
    sequences; 0 where nobody knows.

    Raises:
        UsageError: nothing fits; the message has the numbers. Or the sequences cannot be shared evenly.
    """
    own, left = divmod(options.batch, processes)
    if left or not own:
        raise UsageError(
            f"a batch of {options.batch} cannot be shared by {processes} processes. Give a multiple with --batch."
        )
    steps = max(1, options.tokens // (options.batch * options.seq_len))
    spread = processes > 1 and not options.bits
    if options.train == "sharded" and not spread:
        raise UsageError(
            "train sharded is for several processes, started with torchrun, and without --bits. Give --train auto."
        )
    ways = {"all": (False, 1), "sharded": (False, processes), "adapters": (True, 1)}
    choices = (
        [ways[options.train]] if options.train in ways else [way for way in ways.values() if way[1] == 1 or spread]
    )
    batches = [min(own, options.micro_batch)] if options.micro_batch else [n for n in range(own, 0, -1) if own % n == 0]
    busy = [n for n in batches if n * options.seq_len >= min(FULL, own * options.seq_len)] or batches
    needs = 0
    for adapters, parts in choices:
        for again, micro_batch in [*((False, n) for n in busy), *((True, n) for n in batches)]:
            needs = memory_needed(size, options, adapters=adapters, micro_batch=micro_batch, again=again, spread=parts)
            if not available or needs <= SPARE * available:
                rate = options.learning_rate(size.weights, adapters=adapters)
                return TrainingPlan(adapters, micro_batch, again, steps, needs, rate, sharded=parts > 1)
    raise UsageError(
        f"training needs about {human_bytes(needs)} of memory with the smallest choices, and {human_bytes(available)} is "
        f"available. Take a smaller --seq-len than {options.seq_len}, --train adapters, or a device with more memory."
    )


def available_memory(device: torch.device) -> int:
    """Bytes of memory that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()
