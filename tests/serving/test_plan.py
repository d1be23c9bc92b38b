"""What a server takes from a checkpoint is what `load` has, and what it cannot serve it refuses in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import wina_calib
from wina_calib.errors import CheckpointError, RuntimeLoadError, UsageError
from wina_calib.runtime.modules import site_states
from wina_calib.serving.plan import Options, make_plan, options_from


@pytest.mark.parametrize("sparsity", [None, 0.0, 0.3, 0.5])
def test_thresholds_and_norms_are_those_of_load(calibrated: Path, sparsity: float | None) -> None:
    plan = make_plan(calibrated, Options(sparsity=sparsity))
    groups = [s.group(g.name) for s in site_states(wina_calib.load(calibrated, sparsity)) for g in s.groups]
    assert len(groups) == len(plan.masks) == plan.sites
    for mask, group in zip(plan.masks, groups, strict=True):
        assert torch.tensor(mask.threshold) == group.threshold
        assert torch.equal(mask.norm, group.norm)
    assert plan.settings.sparsity == (0.5 if sparsity is None else sparsity)
    assert plan.calibrated == 0.5


def test_every_projection_has_the_mask_of_its_site(calibrated: Path) -> None:
    found = make_plan(calibrated, Options()).by_projection()
    names = set(load_file(calibrated / "model-00001-of-00001.safetensors"))
    assert {f"{name}.weight" for name in found} == {n for n in names if ".layers." in n and "norm" not in n}
    prefix = "model.layers.1.self_attn."
    assert found[prefix + "q_proj"] is found[prefix + "v_proj"] is not found[prefix + "o_proj"]


@pytest.mark.parametrize("layer", range(3))
def test_weights_of_any_layer_that_are_not_the_calibrations_are_known(layer: int, calibrated: Path) -> None:
    weights = load_file(calibrated / "model-00001-of-00001.safetensors")
    for mask in make_plan(calibrated, Options()).masks[4 * layer : 4 * layer + 4]:
        own = [weights[f"{name}.weight"] for name in mask.projections]
        assert mask.knows(torch.cat(own))
        assert mask.knows(torch.cat(own).bfloat16())
        for i in range(len(own)):
            assert not mask.knows(torch.cat([w + 0.01 * (i == j) for j, w in enumerate(own)]))


def test_options_come_from_the_command_line_first() -> None:
    environ = {"WINA_SPARSITY": "0.25", "WINA_PREFILL": "dense", "WINA_SPARSE_ROWS": "2"}
    assert options_from({}, {}) == Options()
    assert options_from({}, environ) == Options(0.25, "dense", 2)
    assert options_from({"sparsity": 0, "prefill": None}, environ) == Options(0, "dense", 2)


@pytest.mark.parametrize(
    ("overrides", "environ", "said"),
    [
        ({}, {"WINA_SPARSITY": "half"}, "WINA_SPARSITY is 'half'; expected a number"),
        ({"sparsity": 1.0}, {}, r"sparsity is 1.0; expected a number in \[0, 1\)"),
        ({"sparsity": "0.5"}, {}, "sparsity is '0.5'"),
        ({"prefill": "both"}, {}, "prefill is 'both'; expected one of sparse, dense"),
        ({}, {"WINA_SPARSE_ROWS": "-1"}, "sparse_rows is -1"),
    ],
)
def test_options_out_of_range_are_refused(overrides: dict[str, object], environ: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        options_from(overrides, environ)


def test_run_time_matrices_are_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    wina_calib.calibrate(
        llama, tmp_path / "c", transform="paper", budget="uniform", data=str(text), samples=80, seq_len=128
    )
    with pytest.raises(RuntimeLoadError, match=r"needs run-time matrices \(transform paper\)"):
        make_plan(tmp_path / "c", Options())


@pytest.mark.parametrize("changed", [{"select": "topk"}, {"score": "random"}])
def test_masks_without_a_kernel_are_refused(calibrated: Path, tmp_path: Path, changed: dict[str, str]) -> None:
    folder = shutil.copytree(calibrated, tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changed
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeLoadError, match=next(iter(changed.values()))):
        make_plan(folder, Options())


def test_projections_of_several_dtypes_are_refused(calibrated: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(calibrated, tmp_path / "c")
    weights = load_file(folder / "model-00001-of-00001.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    weights[name] = weights[name].half()
    save_file(weights, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeLoadError, match=r"several dtypes \(float16, float32\)"):
        make_plan(folder, Options())


def test_a_damaged_file_is_refused(calibrated: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(calibrated, tmp_path / "c")
    stored = load_file(folder / "wina.safetensors")
    next(t for n, t in stored.items() if n.endswith(".norm"))[3] = torch.nan
    save_file(stored, folder / "wina.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        make_plan(folder, Options())


def test_a_model_that_is_not_calibrated_is_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="is not calibrated"):
        make_plan(llama, Options())


@pytest.fixture(scope="module")
def reference(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "c"
    options = {"transform": "none", "budget": "uniform", "sparsity": 0.5, "grid": (0.25, 0.5, 0.65)}
    wina_calib.calibrate(llama, folder, weights="reference", data=str(text), samples=80, seq_len=128, **options)
    return folder


def test_a_calibration_by_reference_is_served_with_its_base_model(
    reference: Path, llama: Path, calibrated: Path
) -> None:
    for plan in (
        make_plan(llama, options_from({}, {"WINA_CALIBRATION": str(reference)})),
        make_plan(reference, Options()),
    ):
        assert plan.folder == reference
        for mask, wanted in zip(plan.masks, make_plan(calibrated, Options()).masks, strict=True):
            assert (mask.projections, mask.threshold) == (wanted.projections, wanted.threshold)
            assert torch.equal(mask.norm, wanted.norm)


def test_another_base_model_is_refused(reference: Path, calibrated: Path, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="is not the base model that .* was made for"):
        make_plan(tmp_path / "other", Options(calibration=str(reference)))
    with pytest.raises(RuntimeLoadError, match=r"has weights of its own\. Serve it as it is, without WINA_CALIBRATION"):
        make_plan(tmp_path / "other", Options(calibration=str(calibrated)))
