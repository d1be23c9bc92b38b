"""`inspect` and `list`: what fits a screen, every figure where it is asked for, one line where nobody answers."""

import json
from pathlib import Path

import pytest
import script
from click.testing import CliRunner, Result

from wina_calib.cli import main


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_what_it_says_fits_a_screen(calibrated: Path) -> None:
    shown = run("inspect", calibrated).stdout
    assert len(shown.splitlines()) <= 24
    assert max(map(len, shown.splitlines())) <= 120
    facts = json.loads(run("inspect", calibrated, "--json").stdout)
    for name in {site["site"] for site in facts["sites"]}:
        own = [site["sparsity"] for site in facts["sites"] if site["site"] == name]
        (line,) = [line for line in shown.splitlines() if line.startswith(name)]
        assert f"{100 * sum(own) / len(own):.1f} %" in line
        assert f"{100 * min(own):.1f} % in layer" in line and f"{100 * max(own):.1f} % in layer" in line
    assert "of that site's output alone" in shown and "expected rise of perplexity" in shown


def test_full_lists_every_site(calibrated: Path) -> None:
    facts = json.loads(run("inspect", calibrated, "--json").stdout)
    shown = run("inspect", calibrated, "--full").stdout
    for site in facts["sites"]:
        (threshold,) = site["thresholds"].values()
        assert any(line.split() == [str(site["layer"]), site["site"], f"{site['sparsity']:.3f}", f"{threshold:.4g}"]
                   for line in shown.splitlines())  # fmt: skip


def test_without_a_network_one_line_is_said_soon() -> None:
    code = """
    import time
    from click.testing import CliRunner
    from wina_calib.cli import main
    for args in (["list"], ["list", "me"], ["info", "me/x"]):
        start = time.monotonic()
        done = CliRunner().invoke(main, args)
        assert time.monotonic() - start < 10
        print(done.exit_code, done.output, end="")
    """
    done = script.run(code, env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"})
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 3
    for line in done.stdout.splitlines():
        assert line.startswith("1 Error: ") and "did not answer. Check the network" in line


@pytest.mark.parametrize("command", ["calibrate", "recover"])
def test_help_shows_no_empty_default(command: str) -> None:
    done = CliRunner().invoke(main, [command, "--help"])
    assert done.exit_code == 0 and 'default: ""' not in done.stdout
