"""`wina-calib budget`: choose, write, apply, refit, frontier, page; and refuse without writing anything."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from browser import drive, needs_browser
from click.testing import CliRunner, Result

import wina_calib
from wina_calib.calibration.rebudget import Request, choose
from wina_calib.calibration.scale_curves import measured_pairs
from wina_calib.checkpoint.local_paths import remember
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.verdict import HeldOut
from wina_calib.cli import main
from wina_calib.runtime.load import sparse_sites
from wina_calib.studies.diagnose import diagnose
from wina_calib.studies.evaluate import find_warnings
from wina_calib.studies.report import page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """The tiny Llama with a global budget."""
    folder = tmp_path_factory.mktemp("budget") / "sparse"
    wina_calib.calibrate(
        llama, folder, transform="none", data=str(text), samples=64, seq_len=128, sparsity=0.5, grid=(0.25, 0.5, 0.65)
    )
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["--quiet", "budget", *map(str, args)])


def read(*args: object) -> dict:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def snapshot(folder: Path) -> dict[str, str]:
    """Name and hash of every file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights_of(files: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in files.items() if name.startswith("model-")}


def thresholds(opened: Checkpoint) -> dict[str, float]:
    return {name: float(t) for name, t in opened.tensors.items() if name.endswith(".threshold")}


def test_shows_what_is_stored(made: Path) -> None:
    found = read(made)
    assert found["budget"] == "global"
    assert found["model_sparsity"] == pytest.approx(0.5, abs=1e-6)
    assert found["predicted_loss_rise"] > 0
    stored = open_checkpoint(made).sparsities(0.5)
    assert list(found["cells"].values()) == pytest.approx(stored.reshape(-1).tolist(), abs=1e-7)
    shown = run(made)
    assert shown.exit_code == 0
    for word in ("attn_in", "mlp_out", "model sparsity", "read fraction", "speedup limit", "predicted perplexity"):
        assert word in shown.output


def test_what_was_measured_at_an_anchor_is_predicted_there(made: Path) -> None:
    opened = open_checkpoint(made)
    pairs = measured_pairs(opened.settings.provenance["prediction"])
    assert len(pairs) == len(opened.settings.anchors)
    for anchor, (_, rise) in zip(opened.settings.anchors, pairs, strict=True):
        assert read(made, "--sparsity", anchor)["predicted_loss_rise"] == pytest.approx(rise, rel=1e-4)


def test_targets(made: Path) -> None:
    assert read(made, "--sparsity", 0.3)["model_sparsity"] == pytest.approx(0.3)
    assert read(made, "--read-fraction", "80%")["read_fraction"] == pytest.approx(0.8)
    more, less = (read(made, "--max-ppl-rise", rise) for rise in ("0.005%", "0.00002"))
    assert more["predicted_perplexity_rise"] == pytest.approx(0.00005, rel=1e-3)
    assert more["model_sparsity"] > less["model_sparsity"]


def test_pins_stay_and_the_rest_meets_the_target(made: Path) -> None:
    before = read(made)["cells"]
    found = read(
        made, "-s", 0.4, "--set", "layers.0-1.attn_in=0.2", "--set", "layers.2.*=+0.1", "--freeze", "layers.*.mlp_out"
    )
    assert found["model_sparsity"] == pytest.approx(0.4)
    assert found["cells"]["layers.0.attn_in"] == 0.2
    assert found["cells"]["layers.2.attn_out"] == pytest.approx(before["layers.2.attn_out"] + 0.1)
    assert found["cells"]["layers.1.mlp_out"] == pytest.approx(before["layers.1.mlp_out"])
    assert found["budget"] == "custom"
    assert len(found["pinned"]) == 2 + 4 + 2


def test_all_cells_set_give_the_sparsity(made: Path) -> None:
    assert read(made, "--set", "*=0.35")["model_sparsity"] == pytest.approx(0.35)


def test_file_round_trip(made: Path, tmp_path: Path) -> None:
    for name in ("b.yaml", "b.json"):
        first = read(made, "-s", 0.42, "--min", "0.1", "--max", "layers.0.*=0.3", "-o", tmp_path / name)
        assert max(v for cell, v in first["cells"].items() if cell.startswith("layers.0.")) <= 0.3 + 1e-12
        again = read(made, "--budget", tmp_path / name)
        assert again["cells"] == pytest.approx(first["cells"], abs=1e-7)  # as many digits as a checkpoint holds


