"""The three questions: figures that are the checkpoint's own."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from wina_calib.budgets.count import count_cells
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.checkpoint.verdict import HELD_OUT, VERDICT, HeldOut
from wina_calib.cli import main
from wina_calib.common.text import percent, whole
from wina_calib.studies.answers import answers


def without(opened: Checkpoint, *facts: str) -> Checkpoint:
    settings = opened.settings
    kept = {name: value for name, value in settings.provenance.items() if name not in facts}
    return replace(opened, settings=replace(settings, provenance=kept))


def test_how_much_is_what_was_measured_on_held_out_text(demo_sparse: Path) -> None:
    opened = open_checkpoint(demo_sparse)
    held = HeldOut.from_dict(opened.settings.provenance[HELD_OUT])
    assert held is not None
    answer = answers(opened)[0]
    for row, rise in zip(answer.rows, (0.01, 0.05, 0.1), strict=True):
        beyond = " or more" if held.rise_at(held.anchors[-1]) < rise else ""  # than was fitted
        assert row[:2] == (f"+{percent(rise, 0)}", percent(whole(held.sparsity_for(rise)), 0) + beyond)
    assert "or more" not in answer.rows[0][1]
    lowest = HeldOut(held.anchors[:1], held.loss_rise[:1], held.kl[:1], held.achieved[:1], held.tokens, held.data)
    facts = opened.settings.provenance | {HELD_OUT: lowest.to_dict()}
    fitted_low = replace(opened, settings=replace(opened.settings, provenance=facts))
    assert "or more" in answers(fitted_low)[0].rows[-1][1]
    assert percent(held.rise_at(opened.settings.sparsity)) in answer.says
    assert f"{held.tokens:,} tokens that nothing was fitted on" in answer.says


def test_where_names_the_sites_and_layers_of_the_budget(demo_sparse: Path) -> None:
    opened = open_checkpoint(demo_sparse)
    shares = np.asarray(opened.sparsities(opened.settings.sparsity))
    answer = answers(opened)[1]
    assert [row[1] for row in answer.rows] == [percent(float(mean)) for mean in shares.mean(axis=0)]
    cells = count_cells(opened.architecture, opened.settings.transform)
    layers = (shares * cells.weights).sum(axis=1) / cells.weights.sum(axis=1)
    assert f"{int(layers.argmax())} drops most" in answer.says and f"{int(layers.argmin())} least" in answer.says


def test_where_of_a_uniform_budget_is_everywhere(calibrated: Path) -> None:
    assert answers(open_checkpoint(calibrated))[1].says == "The same share, 50.0 %, at every site of every layer."


def test_what_it_costs_has_the_bytes_read_and_the_rise(demo_sparse: Path) -> None:
    opened = open_checkpoint(demo_sparse)
    cells = count_cells(opened.architecture, opened.settings.transform)
    answer = answers(opened)[2]
    assert [row[0] for row in answer.rows] == ["25 %", "40 %", "50 %", "65 %"]
    for row, sparsity in zip(answer.rows, (0.25, 0.4, 0.5, 0.65), strict=True):
        read = cells.read_fraction_at(sparsity)
        assert row[1:3] == (percent(read, 0), f"{1 / read:.2f}")
        assert re.fullmatch(r"\+[\d.]+ %", row[3])
    rises = [float(row[3].strip("+ %")) for row in answer.rows]
    assert rises == sorted(rises) and rises[0] < rises[-1]


def test_a_checkpoint_of_before_says_what_it_does_not_know(demo_sparse: Path) -> None:
    much, _, cost = answers(without(open_checkpoint(demo_sparse), HELD_OUT, VERDICT))
    assert "not measured on held-out text" in much.says and much.rows == ()
    assert {row[3] for row in cost.rows} == {"-"}


def test_the_report_says_them_too(demo_sparse: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(main, ["report", str(demo_sparse), "-o", str(tmp_path / "page")])
    assert done.exit_code == 0, done.stderr
    page = (tmp_path / "page" / "index.html").read_text()
    for answer in answers(open_checkpoint(demo_sparse)):
        assert answer.question in done.stdout and answer.says in done.stdout
        assert f"<h2>{answer.question}</h2>" in page
        for row in answer.rows:
            assert row[0] in done.stdout
    again = CliRunner().invoke(main, ["report", str(demo_sparse), "-o", str(tmp_path / "two"), "--json"])
    assert [a["question"] for a in json.loads(again.stdout)["answers"]] == [
        "How much can I drop?", "Where is it dropped?", "What does it cost?",
    ]  # fmt: skip
