"""The modules of a sparse model: a state for every site, and linear layers that ask it for their product.

A decoder layer calls q, k and v one after another with the same input. The first call computes what all projections of a
mask group give, the others take their part of it (`PackedGroup`). Where that cannot be, each computes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from wina_calib.checkpoint.settings import SAMPLES, Settings
from wina_calib.common.memory import moved_to_huge_pages
from wina_calib.masks.mask import Cut, keep_mask, kept_inputs, mask_inputs
from wina_calib.masks.thresholds import LEVELS, site_sparsity, threshold_between
from wina_calib.model.architecture import MaskGroup, Site
from wina_calib.quantization.formats import Quantized, WeightFormat
from wina_calib.runtime import group_operator
from wina_calib.runtime.forward_pass import Pass
from wina_calib.runtime.kernels import dispatch
from wina_calib.runtime.packed import PackedGroup, rows_for
from wina_calib.runtime.quantized_group import QuantizedGroup
from wina_calib.runtime.state import RuntimeState, SiteCount, copied


class Float32Buffers(nn.Module):
    """Keeps floating-point buffers in float32 when the model is cast; rotations follow the model."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        apply: Any = super()._apply
        apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype and name != "rotation":
                self._buffers[name] = before.to(after.device)
        return self


class OtherParameters(Float32Buffers):
    """Elements (parameters, SAMPLES) of parameters that are no site's weights, to know them by when they are loaded."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.register_buffer("sample", torch.zeros(parameters, SAMPLES, dtype=torch.float32))


class GroupState(Float32Buffers):
    """Norm (in,), threshold () and quantile tables (anchors, levels) of one mask group, and its weights if they are quantized."""

    norm: Tensor
    threshold: Tensor
    table: Tensor

    def __init__(self, width: int, anchors: int, form: WeightFormat | None = None, outs: Sequence[int] = ()) -> None:
        super().__init__()
        self.format = form
        for name, (dtype, shape) in ({} if form is None else form.specs(width, outs)).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        self.register_buffer("norm", torch.ones(width, dtype=torch.float32))
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.register_buffer("table", torch.zeros(anchors, len(LEVELS), dtype=torch.float32))

    @property
    def quantized(self) -> Quantized:
        """The group's quantized weights."""
        assert self.format is not None
        buffers = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        return Quantized.of(self.format, buffers)

    def settle(self) -> None:
        """Move quantized weights that were just loaded to where columns are read fast, see `memory.moved_to_huge_pages`."""
        for name in () if self.format is None else ("codes", "scales", "zeros"):
            tensor = self._buffers.get(name)
            if tensor is not None:
                self._buffers[name] = moved_to_huge_pages(tensor)