@pytest.mark.parametrize("sparsity", [0.5, 0.42, 0.8, 0.1, 0.0])
def test_apply_changes_thresholds_and_no_weights(folder: Path, sparsity: float) -> None:
    before, old = snapshot(folder), open_checkpoint(folder)
    found = read(folder, "-s", sparsity, "--apply", folder)
    after, opened = snapshot(folder), open_checkpoint(folder)
    opened.verify_weights()
    assert set(after) == set(before)
    assert weights_of(after) == weights_of(before)
    assert opened.settings.sparsity == sparsity
    expected = np.array(list(found["cells"].values())).reshape(-1, 4)
    np.testing.assert_allclose(opened.sparsities(sparsity), expected, atol=1e-6)
    model = wina_calib.load(folder)
    stored = {name: float(b) for name, b in model.named_buffers() if name.endswith(".threshold")}
    wina_calib.set_sparsity(model, sparsity)
    for site in sparse_sites(model):
        assert site.asked == pytest.approx(
            expected[site.layer, ["attn_in", "attn_out", "mlp_in", "mlp_out"].index(site.site.name)], abs=1e-6
        )
    again = {name: float(b) for name, b in model.named_buffers() if name.endswith(".threshold")}
    assert again == stored == thresholds(opened)
    if sparsity in old.settings.anchors:
        assert thresholds(opened) == pytest.approx(thresholds(old), rel=1e-5)


def test_interpolated_anchors_do_not_pile_up(folder: Path) -> None:
    for sparsity in (0.41, 0.42, 0.43):
        read(folder, "-s", sparsity, "--apply", folder)
    assert open_checkpoint(folder).settings.anchors == (0.25, 0.43, 0.5, 0.65)


def test_a_budget_that_goes_nowhere_is_said_to(folder: Path, tmp_path: Path) -> None:
    said, asked = "Nothing is changed: --apply DIR", ["budget", str(folder), "-s", "0.6"]
    assert said in CliRunner().invoke(main, asked).stdout
    assert json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)
    for args in (["budget", str(folder)], [*asked, "-o", str(tmp_path / "b.yaml")], [*asked, "--apply", str(folder)]):
        done = CliRunner().invoke(main, args)
        assert done.exit_code == 0 and said not in done.stdout


def test_what_was_not_fitted_is_not_called_fitted(folder: Path) -> None:
    said = "sparsity 0.8 lies above 0.65"
    for args in ([], ["--apply", str(folder)]):
        done = CliRunner().invoke(main, ["budget", str(folder), "-s", "0.8", *args])
        assert done.exit_code == 0 and said in done.stderr and said not in done.stdout
    settings = open_checkpoint(folder).settings
    assert settings.anchors == (0.25, 0.5, 0.65, 0.8) and settings.fitted_anchors == (0.25, 0.5, 0.65)
    assert said in find_warnings(settings, ("nowhere",), 0.8, 0.8, 1000)[0]
    assert find_warnings(settings, ("nowhere",), 0.6, 0.6, 1000) == ()
    card, fitted = (folder / "README.md").read_text("utf-8"), "25.0 %, 50.0 %, 65.0 %"
    assert f"| fitted at | {fitted} |" in card and "at 25.0 % to 65.0 % sparsity;" in card
    assert "| budget chosen later | `wina-calib budget`: `global` for 80.0 %, thresholds `from stored tables` |" in card
    assert f"fitted at {fitted})" in CliRunner().invoke(main, ["inspect", str(folder)]).stdout
    assert f"80.0 %, fitted at {fitted}".replace(" %", "&nbsp;%") in page(open_checkpoint(folder), ())
    result = diagnose(folder, what=["extremes"], extreme=(0.65, 0.8), data="builtin:heldout", tokens=128)
    assert result.extremes is not None and [row.fitted for row in result.extremes] == [True, False]
    done = CliRunner().invoke(main, ["budget", str(folder), "-s", "0.8", "--apply", str(folder), "--refit"])
    assert done.exit_code == 0 and said not in done.stderr
    assert open_checkpoint(folder).settings.fitted_anchors == (0.25, 0.5, 0.65, 0.8)
    assert "for 80.0 %, thresholds `fitted anew` |" in (folder / "README.md").read_text("utf-8")
    assert CliRunner().invoke(main, ["budget", str(folder)]).stderr == ""


@pytest.mark.parametrize(
    ("named", "fitted"),
    [
        (None, (0.2, 0.5)),
        ([], (0.2, 0.5)),
        ([0.5], (0.2,)),
        ([0.2, 0.5], (0.2, 0.5)),
        ("0.5", (0.2, 0.5)),
        (7, (0.2, 0.5)),
    ],
)
def test_fitted_anchors(named: object, fitted: tuple[float, ...]) -> None:
    assert Settings(0.5, (0.2, 0.5), provenance={"interpolated_anchors": named}).fitted_anchors == fitted


