import json
import os

import numpy as np
import pytest
from budget_cases import small_cells, smooth_curves
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wina_calib.budgets import (
    Budget,
    BudgetFile,
    ModelKey,
    Setting,
    explicit,
    format_budget,
    parse_budget,
    read_budget,
    solve_global,
    write_budget,
)
from wina_calib.errors import BudgetError, OutputError

CELLS = small_cells()
MODEL = ModelKey.of("llama", 256, CELLS)
HEAD = f"""
format: wina-budget/1
model: {{model_type: llama, layers: 6, hidden_size: 256, fingerprint: "{MODEL.fingerprint}"}}
sparsity: 0.5
score: wina
"""


def parsed(text):
    return parse_budget(text.encode(), "yaml").budget(MODEL, CELLS).sparsities


@given(hnp.arrays(np.float64, (6, 4), elements=st.floats(0, 1, exclude_max=True)), st.sampled_from(["yaml", "json"]))
@settings(deadline=None)
def test_round_trip_is_exact_in_float32(sparsities, kind):
    content = explicit(Budget(sparsities), CELLS, MODEL, 0.5, "wina")
    again = parse_budget(format_budget(content, kind, ["two\nlines"]).encode(), kind)
    assert again == content
    found = again.budget(MODEL, CELLS).sparsities
    assert (found.astype(np.float32) == sparsities.astype(np.float32)).all()


def test_numbers_have_no_more_digits_than_a_checkpoint_holds():
    third = np.float32(1 / 3)
    content = explicit(Budget(np.full((6, 4), third)), CELLS, MODEL, 0.5000000298, "wina")
    text = format_budget(content, "yaml")
    assert "sparsity: 0.5\n" in text and f"layers.0.attn_in: {third!s}\n" in text
    below_one = explicit(Budget(np.full((6, 4), 1 - 1e-12)), CELLS, MODEL, 0.5, "wina")
    assert parse_budget(format_budget(below_one, "yaml").encode(), "yaml") == below_one


@given(
    st.dictionaries(
        st.sampled_from(["*", "layers.0-3.*", "layers.*.mlp_out", "layers.5.attn_in,mlp_in", "odd: #'\"key", "~"]),
        st.tuples(st.floats(-1, 1, allow_nan=False), st.just(True)) | st.tuples(st.floats(0, 1), st.just(False)),
    ),
    st.sampled_from(["yaml", "json"]),
)
@settings(deadline=None)
def test_patterns_round_trip_exactly(lines, kind):
    settings = tuple(Setting(pattern, abs(v) if not r else v, r) for pattern, (v, r) in lines.items())
    content = BudgetFile(MODEL, 0.5, "teal", settings)
    again = parse_budget(format_budget(content, kind).encode(), kind)
    assert again == content
    assert format_budget(again, kind) == format_budget(content, kind)


def test_a_file_written_by_hand():
    found = parsed(HEAD + 'cells:\n  layers.0-1.*: 0.2   # spare the first\n  layers.*.mlp_out: "+0.1"\n')
    assert found[0] == pytest.approx(np.array([0.2, 0.2, 0.2, 0.3]))
    assert found[5] == pytest.approx(np.array([0.5, 0.5, 0.5, 0.6]))


def test_signs_without_quotes_are_relative_too():
    # Plain YAML would read +0.1 as the number 0.1 and drop the sign.
    assert parsed(HEAD + "cells: {layers.0.attn_in: +0.1, layers.1.attn_in: -0.1}")[:2, 0].tolist() == [0.6, 0.4]
    text = json.dumps(json.loads(format_budget(BudgetFile(MODEL, 0.5, "wina", ()), "json")) | {"cells": {"*": -0.1}})
    assert parse_budget(text.encode(), "json").budget(MODEL, CELLS).sparsities[0, 0] == 0.4


def test_exponents_and_byte_order_mark():
    assert parsed("\ufeff" + HEAD + "cells: {layers.0.attn_in: 1e-05}")[0, 0] == 1e-5


def test_yaml_text_exactly():
    cells = small_cells(1)
    model = ModelKey.of("llama", 256, cells)
    content = explicit(Budget([[0.5, 1e-7, 0, 0.25]]), cells, model, 0.5, "wina")
    lines = [line for line in format_budget(content, "yaml").splitlines() if not line.startswith("#")]
    assert lines == [
        "format: wina-budget/1",
        "model:",
        '  model_type: "llama"',
        "  layers: 1",
        "  hidden_size: 256",
        f'  fingerprint: "{cells.fingerprint()}"',
        "sparsity: 0.5",
        "score: wina",
        "cells:",
        "  layers.0.attn_in: 0.5",
        "  layers.0.attn_out: 0.0000001",
        "  layers.0.mlp_in: 0.0",
        "  layers.0.mlp_out: 0.25",
    ]


def test_another_model_is_refused_with_what_differs():
    other = small_cells(8)
    content = explicit(Budget(np.full((6, 4), 0.5)), CELLS, MODEL, 0.5, "wina")
    with pytest.raises(BudgetError, match="model_type llama in the file, qwen2 in the model; layers 6 .*8 .*finger"):
        content.budget(ModelKey.of("qwen2", 256, other), other)
    with pytest.raises(BudgetError, match="another model: hidden_size 256 in the file, 512 in the model$"):
        content.budget(ModelKey.of("llama", 512, CELLS), CELLS)


