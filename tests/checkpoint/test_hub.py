"""Pushing to a Hub and loading from it, over real HTTP; every client is a process of its own."""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import script
import yaml
from hub_server import Hub
from hub_store import File, Repo

import wina_calib
from wina_calib.errors import HubError, UsageError

SECRET, STRANGER = "hf_aSecretThatNobodyMaySee", "hf_aStranger"
PUSH = "import sys; from wina_calib.cli import main; main(['push', *sys.argv[1:]])"
CLI = "import sys; from wina_calib.cli import main; main(sys.argv[1:])"
LOAD = """
import json, os, sys, torch, wina_calib
options = json.loads(sys.argv[2])
model = wina_calib.load(sys.argv[1], **options)
with torch.no_grad():
    logits = model(torch.arange(4, 28).view(2, 12)).logits
print(json.dumps({"sum": logits.double().sum().item(), "name": model.name_or_path}))
"""


NOT_HERE = 'wina_calib.load("me/never-fetched")'


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub({SECRET: "me", STRANGER: "someone"}) as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the client keeps its cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[script.Worker]:
    """A client of the hub."""
    worker = script.Worker(hub.environment(home, token=SECRET))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def offline(hub: Hub, home: Path) -> Iterator[script.Worker]:
    """The client with HF_HUB_OFFLINE, which is read when huggingface_hub is imported."""
    worker = script.Worker(hub.environment(home, offline=True))
    yield worker
    worker.close()


@pytest.fixture
def folder(calibrated: Path, tmp_path: Path) -> Path:
    """A checkpoint that a push may write its card into."""
    return Path(shutil.copytree(calibrated, tmp_path / "sparse"))


@pytest.fixture
def push(client: script.Worker) -> Callable[..., Any]:
    """Push with the command line; the JSON that it prints."""

    def run(folder: Path, repo: str, *flags: str) -> Any:
        done = client.run(PUSH, folder, repo, "--json", *flags)
        assert done.returncode == 0, done.stderr[-2000:]
        assert SECRET not in done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def load(client: script.Worker) -> Callable[..., Any]:
    """Load with wina_calib.load; the logits' sum and the model's name."""

    def run(repo: str, **options: Any) -> Any:
        done = client.run(LOAD, repo, json.dumps(options))
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def local_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_push_load_push_again_and_offline(
    hub: Hub,
    home: Path,
    folder: Path,
    client: script.Worker,
    offline: script.Worker,
    push: Callable[..., Any],
    load: Callable[..., Any],
) -> None:
    weights = hashlib.sha256((folder / "wina.safetensors").read_bytes()).hexdigest()
    first = push(folder, "me/first")
    assert first["changed"]
    assert first["url"] == f"{hub.url}/me/first"
    stored = hub.files("me/first")
    assert {name: stored[name] for name in local_files(folder)} == local_files(folder)
    assert hashlib.sha256(stored["wina.safetensors"]).hexdigest() == weights
    assert b'wina_calib.load("me/first")' in stored["README.md"]

    uploads = hub.count("large_put"), hub.count("commit")
    again = push(folder, "me/first")
    assert not again["changed"]
    assert again["commit"] == first["commit"]
    assert (hub.count("large_put"), hub.count("commit")) == uploads

    online = load("me/first")
    assert online["name"] == "me/first"
    assert online == load("me/first", revision=first["commit"])
    kept = client.run(CLI, "evaluate", "me/first", "--save")
    assert kept.returncode == 2
    assert "give a local one" in kept.stderr  # the cache is the Hub's, and no place to write
    requests = len(hub.requests)
    assert load("me/first", local_files_only=True) == online
    done = offline.run(LOAD + NOT_HERE, "me/first", "{}")
    assert done.returncode == 1
    assert json.loads(done.stdout) == online
    assert "HF_HUB_OFFLINE is set" in done.stderr.splitlines()[-1]
    assert len(hub.requests) == requests
    assert load(str(folder))["sum"] == online["sum"]


