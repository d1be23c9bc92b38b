"""Pushing to a Hub and loading from it, over real HTTP; every client is a process of its own."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import script
from hub_server import Hub

SECRET, STRANGER = "hf_aSecretThatNobodyMaySee", "hf_aStranger"
PUSH = "import sys; from wina_calib.cli import main; main(['push', *sys.argv[1:]])"
LOAD = """
import json, os, sys, torch, wina_calib
options = json.loads(sys.argv[2])
model = wina_calib.load(sys.argv[1], **options)
with torch.no_grad():
    logits = model(torch.arange(4, 28).view(2, 12)).logits
print(json.dumps({"sum": logits.double().sum().item(), "name": model.name_or_path}))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({SECRET: "me", STRANGER: "someone"}) as running:
        yield running


@pytest.fixture
def folder(calibrated: Path, tmp_path: Path) -> Path:
    """A checkpoint that a push may write its card into."""
    return Path(shutil.copytree(calibrated, tmp_path / "sparse"))


@pytest.fixture
def push(hub: Hub, tmp_path: Path) -> Callable[..., Any]:
    """Push with the command line; the JSON that it prints."""

    def run(folder: Path, repo: str, *flags: str, token: str = SECRET) -> Any:
        done = script.run(PUSH, folder, repo, "--json", *flags, env=hub.environment(tmp_path / "home", token=token))
        assert SECRET not in done.stdout + done.stderr
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return run


@pytest.fixture
def load(hub: Hub, tmp_path: Path) -> Callable[..., Any]:
    """Load with wina_calib.load; the logits' sum and the model's name."""

    def run(repo: str, *, offline: bool = False, token: str = SECRET, home: str = "home", **options: Any) -> Any:
        env = hub.environment(tmp_path / home, token=token, offline=offline)
        return script.run_json(LOAD, repo, json.dumps(options), env=env)

    return run


def local_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_push_load_push_again_and_offline(
    hub: Hub, folder: Path, push: Callable[..., Any], load: Callable[..., Any]
) -> None:
    weights = hashlib.sha256((folder / "wina.safetensors").read_bytes()).hexdigest()
    first = push(folder, "me/sparse")
    assert first["changed"]
    assert first["url"] == f"{hub.url}/me/sparse"
    stored = hub.files("me/sparse")
    assert {name: stored[name] for name in local_files(folder)} == local_files(folder)
    assert hashlib.sha256(stored["wina.safetensors"]).hexdigest() == weights
    assert b'wina_calib.load("me/sparse")' in stored["README.md"]

    uploads = hub.count("large_put"), hub.count("commit")
    again = push(folder, "me/sparse")
    assert not again["changed"]
    assert again["commit"] == first["commit"]
    assert (hub.count("large_put"), hub.count("commit")) == uploads

    online = load("me/sparse")
    assert online["name"] == "me/sparse"
    assert online == load("me/sparse", revision=first["commit"])
    requests = len(hub.requests)
    assert load("me/sparse", offline=True) == online
    assert load("me/sparse", local_files_only=True) == online
    assert len(hub.requests) == requests
    assert load(str(folder))["sum"] == online["sum"]


def test_revisions_are_pinned_and_stale_files_go(
    hub: Hub, folder: Path, push: Callable[..., Any], load: Callable[..., Any]
) -> None:
    first = push(folder, "me/sparse")
    before = load("me/sparse")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["prefill"] = "dense"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "notes.txt").write_text("kept")
    hub.repos["me/sparse"].at(None).files["model.safetensors"] = (
        hub.repos["me/sparse"].at(None).files["wina.safetensors"]
    )
    second = push(folder, "me/sparse", "--message", "dense prompts")
    assert second["commit"] != first["commit"]
    commit = hub.repos["me/sparse"].at(None)
    assert commit.message == "dense prompts"
    assert "model.safetensors" not in commit.files  # transformers would read it in place of the index
    assert commit.files["notes.txt"].data == b"kept"
    assert load("me/sparse")["sum"] != before["sum"]
    assert load("me/sparse", revision=first["commit"]) == before


def test_branches_and_pull_requests(hub: Hub, folder: Path, push: Callable[..., Any]) -> None:
    assert push(folder, "me/sparse", "--revision", "v1")["url"] == f"{hub.url}/me/sparse/tree/v1"
    assert "wina.safetensors" in hub.files("me/sparse", "v1")
    assert "wina.safetensors" not in hub.files("me/sparse")
    assert push(folder, "me/sparse", "--create-pr")["url"] == f"{hub.url}/me/sparse/discussions/1"
    assert "wina.safetensors" in hub.files("me/sparse", "refs/pr/1")
    assert "wina.safetensors" not in hub.files("me/sparse")