BOMB = "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("- 1", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("format: wina-budget/2", "format must be wina-budget/1, found 'wina-budget/2'"),
        ("sparsity: 0.5", "format must be wina-budget/1, found nothing"),
        (BOMB, "line 1: anchors and aliases"),
        (HEAD + "cells: &x {}", "line 6: anchors"),
        (HEAD + "cells: *x", "anchors"),
        (HEAD + "cells: !!python/object/apply:os.system [id]", "tags are not accepted"),
        (HEAD + "cells: {layers.0.attn_in: !!float 0.5}", "tags are not accepted"),
        (HEAD + "cells: {'*': 0.1, '*': 0.2}", "stands twice"),
        (HEAD + "score: teal\ncells: {}", "line 6: the key 'score' stands twice"),
        (HEAD + "cells: [[[[[[[[[1]]]]]]]]]", "nested more than 4 deep"),
        (HEAD + "cells: {? [a] : 1}", "a key must be plain text"),
        (HEAD + "cells: {'*': [1]}", "must be one value, found a list"),
        (HEAD + "cells: {'*': .nan}", "not a number"),
        (HEAD + "cells: {'*': .inf}", "not a number"),
        (HEAD + "cells: {'*': 1e400}", "not a number"),
        (HEAD + "cells: {'*': }", "not a number"),
        (HEAD + "cells: {'*': 1.0}", r"layers.0.attn_in.*outside \[0, 1\)"),
        (HEAD + "cells: {layers.0.mlp_oot: 0.5}", "did you mean mlp_out"),
        (HEAD + "cells:", "cells must be a mapping"),
        (HEAD, "the budget lacks cells; `wina-calib budget DIR -o FILE` writes"),
        (HEAD.replace("layers: 6, ", "") + "cells: {}", "model lacks layers"),
        (HEAD + "celsl: {}", "unknown key 'celsl' in the budget; did you mean cells"),
        (HEAD + "cells: {}\n---\nformat: x", "second document"),
        (HEAD + "cells: {", "not valid YAML"),
        (HEAD + "cells: {}\n\tx: 1", "not valid YAML"),
        (HEAD.replace("0.5", "1.0") + "cells: {}", "sparsity must be in"),
        (HEAD.replace("0.5", "half") + "cells: {}", "not a number"),
        (HEAD.replace("wina\n", "wanda\n") + "cells: {}", "score must be one of"),
        (HEAD.replace("layers: 6", "layers: 6.5") + "cells: {}", "positive whole number"),
        (HEAD.replace("layers: 6", "layer: 6") + "cells: {}", "unknown key 'layer' in model; did you mean layers"),
        (HEAD.replace("llama", "'../x'") + "cells: {}", "is no model type"),
        (HEAD.replace(MODEL.fingerprint, "0") + "cells: {}", "16 hexadecimal"),
    ],
)
def test_bad_yaml_is_refused(text, message):
    with pytest.raises(BudgetError, match=message):
        parsed(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a mapping"),
        ("{", "not valid JSON at line 1"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": -Infinity}', "not a finite number"),
        ("[" * 100_000, "nested"),
        ('{"a": [[[[[[1]]]]]]}', "nested"),
        (
            '{"format": "wina-budget/1", "sparsity": ' + "9" * 5000 + "}",
            "the budget lacks model, score, cells; .*writes a whole",
        ),
        ('{"format": null}', "found 'null'"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(BudgetError, match=message):
        parse_budget(text.encode(), "json")


def test_bytes_that_are_no_text_and_files_that_are_too_large_are_refused():
    with pytest.raises(BudgetError, match="not UTF-8"):
        parse_budget(b"format: \xff", "yaml")
    with pytest.raises(BudgetError, match="larger than 1000000 bytes"):
        parse_budget(b"#" * 1_000_001, "yaml")


def test_disk_round_trip(tmp_path):
    budget = solve_global(CELLS, smooth_curves(), 0.5)
    content = explicit(budget, CELLS, MODEL, 0.5, "wina")
    for name in ("b.yaml", "b.yml", "b.JSON"):
        write_budget(tmp_path / name, content, ["a note"])
        assert read_budget(tmp_path / name) == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.JSON", "b.yaml", "b.yml"]


def test_disk_errors_name_the_path(tmp_path):
    content = explicit(Budget(np.zeros((6, 4))), CELLS, MODEL, 0.0, "wina")
    with pytest.raises(BudgetError, match=r"b\.txt: a budget file ends in"):
        write_budget(tmp_path / "b.txt", content)
    with pytest.raises(BudgetError, match=r"none\.yaml: there is no such"):
        read_budget(tmp_path / "none.yaml")
    with pytest.raises(OutputError, match="cannot be written"):
        write_budget(tmp_path / "missing" / "b.yaml", content)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(BudgetError, match="no such budget file"):
        read_budget(tmp_path / "pipe.yaml")
    (tmp_path / "bad.yaml").write_text("x")
    with pytest.raises(BudgetError, match=r"bad\.yaml: the budget must be a mapping"):
        read_budget(tmp_path / "bad.yaml")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "b.yaml"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_budget(path, explicit(Budget(np.zeros((6, 4))), CELLS, MODEL, 0.0, "wina"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pattern_set_twice_cannot_be_written():
    content = BudgetFile(MODEL, 0.5, "wina", (Setting("*", 0.1, True), Setting("*", 0.2, True)))
    with pytest.raises(BudgetError, match=r"'\*' is set twice"):
        format_budget(content, "json")
