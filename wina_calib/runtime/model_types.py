"""Model types of checkpoints that need run-time matrices.

Their config.json says `wina_calib-llama` where the base model's says `llama`: transformers alone refuses them by that
name, and never computes them as if they were dense. Importing this module makes transformers know the names; the
classes behind them are made when a checkpoint of that type is loaded.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from wina_calib.model.folder import RUNTIME_TYPE

_BASES = {t: CONFIG_MAPPING_NAMES[t] for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if t in CONFIG_MAPPING_NAMES}


class _ConfigOnDemand:
    """Stands for a config class that has not been made yet."""

    model_type = ""

    def __new__(cls, **values: Any) -> Any:
        """A config of the real class."""
        return runtime_classes(cls.model_type)[0](**values)

    @classmethod
    def from_dict(cls, values: dict[str, Any], **kwargs: Any) -> Any:
        """A config of the real class, as `PreTrainedConfig.from_dict`."""
        return runtime_classes(cls.model_type)[0].from_dict(values, **kwargs)


@cache
def runtime_classes(model_type: str) -> tuple[type[PreTrainedConfig], type]:
    """Config and model class of a type such as `wina_calib-llama`, known to the Auto classes from then on."""
    base_config = CONFIG_MAPPING[model_type.removeprefix(RUNTIME_TYPE)]
    base_model = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    names = {
        "model_type": model_type,
        "__module__": __name__,
        "__doc__": f"{base_config.__name__} with run-time matrices.",
    }
    config = type(f"Wina{base_config.__name__}", (base_config,), names)
    model = type(
        f"Wina{base_model.__name__}",
        (base_model,),
        {"config_class": config, "__module__": __name__, "__doc__": f"{base_model.__name__} with run-time matrices."},
    )
    AutoModelForCausalLM.register(config, model)
    return config, model


def __getattr__(name: str) -> type:
    """Find a class by its name, so that models can be pickled. Of types that share a class, the shortest is meant."""
    for base in sorted(_BASES, key=len):
        classes = f"Wina{_BASES[base]}", f"Wina{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base]}"
        if name in classes:
            return runtime_classes(RUNTIME_TYPE + base)[classes.index(name)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make the Auto classes know every run-time model type."""
    for base, config_name in _BASES.items():
        model_type = RUNTIME_TYPE + base
        AutoConfig.register(model_type, type(f"Wina{config_name}", (_ConfigOnDemand,), {"model_type": model_type}))


register()
