"""Comparison: every method's cell, resuming, other protocols, output; the methods themselves on the demo model."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from heard import Heard

import wina_calib
import wina_calib.studies.compare.run
from wina_calib.budgets import Budget, explicit, write_budget
from wina_calib.budgets.count import count_cells, model_key
from wina_calib.calibration.options import CalibrateOptions, make_options
from wina_calib.calibration.run import run_calibration
from wina_calib.cli import main
from wina_calib.common.atomic import lock
from wina_calib.common.progress import Silent
from wina_calib.errors import CorpusError, OutputError, UsageError
from wina_calib.model.source import open_source
from wina_calib.studies.compare.methods import GROUPS, METHODS, Method, find_methods
from wina_calib.studies.compare.table import draw_bits, draw_comparison

FAST = ("wina", "cats")
SPARSITIES = (0.25, 0.5)
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def protocol(text: Path) -> dict[str, object]:
    return {"data": str(text), "heldout": str(text), "samples": 64, "seq_len": 128, "tokens": 1024}


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, protocol: dict[str, object]
) -> tuple[Path, wina_calib.Comparison]:
    folder = tmp_path_factory.mktemp("compare") / "out"
    return folder, wina_calib.compare(llama, folder, methods=FAST, sparsities=SPARSITIES, **protocol)


def cells(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "cells").iterdir()}


def test_calibrations_are_measured_once_by_the_comparison(
    llama: Path, protocol: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def calibrate(*args: Any, **kwargs: Any) -> Any:
        seen.append(run_calibration(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr("wina_calib.studies.compare.run.run_calibration", calibrate)
    heard = Heard()
    wina_calib.compare(llama, tmp_path / "out", methods=("wina",), sparsities=(0.5,), progress=heard, **protocol)
    assert not any("--weights" in note for note in heard.notes)  # which is no option of this command
    assert [result.verdict.tokens < 64 for result in seen] == [True]


# --- the table of methods --------------------------------------------------------------------------------------------


def test_methods_are_valid_options_and_differ() -> None:
    seen = set()
    for method in METHODS.values():
        options = make_options(dict(method.options))
        seen.add((options, method.share, method.gated))
        assert set(method.options) <= set(CalibrateOptions.__dataclass_fields__)
        assert all(getattr(CalibrateOptions(), key) != value for key, value in method.options.items() if key != "data")
    assert len(seen) == len(METHODS)


def test_groups_and_names() -> None:
    assert {
        "wina",
        "wina-paper",
        "wina-paper-uniform",
        "teal",
        "teal-uniform",
        "weight",
        "random",
        "cats",
        "rsparse",
        "ours",
    } == {m.name for m in GROUPS["papers"]}
    assert GROUPS["ablation"][0] is METHODS["ours"]
    wanted = {"score", "masks", "transform", "budget", "loop", "first token", "amount of text", "kind of text"}
    assert wanted <= {m.group for m in GROUPS["ablation"]}
    for method in GROUPS["ablation"][1:]:  # one part at a time
        assert len(method.options) + (method.share != 1) == 1
    assert find_methods(["ours", "papers"]) == (METHODS["ours"], *(m for m in GROUPS["papers"] if m.name != "ours"))
    papers = [m.name for m in GROUPS["papers"] if m.name not in ("teal", "cats")]
    assert [m.name for m in find_methods(["papers", "-teal", "-cats"])] == papers
    assert find_methods(["ours", "-papers", "cats"]) == (METHODS["cats"],)
    with pytest.raises(UsageError, match="'tael' is unknown. Did you mean 'teal'"):
        find_methods(["ours", "-tael"])
    with pytest.raises(UsageError, match="'tael' is unknown. Did you mean 'teal'"):
        find_methods(["tael"])
    with pytest.raises(UsageError, match="no method"):
        find_methods([])


def test_published_settings() -> None:
    paper = make_options(dict(METHODS["wina-paper"].options))
    assert (paper.transform, paper.masks, paper.select, paper.budget) == ("paper", "per-projection", "topk", "greedy")
    teal = make_options(dict(METHODS["teal"].options))
    assert (teal.score, teal.transform, teal.select, teal.budget) == ("teal", "none", "threshold", "greedy")
    assert make_options(dict(METHODS["ours"].options)) == CalibrateOptions()


# --- cells -----------------------------------------------------------------------------------------------------------


def test_a_row_for_every_method_and_sparsity(run: tuple[Path, wina_calib.Comparison]) -> None:
    folder, found = run
    assert [(r.method, r.sparsity) for r in found.rows] == [
        (m, s) for m in FAST for s in SPARSITIES if (m, s) != ("cats", 0.5)
    ]
    for row in found.rows:
        assert row.model_sparsity == pytest.approx(row.sparsity, abs=0.02)
        assert row.kl > 0 and 0 < row.top1_agreement <= 1 and row.tokens == 8 * 127 and row.calibration_seconds > 0
    (left_out,) = found.skipped
    assert (left_out.method, left_out.sparsity) == ("cats", 0.5) and "0.444" in left_out.reason
    assert len(cells(folder)) == 3
    assert not (folder / "calibrations").exists()
    assert not list(folder.parent.glob(".*"))


def test_a_cell_is_what_calibrate_and_evaluate_give(
    run: tuple[Path, wina_calib.Comparison], llama: Path, protocol: dict[str, object], tmp_path: Path
) -> None:
    options = {"data": protocol["data"], "samples": 64, "seq_len": 128, "transform": "none", "budget": "uniform"}
    wina_calib.calibrate(llama, tmp_path / "s", sparsity=0.5, grid=(0.5,), **options)
    alone = wina_calib.evaluate(tmp_path / "s", data=str(protocol["heldout"]), tokens=1024)
    row = run[1].row("wina", 0.5)
    assert (row.ppl, row.kl, row.model_sparsity) == (alone.sparse_ppl, alone.kl, alone.model_sparsity)
    assert (row.read_fraction, row.dense_ppl) == (alone.read_fraction, alone.dense_ppl)


def test_run_again_nothing_is_computed(
    run: tuple[Path, wina_calib.Comparison], llama: Path, protocol: dict[str, object]
) -> None:
    folder, found = run
    before, heard = cells(folder), Heard()
    again = wina_calib.compare(llama, folder, methods=FAST, sparsities=SPARSITIES, progress=heard, **protocol)
    assert again == found and cells(folder) == before
    assert heard.notes == ["0 cells of 0 methods to compute, 3 there already"] and not heard.phases
    fewer = wina_calib.compare(llama, folder, methods="wina", sparsities=0.5, **protocol)
    assert fewer.rows == (found.row("wina", 0.5),)


@pytest.mark.parametrize("change", [{"tokens": 640}, {"samples": 63}])
def test_another_protocol_computes_anew(
    change: dict[str, object], run: tuple[Path, wina_calib.Comparison], llama: Path, protocol: dict[str, object]
) -> None:
    folder, found = run
    before, heard = cells(folder), Heard()
    other = wina_calib.compare(llama, folder, methods="wina", sparsities=0.25, progress=heard, **(protocol | change))
    assert "1 cells of 1 methods to compute, 0 there already" in heard.notes[0]
    assert "of another protocol, method or sparsity left aside" in heard.notes[0]
    assert other.rows[0] != found.row("wina", 0.25)
    assert before.items() <= cells(folder).items() and len(cells(folder)) == len(before) + 1


def test_another_model_in_the_same_folder(
    run: tuple[Path, wina_calib.Comparison], protocol: dict[str, object], tmp_path: Path
) -> None:
    tiny.save("llama", tmp_path / "m", seed=5)
    heard = Heard()
    wina_calib.compare(tmp_path / "m", run[0], methods="wina", sparsities=0.25, progress=heard, **protocol)
    assert "0 there already" in heard.notes[0]


def test_stopped_between_cells_it_goes_on(
    run: tuple[Path, wina_calib.Comparison], llama: Path, protocol: dict[str, object], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Stopping(Silent):
        def phase(self, name: str, steps: int) -> None:
            if name == "wina: measure at 0.5":
                raise KeyboardInterrupt

    options = {"methods": "wina", "sparsities": SPARSITIES, **protocol}
    with pytest.raises(KeyboardInterrupt):
        wina_calib.compare(llama, tmp_path / "out", progress=Stopping(), **options)
    left = cells(tmp_path / "out")
    assert len(left) == 1 and json.loads(next(iter(left.values())))["row"]["sparsity"] == 0.25
    assert not (tmp_path / "out" / "compare.json").exists()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("calibrated again")

    with monkeypatch.context() as patch:
        patch.setattr(wina_calib.studies.compare.run, "run_calibration", refuse)
        found = wina_calib.compare(llama, tmp_path / "out", **options)
    for row in found.rows:
        whole = run[1].row("wina", row.sparsity)
        assert (row.ppl, row.kl, row.model_sparsity) == (whole.ppl, whole.kl, whole.model_sparsity)
    assert left.items() <= cells(tmp_path / "out").items()
    assert not (tmp_path / "out" / "calibrations").exists()


def test_stopped_while_calibrating_leaves_no_cell(llama: Path, protocol: dict[str, object], tmp_path: Path) -> None:
    class Stopping(Silent):
        calibrates = False

        def phase(self, name: str, steps: int) -> None:
            self.calibrates = name == "teal-uniform: calibrate"

        def step(self, note: str) -> None:
            if self.calibrates:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wina_calib.compare(
            llama, tmp_path / "out", methods="teal-uniform", sparsities=0.5, progress=Stopping(), **protocol
        )
    assert cells(tmp_path / "out") == {}


def test_a_damaged_cell_is_computed_again(
    run: tuple[Path, wina_calib.Comparison], llama: Path, protocol: dict[str, object], tmp_path: Path
) -> None:
    folder, found = run
    (path,) = (p for p in (folder / "cells").glob("cats-0.25-*") if json.loads(p.read_text())["row"]["tokens"] == 1016)
    path.write_text(path.read_text()[:50])
    again = wina_calib.compare(llama, folder, methods="cats", sparsities=0.25, **protocol)
    assert again.rows[0].ppl == found.row("cats", 0.25).ppl
    assert json.loads(path.read_text())["row"]["ppl"] == again.rows[0].ppl


def test_a_method_that_cannot_be_is_left_out_and_named(text: Path, protocol: dict[str, object], tmp_path: Path) -> None:
    tiny.save("gemma2", tmp_path / "m")
    mine = Method("mine", "half norms", {"exponent": 0.5, "transform": "none", "budget": "uniform"})
    names = ("transform-global", mine)
    found = wina_calib.compare(tmp_path / "m", tmp_path / "out", methods=names, sparsities=0.25, **protocol)
    assert [r.method for r in found.rows] == ["mine"] and found.methods["mine"] == "half norms"
    assert found.skipped[0].method == "transform-global" and "not exact" in found.skipped[0].reason
    assert "transform-global: left out." in found.text() and "transform-global: left out." in found.markdown()
    with pytest.raises(UsageError, match="nothing could be measured. transform-global: .*not exact"):
        wina_calib.compare(tmp_path / "m", tmp_path / "out", methods=names[0], sparsities=0.25, **protocol)


def test_a_budget_file_that_changes_is_measured_again(llama: Path, protocol: dict[str, object], tmp_path: Path) -> None:
    arch = open_source(llama).architecture
    counted, path = count_cells(arch, "none"), tmp_path / "mine.yaml"
    mine = Method("mine", "from a file", {"transform": "none", "budget": str(path)})
    found = []
    for sites in ((0.5, 0.5, 0.5, 0.5), (0.6, 0.6, 0.5, 0.5)):
        budget = Budget(np.tile(sites, (counted.layers, 1)))
        budget = Budget(budget.sparsities * 0.5 / budget.model_sparsity(counted))
        write_budget(path, explicit(budget, counted, model_key(arch, counted), 0.5, "wina"))
        found.append(wina_calib.compare(llama, tmp_path / "out", methods=mine, sparsities=0.5, **protocol))
    assert found[0].rows[0].ppl != found[1].rows[0].ppl and found[0].budgets == {"mine": "mine.yaml"}
    path.unlink()
    with pytest.raises(UsageError, match="nothing could be measured. mine: .*no such budget file"):
        wina_calib.compare(llama, tmp_path / "out", methods=mine, sparsities=0.5, **protocol)


# --- output ----------------------------------------------------------------------------------------------------------


def test_results_say_the_same_in_every_form(run: tuple[Path, wina_calib.Comparison]) -> None:
    folder, found = run
    row = found.row("wina", 0.5)
    for text in (found.text(), found.markdown()):
        assert f"{row.ppl:.3f}" in text and f"{row.kl:.3f}" in text and "cats at 0.5: left out" in text
    assert found.to_dict()["rows"][1]["rise"] == row.ppl / row.dense_ppl - 1 == row.rise
    json.dumps(found.to_dict())
    assert (folder / "compare.md").is_file() and (folder / "compare.json").is_file()


def test_read_fraction_of_sites_and_gates(run: tuple[Path, wina_calib.Comparison]) -> None:
    """A layer of the tiny Llama: q, o 64x64, k, v 32x64, gate, up, down 128x64; 3 layers, norms, a head of 320x64."""
    sparse, always = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64), 7 * 64
    for row in run[1].rows:
        read = sparse * (1 - row.model_sparsity) + always
        assert row.read_fraction_decoder == pytest.approx(read / (sparse + always))
        assert row.read_fraction == pytest.approx((read + 320 * 64) / (sparse + always + 320 * 64))


def test_the_plot_has_every_figure_against_both_costs(
    run: tuple[Path, wina_calib.Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, drawn = run[1], {}
    monkeypatch.setattr(
        "wina_calib.common.plots.tradeoffs", lambda panels, dense, title, logarithmic: drawn.update(panels) or b""
    )
    draw_comparison(found)
    assert len(drawn) == 6
    labels = {"perplexity": "ppl", "KL, nats a token": "kl", "same most likely token": "top1_agreement"}
    for (x, y), lines in drawn.items():
        cost = "model_sparsity" if x == "model sparsity" else "read_fraction"
        rows = [r for r in found.rows if r.method == "wina"]
        assert lines["wina"] == [(getattr(r, cost), getattr(r, labels[y])) for r in rows]
        assert len(lines["wina"]) == 2 and len(lines["cats"]) == 1


def test_quantized_weights_stand_beside_by_bits_read(
    llama: Path, protocol: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rises are over the original model, and each line begins at its own weights without sparsity."""
    methods = ("wina", "int8", "int4", "int4-32")
    found = wina_calib.compare(llama, tmp_path / "out", methods=methods, sparsities=(0.25, 0.5), **protocol)
    (skipped,) = found.skipped
    assert skipped.method == "int4" and "do not divide into groups of 64" in skipped.reason
    stored = {row.method: row.bits_stored for row in found.rows}
    assert stored == {"wina": 16, "int8": 8, "int4-32": pytest.approx(4.64, abs=0.02)}
    dense = {row.method: row.dense_ppl / row.base_ppl - 1 for row in found.rows}
    assert dense["wina"] == 0 and 0 < abs(dense["int8"]) < 0.003 and 0 < abs(dense["int4-32"]) < 0.2
    (base,) = {round(row.base_ppl, 3) for row in found.rows}
    assert base == round(found.row("wina", 0.25).dense_ppl, 3)
    for row in found.rows:
        assert row.bits_read == pytest.approx(row.bits_stored * (1 - row.model_sparsity))
        assert row.rise == row.ppl / row.base_ppl - 1
        assert f"{row.bits_read:.2f}" in found.text() and f"{row.bits_read:.2f}" in found.markdown()
    drawn: dict[str, list[tuple[float, float]]] = {}
    monkeypatch.setattr("wina_calib.common.plots.over_bits", lambda lines, title: drawn.update(lines) or b"")
    draw_bits(found)
    assert list(drawn) == ["wina", "int8", "int4-32"]
    assert drawn["int8"] == [(8, dense["int8"]), *((r.bits_read, r.rise) for r in found.rows if r.method == "int8")]


