"""Models whose files are not plain weights: quantized ones, GGUF files, an adapter beside the model.

transformers loads them whole, dequantizes or merges, and what it made is written to a temporary folder of plain weights.
"""

from __future__ import annotations

import inspect
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from wina_calib.common.text import first_line
from wina_calib.errors import ModelFolderError, UnsupportedModel, WinaError
from wina_calib.model.folder import ADAPTER_FILE, ModelFolder, code_is_trusted
from wina_calib.model.loading import ask, skeleton, stored_weights, without_quantization
from wina_calib.storage import Shards, ShardWriter, plan_shards

_SHARD_BYTES = 5 << 30


class KeptFolder:
    """A temporary folder that is removed with this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="wina-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class DenseCopy:
    """Plain weights that transformers made of a folder."""

    model: PreTrainedModel  # the model, on the meta device
    shards: Shards  # its weights
    note: str  # what was done, for the user
    kept: Any  # the temporary folder, kept as long as this


def has_adapter(folder: Path) -> bool:
    """Whether an adapter lies in a folder; its config alone is none.

    Raises:
        UnsupportedModel: it is pickled.
    """
    if not (folder / ADAPTER_FILE).is_file():
        return False
    whole = (folder / "adapter_model.safetensors").is_file()
    if not whole and (folder / "adapter_model.bin").is_file():
        raise UnsupportedModel(
            f"{folder} holds an adapter beside the model, pickled in adapter_model.bin, which can run code when read. Merge it "
            f"with peft if you trust its source, or move {ADAPTER_FILE} away to calibrate the model without it."
        )
    return whole


def quantization_of(folder: ModelFolder) -> str | None:
    """The method that a folder's weights are quantized with as transformers sees it; None for plain weights.

    Raises:
        ModelFolderError: config.json says something that transformers does not take.
    """
    config = folder.config
    parts = (config, config.get_text_config(decoder=True))
    section = next((s for p in parts if (s := getattr(p, "quantization_config", None)) is not None), None)
    if section is None:
        return None
    try:
        known = AutoHfQuantizer.supports_quant_method(section)
    except Exception as error:
        raise ModelFolderError(
            f"{folder.file}: quantization_config is {section!r:.80}, which names no quant_method that transformers knows. "
            "Remove the key if the weights are not quantized."
        ) from error
    return str(section.get("quant_method")) if known else None


def copy_of(folder: ModelFolder, method: str | None) -> DenseCopy:
    """Load a folder with transformers, and write the plain weights that come of it.

    `method` is what its weights are quantized with; None for weights that only need merging.

    Raises:
        UnsupportedModel: they cannot be dequantized, or the adapter cannot be merged.
        ModelFolderError: transformers cannot load it, or there is no room for the copy.
    """
    adapter = has_adapter(folder.path)
    if adapter and not _has_peft():
        raise UnsupportedModel(
            f"{folder.path} holds an adapter ({ADAPTER_FILE}) beside the model. Install peft to have it merged into the weights "
            f"(pip install peft), or move {ADAPTER_FILE} away to calibrate the model without it."
        )
    stored_weights(folder, ask(folder))  # refuses missing, cut and hostile files, and pickled ones
    config = _to_dequantize(folder.config, method)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder.path), config=config, dtype="auto", use_safetensors=True, trust_remote_code=code_is_trusted()
        )
        if method is not None:
            model = _dequantized(model)
        merged = _merge_adapters(model) if adapter else 0
    except WinaError:
        raise
    except Exception as error:
        if adapter:
            raise UnsupportedModel(
                f"{folder.path} holds an adapter ({ADAPTER_FILE}) beside the model, and the two cannot be put together here "
                f"({first_line(error)}). Merge it with peft (merge_and_unload, then save_pretrained), or move {ADAPTER_FILE} "
                "away to calibrate the model without it."
            ) from error
        if method is None:
            raise ModelFolderError(f"{folder.path} cannot be loaded: {first_line(error)}") from error
        told = f"cannot dequantize it here ({first_line(error)}). Install what that asks for, or give the model"
        if not _has_a_way_back(method):
            told = "has no way back from that to plain weights. Give the model"
        raise UnsupportedModel(
            f"{folder.path} is quantized ({method}), and transformers {told} that it was made from."
        ) from error
    done = [f"dequantized from {method} by transformers"] if method is not None else []
    done += [f"the adapter beside it merged into {merged} weights"] if adapter else []
    return write_copy(model, f"{folder.path}: {', '.join(done) or 'put together by transformers'}")


def write_copy(model: PreTrainedModel, note: str) -> DenseCopy:
    """Write a loaded model's weights to a temporary folder.

    Raises:
        UnsupportedModel: some are not plain floating-point numbers.
        ModelFolderError: there is no room for them.
    """
    meta = skeleton(without_quantization(model.config))
    state = _plain_state(model, meta)
    kept = KeptFolder()
    target, size = kept.path, sum(tensor.nbytes for tensor in state.values())
    if shutil.disk_usage(target).free < size:
        raise ModelFolderError(
            f"the dense copy takes {size / 1e9:.1f} GB, more than is free in {target.parent}. Free some, or set TMPDIR to a "
            "folder on a larger disk."
        )
    shards = plan_shards({name: (t.dtype, tuple(t.shape)) for name, t in state.items()}, _SHARD_BYTES)
    names = [f"dense-{i + 1:05d}.safetensors" for i in range(len(shards))]
    for name, specs in zip(names, shards, strict=True):
        with ShardWriter(target / name, specs, {"format": "pt"}) as writer:
            for tensor in specs:
                writer.write(tensor, state[tensor].detach().cpu().contiguous())
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in state.values()}))
    return DenseCopy(meta, Shards.open(target, names), f"{note}; {size / 1e9:.2f} GB as {dtypes}", kept)


def load_gguf(file: Path, folder: Path) -> PreTrainedModel:
    """Load a GGUF file dequantized, and write config and tokenizer that it holds into a folder.

    Raises:
        UnsupportedModel: transformers cannot read it.
    """
    options: dict[str, Any] = {"gguf_file": file.name}
    if "gguf" in AUTO_QUANTIZATION_CONFIG_MAPPING:
        options["quantization_config"] = AUTO_QUANTIZATION_CONFIG_MAPPING["gguf"](dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype="auto", **options)
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)
    except Exception as error:
        raise UnsupportedModel(
            f"{file} is a GGUF file, and transformers cannot read it here ({first_line(error)}). GGUF files hold quantized "
            "models for llama.cpp: give the safetensors folder or Hub id of the model that it was made from, or install "
            "what that asks for."
        ) from error
    model = _dequantized(model)
    without_quantization(model.config).save_pretrained(folder)
    return model


def _has_peft() -> bool:
    from transformers.utils import is_peft_available

    return bool(is_peft_available())


def _has_a_way_back(method: str) -> bool:
    """Whether transformers dequantizes a method at all, in a load or after it."""
    kind = AUTO_QUANTIZER_MAPPING.get(method)
    return bool(_undoing(method)) or getattr(kind, "_dequantize", None) is not HfQuantizer._dequantize


def _undoing(method: str) -> dict[str, bool]:
    """What a method's config takes to be undone in a load; empty where it takes nothing of the kind."""
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    known = inspect.signature(kind).parameters if kind is not None else {}
    changed = {"dequantize": True} if "dequantize" in known else {"run_compressed": False}
    return changed if known.keys() & changed.keys() else {}


