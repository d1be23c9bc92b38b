"""The checkpoint on disk: weights written as a stream, the fitted tensors, and the verifying reader.

`docs/format.md` specifies it. Weights are in `model-*-of-*.safetensors`, what calibration adds is in `wina.safetensors`, and
`model.safetensors.index.json` lists both.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import wina_calib
from wina_calib.errors import CheckpointError
from wina_calib.families import Architecture, Layer, MaskGroup, Site
from wina_calib.journal import NOT_SAVED, Phase
from wina_calib.output import finish_staged
from wina_calib.score import column_norms
from wina_calib.settings import FORMAT_VERSION, METHOD, Settings
from wina_calib.shards import Shards, ShardWriter, plan_shards, read_json, safe_path
from wina_calib.source import (
    REFERENCE_FILE,
    RUNTIME_TYPE,
    Source,
    describe_config,
    has_own_code,
    is_added,
    is_derived,
    is_reference,
    load_config,
    weights_folder,
)
from wina_calib.tables import LEVELS, site_sparsity
from wina_calib.transforms import (
    Plan,
    Rotations,
    apply_layer,
    embedding_rows,
    fold_final_norm,
    head_rows,
)

WINA_FILE = "wina.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 << 30
_ROW_BYTES = 64 << 20
_SKIPPED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".lock")
_REWRITTEN = ("config.json", INDEX_FILE, "README.md", ".gitattributes", ".gitignore")


@dataclass(frozen=True)
class SiteTensors:
    """What is stored for one site: see `docs/format.md`."""

    norms: dict[str, Tensor]
    tables: dict[str, Tensor]
    thresholds: dict[str, Tensor]
    budget: Tensor
    error: Tensor
    curve: Tensor | None = None

    def named(self, prefix: str, site: str) -> dict[str, Tensor]:
        """Tensors by their full names, float32."""
        path = f"{prefix}wina.{site}"
        out = {f"{path}.budget": self.budget, f"{path}.error": self.error}
        if self.curve is not None:
            out[f"{path}.curve"] = self.curve
        for group, norm in self.norms.items():
            out |= {
                f"{path}.{group}.norm": norm,
                f"{path}.{group}.table": self.tables[group],
                f"{path}.{group}.threshold": self.thresholds[group],
            }
        return {name: tensor.to(torch.float32).contiguous() for name, tensor in out.items()}


def expected_tensors(arch: Architecture, settings: Settings) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that calibration adds to a checkpoint, run-time matrices left out."""
    anchors, levels = len(settings.anchors), len(LEVELS)
    out: dict[str, tuple[int, ...]] = {}
    for layer, site in arch.sites:
        path = f"{layer.prefix}wina.{site.name}"
        out |= {f"{path}.budget": (anchors,), f"{path}.error": (anchors,)}
        if settings.curve_levels:
            out[f"{path}.curve"] = (len(settings.curve_levels),)
        for group in settings.rule.groups(site):
            out |= {
                f"{path}.{group.name}.norm": (site.width,),
                f"{path}.{group.name}.table": (anchors, levels),
                f"{path}.{group.name}.threshold": (),
            }
    return out


def model_names(shards: Shards, arch: Architecture) -> list[str]:
    """Names of a model's weights on disk, which its fingerprint covers: run-time matrices too."""
    tied = f"{arch.lm_head}.weight" if arch.tied else None
    return sorted(n for n in shards if not is_derived(n) and n != tied and (not is_added(n) or is_rotation(n)))


def is_rotation(name: str) -> bool:
    """Whether a stored tensor is a run-time matrix."""
    return is_added(name) and name.endswith(".rotation")


def rotation_name(layer: Layer, site: str) -> str:
    """Name of a site's run-time matrix."""
    return f"{layer.prefix}wina.{site}.rotation"


# --- writing ---------------------------------------------------------------------------------------------------------


