"""The command line: results as JSON on standard output alone, errors as one message with an exit code."""

import io
import json
import logging
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import script
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging as transformers_logging

import wina_calib
from wina_calib.checkpoint.reader import read_settings
from wina_calib.cli import COMMANDS, main
from wina_calib.commands.demo import PROMPTS
from wina_calib.commands.options import Counts, Share
from wina_calib.commands.output import bars
from wina_calib.common.text import fixed, rise, table
from wina_calib.errors import StateError
from wina_calib.studies.evaluate import find_warnings


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def as_json(result: Result) -> dict:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_every_command_has_help() -> None:
    listed = " ".join(run("--help").stdout.partition("Commands:")[2].split())
    for command, does in COMMANDS.items():
        assert f"{command} {does}" in listed
        result = run(command, "--help")
        assert result.exit_code == 0, command
        assert " ".join(result.stdout.split("\n\n")[1].split()) == does
        assert result.stdout.startswith("Usage: ")
        assert f"\n    wina-calib {command}" in result.stdout.partition("Example")[2], command


COMPLETE = """
import os, sys
os.environ |= {"_WINA_CALIB_COMPLETE": "bash_complete", "COMP_WORDS": sys.argv[1], "COMP_CWORD": sys.argv[2]}
from wina_calib.cli import main
try:
    main(prog_name="wina-calib")
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def test_completion_of_commands_waits_for_no_import() -> None:
    done = script.run(COMPLETE, "wina-calib in", 1)
    assert done.stdout.split() == ["plain,inspect", "plain,info"]
    assert done.stderr.split() == ["False"]


def test_completion_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_WINA_CALIB_COMPLETE": "bash_complete", "COMP_WORDS": "wina-calib push x --pr"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMP_CWORD", "3")
    done = CliRunner().invoke(main, prog_name="wina-calib")
    assert done.stdout.split() == ["plain,--private"]


def test_quiet_leaves_standard_error_empty(calibrated: Path, text: Path) -> None:
    arguments = ["evaluate", calibrated, "--data", text, "--tokens", 256]
    assert "warning: " in run(*arguments).stderr
    done = run("--quiet", *arguments)
    assert done.stderr == ""
    assert "perplexity" in done.stdout
    assert run("-q", "inspect", "/no/such/folder").stderr.startswith("Error: ")  # what failed is always said
    assert run("-q", "-v", "inspect", calibrated).exit_code == 2


def test_verbose_logs_to_standard_error_alone(calibrated: Path) -> None:
    try:
        done = run("--verbose", "generate", calibrated, "a text", "--new", 2, "--json")
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert json.loads(done.stdout)["text"].startswith("a text")
    finally:
        run("flops", "demo")
    assert transformers_logging.get_verbosity() == transformers_logging.ERROR


@pytest.mark.parametrize("flag", ["--quiet", "--verbose"])
def test_log_levels_end_with_the_command(flag: str) -> None:
    logger = logging.getLogger("wina_calib")
    before = logger.level
    assert CliRunner().invoke(main, [flag, "compare", "demo", "--list"]).exit_code == 0
    assert logger.level == before


@pytest.mark.parametrize(("value", "plain"), [(None, False), ("1", True)])
def test_no_color_draws_plain_bars(monkeypatch: pytest.MonkeyPatch, value: str | None, plain: bool) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_COLOR", value)
    with bars() as progress:
        progress.phase("work", 4)
        progress.step("")
    assert "work" in terminal.getvalue()
    assert terminal.getvalue().isascii() is plain


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_version() -> None:
    assert run("--version").stdout == f"wina-calib {wina_calib.__version__}\n"


def test_calibrate_evaluate_inspect(llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    flags = ["--samples", 64, "--seq-len", 128, "--grid", "0.5,0.65", "--budget", "uniform", "--transform", "none"]
    done = as_json(run("calibrate", llama, "-o", out, "-s", 0.4, "--data", text, *flags, "--json"))
    assert done["folder"] == str(out)
    assert done["anchors"] == [0.4, 0.5, 0.65]
    quality = as_json(run("evaluate", out, "--data", text, "--tokens", 4096, "--json"))
    assert {"dense_ppl", "sparse_ppl", "kl", "top1_agreement", "model_sparsity", "read_fraction", "sites"} <= set(
        quality
    )
    assert {"read_fraction_decoder", "base_ppl"} <= set(quality)
    assert quality["sparsity"] == 0.4
    assert quality["model_sparsity"] == pytest.approx(0.4, abs=0.01)
    assert [set(s) for s in quality["sites"]] == [{"layer", "site", "asked", "achieved"}] * 12
    assert any("also in the calibration data" in w for w in quality["warnings"])
    dense = as_json(run("evaluate", out, "--data", text, "--tokens", 4096, "--sparsity", 0, "--json"))
    assert dense["kl"] == 0.0
    assert dense["dense_ppl"] == dense["sparse_ppl"] == quality["dense_ppl"]
    facts = as_json(run("inspect", out, "--json"))
    assert facts["weights_verified"] is True
    assert len(facts["sites"]) == 12
    for shown in (run("inspect", out), run("evaluate", out, "--data", text, "--tokens", 4096)):
        assert shown.exit_code == 0
        assert "read fraction" in shown.stdout


@pytest.mark.parametrize(("achieved", "warned"), [(0.515, False), (0.485, False), (0.525, True), (0.4, True)])
def test_evaluate_warns_where_the_sparsity_is_missed(calibrated: Path, achieved: float, warned: bool) -> None:
    found = find_warnings(read_settings(calibrated), ("nowhere",), 0.5, achieved, 1000)
    assert [("--data" in w and f"{achieved:.3f}" in w) for w in found] == [True] * warned


@pytest.mark.parametrize(
    ("asked", "tokens", "words"),
    [(0.65, 999, ["999 tokens"]), (0.8, 1000, ["above 0.65"]), (0.1, 1000, []), (0.0, 1000, [])],
)
def test_evaluate_warns_of_few_tokens_and_sparsities_that_were_not_fitted(
    calibrated: Path, asked: float, tokens: int, words: list[str]
) -> None:
    settings = replace(read_settings(calibrated), anchors=(0.25, 0.5, 0.65))
    found = find_warnings(settings, ("nowhere",), asked, asked, tokens)
    assert [word in warning for word, warning in zip(words, found, strict=True)] == [True] * len(words)


@pytest.mark.parametrize(("name", "near"), [("calibrat", "calibrate"), ("evalute", "evaluate"), ("frobnicate", None)])
def test_a_wrong_command_gets_the_nearest(name: str, near: str | None) -> None:
    done = run(name)
    assert done.exit_code == 2
    assert (f"Did you mean '{near}'?" in done.stderr) is (near is not None)
    assert f"No such command '{name}'" in done.stderr
    assert run("--help", name).exit_code == 0


@pytest.mark.parametrize(
    ("given", "number"), [("50%", 0.5), ("0.5", 0.5), (" 12.5 % ", 0.125), ("5e-1", 0.5), ("5%%", None), ("%", None)]
)
def test_a_share_is_a_number_or_a_percentage(given: str, number: float | None) -> None:
    found = run("flops", "demo", "-s", given, "--json")
    if number is None:
        assert found.exit_code == 2
        assert "not a share" in found.stderr
    else:
        assert as_json(found)["rows"][-1]["sparsity"] == number


def test_a_bare_number_above_one_is_no_share(tmp_path: Path) -> None:
    said = "3 is 300 %: write 3% or 0.03"
    for args in (
        ["budget", "nowhere", "--max-ppl-rise", "3"],
        ["calibrate", "demo", "-o", str(tmp_path / "out"), "--sparsity", "3"],
        ["calibrate", "demo", "-o", str(tmp_path / "out"), "--grid", "0.25,3"],
        ["flops", "demo", "-s", "0.5,3"],
    ):
        found = run(*args)
        assert found.exit_code == 2 and said in " ".join(found.stderr.split()), found.stderr
    assert Share().convert("300%", None, None) == 3.0
    assert Counts().convert("1,256", None, None) == (1, 256)


def test_an_empty_prompt_without_a_first_token(calibrated: Path, tmp_path: Path) -> None:
    shutil.copytree(calibrated, tmp_path / "s")
    tokenizer = json.loads((tmp_path / "s" / "tokenizer.json").read_text())
    (tmp_path / "s" / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    refused = run("generate", tmp_path / "s", "")
    assert refused.exit_code == 2
    assert "the prompt is empty" in refused.stderr


def test_generate_and_export(calibrated: Path, llama: Path, tmp_path: Path) -> None:
    made = as_json(run("generate", calibrated, "a text", "--new", 5, "--json"))
    assert made["text"].startswith("a text")
    assert as_json(run("export-dense", calibrated, "-o", tmp_path / "dense", "--json")) == {
        "folder": str(tmp_path / "dense")
    }
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    ids = torch.randint(4, 300, (1, 16))
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in (tmp_path / "dense", llama))
    assert torch.equal(a, b)


def test_plain_transformers_calls_load_it(calibrated: Path) -> None:
    ids = torch.randint(4, 300, (1, 16))
    with torch.no_grad():
        expected = wina_calib.load(calibrated)(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(calibrated)(ids).logits, expected)
    made = pipeline("text-generation", str(calibrated), tokenizer=AutoTokenizer.from_pretrained(calibrated))
    assert made("a text", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("a text")


@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make demo` runs: a table, a few lines of text, and last the commands to go on with, which work."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # an existing folder is replaced
        done = run("demo", "--samples", 17, "--seq-len", 512)
        assert done.exit_code == 0, done.stderr
    found = done.stdout
    assert re.search(r"^perplexity +\d+\.\d{3} +\d+\.\d{3} +\+\d", found, flags=re.M)
    written, _, after = found.partition("The sparse model writes:")[2].partition(" Next:\n")
    assert all(f"  {prompt}" in written for prompt in PROMPTS)
    *commands, own = [line.partition("#")[0].strip() for line in after.splitlines()]
    assert own == "wina-calib calibrate MODEL -o DIR --sparsity 0.5"
    assert len(commands) == 3
    for command in commands:
        assert run(*shlex.split(command)[1:]).exit_code == 0, command


def test_demo_goes_on_with_its_own_run_and_drops_another(monkeypatch: pytest.MonkeyPatch) -> None:
    restarts = []

    def calibrate(*_: Any, restart: bool, **options: Any) -> None:
        restarts.append(restart)
        raise KeyboardInterrupt("Stopped; kept.") if restart else StateError("another run's")

    monkeypatch.setattr("wina_calib.calibration.run.calibrate", calibrate)
    done = run("demo")
    assert (done.exit_code, done.stderr, restarts) == (130, "Stopped; kept.\n", [False, True])


def test_long_numbers_are_cut_and_empty_headers_left_out() -> None:
    assert (fixed(32.9584), fixed(47_188_087_028.9)) == ("32.958", "4.72e+10")
    assert (rise(1.123, 1.0), rise(4.7e10, 32.9)) == ("+12.3 %", "+1.43e+11 %")
    assert table(["", ""], [["a", "b"]]) == "a  b"
    assert table(["", "x"], [["a", "b"]]) == "   x\n-  -\na  b"


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["calibrate", "demo", "-o", "OUT", "--sparsity", "150%"], 2, "sparsity is 1.5"),
        (["calibrate", "demo", "-o", "OUT", "--sparsity", "x"], 2, "x"),
        (["calibrate", "demo"], 2, "--output"),
        (["calibrate", "demo", "-o", "OUT", "--score", "wine"], 2, "wine"),
        (["calibrate", "demo", "-o", "OUT", "--data", "nowhere.txt"], 2, "nowhere.txt"),
        (["calibrate", "demo", "-o", "OUT", "--device", "warp"], 2, "warp"),
        (["calibrate", "/no/such/folder", "-o", "OUT"], 1, "is not a folder"),
        (["evaluate", "/no/such/folder"], 1, "is not a folder"),
        (
            ["evaluate", "no-such-folder"],
            1,
            "Error: there is no folder no-such-folder here. As a Hub id, no-such-folder: HF_HUB",
        ),
        (["list"], 1, "HF_HUB_OFFLINE is set. Unset it and run the same command again."),
        (["info", "me/sparse"], 1, "HF_HUB_OFFLINE is set. Unset it and run the same command again."),
        (["info", "DENSE"], 2, "`wina-calib inspect"),
        (["inspect", "DENSE"], 1, "not calibrated"),
        (["inspect", "demo"], 1, "Error: demo is not calibrated. Run `wina-calib calibrate demo -o NEW_FOLDER` first."),
        (["evaluate", "DENSE"], 1, "not calibrated"),
        (["generate", "DENSE", "x"], 1, "not calibrated"),
        (["no-such-command"], 2, "No such command"),
    ],
)
def test_errors_are_one_message_with_a_code(args: list[str], code: int, said: str, llama: Path, tmp_path: Path) -> None:
    result = run(*[{"OUT": tmp_path / "out", "DENSE": llama}.get(a, a) for a in args])
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    done = CliRunner().invoke(main, ["calibrate", "demo", "-o", "out"])
    assert (done.exit_code, done.stderr) == (
        1,
        "Error: the folder that this was started in is gone. Go to another one.\n",
    )