class SiteState(Float32Buffers):
    """One site of a loaded model: what calibration stored for it, and the sparse product of its projections."""

    budget: Tensor

    def __init__(
        self,
        layer: int,
        site: Site,
        settings: Settings,
        state: RuntimeState,
        rotation_dtype: torch.dtype | None,
        form: WeightFormat | None,
    ) -> None:
        super().__init__()
        anchors = len(settings.anchors)
        self.layer, self.site, self.settings, self.state = layer, site, settings, state
        self.format = form  # of its weights, None where they are not quantized
        self.groups: tuple[MaskGroup, ...] = settings.rule.groups(site)
        self.register_buffer("budget", torch.zeros(anchors, dtype=torch.float32))
        self.register_buffer("error", torch.zeros(anchors, dtype=torch.float32))
        if settings.curve_levels:
            self.register_buffer("curve", torch.zeros(len(settings.curve_levels), dtype=torch.float32))
        if settings.samples:
            shape = (len(site.projections), settings.samples)
            self.register_buffer("sample", torch.zeros(shape, dtype=torch.float32))
        if rotation_dtype is not None:
            self.register_buffer("rotation", torch.zeros(site.width, site.width, dtype=rotation_dtype))
        for group in self.groups:
            outs = [p.out_features for p in group.projections]
            self.add_module(group.name, GroupState(site.width, anchors, form, outs))
        self.asked = float("nan")
        self.linears: list[SparseLinear] = []  # a list, so that they are not children
        self._packed: dict[str, PackedGroup] = {}
        self._quantized: dict[str, QuantizedGroup] = {}

    def group(self, name: str) -> GroupState:
        """State of a mask group: `shared` or a projection's name."""
        found = self.get_submodule(name)
        assert isinstance(found, GroupState)
        return found

    def set_sparsity(self, model_sparsity: float, sparsity: float | None = None) -> float:
        """Set the thresholds for a model sparsity; the site's own comes from its budget unless given.

        Returns:
            the site's sparsity.
        """
        anchors = self.settings.anchors
        own = site_sparsity(anchors, self.budget.cpu().numpy(), model_sparsity) if sparsity is None else sparsity
        tables = {group.name: self.group(group.name).table.cpu() for group in self.groups}
        self.set_thresholds(own, {n: threshold_between(t, anchors, model_sparsity, own) for n, t in tables.items()})
        return own

    def set_thresholds(self, sparsity: float, thresholds: Mapping[str, float]) -> None:
        """Set the threshold of every mask group by name, meant for a site sparsity of `sparsity`."""
        for group in self.groups:
            self.group(group.name).threshold.fill_(thresholds[group.name])
        self.asked = sparsity
        self.state.stale = True
        self.state.revision += 1

    def product(self, linear_: SparseLinear, x: Tensor, now: Pass) -> Tensor:
        """Output (..., out) of one projection for the site's input x (..., in), by itself: masked, then dense."""
        turned = self._turned(x)
        if now.counts is not None:
            self._count(linear_, turned, now)
        inputs = turned if now.dense else self._mask(linear_.group, turned, now)
        return linear_.multiply(inputs)

    def note_row(self, linear_: SparseLinear, x: Tensor, now: Pass) -> None:
        """Let the watch of a pass know what of an input (..., in) is dropped, once for each mask."""
        if linear_.position == 0:
            dropped = None if now.dense else self._dropped(linear_.group, self._turned(x), now)
            outs = self.site.out_features if linear_.group == "shared" else linear_.out_features
            now.watch.note(self.asked, x.numel(), dropped, outs)

    def _turned(self, x: Tensor) -> Tensor:
        rotation = self._buffers.get("rotation")
        return x if rotation is None else x @ rotation.to(x.dtype)

    def pack(self) -> None:
        """Store each group's weights side by side: column-contiguous where a kernel gains by it, else row-major."""
        for group in self.groups:
            members = [m for m in self.linears if m.group == group.name]
            if self.format is not None:
                self._pack_quantized(group, members)
                continue
            if not _packable(members) or not self.settings.has_kernels:
                self._packed.pop(group.name, None)
                for member in members:
                    member.packed, member.number = None, group_operator.UNNUMBERED
                continue
            packed = self._packed.get(group.name)
            if packed is None or not _holds(packed, members) or not self._suits(packed, members):
                packed = _pack(members, columns=self._pays(members))
                self._packed[group.name] = packed
            state = self.group(group.name)
            packed.attach(self.state.number, state.norm, state.threshold, self._buffers.get("rotation"))
            starts = [0, *accumulate(packed.sizes)]
            for member, start in zip(members, starts, strict=False):
                member.number, member.start, member.packed_dtype = packed.number, start, packed.dtype
                member.places = member.places_now()

    def _pack_quantized(self, group: MaskGroup, members: Sequence[SparseLinear]) -> None:
        """Let the members share one product of the group's quantized weights."""
        state, rotation = self.group(group.name), self._buffers.get("rotation")
        packed: QuantizedGroup | None = None
        if self.settings.has_kernels and not state.quantized.codes.is_meta:
            dtype, biases = members[0].input_dtype, [m.bias for m in members]
            given = (state.quantized, biases, state.norm, state.threshold, rotation, dtype, self.state.number)
            packed = self._quantized.get(group.name)
            if packed is None or not packed.is_made_of(*given):
                packed = QuantizedGroup([m.out_features for m in members], *given)
                _share_bias(packed, members)
            self._quantized[group.name] = packed
        starts = [0, *accumulate(m.out_features for m in members)]
        for member, start in zip(members, starts, strict=False):
            member.packed, member.places, member.start = packed, member.places_now(), start
            member.number = group_operator.UNNUMBERED if packed is None else packed.number
            member.packed_dtype = None if packed is None else packed.dtype

    def is_replaced(self) -> bool:
        """Whether a packed weight or bias is no longer the one that was packed."""
        return any(m.packed is not None and m.places != m.places_now() for m in self.linears)

    def _suits(self, packed: PackedGroup, members: Sequence[SparseLinear]) -> bool:
        """Whether the layout is the best one. On CUDA dense products take both equally well: no copies there."""
        return (packed.columns and members[0].weight.device.type == "cuda") or packed.columns == self._pays(members)

    def _pays(self, members: Sequence[SparseLinear]) -> bool:
        weight = members[0].weight
        out = sum(m.out_features for m in members)
        return dispatch.column_layout_pays(weight.device.type, weight.dtype, self.site.width, out, self.asked)

    def _mask(self, name: str, x: Tensor, now: Pass) -> Tensor:
        rows = rows_for(now.dense_rows, x)
        return mask_inputs(x, self.group(name).norm, self._cut(name), self.settings.score, rows)

    def _cut(self, name: str) -> Cut:
        """What a group is masked with: its threshold, or how many inputs each row keeps."""
        if self.settings.select == "topk":
            return kept_inputs(self.site.width, self.asked)
        return self.group(name).threshold

    def _count(self, linear_: SparseLinear, x: Tensor, now: Pass) -> None:
        """Count inputs seen and dropped, weighted by the outputs that they reach."""
        shared = linear_.group == "shared"
        if now.counts is None or (shared and not linear_.leads):
            return
        outs = self.site.out_features if shared else linear_.out_features
        count = now.counts.setdefault((self.layer, self.site.name), SiteCount())
        count.seen += x.numel() * outs
        if not now.dense:
            count.dropped += int(self._dropped(linear_.group, x, now)) * outs

    def _dropped(self, name: str, x: Tensor, now: Pass) -> Tensor:
        """How many of the turned inputs x (..., in) of a group are dropped, () int64."""
        rows, norm = rows_for(now.dense_rows, x), self.group(name).norm
        return keep_mask(x, norm, self._cut(name), self.settings.score, rows).logical_not_().sum()


