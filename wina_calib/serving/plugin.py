"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes, maybe more than once."""

from __future__ import annotations

import re
from typing import Any

from wina_calib.errors import RuntimeLoadError
from wina_calib.model.folder import METHOD

TESTED = ("0.31", "0.32")  # major and minor numbers of vLLM


def register() -> None:
    """Make vLLM know `quant_method: wina`.

    What an entry point raises is logged and forgotten, so a vLLM that was not tested gets a config that raises when it is used.
    """
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    refused = refusal(str(vllm.__version__))
    if refused is not None:
        register_quantization_config(METHOD)(_refusing(QuantizationConfig, refused))
        return
    from wina_calib.serving.vllm_config import WinaConfig

    register_quantization_config(METHOD)(WinaConfig)
    _name_own_classes()


def _name_own_classes() -> None:
    """Let vLLM compute checkpoints that plain transformers must refuse, quantized ones, by the base model's class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm.model_executor.models import ModelRegistry

    for name in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) & set(ModelRegistry.get_supported_archs()):
        known = ModelRegistry.models[name]
        if hasattr(known, "module_name"):
            ModelRegistry.register_model(f"Wina{name}", f"{known.module_name}:{known.class_name}")


def refusal(version: str) -> str | None:
    """Why a version of vLLM is not served with; None where it is."""
    if re.match(rf"({'|'.join(map(re.escape, TESTED))})(\.|$)", version):
        return None
    return (
        f"vLLM {version} was not tested with this wina_calib. Install vLLM {' or '.join(TESTED)}, or a wina_calib that names "
        f"{version}."
    )


def _refusing(base: Any, message: str) -> Any:
    """A config class that raises as soon as a checkpoint is to be loaded."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeLoadError(message)

    abstract = dict.fromkeys(base.__abstractmethods__, refuse)
    return type("WinaConfig", (base,), abstract | {"from_config": classmethod(refuse)})
