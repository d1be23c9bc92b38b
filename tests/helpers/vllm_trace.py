"""What an engine answered beside `wina_calib.load`, told the masks that the engine made.

A score at a distance of rounding from its threshold falls to either side, and all that follows in its sequence with it. So the
reference takes the engine's masks: then log-probabilities must be equal, and where its own masks would have been others, the
score must lie at the threshold.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wina_calib
from wina_calib.runtime.load import runtime_state
from wina_calib.runtime.modules import SparseLinear
from wina_calib.serving.plan import Options, make_plan

# What vLLM holds side by side: its name, and which part a projection is.
PACKED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
PACKED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


@dataclass
class Compared:
    """`apart`: largest difference of log-probabilities of each request; `parted`: masks that differ, of `masks`; `distance`:
    the largest of such a score from its threshold, as a share of it; `behind`: how far the log-probability of a greedy token is
    from the largest, at most.
    """

    apart: Tensor
    parted: int = 0
    masks: int = 0
    distance: float = 0.0
    behind: float = 0.0


def compare(
    folder: Path,
    sparsity: float,
    prompts: list[list[int]],
    answer: dict[str, Any],
    greedy: Sequence[bool] = (),
    prefill: str | None = None,
) -> Compared:
    """Compare a recorded answer; requests of which a mask was made again, another way, are left out of `apart`.

    `greedy` says of which requests no token was drawn. With a dense `prefill` rows that keep all are taken as prompts'.
    """
    model = wina_calib.load(folder, 0.0, dtype=torch.float32)  # masks nothing by itself
    runtime_state(model).kernels = "reference"
    masks = make_plan(folder, Options(sparsity=sparsity)).by_projection()
    sequences = [p + [token for token, _ in o] for p, o in zip(prompts, answer["outputs"], strict=True)]
    found = Compared(torch.zeros(0))
    forced: dict[str, Tensor] = {}
    apart = []

    def mask(name: str, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        x, keep = given[0], forced[name]
        scores = x[0].float().abs() * masks[name].norm
        own = scores > masks[name].threshold
        own[0] |= first_is_dense
        if prefill == "dense":
            own |= keep.all(dim=1, keepdim=True)
        differ = own != keep
        found.masks += differ.numel()
        found.parted += int(differ.sum())
        if bool(differ.any()):
            found.distance = max(found.distance, float((scores / masks[name].threshold - 1).abs()[differ].max()))
        return (x * keep,)

    first_is_dense = make_plan(folder, Options()).settings.first_token == "dense"
    names = [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]
    with hooks(model, names, mask), torch.inference_mode():
        for i, (prompt, output) in enumerate(zip(prompts, answer["outputs"], strict=True)):
            if answer["anew"][i]:
                continue
            seen = sequences[i][:-1]
            forced |= {
                name: torch.stack([kept(answer, sequences, i, name, p) for p in range(len(seen))]) for name in names
            }
            logs = model(torch.tensor([seen])).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
            tokens = torch.tensor([token for token, _ in output])
            wanted = logs.gather(1, tokens[:, None])[:, 0]
            if i < len(greedy) and greedy[i]:
                found.behind = max(found.behind, float((logs.amax(-1) - wanted).max()))
            apart.append((wanted - torch.tensor([value for _, value in output])).abs().max())
    found.apart = torch.stack(apart)
    return found


def kept(answer: dict[str, Any], sequences: list[list[int]], request: int, name: str, position: int) -> Tensor:
    """The mask of a position: made for the request, or for one that begins alike, whose keys and values it took over."""
    parent, _, last = name.rpartition(".")
    packed, part = PACKED.get(last, (last, 0))
    known = answer["masks"][request]
    key = next(k for k in (f"{name}.0", f"{parent}.{packed}.{part}", f"{parent}.{packed}.0") if k in known)
    begin = sequences[request][: position + 1]
    for masks, sequence in [(known, begin), *zip(answer["masks"], sequences, strict=True)]:
        if position in masks[key] and sequence[: position + 1] == begin:
            return masks[key][position]
    raise AssertionError(f"no mask was made for position {position} of request {request}")


@contextmanager
def hooks(model: torch.nn.Module, names: list[str], mask: Any) -> Iterator[None]:
    """Let `mask` change the inputs of modules."""
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: mask(name, given))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
