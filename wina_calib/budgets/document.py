"""Text of a YAML or JSON file as nested dictionaries of strings, refusing everything a budget has no use for.

Scalars stay text: YAML would read an unquoted `+0.1` as 0.1 and `1e-3` as a string, and the sign matters here.
"""

import json
from typing import NoReturn

from wina_calib.budgets.patterns import shown
from wina_calib.common.plain_yaml import Node, PlainYamlError, parse_plain_yaml
from wina_calib.errors import BudgetError

MAX_BYTES = 1_000_000
MAX_DEPTH = 4
MAX_VALUES = MAX_BYTES  # no bound of its own: a value takes a byte


def parse_document(data: bytes, kind: str) -> dict[str, Node]:
    """Parse a file's bytes.

    Returns:
        The top-level mapping; every scalar is the text that stands in the file.

    Raises:
        BudgetError: too large or deep, not UTF-8, does not parse, has duplicate keys, aliases, tags or several
            documents, or its top level is no mapping.
    """
    if len(data) > MAX_BYTES:
        raise BudgetError(f"the budget is larger than {MAX_BYTES} bytes: one line for each cell is enough")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BudgetError(f"the budget is not UTF-8 text (byte {error.start})") from None
    tree = _parse_json(text) if kind == "json" else _parse_yaml(text)
    if not isinstance(tree, dict):
        raise BudgetError("the budget must be a mapping with the keys format, model, sparsity and cells")
    return tree


def _parse_yaml(text: str) -> Node:
    try:
        tree = parse_plain_yaml(text, max_depth=MAX_DEPTH, max_values=MAX_VALUES)
    except PlainYamlError as error:
        raise BudgetError(str(error) if error.line else f"the budget is {error}") from None
    if tree is None:
        raise BudgetError("the budget is empty")
    return tree


def _parse_json(text: str) -> Node:
    def refuse(constant: str) -> NoReturn:
        raise BudgetError(f"{constant} is not a finite number")

    def pairs(items: list[tuple[str, Node]]) -> dict[str, Node]:
        values: dict[str, Node] = {}
        for key, value in items:
            if key in values:
                raise BudgetError(f"the key {shown(key)} stands twice, keep one")
            values[key] = value
        return values

    try:
        tree = json.loads(text, parse_int=str, parse_float=str, parse_constant=refuse, object_pairs_hook=pairs)
    except RecursionError:
        raise BudgetError(f"nested more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise BudgetError(f"the budget is not valid JSON at line {error.lineno}: {error.msg}") from None
    return _as_text(tree, 0)


def _as_text(value: object, depth: int) -> Node:
    if depth > MAX_DEPTH:
        raise BudgetError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        return {key: _as_text(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item, depth + 1) for item in value]
    return value if isinstance(value, str) else json.dumps(value)
