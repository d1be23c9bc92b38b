"""Coverage-guided fuzzing with atheris, on demand: `pip install atheris; python tests/fuzz_atheris.py budget -runs=100000`.

Targets: checkpoint, index, budget, spec, text, settings. Arguments after the target go to libFuzzer. Only our errors may come
out, within five seconds and 500 MB.
"""

import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["wina_calib.shards", "wina_calib.budgets", "wina_calib.textfiles"]):
    from wina_calib.budgets import parse_budget
    from wina_calib.corpus import check_spec, documents
    from wina_calib.errors import WinaError
    from wina_calib.settings import Settings
    from wina_calib.shards import Shards

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


def checkpoint(data: bytes) -> None:
    """One safetensors file, its tensors read."""
    (FOLDER / "model.safetensors").write_bytes(data)
    shards = Shards.open(FOLDER)
    for name in shards:
        shards.load(name)


def index(data: bytes) -> None:
    """The index of a sharded checkpoint."""
    (FOLDER / "model.safetensors.index.json").write_bytes(data)
    Shards.open(FOLDER)


def budget(data: bytes) -> None:
    """A budget file; the first byte chooses its kind."""
    parse_budget(data[1:], "json" if data[:1] < b"\x80" else "yaml")


def spec(data: bytes) -> None:
    """A data spec."""
    check_spec(data.decode("utf-8", "replace"))


def text(data: bytes) -> None:
    """A text file; the first byte chooses its kind."""
    file = FOLDER / ("a.jsonl" if data[:1] < b"\x80" else "a.txt")
    file.write_bytes(data[1:])
    for document in documents(str(file)):
        document.encode("utf-8")


def settings(data: bytes) -> None:
    """The settings of a calibrated checkpoint."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(raw, dict):
        Settings.from_dict({"format_version": "1.0", "sparsity": 0.5, "anchors": [0.5]} | raw)


TARGETS = {f.__name__: f for f in (checkpoint, index, budget, spec, text, settings)}


def main() -> None:
    """Fuzz the target that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"give a target: {', '.join(TARGETS)}")
    target = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        with suppress(WinaError):
            target(data)

    atheris.Setup([*sys.argv, "-timeout=5", "-rss_limit_mb=1500", "-malloc_limit_mb=500"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
