"""Text of a YAML or JSON file as nested dictionaries of strings, refusing everything a budget has no use for.

Scalars stay text: YAML would read an unquoted `+0.1` as 0.1 and `1e-3` as a string, and the sign matters here.
"""

import json
from typing import NoReturn

import yaml

from wina_calib.budgets.patterns import shown
from wina_calib.errors import BudgetError

MAX_BYTES = 1_000_000
MAX_DEPTH = 4

Node = str | dict[str, "Node"] | list["Node"]

# The C parser is some ten times faster; without it the pure one does the same.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_document(data: bytes, kind: str) -> dict[str, Node]:
    """Parse a file's bytes.

    Args:
        data: the whole file, UTF-8.
        kind: `yaml` or `json`.

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
    tree: list[Node] = []  # the first document's root
    stack: list[dict[str, Node] | list[Node]] = []
    keys: list[str | None] = []  # for each open collection, the key that waits for its value

    def put(value: Node, line: int) -> None:
        if not stack:
            tree.append(value)
            return
        parent, key = stack[-1], keys[-1]
        if isinstance(parent, list):
            parent.append(value)
        elif key is not None:
            parent[key] = value
            keys[-1] = None
        elif not isinstance(value, str):
            raise BudgetError(f"line {line}: a key must be plain text")
        elif value in parent:
            raise BudgetError(f"line {line}: the key {shown(value)} stands twice, keep one")
        else:
            keys[-1] = value

    try:
        for event in yaml.parse(text, Loader=_LOADER):
            line = event.start_mark.line + 1 if event.start_mark else 0
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise BudgetError(f"line {line}: anchors and aliases are not accepted, write the value out")
            if getattr(event, "tag", None) is not None:
                raise BudgetError(f"line {line}: tags are not accepted, write the plain value")
            if isinstance(event, yaml.DocumentStartEvent) and tree:
                raise BudgetError(f"line {line}: a second document starts, a budget is one")
            if isinstance(event, yaml.ScalarEvent):
                put(event.value, line)
            elif isinstance(event, yaml.CollectionStartEvent):
                if len(stack) >= MAX_DEPTH:
                    raise BudgetError(f"line {line}: nested more than {MAX_DEPTH} deep")
                child: dict[str, Node] | list[Node] = {} if isinstance(event, yaml.MappingStartEvent) else []
                put(child, line)
                stack.append(child)
                keys.append(None)
            elif isinstance(event, yaml.CollectionEndEvent):
                stack.pop()
                keys.pop()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise BudgetError(f"the budget is not valid YAML{where}: {shown(str(problem))}") from None
    if not tree:
        raise BudgetError("the budget is empty")
    return tree[0]


def _parse_json(text: str) -> Node:
    def refuse(constant: str) -> NoReturn:
        raise BudgetError(f"{constant} is not a finite number")

    def pairs(items: list[tuple[str, Node]]) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for key, value in items:
            if key in found:
                raise BudgetError(f"the key {shown(key)} stands twice, keep one")
            found[key] = value
        return found

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
