"""Names of folders that are no UTF-8 are refused in one sentence before any work, wherever they are given."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import wina_calib
from wina_calib.cli import main
from wina_calib.errors import UsageError

BYTES = os.fsdecode(b"caf\xe9")


def test_a_model_or_an_output_of_such_a_name(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(llama, tmp_path / BYTES)
    for arguments in (
        (tmp_path / BYTES, tmp_path / "out"),
        (llama, tmp_path / BYTES / "out"),
        (llama, tmp_path / f"{BYTES}2"),
    ):
        with pytest.raises(UsageError, match=r"caf\\xe9.* holds bytes that are no UTF-8 text\. Rename it\."):
            wina_calib.calibrate(*arguments)
    (tmp_path / f"{BYTES}here").mkdir()
    monkeypatch.chdir(tmp_path / f"{BYTES}here")
    with pytest.raises(UsageError, match="no UTF-8"):
        wina_calib.calibrate(llama, "out")


def test_files_of_such_a_name(tmp_path: Path, calibrated: Path):
    done = CliRunner().invoke(main, ["budget", str(calibrated), "-o", str(tmp_path / f"{BYTES}.yaml")])
    assert done.exit_code == 2
    assert "no UTF-8" in done.stderr


def test_the_name_is_printed_as_its_bytes(tmp_path: Path):
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(place)).mkdir()
    run = subprocess.run([sys.executable, "-m", "wina_calib", "inspect", place], capture_output=True, env=os.environ)
    assert run.returncode == 2
    assert b"caf\\xe9 holds bytes" in run.stderr
