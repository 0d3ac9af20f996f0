"""YAML request files as trees of values that know their line.

Scalars follow the core schema of YAML 1.2: `no` and `2024-01-01` are text, `1e-3` is a number.
"""

import re
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import yaml

from jobs.request_files.documents import (
    MAX_DEPTH,
    MAX_VALUES,
    DocumentTooLargeError,
    Limits,
    Node,
    Value,
    joined,
    whole_number,
)
from jobs.request_files.problems import ProblemList, show

_MAX_NODES = 2 * MAX_VALUES
"""Names count as well: a node takes half a kilobyte."""

_TAG = "tag:yaml.org,2002:"
_CORE_SCALAR = re.compile(
    r"(?P<null>~|null|Null|NULL|)"
    r"|(?P<bool>true|True|TRUE|false|False|FALSE)"
    r"|(?P<int>[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)"
    r"|(?P<float>[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))"
)

_SCALARS: dict[str, Callable[[str], Value]] = {
    "str": str,
    "null": lambda _: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": lambda text: whole_number(text, 0 if text.startswith(("0o", "0x")) else 10),
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Composes YAML nodes under the core schema; with libyaml, where it is there, ten times faster."""

    depth = 0
    num_nodes = 0

    def resolve(self, kind: type, value: str | None, implicit: tuple[bool, bool]) -> str:
        """Return the tag of a node that names none."""
        if kind is yaml.ScalarNode:
            match = _CORE_SCALAR.fullmatch(value or "") if implicit[0] else None
            return f"{_TAG}{match.lastgroup if match else 'str'}"
        return f"{_TAG}{'seq' if kind is yaml.SequenceNode else 'map'}"

    def descend_resolver(self, _node: yaml.Node | None, _index: Any) -> None:
        """Bound nodes and nesting: the composer recurses, libyaml's on the C stack, where brackets alone are fatal."""
        self.num_nodes += 1
        if self.num_nodes > _MAX_NODES:
            raise DocumentTooLargeError(f"at most {_MAX_NODES} names and values")
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:
            raise DocumentTooLargeError(f"values nested at most {MAX_DEPTH} deep")

    def ascend_resolver(self) -> None:
        """Leave a node."""
        self.depth -= 1


def read_yaml(text: str, problems: ProblemList) -> Node | None:
    """Return the one document of a YAML file, or None when it is empty or no YAML.

    Args:
        text: the file.
        problems: takes every mistake in the form of the file; the parser gives up at the first break of syntax.

    Raises:
        DocumentTooLargeError: the file is beyond the limits, with aliases followed.
    """
    tree = _YamlTree(text, problems)
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        found = ", ".join(part for part in (error.problem, error.context) if part)
        problems.add(tree.line(mark.index) if mark else None, "", "one YAML document", f"a mistake: {found}")
    except yaml.reader.ReaderError as error:
        line = tree.line(error.position)
        problems.add(line, "", "printable text", f"the character U+{error.character:04X}")
    else:
        return None if root is None else tree.build(root, tree.line(root.start_mark.index), "", 0)
    return None


class _YamlTree:
    """Turns YAML nodes into ours; notes what it cannot turn, and goes on."""

    def __init__(self, text: str, problems: ProblemList) -> None:
        # Editors end lines at \n; YAML's own line numbers also count rarer breaks inside quoted text.
        self._line_starts = [match.end() for match in re.finditer("\n", text)]
        self._problems = problems
        self._limits = Limits()
        self._around: list[yaml.Node] = []

    def line(self, index: int) -> int:
        """Return the line, counted from 1, of a character, counted from 0."""
        return bisect_right(self._line_starts, index) + 1

    def build(self, node: yaml.Node, line: int, field: str, depth: int) -> Node:
        """Return the tree below one YAML node.

        Raises:
            DocumentTooLargeError: the file is beyond the limits.
        """
        self._limits.count(depth)
        if isinstance(node, yaml.ScalarNode):
            return Node(self._scalar(node, line, field), line, field)
        if any(node is outer for outer in self._around):
            self._problems.add(line, field, "a value that does not contain itself", "an alias to what is around it")
            return Node(None, line, field)
        if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            self._problems.add(line, field, "a plain mapping or list", f"the tag {node.tag}")
        self._around.append(node)
        value: Value
        if isinstance(node, yaml.SequenceNode):
            value = tuple(
                self.build(item, self.line(item.start_mark.index), f"{field}[{index}]", depth + 1)
                for index, item in enumerate(node.value)
            )
        else:
            value = self._mapping(node, field, depth)
        self._around.pop()
        return Node(value, line, field)

    def _mapping(self, node: yaml.Node, field: str, depth: int) -> dict[str, Node]:
        fields: dict[str, Node] = {}
        for name_node, value_node in node.value:
            line = self.line(name_node.start_mark.index)
            if name_node.tag != f"{_TAG}str":
                self._problems.add(line, field, "the name of a field as text", show(name_node.value))
                continue
            name = name_node.value
            child = joined(field, name)
            if name == "<<":
                self._problems.add(line, child, "no merge key: what requests share goes into defaults", "'<<'")
            elif name in fields:
                self._problems.add(line, child, "each field once", f"it again (first on line {fields[name].line})")
            else:
                fields[name] = self.build(value_node, line, child, depth + 1)
        return fields

    def _scalar(self, node: yaml.ScalarNode, line: int, field: str) -> Value:
        kind = node.tag.removeprefix(_TAG)
        if kind not in _SCALARS:
            self._problems.add(line, field, "plain text, a number, true, false or null", f"the tag {node.tag}")
            return None
        try:
            return _SCALARS[kind](node.value)
        except (KeyError, ValueError):
            self._problems.add(line, field, f"a value that can be read as {kind}", show(node.value))
            return None