BASE_CARD = "---\nlicense: mit\nlanguage:\n- en\n- de\n---\nA model.\n"


def test_the_base_model_is_named_by_who_knows_it(
    hub: Hub, folder: Path, client: script.Worker, push: Callable[..., Any]
) -> None:
    code = """
    import sys, huggingface_hub
    huggingface_hub.create_repo("me/BASE")
    huggingface_hub.upload_file(repo_id="me/BASE", path_in_repo="README.md", path_or_fileobj=sys.argv[1].encode())
    """
    assert client.run(code, BASE_CARD).returncode == 0
    (folder / "wina_evaluation.json").unlink(missing_ok=True)
    quiet = client.run(PUSH, folder, "me/nameless")
    assert "--base-model USER/NAME names it" in quiet.stderr and "base_model" not in card(hub, "me/nameless")
    push(folder, "me/named", "--base-model", "me/BASE")
    found = card(hub, "me/named")
    assert found["base_model"] == "me/BASE" and found["base_model_relation"] == "quantized"
    assert (found["license"], found["language"]) == ("mit", ["en", "de"])
    assert b"[me/BASE](https://huggingface.co/me/BASE) with calibrated" in hub.files("me/named")["README.md"]
    again = client.run(PUSH, folder, "me/named")  # which is known from now on
    assert "--base-model" not in again.stderr and card(hub, "me/named") == found
    for odd in ("BASE", "no/such/name", "me/BA SE"):
        refused = client.run(PUSH, folder, "me/named", "--base-model", odd)
        assert refused.returncode == 2 and "expected the id of a model on the Hub" in refused.stderr
    push(
        folder, "me/elsewhere", "--base-model", "nobody/knows-it"
    )  # a name that the Hub does not know is written all the same
    assert card(hub, "me/elsewhere")["base_model"] == "nobody/knows-it"


def card(hub: Hub, repo: str) -> Any:
    """The metadata of a repository's card."""
    return yaml.safe_load(hub.files(repo)["README.md"].decode().split("---\n")[1])


