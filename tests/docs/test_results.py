"""The results page is what its stored figures say, its commands parse, and a part of it comes out the same again."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from shared import needs_shared

from wina_calib.calibration import held_out
from wina_calib.cli import main

ROOT = Path(__file__).parents[2]
STORED: dict[str, Any] = json.loads((ROOT / "docs" / "results.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(found: Any, stored: Any, where: str = "") -> None:
    """Fail unless two results say the same: numbers within 1 % or 0.005, which another machine's rounding stays far below."""
    assert type(found) is type(stored) or {type(found), type(stored)} <= {int, float}, where
    if isinstance(stored, dict):
        assert found.keys() == stored.keys(), where
        for key in stored:
            if "seconds" not in key:  # times may differ
                close(found[key], stored[key], f"{where}.{key}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), where
        for index, (a, b) in enumerate(zip(found, stored, strict=True)):
            close(a, b, f"{where}[{index}]")
    elif isinstance(stored, float):
        assert found == pytest.approx(stored, rel=0.01, abs=0.005), where
    elif where.rpartition(".")[2] not in ("model", "source", "target", "worst_site"):  # paths; a maximum of near ones
        assert found == stored, where


def test_the_page_is_what_the_stored_figures_say(script: ModuleType) -> None:
    assert (ROOT / "docs" / "results.md").read_text("utf-8") == script.page(STORED)
    for name in re.findall(r"\]\((figures/results-[\w-]+\.png)\)", script.page(STORED)):
        assert (ROOT / "docs" / name).read_bytes()[:4] == b"\x89PNG", name


def test_every_step_is_there_with_its_command(script: ModuleType) -> None:
    assert {name: step["command"] for name, step in STORED.items()} == script.STEPS
    page = script.page(STORED)
    for command in script.STEPS.values():
        assert f"$ wina-calib {command}\n" in page


def test_the_commands_of_the_page_parse() -> None:
    commands = re.findall(r"^\$ wina-calib (.*)$", (ROOT / "docs" / "results.md").read_text("utf-8"), flags=re.M)
    assert len(commands) >= len(STORED)
    for line in commands:
        name, *args = shlex.split(line)
        command = main.get_command(click.Context(main), name)
        assert command is not None, line
        command.make_context(name, args)  # refuses what does not parse


def test_figures_are_equal_only_within_tolerance() -> None:
    close({"ppl": 20.1, "seconds": 3}, {"ppl": 20.0, "seconds": 9})
    for wrong in ({"ppl": 20.5}, {"ppl": "20"}, {"kl": 20.0}):
        with pytest.raises(AssertionError):
            close(wrong, {"ppl": 20.0})
    with pytest.raises(AssertionError):
        close({"way": "budget"}, {"way": "native"})


@pytest.mark.parametrize("name", ["flops-llama-2-7b", "flops-phi-4"])
def test_cost_tables_come_out_the_same(script: ModuleType, name: str) -> None:
    command = script.STEPS[name]
    close(script.rounded(script.prune(name, script.invoke(command))), STORED[name]["result"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bounds", "demo-bounds"])
def test_bounds_come_out_the_same(script: ModuleType, name: str) -> None:
    close(script.rounded(script.prune(name, script.invoke(script.STEPS[name]))), STORED[name]["result"], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo-compare", pytest.param("ref-compare", marks=needs_shared)])
def test_a_cell_of_each_comparison_comes_out_the_same(
    script: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(script.STEPS[name])
    for option, value in (("-o", str(tmp_path / "out")), ("--methods", "wina"), ("-s", "0.5")):
        words[words.index(option) + 1] = value
    (row,) = script.rounded(script.invoke(shlex.join(words)))["rows"]
    (stored,) = (r for r in STORED[name]["result"]["rows"] if (r["method"], r["sparsity"]) == ("wina", 0.5))
    close(row, stored, name)


@pytest.mark.slow
def test_a_diagnosis_comes_out_the_same(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "HELD_OUT_TOKENS", 12288)  # the text that users are given
    for name in ("demo-calibrate", "demo-diagnose"):
        command = script.STEPS[name].replace(f"{script.WORK}/demo-sparse", str(tmp_path / "sparse"))
        close(script.rounded(script.prune(name, script.invoke(command))), STORED[name]["result"], name)
