"""Load a calibrated checkpoint, and choose its sparsity while it runs."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from wina_calib.checkpoint.by_reference import complete_folder, keep_with
from wina_calib.checkpoint.reader import open_calibrated, open_checkpoint, settings_of
from wina_calib.choices import PREFILL, is_sparsity
from wina_calib.errors import UsageError
from wina_calib.model.folder import ModelFolder, code_is_trusted, remote_code
from wina_calib.model.locate import resolve
from wina_calib.runtime.modules import SiteState, model_weighted, site_states
from wina_calib.runtime.quantization_config import WinaConfig
from wina_calib.runtime.state import RuntimeState

logger = logging.getLogger(__name__)


def load(
    path_or_repo: str | Path,
    sparsity: float | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    prefill: str | None = None,
    subfolder: str = "",
    local_files_only: bool = False,
    base: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a calibrated checkpoint as a sparse model.

    Args:
        path_or_repo: checkpoint folder or Hub repository id.
        sparsity: model sparsity to run at; None is the one it was calibrated for, 0 computes everything.
        dtype: of the weights; `auto` is that on disk.
        device_map: as in `from_pretrained`; None loads to the CPU.
        revision: branch, tag or commit on the Hub.
        token: as huggingface_hub takes it; never stored.
        prefill: `sparse` masks prompts too, `dense` computes them fully; None is the checkpoint's.
        subfolder: folder of the checkpoint inside the folder or repository.
        local_files_only: take what the cache has, without a look at the network.
        base: where the base model's weights are, for a checkpoint that refers to them; None is where it says.
        trust_remote_code: run Python code that the checkpoint brings. Read it first.
        **kwargs: passed on to `from_pretrained`.

    Returns:
        A transformers model: `generate`, `save_pretrained` and the rest work as usual.

    Raises:
        WinaError: the checkpoint cannot be had, is damaged, not calibrated or of a newer format.

    Example:
        ```python
        model = wina_calib.load("demo-sparse", sparsity=0.4)
        ```
    """
    folder, commit = resolve(
        path_or_repo, revision=revision, token=token, subfolder=subfolder, local_files_only=local_files_only
    )
    opened = open_calibrated(folder)
    with remote_code(trust_remote_code):
        model = load_opened(
            opened,
            base=base,
            token=token,
            local_files_only=local_files_only,
            dtype=dtype,
            device_map=device_map,
            **kwargs,
        )
    if commit is not None or opened.is_reference:
        # What is derived from the model, such as an adapter's base, is to name what was asked for and not its cache.
        model.name_or_path = model.config._name_or_path = str(path_or_repo)
    if prefill is not None:
        set_prefill(model, prefill)
    if sparsity is not None:
        set_sparsity(model, sparsity)
    return model


def load_opened(
    opened: ModelFolder,
    *,
    base: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a calibrated checkpoint whose config was read, at the sparsity that it says; arguments as those of `load`."""
    opened.check_config()
    if settings_of(opened).weight_format is not None:
        open_checkpoint(opened)  # refuses damaged codes and scales with one message
    whole, kept = complete_folder(opened, base=base, token=token, local_files_only=local_files_only)
    kwargs["trust_remote_code"] = code_is_trusted()
    with whole.handed_on(as_stored=True):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(whole.path, **kwargs)
    keep_with(model, kept)
    return model


def set_sparsity(model: torch.nn.Module, sparsity: float) -> float:
    """Choose the model sparsity of a loaded model; takes effect at the next forward pass.

    Args:
        model: a model from `load` or `from_pretrained`, or one that holds it.
        sparsity: in [0, 1); 0 computes everything.

    Returns:
        The weight-averaged site sparsity that the thresholds are set for: `sparsity` up to rounding. Above those that
        thresholds were fitted at it is extrapolated, which is logged as a warning.

    Raises:
        UsageError: the model is not sparse, or the sparsity is out of range.
    """
    achieved = choose_sparsity(model, sparsity)
    outside = sparse_sites(model)[0].settings.unfitted(float(sparsity))
    if outside is not None:
        logger.warning("%s", outside)
    return achieved


def choose_sparsity(model: torch.nn.Module, sparsity: float) -> float:
    """As `set_sparsity`, but silent where thresholds were not fitted."""
    if not is_sparsity(sparsity):
        raise UsageError(f"sparsity is {sparsity!r:.80}; expected a number in [0, 1).")
    sparsity = float(sparsity)
    sites = sparse_sites(model)
    with sites[0].state.changing():
        achieved = model_weighted(sites, [site.set_sparsity(sparsity) for site in sites])
    _update_config(model, sparsity=sparsity)
    return achieved


def set_prefill(model: torch.nn.Module, prefill: str) -> None:
    """Choose whether prompts are masked (`sparse`) or computed fully (`dense`)."""
    if prefill not in PREFILL:
        raise UsageError(f"prefill is {prefill!r}; expected one of {', '.join(PREFILL)}.")
    runtime_state(model).prefill = prefill
    _update_config(model, prefill=prefill)


def runtime_state(model: torch.nn.Module) -> RuntimeState:
    """The state that all sites of a loaded model share."""
    return sparse_sites(model)[0].state


def sparse_sites(model: torch.nn.Module) -> list[SiteState]:
    """All sites of a loaded model.

    Raises:
        UsageError: it has none.
    """
    sites = site_states(model)
    if not sites:
        raise UsageError(
            f"{type(model).__name__} has no sparse sites. Load a calibrated checkpoint with wina_calib.load."
        )
    return sites


def _update_config(model: torch.nn.Module, **changes: Any) -> None:
    """Let the config say what the model now does, so that a saved model is what was running."""
    for module in model.modules():
        quantization = getattr(getattr(module, "config", None), "quantization_config", None)
        if isinstance(quantization, WinaConfig):
            quantization.settings = replace(quantization.settings, **changes)
