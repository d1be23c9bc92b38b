"""The checkpoint on disk, read and verified: `format` says what is stored for each site, `writer` writes it.

`docs/format.md` specifies it. Weights are in `model-*-of-*.safetensors`, what calibration adds is in `wina.safetensors`, and
`model.safetensors.index.json` lists both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wina_calib.checkpoint.format import SiteTensors, expected_tensors, model_names, packed_tensors
from wina_calib.checkpoint.settings import Settings
from wina_calib.common.atomic import finish_staged
from wina_calib.errors import CheckpointError, UsageError
from wina_calib.masks.score import column_norms
from wina_calib.masks.thresholds import site_sparsity
from wina_calib.model import no_folder
from wina_calib.model.architecture import Architecture, Layer, MaskGroup, Site, describe
from wina_calib.model.folder import ADAPTER_FILE, METHOD, ModelFolder, config_file, open_folder
from wina_calib.model.loading import ask, describe_config, open_weights
from wina_calib.model.locate import DEMO, demo_folder, weights_folder
from wina_calib.quantization.formats import Spec
from wina_calib.storage import Shards


@dataclass(frozen=True)
class Checkpoint:
    """A calibrated checkpoint, opened and checked."""

    opened: ModelFolder
    settings: Settings
    architecture: Architecture
    shards: Shards
    tensors: dict[str, Tensor]

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.opened.path

    def site(self, layer: Layer, site: Site) -> SiteTensors:
        """Everything stored for one site."""
        path = f"{layer.prefix}wina.{site.name}"
        groups: tuple[MaskGroup, ...] = self.settings.rule.groups(site)
        return SiteTensors(
            norms={g.name: self.tensors[f"{path}.{g.name}.norm"] for g in groups},
            tables={g.name: self.tensors[f"{path}.{g.name}.table"] for g in groups},
            thresholds={g.name: self.tensors[f"{path}.{g.name}.threshold"] for g in groups},
            budget=self.tensors[f"{path}.budget"],
            error=self.tensors[f"{path}.error"],
            curve=self.tensors.get(f"{path}.curve"),
            sample=self.tensors.get(f"{path}.sample"),
        )

    def sparsities(self, model_sparsity: float) -> NDArray[np.float64]:
        """Site sparsities (layers, sites) that the budget gives at a model sparsity."""
        anchors, arch = self.settings.anchors, self.architecture
        return np.array(
            [
                [
                    site_sparsity(
                        anchors, self.tensors[f"{layer.prefix}wina.{site.name}.budget"].numpy(), model_sparsity
                    )
                    for site in layer.sites
                ]
                for layer in arch.layers
            ]
        )

    def dropped(self, model_sparsity: float) -> float | NDArray[np.float64]:
        """A model sparsity as `Cells.read_fraction_at` counts it exactly: site by site where sites differ in bits."""
        return self.sparsities(model_sparsity) if self.settings.modules_to_not_convert else model_sparsity

    def weight_names(self) -> list[str]:
        """Names of the tensors that are the model's weights and run-time matrices."""
        added = expected_tensors(self.architecture, self.settings)
        return sorted(name for name in self.shards if name not in added)

    def verify_weights(self) -> ModelFolder:
        """Read all weights and check that they are those that the calibration was made for; gives the folder that has them.

        Raises:
            CheckpointError: they are not.
            ModelFolderError, HubError: the base model that has them cannot be had.
        """
        if self.opened.is_reference:
            base = open_folder(weights_folder(self.opened))
            self.verify_base(base, open_weights(base, ask(base)))
            return base
        if (differ := self._difference(self.shards, self.weight_names())) is not None:
            raise CheckpointError(f"{self.folder}: {differ}. Calibrate these weights again.")
        return self.opened

    def verify_base(self, base: ModelFolder, shards: Shards) -> None:
        """Raise CheckpointError unless a base model's weights are those that the calibration was made for."""
        if (differ := self._difference(shards, model_names(shards, self.architecture))) is not None:
            raise CheckpointError(
                f"{base.path} is not the base model that {self.folder} was made for: {differ}. Give that model, or calibrate "
                "this one."
            )

    def _difference(self, shards: Shards, names: Sequence[str]) -> str | None:
        """In what weights are not those of the calibration; None where they are."""
        digest = shards.fingerprint(names)
        if digest == self.settings.weights or self._is_cast_of_the_weights(shards):
            return None
        return (
            f"the weights are not those that the calibration was made for (fingerprint {digest[:12]}, expected "
            f"{self.settings.weights[:12]})"
        )

    def _is_cast_of_the_weights(self, shards: Shards) -> bool:
        """Whether the weights have the stored norms in another dtype, as a model saved after a cast has."""
        if self.settings.score != "wina" or self.settings.transform == "paper":
            return False
        for layer, site in self.architecture.sites:
            stored = self.site(layer, site)
            for group in self.settings.rule.groups(site):
                names = [f"{layer.prefix}{p.module}.weight" for p in group.projections]
                if any(name not in shards or shards[name].shape[1:] != (site.width,) for name in names):
                    return False
                weights = [shards.load(name) for name in names]
                norms = column_norms(weights).pow(self.settings.exponent)
                exact = norms_match(stored.norms[group.name], norms, tolerance=1e-6)
                if exact or not norms_match(stored.norms[group.name], norms):
                    return False
        return True