def test_how_much_goes_up_is_told(folder: Path, client: script.Worker) -> None:
    code = """
    import sys, wina_calib
    from wina_calib.common.progress import Silent
    class Hears(Silent):
        def planned(self, estimate):
            self.left = [part.name.split()[0] for part in estimate.parts]
        def phase(self, name, steps):
            print(*self.left, "|", name)
    wina_calib.push_to_hub(sys.argv[1], "me/told", progress=Hears())
    """
    size = sum(map(len, local_files(folder).values()))
    lines = [line.split(" | ") for line in client.run(code, folder).stdout.splitlines()]
    assert [plan for plan, _ in lines] == ["verify upload", "upload"]  # whose time is not guessed from what came before
    verify, upload = (name for _, name in lines)
    assert verify == "verify" and re.fullmatch(r"upload [\d.]+ [kMG]B", upload)
    assert float(upload.split()[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[upload[-2]] == pytest.approx(size, rel=0.5)


def test_revisions_are_pinned_and_stale_files_go(
    hub: Hub, home: Path, folder: Path, push: Callable[..., Any], load: Callable[..., Any]
) -> None:
    first = push(folder, "me/pinned")
    before = load("me/pinned")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["prefill"] = "dense"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "notes.txt").write_text("kept")
    (folder / "modeling_own.py").write_text("# a model's own code comes along\n")
    hub.repos["me/pinned"].at(None).files["model.safetensors"] = (
        hub.repos["me/pinned"].at(None).files["wina.safetensors"]
    )
    second = push(folder, "me/pinned", "--message", "dense prompts")
    assert second["commit"] != first["commit"]
    commit = hub.repos["me/pinned"].at(None)
    assert commit.message == "dense prompts"
    assert "model.safetensors" not in commit.files  # transformers would read it in place of the index
    assert commit.files["notes.txt"].data == b"kept"
    assert load("me/pinned")["sum"] != before["sum"]
    assert list(home.rglob("modeling_own.py"))
    assert load("me/pinned", revision=first["commit"]) == before


def test_a_folder_inside_a_repository(hub: Hub, folder: Path, client: script.Worker, load: Callable[..., Any]) -> None:
    upload = """
        import sys, huggingface_hub
        huggingface_hub.create_repo("me/nested")
        huggingface_hub.upload_folder(repo_id="me/nested", folder_path=sys.argv[1], path_in_repo="inner/sparse")
    """
    assert client.run(upload, folder).returncode == 0
    assert load("me/nested", subfolder="inner/sparse")["sum"] == load(str(folder))["sum"]
    done = client.run(LOAD, "me/nested", json.dumps({"subfolder": "elsewhere"}))
    assert "me/nested has no folder 'elsewhere'" in done.stderr.splitlines()[-1]


def test_branches_and_pull_requests(hub: Hub, folder: Path, push: Callable[..., Any], load: Callable[..., Any]) -> None:
    assert push(folder, "me/branches", "--revision", "v1")["url"] == f"{hub.url}/me/branches/tree/v1"
    assert "wina.safetensors" in hub.files("me/branches", "v1")
    assert "wina.safetensors" not in hub.files("me/branches")
    assert load("me/branches", revision="v1")["sum"] == load(str(folder))["sum"]
    assert push(folder, "me/branches", "--create-pr")["url"] == f"{hub.url}/me/branches/discussions/1"
    assert "wina.safetensors" in hub.files("me/branches", "refs/pr/1")
    assert "wina.safetensors" not in hub.files("me/branches")


def test_a_private_repository_keeps_strangers_out(
    hub: Hub, folder: Path, client: script.Worker, push: Callable[..., Any]
) -> None:
    push(folder, "me/hidden", "--private")
    assert hub.repos["me/hidden"].private
    said = {}
    for name, token in {"stranger": STRANGER, "nobody": "", "wrong": "hf_madeUp"}.items():
        done = client.run(LOAD, "me/hidden", "{}", env={"HF_TOKEN": token})
        assert done.returncode == 1
        said[name] = done.stderr.splitlines()[-1]
        assert said[name].startswith("wina_calib.errors.HubError: me/hidden: ")
        assert "hf auth login" in said[name]
        assert not token or token not in done.stderr
    assert "no such repository, or it is private" in said["stranger"]
    assert "refused the token" in said["wrong"]
    given = client.run(LOAD, "me/hidden", json.dumps({"token": SECRET}), env={"HF_TOKEN": ""})
    assert given.returncode == 0, given.stderr[-2000:]
    assert SECRET not in given.stdout + given.stderr


@pytest.mark.parametrize(
    ("token", "repo", "expected"),
    [
        ("hf_madeUp", "me/refused", "refused the token"),
        (STRANGER, "me/refused", "refused the token"),
        ("", "me/refused", "refused the token, or there is none"),
        (SECRET, "me/not a name", "no repository name"),
    ],
)
def test_a_refused_push_says_why_in_one_line(
    hub: Hub, folder: Path, client: script.Worker, token: str, repo: str, expected: str
) -> None:
    done = client.run(PUSH, folder, repo, env={"HF_TOKEN": token})
    assert done.returncode == 1
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"Error: {repo}: ")
    assert expected in line
    assert not token or token not in line
    assert repo not in hub.repos