def test_a_budget_moves_to_another_checkpoint_of_the_model(calibrated: Path, made: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(calibrated, tmp_path / "uniform"))
    found = read(made, "-s", 0.5, "--apply", target)
    expected = np.array(list(found["cells"].values())).reshape(-1, 4)
    np.testing.assert_allclose(open_checkpoint(target).sparsities(0.5), expected, atol=1e-6)
    assert open_checkpoint(target).settings.budget == "global"


def test_refit_is_what_calibrating_with_the_file_gives(folder: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    read(folder, "-s", 0.4, "--set", "layers.0.*=0.2", "-o", path)
    wina_calib.calibrate(
        llama,
        tmp_path / "new",
        transform="none",
        budget=str(path),
        data=str(text),
        samples=64,
        seq_len=128,
        grid=(0.25, 0.5, 0.65),
    )
    fresh = open_checkpoint(tmp_path / "new")
    read(folder, "--budget", path, "--apply", folder)
    rough = open_checkpoint(folder)
    read(folder, "--budget", path, "--apply", folder, "--refit")
    refitted = open_checkpoint(folder)
    assert fresh.settings.sparsity == pytest.approx(refitted.settings.sparsity)
    assert thresholds(refitted) == pytest.approx(thresholds(fresh), rel=1e-5)
    assert thresholds(rough) != pytest.approx(thresholds(fresh), rel=1e-5)
    assert weights_of(snapshot(folder)) == weights_of(snapshot(tmp_path / "new"))
    assert refitted.settings.provenance["interpolated_anchors"] == []


def test_a_checkpoint_without_weights(llama: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stats"
    wina_calib.calibrate(
        llama,
        folder,
        weights="reference",
        data=str(text),
        samples=64,
        seq_len=128,
        sparsity=0.5,
        grid=(0.25, 0.5, 0.65),
    )
    assert not list(folder.glob("model-*.safetensors"))
    for extra in ([], ["--refit"]):
        found = read(folder, "-s", 0.42, "--apply", folder, *extra)
        opened = open_checkpoint(folder)
        assert opened.settings.sparsity == 0.42
        np.testing.assert_allclose(opened.sparsities(0.42).reshape(-1), list(found["cells"].values()), atol=1e-6)
    asked = [site.asked for site in sparse_sites(wina_calib.load(folder))]
    np.testing.assert_allclose(asked, list(found["cells"].values()), atol=1e-6)


@pytest.mark.parametrize("said", ["is not the text that", "is not here"])
def test_refit_refuses_changed_text_and_names_missing_text(said: str, folder: Path, text: Path) -> None:
    config = folder / "config.json"
    raw = json.loads(config.read_text())
    facts = raw["quantization_config"]["provenance"] | {"data_fingerprint": said}
    config.write_text(json.dumps(raw | {"quantization_config": raw["quantization_config"] | {"provenance": facts}}))
    if said == "is not the text that":
        remember(raw["quantization_config"]["weights"], facts, base_model=None, data=[str(text)])
    before = snapshot(folder)
    result = run(folder, "-s", 0.4, "--apply", folder, "--refit")
    assert result.exit_code == 1
    assert said in result.output and "--data" in result.output
    assert snapshot(folder) == before


@pytest.mark.parametrize("weights", ["full", "reference"])
def test_refit_refuses_weights_that_are_not_the_calibrations(
    weights: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    folder = tmp_path / "sparse"
    tiny.calibrate(base, folder, text, weights=weights, transform="none")
    shard = sorted((folder if weights == "full" else base).glob("model-*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    before = snapshot(folder)
    result = run(folder, "-s", 0.4, "--apply", folder, "--refit")
    assert result.exit_code == 1
    assert "not those that the calibration was made for" in result.output
    assert snapshot(folder) == before


def test_frontier(made: Path, text: Path, tmp_path: Path) -> None:
    found = read(made, "--curve", tmp_path / "f.csv")["curve"]
    rows = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    assert [float(row["sparsity"]) for row in rows] == [p["sparsity"] for p in found]
    losses = [p["predicted_loss_rise"] for p in found]
    assert losses == sorted(losses)
    assert losses[0] == 0
    measured = read(
        made, "--curve", tmp_path / "f.json", "--measure", "--tokens", 512, "--data", text, "--set", "layers.0.*=0.1"
    )["curve"]
    assert json.loads((tmp_path / "f.json").read_text()) == measured
    assert 0.9 not in [p["sparsity"] for p in measured]  # the pinned layer leaves no room
    for point in measured:
        assert point["measured_sparsity"] == pytest.approx(point["sparsity"], abs=0.05)
        assert point["measured_ppl"] > 1


def test_curve_without_a_name(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(made, "--curve").exit_code == 0
    assert (tmp_path / "frontier.csv").is_file()


def test_page(made: Path, tmp_path: Path) -> None:
    assert run(made, "-s", 0.4, "--html", tmp_path / "b.html").exit_code == 0
    assert "layers" in (tmp_path / "b.html").read_text()


@needs_browser
def test_what_the_page_downloads_is_accepted(made: Path, folder: Path, tmp_path: Path) -> None:
    assert run(made, "--html", tmp_path / "made.html").exit_code == 0
    (tmp_path / "browser").mkdir()
    actions = """
        slide("0.4"); cell(3).click(); slide("0.55");
        result.shown = shown(); result.pins = $("pins").textContent;
        $("download").click();
        await new Promise((done) => setTimeout(done, 300));
    """
    names = ("result.json", "budget-0.550.yaml")
    found = drive(tmp_path / "browser", (tmp_path / "made.html").read_text("utf-8"), actions, names)
    assert found["pins"].startswith("1 of ")
    file = tmp_path / "browser" / "budget-0.550.yaml"
    result = run(folder, "--budget", file, "--apply", folder)
    assert result.exit_code == 0, result.output
    applied = open_checkpoint(folder)
    assert applied.settings.sparsity == pytest.approx(0.55, abs=1e-9)
    stored = applied.sparsities(applied.settings.sparsity).reshape(-1)
    assert [float(value) for value in found["shown"]] == pytest.approx(stored, abs=0.000501)


def test_without_curves(calibrated: Path, tmp_path: Path) -> None:
    found = read(calibrated, "-s", 0.3)
    assert found["predicted_loss_rise"] is None
    assert found["budget"] == "uniform"
    assert set(np.round(list(found["cells"].values()), 6)) == {0.3}
    for args in (["--max-ppl-rise", "3%"], ["--html", tmp_path / "b.html"]):
        result = run(calibrated, *args)
        assert result.exit_code == 2
        assert "curves" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["-s", "0.9", "--max", "0.5"], 2, "cannot be met"),
        (["-s", "1.0"], 2, "[0, 1)"),
        (["--read-fraction", "0.01"], 2, "read fraction"),
        (["--max-ppl-rise", "much"], 2, "share"),
        (["--set", "layers.9.*=0.2"], 2, "0-2"),
        (["--set", "layers.0.attn_inn=0.2"], 2, "attn_in"),
        (["--set", "layers.0.attn_in=1.5"], 2, "[0, 1)"),
        (["--set", "layers.0.attn_in"], 2, "PATTERN=VALUE"),
        (["--freeze", "nothing"], 2, "layers.LAYERS.SITES"),
        (["-s", "0.4", "--read-fraction", "0.7"], 2, "one of them"),
        (["--budget", "missing.yaml"], 2, "no such"),
        (["--set", "*=0.3", "-s", "0.5"], 2, "cannot be met"),
        (["--refit"], 2, "--apply"),
        (["--measure"], 2, "--curve"),
        (["--data", "builtin"], 2, "--refit"),
        (["--curve", "f.txt"], 2, ".csv"),
        (["-o", "b.txt"], 2, ".yaml"),
        (["-o", "no/such/b.yaml"], 1, "does not exist"),
        (["--apply", "no-such-folder"], 1, "no-such-folder"),
    ],
)
def test_bad_input_is_one_message_and_nothing_written(
    args: list[str], code: int, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    outputs = [] if {"--apply", "--refit", "--measure"} & set(args) else ["--apply", folder]
    outputs += [] if "-o" in args else ["-o", "b.yaml"]
    result = run(folder, *outputs, *args)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert "Traceback" not in result.output
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("option", ["-o b.yaml", "--html b.html", "--curve f.csv"])
def test_existing_files_stay_unless_overwrite(
    made: Path, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["-s", "40%", *option.split()]
    (tmp_path / given[-1]).write_text("mine")
    result = run(made, *given)
    assert result.exit_code == 1
    assert "--overwrite" in result.output
    assert (tmp_path / given[-1]).read_text() == "mine"
    assert run(made, *given, "--overwrite").exit_code == 0
    assert (tmp_path / given[-1]).read_text() != "mine"


def test_a_budget_for_another_model(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "-o", tmp_path / "b.yaml").exit_code == 0
    text = (tmp_path / "b.yaml").read_text()
    (tmp_path / "b.yaml").write_text(text.replace("layers: 3", "layers: 4"))
    before = snapshot(folder)
    result = run(folder, "--budget", tmp_path / "b.yaml", "--apply", folder)
    assert result.exit_code == 2
    assert "another model" in result.output
    assert snapshot(folder) == before


def test_not_calibrated(llama: Path) -> None:
    result = run(llama)
    assert result.exit_code == 1
    assert "wina-calib calibrate" in result.output


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_crash_leaves_the_old_or_the_new(
    moves: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Path(shutil.copytree(folder, tmp_path / "reference"))
    read(reference, "-s", 0.42, "--apply", reference)
    expected, new = thresholds(open_checkpoint(reference)), {**snapshot(reference)}
    done = 0
    plain = Path.replace

    def replace(self: Path, target: Path) -> Path:
        nonlocal done
        if self.parent.name == ".wina-staged":
            if done == moves:
                raise KeyboardInterrupt
            done += 1
        return plain(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        assert run(folder, "-s", 0.42, "--apply", folder).exit_code == 130
    opened = open_checkpoint(folder)  # finishes what was decided
    assert thresholds(opened) == expected
    assert opened.settings.sparsity == 0.42
    after = snapshot(folder)
    assert {n: v for n, v in after.items() if n != "README.md"} == {n: v for n, v in new.items() if n != "README.md"}


def test_a_crash_before_the_decision_leaves_the_old(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(folder)
    with monkeypatch.context() as patch:
        patch.setattr(
            "wina_calib.calibration.apply_budget.write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert run(folder, "-s", 0.42, "--apply", folder).exit_code == 130
    assert snapshot(folder) == before


def test_choice_at_any_sparsity(made: Path) -> None:
    opened = open_checkpoint(made)
    choice = choose(opened, Request())
    rows = choice.rows((0.25, 0.5, 0.65))
    np.testing.assert_allclose(rows[1], opened.sparsities(0.5), atol=1e-7)
    np.testing.assert_allclose(rows[2], opened.sparsities(0.65), atol=1e-6)
    assert torch.is_tensor(opened.tensors["model.layers.0.wina.attn_in.curve"])


def test_predictions_of_quantized_weights_say_what_they_are_over(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer are too few for differences so small.
    monkeypatch.setattr("wina_calib.calibration.held_out.HELD_OUT_TOKENS", 8192)
    options = {"transform": "none", "samples": 64, "seq_len": 128, "grid": (0.5,), "sparsity": 0.5, "group_size": 32}
    wina_calib.calibrate(llama, tmp_path / "q", data=str(text), bits=4, **options)
    provenance = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["provenance"]
    shown = read(tmp_path / "q", "--curve", tmp_path / "f.csv")
    alone = shown["quantizing_perplexity_rise"]
    assert alone > 0 and shown["predicted_rise_over_original"] == pytest.approx(provenance["verdict"]["rise"], rel=0.05)
    at_0 = shown["curve"][0]
    assert at_0["predicted_loss_rise"] == 0 and at_0["predicted_rise_over_original"] == pytest.approx(alone)
    assert at_0["predicted_ppl"] == pytest.approx(provenance["base_ppl"] * (1 + alone))
    told = run(tmp_path / "q", "--max-ppl-rise", "3%").output
    assert "both rises are over its own int4 weights at sparsity 0" in told
    assert f"of which int4 alone {alone:+.2%}" in told


def test_where_the_verdict_tells_another_rise_it_is_said_why(folder: Path) -> None:
    """At a measured sparsity both are the same; between two the verdict draws a line, and curves are added up here."""
    assert "inspect and the card tell" not in run(folder).stdout
    raw = json.loads((folder / "config.json").read_text())
    facts = raw["quantization_config"]["provenance"]
    facts["held_out"]["loss_rise"] = facts["held_out"]["kl"] = [
        0.01,
        0.2,
        0.9,
    ]  # a tiny random model feels next to nothing
    facts["prediction"] |= {"loss_rise": [0.01, 0.2, 0.9], "kl": [0.01, 0.2, 0.9], "tokens": 1 << 20}
    (folder / "config.json").write_text(json.dumps(raw))
    assert "inspect and the card tell" not in run(folder).stdout
    raw["quantization_config"]["sparsity"] = 0.4
    (folder / "config.json").write_text(json.dumps(raw))
    shown = run(folder).stdout
    told = HeldOut.from_dict(facts["held_out"])
    assert told is not None
    assert (
        f"inspect and the card tell {told.rise_at(0.4):+.2%} here. Both hold to what was measured at 25 %, 50 %, 65 %"
        in shown
    )
    assert "inspect and the card tell" not in run(folder, "--set", "layers.0.*=0.9").stdout
