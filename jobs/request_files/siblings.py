"""Siblings: a request with `outputs` stands for one request for each form, below its destination."""

from collections.abc import Mapping

from jobs.output_form import OutputForm
from jobs.request_files.documents import Node, Value, joined
from jobs.request_files.problems import ProblemList, show

FIELD = "outputs"
_BFLOAT16: Mapping[str, Value] = {"dtype": "bfloat16"}
_WORDS: Mapping[str, Mapping[str, Value]] = {"bf16": {"output": OutputForm.PLAIN.value, **_BFLOAT16}}
"""What words stand for that are no `output` by themselves."""
_NUMBERS = frozenset({OutputForm.PLAIN, OutputForm.GGUF})
_KEEP = "keep"
_HUB = "hf://"


def without_outputs(node: Node) -> Node:
    """Return fields that many requests share without what multiplies them."""
    if not isinstance(node.value, dict):
        return node
    return Node({name: each for name, each in node.value.items() if name != FIELD}, node.line, node.field)


def siblings(node: Node, problems: ProblemList) -> tuple[Node, ...]:
    """Return the requests that one stands for.

    Args:
        node: its fields, `outputs` among them or not.
        problems: takes what is wrong with that field.
    """
    asked = node.value.get(FIELD) if isinstance(node.value, dict) else None
    if asked is None or asked.value is None:
        return (without_outputs(node),)
    fields = without_outputs(node).value
    assert isinstance(fields, dict)
    if "output" in fields and fields["output"].value is not None:
        problems.add(asked.line, asked.field, "either output or outputs", "both")
        return ()
    if not isinstance(asked.value, tuple) or not asked.value:
        problems.add(asked.line, asked.field, "a list with at least one entry", show(asked.value))
        return ()
    words = [each for each in asked.value if _is_word(each, problems) and _fits(each, fields, problems)]
    # All are forms of one merge, so of one dtype; as_base has that of the base.
    is_bfloat16 = any(each.value in _WORDS for each in words)
    return tuple(Node(fields | _own(fields, each, is_bfloat16=is_bfloat16), node.line, node.field) for each in words)


def _is_word(node: Node, problems: ProblemList) -> bool:
    words = (*(form.value for form in OutputForm), *_WORDS)
    if node.value in words:
        return True
    problems.add(node.line, node.field, f"one of {', '.join(words)}", show(node.value))
    return False


def _fits(word: Node, fields: dict[str, Node], problems: ProblemList) -> bool:
    """Whether a word says nothing else than a field beside it."""
    assert isinstance(word.value, str)
    for name, value in _WORDS.get(word.value, {}).items():
        given = fields.get(name)
        if given is not None and given.value not in (None, value):
            problems.add(given.line, given.field, f"{value}, or none, beside {FIELD} '{word.value}'", show(given.value))
            return False
    return True


def _own(fields: dict[str, Node], word: Node, *, is_bfloat16: bool) -> dict[str, Node]:
    """Return what a sibling has beside the fields that all share.

    Args:
        fields: those.
        word: its form.
        is_bfloat16: whether a word asks for that dtype.

    Returns:
        Form and dtype, and id and destination with the form at their ends.
    """
    assert isinstance(word.value, str)
    said: dict[str, Value] = dict(_WORDS.get(word.value, {"output": word.value}))
    if said["output"] in _NUMBERS:
        said[_KEEP] = None  # they lose nothing
    if is_bfloat16 and word.value != OutputForm.AS_BASE:
        said |= _BFLOAT16
    own = {name: Node(value, word.line, joined(word.field, name)) for name, value in said.items()}
    for name, join in (("id", "-"), ("destination", "/")):
        given = fields.get(name)
        if given is None or not isinstance(given.value, str) or not given.value:
            continue  # what is missing or wrong is told of each
        if name == "destination" and given.value.startswith(_HUB):
            place, at, revision = given.value.partition("@")
            text = f"{place}-{word.value}{at}{revision}"  # repositories have no folders of releases
        else:
            text = f"{given.value.rstrip('/') if name == 'destination' else given.value}{join}{word.value}"
        own[name] = Node(text, given.line, given.field)
    return own
