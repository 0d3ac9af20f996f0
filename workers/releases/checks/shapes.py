"""The shapes of stored tensors against those that the configuration gives them."""

from collections.abc import Iterator

from workers.bases.model import token_embedding
from workers.releases.checks.groups import wrong_groups
from workers.releases.checks.heads import head_of
from workers.releases.checks.rules import SERVERS, TRANSFORMERS, Engine, Finding, Rule, Severity
from workers.releases.checks.skeletons import Skeleton, about

VOCABULARY = Rule(
    id="tensors.vocabulary",
    what="the embedding or the head has other rows than the vocabulary of the configuration",
    severity=Severity.ERROR,
    refused_by=(*TRANSFORMERS, *SERVERS),
    misread_by=(Engine.LLAMA_CPP,),
    advice="set vocab_size in config.json to the rows of both, or resize both (resize_token_embeddings)",
    source="transformers 5.23 utils/loading_report.py log_state_dict_report (size mismatch)",
)
SHAPE = Rule(
    id="tensors.shape",
    what="tensors have another shape than the configuration gives them",
    severity=Severity.ERROR,
    refused_by=(*TRANSFORMERS, *SERVERS),
    misread_by=(Engine.LLAMA_CPP,),
    advice="take config.json and weights from the same model",
    source="transformers 5.23 utils/loading_report.py log_state_dict_report (size mismatch)",
)
_NAMED_FIELDS = 3


def find_shapes(skeleton: Skeleton) -> Iterator[Finding]:
    """Find tensors of other shapes than the configuration gives them."""
    rows: list[tuple[str, object, object]] = []
    others: list[tuple[str, object, object]] = []
    embedding, _ = token_embedding(skeleton.model)
    tokens = {embedding, head_of(skeleton)}
    for target, names in skeleton.sources.items():
        expected = tuple(skeleton.state[target].shape)
        if skeleton.targets[names[0]][1] is None:
            shape = skeleton.stored[names[0]]
            if shape is not None and shape != expected:
                wrong = rows if target in tokens and shape[1:] == expected[1:] else others
                wrong.append((names[0], list(shape), list(expected)))
    others += wrong_groups(skeleton)
    # Biases and the like of the same vocabulary.
    change = {_differing(each) for each in rows}
    rows += [each for each in others if _differing(each) in change]
    others = [each for each in others if _differing(each) not in change]
    for rule, wrong in ((VOCABULARY, rows), (SHAPE, others)):
        if wrong:
            name, differs, wanted = wrong[0]
            fields = "vocab_size" if rule is VOCABULARY else _fields(skeleton, differs, wanted)
            yield about(
                skeleton,
                rule,
                name,
                found=f"{differs}{f' (and {len(wrong) - 1} more tensors)' if len(wrong) > 1 else ''}",
                expected=f"{wanted}{f' by {fields}' if fields else ''}",
            )


def _differing(wrong: tuple[str, object, object]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes that two shapes differ in; nothing where they are no shapes of as many dimensions."""
    _, found, wanted = wrong
    if not (isinstance(found, list) and isinstance(wanted, list)) or len(found) != len(wanted):
        return (), ()
    pairs = [(size, other) for size, other in zip(found, wanted, strict=True) if size != other]
    return tuple(size for size, _ in pairs), tuple(other for _, other in pairs)


def _fields(skeleton: Skeleton, found: object, expected: object) -> str:
    """Return the fields of the configuration that hold what differs."""
    if not (isinstance(found, list) and isinstance(expected, list)) or len(found) != len(expected):
        return ""
    wanted = {size for size, other in zip(expected, found, strict=True) if size != other}
    config = skeleton.checkpoint.text_config
    fields = [name for name, value in config.items() if type(value) is int and value in wanted and value > 1]
    return ", ".join(fields[:_NAMED_FIELDS])
