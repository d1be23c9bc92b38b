"""A model to calibrate, opened from a local folder or the Hub: structure and tensors. Weights stay on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from wina_calib.common.memory import return_freed_memory
from wina_calib.errors import ModelFolderError, NumericError
from wina_calib.model.architecture import Architecture, describe
from wina_calib.model.dense_copy import (
    DenseCopy,
    KeptFolder,
    copy_of,
    has_adapter,
    load_gguf,
    quantization_of,
    write_copy,
)
from wina_calib.model.folder import ModelFolder, open_folder
from wina_calib.model.loading import Converted, ask, meta_model, open_weights
from wina_calib.model.locate import gguf_file, load_tokenizer, resolve
from wina_calib.model.tensor_names import is_added, is_derived, is_rotation, rotation_name
from wina_calib.storage import Shards

_TIED_ROWS = 8192
_CHECKED = 1 << 20  # numbers looked at together
_READERS = 4  # tensors of a layer that are read side by side


@dataclass(frozen=True)
class Source:
    """An opened model."""

    name: str  # what the user gave
    opened: ModelFolder  # its folder, with config and side files
    commit: str | None  # the Hub commit where there is one
    config: PreTrainedConfig  # of the model that is calibrated, which may be a part of what the folder holds
    architecture: Architecture  # its structure
    shards: Shards  # its tensors, by the model's names for them
    notes: tuple[str, ...] = ()  # what to tell the user about how the folder was read
    kept: Any = None  # a temporary folder that the weights lie in, kept as long as this

    @property
    def folder(self) -> Path:
        """The folder with config, tokenizer and side files."""
        return self.opened.path

    @property
    def is_plain(self) -> bool:
        """Whether the weights are those in the folder, and all of them."""
        return self.kept is None and type(self.config) is type(self.opened.config)

    @property
    def raw_config(self) -> dict[str, Any]:
        """The JSON object of a config.json for this model's weights, not quantized."""
        raw = self.opened.raw
        if type(self.config) is not type(self.opened.config):  # a part of it
            raw = self.config.to_diff_dict() | {
                "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)].__name__]
            }
            raw = {key: value for key, value in raw.items() if not key.startswith("_")}
        raw.pop("quantization_config", None)
        return (
            raw
            if self.architecture.tied == self.opened.config.tie_word_embeddings
            else raw | {"tie_word_embeddings": False}
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder's weights on disk."""
        layer = self.architecture.layers[0]
        return self.shards[f"{layer.prefix}{layer.sites[0].projections[0].module}.weight"].dtype

    def layer_names(self, index: int) -> list[str]:
        """Names of a decoder layer's tensors on disk, in file order."""
        prefix = self.architecture.layers[index].prefix
        return [n for n in self.shards if n.startswith(prefix) and not is_derived(n) and not is_added(n)]

    def rotations(self, index: int) -> dict[str, Tensor]:
        """A layer's run-time matrices by site name; empty for a model without them."""
        layer = self.architecture.layers[index]
        names = {site.name: rotation_name(layer, site.name) for site in layer.sites}
        return {site: self.load(name) for site, name in names.items() if name in self.shards}

    def end_names(self) -> list[str]:
        """Names of all tensors outside the decoder layers that belong to the model."""
        layers = tuple(layer.prefix for layer in self.architecture.layers)
        tied = f"{self.architecture.lm_head}.weight" if self.architecture.tied else None
        return [n for n in self.shards if not n.startswith(layers) and not is_derived(n) and n != tied]

    def names(self) -> list[str]:
        """Names of all tensors of the model on disk: what is outside the decoder layers, then layer by layer."""
        return self.end_names() + [n for i in range(len(self.architecture.layers)) for n in self.layer_names(i)]

    def load_layer(self, index: int) -> dict[str, Tensor]:
        """Read one decoder layer, keyed by path inside the layer, in the dtype on disk.

        Raises:
            NumericError: a weight is NaN or infinite.
        """
        return_freed_memory()
        prefix, names = self.architecture.layers[index].prefix, self.layer_names(index)
        with ThreadPoolExecutor(_READERS) as pool:
            tensors = pool.map(self.shards.load, names)
            return {name.removeprefix(prefix): self._finite(name, t) for name, t in zip(names, tensors, strict=True)}

    def load(self, name: str, rows: slice | Tensor | None = None) -> Tensor:
        """Read one tensor, or some rows of it as `Shards.load` takes them, and check that it is finite."""
        return self._finite(name, self.shards.load(name, rows=rows))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        parts = tensor.view(-1).split(_CHECKED)
        if not all(all_finite(part) for part in parts):
            bad = sum(int((~torch.isfinite(part)).sum()) for part in parts)
            raise NumericError(
                f"{self.shards[name].file.name}: {name} holds {bad} NaN or infinite values. The model is damaged: "
                "download or save it again."
            )
        return tensor

    def tokenizer(self) -> Any:
        """Load the model's tokenizer; see `load_tokenizer`."""
        return load_tokenizer(self.opened)


def all_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite. The smallest and the largest tell, ten times faster than a look at each."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def open_source(
    model: str | Path, *, revision: str | None = None, token: str | bool | None = None, calibrated: bool = False
) -> Source:
    """Open a model for calibration and check it against its config.

    With `calibrated`, the weights of a calibrated checkpoint; what calibration added is left aside.

    Raises:
        ModelFolderError: config or weights are missing, do not match each other, or are calibrated already.
        UnsupportedModel: the structure has no sparse sites.
    """
    if (file := gguf_file(model)) is not None:
        return _from_gguf(str(model), file)
    folder, commit = resolve(model, revision=revision, token=token)
    return source_of(open_folder(folder), str(model), commit, calibrated=calibrated)


