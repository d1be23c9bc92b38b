"""Quantized weights of a loaded model: projections of a mask group whose weights lie in its state, and lm_head by rows.

No module holds a weight of its own here. `weight` is there to be read, by what asks for a dtype, a device or the numbers; it is
made anew each time, and what would change it fails.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from wina_calib.checkpoint.settings import Settings
from wina_calib.common.memory import moved_to_huge_pages
from wina_calib.errors import RuntimeLoadError
from wina_calib.model.architecture import Architecture, MaskGroup
from wina_calib.quantization.formats import Quantized, QuantizedRows
from wina_calib.runtime.derived import Derived
from wina_calib.runtime.kernels import dispatch, reference
from wina_calib.runtime.modules import Float32Buffers, SiteState, SparseLinear
from wina_calib.runtime.state import copied


class QuantizedLinear(SparseLinear):
    """A projection of a sparse site whose weights are a part of the mask group's codes."""

    like: Tensor

    def __init__(self, dense: nn.Linear, site: SiteState, group: MaskGroup, position: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = dense.in_features, dense.out_features, dense.bias
        _fill_nothing(self)
        self._place(site, group, position)
        self.first = sum(p.out_features for p in group.projections[:position])
        # follows casts and moves
        self.register_buffer("like", torch.empty(0, dtype=dense.weight.dtype), persistent=False)

    @property
    def quantized(self) -> Quantized:
        """Its part of the group's weights."""
        return self.site.group(self.group).quantized.outputs(self.first, self.first + self.out_features)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # torch has an attribute here
        """The dequantized weight (out, in), to be read only."""
        return _read_only(self.quantized.whole(self.like.dtype))

    def _is_trained(self) -> bool:
        """Whether gradients go to the module's bias; to its weight none can."""
        return self.bias is not None and self.bias.requires_grad

    @property
    def input_dtype(self) -> torch.dtype:
        """Of the inputs, as of the bias."""
        return self.like.dtype

    def multiply(self, x: Tensor) -> Tensor:
        """Dense product of masked inputs x (..., in)."""
        out = reference.dense_quantized(x, self.quantized)
        return out if self.bias is None else out + self.bias

    def places_now(self) -> tuple[int, ...]:
        """Where the group's weights and its bias are in memory."""
        own = () if self.bias is None else (self.bias.data_ptr(),)
        return own + tuple(tensor.data_ptr() for tensor in self.site.group(self.group).quantized.named().values())


class QuantizedRowsModule(Float32Buffers):
    """A matrix in int8 by rows, in place of a `weight`."""

    codes: Tensor
    scales: Tensor
    like: Tensor

    def hold_rows(self, rows: int, width: int, like: Tensor) -> None:
        """Have room for a matrix (rows, width) that is read as of the dtype of `like`."""
        self.register_buffer("codes", torch.zeros(rows, width, dtype=torch.int8, device=like.device))
        self.register_buffer("scales", torch.zeros(rows, dtype=torch.float32, device=like.device))
        self.register_buffer("like", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)

    def settle(self) -> None:
        """Move rows that were just loaded to where they are read fast, see `memory.moved_to_huge_pages`."""
        if self._buffers.get("codes") is not None:
            self._buffers["codes"] = moved_to_huge_pages(self.codes)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        like = self._buffers["like"]
        super()._apply(fn, recurse)
        self._buffers["like"] = None if like is None else fn(like)
        return self

    @property
    def quantized(self) -> QuantizedRows:
        """The matrix."""
        return QuantizedRows(self.codes, self.scales)

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix (rows, width), to be read only."""
        return _read_only(self.quantized.dequantize(self.like.dtype))


class QuantizedEmbedding(QuantizedRowsModule, nn.Embedding):  # type: ignore[override]  # its weight is a property
    """Stands before an embedding's class in one that is made of both: its rows are read from int8."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Embedding uses
        """Rows (..., width) of ids (...)."""
        ids = input.reshape(-1)
        rows = QuantizedRows(self.codes[ids], self.scales[ids]).dequantize(self.like.dtype)
        stock_class: Any = type(self).__bases__[1]
        if stock_class is nn.Embedding:
            return rows.view(*input.shape, rows.shape[-1])
        # What else a family's embedding does, it does with the rows that occur.
        stock = stock_class.__new__(stock_class)
        stock.__dict__.update(self.__dict__, _parameters={"weight": rows})
        embedded: Tensor = stock(torch.arange(len(rows), device=rows.device).view(input.shape))
        return embedded

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by the name of the stock class."""
        state: Any = super().__getstate__  # torch has no types for it
        return _empty_embedding, (type(self).__bases__[1],), state()


@cache
def _embedding_class(stock: Any) -> type[QuantizedEmbedding]:
    return type(f"Quantized{stock.__name__}", (QuantizedEmbedding, stock), {"__module__": __name__})


def _empty_embedding(stock: type[nn.Embedding]) -> QuantizedEmbedding:
    kind = _embedding_class(cast(Any, stock))
    return kind.__new__(kind)


def _quantized_embedding(dense: nn.Embedding) -> QuantizedEmbedding:
    made, weight = _empty_embedding(type(dense)), dense.weight
    made.__dict__.update({n: v.copy() if isinstance(v, dict | set) else v for n, v in dense.__dict__.items()})
    made.padding_idx = None
    del made._parameters["weight"]
    made.hold_rows(dense.num_embeddings, dense.embedding_dim, weight)
    if type(dense) is nn.Embedding:  # a family's own may have more to fill
        _fill_nothing(made)
    return made


def _fill_nothing(module: Any) -> None:
    """Tell transformers that there is nothing to fill in a module without a bias: it would ask for the dequantized weight."""
    module.__dict__["_is_hf_initialized"] = getattr(module, "bias", None) is None


class QuantizedHead(QuantizedRowsModule, nn.Linear):
    """lm_head in int8: rows of its own, or those of the embedding that it is tied to."""

    tied: QuantizedEmbedding | None

    def __init__(self, dense: nn.Linear, tied: QuantizedEmbedding | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = dense.in_features, dense.out_features, dense.bias
        _fill_nothing(self)
        self.__dict__["tied"] = tied  # a neighbour, not a child
        if tied is None:
            self.hold_rows(dense.out_features, dense.in_features, dense.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(fn, recurse) if self.tied is None else nn.Module._apply(self, fn, recurse)

    @property
    def quantized(self) -> QuantizedRows:
        """The matrix."""
        return QuantizedRows(self.codes, self.scales) if self.tied is None else self.tied.quantized

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # torch has an attribute here
        """The dequantized matrix (vocab, hidden), to be read only."""
        return _read_only(self.quantized.dequantize((self if self.tied is None else self.tied).like.dtype))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear uses
        """Logits (..., vocab) of states (..., hidden)."""
        out = dispatch.quantized_rows(input, self.quantized)
        return out if self.bias is None else out + self.bias

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of it alone belongs to the same embedding."""
        return copied(self, memo, self.tied)


def quantize_head(model: Any, arch: Architecture, settings: Settings) -> None:
    """Put int8 rows in place of lm_head's weight, and of the embedding's where it is tied."""
    if settings.head_bits != 8:
        return
    tied: QuantizedEmbedding | None = None
    if arch.tied:
        tied = _quantized_embedding(model.get_submodule(arch.embed))
        model.set_submodule(arch.embed, tied)
        head = f"{arch.lm_head}.weight"
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k != head}
    model.set_submodule(arch.lm_head, QuantizedHead(model.get_submodule(arch.lm_head), tied))