def write_weights(
    source: Source,
    plan: Plan,
    rotations: Rotations,
    folder: Path,
    *,
    device: torch.device,
    max_shard: int = SHARD_BYTES,
    phase: Phase = NOT_SAVED,
    progress: Callable[[str], None] = lambda _: None,
) -> bool:
    """Write the transformed weights, config and side files as a dense model folder; one layer is in memory at a time.

    Where run-time matrices are needed the final norm's weight is stored as (1, hidden): the base model's own class, which
    takes any `model_type` with a warning, then refuses the shape instead of computing without the matrices.

    Args:
        source: the original model.
        plan: the transform.
        rotations: its matrices.
        folder: an empty folder, or one with as much as `phase` says.
        device: where the weights are transformed.
        max_shard: bytes a file.
        phase: where it is saved which tensors are written.
        progress: called for every layer.

    Returns:
        Whether embedding and lm_head had to be untied.
    """
    arch = source.architecture
    norm_name = f"{arch.final_norm.module}.weight"
    gain, norm = (
        fold_final_norm(arch, source.load(norm_name))
        if rotations.residual is not None
        else (None, source.load(norm_name))
    )
    untied = arch.tied and gain is not None
    head = f"{arch.lm_head}.weight"
    specs = {name: (source.shards[name].dtype, source.shards[name].shape) for name in _disk_order(source)}
    for layer in arch.layers:
        for site in plan.sites:
            width = layer.site(site).width
            specs[rotation_name(layer, site)] = (source.dtype, (width, width))
    if plan.sites:
        norm = norm.unsqueeze(0)
        specs[norm_name] = (specs[norm_name][0], tuple(norm.shape))
    if untied:
        specs[head] = specs[f"{arch.embed}.weight"]
    shards = plan_shards(_by_layer(specs, arch), max_shard)
    files = {name: _shard_file(i, len(shards)) for i, shard in enumerate(shards) for name in shard}
    names = [_shard_file(i, len(shards)) for i in range(len(shards))]
    if (phase.step or phase.finished) and not all((folder / name).exists() for name in names):
        phase.forget()
    written: list[str] = phase.values.get("written", [])
    writers = {
        name: ShardWriter(folder / name, shard, header_metadata(), [n for n in written if n in shard])
        for name, shard in zip(names, shards, strict=True)
    }

    def sync() -> None:
        for writer in writers.values():
            writer.sync()

    try:
        for layer in () if phase.finished else arch.layers[phase.step :]:
            index = layer.index
            done = apply_layer(arch, index, source.load_layer(index), rotations, device=device)
            for path, tensor in done.items():
                name = layer.prefix + path
                writers[files[name]].write(name, tensor.to(specs[name][0]))
                written.append(name)
            phase.save(index + 1, values={"written": written}, prepare=sync)
            progress(f"weights: layer {index + 1} of {len(arch.layers)}")
        for name in () if phase.finished else source.end_names():
            if name == norm_name:
                writers[files[name]].write(name, norm)
                continue
            for first, rows in _row_chunks(source, name):
                out = rows
                if name == f"{arch.embed}.weight":
                    if untied:
                        writers[files[head]].write_rows(head, first, head_rows(rows, gain, rotations, device=device))
                    out = embedding_rows(rows, rotations, device=device) if rotations.residual is not None else rows
                elif name == head and rotations.residual is not None:
                    out = head_rows(rows, gain, rotations, device=device)
                writers[files[name]].write_rows(name, first, out)
        if not phase.finished:
            phase.finish(values={"written": list(specs)}, prepare=sync)
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            if phase.is_saved:
                writer.suspend()
            else:
                writer.abort()
        raise
    write_index(folder, files, {name: _nbytes(spec) for name, spec in specs.items()})
    write_config(source, folder, untied=untied, settings=None, runtime=False)
    copy_side_files(source.folder, folder)
    return untied


