"""The budget file: YAML or JSON, versioned, tied to a model, written to be edited by hand."""

import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wina_calib.budgets.document import MAX_BYTES, parse_document
from wina_calib.budgets.model import Budget, Cells, Floats
from wina_calib.budgets.patterns import Setting, apply_settings, parse_number, shown
from wina_calib.choices import BUDGET_FILES, SCORES
from wina_calib.common.atomic import write_file
from wina_calib.common.plain_yaml import Node
from wina_calib.errors import BudgetError

FORMAT = "wina-budget/1"

_KEYS = ("format", "model", "sparsity", "score", "cells")
_MODEL_KEYS = ("model_type", "layers", "hidden_size", "fingerprint")
_MODEL_TYPE = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_PLAIN_KEY = re.compile(r"layers\.[a-z0-9_.,*-]+")
HEADER = (
    "Sparsity budget of wina_calib. A cell is layers.LAYER.SITE; patterns work too: layers.0-3.*: 0.2,",
    'layers.*.mlp_out: "+0.1" (relative). Later lines win; a cell that no line names gets `sparsity`.',
)
_ROUNDING = 1e-6  # of the numbers in a budget file, and of what is computed of them


@dataclass(frozen=True)
class ModelKey:
    """The model a budget is made for."""

    model_type: str  # the configuration's `model_type`
    layers: int  # number of decoder layers
    hidden_size: int  # width of the residual stream
    fingerprint: str  # `Cells.fingerprint()`, the shapes of the sparse weights

    def __post_init__(self) -> None:
        if not _MODEL_TYPE.fullmatch(self.model_type):
            raise BudgetError(f"model_type {shown(self.model_type)} is no model type: letters, digits, _ . - only")
        if not re.fullmatch(r"[0-9a-f]{16}", self.fingerprint):
            raise BudgetError(f"fingerprint {shown(self.fingerprint)} is not 16 hexadecimal digits")

    @classmethod
    def of(cls, model_type: str, hidden_size: int, cells: Cells) -> "ModelKey":
        """The key of a model with these cells."""
        return cls(model_type, cells.layers, hidden_size, cells.fingerprint())


@dataclass(frozen=True)
class BudgetFile:
    """A budget file's content."""

    model: ModelKey  # what it was made for
    sparsity: float  # the model sparsity asked for; cells that no setting names get it
    score: str  # the score whose calibration it was chosen on
    settings: tuple[Setting, ...]  # its lines, in order

    def budget(self, model: ModelKey, cells: Cells) -> Budget:
        """The budget for a model.

        Raises:
            BudgetError: the file is for another model (the message says what differs), or a line cannot be applied.
        """
        differing = [
            f"{name} {getattr(self.model, name)} in the file, {getattr(model, name)} in the model"
            for name in _MODEL_KEYS
            if getattr(self.model, name) != getattr(model, name)
        ]
        if differing:
            raise BudgetError(f"the budget was made for another model: {'; '.join(differing)}")
        base = np.full(cells.weights.shape, self.sparsity)
        return Budget(apply_settings(base, self.settings, cells))


def explicit(budget: Budget, cells: Cells, model: ModelKey, sparsity: float, score: str) -> BudgetFile:
    """One line for every cell: numbers in as few digits as give the same float32, as checkpoints hold them."""
    values = [_short(value) for value in budget.sparsities.reshape(-1).tolist()]
    settings = tuple(Setting(name, value) for name, value in zip(cells.names(), values, strict=True))
    return BudgetFile(model, _short(sparsity), score, settings)


def _short(value: float) -> float:
    short = float(str(np.float32(value)))
    return short if short < 1 else value


def _number(value: float, *, sign: bool = False) -> str:
    # Positional, because YAML 1.1 reads 1e-05 as a string; shortest digits that give the same float back.
    return np.format_float_positional(value, trim="0", sign=sign)


def format_budget(content: BudgetFile, kind: str, comments: Sequence[str] = ()) -> str:
    """The file's text; `parse_budget` gives `content` back exactly.

    `kind` is `yaml` or `json`; `comments` are lines for people, left out of JSON.

    Raises:
        BudgetError: two settings have the same pattern, which a file cannot hold.
    """
    model = content.model
    patterns = [setting.pattern for setting in content.settings]
    if len(set(patterns)) != len(patterns):
        twice = next(pattern for pattern in patterns if patterns.count(pattern) > 1)
        raise BudgetError(f"{shown(twice)} is set twice, a budget file holds it once: put the two together")
    if kind == "json":
        cells = {s.pattern: _number(s.value, sign=True) if s.relative else s.value for s in content.settings}
        tree = {
            "format": FORMAT,
            "model": {name: getattr(model, name) for name in _MODEL_KEYS},
            "sparsity": content.sparsity,
            "score": content.score,
            "cells": cells,
        }
        return json.dumps(tree, indent=2) + "\n"
    lines = [f"# {line}" for text in (*HEADER, *comments) for line in text.splitlines()]
    lines += [f"format: {FORMAT}", "model:", f'  model_type: "{model.model_type}"', f"  layers: {model.layers}"]
    lines += [f"  hidden_size: {model.hidden_size}", f'  fingerprint: "{model.fingerprint}"']
    lines += [f"sparsity: {_number(content.sparsity)}", f"score: {content.score}"]
    lines.append("cells:" if content.settings else "cells: {}")
    for setting in content.settings:
        value = f'"{_number(setting.value, sign=True)}"' if setting.relative else _number(setting.value)
        key = setting.pattern if _PLAIN_KEY.fullmatch(setting.pattern) else json.dumps(setting.pattern)
        lines.append(f"  {key}: {value}")
    return "\n".join(lines) + "\n"


