"""Coverage-guided fuzzing with atheris, on demand: `pip install atheris; python tests/fuzz_atheris.py budget -runs=100000`.

Targets: checkpoint, quantized, index, budget, spec, text, settings, each from valid inputs. Arguments after the target go to
libFuzzer. Only our errors may come out, within five seconds and 500 MB.
"""

import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris
import numpy as np
import torch
from safetensors.torch import save

# Before anything else imports them: only what is imported here is followed.
PARTS = ["wina_calib.storage", "wina_calib.budgets", "wina_calib.corpus.text_files", "wina_calib.checkpoint"]
PARTS += ["wina_calib.quantization"]
with atheris.instrument_imports(include=PARTS):
    import tiny
    from budget_cases import small_cells

    import wina_calib
    from wina_calib.budgets import Budget, ModelKey, format_budget, parse_budget
    from wina_calib.budgets.file import explicit
    from wina_calib.checkpoint.dequantized import open_weights
    from wina_calib.checkpoint.reader import open_checkpoint
    from wina_calib.checkpoint.settings import Settings
    from wina_calib.corpus.sources import check_spec, documents
    from wina_calib.errors import WinaError
    from wina_calib.storage import Shards

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
INT4, WEIGHTS = FOLDER / "int4", "model-00001-of-00001.safetensors"


def checkpoint(data: bytes) -> None:
    """One safetensors file, its tensors read."""
    (FOLDER / "model.safetensors").write_bytes(data)
    shards = Shards.open(FOLDER)
    for name in shards:
        shards.load(name)


def quantized(data: bytes) -> None:
    """The weights of a checkpoint in int4, checked, and dequantized."""
    (INT4 / WEIGHTS).write_bytes(data)
    open_checkpoint(INT4)
    source = open_weights(INT4)
    for name in source.shards:
        source.shards.load(name)


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


def int4() -> bytes:
    """The weights of a tiny model in int4; the other files of its checkpoint lie in the folder."""
    tiny.save("llama", FOLDER / "llama")
    options = {"samples": 64, "seq_len": 128, "grid": (0.5,), "budget": "uniform", "transform": "none", "sparsity": 0.5}
    text_file = str(tiny.text_file(FOLDER))
    wina_calib.calibrate(FOLDER / "llama", INT4, data=text_file, bits=4, group_size=32, **options)
    return (INT4 / WEIGHTS).read_bytes()


def seeds(target: str) -> list[bytes]:
    """Valid inputs of a target, to start from; what an index names lies in the folder."""
    if target == "quantized":
        return [int4()]
    shards = {name: save({name: torch.ones(2, 3)}, {"format": "pt"}) for name in ("a", "b")}
    for name, shard in shards.items():
        (FOLDER / f"{name}.safetensors").write_bytes(shard)
    whole = {"metadata": {"total_size": 48}, "weight_map": {name: f"{name}.safetensors" for name in shards}}
    cells = small_cells(2)
    given = explicit(Budget(np.full((2, 4), 0.5)), cells, ModelKey.of("llama", 64, cells), 0.5, "wina")
    made = Settings(0.5, (0.25, 0.5), curve_levels=(0.0, 0.5), provenance={"data": ["builtin:calibration"]})
    return {
        "checkpoint": [*shards.values(), save({"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.tensor(True)})],
        "index": [json.dumps(whole).encode()],
        "budget": [b" " + format_budget(given, "json").encode(), b"\xff" + format_budget(given, "yaml").encode()],
        "spec": [b"text.txt", b"lines.jsonl", b"user/data:train:text", b"builtin:calibration"],
        "text": [b' {"text": "one"}\n{"text": "two"}\n', b"\xffone\n\ntwo\n"],
        "settings": [json.dumps(made.to_dict()).encode()],
    }[target]


TARGETS = {f.__name__: f for f in (checkpoint, quantized, index, budget, spec, text, settings)}


def main() -> None:
    """Fuzz the target that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"give a target: {', '.join(TARGETS)}")
    target = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        with suppress(WinaError):
            target(data)

    start = Path(tempfile.mkdtemp(prefix="seeds-"))
    for number, seed in enumerate(seeds(target.__name__)):
        one(seed)
        (start / str(number)).write_bytes(seed)
    atheris.Setup([*sys.argv, str(start), "-timeout=5", "-rss_limit_mb=1500", "-malloc_limit_mb=500"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
