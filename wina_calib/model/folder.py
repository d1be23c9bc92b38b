"""A model folder: what its config.json says, read once, within bounds, given to transformers to parse, and handed on.

Own Python code of a folder runs only where it is trusted.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from wina_calib.common.text import first_line
from wina_calib.errors import ModelFolderError, UnsupportedModel, WinaError
from wina_calib.storage import read_json, safe_path

METHOD = "wina"  # the `quant_method` of a calibrated model's config
RUNTIME_TYPE = "wina_calib-"  # begins the model_type of checkpoints that need run-time matrices
_CONFIG = "config.json"
REFERENCE_FILE = "wina_config.json"  # in place of config.json in a checkpoint that refers to its base model's weights
CONFIG_BYTES = 4 << 20
# Keys that say how a model is to be run, and where: neither its weights nor what it computes depend on them.
ELSEWHERE = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_return_dict",
    "torchscript",
    "fusion_config",
    "distributed_config",
)
ADAPTER_FILE = "adapter_config.json"
_OF_FILES = ("configuration_files", "transformers_weights")  # keys that name files of one folder
_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)
_READ: ContextVar[tuple[ModelFolder, bool] | None] = ContextVar("read", default=None)
# Numbers in config.json that decide how much is built, and the most that they may be.
_LIMITS = {
    re.compile(r"n_layers?|num_.*(layers|blocks|experts)"): 1024,
    re.compile("num_labels"): 1 << 16,  # transformers makes a table of them
    re.compile(
        r"(hidden|intermediate|embedding|inner|ffn|head|d|model|kv|q|lora).*(size|dim|rank|heads)|n_(embd|head|inner)"
    ): 1 << 24,
}


@contextmanager
def remote_code(trusted: bool) -> Iterator[None]:
    """Let model folders run Python code of their own inside the context; without it, and by default, none runs."""
    before = _TRUSTED.set(trusted or _TRUSTED.get())
    try:
        yield
    finally:
        _TRUSTED.reset(before)


def code_is_trusted() -> bool:
    """Whether model folders may run Python code of their own here."""
    return _TRUSTED.get()


@dataclass(frozen=True)
class ModelFolder:
    """A model folder whose config file has been read, once. transformers parses what was read when it is asked for."""

    file: Path  # the config file
    stored: dict[str, Any]  # what it holds
    _files: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def path(self) -> Path:
        """The folder."""
        return self.file.parent

    @property
    def is_reference(self) -> bool:
        """Whether the folder holds a calibration only, and names the base model that has the weights."""
        return self.file.name == REFERENCE_FILE

    @property
    def section(self) -> dict[str, Any] | None:
        """The `quantization_config` of the folder; None where there is none."""
        section = self.stored.get("quantization_config")
        return section if isinstance(section, dict) else None

    @property
    def is_calibrated(self) -> bool:
        """Whether calibration wrote the folder."""
        return self.is_reference or (self.section or {}).get("quant_method") == METHOD

    @property
    def needs_code(self) -> bool:
        """Whether only Python code in the folder knows the model type."""
        known = str(self._own.get("model_type", "")).removeprefix(RUNTIME_TYPE) in CONFIG_MAPPING
        return bool(self._own.get("auto_map")) and not known

    @property
    def names_code(self) -> bool:
        """Whether the config names Python code for the model's class or config, needed or not."""
        names = self._own.get("auto_map")
        return isinstance(names, dict) and not {"AutoConfig", "AutoModelForCausalLM"}.isdisjoint(names)

    @property
    def runs_code(self) -> bool:
        """Whether transformers takes the model's class or config from Python code in the folder."""
        return self.needs_code or (self.names_code and code_is_trusted())

    @property
    def auto_map(self) -> dict[str, Any]:
        """What is made of Python classes here, by Auto class. Classes of a model that is made without them are left out."""
        named = self._own.get("auto_map")
        named = named if isinstance(named, dict) else {}
        if self.runs_code or self.is_calibrated:
            return dict(named)
        return {auto: place for auto, place in named.items() if not auto.startswith(("AutoConfig", "AutoModel"))}

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config that transformers makes of the folder, asked once.

        Raises:
            ModelFolderError: it cannot make one.
            UnsupportedModel: that needs Python code of the folder, which is not trusted.
        """
        self._check_code()
        where = self.path if self.file.name == _CONFIG else self.file
        try:
            with self.handed_on():
                return AutoConfig.from_pretrained(str(where), trust_remote_code=code_is_trusted())
        except WinaError:
            raise
        except Exception as error:
            raise ModelFolderError(
                f"{self.file} cannot be read as a model config: {first_line(error).removesuffix('.')}. Correct it, or "
                "download the model again."
            ) from error

    @property
    def raw(self) -> dict[str, Any]:
        """A copy of the JSON object that transformers made the config of: that of config.json, or of a file it names.

        Without what is true of this folder's files only, and what only concerns how the model is run elsewhere.
        """
        assert self.config is not None
        chosen = self.read(self.file) if not self._files else copy.deepcopy(next(reversed(self._files.values())))
        raw = {key: value for key, value in chosen.items() if key not in _OF_FILES}
        if "auto_map" in raw:
            raw["auto_map"] = self.auto_map
        return raw if raw.get("auto_map", True) else {key: value for key, value in raw.items() if key != "auto_map"}

    def check_config(self) -> None:
        """Raise as `config` does, in our own words, before a library reads it."""
        _ = self.config

    def _check_code(self) -> None:
        """Raise UnsupportedModel where the model needs Python code of the folder and may not run it."""
        if not code_is_trusted() and self.needs_code:
            raise UnsupportedModel(
                f"{self.path} needs Python code of its own, of which nothing has run. Read it, then give "
                "--trust-remote-code, or trust_remote_code=True in Python."
            )

    @contextmanager
    def handed_on(self, *, as_stored: bool = False) -> Iterator[None]:
        """Inside, transformers reads the folder's config files through this object, each once and within bounds.

        `as_stored`: as they are, for a load; otherwise as those of a base model that is run here.
        """
        before = _READ.set((self, as_stored))
        try:
            yield
        finally:
            _READ.reset(before)

    @property
    def _own(self) -> dict[str, Any]:
        """The model's config as stored, without parsing it."""
        raw = self.stored.get("config") if self.is_reference else self.stored
        if not isinstance(raw, dict):
            raise ModelFolderError(f"{self.file} holds no config. Download or calibrate it again.")
        return raw

    def read(self, path: Path) -> dict[str, Any]:
        """A copy of what transformers is to parse of a config file in the folder: the one that was read, or one it names."""
        if path.name not in self._files:
            raw = copy.deepcopy(self._own) if path == self.file else _read_object(safe_path(self.path, path.name))
            _check_sizes(path, raw)
            _check_quantization(path, raw.get("quantization_config"))
            self._files[path.name] = _as_anywhere(raw)
        return copy.deepcopy(self._files[path.name])


