"""The plugin's entry point."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from wina_calib.serving import plugin

ROOT = Path(__file__).parents[2]


def test_the_entry_point_is_there_and_the_extra_names_what_was_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["wina"].partition(":")
    assert getattr(import_module(module), name) is plugin.register
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={plugin.TESTED[0]},<0.{int(plugin.TESTED[-1][2:]) + 1}"]


@pytest.mark.parametrize("version", ["0.31.0", "0.32", "0.32.0", "0.32.1", "0.32.0+cpu"])
def test_a_tested_version_is_served_with(version: str) -> None:
    assert plugin.refusal(version) is None


@pytest.mark.parametrize("version", ["0.30.2", "0.33.0", "0.320.0", "1.0", "dev"])
def test_another_version_is_refused(version: str) -> None:
    assert plugin.refusal(version) == (
        f"vLLM {version} was not tested with this wina_calib. Install vLLM 0.31 or 0.32, or a wina_calib that names {version}."
    )


def test_importing_the_package_imports_nothing_of_vllm() -> None:
    code = "import sys, wina_calib, wina_calib.serving.plugin, wina_calib.serving.product; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
