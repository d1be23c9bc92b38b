"""The README's and the documentation's examples run, and the CLI reference is what the command line says."""

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from wina_calib.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


@pytest.mark.parametrize("name", ["make_cli", "make_code_map"])
def test_pages_made_from_the_code_are_current(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    maker = importlib.import_module(name)
    assert maker.page() == maker.PAGE.read_text("utf-8"), "run `make docs`"


def test_the_readme_shows_the_rooms_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_code_map

    folders = {p.parent.name for p in (ROOT / "wina_calib").glob("*/__init__.py")}
    assert set(make_code_map.rooms()) == folders
    assert f"wina_calib/\n{make_code_map.tree()}\n" in README


def test_examples_of_the_python_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    names: dict = {}
    for example in blocks(page, "python"):
        if (
            "push_to_hub" not in example and "recover(" not in example
        ):  # tests/docs/test_hub.py and the next test run these
            small = example.replace(
                "samples=48", "samples=12, quick=True, grid=(0.5,), transform='none', budget='uniform'"
            )
            exec(small.replace("samples=17", "samples=17, tokens=2048"), names)
    assert names["set_to"] == pytest.approx(0.6, abs=1e-6)
    assert names["quality"].sparsity == 0.4
    assert [row.method for row in names["found"].rows] == ["teal-uniform", "wina"]
    public = set(names["wina_calib"].__all__) - {
        "__version__",
        "Comparison",
        "Evaluation",
        "Recovery",
        "Result",
        "Verdict",
    }
    assert [name for name in sorted(public) if f"wina_calib.{name}" not in page] == []


@pytest.mark.slow
def test_the_example_of_recovery_runs(demo_sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wina_calib

    monkeypatch.chdir(tmp_path)
    Path("demo-sparse").symlink_to(demo_sparse)
    (example,) = [e for e in blocks((ROOT / "docs" / "python.md").read_text("utf-8"), "python") if "recover(" in e]
    small = example.replace("samples=48", "samples=17, grid=(0.25,)")
    names: dict = {"wina_calib": wina_calib}
    exec(small.replace("tokens=200_000", "tokens=1024, seq_len=128, batch=4"), names)
    assert names["recovered"].folder.is_dir() and names["small"].folder.is_dir()


def test_performance_is_a_page_and_its_notes_are_another() -> None:
    assert len((ROOT / "docs" / "performance.md").read_text("utf-8").splitlines()) < 120


def test_the_glossary_has_the_words_of_the_command_line() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    terms = {term.strip() for row in re.findall(r"^\| ([^|]+) \|", glossary, flags=re.M) for term in row.split(",")}
    words = ["site", "cell", "anchor", "budget", "score", "threshold", "model sparsity", "read fraction", "transform"]
    assert not set(words) - terms


def test_files_named_in_the_pages_for_contributors_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8") + (ROOT / "docs" / "code-map.md").read_text("utf-8")
    paths = set(re.findall(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|c|h|cu|js|css|html))`", text))
    assert len(paths) > 150
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "wina_calib" / path).exists(), path


def test_readme_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(README, "python")
    assert len([line for line in example.splitlines() if line.strip()]) == 3
    small = example.replace(
        "sparsity=0.5)", "sparsity=0.5, samples=12, quick=True, seq_len=512, grid=(0.5,), transform='none')"
    )
    assert small != example
    names: dict = {}
    exec(small, names)
    import wina_calib

    assert wina_calib.set_sparsity(names["model"], 0.6) == pytest.approx(0.6, abs=1e-6)
    small = {
        "calibrate": shlex.split("--quick --samples 12 --seq-len 512 --grid 0.5 --transform none --budget uniform"),
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


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"\$ make (\w+)", README):
        assert f"\n{target}:" in makefile
