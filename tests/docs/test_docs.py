"""The README's and the documentation's examples run, and the CLI reference is what the command line says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from wina_calib.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_cli_reference_is_current() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "make_cli.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(README, "python")
    assert len([line for line in example.splitlines() if line.strip()]) == 3
    small = example.replace("sparsity=0.5)", "sparsity=0.5, samples=24, seq_len=512, grid=(0.5,))")
    assert small != example
    names: dict = {}
    exec(small, names)
    import wina_calib

    assert wina_calib.set_sparsity(names["model"], 0.6) == pytest.approx(0.6, abs=1e-6)
    small = {
        "calibrate": [
            "--samples",
            "17",
            "--seq-len",
            "512",
            "--grid",
            "0.5",
            "--transform",
            "none",
            "--budget",
            "uniform",
        ],
        "evaluate": ["--tokens", "2048"],
        "generate": ["--new", "5"],
    }
    commands = re.findall(r"^\$ wina-calib (.*)$", README, flags=re.M)
    assert len(commands) == 3
    for command in commands:
        args = [{"DIR": "made", "MODEL": "demo"}.get(word, word) for word in shlex.split(command)]
        result = CliRunner().invoke(main, [*args, *small[args[0]]])
        assert result.exit_code == 0, result.output


def test_commands_named_in_the_docs_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"wina-calib ([a-z][a-z-]+)\b", page.read_text("utf-8")):
            assert name in COMMANDS, f"{page.name}: wina-calib {name}"


def test_examples_parse() -> None:
    """Commands of all pages, the help's examples too, have options and values that are there."""
    found = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"^Usage: .*$", "", page.read_text("utf-8"), flags=re.M)
        found += re.findall(r"(?:^ {4}|^\$ |`(?:\w+=\S+ )*)wina-calib ([a-z-]+ [^`\n]*)", text, flags=re.M)
    assert len(found) > 80
    for line in found:
        name, *args = shlex.split(line.partition("  #")[0])
        command = main.get_command(click.Context(main), name)
        assert command is not None, line
        try:
            command.make_context(name, args)
        except click.MissingParameter:  # a command's name with some of its options, within a sentence
            assert f"`wina-calib {line}`" in "".join(p.read_text("utf-8") for p in (ROOT / "docs").glob("*.md")), line


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"\$ make (\w+)", README):
        assert f"\n{target}:" in makefile