def _to_dequantize(config: PreTrainedConfig, method: str | None) -> PreTrainedConfig:
    """The config with its quantization set to be undone while loading, where the method can do so."""
    section = getattr(config, "quantization_config", None)
    if method is None or not isinstance(section, dict):
        return config if method is not None else without_quantization(config)
    undoing = _undoing(method)
    if not undoing:
        return config
    copied = without_quantization(config)
    copied.quantization_config = section | undoing
    return copied


def _dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain weights, by its quantizer where they are not plain yet."""
    meta = skeleton(without_quantization(model.config))
    return model if not _not_plain(model, _wanted(meta)) else model.dequantize() or model


def _plain_state(model: PreTrainedModel, meta: PreTrainedModel) -> dict[str, Tensor]:
    """A loaded model's tensors by the names of a plain one; a tied head is left out."""
    wanted = _wanted(meta)
    if bad := _not_plain(model, wanted):
        raise UnsupportedModel(
            f"{model.name_or_path}: transformers leaves {len(bad)} weights of it quantized, such as {bad[0]}. Give the model "
            "that it was made from."
        )
    state = model.state_dict()
    return {name: state[name] for name in wanted}


def _wanted(meta: PreTrainedModel) -> dict[str, Tensor]:
    head = meta.get_output_embeddings()
    tied = meta.config.get_text_config(decoder=True).tie_word_embeddings
    left_out = {f"{name}.weight" for name, module in meta.named_modules() if tied and module is head}
    return {name: tensor for name, tensor in meta.state_dict().items() if name not in left_out}


def _not_plain(model: PreTrainedModel, wanted: dict[str, Tensor]) -> list[str]:
    """Names of tensors that a plain model has and this one has not, or not as floating-point numbers of that shape."""
    state = model.state_dict()
    return [
        name
        for name, tensor in wanted.items()
        if name not in state
        or state[name].shape != tensor.shape
        or not state[name].is_floating_point()
        or state[name].dtype.itemsize < 2
    ]


def _untie(model: PreTrainedModel, changed: list[torch.nn.Module]) -> None:
    """Give the head weights of its own where it shares them with the embedding, and an adapter changes one of the two."""
    config = model.config.get_text_config(decoder=True)
    ends = [
        end.get_base_layer() if hasattr(end, "get_base_layer") else end
        for end in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    if config.tie_word_embeddings and any(end is module for end in ends for module in changed):
        ends[1].weight = torch.nn.Parameter(ends[1].weight.detach().clone(), requires_grad=False)
        config.tie_word_embeddings = model.config.tie_word_embeddings = False


def _merge_adapters(model: PreTrainedModel) -> int:
    """Merge the adapters that peft put into a model, take its layers out again, and count them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    _untie(model, [layer.get_base_layer() for layer in layers.values()])
    for name, layer in layers.items():
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    if left := [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")]:
        raise UnsupportedModel(
            f"{model.name_or_path}: the adapter beside the model changes {left[0]} in a way that cannot be merged. Merge it "
            "with peft (merge_and_unload) and save the model again."
        )
    return len(layers)