def test_a_private_repository_keeps_strangers_out(
    hub: Hub, folder: Path, tmp_path: Path, push: Callable[..., Any]
) -> None:
    push(folder, "me/hidden", "--private")
    assert hub.repos["me/hidden"].private
    said = {}
    for name, token in {"stranger": STRANGER, "nobody": None, "wrong": "hf_madeUp"}.items():
        env = hub.environment(tmp_path / name, token=token)
        done = script.run("import sys, wina_calib; wina_calib.load(sys.argv[1])", "me/hidden", env=env)
        assert done.returncode == 1
        said[name] = done.stderr.splitlines()[-1]
        assert said[name].startswith("wina_calib.errors.HubError: me/hidden: ")
        assert "hf auth login" in said[name]
        assert token is None or token not in done.stderr
    assert "no such repository, or it is private" in said["stranger"]
    assert "refused the token" in said["wrong"]


@pytest.mark.parametrize(
    ("token", "repo", "expected"),
    [
        ("hf_madeUp", "me/sparse", "refused the token"),
        (STRANGER, "me/sparse", "refused the token"),
        (None, "me/sparse", "refused the token, or there is none"),
        (SECRET, "not a name", "no repository name"),
    ],
)
def test_a_refused_push_says_why_in_one_line(
    hub: Hub, folder: Path, tmp_path: Path, token: str | None, repo: str, expected: str
) -> None:
    done = script.run(PUSH, folder, repo, env=hub.environment(tmp_path / "home", token=token))
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {repo}: ")
    assert expected in line
    assert token is None or token not in line
    assert hub.repos == {}


def test_a_damaged_checkpoint_is_not_uploaded(hub: Hub, folder: Path, tmp_path: Path) -> None:
    weights = next(folder.glob("model-*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = script.run(PUSH, folder, "me/sparse", env=hub.environment(tmp_path / "home", token=SECRET))
    assert done.returncode == 1
    assert "weights are not those that the calibration was made for" in done.stderr
    assert hub.requests == []


def test_without_a_network_it_says_so(folder: Path, tmp_path: Path) -> None:
    with Hub({SECRET: "me"}) as stopped:
        env = stopped.environment(tmp_path / "home", token=SECRET)
    done = script.run(PUSH, folder, "me/sparse", env=env)
    assert done.returncode == 1
    assert "did not answer. Check the network" in done.stderr.splitlines()[-1]
    done = script.run("import wina_calib; wina_calib.load('me/sparse')", env=env | {"HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE is set" in done.stderr.splitlines()[-1]


def test_an_interrupted_push_goes_on_where_it_stopped(
    hub: Hub, folder: Path, tmp_path: Path, push: Callable[..., Any], load: Callable[..., Any]
) -> None:
    big = next(folder.glob("model-*.safetensors")).read_bytes()
    hub.hold_large = lambda body: body == big
    command = [sys.executable, "-c", PUSH, str(folder), "me/sparse"]
    env = script.environment(hub.environment(tmp_path / "home", token=SECRET))
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert hub.held.wait(script.TIMEOUT)
        small = (folder / "wina.safetensors").read_bytes()
        assert hub.wait_for(lambda: small in hub.large.values())
        process.kill()
    hub.hold_large = None
    hub.release.set()
    assert big not in hub.large.values()
    assert "wina.safetensors" not in hub.files("me/sparse")  # nothing is half there
    before = hub.count("large_put")
    assert push(folder, "me/sparse")["changed"]
    assert hub.count("large_put") == before + 1
    assert hub.files("me/sparse")["wina.safetensors"] == small
    assert load("me/sparse")["name"] == "me/sparse"


def test_pushes_at_the_same_time_leave_one_whole_checkpoint(hub: Hub, folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["prefill"] = "dense"
    (other / "config.json").write_text(json.dumps(config))
    (other / "only-here.txt").write_text("other")
    env = script.environment(hub.environment(tmp_path / "home", token=SECRET))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PUSH, str(source), "me/sparse"], env=env, stdout=subprocess.PIPE, text=True
        )
        for source in (folder, folder, other)
    ]
    said = [process.communicate(timeout=script.TIMEOUT)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert all(f"{hub.url}/me/sparse" in text for text in said)
    stored = hub.files("me/sparse")
    assert stored["only-here.txt"] == b"other"
    assert stored["wina.safetensors"] == (folder / "wina.safetensors").read_bytes()
    assert stored["config.json"] in {(source / "config.json").read_bytes() for source in (folder, other)}
