"""The model of a checkpoint on the meta device, and where each stored tensor goes in it, as transformers has it."""

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from jobs.errors import MergefleetError
from workers.bases.forms import StoredForm, StoredParts
from workers.bases.forms.declared import declared_form
from workers.bases.model import check_depth, skeleton
from workers.bases.routes import Routes
from workers.releases.checks.checkpoint import CONFIG, Checkpoint
from workers.releases.checks.rules import Finding, Rule, finding


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The model that transformers builds of a configuration, held against the names of a checkpoint."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    form: StoredForm | None
    """In which weights are stored; None for plain numbers."""
    in_form: Mapping[str, StoredParts]
    """Weights that are stored in it, by name."""

    @functools.cached_property
    def state(self) -> Mapping[str, torch.Tensor]:
        """Tensors of the model, by its own names."""
        return dict(self.model.state_dict())

    @functools.cached_property
    def stored(self) -> Mapping[str, tuple[int, ...] | None]:
        """Shapes of the stored weights by name; what is in codes counts as the weight, None where nothing tells it."""
        parts = {name for each in self.in_form.values() for name in (each.codes, *each.beside.values())}
        shapes: dict[str, tuple[int, ...] | None] = {
            name: spec.stated.shape if spec.stated else spec.shape
            for name, spec in self.checkpoint.specs.items()
            if name not in parts
        }
        return shapes | {name: each.shape for name, each in self.in_form.items()}

    @functools.cached_property
    def routes(self) -> Routes:
        """The rules by which transformers names what it loads."""
        return Routes(self.model)

    @functools.cached_property
    def targets(self) -> Mapping[str, tuple[str, str | None]]:
        """What each stored weight becomes, and by which rule it is put together with others."""
        return {name: self.routes.of(name) for name in self.stored}

    @functools.cached_property
    def unexpected(self) -> list[str]:
        """Stored weights that the model does not take."""
        return sorted(name for name, (target, _) in self.targets.items() if target not in self.state)

    @functools.cached_property
    def sources(self) -> Mapping[str, tuple[str, ...]]:
        """The stored weights behind each tensor of the model."""
        found: dict[str, list[str]] = defaultdict(list)
        for name, (target, pattern) in self.targets.items():
            if target not in self.state:
                continue
            targets = [target]
            if pattern is not None:  # one rule may make several of the same parts
                converter = self.routes.by_pattern[pattern]
                first, others = converter.target_patterns[0], converter.target_patterns[1:]
                targets += [target.replace(first, other) for other in others]
            for each in targets:
                found[each].append(name)
        return {target: tuple(names) for target, names in found.items()}

    def file_of(self, name: str | None) -> str:
        """Return the shard that holds a stored weight, or its codes; the first one for what none holds."""
        parts = self.in_form.get(name or "")
        stored = name if parts is None else parts.codes
        return self.checkpoint.file_of.get(stored or "", next(iter(self.checkpoint.loaded)))


def about(skeleton: Skeleton, rule: Rule, name: str, *, found: str, expected: str) -> Finding:
    """Return a finding about a stored weight."""
    return finding(rule, skeleton.file_of(name), name, found=found, expected=expected)


def build_skeleton(checkpoint: Checkpoint) -> Skeleton | MergefleetError | None:
    """Build the model of a checkpoint.

    Returns:
        None where there is nothing to build it of, or where code that comes with it would have to run; the error where
        transformers builds none.
    """
    if CONFIG not in checkpoint.documents or not checkpoint.specs:
        return None
    try:
        check_depth(checkpoint.directory, len(checkpoint.specs))
        model = skeleton(checkpoint.directory)
    except MergefleetError as error:
        return error
    try:
        form = declared_form(checkpoint.directory)
        in_form = {} if form is None else form.weights(checkpoint.specs)
    except MergefleetError:
        return None  # a form that is not read here, or one in disorder, which has rules of its own
    return Skeleton(checkpoint=checkpoint, model=model, form=form, in_form=in_form)
