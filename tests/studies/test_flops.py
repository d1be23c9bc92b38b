"""The papers' cost table to the last digit, and the costs that it leaves out."""

import json
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner

from wina_calib.budgets.count import count_cells
from wina_calib.cli import main
from wina_calib.errors import ModelFolderError, UsageError
from wina_calib.model.loading import describe_config
from wina_calib.studies.flops import find_config, flops, presets

# arXiv 2505.19427v1, Table 5: GFLOPs dense and at 25, 40, 50 and 65 % sparsity, reductions in percent.
PAPER = {
    "llama-2-7b": (6.61, (4.99, 4.02, 3.37, 2.40), (24.5, 39.2, 49.0, 63.7)),
    "llama-3-8b": (7.50, (5.76, 4.71, 4.01, 2.97), (23.2, 37.2, 46.5, 60.4)),
    "qwen2.5-7b": (7.07, (5.44, 4.46, 3.81, 2.83), (23.1, 36.9, 46.1, 60.0)),
    "phi-4": (14.15, (10.74, 8.69, 7.33, 5.28), (24.1, 38.6, 48.2, 62.7)),
}
# Parameters without the embedding of an untied model, from the models' cards.
PARAMETERS = {"llama-2-7b": 6.61e9, "llama-3-8b": 7.50e9, "llama-3-70b": 69.5e9, "qwen2.5-0.5b": 0.494e9}


@pytest.mark.parametrize("model", PAPER)
@pytest.mark.parametrize("transform", ["none", "paper"])
def test_the_papers_table(model: str, transform: str) -> None:
    dense, gflops, saved = PAPER[model]
    found = flops(model, transform=transform)
    assert found.dense_gflops == pytest.approx(dense, abs=0.01)
    assert [row.sparsity for row in found.rows] == [0.25, 0.4, 0.5, 0.65]
    for row, expected, percent in zip(found.rows, gflops, saved, strict=True):
        assert row.gflops == pytest.approx(expected, abs=0.01)
        assert 100 * row.reduction == pytest.approx(percent, abs=0.1)


@pytest.mark.parametrize("model", PARAMETERS)
def test_presets_have_the_models_sizes(model: str) -> None:
    assert flops(model, sparsities=[0.0]).dense_gflops * 1e9 == pytest.approx(PARAMETERS[model], rel=0.005)


def test_every_preset_is_described() -> None:
    models = {
        "llama-2-7b",
        "llama-3-8b",
        "llama-3-70b",
        "qwen2.5-7b",
        "qwen2.5-1.5b",
        "qwen2.5-0.5b",
        "phi-4",
        "tinyllama-1.1b",
    }
    assert set(presets()) == models
    for name in presets():
        (row,) = flops(name, sparsities=[0.0]).rows
        assert row.reduction == row.total_reduction == 0.0 and row.read_fraction == row.read_fraction_decoder == 1.0


def test_costs_that_the_papers_leave_out() -> None:
    result = flops("llama-3-8b", sparsities=[0.5], transform="paper", context=1000)
    (row,) = result.rows
    assert row.runtime_matrix_gflops == pytest.approx(2 * 32 * 4096**2 / 1e9)
    assert row.attention_gflops == pytest.approx(2 * 32 * 32 * 128 * 1000 / 1e9)
    assert row.cache_gigabytes == pytest.approx(2 * 32 * 8 * 128 * 1000 * 2 / 1e9)
    assert row.total_gflops == pytest.approx(row.gflops + row.runtime_matrix_gflops + row.attention_gflops)
    cells = count_cells(describe_config(find_config("llama-3-8b")), "paper")
    assert row.read_fraction == cells.read_fraction_at(0.5)
    assert row.read_fraction_decoder == cells.read_fraction_at(0.5, lm_head=False)
    weights = cells.sparse_total + cells.other_decoder + cells.lm_head
    assert row.gigabytes_read == pytest.approx(row.read_fraction * weights * 2 / 1e9)
    assert result.dtype == "bfloat16"


