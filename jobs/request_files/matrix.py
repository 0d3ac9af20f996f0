"""What a YAML request file spells out: defaults laid under every request, matrices multiplied into requests."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from jobs.request_files.documents import Node, joined
from jobs.request_files.patterns import is_pattern
from jobs.request_files.problems import ProblemList, known_name, show
from jobs.request_files.sweeps import Sweeps

MAX_REQUESTS = 100_000

_SECTIONS = ("schema", "defaults", "requests", "matrix")
_AXES = {"bases": "base", "adapters": "adapter", "quantizations": "base_quantization"}
_OPTIONAL_AXES = frozenset({"quantizations"})


@dataclass(slots=True)
class Expansion:
    """The requests a file stands for."""

    requests: list[Node] = field(default_factory=list)
    """Those written out one by one, with defaults filled in; each value still knows the line it came from."""
    multiplied: list[Node] = field(default_factory=list)
    """Those of matrices, likewise."""
    shared: list[Node] = field(default_factory=list)
    """What many requests get their fields from, incomplete by nature: the defaults, and each matrix without its axes.
    To be checked by themselves: a mistake may stand in a field that every request overrides."""

    def __len__(self) -> int:
        return len(self.requests) + len(self.multiplied)


def expand(root: Node, problems: ProblemList, sweeps: Sweeps) -> Expansion:
    """Return the requests of a YAML document.

    Args:
        root: the document.
        problems: takes every mistake in the sections of the file; those inside requests are found later.
        sweeps: looks up the patterns among the adapters of matrices.

    Raises:
        TransientIOError: a pattern could not be looked up, as a store did not answer.
    """
    expansion = Expansion()
    if not isinstance(root.value, dict):
        problems.add(root.line, "", "a mapping with 'requests' or 'matrix'", show(root.value))
        return expansion
    for name, node in root.value.items():
        if name not in _SECTIONS:
            problems.add(node.line, node.field, known_name(name, _SECTIONS), repr(name))
    schema = root.value.get("schema")
    if schema is not None and (schema.value != 1 or isinstance(schema.value, bool)):
        problems.add(schema.line, schema.field, "1, the only schema there is", show(schema.value))
    defaults = next(_mappings(root, "defaults", problems), Node({}, root.line, "defaults"))
    expansion.shared.append(defaults)
    expansion.requests += [defaults.overlaid(node) for node in _mappings(root, "requests", problems)]
    for block in _mappings(root, "matrix", problems):
        _multiply(block, defaults, expansion, problems, sweeps)
    return expansion


def _mappings(root: Node, section: str, problems: ProblemList) -> Iterator[Node]:
    """Yield the mappings of a section: one for `defaults`, a list for `requests`, either for `matrix`."""
    assert isinstance(root.value, dict)
    node = root.value.get(section)
    if node is None or node.value is None:
        return
    is_list = isinstance(node.value, tuple)
    if section == "requests" and not is_list:
        problems.add(node.line, node.field, "a list of requests", show(node.value))
        return
    blocks = node.value if isinstance(node.value, tuple) and section != "defaults" else (node,)
    for block in blocks:
        if isinstance(block.value, dict):
            yield block
        else:
            problems.add(block.line, block.field, "a mapping", show(block.value))


def _multiply(block: Node, defaults: Node, expansion: Expansion, problems: ProblemList, sweeps: Sweeps) -> None:
    """Add the requests of one matrix: every base with every adapter with every quantization."""
    assert isinstance(block.value, dict)
    axes = _axes(block, problems)
    if "adapter" in axes:
        axes["adapter"] = tuple(place for each in axes["adapter"] for place in sweeps.expand(each))
    template = {name: node for name, node in block.value.items() if name not in _AXES and name not in axes}
    shared = defaults.overlaid(Node(template, block.line, block.field))
    expansion.shared.append(shared)
    num_requests = len(expansion) + math.prod(len(values) for values in axes.values())
    if num_requests > MAX_REQUESTS:
        problems.add(block.line, block.field, f"at most {MAX_REQUESTS} requests in one file", str(num_requests))
    elif axes.keys() >= {name for axis, name in _AXES.items() if axis not in _OPTIONAL_AXES}:
        assert isinstance(shared.value, dict)
        for combination in itertools.product(*axes.values()):
            fields = shared.value | dict(zip(axes, combination, strict=True))
            expansion.multiplied.append(Node(fields, block.line, block.field))


def _axes(block: Node, problems: ProblemList) -> dict[str, tuple[Node, ...]]:
    """Return the values of each axis of a matrix, by the field that they are of."""
    assert isinstance(block.value, dict)
    axes: dict[str, tuple[Node, ...]] = {}
    for axis, name in _AXES.items():
        node = block.value.get(axis)
        if node is not None and name == "adapter" and is_pattern(node.value):
            node = Node((node,), node.line, node.field)  # it stands for a list
        if node is not None and isinstance(node.value, tuple) and node.value:
            axes[name] = node.value
        elif node is not None:
            problems.add(node.line, node.field, "a list with at least one entry", show(node.value or None))
        elif axis not in _OPTIONAL_AXES:
            problems.add(block.line, joined(block.field, axis), "a list with at least one entry", "nothing")
        if name in block.value and (axis not in _OPTIONAL_AXES or node is not None):
            single = block.value[name]
            problems.add(single.line, single.field, f"the axis '{axis}' alone", show(single.value))
    return axes
