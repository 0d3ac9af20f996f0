"""Which group of a configuration a module is of.

As `match_targets` of compressed-tensors 0.20 has it: a target that is its name, then a pattern, in the order of their
text, then one that is its class. Names are those of the files, which is what such configurations are written in.
"""

import re
from collections.abc import Iterable, Sequence

from jobs.errors import UnsupportedError
from workers.bases.forms.compressed.group import Group

_PATTERN = "re:"
_EMBEDDING = "Embedding"
_IS_EMBEDDING = re.compile(r"embed|^w[tp]e$", re.IGNORECASE)
"""In the last part of its name, as headers know no classes."""


class Targets:
    """The groups of a configuration, by what they take."""

    def __init__(self, place: str, groups: Sequence[Group], ignored: Iterable[str]) -> None:
        """Read targets.

        Args:
            place: of the configuration, for messages.
            groups: in their order.
            ignored: what is in none of them.

        Raises:
            UnsupportedError: a pattern is none.
        """
        by_target = {target: group for group in groups for target in group.scheme.targets}
        self._names = {target: group for target, group in by_target.items() if not target.startswith(_PATTERN)}
        self._patterns = [
            (_compiled(place, target), by_target[target]) for target in sorted(by_target.keys() - self._names.keys())
        ]
        of_class = [(target, group) for target, group in self._names.items() if target[:1].isupper()]
        self._of_embeddings = next((group for target, group in of_class if target == _EMBEDDING), None)
        self._of_linears = next((group for target, group in of_class if target != _EMBEDDING), None)
        ignored = list(ignored)
        self._ignored = frozenset(ignored)
        self._ignored_patterns = [_compiled(place, each) for each in ignored if each.startswith(_PATTERN)]
        self._known: dict[str, Group | None] = {}

    def group_of(self, module: str) -> Group | None:
        """Return the group of a module, by its name in the files; None where it is in none."""
        if module not in self._known:
            self._known[module] = self._find(module)
        return self._known[module]

    def _find(self, module: str) -> Group | None:
        if module in self._ignored or any(pattern.match(module) for pattern in self._ignored_patterns):
            return None
        if module in self._names:
            return self._names[module]
        named = next((group for pattern, group in self._patterns if pattern.match(module)), None)
        if named is not None:
            return named
        return self._of_embeddings if _IS_EMBEDDING.search(module.rpartition(".")[2]) else self._of_linears


def _compiled(place: str, target: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix(_PATTERN))
    except re.error as error:
        raise UnsupportedError(
            f"{place}: the target {target!r} is no pattern: {error}; mend the configuration"
        ) from error
