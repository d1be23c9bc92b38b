"""What computes a layer of vLLM's model: its linear layers, and lm_head in int8. Imports vLLM as it is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.utils.torch_utils import direct_register_custom_op

from wina_calib.errors import RuntimeLoadError
from wina_calib.quantization.formats import Quantized, QuantizedRows
from wina_calib.runtime.kernels import cpu, dispatch
from wina_calib.serving import product
from wina_calib.serving.loading import turning
from wina_calib.serving.plan import Mask, ServingPlan
from wina_calib.serving.split import own_outputs, take_inputs, take_outputs

if not hasattr(torch.ops.vllm, product.NAME):
    direct_register_custom_op(product.NAME, product.linear, fake_impl=product.shape_of)
    direct_register_custom_op(product.QUANTIZED_NAME, product.quantized_linear, fake_impl=product.quantized_shape_of)


@register_weight_loader_v2_supported_method
class WinaLinearMethod(UnquantizedLinearMethod):
    """One linear layer: its weights by input, and the mask of each of its parts.

    With tensor parallelism a layer that is split by outputs has all inputs, so that every process makes the same mask; one
    that is split by inputs makes the part of the mask that is its own. A threshold is the whole model's in either.
    """

    supports_pre_processed_weights = False

    def __init__(self, plan: ServingPlan, masks: Sequence[Mask]) -> None:
        super().__init__()
        self.plan, self.masks = plan, masks

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """As of a dense layer, loaded as that, by input where one mask is for all; nothing where weights are quantized."""
        self.sizes, self.inputs, self.width = list(output_partition_sizes), input_size, input_size_per_partition
        self.whole_sizes = _whole_sizes(layer, output_size)
        if self.plan.settings.weight_format is not None:
            layer.weight = _constant(torch.empty(0, dtype=params_dtype))
            return
        if len(self._parts()) == 1:
            extra["weight_loader"] = turning(extra["weight_loader"])
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
        )
        if len(self._parts()) == 1:
            out, width = layer.weight.shape
            layer.weight.data = cpu.empty_columns(out, width, params_dtype).t()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the weights, and store by input those that are not.

        Raises:
            RuntimeLoadError: the weights are not those of the calibration.
        """
        weight = layer.weight.data
        if self.masks[0].norm.shape[0] != self.inputs:
            raise RuntimeLoadError(
                f"{layer.prefix} has {self.inputs} inputs in vLLM, the calibration {self.masks[0].norm.shape[0]}."
            )
        settings = self.plan.settings
        policy = product.policy_of(
            first=settings.first_token == "dense",
            prompts=settings.prefill == "dense",
            sparse_rows=self.plan.sparse_rows,
            dtype=weight.dtype,
        )
        layer.wina_policy = _constant(policy)
        parts = self._parts()
        start = 0
        for i, (mask, whole, sizes) in enumerate(parts):
            norm = self._own_inputs(layer, mask.norm)
            setattr(layer, f"wina_norm_{i}", _constant(norm.contiguous()))
            setattr(
                layer,
                f"wina_threshold_{i}",
                _constant(torch.tensor(mask.threshold, dtype=torch.float32)),
            )
            quantized = self.plan.quantized(mask)
            if quantized is not None:
                for name, tensor in self._own_part(layer, quantized, whole, sizes).named().items():
                    setattr(layer, f"wina_{name}_{i}", _constant(tensor.contiguous()))
                continue
            own = weight[start : start + sum(sizes)]
            start += sum(sizes)
            if self.width == self.inputs and whole == sizes and not mask.knows(own):
                raise RuntimeLoadError(
                    f"{layer.prefix}: the weights are not those that the calibration was made for. Calibrate them again."
                )
            columns = own.t() if own.t().is_contiguous() else cpu.column_storage([own])
            setattr(layer, f"wina_weight_{i}", _constant(columns.t()))
        self.bounds = [sum(sizes) for _, _, sizes in parts]
        layer.wina_parts = [product.prepare(*self._operands(layer, i)) for i in range(len(parts))]
        whole_weight = len(parts) == 1 and settings.weight_format is None
        layer.weight = layer.wina_weight_0 if whole_weight else _constant(weight.new_empty(0))

    def _parts(self) -> list[tuple[Mask, list[int], list[int]]]:
        """The masks of this layer; outputs of the parts that each one serves, in the model and in this process."""
        if all(mask is self.masks[0] for mask in self.masks):
            return [(self.masks[0], self.whole_sizes, self.sizes)]
        return [(m, [whole], [own]) for m, whole, own in zip(self.masks, self.whole_sizes, self.sizes, strict=True)]

    def _own_inputs(self, layer: Any, norm: Tensor) -> Tensor:
        """The norms of the inputs that this process has."""
        return norm if self.width == self.inputs else norm.narrow(0, layer.tp_rank * self.width, self.width)

    def _own_part(self, layer: Any, weight: Quantized, whole: list[int], sizes: list[int]) -> Quantized:
        """The quantized weights of this process."""
        if self.width != self.inputs:
            return take_inputs(weight, layer.tp_rank * self.width, self.width)
        return take_outputs(weight, own_outputs(whole, sizes, layer.tp_rank, layer.tp_size))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The masked product (..., out) of x (..., in)."""
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        biases = [bias] * len(self.bounds) if bias is None or len(self.bounds) == 1 else bias.split(self.bounds)
        if torch.compiler.is_compiling():
            made = [self._operator(layer, i, rows, own) for i, own in enumerate(biases)]
        else:
            made = [part(rows, own) for part, own in zip(layer.wina_parts, biases, strict=True)]
        out = made[0] if len(made) == 1 else torch.cat(made, dim=-1)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], out.shape[-1])

    def _operands(self, layer: Any, part: int) -> tuple[list[Tensor | None], list[Tensor]]:
        """The weights of a part, and what masks it."""
        names = ("weight",) if self.plan.settings.weight_format is None else ("codes", "scales", "zeros")
        weights = [getattr(layer, f"wina_{name}_{part}", None) for name in names]
        return weights, [
            getattr(layer, f"wina_norm_{part}"),
            getattr(layer, f"wina_threshold_{part}"),
            layer.wina_policy,
        ]

    def _operator(self, layer: Any, part: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """A part's product for the compiler."""
        weights, mask = self._operands(layer, part)
        operator = torch.ops.vllm.wina_linear if len(weights) == 1 else torch.ops.vllm.wina_quantized_linear
        out: Tensor = operator(x, *weights, *mask, bias)
        return out


