"""A model to calibrate, opened from a local folder or the Hub: config, structure, tensors on disk. Weights stay on disk."""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from wina_calib.errors import HubError, ModelFolderError, NumericError, UnsupportedModel
from wina_calib.families import SUPPORTED, Architecture, Layer, describe, refuse_encoder_decoder
from wina_calib.remote import fetch
from wina_calib.shards import Shards, read_json

DEMO = "demo"
RUNTIME_TYPE = "wina_calib-"  # begins the model_type of checkpoints that need run-time matrices
REFERENCE_FILE = "wina_config.json"  # in place of config.json in a checkpoint that refers to its base model's weights
_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)
_DERIVED = ("*rotary_emb.inv_freq", "*.masked_bias", "*.attn.bias")
_CONFIG_BYTES = 4 << 20
_MAX_SIZE, _MAX_COUNT = 1 << 24, 1024  # of numbers in config.json that sizes are made of, and of repeated modules
_SIZES = re.compile(
    r"(hidden|intermediate|embedding|inner|ffn|head|d|model|kv|q|lora).*(size|dim|rank|heads)|n_(embd|head|inner)"
)
_COUNTS = re.compile(r"n_layers?|num_.*(layers|blocks|experts)")
_TIED_ROWS = 8192
_CHECKED = 1 << 20  # numbers looked at together


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

    def meta_model(self, dtype: torch.dtype, *, attention: str | None = None) -> PreTrainedModel:
        """Build the model with weights on the meta device and real buffers."""
        return _meta_model(self.config, dtype, attention)

    def layer_names(self, index: int) -> list[str]:
        """Names of a decoder layer's tensors on disk, in file order."""
        prefix = self.architecture.layers[index].prefix
        return [n for n in self.shards if n.startswith(prefix) and not is_derived(n) and not is_added(n)]

    def rotations(self, index: int) -> dict[str, Tensor]:
        """A layer's run-time matrices by site name; empty for a model without them."""
        layer = self.architecture.layers[index]
        names = {site.name: f"{layer.prefix}wina.{site.name}.rotation" for site in layer.sites}
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
        _return_freed_memory()
        prefix = self.architecture.layers[index].prefix
        return {name.removeprefix(prefix): self.load(name) for name in self.layer_names(index)}

    def load(self, name: str, rows: slice | None = None) -> Tensor:
        """Read one tensor (or some rows of it) and check that it is finite."""
        tensor = self.shards.load(name, rows=rows)
        bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.view(-1).split(_CHECKED))
        if bad:
            raise NumericError(
                f"{self.shards[name].file.name}: {name} holds {bad} NaN or infinite values. The model is damaged: "
                "download or save it again."
            )
        return tensor

    def tokenizer(self) -> Any:
        """Load the model's tokenizer; see `load_tokenizer`."""
        return load_tokenizer(self.folder)


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
    path = folder / ("config.json" if not is_reference(folder) else REFERENCE_FILE)
    raw = read_json(path, max_bytes=_CONFIG_BYTES) if path.is_file() else None
    return isinstance(raw, dict) and _needs_code(raw)


def check_code(folder: Path) -> None:
    """Raise UnsupportedModel where a model folder needs Python code of its own and may not run it."""
    if not code_is_trusted() and has_own_code(folder):
        raise UnsupportedModel(
            f"{folder} needs Python code of its own, of which nothing has run. Read it, then give --trust-remote-code, or "
            "trust_remote_code=True in Python."
        )


def _return_freed_memory() -> None:
    """Give the pages of freed tensors back to the system: glibc keeps those of one layer while it takes others for the next."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, another system
        ctypes.CDLL(None).malloc_trim(0)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        ModelFolderError: there is none that can be loaded.
    """
    folder = weights_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=code_is_trusted())
    except Exception as error:
        raise ModelFolderError(
            f"{folder} has no tokenizer that can be loaded ({_first_line(error)}). Copy tokenizer.json and "
            "tokenizer_config.json of the model into the folder."
        ) from error


def demo_folder() -> Path:
    """Folder of the bundled demo model."""
    return Path(__file__).parent / "data" / "demo-llama-5m"


def resolve(
    model: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
    local_files_only: bool = False,
) -> tuple[Path, str | None]:
    """Turn `demo`, a local folder or a Hub repository id into a local folder and, for the Hub, a commit.

    Args:
        model: what the user gave.
        revision: branch, tag or commit on the Hub.
        token: as huggingface_hub takes it.
        subfolder: folder inside of it.
        local_files_only: do not ask the network.

    Raises:
        ModelFolderError: there is no such folder.
        HubError: the Hub does not give it.
    """
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise ModelFolderError(f"subfolder is {subfolder!r}; expected a path inside of {model}.")
    path, commit = _root(model, revision, token, subfolder, local_files_only)
    if not (path / subfolder).is_dir():
        raise ModelFolderError(f"{model} has no folder {subfolder!r}.")
    return path / subfolder, commit


def _root(
    model: str, revision: str | None, token: str | bool | None, subfolder: str, local_files_only: bool
) -> tuple[Path, str | None]:
    path = Path(model).expanduser()
    if model == DEMO and not (path / "config.json").is_file():
        return demo_folder(), None
    if path.is_dir():
        return path, None
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelFolderError(f"{model} is not a folder. Give a model folder, a Hub id such as USER/NAME, or `demo`.")
    try:
        return fetch(model, revision=revision, token=token, subfolder=subfolder, local_files_only=local_files_only)
    except HubError as error:
        raise HubError(f"{error} There is no folder of that name here either.") from None


