"""Quality decides where no sparsity is asked for, and every calibration ends with what to expect of it."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from shared import SHARED, needs_shared

import wina_calib
from wina_calib.calibration.run import Result
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.checkpoint.verdict import HELD_OUT, HeldOut, Verdict
from wina_calib.cli import main
from wina_calib.commands import calibrate as calibrate_command
from wina_calib.errors import UsageError

OPTIONS = {"quick": True, "seq_len": 512, "transform": "none", "budget": "uniform", "grid": (0.2, 0.5)}
HELD_TOKENS = 2560  # that a quick calibration is measured on


def run(*args: object) -> tuple[str, str]:
    done = CliRunner().invoke(main, [*map(str, args)])
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verdict]:
    """The demo model, calibrated for as much as keeps perplexity within 2 %."""
    folder = tmp_path_factory.mktemp("decided") / "out"
    return folder, wina_calib.calibrate("demo", folder, max_ppl_rise=0.02, **OPTIONS).verdict


def test_the_sparsity_is_the_largest_within_the_rise(decided: tuple[Path, Verdict]) -> None:
    folder, verdict = decided
    held = HeldOut.from_dict(open_checkpoint(folder).settings.provenance[HELD_OUT])
    assert held is not None and verdict.limit == 0.02
    assert verdict.rise <= 0.02 < held.rise_at(verdict.sparsity + 0.01)
    assert 0.02 < verdict.sparsity < 0.5
    assert open_checkpoint(folder).settings.sparsity == verdict.sparsity


def test_evaluate_finds_what_was_predicted(decided: tuple[Path, Verdict]) -> None:
    """The checkpoint's own thresholds, which lie between two anchors, on the text of the prediction."""
    folder, verdict = decided
    found = wina_calib.evaluate(folder, tokens=HELD_TOKENS)
    assert found.sparsity == verdict.sparsity
    assert found.model_sparsity == pytest.approx(verdict.achieved, abs=0.01)
    between = wina_calib.evaluate(folder, tokens=HELD_TOKENS, sparsity=0.4)
    rise = between.sparse_ppl / between.dense_ppl - 1
    assert 1 / 1.25 < rise / verdict.rises["0.4"] < 1.25
    stored = {name: float(t) for name, t in open_checkpoint(folder).tensors.items() if name.endswith(".threshold")}
    model = wina_calib.load(folder)
    asked = {m.site.asked for m in model.modules() if hasattr(m, "site") and hasattr(m.site, "asked")}
    assert asked and all(a == pytest.approx(verdict.sparsity, abs=1e-6) for a in asked)
    assert len(set(stored.values())) > 10 and min(stored.values()) > 0


def test_achieved_sparsity_and_losses_are_those_of_the_loaded_model(decided: tuple[Path, Verdict]) -> None:
    folder, _ = decided
    held = HeldOut.from_dict(open_checkpoint(folder).settings.provenance[HELD_OUT])
    assert held is not None
    found = wina_calib.evaluate(folder, tokens=HELD_TOKENS, sparsity=0.5)
    assert found.tokens == held.tokens
    assert held.achieved[1] == pytest.approx(found.model_sparsity, abs=1e-4)
    assert held.loss_rise[1] == pytest.approx(math.log(found.sparse_ppl / found.dense_ppl), abs=1e-4)
    assert held.kl[1] == pytest.approx(found.kl, abs=1e-4)
    assert found.rise_error == pytest.approx(held.errors[1] * found.sparse_ppl / found.dense_ppl, rel=0.02)


def test_an_asked_sparsity_is_taken_and_told_of(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = "--quick --seq-len 512 --transform none --budget uniform --grid 0.3 --sparsity 0.7"
    told, noted = run("calibrate", "demo", "-o", out, *options.split())
    assert f"{out}: calibrated for 70 % sparsity." in told
    assert re.search(r"expected rise of perplexity +\+\d+ %( ± \d+)? at 70 % sparsity", told)
    assert f"wina-calib evaluate {out}" in told and f"wina-calib generate {out}" in told
    warning = next(line for line in noted.splitlines() if line.startswith("warning: perplexity is expected to rise by"))
    told, noted = run("inspect", out, "--json")
    assert f"{json.loads(told)['warning']}" in warning and json.loads(told)["warning"] in noted
    command = warning.rpartition("wina-calib ")[2].split()
    run(*command)  # the remedy that it names
    settings = open_checkpoint(out).settings
    mended = Verdict.from_facts(settings.provenance)
    assert mended is not None and settings.sparsity == mended.sparsity < 0.7
    assert mended.rise == pytest.approx(0.05, abs=0.01)
    shown, _ = run("inspect", out)
    facts = json.loads(run("inspect", out, "--json")[0])
    assert mended.text() in shown and facts["verdict"] == json.loads(json.dumps(mended.to_json()))


def test_the_card_and_json_say_the_same(tmp_path: Path, llama: Path, text: Path) -> None:
    out = tmp_path / "out"
    options = ["--samples", 64, "--seq-len", 128, "--transform", "none", "--budget", "uniform", "--data", text]
    facts = json.loads(run("calibrate", llama, "-o", out, *options, "--json")[0])
    verdict = Verdict.from_facts(open_checkpoint(out).settings.provenance)
    assert verdict is not None and verdict.errors and facts["verdict"] == json.loads(json.dumps(verdict.to_json()))
    card = (out / "README.md").read_text()
    assert all(f"| {what} | {much} |" in card for what, much in verdict.rows())
    assert facts["sparsity"] == verdict.sparsity == 0.65  # a random model loses nothing: the last anchor
    done = Result(out, open_checkpoint(out).settings)
    assert calibrate_command.told(done).endswith('"Once upon a time"')
    (out / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert calibrate_command.told(done).endswith('"What is a lighthouse?"')


def test_a_budget_put_in_later_is_judged_by_the_curves(tmp_path: Path, calibrated: Path) -> None:
    """Without curves nothing is known of it, and nothing is said."""
    folder = tmp_path / "c"
    shutil.copytree(calibrated, folder)
    before = Verdict.from_facts(open_checkpoint(folder).settings.provenance)
    run("budget", folder, "--sparsity", "0.3", "--apply", folder)
    moved = Verdict.from_facts(open_checkpoint(folder).settings.provenance)
    assert before is not None and moved is not None
    assert (moved.sparsity, moved.rises) == (0.3, before.rises)
    run("budget", folder, "--set", "layers.0.mlp_out=0.6", "--apply", folder)
    assert Verdict.from_facts(open_checkpoint(folder).settings.provenance) is None


def test_quick_takes_less_unless_told_otherwise() -> None:
    from wina_calib.calibration.options import make_options

    quick = make_options({"quick": True})
    assert (quick.samples, quick.grid) == (12, (0.25, 0.5))
    assert make_options({"quick": True, "samples": 20}).samples == 20
    with pytest.raises(UsageError, match="max-ppl-rise is 0"):
        make_options({"max_ppl_rise": 0})


@needs_shared
def test_the_newcomers_case(tmp_path: Path) -> None:
    flags = ["--sparsity", "0.6", "--samples", "16", "--seq-len", "512", "--transform", "none"]
    told, noted = run("calibrate", SHARED / "models" / "stories260K", "-o", tmp_path / "out", *flags)
    assert re.search(r"rise of perplexity +\+\d+(\.\d)? %( ± \d+(\.\d)?)? at 60 % sparsity", told)
    assert "% sparsity costs about 5 %" in noted
