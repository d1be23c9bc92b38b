"""The products of a compiled decode step: one operator for each mask group, looked up by number.

To a compiler the number is a constant. The step has no weight, norm or threshold among its inputs, and of a projection
nothing but its number and its place among the group's outputs is checked before every token; those checks took longer
than the products. A group whose tensors are replaced gets another number, so that the step is compiled again.
"""

from __future__ import annotations

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from wina_calib.runtime.forward_pass import Pass, here
from wina_calib.runtime.kernels.around import Around

# A group's number holds that of its model's state above these bits.
GROUP_BITS = 20
UNNUMBERED = -1


class Group(Protocol):
    """What a number stands for."""

    dtype: torch.dtype

    def whole(self, x: Tensor, *, dense: bool) -> Tensor:
        """Outputs (..., sum of outs) for x (..., in)."""

    def step(self, x: Tensor, around: Around, *, dense: bool) -> Tensor:
        """The same of what `around` makes the input of, and added to what it says."""

    @property
    def out_features(self) -> int:
        """Sum of outs."""


_groups: WeakValueDictionary[int, Group] = WeakValueDictionary()
_owners = itertools.count(1)
_members = itertools.count()


def new_owner() -> int:
    """A number for a model's state."""
    return next(_owners)


def new_number(group: Group, owner: int) -> int:
    """A number for a group of the model whose state has the number `owner`."""
    number = (owner << GROUP_BITS) + next(_members) % (1 << GROUP_BITS)
    _groups[number] = group
    return number


def serves(number: int, x: Tensor) -> bool:
    """Whether the operator may compute the products of x (..., in) in the pass that is being traced."""
    now = getattr(here, "current", None)
    if now is None or number >> GROUP_BITS != now.owner or now.operator == "" or torch.is_grad_enabled():
        return False
    return x.shape[:-1].numel() == 1


def part(number: int, start: int, stop: int, x: Tensor) -> Tensor:
    """Outputs start:stop of a group for x (..., in). The first projection computes all; the last one clears up."""
    now = here.current
    if start == 0 or now.x is not x or now.group != number:
        now.x, now.group, now.out = x, number, _whole(number, x, now)
    out: Tensor = now.out
    if stop == out.shape[-1]:
        now.x = now.out = None
    return out[..., start:stop]


def step(
    number: int, x: Tensor, gain: Tensor | None, epsilon: float, *, gated: bool = False, added: Tensor | None = None
) -> Tensor:
    """Outputs (..., sum of outs) of a group with what is around them, see `Around`."""
    dense = here.current.operator == "dense"
    out: Tensor = torch.ops.wina_calib.group_step(x, number, dense, gain, epsilon, gated, added)
    return out


def _whole(number: int, x: Tensor, now: Pass) -> Tensor:
    """What a group's first projection computes: what is ready, or the product, added to what is waiting for it."""
    ready, waiting = now.ready, now.waiting
    if ready is not None and ready[0] == number:
        now.ready = None
        return ready[1]
    if waiting is not None and waiting[0] == number:
        now.waiting = None
        return step(number, x, None, 0.0, added=waiting[1])
    out: Tensor = torch.ops.wina_calib.group_product(x, number, now.operator == "dense")
    return out


_library = torch.library.Library("wina_calib", "FRAGMENT")
_library.define(
    "group_product(Tensor x, int number, bool dense) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _product(x: Tensor, number: int, dense: bool) -> Tensor:
    return _groups[number].whole(x, dense=dense)


_library.impl("group_product", _product, "CompositeExplicitAutograd")


def _shape_of(x: Tensor, number: int, *_: object) -> Tensor:
    group = _groups[number]
    return x.new_empty(*x.shape[:-1], group.out_features, dtype=group.dtype)


torch.library.register_fake("wina_calib::group_product", _shape_of, lib=_library)

_library.define(
    "group_step(Tensor x, int number, bool dense, Tensor? gain, float epsilon, bool gated, Tensor? added) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _step(
    x: Tensor, number: int, dense: bool, gain: Tensor | None, epsilon: float, gated: bool, added: Tensor | None
) -> Tensor:
    return _groups[number].step(x, Around(gain, epsilon, gated, added), dense=dense)


_library.impl("group_step", _step, "CompositeExplicitAutograd")
torch.library.register_fake("wina_calib::group_step", _shape_of, lib=_library)