def write_calibration(
    folder: Path, tensors: Mapping[str, Tensor], settings: Settings, source: Source, *, untied: bool, runtime: bool
) -> None:
    """Add the fitted tensors to a folder of weights; index and config last."""
    write_wina_file(folder / WINA_FILE, tensors)
    index = read_index(folder)
    files = {name: file for name, file in index.items() if file != WINA_FILE} | dict.fromkeys(tensors, WINA_FILE)
    shards = Shards.open(folder)
    sizes = {name: shards[name].nbytes for name in shards} | {
        name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()
    }
    write_index(folder, files, sizes)
    write_config(source, folder, untied=untied, settings=settings, runtime=runtime)


def write_wina_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `wina.safetensors`, in order of layers and names; the order in which the tensors come does not change it."""
    names = sorted(
        tensors, key=lambda name: [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", name)]
    )
    specs = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
    with ShardWriter(path, specs, header_metadata()) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def header_metadata() -> dict[str, str]:
    """Metadata of every safetensors header that is written."""
    return {
        "format": "pt",
        "producer": "wina_calib",
        "producer_version": wina_calib.__version__,
        "wina_format": FORMAT_VERSION,
    }


def write_index(folder: Path, files: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Write the index: names in order, total size in bytes."""
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(files.items()))}
    write_json(folder / INDEX_FILE, index)


def write_config(source: Source, folder: Path, *, untied: bool, settings: Settings | None, runtime: bool) -> None:
    """Write config.json: the base model's own, with what calibration changed.

    A checkpoint that needs run-time matrices gets a `model_type` of its own, so that nothing loads it as if it were dense.
    """
    raw = read_json(source.folder / "config.json", max_bytes=4 << 20)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{source.folder / 'config.json'} holds no JSON object.")
    if untied:
        raw["tie_word_embeddings"] = False
    if settings is not None:
        raw["quantization_config"] = settings.to_dict()
        if runtime:
            raw["model_type"] = RUNTIME_TYPE + str(raw["model_type"])
            raw["architectures"] = [f"Wina{name}" for name in raw.get("architectures") or ()]
    write_json(folder / "config.json", raw)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, the same bytes for the same value."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config, licence and other small files as they are.

    Raises:
        CheckpointError: one is a link that leaves the folder: a checkpoint may be published.
    """
    for path in side_files(source):
        shutil.copyfile(safe_path(source, path.name), folder / path.name)


def side_files(folder: Path) -> list[Path]:
    """The small files of a model folder that a checkpoint takes over as they are.

    Python files are among them where the model needs them; nothing runs them.
    """
    skipped = _SKIPPED if has_own_code(folder) else (*_SKIPPED, ".py")
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix not in skipped
        and path.name not in _REWRITTEN
        and not path.name.endswith(".index.json")
    ]


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A calibrated checkpoint, opened and checked."""

    folder: Path
    settings: Settings
    architecture: Architecture
    shards: Shards
    tensors: dict[str, Tensor]

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

    def weight_names(self) -> list[str]:
        """Names of the tensors that are the model's weights and run-time matrices."""
        added = expected_tensors(self.architecture, self.settings)
        return sorted(name for name in self.shards if name not in added)

    def verify_weights(self, folder: Path | None = None) -> None:
        """Read all weights and check that they are those that the calibration was made for.

        Args:
            folder: where the weights are; by default here, or in the base model that the checkpoint refers to.

        Raises:
            CheckpointError: they are not.
        """
        folder = folder or weights_folder(self.folder)
        if folder == self.folder:
            shards, names = self.shards, self.weight_names()
        else:
            shards = Shards.open(folder)
            names = model_names(shards, self.architecture)
        found = shards.fingerprint(names)
        if found != self.settings.weights and not self._is_cast_of_the_weights(shards):
            raise CheckpointError(
                f"{folder}: the weights are not those that the calibration was made for (fingerprint {found[:12]}, "
                f"expected {self.settings.weights[:12]}). Calibrate these weights again."
            )

    def _is_cast_of_the_weights(self, shards: Shards) -> bool:
        """Whether the weights have the stored norms in another dtype, as a model saved after a cast has."""
        if self.settings.score != "wina" or self.settings.transform == "paper":
            return False
        for layer, site in self.architecture.sites:
            stored = self.site(layer, site)
            for group in self.settings.rule.groups(site):
                weights = [shards.load(f"{layer.prefix}{p.module}.weight") for p in group.projections]
                exact = norms_match(stored.norms[group.name], weights, self.settings.exponent, tolerance=1e-6)
                if exact or not norms_match(stored.norms[group.name], weights, self.settings.exponent):
                    return False
        return True


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a calibrated checkpoint; every site's tensors must be there, finite and of the right shape.

    Raises:
        CheckpointError: it is damaged, incomplete, not calibrated, or of a newer format.
    """
    settings = read_settings(folder)
    config = load_config(folder)
    arch = describe_config(config)
    shards = Shards.open(folder)
    expected = expected_tensors(arch, settings)
    check_complete(folder, expected, {name: info.shape for name, info in shards.items()})
    tensors = {name: shards.load(name) for name in expected}
    check_values(folder, tensors)
    return Checkpoint(folder, settings, arch, shards, tensors)


def read_settings(folder: Path) -> Settings:
    """Read the calibration's settings from config.json."""
    finish_staged(folder)
    path = folder / (REFERENCE_FILE if is_reference(folder) else "config.json")
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: not a checkpoint.")
    raw = read_json(path, max_bytes=4 << 20)
    section = raw.get("quantization_config") if isinstance(raw, dict) else None
    if not isinstance(section, dict) or section.get("quant_method") != METHOD:
        raise CheckpointError(f"{folder} is not calibrated. Run `wina-calib calibrate {folder} -o NEW_FOLDER` first.")
    return Settings.from_dict(section)


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name."""
    raw = read_json(folder / INDEX_FILE, max_bytes=64 << 20)
    files = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map. Download the checkpoint again.")
    return files


def check_complete(
    where: Path | str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless all expected tensors are there with their shapes."""
    missing = sorted(set(expected) - set(found))
    wrong = [n for n, shape in expected.items() if n in found and tuple(found[n]) != shape]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} of {len(expected)} calibration tensors are missing, such as {missing[0]}. Another tool "
            "may have saved the model without them: calibrate again, or restore wina.safetensors and the index from the original."
        )
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {name} has shape {tuple(found[name])}, expected {expected[name]}. Download it again or calibrate again."
        )


