"""The program starts at once: help and mistakes wait for no library, and Ctrl-C is one line from the first moment."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import script

import wina_calib
from wina_calib.cli import COMMANDS

PROGRAM = """
import sys
sys.argv[0] = "/somewhere/bin/wina-calib"
from wina_calib.__main__ import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "numpy", "pandas", "pyarrow", "datasets", "huggingface_hub", "matplotlib"}
    print("loaded:", *sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def started(*args: str) -> tuple[int, str, float]:
    """Exit code, what was printed, and seconds of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = script.run(PROGRAM, *args)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout + done.stderr, took


@pytest.mark.parametrize("args", [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)])
def test_help_waits_for_no_library(args: list[str]) -> None:
    code, said, took = started(*args)
    assert code == (0 if args else 2)
    assert said.endswith("loaded:\n")
    assert took < 1.0, f"{took:.2f} s of processor time"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["calibrat"], "Did you mean 'calibrate'?"),
        (["calibrate", "demo"], "Missing option '-o'"),
        (["calibrate", "demo", "-o", "out", "--sparsity", "150%"], "sparsity is 1.5"),
        (["calibrate", "demo", "-o", "out", "--data", "hub:"], "hub:"),
        (["compare", "demo", "-o", "out", "--methods", "tael"], "Did you mean 'teal'?"),
        (["generate", "out", "hello", "--raw", "--system", "be brief"], "--raw uses no chat template"),
        (["evaluate", "out", "--tasks", "arc_easy", "--save"], "does not go with --tasks"),
        (["bench", "--kernel-only"], "give a model"),
        (["bounds"], "Give a model folder"),
        (["budget", "out", "--refit"], "--refit belongs to --apply"),
        (["transfer", "a", "b", "-s", "0.5,0.6", "-o", "budget.yaml"], "one sparsity"),
    ],
)
def test_mistakes_in_options_wait_for_no_library(args: list[str], said: str) -> None:
    code, printed, took = started(*args)
    assert code == 2
    assert said in printed
    assert printed.endswith("loaded:\n")
    assert took < 1.0, f"{took:.2f} s of processor time"


def test_the_program_registers_the_format_when_libraries_are_loaded() -> None:
    code = """
    import sys
    sys.argv[0] = "wina-calib"
    import wina_calib
    from wina_calib.commands.logs import load_libraries
    assert "torch" not in sys.modules
    load_libraries()
    from transformers import AutoConfig
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    print("wina" in AUTO_QUANTIZER_MAPPING, AutoConfig.for_model("wina_calib-llama").model_type)
    """
    assert script.run(code).stdout.split() == ["True", "wina_calib-llama"]


def test_a_plain_import_has_all_public_names() -> None:
    assert [name for name in wina_calib.__all__ if not hasattr(wina_calib, name)] == []
    assert {"calibrate", "load", "set_sparsity", "evaluate", "push_to_hub"} <= set(wina_calib.__all__)


def test_as_a_module_it_starts_as_quickly() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "wina_calib", "calibrate", "--help"],
        capture_output=True, text=True, env=script.environment(), cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--sparsity" in done.stdout
    assert "click" in done.stderr and "torch" not in done.stderr


def test_interrupted_while_the_command_line_itself_is_imported(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = script.run(PROGRAM, "calibrate", "--help", env={"PYTHONPATH": path})
    assert done.returncode == 130
    assert done.stderr.splitlines()[0] == "Interrupted; nothing was left behind."
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_libraries_are_imported(sent: signal.Signals, tmp_path: Path) -> None:
    done = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "calibrate", "demo", "-o", str(tmp_path / "out")],
        stderr=subprocess.PIPE, text=True, env=script.environment(), cwd=Path(__file__).parent,
    )  # fmt: skip
    maps = Path(f"/proc/{done.pid}/maps")
    while done.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.01)
    done.send_signal(sent)
    _, said = done.communicate(timeout=60)
    assert (done.returncode, said) == (130, "Interrupted; nothing was left behind.\n")
    assert list(tmp_path.iterdir()) == []