class QuantizedModel(Derived):
    """Stands before the class of a model with quantized weights, which transformers takes for one that cannot be cast."""

    def half(self, *args: Any) -> Any:
        """What is not quantized in float16."""
        return nn.Module.half(self, *args)

    def float(self, *args: Any) -> Any:
        """What is not quantized in float32."""
        return nn.Module.float(self, *args)


class ReadOnly(Tensor):
    """A dequantized weight: what reads it gets plain tensors, what would change it an error, as the change would be lost."""

    @property
    def data(self) -> Tensor:
        """The same, so that writing to it fails too."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _unchangeable()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse what works in place; with all else, be a plain tensor."""
        name = getattr(func, "__name__", "")
        in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        harmless = name in ("requires_grad_", "__index__", "__invert__")
        if in_place and args and isinstance(args[0], ReadOnly) and not harmless:
            raise _unchangeable()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _unchangeable() -> RuntimeLoadError:
    return RuntimeLoadError(
        "these weights are quantized and cannot be changed. Keep an adapter beside them, or merge it into the dense model that "
        "`wina-calib export-dense` writes and calibrate that."
    )


def _read_only(weight: Tensor) -> Tensor:
    read_only = weight.detach().as_subclass(ReadOnly)
    read_only.__dict__["_is_hf_initialized"] = True  # transformers has nothing to fill here
    return read_only
