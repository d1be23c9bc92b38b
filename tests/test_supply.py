"""What is installed is pinned, and nothing is contacted that the user did not name."""

import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import script
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
WATCH = """
import sys
calls = []
def hook(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "urllib.Request"):
        calls.append(f"{event} {args!r:.200}")
sys.addaudithook(hook)
"""


def test_importing_everything_opens_no_socket() -> None:
    found = script.run_json(
        WATCH
        + """
import importlib, json, pkgutil
import wina_calib
for module in pkgutil.walk_packages(wina_calib.__path__, "wina_calib."):
    if not module.name.endswith(("__main__", ".triton", "serving.vllm_config")) and "kernels" not in module.name:
        importlib.import_module(module.name)
print(json.dumps({"calls": calls, "modules": len([m for m in sys.modules if m.startswith("wina_calib")])}))
""",
        env={"HF_HUB_OFFLINE": "0"},
    )
    assert found["calls"] == []
    assert found["modules"] > 60


def test_a_local_calibration_and_load_contact_nobody(llama: Path, text: Path, tmp_path: Path) -> None:
    """No telemetry either, though the Hub would be reachable: offline mode is not set."""
    found = script.run_json(
        WATCH
        + """
import json
import torch, wina_calib
model, data, out = sys.argv[1:]
wina_calib.calibrate(model, out, data=data, samples=64, seq_len=128, budget="uniform", grid=(0.5,), sparsity=0.5)
wina_calib.load(out)(torch.tensor([[1, 5, 6]]))
print(json.dumps(calls))
""",
        llama,
        text,
        tmp_path / "s",
        env={"HF_HUB_OFFLINE": "0"},
    )
    assert found == []


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


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
