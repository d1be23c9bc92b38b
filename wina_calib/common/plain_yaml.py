"""YAML of others as nested text: no anchors, aliases, merges, tags or second documents, and bounds on depth and size.

Scalars stay text: YAML would read an unquoted `+0.1` as 0.1 and `1e-3` as a string, a number of 5,000 digits or the 31st of
February as an error. Nothing grows: what comes out is never larger than what was read.
"""

from __future__ import annotations

import yaml

Node = str | dict[str, "Node"] | list["Node"]

# The C parser is some ten times faster; without it the pure one does the same.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class PlainYamlError(ValueError):
    """Text that is no such YAML; `line` is where, or 0."""

    def __init__(self, problem: str, line: int = 0) -> None:
        super().__init__(f"line {line}: {problem}" if line else problem)
        self.line = line


def parse_plain_yaml(text: str, *, max_depth: int, max_values: int) -> Node | None:
    """Parse one document.

    Collections may be `max_depth` deep, with `max_values` keys and values in all.

    Returns:
        Its root; None where there is no document.

    Raises:
        PlainYamlError: it is no YAML, or has more than a plain document needs.
    """
    tree: list[Node] = []  # the first document's root
    stack: list[dict[str, Node] | list[Node]] = []
    keys: list[str | None] = []  # for each open collection, the key that waits for its value
    values = 0

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
            raise PlainYamlError("a key must be plain text", line)
        elif value in parent:
            raise PlainYamlError(f"the key {_shown(value)} stands twice, keep one", line)
        else:
            keys[-1] = value

    try:
        for event in yaml.parse(text, Loader=_LOADER):
            line = event.start_mark.line + 1 if event.start_mark else 0
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise PlainYamlError("anchors and aliases are not accepted, write the value out", line)
            if getattr(event, "tag", None) is not None:
                raise PlainYamlError("tags are not accepted, write the plain value", line)
            if isinstance(event, yaml.DocumentStartEvent) and tree:
                raise PlainYamlError("a second document starts, only one is read", line)
            if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
                values += 1
                if values > max_values:
                    raise PlainYamlError(f"more than {max_values} keys and values", line)
            if isinstance(event, yaml.ScalarEvent):
                put(event.value, line)
            elif isinstance(event, yaml.CollectionStartEvent):
                if len(stack) >= max_depth:
                    raise PlainYamlError(f"nested more than {max_depth} deep", line)
                child: dict[str, Node] | list[Node] = {} if isinstance(event, yaml.MappingStartEvent) else []
                put(child, line)
                stack.append(child)
                keys.append(None)
            elif isinstance(event, yaml.CollectionEndEvent):
                stack.pop()
                keys.pop()
    except PlainYamlError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise PlainYamlError(f"not valid YAML{where}: {_shown(str(problem))}") from None
    return tree[0] if tree else None


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")