def test_command_line(llama: Path, text: Path, tmp_path: Path) -> None:
    given = ["compare", str(llama), "-o", str(tmp_path / "out"), "--methods", "teal-uniform", "-s", "0.5"]
    given += ["--data", str(text), "--heldout", str(text), "--samples", "64", "--seq-len", "128", "--tokens", "512"]
    pytest.importorskip("matplotlib")
    shown = CliRunner().invoke(main, [*given, "--json", "--plots"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert [r["method"] for r in found["rows"]] == ["teal-uniform"]
    assert found == json.loads((tmp_path / "out" / "compare.json").read_text())
    for name in ("compare.png", "bits.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    again = CliRunner().invoke(main, given)
    assert again.exit_code == 0 and "1 there already" in again.stderr and "teal-uniform" in again.stdout
    listed = CliRunner().invoke(main, ["compare", "--list"])
    assert listed.exit_code == 0 and all(name in listed.stdout for name in METHODS)
    for wrong, message in ((["compare", "demo"], "give MODEL"), ([*given, "--methods", "best"], "'best' is unknown")):
        refused = CliRunner().invoke(main, wrong)
        assert refused.exit_code == 2 and message in refused.output


def test_bad_input(llama: Path, protocol: dict[str, object], tmp_path: Path) -> None:
    def attempt(**change: object) -> None:
        options = {"methods": "wina", "sparsities": 0.5, **protocol} | change
        wina_calib.compare(llama, tmp_path / "out", **options)

    with pytest.raises(UsageError, match="grid is 1.5"):
        attempt(sparsities=(1.5,))
    with pytest.raises(UsageError, match="0 sparsities"):
        attempt(sparsities=())
    with pytest.raises(UsageError, match="1 tokens"):
        attempt(tokens=1)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CorpusError):
        attempt(data=str(tmp_path / "short.txt"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with lock((tmp_path / "out").absolute()), pytest.raises(OutputError, match="another process"):
        attempt()


# --- larger ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_method_of_both_groups_has_a_cell(llama: Path, protocol: dict[str, object], tmp_path: Path) -> None:
    names = ("papers", "ablation")
    of_both = [method.name for method in METHODS.values() if method.group != "quantized"]
    half = protocol | {"samples": 260}  # a quarter is enough for a calibration
    found = wina_calib.compare(llama, tmp_path / "out", methods=names, sparsities=0.25, **half)
    assert [row.method for row in found.rows] == of_both and not found.skipped
    for row in found.rows:
        if row.method not in ("text-code", "text-prose", "text-builtin"):  # calibrated on text of another kind
            assert row.model_sparsity == pytest.approx(0.25, abs=0.03), row.method
    assert torch.tensor([row.ppl for row in found.rows]).isfinite().all()
    with_matrices, without = found.row("wina-paper", 0.25), found.row("wina", 0.25)
    assert with_matrices.read_fraction > without.read_fraction + 0.1


@pytest.mark.slow
def test_killed_it_goes_on(llama: Path, text: Path, protocol: dict[str, object], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wina_calib", "compare", str(llama), "-o", str(tmp_path / "out"), "-s", "0.25,0.5"]
    command += ["--methods", "wina,teal-uniform", "--data", str(text), "--heldout", str(text), "--samples", "64"]
    command += ["--seq-len", "128", "--tokens", "16384"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "wina: measure at 0.5" in line:
                break
        process.send_signal(signal.SIGKILL)
    left = cells(tmp_path / "out")
    assert [name[:9] for name in left] == ["wina-0.25"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "3 cells of 2 methods to compute, 1 there already" in done.stderr
    assert "wina: fit thresholds" not in done.stderr  # the finished calibration is used
    assert left.items() <= cells(tmp_path / "out").items() and len(cells(tmp_path / "out")) == 4
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cells", "compare.json", "compare.md"]
    whole = wina_calib.compare(
        llama,
        tmp_path / "whole",
        methods=("wina", "teal-uniform"),
        sparsities=SPARSITIES,
        **protocol | {"tokens": 16384},
    )
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [row["ppl"] for row in found] == [row.ppl for row in whole.rows]


@pytest.mark.slow
def test_order_of_methods_on_the_demo_model(tmp_path: Path) -> None:
    found = wina_calib.compare(
        "demo", tmp_path / "out", methods=("ours", "wina-paper", "teal-uniform", "random"), sparsities=0.65,
        samples=24, seq_len=1024, tokens=8192,
    )  # fmt: skip
    ppl = {row.method: row.ppl for row in found.rows}
    assert ppl["ours"] < ppl["teal-uniform"] and ppl["wina-paper"] < ppl["teal-uniform"] < ppl["random"]
