"""What is installed is pinned, and nothing is contacted that the user did not name."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import script
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
WATCH = """
import sys
calls = []
def hook(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "urllib.Request"):
        calls.append(f"{event} {args!r:.200}")
sys.addaudithook(hook)
"""


def test_importing_everything_calibrating_and_loading_contact_nobody(llama: Path, text: Path, tmp_path: Path) -> None:
    """No telemetry either, though the Hub would be reachable: offline mode is not set."""
    found = script.run_json(
        WATCH
        + """
import importlib, json, pkgutil
import wina_calib
for module in pkgutil.walk_packages(wina_calib.__path__, "wina_calib."):
    needing_more = ("__main__", ".triton", ".gptq_card", "serving.vllm_config", "serving.vllm_layers")
    if not module.name.endswith(needing_more) and "kernels" not in module.name:
        importlib.import_module(module.name)
modules = len([m for m in sys.modules if m.startswith("wina_calib")])
import torch
model, data, out = sys.argv[1:]
wina_calib.calibrate(model, out, data=data, samples=64, seq_len=128, budget="uniform", grid=(0.5,), sparsity=0.5)
wina_calib.load(out)(torch.tensor([[1, 5, 6]]))
print(json.dumps({"calls": calls, "modules": modules}))
""",
        llama,
        text,
        tmp_path / "s",
        env={"HF_HUB_OFFLINE": "0"},
    )
    assert found["calls"] == []
    assert found["modules"] > 60


def test_everything_installed_for_it_is_pinned() -> None:
    """constraints.txt is a lock: every package that wina_calib brings along is in it with one version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {_canonical(name): pin for name, pin in pins.items()}
    assert all(re.fullmatch(r"[\w.]+", pin) for pin in pinned.values())
    seen: set[tuple[str, str]] = set()
    todo = [("wina-calib", ""), ("wina-calib", "dev"), ("wina-calib", "plots")]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            installed = version(name)
        except PackageNotFoundError:  # a dependency of another platform
            continue
        if name != "wina-calib":
            assert name in pinned, f"{name} {installed} is not in constraints.txt"
            assert pinned[name] == installed.partition("+")[0], name
        for text in requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(_canonical(needed.name), e) for e in ("", *needed.extras)]
    assert len(seen) > 30


def test_ranges_of_direct_dependencies_are_what_was_tested() -> None:
    """A plain install gets the releases that constraints.txt pins, or later corrections of them; the oldest are pinned too."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {_canonical(n): Version(v) for n, v in (line.split("==") for line in lines if not line.startswith("#"))}
    old = (line.removeprefix("# oldest: ").split("==") for line in lines if line.startswith("# oldest: "))
    oldest = {_canonical(name): Version(pin) for name, pin in old}
    oldest["torch"] = Version("2.11.0")  # what the GPU machines have
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        needed = Requirement(text)
        pin = pins[_canonical(needed.name)]
        following = f"{pin.major}.{pin.minor + 1}"
        assert needed.specifier.contains(pin), text
        assert not needed.specifier.contains(following), f"{text}: {following} was not tested"
        (lowest,) = (Version(spec.version) for spec in needed.specifier if spec.operator == ">=")
        first = oldest.get(_canonical(needed.name), pin)
        assert first.release[: len(lowest.release)] == lowest.release, f"{text}: the oldest that is tested is {first}"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