def open_folder(path: Path) -> ModelFolder:
    """Read a model folder's config file.

    Raises:
        ModelFolderError: there is none, or it holds no JSON object.
        CheckpointError: it is damaged or too large.
    """
    file = config_file(path)
    if not file.is_file():
        raise ModelFolderError(_without_config(path))
    return open_config(file)


def open_config(file: Path) -> ModelFolder:
    """Read a config file of any name; its folder need hold nothing else."""
    return ModelFolder(file, _read_object(file))


def is_reference(folder: Path) -> bool:
    """Whether a folder holds a calibration only, and names the base model that has the weights."""
    return (folder / REFERENCE_FILE).is_file()


def config_file(folder: Path) -> Path:
    """The file that holds a folder's config."""
    return folder / (REFERENCE_FILE if is_reference(folder) else _CONFIG)


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder's config file holds."""
    return open_folder(folder).stored


def load_config(folder: Path) -> PreTrainedConfig:
    """The config that transformers makes of a folder."""
    return open_folder(folder).config


def base_config(raw: dict[str, Any]) -> dict[str, Any]:
    """What a calibrated checkpoint's config.json says, as the base model's would say it."""
    base = {name: value for name, value in raw.items() if name != "quantization_config"}
    if str(raw.get("model_type", "")).startswith(RUNTIME_TYPE):
        base["model_type"] = str(raw["model_type"]).removeprefix(RUNTIME_TYPE)
        base["architectures"] = [str(name).removeprefix("Wina") for name in raw.get("architectures") or ()]
    return base