class WinaHeadMethod(QuantizeMethodBase):
    """lm_head in int8 by rows, and the embedding where it is the same."""

    supports_pre_processed_weights = False

    def __init__(self, plan: ServingPlan) -> None:
        self.plan = plan

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **extra: Any) -> None:
        """Nothing: the rows are read when all else is loaded."""
        layer.weight = _constant(torch.empty(0, dtype=params_dtype))

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Take the embedding's rows, once they are there."""
        layer.__dict__["wina_tied"] = embed_tokens
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Read this process's rows, and zeros where vLLM pads."""
        tied = layer.__dict__.get("wina_tied")
        if tied is not None and hasattr(tied, "wina_codes"):
            layer.wina_codes, layer.wina_scales = tied.wina_codes, tied.wina_scales
            return
        head = self.plan.quantized_head()
        assert head is not None
        shard, size = layer.shard_indices, layer.num_embeddings_per_partition
        for name, rows in (("codes", head.codes), ("scales", head.scales)):
            own = rows[shard.org_vocab_start_index : shard.org_vocab_end_index]
            padded = torch.cat([own, own.new_zeros(size - len(own), *own.shape[1:])]) if len(own) < size else own
            setattr(layer, f"wina_{name}", _constant(padded.contiguous()))

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Rows (..., width) of ids (...)."""
        return QuantizedRows(layer.wina_codes[input_], layer.wina_scales[input_]).dequantize(layer.weight.dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits (..., vocab) of states x (..., hidden)."""
        out = dispatch.quantized_rows(x, QuantizedRows(layer.wina_codes, layer.wina_scales))
        return out if bias is None else out + bias


def _whole_sizes(layer: Any, output_size: int) -> list[int]:
    """Outputs of the parts of a layer in the model, whatever a process has of them."""
    if isinstance(layer, QKVParallelLinear):
        heads, few = layer.total_num_heads, layer.total_num_kv_heads
        return [heads * layer.head_size, few * layer.head_size, few * layer.v_head_size]
    return list(layer.output_sizes) if isinstance(layer, MergedColumnParallelLinear) else [output_size]


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