def open_checkpoint(folder: Path | ModelFolder) -> Checkpoint:
    """Open a calibrated checkpoint; every site's tensors must be there, finite and of the right shape.

    Raises:
        CheckpointError: it is damaged, incomplete, not calibrated, or of a newer format.
    """
    opened = folder if isinstance(folder, ModelFolder) else open_calibrated(folder)
    folder, settings = opened.path, settings_of(opened)
    if opened.is_reference:
        arch, shards = describe_config(opened.config), Shards.open(folder)
    else:
        loading = ask(opened)
        arch, shards = describe(loading.model), open_weights(opened, loading)
    expected = expected_tensors(arch, settings)
    check_complete(folder, expected, {name: info.shape for name, info in shards.items()})
    check_packed(folder, arch, settings, shards)
    tensors = {name: shards.load(name) for name in expected}
    check_values(folder, tensors)
    return Checkpoint(opened, settings, arch, shards, tensors)


def read_settings(folder: Path) -> Settings:
    """Read the calibration's settings from config.json."""
    return settings_of(open_calibrated(folder))


def open_calibrated(folder: Path) -> ModelFolder:
    """Read the config of a checkpoint's folder, after what was interrupted in it is finished.

    Raises:
        CheckpointError: there is none, or it is not calibrated.
    """
    if not folder.is_dir():
        told = no_folder.reason(str(folder)) or f"{folder} is not a folder. Give the folder of a checkpoint."
        raise CheckpointError(told)
    finish_staged(folder)
    if not config_file(folder).is_file() and not (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(f"{folder} has no config.json: not a checkpoint.")
    opened = open_folder(folder)
    settings_of(opened)
    return opened


def open_any(folder: Path) -> ModelFolder:
    """Read the config of a model's folder, calibrated or not, after what was interrupted in it is finished."""
    finish_staged(folder)
    return open_folder(folder)


def settings_of(opened: ModelFolder) -> Settings:
    """The calibration's settings in a config.

    Raises:
        CheckpointError: it is not one of a checkpoint, or damaged.
    """
    section = opened.section
    if section is None or section.get("quant_method") != METHOD:
        name = DEMO if opened.path == demo_folder() else opened.path
        raise CheckpointError(f"{name} is not calibrated. Run `wina-calib calibrate {name} -o NEW_FOLDER` first.")
    return Settings.from_dict(section)


def check_complete(
    where: Path | str, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless all expected tensors are there with their shapes."""
    missing = sorted(set(expected) - set(stored))
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} of {len(expected)} calibration tensors are missing, such as {missing[0]}. Another tool "
            "may have saved the model without them: calibrate again, or restore wina.safetensors and the index from the original."
        )
    check_shapes(where, expected, stored)


def check_shapes(
    where: Path | str, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError where a stored tensor that is expected has another shape."""
    wrong = [n for n, shape in expected.items() if n in stored and tuple(stored[n]) != shape]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {name} has shape {tuple(stored[name])}, expected {expected[name]}. Download it again or calibrate again."
        )


def check_packed(where: Path, arch: Architecture, settings: Settings, shards: Shards) -> None:
    """Raise CheckpointError unless all quantized weights are there with their dtypes and shapes, and their scales finite."""
    expected = quantized_tensors(where, arch, settings)
    missing = sorted(set(expected) - set(shards))
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} of {len(expected)} tensors of quantized weights are missing, such as {missing[0]}. "
            "Download it again or calibrate again."
        )
    for name, spec in expected.items():
        stored = shards[name].dtype, tuple(shards[name].shape)
        if stored != spec:
            raise CheckpointError(
                f"{where}: {name} is {_told(stored)}, expected {_told(spec)}. Download it again or calibrate again."
            )
    check_values(where, {name: shards.load(name) for name in expected if name.endswith(".scales")})


def quantized_tensors(where: Path | str, arch: Architecture, settings: Settings) -> dict[str, Spec]:
    """`packed_tensors` of what a file says, where outputs that do not divide into groups are damage."""
    try:
        return packed_tensors(arch, settings)
    except UsageError as error:
        raise CheckpointError(f"{where}: config.json and quantization_config do not fit: {error}") from error


def _told(spec: Spec) -> str:
    return f"{str(spec[0]).removeprefix('torch.')} of shape {spec[1]}"


def check_values(where: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a calibration tensor is NaN or infinite, or a column norm negative."""
    for name, tensor in tensors.items():
        found = "" if bool(torch.isfinite(tensor).all()) else "NaN or infinite"
        if not found and name.endswith(".norm") and bool((tensor < 0).any()):
            found = "negative"
        if found:
            raise CheckpointError(f"{where}: {name} holds {found} values. Download it again or calibrate again.")


def norms_match(stored: Tensor, fresh: Tensor, tolerance: float = 2e-2) -> bool:
    """Whether stored norms are those computed anew, up to rounding of the weights to another dtype."""
    return bool(torch.allclose(fresh, stored.to(fresh.device), rtol=tolerance, atol=1e-6))
