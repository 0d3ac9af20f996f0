"""Drafts of merge requests: templates are filled in, values validated, and each draft compared with the others."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from jobs.allowance import Allowance
from jobs.errors import InvalidValueError
from jobs.frozen import inner_model
from jobs.locations import Elsewhere, Location, enclosing, parse_location
from jobs.request import BaseQuantization, MergeRequest, adapter_name
from jobs.request_files.documents import Node, joined
from jobs.request_files.problems import ProblemList, closest, expectation, known_name, mistakes, show
from jobs.request_files.templates import PLACEHOLDERS, fill
from jobs.steps import step_of

_TEMPLATES = ("id", "destination")
"""The fields that may hold placeholders, in the order they are filled in: a destination may hold the id."""


class DraftCheck:
    """Turns the drafts of one file into requests; notes what is wrong within each and between them.

    Args:
        origin: what relative paths are taken from.
        problems: takes every mistake.
        strict: whether values must have the right type already, or are text to be converted.
        allowance: the places that requests may name.
        steps: of the adapters that patterns stand for, by place, as text.
    """

    def __init__(
        self,
        origin: Path | Elsewhere,
        problems: ProblemList,
        *,
        strict: bool,
        allowance: Allowance,
        steps: Mapping[str, int | None],
    ) -> None:
        self._origin = origin
        self._steps = steps
        self._problems = problems
        self._strict = strict
        self._allowance = allowance
        self._owners: dict[tuple[str, str], Node] = {}
        self._places: dict[str, Node] = {}
        """Drafts by their destination."""
        self._inner: dict[str, str] = {}
        """By a place, a destination that lies inside of it."""

    def shared(self, draft: Node) -> None:
        """Check what many requests share: fields may be missing, and templates get their values later."""
        fields = draft.plain()
        for name in _TEMPLATES:
            self._fill(draft, name, fields, dict.fromkeys(PLACEHOLDERS, ""))
            fields.pop(name, None)
        self._validate(draft, fields, set_aside={"base", "adapter", "adapters", "combination", "destination"})

    def request(self, draft: Node, *, has_templates_in_labels: bool = False) -> MergeRequest | None:
        """Return the request, or None when something is wrong with it.

        Args:
            draft: its fields, and their places.
            has_templates_in_labels: whether the values of labels may hold placeholders too, as in a matrix.
        """
        if not isinstance(draft.value, dict):
            self._problems.add(draft.line, draft.field, "a mapping of fields", show(draft.value))
            return None
        fields = draft.plain()
        names = self._names(fields)
        set_aside = set()
        for name in _TEMPLATES:
            if not self._fill(draft, name, fields, names):
                set_aside.add(name)
                names[name] = None
                del fields[name]
            elif isinstance(fields.get(name), str) and fields[name]:
                names[name] = fields[name]
        if has_templates_in_labels:
            self._fill_labels(draft, fields, names)
        self._compare(draft, fields)
        request = self._validate(draft, fields, set_aside=set_aside)
        if request is not None:
            for path, expected, found in self._allowance.refusals(request, follow_links=False):
                node = draft.at(path)
                self._problems.add(node.line, node.field, expected, found)
        return request

    def _names(self, fields: dict[str, Any]) -> dict[str, str | None]:
        """Return what the placeholders stand for, before the id is known."""
        base, adapters = self._location(fields.get("base")), self._adapters(fields)
        names = {"base": base.name if base else None, "adapter": adapter_name(adapters) if adapters else None}
        step = self._step(adapters[0]) if adapters and len(adapters) == 1 else None
        if step is not None or not adapters:
            names["step"] = None if step is None else str(step)
        quantization = fields.get("base_quantization", BaseQuantization.DEFAULT)
        if quantization == BaseQuantization.DEFAULT:
            return names  # what that stands for, the base will say
        return names | {"quantization": quantization if quantization in list(BaseQuantization) else None}

    def _step(self, adapter: Location) -> int | None:
        """Return the number that an adapter's name ends in; of what a pattern stands for, one where a wildcard was."""
        return self._steps.get(str(adapter), step_of(adapter.name))

    def _fill_labels(self, draft: Node, fields: dict[str, Any], names: dict[str, str | None]) -> None:
        """Fill in the values of labels; those that cannot be are left out of a request that is wrong anyway."""
        labels = fields.get("labels")
        if not isinstance(labels, dict):
            return
        for label, text in list(labels.items()):
            if not isinstance(text, str):
                continue  # told when values are validated
            try:
                filled = fill(text, names)
            except InvalidValueError as error:
                node = draft.at(["labels", label])
                self._problems.add(node.line, node.field, error.expected, error.found)
                filled = None
            if filled is None:
                del labels[label]
            else:
                labels[label] = filled

    def _adapters(self, fields: dict[str, Any]) -> list[Location] | None:
        """Return the places of one adapter or of several, or None when one of them is wrong."""
        several = fields.get("adapters")
        if not isinstance(several, list):
            several = [{"adapter": fields.get("adapter")}]
        found = [self._location(each.get("adapter")) if isinstance(each, dict) else None for each in several]
        places = [place for place in found if place is not None]
        return places if len(places) == len(several) else None

    def _location(self, text: Any) -> Location | None:
        try:
            return parse_location(text, self._origin) if isinstance(text, str) else None
        except InvalidValueError:
            return None

    def _fill(self, draft: Node, name: str, fields: dict[str, Any], names: dict[str, str | None]) -> bool:
        """Fill in one field, where it holds text; False when that cannot be done."""
        text = fields.get(name)
        if not isinstance(text, str):
            return True
        try:
            filled = fill(text, names)
        except InvalidValueError as error:
            node = draft.at([name])
            self._problems.add(node.line, node.field, error.expected, error.found)
            return False
        fields[name] = filled
        return filled is not None

    def _compare(self, draft: Node, fields: dict[str, Any]) -> None:
        """Note an id or a destination that an earlier draft has already."""
        name = fields.get("id")
        destination = self._location(fields.get("destination"))
        is_taken = isinstance(name, str) and name != "" and self._is_taken(draft, "id", name)
        follows = is_taken and "{id}" in str(draft.at(["destination"]).value)
        if destination is None or follows or self._is_taken(draft, "destination", str(destination)):
            return
        self._check_nesting(draft, str(destination))

    def _check_nesting(self, draft: Node, destination: str) -> None:
        """Note a destination that lies inside of an earlier draft's, or around one: releases do not hold releases."""
        around = list(enclosing(destination))
        outer = next((place for place in around if place in self._places), None)
        inner = self._inner.get(destination)
        for place in around:
            if self._inner.setdefault(place, destination) != destination:
                break  # then those around it are known, too
        self._places.setdefault(destination, draft)
        for other, how in ((outer, "inside of"), (inner, "around")):
            if other is not None:
                node, line = draft.at(["destination"]), self._places[other].at(["destination"]).line
                where = "of another request" if node.line == line else f"on line {line}"
                expected = "a destination that lies neither inside of another one nor around it"
                self._problems.add(node.line, node.field, expected, f"{destination!r}, {how} {other!r} {where}")

    def _is_taken(self, draft: Node, name: str, value: str) -> bool:
        owner = self._owners.setdefault((name, value), draft)
        if owner is draft:
            return False
        node, first = draft.at([name]), owner.at([name])
        where = "more than once" if node.line == first.line else f"again, first on line {first.line}"
        self._problems.add(node.line, node.field, f"a different {name} for each request", f"{value!r} {where}")
        return True

    def _validate(self, draft: Node, fields: dict[str, Any], set_aside: Collection[str]) -> MergeRequest | None:
        """Validate the values of one draft.

        Args:
            draft: says where each value stands.
            fields: the values, templates filled in.
            set_aside: fields that may be missing, as they are dealt with elsewhere.
        """
        context = {"relative_to": self._origin}
        try:
            if self._strict:
                # Strictness of JSON, not of Python: a list is a tuple and text is a member of an enum.
                return MergeRequest.model_validate_json(json.dumps(fields), strict=True, context=context)
            return MergeRequest.model_validate(fields, context=context)
        except ValidationError as error:
            details = list(mistakes(error))
            unknown = [detail["loc"] for detail in details if detail["type"] == "extra_forbidden"]
            misspelt = {(*parents, closest(str(name), _known_fields(parents))) for *parents, name in unknown}
            if ("adapters",) in misspelt:
                misspelt |= {("adapter",), ("combination",)}
            for detail in details:
                *parents, last = path = detail["loc"]
                if detail["type"] == "missing" and (path[0] in set_aside or path in misspelt):
                    continue
                expected, found = expectation(detail)
                if detail["type"] == "extra_forbidden":
                    expected, found = known_name(str(last), _known_fields(parents)), repr(last)
                node = draft.at(path)
                field = joined(node.field, str(last)) if node is draft.at(parents) else node.field
                self._problems.add(node.line, field, expected, found)
            return None


def _known_fields(path: Iterable[int | str]) -> list[str]:
    """Return the names of the fields of the model at a path inside a request."""
    model: type[BaseModel] = MergeRequest
    for step in path:
        if isinstance(step, str):  # an item of a list has the model that its list is annotated with
            inner = inner_model(model.model_fields[step].annotation)
            assert inner is not None
            model = inner
    return [info.alias or name for name, info in model.model_fields.items()]