def open_source(
    model: str,
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
    meta = _skeleton(config)
    architecture = describe(meta)
    shards = Shards.open(folder)
    _check_tensors(folder, meta, architecture, shards)
    _check_tied(folder, architecture, shards)
    return Source(model, folder, commit, config, architecture, shards)


def load_config(folder: Path) -> PreTrainedConfig:
    """Read config.json of a folder, bounded in size, and let transformers parse it."""
    path = folder / (REFERENCE_FILE if is_reference(folder) else "config.json")
    if not path.is_file():
        raise ModelFolderError(f"{folder} has no config.json: not a Hugging Face model folder.")
    raw = read_json(path, max_bytes=_CONFIG_BYTES)
    if isinstance(raw, dict) and is_reference(folder):
        raw = raw.get("config")
    if not isinstance(raw, dict):
        raise ModelFolderError(f"{path} holds no JSON object.")
    check_code(folder)
    _check_sizes(path, raw)
    base = str(raw.get("model_type", "")).removeprefix(RUNTIME_TYPE)
    try:
        if base in _known_types():
            return AutoConfig.for_model(**(raw | {"model_type": base}))
        return AutoConfig.from_pretrained(folder, trust_remote_code=code_is_trusted())
    except Exception as error:
        raise ModelFolderError(f"{path} cannot be read as a model config: {_first_line(error)}") from error


def describe_config(config: PreTrainedConfig) -> Architecture:
    """Describe the model of a config, without weights."""
    return describe(_skeleton(config))


def is_reference(folder: Path) -> bool:
    """Whether a folder holds a calibration only, and names the base model that has the weights."""
    return (folder / REFERENCE_FILE).is_file()


def weights_folder(
    folder: Path, *, base: str | None = None, token: str | bool | None = None, local_files_only: bool = False
) -> Path:
    """The folder with the weights and the tokenizer of a checkpoint: itself, or its base model's.

    Args:
        folder: a checkpoint or a model.
        base: where the base model is, if not where a checkpoint by reference says.
        token: as huggingface_hub takes it.
        local_files_only: do not ask the network.

    Raises:
        ModelFolderError, HubError: the base model cannot be had.
    """
    if not is_reference(folder):
        return folder
    raw = read_json(folder / REFERENCE_FILE, max_bytes=_CONFIG_BYTES)
    name, commit = (raw.get("base_model"), raw.get("base_commit")) if isinstance(raw, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(commit, str | None):
        raise ModelFolderError(f"{folder / REFERENCE_FILE} names no base model. Download or calibrate it again.")
    if base is None and commit is None and not Path(name).is_dir():
        raise ModelFolderError(
            f"{folder} takes its weights from {name}, which is not here. Say where they are: "
            'wina_calib.load(..., base="FOLDER").'
        )
    return resolve(base or name, revision=None if base else commit, token=token, local_files_only=local_files_only)[0]


def is_added(name: str) -> bool:
    """Whether a tensor was added by calibration."""
    return ".wina." in name


def is_derived(name: str) -> bool:
    """Whether a stored tensor is one that models compute for themselves (old checkpoints keep some)."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _DERIVED)


def load_into(layer: torch.nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Put one layer's tensors (keyed by path inside the layer) into a module whose weights are on meta."""
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    layer.load_state_dict(state, strict=True, assign=True)
    layer.requires_grad_(False)


def _needs_code(raw: dict[str, Any]) -> bool:
    return bool(raw.get("auto_map")) and str(raw.get("model_type", "")).removeprefix(RUNTIME_TYPE) not in _known_types()


def _known_types() -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())


def _check_sizes(path: Path, raw: dict[str, Any]) -> None:
    """Refuse a config whose model could not be built in reasonable time and memory, before it is parsed."""
    for name, value in raw.items():
        limit = _MAX_COUNT if _COUNTS.fullmatch(name) else _MAX_SIZE if _SIZES.fullmatch(name) else None
        if limit is not None and isinstance(value, int | float) and not abs(value) <= limit:
            raise ModelFolderError(
                f"{path}: {name} is {value!s:.40}; at most {limit} is supported. Download the model again."
            )


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model's modules with everything, buffers too, on the meta device: whatever the config says, no memory."""
    with torch.device("meta"):
        return _build(config, torch.float32, {})


def _meta_model(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return _build(config, dtype, {"attn_implementation": attention} if attention else {})


def _build(config: PreTrainedConfig, dtype: torch.dtype, extra: dict[str, Any]) -> PreTrainedModel:
    refuse_encoder_decoder(config)
    try:
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=code_is_trusted(), **extra
        ).eval()
    except Exception as error:
        raise UnsupportedModel(
            f"model_type {getattr(config, 'model_type', '?')!r} has no causal language model here: {_first_line(error)} "
            f"Supported: {SUPPORTED}."
        ) from error


def _refuse_quantized(folder: Path, config: PreTrainedConfig) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if method == "wina":
        raise ModelFolderError(
            f"{folder} is calibrated already. Re-choose its sparsity with `wina-calib budget {folder} --apply {folder}` or "
            "calibrate the base model."
        )
    raise UnsupportedModel(f"{folder} is quantized ({method}). Calibrate the unquantized model.")


def _check_tensors(folder: Path, meta: PreTrainedModel, architecture: Architecture, shards: Shards) -> None:
    head, norm = f"{architecture.lm_head}.weight", f"{architecture.final_norm.module}.weight"
    expected = {name: tuple(t.shape) for name, t in meta.state_dict().items() if not is_derived(name)}
    if any(name.endswith(".rotation") for name in shards):
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


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


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


def layer_weights(layer: Layer, tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Weights of a layer's sites: site name to its projections' weights in order."""
    return {site.name: [tensors[f"{p.module}.weight"] for p in site.projections] for site in layer.sites}
