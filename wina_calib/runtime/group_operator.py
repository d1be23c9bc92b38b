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

from wina_calib.runtime.forward_pass import here

# A group's number holds that of its model's state above these bits.
GROUP_BITS = 20
UNNUMBERED = -1


class Group(Protocol):
    """What a number stands for."""

    dtype: torch.dtype

    def whole(self, x: Tensor, *, dense: bool) -> Tensor:
        """Outputs (..., sum of outs) for x (..., in)."""

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
        now.x, now.group = x, number
        now.out = torch.ops.wina_calib.group_product(x, number, now.operator == "dense")
    out: Tensor = now.out
    if stop == out.shape[-1]:
        now.x = now.out = None
    return out[..., start:stop]


_library = torch.library.Library("wina_calib", "FRAGMENT")
_library.define(
    "group_product(Tensor x, int number, bool dense) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _product(x: Tensor, number: int, dense: bool) -> Tensor:
    return _groups[number].whole(x, dense=dense)


_library.impl("group_product", _product, "CompositeExplicitAutograd")


def _shape_of(x: Tensor, number: int, dense: bool) -> Tensor:
    group = _groups[number]
    return x.new_empty(*x.shape[:-1], group.out_features, dtype=group.dtype)


torch.library.register_fake("wina_calib::group_product", _shape_of, lib=_library)
