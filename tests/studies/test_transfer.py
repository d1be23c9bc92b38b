"""Transfer of budgets and thresholds between calibrated models."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from heard import Heard

import wina_calib
from wina_calib.budgets import read_budget
from wina_calib.budgets.count import count_cells
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.cli import main
from wina_calib.errors import UsageError, WinaError
from wina_calib.model.source import open_source
from wina_calib.studies.transfer import WAYS, by_depth, matched_budget, render, transfer

OPTIONS = {"tokens": 1024, "samples": 8}
CALIBRATION = {"transform": "none", "samples": 80, "seq_len": 128, "grid": (0.5,), "sparsity": 0.5, "max": "0.8"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """A tiny Llama of three layers with a budget by predicted loss."""
    folder = tmp_path_factory.mktemp("small") / "sparse"
    wina_calib.calibrate(llama, folder, data=str(text), **CALIBRATION)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A wider one of five layers."""
    folder = tmp_path_factory.mktemp("large")
    tiny.save("llama", folder / "model", num_hidden_layers=5, hidden_size=96, intermediate_size=192, seed=1)
    wina_calib.calibrate(folder / "model", folder / "sparse", data=str(text), **CALIBRATION)
    return folder / "sparse"


def test_layers_are_matched_by_relative_depth() -> None:
    values = np.arange(8.0).reshape(4, 2)
    np.testing.assert_allclose(by_depth(values, 4), values)
    # depths 1/4 and 3/4 lie halfway between layers 0 and 1, and 2 and 3
    np.testing.assert_allclose(by_depth(values, 2), [[1, 2], [5, 6]])
    found = by_depth(values, 8)
    np.testing.assert_allclose(found[[0, -1]], values[[0, -1]])
    assert (np.diff(found, axis=0) >= 0).all()
    np.testing.assert_allclose(by_depth(values[:1], 3), np.tile(values[0], (3, 1)))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_a_matched_budget_meets_the_sparsity_of_the_other_model(small: Path, large: Path, sparsity: float) -> None:
    giver, taker = open_checkpoint(small), open_checkpoint(large)
    cells = count_cells(taker.architecture, "none")
    found = matched_budget(giver, cells, sparsity)
    assert found.shape == (5, 4) and ((found >= 0) & (found <= 1)).all() and np.ptp(found) > 0.01
    assert (cells.weights * found).sum() / cells.sparse_total == pytest.approx(sparsity, abs=1e-9)


def test_onto_itself_nothing_is_lost(small: Path, text: Path) -> None:
    found = transfer(small, small, heldout=str(text), **OPTIONS)
    rows = {row.way: row for row in found.rows}
    assert set(rows) == set(WAYS)
    for way in ("budget", "values"):
        assert rows[way].ppl == pytest.approx(rows["native"].ppl, rel=1e-4), way
        assert rows[way].model_sparsity == pytest.approx(rows["native"].model_sparsity, abs=1e-3)
    assert rows["uniform"].ppl != rows["native"].ppl != rows["quantile"].ppl
    assert found.budgets[0].distance == pytest.approx(0, abs=1e-6)
    assert found.budgets[0].correlation == pytest.approx(1)


def test_onto_a_deeper_model(small: Path, large: Path, text: Path) -> None:
    before = {p.name: p.read_bytes() for p in large.iterdir()}
    heard = Heard()
    found = transfer(small, large, sparsities=(0.3, 0.5), heldout=str(text), progress=heard, **OPTIONS)
    assert {p.name: p.read_bytes() for p in large.iterdir()} == before
    assert [(r.sparsity, r.way) for r in found.rows] == [(s, way) for s in (0.3, 0.5) for way in WAYS]
    heard.check()
    assert heard.phases[-1] == ("transfer", 80)
    alone = wina_calib.evaluate(large, data=str(text), sparsity=0.3, tokens=1024)
    native = found.rows[0]
    assert (native.ppl, native.kl, native.model_sparsity) == (alone.sparse_ppl, alone.kl, alone.model_sparsity)
    for row in found.rows:
        assert row.native_ppl == next(r.ppl for r in found.rows if (r.sparsity, r.way) == (row.sparsity, "native"))
        if row.way in ("native", "uniform", "budget"):
            assert row.model_sparsity == pytest.approx(row.sparsity, abs=0.02)
    # scores of a wider model have another scale: values miss the sparsity, quantiles do not
    error = {row.way: abs(row.model_sparsity - 0.5) for row in found.rows if row.sparsity == 0.5}
    assert error["quantile"] < 0.03 < error["values"]
    assert all(b.distance > 0 for b in found.budgets)


def test_thresholds_of_another_kind_are_left_out(large: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    options = CALIBRATION | {"data": str(text), "budget": "uniform", "max": ()}
    wina_calib.calibrate(llama, tmp_path / "teal", score="teal", **options)
    wina_calib.calibrate(llama, tmp_path / "top", select="topk", weights="reference", **options)
    found = transfer(tmp_path / "teal", large, heldout=str(text), **OPTIONS)
    assert "score teal and wina" in found.skipped["values"] and "values" not in {r.way for r in found.rows}
    assert np.isnan(found.budgets[0].correlation)  # a uniform budget has none
    assert "no correlation" in render(found) and "nan" not in render(found)
    found = transfer(large, tmp_path / "top", heldout=str(text), **OPTIONS)
    assert set(found.skipped) == {"quantile", "values"}
    assert [r.way for r in found.rows] == ["native", "uniform", "budget"]


def test_a_budget_file_for_a_model_that_is_not_calibrated(small: Path, large: Path, text: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "budget.yaml", large.parent / "model"
    shown = CliRunner().invoke(main, ["transfer", str(small), str(model), "-o", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "at sparsity 0.5 for" in shown.stdout
    assert read_budget(path).sparsity == 0.5
    again = CliRunner().invoke(main, ["transfer", str(small), str(model), "-o", str(path)])
    assert again.exit_code == 1 and "--overwrite" in again.output
    options = {k: v for k, v in CALIBRATION.items() if k != "max"} | {"data": str(text), "budget": str(path)}
    wina_calib.calibrate(model, tmp_path / "sparse", **options)
    opened = open_checkpoint(tmp_path / "sparse")
    wanted = matched_budget(open_checkpoint(small), count_cells(open_source(str(model)).architecture, "none"), 0.5)
    np.testing.assert_allclose(opened.sparsities(0.5), wanted, atol=1e-3)


def test_command_line(small: Path, large: Path, text: Path) -> None:
    given = ["transfer", str(small), str(large), "--heldout", str(text), "--tokens", "256", "--samples", "2"]
    shown = CliRunner().invoke(main, [*given, "--json"])
    assert shown.exit_code == 0, shown.output
    assert [row["way"] for row in json.loads(shown.stdout)["rows"]] == list(WAYS)
    shown = CliRunner().invoke(main, given)
    assert shown.exit_code == 0 and "one dense pass" in shown.stdout and "correlation" in shown.stdout


def test_bad_input(small: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="samples is 0"):
        transfer(small, small, samples=0)
    with pytest.raises(UsageError, match="sparsities 1.2"):
        transfer(small, small, sparsities=(1.2,))
    with pytest.raises(WinaError, match="not calibrated"):
        transfer(llama, small)
    refused = CliRunner().invoke(
        main, ["transfer", str(small), str(small), "-s", "0.5,0.6", "-o", str(tmp_path / "b.yaml")]
    )
    assert refused.exit_code == 2 and "one sparsity" in refused.output