def calibration_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What calibration wrote into a config; None for a model that is not calibrated."""
    section = getattr(config, "quantization_config", None)
    return section if isinstance(section, dict) and section.get("quant_method") == METHOD else None


def _without_config(path: Path) -> str:
    adapter = path / ADAPTER_FILE
    if not adapter.is_file():
        return f"{path} has no config.json: not a Hugging Face model folder."
    try:
        base = _read_object(adapter).get("base_model_name_or_path")
    except WinaError:
        base = None
    named = base if isinstance(base, str) and base not in ("", ".") else None
    return (
        f"{path} is an adapter{f' of {named}' if named else ''}, without the model that it changes. Merge the two with peft "
        f"(merge_and_unload, then save_pretrained) and give that folder, or calibrate {named or 'its base model'}."
    )


def _read_object(path: Path) -> dict[str, Any]:
    raw = read_json(path, max_bytes=CONFIG_BYTES)
    if not isinstance(raw, dict):
        raise ModelFolderError(f"{path} holds no JSON object.")
    return raw


def _as_anywhere(raw: dict[str, Any]) -> dict[str, Any]:
    """A config without what only concerns how the model is run elsewhere, of the base model's type."""
    kept = {key: value for key, value in raw.items() if key not in ELSEWHERE}
    nested = {key: _as_anywhere(v) for key, v in kept.items() if key.endswith("_config") and isinstance(v, dict)}
    if isinstance(kept.get("model_type"), str):
        kept["model_type"] = kept["model_type"].removeprefix(RUNTIME_TYPE)
    return kept | nested


def _check_sizes(path: Path, raw: dict[str, Any]) -> None:
    """Refuse a config whose model could not be built in reasonable time and memory, before it is parsed."""
    for name, value in raw.items():
        if isinstance(value, dict):
            _check_sizes(path, value)
        limit = next((most for names, most in _LIMITS.items() if names.fullmatch(name)), None)
        if limit is not None and isinstance(value, int | float) and not abs(value) <= limit:
            raise ModelFolderError(
                f"{path}: {name} is {value!s:.40}; at most {limit} is supported. Download the model again."
            )


def _check_quantization(path: Path, section: Any) -> None:
    if section is not None and not isinstance(section, dict):
        raise ModelFolderError(
            f"{path}: quantization_config is {section!r:.80}, expected an object. Remove the key if the weights are not "
            "quantized, or download the model again."
        )


def _hand_on() -> None:
    """Let transformers take from `ModelFolder.read` what it would read of config files inside `handed_on`.

    The Auto classes take a folder and never the JSON object, so without this every file is read and parsed once more, after
    its check, without bounds. Where transformers no longer has the function, that is what happens.
    """
    stock = PreTrainedConfig.__dict__.get("_dict_from_json_file")
    if not isinstance(stock, classmethod) or stock.__func__.__module__ == __name__:
        return

    def read(cls: type[PreTrainedConfig], json_file: Any) -> Any:
        handed, path = _READ.get(), Path(json_file)
        folder, as_stored = handed or (None, False)
        if folder is None or path.parent != folder.path or (as_stored and path != folder.file):
            return stock.__func__(cls, json_file)
        return cls._decode_special_floats(copy.deepcopy(folder.stored) if as_stored else folder.read(path))

    PreTrainedConfig._dict_from_json_file = classmethod(read)


_hand_on()
