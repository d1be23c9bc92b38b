"""What transformers would load of a model folder: the class, its files, the names of their tensors. transformers is asked."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from wina_calib.common.text import first_line
from wina_calib.errors import ModelFolderError, UnsupportedModel, WinaError
from wina_calib.model.architecture import SUPPORTED, Architecture, describe, refuse_encoder_decoder
from wina_calib.model.folder import ModelFolder, code_is_trusted
from wina_calib.storage import Shards

_ASK = "wina-ask"


@dataclass(frozen=True)
class Loading:
    """What `from_pretrained` would make of a folder, of `AutoModelForCausalLM` where that knows the type."""

    model: PreTrainedModel  # the causal language model, with everything on the meta device
    files: tuple[Path, ...]  # the files of weights that transformers would read
    conversions: tuple[Any, ...]  # how it would change the names and shapes of what they hold
    whole: PreTrainedModel  # the model of the class that transformers chose, of which `model` may be a part

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config: that of the folder, or the part of it that the model is made of."""
        return self.model.config

    @property
    def left_out(self) -> str | None:
        """What to tell of a model of which a part is taken."""
        if self.model is self.whole:
            return None
        return (
            f"{type(self.whole).__name__} is a model of more than text: its language model ({type(self.model).__name__}) is "
            "calibrated and written, and what sees or hears is left out"
        )

    def names(self, stored: Iterable[str]) -> dict[str, str]:
        """What the model calls the tensors of its files: stored name to name. Tensors without a place keep theirs.

        Those of the whole that are no part of the model are left out.

        Raises:
            Converted: tensors would be merged or split, which only a whole load does.
        """
        places, inside = self.whole.state_dict(), _names_inside(self.model, self.whole)
        renamings = [c for c in self.conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        prefix = self.whole.base_model_prefix
        renamed = {}
        for name in stored:
            place, converter = rename_source_key(name, renamings, converters, prefix, places)
            if place not in places and name in places:
                place, converter = rename_source_key(name, [], [], prefix, places)
            if place not in places:
                renamed[name] = name
            elif place in inside:
                if converter is not None:
                    raise Converted(name)
                renamed[name] = inside[place]
        return renamed


class Converted(Exception):
    """transformers merges or splits a tensor of the files as it loads them."""


def ask(folder: ModelFolder) -> Loading:
    """Ask transformers what it would load of a folder, without reading weights.

    Raises:
        CheckpointError: weights are missing, or the index is damaged.
        ModelFolderError: transformers would not load it.
        UnsupportedModel: it has no causal language model of that type.
    """
    config = without_quantization(folder.config)
    refuse_encoder_decoder(config)
    try:
        with folder.handed_on():
            _auto_class(config).from_pretrained(
                str(folder.path),
                config=config,
                dtype=torch.float32,
                quantization_config=_Asking(),
                trust_remote_code=code_is_trusted(),
            )
    except _Answer as answer:
        whole = answer.model.eval()
        whole.config = without_quantization(whole.config)
        return Loading(_language_model(whole), answer.files, answer.conversions, whole)
    except WinaError:
        raise
    except Exception as error:
        skeleton(config)  # says so where the type has no causal language model
        Shards.open(folder.path)  # says what is wrong with the files of weights
        raise ModelFolderError(f"{folder.path} cannot be loaded: {first_line(error)}") from error
    raise AssertionError("transformers loaded a model without asking its quantizer")


def open_weights(folder: ModelFolder, loading: Loading) -> Shards:
    """The tensors of a folder by the names that the model has for them.

    Raises:
        CheckpointError: a file is missing, damaged or hostile.
        Converted: only a whole load gives the model's tensors.
    """
    shards = stored_weights(folder, loading)
    return shards.renamed(loading.names(shards))


def stored_weights(folder: ModelFolder, loading: Loading) -> Shards:
    """The tensors of the files that transformers takes, by their names there."""
    return Shards.open(folder.path, [str(path.relative_to(folder.path)) for path in loading.files])


def _auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that makes a model of a config: of one that also sees, where only its text model is a causal one."""
    text = config.get_text_config(decoder=True)
    whole = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if whole and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForCausalLM


def _language_model(whole: PreTrainedModel) -> PreTrainedModel:
    """The causal language model of a model of pictures, sound and text; another model itself."""
    text = whole.config.get_text_config(decoder=True)
    if text is whole.config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return whole
    text = copy.deepcopy(text)
    text.tie_word_embeddings = whole.config.tie_word_embeddings
    text.dtype = getattr(text, "dtype", None) or getattr(whole.config, "dtype", None)
    model = skeleton(text)
    return model if _names_inside(model, whole) else whole


def _names_inside(model: PreTrainedModel, whole: PreTrainedModel) -> dict[str, str]:
    """Names of tensors of a model inside of a whole one: name there to name here; empty where it is not inside."""
    if model is whole:
        return {name: name for name in whole.state_dict()}
    heads = whole.get_output_embeddings(), model.get_output_embeddings()
    pairs = [(m, model.base_model) for m in whole.modules() if type(m) is type(model.base_model)]
    if len(pairs) != 1 or None in heads:
        return {}
    there, here = ({id(m): name for name, m in root.named_modules()} for root in (whole, model))
    return {
        f"{there[id(outer)]}.{name}": f"{here[id(inner)]}.{name}"
        for outer, inner in (*pairs, heads)
        for name in inner.state_dict()
    }


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config that says nothing of quantization."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def describe_config(config: PreTrainedConfig) -> Architecture:
    """Describe the language model of a config, without weights."""
    return describe(language_model(config))


def language_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of a config, which may be of more than text, without memory as `skeleton` makes it."""
    return _language_model(skeleton(without_quantization(config)))


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
        return _auto_class(config).from_config(config, dtype=dtype, trust_remote_code=code_is_trusted()).eval()
    except Exception as error:
        model_type = getattr(config, "model_type", "?")
        named = config.name_or_path or "the config"
        if code_is_trusted() and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            raise ModelFolderError(
                f"{named}: its own Python code makes no model ({first_line(error)}). Get it again, whole and for this "
                "transformers; for a type that transformers knows, leave --trust-remote-code out."
            ) from error
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelFolderError(
                f"{named}: config.json makes no {model_type} model ({first_line(error)}). Correct "
                "the value that this is about, or download the model again."
            ) from error
        text = config.get_text_config(decoder=True)
        inside = (
            ""
            if text is config
            else f" It is a model of more than text, with a text model of type {text.model_type!r}."
        )
        raise UnsupportedModel(
            f"model_type {model_type!r} has no causal language model here: {first_line(error)}{inside} Supported: {SUPPORTED}."
        ) from error


class _Answer(BaseException):  # no `except Exception` on the way may keep it
    """Leaves `from_pretrained` once everything is decided and nothing is read."""

    def __init__(self, model: PreTrainedModel, files: Iterable[str], conversions: Iterable[Any]) -> None:
        self.model, self.files, self.conversions = model, tuple(map(Path, files)), tuple(conversions)


@register_quantization_config(_ASK)
class _Asking(QuantizationConfigMixin):
    """Brings `_Asker` into a load."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = _ASK


@register_quantizer(_ASK)
class _Asker(HfQuantizer):
    """A quantizer that quantizes nothing: it is told what a load has decided before any weight is read."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        self.model, self.files = model, list(checkpoint_files or ())
        return model

    def update_weight_conversions(self, weight_conversions: Iterable[Any], *args: Any) -> Any:
        """Answer, before weights are read."""
        raise _Answer(self.model, self.files, weight_conversions)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """It is never saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """It is never trained."""
        return False
