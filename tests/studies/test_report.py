"""The report: figures and one page that needs nothing else."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from browser import BROWSER, FLAGS, needs_browser
from click.testing import CliRunner

import wina_calib
from wina_calib.calibration.scale_curves import stored_curves
from wina_calib.checkpoint.evaluation_file import save_evaluation
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.cli import main
from wina_calib.common import plots
from wina_calib.errors import OutputError, UsageError
from wina_calib.studies.evaluate import evaluate
from wina_calib.studies.report import predicted_rise, write_report

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def curved(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with predicted loss curves, and with an evaluation."""
    folder = tmp_path_factory.mktemp("curved") / "sparse"
    wina_calib.calibrate(
        llama,
        folder,
        transform="none",
        budget="global",
        data=str(text),
        samples=80,
        seq_len=128,
        sparsity=0.5,
        grid=(0.25, 0.5, 0.65),
    )
    save_evaluation(folder, evaluate(folder, data=str(text), tokens=1024).to_dict())
    return folder


def test_page_and_pictures(curved: Path, tmp_path: Path) -> None:
    page = write_report(curved, tmp_path / "report")
    files = {path.name for path in page.parent.iterdir()}
    assert files == {
        "index.html",
        "budget.png",
        "frontier.png",
        "error.png",
        *(f"scores-{i:03d}.png" for i in range(3)),
    }
    assert all((page.parent / name).read_bytes().startswith(b"\x89PNG") for name in files - {"index.html"})
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 6
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "<script" not in text
    assert "default-src 'none'" in text


@needs_browser
def test_a_browser_shows_the_pictures(curved: Path, tmp_path: Path) -> None:
    """Within the page's own content policy; without its leave for pictures none is seen."""
    page = write_report(curved, tmp_path / "report")
    text = page.read_text()
    assert text.count("img-src data:; ") == 1
    (tmp_path / "bare.html").write_text(text.replace("img-src data:; ", ""))
    assert coloured(page, tmp_path) > 20_000
    assert coloured(tmp_path / "bare.html", tmp_path) < 2_000


def coloured(page: Path, folder: Path) -> int:
    """How many pixels of the page in a browser are neither black, grey nor white."""
    from matplotlib.image import imread

    assert BROWSER is not None
    shot = folder / f"{page.stem}.png"
    flags = [flag for flag in FLAGS if not flag.startswith(("--window", "--remote"))]
    subprocess.run(
        [
            BROWSER,
            *flags,
            f"--user-data-dir={folder}/profile",
            "--window-size=1280,4000",
            f"--screenshot={shot}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = imread(shot)[..., :3]
    return int(np.count_nonzero(pixels.max(-1) - pixels.min(-1) > 0.15))


def test_the_same_checkpoint_gives_the_same_bytes(curved: Path, tmp_path: Path) -> None:
    first, second = (write_report(curved, tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_without_curves_and_evaluation_there_is_no_frontier(calibrated: Path, tmp_path: Path) -> None:
    assert stored_curves(open_checkpoint(calibrated)) is None
    write_report(calibrated, tmp_path / "report")
    assert not (tmp_path / "report" / "frontier.png").exists()


def test_predicted_rise_grows_with_sparsity(curved: Path) -> None:
    opened = open_checkpoint(curved)
    rises = [predicted_rise(opened, stored_curves(opened), sparsity) for sparsity in (0.0, 0.25, 0.5, 0.65)]
    assert rises[0] == 0.0
    assert rises == sorted(rises)
    assert rises[-1] > 0


def test_text_of_a_checkpoint_does_not_become_markup(calibrated: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(calibrated, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["provenance"]["base_model"] = "<img src=x onerror=alert(1)>"
    (folder / "config.json").write_text(json.dumps(config))
    assert "<img src=x" not in write_report(folder, tmp_path / "report").read_text()


def test_no_local_folder_is_told(calibrated: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    page = write_report(calibrated, tmp_path / "report").read_text()
    assert text.name in page
    assert str(text.parent) not in page
    assert str(llama.parent) not in page


def test_a_budget_chosen_later_is_told(calibrated: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(calibrated, tmp_path / "copy"))
    assert "budget chosen later" not in write_report(folder, tmp_path / "before").read_text()
    done = CliRunner().invoke(main, ["budget", str(folder), "--sparsity", "0.4", "--apply", str(folder)])
    assert done.exit_code == 0, done.output
    page = write_report(folder, tmp_path / "after").read_text()
    assert re.search(r"budget chosen later</th><td>\w+ for 40\S*&nbsp;%, thresholds from stored tables<", page)


def test_an_existing_folder_is_kept(calibrated: Path, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    with pytest.raises(OutputError, match="exists"):
        write_report(calibrated, tmp_path / "report")
    write_report(calibrated, tmp_path / "report", overwrite=True)


def test_without_matplotlib_it_says_what_to_install(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    with pytest.raises(UsageError, match=r"pip install 'wina-calib\[plots\]'"):
        write_report(calibrated, tmp_path / "report")


def test_command(calibrated: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["report", str(calibrated), "-o", str(tmp_path / "report"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told.keys() == {"page", "answers"}
    assert told["page"] == str(tmp_path / "report" / "index.html")
    assert len(told["answers"]) == 3


def test_evaluate_saves_where_asked(calibrated: Path, text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(calibrated, tmp_path / "copy"))
    arguments = ["evaluate", str(folder), "--data", str(text), "--tokens", "512", "--json"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert not (folder / "wina_evaluation.json").exists()
    assert CliRunner().invoke(main, [*arguments, "--save"]).exit_code == 0
    assert json.loads((folder / "wina_evaluation.json").read_text())["tokens"] > 0
