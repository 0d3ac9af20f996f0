"""Sweeps: among a matrix's `adapters`, `runs/x/checkpoint-*` stands for every folder there that holds an adapter.

What a pattern stands for is looked up when its file is read, through a `Listing` that the caller brings: this room
knows directories, and no store.
"""

from pathlib import Path

from jobs.allowance import Allowance
from jobs.errors import InvalidValueError, MergefleetError, TransientIOError
from jobs.locations import Elsewhere, Location
from jobs.request_files.documents import Node
from jobs.request_files.patterns import FolderPattern, Listing, Match, is_pattern
from jobs.request_files.problems import ProblemList
from jobs.request_files.whole_adapters import holds_config, inner_adapters, missing_of
from jobs.steps import in_order


class Sweeps:
    """Looks up the patterns of one file; notes what is wrong, what is left out, and the step of each folder.

    Args:
        listing: what lies where; None where patterns are refused, as the file may come from elsewhere.
        relative_to: what relative paths are taken from.
        allowance: where patterns may be looked up.
        problems: takes every mistake.
    """

    def __init__(
        self, listing: Listing | None, relative_to: Path | Elsewhere, allowance: Allowance, problems: ProblemList
    ) -> None:
        self._listing = listing
        self._relative_to = relative_to
        self._allowance = allowance
        self._problems = problems
        self.num_patterns = 0
        self.left_out: list[str] = []
        """Folders that match and hold no whole adapter, each with the reason."""
        self.steps: dict[str, int | None] = {}
        """By place, as text, of what patterns stand for."""

    def expand(self, node: Node) -> tuple[Node, ...]:
        """Return what one of the adapters of a matrix stands for: itself, or the places that match, by number.

        Raises:
            TransientIOError: a store did not answer.
        """
        if not (isinstance(node.value, str) and is_pattern(node.value)):
            return (node,)
        self.num_patterns += 1
        try:
            found = self._found(node.value)
        except InvalidValueError as error:
            self._problems.add(node.line, node.field, error.expected, error.found)
        except TransientIOError:
            raise  # not the file's fault, and worth another try
        except MergefleetError as error:
            self._problems.add(node.line, node.field, "a pattern of places that can be looked into", str(error))
        else:
            self.steps |= {str(match.place): match.step for match in found}
            return tuple(Node(str(match.place), node.line, node.field) for match in found)
        return ()

    def _found(self, text: str) -> list[Match]:
        """Return the places that a pattern stands for, in order, at least one.

        Raises:
            InvalidValueError: it is no pattern, may not be looked up, or there is none.
        """
        if self._listing is None:
            expected = "a place without '*' and '?': they are looked up by `mergefleet submit`, where the file is"
            raise InvalidValueError(expected, repr(text))
        pattern = FolderPattern.parse(text, self._relative_to)
        if refusal := self._allowance.refusal_of_source(pattern.root):
            raise InvalidValueError(f"a pattern below {refusal}", f"'{pattern.root}' before the first wildcard")
        unfinished: list[Location] = []
        matches = sorted(pattern.matches(self._listing, unfinished), key=lambda match: in_order(match.path))
        reasons = {match.place: self._reason(match, pattern, self._listing) for match in matches}
        whole = [match for match in matches if reasons[match.place] is None]
        left_out = [f"{place}: {reason}" for place, reason in reasons.items() if reason is not None]
        left_out += [f"{place}: has the name of what is still being written" for place in unfinished]
        if not whole:
            expected = f"at least one folder that matches {text!r} and holds an adapter"
            raise InvalidValueError(expected, f"none: {'; '.join(left_out) or f'nothing in {pattern.root} matches'}")
        self.left_out += left_out
        return whole

    @staticmethod
    def _reason(match: Match, pattern: FolderPattern, listing: Listing) -> str | None:
        """Return why a place is left out; None when it holds a whole adapter.

        Raises:
            InvalidValueError: it holds adapters in folders of its own: which of them is meant has to be said.
        """
        if not is_pattern(pattern.names[-1]) and match.place.name not in listing.folders(match.place.ancestors()[0]):
            return "is not there"
        if not holds_config(match.place, listing) and (inner := inner_adapters(match.place, listing)):
            expected = "an adapter at the top of each folder that matches"
            written = pattern.with_folder(inner[0])
            found = (
                f"'{match.place}' with adapters in its folders {', '.join(inner)}; write {written!r} for one of them"
            )
            raise InvalidValueError(expected, found)
        return missing_of(match.place, listing)