class SparseLinear(nn.Linear):
    """A projection of a sparse site. Saves and loads as the linear layer that it replaces."""

    site: SiteState
    packed: PackedGroup | QuantizedGroup | None

    def __init__(self, dense: nn.Linear, site: SiteState, group: MaskGroup, position: int) -> None:
        with torch.device("meta"):
            super().__init__(dense.in_features, dense.out_features, bias=dense.bias is not None)
        self.weight, self.bias = dense.weight, dense.bias
        self._place(site, group, position)

    def _place(self, site: SiteState, group: MaskGroup, position: int) -> None:
        """Take its place among the projections of a site."""
        self.__dict__["site"] = site  # a neighbour, not a child: its buffers belong to the layer's `wina` module
        site.linears.append(self)
        self.name, self.group, self.position = group.projections[position].name, group.name, position
        self.leads = group.projections[position] is site.site.projections[0]
        self.packed = None
        self.number, self.start = group_operator.UNNUMBERED, 0  # of the group among all, of the first output in it
        self.packed_dtype: torch.dtype | None = None  # of the group's storage
        self.places: tuple[int, ...] = ()  # of weight and bias in memory, when they were packed

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear uses
        """Sparse product of the site's input (..., in) and this projection: (..., out)."""
        if (
            torch.compiler.is_compiling()
            and input.dtype == self.packed_dtype
            and group_operator.serves(self.number, input)
        ):
            return group_operator.part(self.number, self.start, self.start + self.out_features, input)
        packed, now = self.packed, self.site.state.now()
        if now.watch is not None:
            self.site.note_row(self, input, now)
        if packed is None or not packed.serves(input, now) or (torch.is_grad_enabled() and self._is_trained()):
            return self.site.product(self, input, now)
        return packed.part(self.position, input, now)

    @property
    def input_dtype(self) -> torch.dtype:
        """Of the inputs that its weight is for."""
        return self.weight.dtype

    def multiply(self, x: Tensor) -> Tensor:
        """Dense product of masked inputs x (..., in)."""
        return linear(x, self.weight, self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of it alone belongs to the same site and multiplies by itself."""
        return copied(
            self, memo, self.site, packed=None, number=group_operator.UNNUMBERED, packed_dtype=None, places=()
        )

    def _is_trained(self) -> bool:
        """Whether gradients go to the module's own weight or bias, which the packed ones know nothing of."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def places_now(self) -> tuple[int, ...]:
        """Where weight and bias are in memory."""
        bias = self.bias
        return (self.weight.data_ptr(),) if bias is None else (self.weight.data_ptr(), bias.data_ptr())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.site.state.stale, self.number = True, group_operator.UNNUMBERED
        apply: Any = super()._apply
        apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in (prefix + "weight", prefix + "bias"):
            tensor = destination.get(name)
            if tensor is None or keep_vars:
                continue
            if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
                destination[name] = tensor.clone(memory_format=torch.contiguous_format)


def _pack(members: Sequence[SparseLinear], *, columns: bool) -> PackedGroup:
    """Put the members' weights and biases into one storage and make theirs views of it."""
    packed = PackedGroup([m.weight for m in members], [m.bias for m in members], columns=columns)
    for member, part in zip(members, packed.parts_of(packed.weight), strict=True):
        member.packed = packed
        member.weight = _moved(member.weight, part)
    if packed.bias is not None:
        for member, part in zip(members, packed.parts_of(packed.bias), strict=True):
            if member.bias is not None:
                member.bias = _moved(member.bias, part)
    return packed


def _share_bias(packed: QuantizedGroup, members: Sequence[SparseLinear]) -> None:
    """Make the members' biases views of the group's, so that what is written to them counts."""
    if packed.bias is None:
        return
    for member, part in zip(members, packed.bias.split(packed.sizes), strict=True):
        if member.bias is not None and member.bias.dtype == part.dtype:
            member.bias = _moved(member.bias, part)
    packed.is_now_of([member.bias for member in members])


def _moved(parameter: Any, storage: Tensor) -> Any:
    """A parameter with its values elsewhere: the same object, which an optimizer may hold, where torch lets it change."""
    if parameter.is_inference():
        return nn.Parameter(storage, requires_grad=parameter.requires_grad)
    parameter.data = storage
    return parameter


def _holds(packed: PackedGroup, members: Sequence[SparseLinear]) -> bool:
    """Whether the modules' weights and biases still are views of the storage."""
    if packed.weight.device != members[0].weight.device or any(m.packed is not packed for m in members):
        return False
    owned: list[Tensor | None] = [m.weight for m in members]
    parts = packed.parts_of(packed.weight)
    if packed.bias is not None:
        owned += [m.bias for m in members]
        parts += packed.parts_of(packed.bias)
    return all(own is None or own.data_ptr() == part.data_ptr() for own, part in zip(owned, parts, strict=True))


def _packable(members: Sequence[SparseLinear]) -> bool:
    """Whether weights are here, of one dtype, and not moved in and out by offloading."""
    dtype = members[0].weight.dtype
    return all(not m.weight.is_meta and m.weight.dtype == dtype and not hasattr(m, "_hf_hook") for m in members)


def site_states(model: nn.Module) -> list[SiteState]:
    """All sites of a loaded sparse model in order."""
    return [module for module in model.modules() if isinstance(module, SiteState)]


def model_weighted(sites: Sequence[SiteState], values: Sequence[float]) -> float:
    """Weight-averaged value over sites: site sparsities give the model sparsity."""
    weights = [s.site.weights for s in sites]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