def _mapping(node: Node | None, where: str) -> dict[str, Node]:
    if not isinstance(node, dict):
        raise BudgetError(f"{where} must be a mapping, found {_kind(node)}")
    return node


def _text(node: Node | None, where: str) -> str:
    if not isinstance(node, str):
        raise BudgetError(f"{where} must be one value, found {_kind(node)}")
    return node


def _kind(node: Node | None) -> str:
    if node is None:
        return "nothing"
    return shown(node) if isinstance(node, str) else "a mapping" if isinstance(node, dict) else "a list"


def _check_keys(given: dict[str, Node], known: Sequence[str], where: str) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0][:60], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise BudgetError(f"unknown key {shown(unknown[0])} in {where}; {hint}")
    missing = [key for key in known if key not in given]
    if missing:
        raise BudgetError(
            f"{where} lacks {', '.join(missing)}; `wina-calib budget DIR -o FILE` writes a whole file to edit"
        )


def _count(node: Node | None, where: str) -> int:
    text = _text(node, where)
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise BudgetError(f"{where} must be a positive whole number, found {shown(text)}")
    return int(text)


def parse_budget(data: bytes, kind: str) -> BudgetFile:
    """Read a budget file's bytes.

    `kind` is `yaml` or `json`.

    Raises:
        BudgetError: anything that is not a budget of this format version.
    """
    tree = parse_document(data, kind)
    version = tree.get("format")
    if version != FORMAT:
        raise BudgetError(f"format must be {FORMAT}, found {_kind(version)}: write the budget anew with this version")
    _check_keys(tree, _KEYS, "the budget")
    model = _mapping(tree.get("model"), "model")
    _check_keys(model, _MODEL_KEYS, "model")
    key = ModelKey(
        model_type=_text(model.get("model_type"), "model.model_type"),
        layers=_count(model.get("layers"), "model.layers"),
        hidden_size=_count(model.get("hidden_size"), "model.hidden_size"),
        fingerprint=_text(model.get("fingerprint"), "model.fingerprint"),
    )
    sparsity = parse_number(_text(tree.get("sparsity"), "sparsity"))
    if not 0 <= sparsity < 1 or math.copysign(1, sparsity) < 0:
        raise BudgetError(f"sparsity must be in [0, 1), found {sparsity:g}")
    score = _text(tree.get("score"), "score")
    if score not in SCORES:
        raise BudgetError(f"score must be one of {', '.join(SCORES)}, found {shown(score)}")
    cells = _mapping(tree.get("cells"), "cells")
    settings = tuple(Setting.parse(pattern, _text(value, shown(pattern))) for pattern, value in cells.items())
    return BudgetFile(key, sparsity, score, settings)


def file_kind(path: Path) -> str:
    """`yaml` or `json`, by the extension.

    Raises:
        BudgetError: another extension.
    """
    if path.suffix.lower() not in BUDGET_FILES:
        raise BudgetError(f"{path}: a budget file ends in {', '.join(BUDGET_FILES)}")
    return BUDGET_FILES[path.suffix.lower()]


def read_budget(path: Path) -> BudgetFile:
    """Read a budget file from disk.

    Raises:
        BudgetError: as `parse_budget`, or the file cannot be read; the message starts with the path.
    """
    kind = file_kind(path)
    if not path.is_file():
        raise BudgetError(f"{path}: there is no such budget file")
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        return parse_budget(data, kind)
    except OSError as error:
        raise BudgetError(f"{path}: cannot be read: {error.strerror}") from None
    except BudgetError as error:
        raise BudgetError(f"{path}: {error}") from None


def write_budget(path: Path, content: BudgetFile, comments: Sequence[str] = ()) -> None:
    """Write a budget file; the old one stays until the new one is whole.

    Raises:
        BudgetError: the extension is unknown.
        OutputError: the file cannot be written.
    """
    write_file(path, format_budget(content, file_kind(path), comments).encode())


def file_budget(path: str, key: ModelKey, cells: Cells) -> tuple[Floats, float]:
    """Site sparsities (layers, sites) of a budget file, and their model sparsity: as the file says, up to rounding.

    Raises:
        BudgetError: the file cannot be read, or is for another model.
    """
    try:
        content = read_budget(Path(path))
        budget = content.budget(key, cells)
    except BudgetError as error:
        raise BudgetError(str(error) if str(error).startswith(path) else f"{path}: {error}") from error
    own = budget.model_sparsity(cells)
    return np.array(budget.sparsities), content.sparsity if abs(own - content.sparsity) < _ROUNDING else own
