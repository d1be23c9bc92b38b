"""The examples of docs/hub.md and of the model card, run in their order against a hub on the loopback interface."""

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import script
from hub_server import Hub

from wina_calib.choices import TRANSFORMS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hub.md").read_text("utf-8")
PYTHON = (ROOT / "docs" / "python.md").read_text("utf-8")
SECRET = "hf_aSecretThatNobodyMaySee"
CLI = "import sys; from wina_calib.cli import main; main(sys.argv[1:])"
UPLOAD = """
import sys, huggingface_hub
huggingface_hub.create_repo("me/BASE")
huggingface_hub.upload_folder(repo_id="me/BASE", folder_path=sys.argv[1])
"""
# A page for people does not name what makes the examples small.
SMALL = {
    "calibrate": ["--samples", "80", "--seq-len", "128", "--budget", "uniform", "--grid", "0.5", "--transform", "none"],
    "evaluate": ["--tokens", "512"],
    "generate": ["--new", "4"],
}
FENCE = re.compile(r"```(console|python)\n(.*?)```", re.DOTALL)


def examples(text: str) -> list[tuple[str, str]]:
    """(command or Python code, kind) in order; every line of a console block is a command."""
    found = []
    for kind, block in FENCE.findall(text):
        if kind == "python":
            found.append((block, kind))
        else:
            assert all(line.startswith("$ wina-calib ") for line in block.splitlines())
            found += [(line.removeprefix("$ wina-calib "), kind) for line in block.splitlines()]
    return found


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub({SECRET: "me"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[script.Worker]:
    worker = script.Worker(hub.environment(tmp_path_factory.mktemp("home"), token=SECRET))
    yield worker
    worker.close()


def test_examples_run_in_order(hub: Hub, client: script.Worker, llama: Path, text: Path, tmp_path: Path) -> None:
    assert client.run(UPLOAD, llama).returncode == 0
    done = []
    (push,) = [code for code, _ in examples(PYTHON) if "push_to_hub" in code]  # of the page of the Python interface
    shown = [*examples(PAGE), (f"import wina_calib\n{push}", "python")]
    for example, kind in ((example.replace("USER", "me"), kind) for example, kind in shown):
        if kind == "python":
            result = client.run(example, folder=tmp_path)
        else:
            words = shlex.split(example)
            if "--tasks" in words:
                continue  # tests/studies/test_lm_eval_tasks.py runs them, on tasks that are here
            data = ["--data", str(text)] if words[0] in ("calibrate", "evaluate") else []
            result = client.run(CLI, *words, *SMALL.get(words[0], []), *data, folder=tmp_path)
        assert result.returncode == 0, f"{example}: {result.stderr[-2000:]}"
        done.append(result)
    assert len(done) == 13
    assert {"me/demo-sparse", "me/demo-small"} <= set(hub.repos)
    assert hub.repos["me/demo-sparse"].private
    assert sum(map(len, hub.files("me/demo-small").values())) < 200_000
    assert (tmp_path / "demo-dense" / "config.json").is_file()
    assert ["no measured quality" in done[push].stderr for push in (2, 7)] == [False, True]
    listed, facts = (result.stdout for result in done[-4:-2])
    assert "me/demo-sparse" in listed and "me/demo-small" in listed
    assert "me/demo-sparse at" in facts
    card = hub.files("me/demo-sparse")["README.md"].decode()
    assert "| perplexity sparse |" in card
    assert (b"\x89PNG" in hub.files("me/demo-sparse").get("wina_budget.png", b"")) == bool(find_spec("matplotlib"))
    for name in ("me/demo-sparse", "me/demo-small"):
        for example, _ in examples(hub.files(name)["README.md"].decode()):
            result = client.run(example, folder=tmp_path)
            assert result.returncode == 0, f"{name}: {result.stderr[-2000:]}"


def test_the_page_names_every_transform() -> None:
    table = PAGE.partition("| transform |")[2]
    assert [name for name in TRANSFORMS if f"`{name}`" not in table and name != "auto"] == []
