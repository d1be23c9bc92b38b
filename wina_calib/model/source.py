"""A model to calibrate, opened from a local folder or the Hub: structure and tensors. Weights stay on disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from wina_calib.common.memory import return_freed_memory
from wina_calib.errors import ModelFolderError, NumericError, UnsupportedModel
from wina_calib.model.architecture import Architecture, describe
from wina_calib.model.config import (
    METHOD,
    is_reference,
    load_config,
    skeleton,
)
from wina_calib.model.locate import load_tokenizer, resolve
from wina_calib.model.tensor_names import is_added, is_derived, is_rotation, rotation_name
from wina_calib.storage import Shards

_TIED_ROWS = 8192
_CHECKED = 1 << 20  # numbers looked at together
_READERS = 4  # tensors of a layer that are read side by side


@dataclass(frozen=True)
class Source:
    """An opened model folder. `name` is what the user gave, `commit` the Hub commit where there is one."""

    name: str
    folder: Path
    commit: str | None
    config: PreTrainedConfig
    architecture: Architecture
    shards: Shards

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
        return load_tokenizer(self.folder)


def all_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite. The smallest and the largest tell, ten times faster than a look at each."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def open_source(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    calibrated: bool = False,
) -> Source:
    """Open a model for calibration and check it against its config.

    Args:
        model: a folder, a Hub id or `demo`.
        revision: branch, tag or commit on the Hub.
        token: as huggingface_hub takes it.
        calibrated: open the weights of a calibrated checkpoint; what calibration added is left aside.

    Raises:
        ModelFolderError: config or weights are missing, do not match each other, or are calibrated already.
        UnsupportedModel: the structure has no sparse sites.
    """
    folder, commit = resolve(model, revision=revision, token=token)
    config = load_config(folder)
    if not calibrated:
        if is_reference(folder):
            raise ModelFolderError(f"{folder} is calibrated already. Calibrate its base model.")
        _refuse_quantized(folder, config)
    meta = skeleton(config)
    architecture = describe(meta)
    shards = Shards.open(folder)
    _check_tensors(folder, meta, architecture, shards)
    _check_tied(folder, architecture, shards)
    return Source(str(model), folder, commit, config, architecture, shards)


def load_into(layer: torch.nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Put one layer's tensors (keyed by path inside the layer) into a module whose weights are on meta."""
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    layer.load_state_dict(state, strict=True, assign=True)
    layer.requires_grad_(False)


def _refuse_quantized(folder: Path, config: PreTrainedConfig) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if method == METHOD:
        raise ModelFolderError(
            f"{folder} is calibrated already. Re-choose its sparsity with `wina-calib budget {folder} --apply {folder}` or "
            "calibrate the base model."
        )
    raise UnsupportedModel(f"{folder} is quantized ({method}). Calibrate the unquantized model.")


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
    found = [
        f"{len(names)} {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for names, what in problems
        if names
    ]
    if found:
        raise ModelFolderError(
            f"{folder} does not match its config.json: {'; '.join(found)}. Download or save it again."
        )


def _check_tied(folder: Path, architecture: Architecture, shards: Shards) -> None:
    """Refuse a tied model whose files hold another lm_head: transformers would use it."""
    head, embed = f"{architecture.lm_head}.weight", f"{architecture.embed}.weight"
    if not architecture.tied or head not in shards:
        return
    for first in range(0, architecture.vocab_size, _TIED_ROWS):
        rows = slice(first, min(first + _TIED_ROWS, architecture.vocab_size))
        if not torch.equal(shards.load(head, rows=rows), shards.load(embed, rows=rows)):
            raise ModelFolderError(
                f"{folder}: config.json ties lm_head to the embedding, but {head} differs from {embed}. Set "
                '"tie_word_embeddings": false in config.json to keep both, or remove the tensor.'
            )


def fitting_length(source: Source, seq_len: int) -> int:
    """Cut a block length to what the model takes."""
    return min(seq_len, int(getattr(source.config, "max_position_embeddings", seq_len)))