def test_free_transforms_cost_nothing_at_run_time() -> None:
    plain, free = flops("llama-2-7b"), flops("llama-2-7b", transform="auto")
    assert free.transform == "global+head" and free.rows == plain.rows


@pytest.mark.parametrize(
    ("family", "overrides", "reach"),
    [
        ("llama", {}, 3 * 50),
        ("mistral", {"sliding_window": 8}, 3 * 8),
        ("gemma2", {"sliding_window": 8}, 8 + 50 + 8),
    ],
)
def test_attention_stays_in_its_window(family: str, overrides: dict[str, int], reach: int, tmp_path: Path) -> None:
    tiny.make(family, **overrides).config.save_pretrained(tmp_path)
    (row,) = flops(str(tmp_path), sparsities=[0.0], context=50).rows
    assert row.attention_gflops == pytest.approx(2 * 4 * 16 * reach / 1e9)


def test_a_config_is_found_by_folder_file_and_name(llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "small.json"
    other.write_text((llama / "config.json").read_text())
    expected = flops(str(llama)).rows
    assert flops(str(llama / "config.json")).rows == expected
    assert flops(str(other)).rows == expected
    assert flops("Phi-4").rows == flops("phi-4").rows
    assert flops("demo").dense_gflops > 0


def test_a_calibrated_checkpoint_brings_its_transform(llama: Path, tmp_path: Path) -> None:
    raw = json.loads((llama / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "wina", "transform": "stacked"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert flops(str(tmp_path)).transform == "stacked"
    assert flops(str(tmp_path)).rows == flops(str(llama), transform="paper").rows
    assert flops(str(tmp_path), transform="none").rows == flops(str(llama)).rows


@pytest.mark.parametrize("name", ["lama-3-8b", "llama3-8b", "./llama-3-8b"])
def test_an_unknown_name_gets_the_nearest(name: str) -> None:
    with pytest.raises(UsageError, match="Nearest known: llama-3-8b"):
        flops(name)


def test_configs_that_cannot_be_read(tmp_path: Path) -> None:
    for text, message in [("[]", "no JSON object"), ('{"model_type": "zzz"}', "cannot be read"), ("{}", "model_type")]:
        path = tmp_path / "odd.json"
        path.write_text(text)
        with pytest.raises(ModelFolderError, match=message):
            flops(str(path))
    with pytest.raises(ModelFolderError, match="could not be fetched"):
        flops("nobody-here/no-such-model")


@pytest.mark.parametrize("wrong", [{"sparsities": [1.0]}, {"sparsities": [-0.1]}, {"sparsities": []}, {"context": 0}])
def test_values_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        flops("demo", **wrong)


def test_command_line() -> None:
    run = CliRunner().invoke(main, ["flops", "llama-2-7b", "--sparsity", "0.25,0.65", "--transform", "paper", "--json"])
    assert run.exit_code == 0 and run.stderr == ""
    found = json.loads(run.stdout)
    assert found["model"] == "llama-2-7b"
    assert [round(row["gflops"], 2) for row in found["rows"]] == [4.99, 2.40]
    assert {"sparsity", "gflops", "reduction", "read_fraction", "runtime_matrix_gflops"} <= set(found["rows"][0])
    text = CliRunner().invoke(main, ["flops", "llama-2-7b"])
    assert text.exit_code == 0 and "63.7 %" in text.stdout and "2.40" in text.stdout
    assert CliRunner().invoke(main, ["flops", "lama"]).exit_code == 2


def test_another_kind_of_file_and_a_slip_of_the_pen_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.gguf").write_bytes(b"GGUF" + bytes(60))
    (tmp_path / "stories").mkdir()
    with pytest.raises(ModelFolderError, match="is a file in GGUF"):
        flops("small.gguf")
    with pytest.raises(ModelFolderError, match="did you mean stories"):
        flops("sotries")