def test_a_damaged_checkpoint_is_not_uploaded(hub: Hub, folder: Path, client: script.Worker) -> None:
    weights = next(folder.glob("model-*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    requests = len(hub.requests)
    done = client.run(PUSH, folder, "me/damaged")
    assert done.returncode == 1
    assert "weights are not those that the calibration was made for" in done.stderr
    assert len(hub.requests) == requests


def test_without_a_network_it_says_so(hub: Hub, folder: Path, client: script.Worker) -> None:
    with hub.away():
        for command, said in {
            (
                PUSH,
                folder,
                "me/away",
            ): f"{hub.url} did not answer, and nothing was sent. Check the network and run the same",
            (CLI, "list"): f"{hub.url} did not answer. Check the network and run the same command again.",
            (CLI, "info", "me/away"): f"{hub.url} did not answer. Check the network and run the same command again.",
            (
                LOAD,
                "me/away",
                "{}",
            ): f"not all of it is in the cache, and {hub.url} did not answer. Check the network, or",
        }.items():
            done = client.run(*command)
            assert done.returncode == 1
            assert said in done.stderr.splitlines()[-1]


def test_a_push_that_cannot_be_meant_or_done_here(folder: Path) -> None:
    before = local_files(folder)
    for repo in ("sparse", "/sparse", "sparse/"):
        with pytest.raises(UsageError, match="expected USER/REPO, such as USER/sparse"):
            wina_calib.push_to_hub(folder, repo)
    assert local_files(folder) == before
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and nothing was sent. Unset it and run"):
        wina_calib.push_to_hub(folder, "me/sparse")


def test_a_download_that_breaks_off_goes_on_where_it_was(
    hub: Hub, offline: script.Worker, folder: Path, push: Callable[..., Any], load: Callable[..., Any]
) -> None:
    push(folder, "me/interrupts")
    hub.drops = 2
    try:
        loaded = load("me/interrupts")
    finally:
        hub.drops = 0
    assert sum(name.startswith("broken ") for _, name in hub.requests) == 2
    assert loaded == json.loads(offline.run(LOAD, "me/interrupts", "{}").stdout)


@pytest.mark.slow
def test_a_network_that_stays_broken_is_named_and_leaves_nothing_half_read(
    hub: Hub, tmp_path: Path, folder: Path, push: Callable[..., Any]
) -> None:
    push(folder, "me/gone")
    env = hub.environment(tmp_path / "home", token=SECRET)
    hub.drops = 10_000
    try:
        done = script.run(LOAD, "me/gone", "{}", env=env)
    finally:
        hub.drops = 0
    assert done.returncode == 1
    assert "HubError: me/gone: " in done.stderr.splitlines()[-1]
    assert "Check the network" in done.stderr.splitlines()[-1]
    assert script.run(LOAD, "me/gone", "{}", env=hub.environment(tmp_path / "home", offline=True)).returncode == 1
    assert script.run_json(LOAD, "me/gone", "{}", env=env)["name"] == "me/gone"


def test_an_interrupted_push_goes_on_where_it_stopped(
    hub: Hub, folder: Path, client: script.Worker, push: Callable[..., Any], load: Callable[..., Any]
) -> None:
    big = next(folder.glob("model-*.safetensors")).read_bytes()
    hub.large.clear()  # what other tests sent
    hub.hold_large = lambda body: body == big
    job = client.start(PUSH, folder, "me/interrupted")
    assert hub.held.wait(script.TIMEOUT)
    others = {path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".png")} - {big}
    assert hub.wait_for(lambda: others == set(hub.large.values()))
    job.kill()
    hub.hold_large = None
    hub.release.set()
    assert big not in hub.large.values()
    assert "wina.safetensors" not in hub.files("me/interrupted")  # nothing is half there
    before = hub.count("large_put")
    assert push(folder, "me/interrupted")["changed"]
    assert hub.count("large_put") == before + 1
    stored = hub.files("me/interrupted")
    assert all(stored[path.name] == path.read_bytes() for path in folder.glob("*.safetensors"))
    assert load("me/interrupted")["name"] == "me/interrupted"


def test_pushes_at_the_same_time_leave_one_whole_checkpoint(
    hub: Hub, folder: Path, client: script.Worker, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["prefill"] = "dense"
    (other / "config.json").write_text(json.dumps(config))
    (other / "only-here.txt").write_text("other")
    commits = hub.count("commit")
    hub.together = threading.Barrier(2, timeout=60)
    running = [client.start(PUSH, source, "me/together") for source in (folder, other)]
    done = [job.wait() for job in running]
    assert hub.count("commit") == commits + 3  # both on the same parent, and the later one again
    assert [one.returncode for one in done] == [0, 0]
    assert all(f"{hub.url}/me/together" in one.stdout for one in done)
    stored = hub.files("me/together")
    assert stored["only-here.txt"] == b"other"
    assert stored["wina.safetensors"] == (folder / "wina.safetensors").read_bytes()
    assert stored["config.json"] in {(source / "config.json").read_bytes() for source in (folder, other)}


def test_list_and_info_without_a_download(
    hub: Hub, folder: Path, client: script.Worker, push: Callable[..., Any]
) -> None:
    done = push(folder, "me/listed", "--base-model", "me/base")
    listed = client.run(CLI, "list", "me", "--json")
    found = {row["repo"]: row for row in json.loads(listed.stdout)["checkpoints"]}
    assert found["me/listed"]["downloads"] == 7
    assert json.loads(client.run(CLI, "list", "nobody", "--json").stdout) == {"checkpoints": []}
    for name, tag in {"someone/sparse": "wina", "someone/dense": "other"}.items():
        hub.repos[name] = Repo("someone", private=False)
        hub.commit(name, "main", {"README.md": File(f"---\ntags: [{tag}]\n---\n".encode(), False)}, "first")
    everywhere = {row["repo"] for row in json.loads(client.run(CLI, "list", "--json").stdout)["checkpoints"]}
    assert everywhere >= {"me/listed", "someone/sparse"} and "someone/dense" not in everywhere
    assert "someone/sparse" not in found

    start = len(hub.requests)
    facts = json.loads(client.run(CLI, "info", "me/listed", "--json").stdout)
    assert facts["commit"] == done["commit"]
    assert facts["parameters"] == {"F32": sum(p.numel() for p in wina_calib.load(folder).parameters())}
    assert facts["settings"]["sparsity"] == 0.5
    assert facts["base_model"] == "me/base"  # which the user named; the calibration knew a folder's name only
    moved = sum(
        int(name.rpartition(" ")[2])
        for method, name in hub.requests[start:]
        if name.startswith("bytes ") and method == "GET"
    )
    assert moved < 250_000 < facts["bytes"]
    assert "me/listed at" in client.run(CLI, "info", "me/listed").stdout
    hub.commit("me/listed", "main", {}, "emptied")
    assert "is not calibrated" in client.run(CLI, "info", "me/listed").stderr


def test_a_checkpoint_by_reference_takes_its_weights_from_the_hub(
    hub: Hub,
    client: script.Worker,
    llama: Path,
    text: Path,
    tmp_path: Path,
    push: Callable[..., Any],
    load: Callable[..., Any],
) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    card = "---\nlicense: other\nlicense_name: made-up\nlicense_link: LICENSE.md\nlanguage:\n- en\n---\n# base\n"
    (base / "README.md").write_text(card)
    upload = """
        import sys, huggingface_hub
        huggingface_hub.create_repo("me/base")
        huggingface_hub.upload_folder(repo_id="me/base", folder_path=sys.argv[1])
    """
    assert client.run(upload, base).returncode == 0
    commit = hub.repos["me/base"].at(None).sha
    calibrate = """
        import sys, wina_calib
        options = {"data": sys.argv[1], "samples": 80, "seq_len": 128, "budget": "uniform", "grid": [0.5]}
        wina_calib.calibrate("me/base", sys.argv[2], weights="reference", **options)
        wina_calib.calibrate("me/base", sys.argv[3], transform="none", **options)
    """
    done = client.run(calibrate, text, tmp_path / "reference", tmp_path / "whole")
    assert done.returncode == 0, done.stderr[-2000:]
    push(tmp_path / "reference", "me/reference")
    stored = hub.files("me/reference")
    assert sum(map(len, stored.values())) < 200_000
    assert json.loads(stored["wina_config.json"])["base_commit"] == commit
    metadata = yaml.safe_load(stored["README.md"].decode().split("---")[1])
    assert metadata["base_model"] == "me/base"
    assert metadata["base_model_relation"] == "quantized"
    assert metadata["library_name"] == "wina-calib"  # the Hub's example for transformers would find no config.json
    assert (metadata["license"], metadata["license_name"], metadata["language"]) == ("other", "made-up", ["en"])
    assert metadata["license_link"] == f"https://huggingface.co/me/base/blob/{commit}/LICENSE.md"
    assert load("me/reference")["sum"] == load(str(tmp_path / "whole"))["sum"]
    facts = json.loads(client.run(CLI, "info", "me/reference", "--json").stdout)
    assert facts["weights_by_reference"] and facts["parameters"] == {}


@pytest.mark.parametrize("name", ["../../../../evil.json", "sub/../../evil.json", "/tmp/evil.json", "..\\evil.json"])
def test_names_that_leave_the_folder_are_one_line(
    name: str, hub: Hub, home: Path, client: script.Worker, calibrated: Path, tmp_path: Path
) -> None:
    repo = f"me/leaves-{hashlib.sha1(name.encode()).hexdigest()[:8]}"
    hub.repos[repo] = Repo("me", False)
    files = {file: File((calibrated / file).read_bytes(), False) for file in ("config.json", "wina.safetensors")}
    hub.commit(repo, "main", files | {name: File(b"{}", False)}, "made by hand")
    for arguments in (["calibrate", repo, "-o", tmp_path / "out"], ["inspect", repo, "--no-weights"]):
        done = client.run(CLI, *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(f"Error: {repo}: what the Hub has of it cannot be used (")
        assert len(done.stderr.splitlines()) == 1
    assert not list(home.parent.rglob("evil.json"))
    assert client.run(CLI, "info", repo).returncode == 0


@pytest.mark.parametrize("under", ["", "inner/"])
def test_hidden_files_of_the_hub_stay_there(under: str, hub: Hub, client: script.Worker, calibrated: Path) -> None:
    """Else a checkpoint of others would name folders of this machine as its base model and text."""
    repo = f"me/hidden{len(under)}"
    hub.repos[repo] = Repo("me", False)
    files = {path.name: File(path.read_bytes(), False) for path in calibrated.iterdir() if path.suffix != ".png"}
    files[".wina_local.json"] = File(json.dumps({"base_model": "/etc", "data": ["/etc/passwd"]}).encode(), False)
    hub.commit(repo, "main", {under + name: file for name, file in files.items()}, "made by hand")
    resolve = (
        "import sys; from wina_calib.model.locate import resolve; print(resolve(sys.argv[1], subfolder=sys.argv[2])[0])"
    )
    done = client.run(resolve, repo, under)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {path.name for path in Path(done.stdout.strip()).iterdir()}
    assert "config.json" in names
    assert not any(name.startswith(".") for name in names)


def test_a_header_that_is_none_is_one_line(hub: Hub, client: script.Worker, calibrated: Path) -> None:
    hub.repos["me/broken"] = Repo("me", False)
    files = {
        "config.json": File((calibrated / "config.json").read_bytes(), False),
        "wina.safetensors": File(b"{" * 999, False),
    }
    hub.commit("me/broken", "main", files, "made by hand")
    done = client.run(CLI, "info", "me/broken")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: me/broken: what the Hub has of it cannot be used (")


@pytest.mark.parametrize("base", ["../model", "..", "me/../model", "/etc", "model"])
def test_a_base_model_of_the_hub_is_no_folder_here(base: str, llama: Path, text: Path, tmp_path: Path) -> None:
    options = {"data": str(text), "samples": 80, "seq_len": 128, "budget": "uniform", "grid": [0.5]}
    wina_calib.calibrate(llama, tmp_path / "s", weights="reference", **options)
    path = tmp_path / "s" / "wina_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model": base, "base_commit": "a" * 40}))
    shutil.copytree(llama, tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(HubError):
        patch.chdir(tmp_path / "s")
        patch.setenv("HF_HUB_OFFLINE", "1")
        wina_calib.load(tmp_path / "s")
