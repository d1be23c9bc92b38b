"""What a model folder's config.json says: read within bounds, and the folder's own Python code run only where it is trusted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from wina_calib.common.text import first_line
from wina_calib.errors import ModelFolderError, UnsupportedModel
from wina_calib.model.architecture import SUPPORTED, Architecture, describe, refuse_encoder_decoder
from wina_calib.storage import read_json

METHOD = "wina"  # the `quant_method` of a calibrated model's config
RUNTIME_TYPE = "wina_calib-"  # begins the model_type of checkpoints that need run-time matrices
REFERENCE_FILE = "wina_config.json"  # in place of config.json in a checkpoint that refers to its base model's weights
_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)
CONFIG_BYTES = 4 << 20
_MAX_SIZE, _MAX_COUNT = 1 << 24, 1024  # of numbers in config.json that sizes are made of, and of repeated modules
_SIZES = re.compile(
    r"(hidden|intermediate|embedding|inner|ffn|head|d|model|kv|q|lora).*(size|dim|rank|heads)|n_(embd|head|inner)"
)
_COUNTS = re.compile(r"n_layers?|num_.*(layers|blocks|experts)")


@contextmanager
def remote_code(trusted: bool) -> Iterator[None]:
    """Let model folders run Python code of their own inside the context; without it, and by default, none runs.

    Args:
        trusted: whether it may; False leaves things as they are.
    """
    before = _TRUSTED.set(trusted or _TRUSTED.get())
    try:
        yield
    finally:
        _TRUSTED.reset(before)


def code_is_trusted() -> bool:
    """Whether model folders may run Python code of their own here."""
    return _TRUSTED.get()


def has_own_code(folder: Path) -> bool:
    """Whether a model folder has a model type that only Python code in the folder knows."""
    return config_file(folder).is_file() and _needs_code(read_config(folder))


def check_code(folder: Path) -> None:
    """Raise UnsupportedModel where a model folder needs Python code of its own and may not run it."""
    if not code_is_trusted() and has_own_code(folder):
        raise UnsupportedModel(
            f"{folder} needs Python code of its own, of which nothing has run. Read it, then give --trust-remote-code, or "
            "trust_remote_code=True in Python."
        )


def is_reference(folder: Path) -> bool:
    """Whether a folder holds a calibration only, and names the base model that has the weights."""
    return (folder / REFERENCE_FILE).is_file()


def config_file(folder: Path) -> Path:
    """The file that holds a folder's config."""
    return folder / (REFERENCE_FILE if is_reference(folder) else "config.json")


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder's config file holds, bounded in size."""
    path = config_file(folder)
    if not path.is_file():
        raise ModelFolderError(f"{folder} has no config.json: not a Hugging Face model folder.")
    raw = read_json(path, max_bytes=CONFIG_BYTES)
    if not isinstance(raw, dict):
        raise ModelFolderError(f"{path} holds no JSON object.")
    return raw


def calibration_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What calibration wrote into a config; None for a model that is not calibrated."""
    section = getattr(config, "quantization_config", None)
    return section if isinstance(section, dict) and section.get("quant_method") == METHOD else None


def load_config(folder: Path) -> PreTrainedConfig:
    """Read config.json of a folder, bounded in size, and let transformers parse it."""
    path, whole = config_file(folder), read_config(folder)
    raw = whole.get("config") if is_reference(folder) else whole
    if not isinstance(raw, dict):
        raise ModelFolderError(f"{path} holds no config. Download or calibrate it again.")
    check_code(folder)
    _check_sizes(path, raw)
    base = str(raw.get("model_type", "")).removeprefix(RUNTIME_TYPE)
    try:
        if base in _known_types():
            return AutoConfig.for_model(**(raw | {"model_type": base}))
        return AutoConfig.from_pretrained(folder, trust_remote_code=code_is_trusted())
    except Exception as error:
        raise ModelFolderError(f"{path} cannot be read as a model config: {first_line(error)}") from error


def describe_config(config: PreTrainedConfig) -> Architecture:
    """Describe the model of a config, without weights."""
    return describe(skeleton(config))


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model's modules with everything, buffers too, on the meta device: whatever the config says, no memory."""
    with torch.device("meta"):
        return _build(config, torch.float32)


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights on the meta device and real buffers."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return _build(config, dtype)


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    refuse_encoder_decoder(config)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=code_is_trusted()).eval()
    except Exception as error:
        raise UnsupportedModel(
            f"model_type {getattr(config, 'model_type', '?')!r} has no causal language model here: {first_line(error)} "
            f"Supported: {SUPPORTED}."
        ) from error


def _known_types() -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())


def _needs_code(raw: dict[str, Any]) -> bool:
    return bool(raw.get("auto_map")) and str(raw.get("model_type", "")).removeprefix(RUNTIME_TYPE) not in _known_types()


def _check_sizes(path: Path, raw: dict[str, Any]) -> None:
    """Refuse a config whose model could not be built in reasonable time and memory, before it is parsed."""
    for name, value in raw.items():
        limit = _MAX_COUNT if _COUNTS.fullmatch(name) else _MAX_SIZE if _SIZES.fullmatch(name) else None
        if limit is not None and isinstance(value, int | float) and not abs(value) <= limit:
            raise ModelFolderError(
                f"{path}: {name} is {value!s:.40}; at most {limit} is supported. Download the model again."
            )