def check_values(where: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a calibration tensor is NaN, infinite or negative beyond `KEEP_ALL`."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{where}: {name} holds NaN or infinite values. Download it again or calibrate again."
            )


def norms_match(stored: Tensor, weights: list[Tensor], exponent: float, tolerance: float = 2e-2) -> bool:
    """Whether stored norms belong to these weights, up to rounding of the weights to another dtype."""
    fresh = column_norms(weights).pow(exponent)
    return bool(torch.allclose(fresh, stored.to(fresh.device), rtol=tolerance, atol=1e-6))


# --- helpers ---------------------------------------------------------------------------------------------------------


def _disk_order(source: Source) -> list[str]:
    names = source.end_names()
    return names + [n for i in range(len(source.architecture.layers)) for n in source.layer_names(i)]


def _by_layer(specs: dict[str, Any], arch: Architecture) -> dict[str, Any]:
    """Order tensors by layer, ends first, so that a shard is finished soon after its first layer."""
    prefixes = [layer.prefix for layer in arch.layers]

    def position(name: str) -> tuple[int, str]:
        return next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), -1), name

    return {name: specs[name] for name in sorted(specs, key=position)}


def _shard_file(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _row_chunks(source: Source, name: str) -> Any:
    info = source.shards[name]
    if not info.shape:
        yield 0, source.load(name)
        return
    rows = max(1, _ROW_BYTES // max(1, info.nbytes // max(1, info.shape[0])))
    for first in range(0, info.shape[0], rows):
        yield first, source.load(name, slice(first, min(first + rows, info.shape[0])))


def _nbytes(spec: tuple[torch.dtype, tuple[int, ...]]) -> int:
    elements = 1
    for size in spec[1]:
        elements *= size
    return elements * spec[0].itemsize