def source_of(
    opened: ModelFolder,
    name: str,
    commit: str | None = None,
    *,
    calibrated: bool = False,
    view: Callable[[ModelFolder, Architecture, Shards], Shards] = lambda _folder, _architecture, shards: shards,
) -> Source:
    """`open_source` of a folder whose config was read; `view` gives its tensors as those of the model that is meant."""
    if not calibrated:
        _refuse_calibrated(opened)
    method = None if calibrated else quantization_of(opened)
    if method is not None or (not calibrated and has_adapter(opened.path)):
        return _from_copy(name, opened, commit, copy_of(opened, method))
    loading = ask(opened)
    try:
        shards = open_weights(opened, loading)
    except Converted:
        return _from_copy(name, opened, commit, copy_of(opened, None))
    notes = (loading.left_out,) if loading.left_out else ()
    arch = describe(loading.model)
    seen = view(opened, arch, shards)
    return _checked(Source(name, opened, commit, loading.config, arch, seen, notes), loading.model)


def _from_copy(name: str, opened: ModelFolder, commit: str | None, made: DenseCopy) -> Source:
    model, shards = made.model, made.shards
    return _checked(Source(name, opened, commit, model.config, describe(model), shards, (made.note,), made.kept), model)


def _from_gguf(name: str, file: Path) -> Source:
    """A GGUF file's model: its config and tokenizer lie in a temporary folder, as its weights do."""
    kept = KeptFolder()
    made = write_copy(load_gguf(file, kept.path), f"{file}: dequantized from GGUF by transformers")
    return _from_copy(name, open_folder(kept.path), None, replace(made, kept=(kept, made.kept)))


def _checked(source: Source, model: PreTrainedModel) -> Source:
    _check_tensors(source.folder, model, source.architecture, source.shards)
    return _tied_as_loaded(source)


def load_whole(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model in memory, as it is calibrated: what the folder's files hold may be another one's part, or quantized."""
    model = meta_model(source.config, dtype)
    names = [name for name in model.state_dict() if name in source.shards]
    model.load_state_dict({name: source.load(name).to(dtype) for name in names}, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(False)


def load_into(layer: torch.nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Put one layer's tensors (keyed by path inside the layer) into a module whose weights are on meta."""
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    layer.load_state_dict(state, strict=True, assign=True)
    layer.requires_grad_(False)


def _refuse_calibrated(opened: ModelFolder) -> None:
    if opened.is_reference:
        raise ModelFolderError(f"{opened.path} is calibrated already. Calibrate its base model.")
    if opened.is_calibrated:
        raise ModelFolderError(
            f"{opened.path} is calibrated already. Re-choose its sparsity with `wina-calib budget {opened.path} --apply "
            f"{opened.path}` or calibrate the base model."
        )


def _check_tensors(folder: Path, meta: PreTrainedModel, architecture: Architecture, shards: Shards) -> None:
    head, norm = f"{architecture.lm_head}.weight", f"{architecture.final_norm.module}.weight"
    expected = {name: tuple(t.shape) for name, t in meta.state_dict().items() if not is_derived(name)}
    if any(map(is_rotation, shards)):
        expected[norm] = (1, *expected[norm])  # so that the base model's class refuses it
    optional = {head} if architecture.tied else set()
    missing = sorted(set(expected) - set(shards) - optional)
    unknown = sorted(name for name in shards if name not in expected and not is_derived(name) and not is_added(name))
    wrong = [
        f"{name} is {tuple(shards[name].shape)}, config says {shape}"
        for name, shape in expected.items()
        if name in shards and tuple(shards[name].shape) != shape
    ]
    not_float = [name for name in expected if name in shards and not shards[name].dtype.is_floating_point]
    narrow = [name for name in expected if name in shards and shards[name].dtype.itemsize < 2]
    problems = [
        (missing, "tensors are missing"),
        (unknown, "tensors have no place in the model"),
        (wrong, "shapes are wrong"),
        (sorted({*not_float, *narrow}), "tensors are not bfloat16, float16, float32 or float64"),
    ]
    told = [
        f"{len(names)} {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for names, what in problems
        if names
    ]
    if told:
        raise ModelFolderError(
            f"{folder} does not match its config.json: {'; '.join(told)}. Download or save it again."
        )


def _tied_as_loaded(source: Source) -> Source:
    """The source untied where its files hold another lm_head than the embedding: transformers keeps both then."""
    arch, shards = source.architecture, source.shards
    head, embed = f"{arch.lm_head}.weight", f"{arch.embed}.weight"
    if not arch.tied or head not in shards:
        return source
    for first in range(0, arch.vocab_size, _TIED_ROWS):
        rows = slice(first, min(first + _TIED_ROWS, arch.vocab_size))
        if not torch.equal(shards.load(head, rows=rows), shards.load(embed, rows=rows)):
            config = copy.deepcopy(source.config)
            config.tie_word_embeddings = False
            return replace(source, config=config, architecture=replace(arch, tied=False))
    return source


def fitting_length(source: Source, seq_len: int) -> int:
    """Cut a block length to what the model takes.

    Raises:
        ModelFolderError: its config says that it takes nothing.
    """
    most = getattr(source.config, "max_position_embeddings", None)
    if most is None:
        return seq_len
    if most < 1:
        raise ModelFolderError(
            f"{source.opened.file}: max_position_embeddings is {most}; expected at least 1. Correct it, or download the model "
            "again."
        )
    return min(seq_len, int(most))
