"""Write docs/code-map.md from what every file says of itself. With `--check` it fails where the page is out of date."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from wina_calib.cli import COMMANDS

PAGE = Path(__file__).parent / "code-map.md"
PACKAGE = Path(__file__).parent.parent / "wina_calib"
# From the ground up: a room imports what stands before it. `lint-imports` keeps it so.
ROOMS = (
    "common", "storage", "corpus", "model", "transforms", "budgets", "masks", "quantization", "checkpoint", "runtime",
    "calibration", "recovery", "serving", "studies", "commands",
)  # fmt: skip
PARTS = {
    "page.html": "The budget page's markup.",
    "page.css": "How the budget page looks.",
    "page.js": "What the budget page does in a browser.",
    "solver.js": "`solve.py` once more, operation by operation, for the budget page.",
}
INTRODUCTION = """# Code map

Made by `python docs/make_code_map.py` from the first sentence of every file. Rooms stand from the ground up: a room imports what
stands above it on this page and never what stands below, which import-linter checks (`make lint`). Tests lie in `tests` under the
names of rooms and files; programs that measure lie in `benchmarks`.

Where is it decided, written, fitted, chosen, read?

| what | where |
| --- | --- |
| a mask: which inputs are kept | `masks/mask.py` |
| a file is written, whole or not at all | `common/atomic.py` |
| a threshold is fitted | `calibration/fit_thresholds.py`, a layer at a time in `fit_layer.py` |
| a kernel is chosen | `runtime/kernels/dispatch.py` |
| a model folder is read | `model/folder.py`, its tensors `model/source.py`; what a name leads to: `model/locate.py` |
| an option of `calibrate` | `calibration/options.py` |
| the checkpoint's tensors and files | `checkpoint/format.py`, specified in [format.md](format.md) |
"""


def rooms() -> dict[str, str]:
    """Each room and what it is for."""
    return {name: says(PACKAGE / name / "__init__.py") for name in ROOMS if (PACKAGE / name).is_dir()}


def tree() -> str:
    """Rooms with a line each, as the README shows them."""
    return "\n".join(
        f"  {name + '/':<15} {about.split('; every module')[0].rstrip('.')}" for name, about in rooms().items()
    )


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Outside of rooms\n", *lines(sorted(PACKAGE.glob("*.py"))), ""]
    for name, about in rooms().items():
        parts += [f"## {name}\n", f"{about}\n", *lines(files(PACKAGE / name)), ""]
    return "\n".join(parts).rstrip() + "\n"


def files(folder: Path) -> Iterator[Path]:
    """The files of a room, its own before those of its folders."""
    kept = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".pyc")
    yield from sorted(
        (p for p in kept if p != folder / "__init__.py"), key=lambda p: (len(p.relative_to(folder).parts), p)
    )


def lines(paths: Iterator[Path] | list[Path]) -> list[str]:
    """A line for each file."""
    return [f"- `{path.relative_to(PACKAGE)}`: {says(path)}" for path in paths]


def says(path: Path) -> str:
    """The first sentence of a file about itself."""
    if path.name in PARTS:
        return PARTS[path.name]
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    else:
        text = path.read_text("utf-8").removeprefix("/*").partition("*/")[0]
    first = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[\w)`'\]])\. (?=[A-Z`])", first)[0].rstrip(".")
    if (path.parent.name, text[:1]) == ("commands", "`"):
        sentence = f"{sentence}: {COMMANDS[path.stem.replace('_', '-')][:-1]}"
    return f"{sentence}."


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text("utf-8") == page() else f"{PAGE} is out of date: run `make docs`")
    PAGE.write_text(page(), "utf-8")
