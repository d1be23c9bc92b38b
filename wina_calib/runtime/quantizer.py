"""transformers integration: calibrated checkpoints load through plain `from_pretrained` once wina_calib is imported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from wina_calib.errors import RuntimeLoadError, UsageError
from wina_calib.model.architecture import Architecture, describe
from wina_calib.model.folder import METHOD
from wina_calib.runtime.derived import derive
from wina_calib.runtime.insert_sites import check_files, check_loaded, insert_sites
from wina_calib.runtime.quantization_config import WinaConfig
from wina_calib.runtime.quantized import QuantizedModel


@register_quantizer(METHOD)
class WinaQuantizer(HfQuantizer):
    """Puts sparse sites into a model before its weights are loaded and checks them afterwards."""

    requires_calibration = True

    def __init__(self, quantization_config: WinaConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.settings = quantization_config.settings
        self.architecture: Architecture | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if model.get_output_embeddings() is None:
            raise RuntimeLoadError(
                f"{type(model).__name__} has no language modelling head, but what is calibrated is a causal language model. "
                "Load it with AutoModelForCausalLM; output_hidden_states=True gives its hidden states."
            )
        self.architecture = describe(model)
        # Whose weights are plain numbers is cast and trained as any model; codes follow a cast, and are not trained.
        model.is_quantized = self.settings.weight_format is not None
        if model.is_quantized:
            derive(model, QuantizedModel)
        insert_sites(model, self.architecture, self.settings)
        check_files(model, self.architecture, checkpoint_files or ())
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        assert self.architecture is not None
        check_loaded(model, self.architecture, self.settings)
        return model

    def dequantize(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """An error that says what gives a dense model."""
        raise UsageError(
            "A calibrated model is not dequantized in place. To compute it densely use wina_calib.set_sparsity(model, 0); "
            "`wina-calib export-dense` writes a dense model."
        )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Nothing is converted while loading."""
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Saving keeps every tensor."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top; without one the trainer refuses a model that `is_quantized`."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Decode steps can be compiled."""
        return True
