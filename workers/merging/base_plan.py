"""What all jobs of a pass share, planned from a base's headers and configuration."""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from jobs.request import BaseQuantization, MergeRequest
from workers.adapters.adapter import Adapter
from workers.adapters.coverage import Coverage, cover, ties_by_values
from workers.adapters.heads import give_head
from workers.adapters.methods import WEIGHED
from workers.adapters.resizing import check_brought, resize_vocabulary
from workers.bases.codes import refuse_codes
from workers.bases.conversions import Conversions, relate
from workers.bases.forms import StoredForm, StoredParts
from workers.bases.forms.declared import declared_form
from workers.bases.model import TORCH_DTYPES, answers_prompts, check_depth, config_dtype, skeleton, token_embedding
from workers.bases.quantization_task import QuantizationTask, plan_quantization
from workers.bases.quantized_base import QuantizedBase
from workers.bases.stored import check_shapes, stored_as_asked, usual_quantization, weights_in_form
from workers.bases.ties import COMPUTES_WITH_FLAG, come_apart, stored_apart, tied_names
from workers.files.checkpoint import read_checkpoint
from workers.files.layout import CheckpointLayout, TensorSpec
from workers.merging.output import OutputTensor
from workers.releases.base_card import BaseCard, read_base_card
from workers.sources.fetch import Source

_MAX_PLANNED_BASES = 4
_MAX_RECIPES = 16
"""Of adapters, for each base: a fleet of many bases keeps plans for long."""
_NUMBERS = frozenset({torch.float64, *TORCH_DTYPES.values()})


@dataclass(frozen=True)
class BasePlan:
    """What all jobs of a pass share."""

    source: Source
    layout: CheckpointLayout
    tensors: tuple[OutputTensor, ...]
    """In the order in which the base stores them."""
    quantization: QuantizationTask | None
    """What to convert to 4-bit first; None when nothing is."""
    form: StoredForm | None
    """What its weights are stored in; None for plain numbers."""
    in_form: Mapping[str, StoredParts]
    """Those of its weights that are stored in it, by name."""
    usual: BaseQuantization
    """What is added to where a request leaves that to the base."""
    conversions: Conversions
    """Between the names and tensors of its files and those of its model."""
    transposed: frozenset[str]
    """Weights that 4-bit loading converts as their transpose."""
    tied: Mapping[str, tuple[str, ...]]
    """For each parameter of its model that shares its values: all names of these values, its own included."""
    tied_by_flag: bool
    """Whether `tie_word_embeddings` ties them, all or none, and does nothing else."""
    apart: frozenset[str]
    """Parameters that its configuration ties to others, while its files have values of their own for them."""
    answers_prompts: bool
    """Whether its model continues text."""
    embedding: str | None
    """The stored tensor whose rows are its tokens; None where it has none."""
    num_rows_beside: int
    """Rows for further tokens that the model keeps in a tensor of their own."""
    card: BaseCard
    """What its model card says."""
    _coverages: dict[object, Coverage] = field(default_factory=dict, compare=False, repr=False)

    def coverage(self, adapter: Adapter) -> Coverage:
        """Return what an adapter changes; adapters of one recipe differ in values alone, and PEFT is asked once.

        Raises:
            UnsupportedError, BadInputError: adapter and base do not fit.
        """
        # Layers that hold arrays would stay for as long as this plan does.
        if adapter.method in WEIGHED or ties_by_values(adapter):
            return self._cover(adapter)
        tensors = tuple((name, spec.dtype, spec.shape) for name, spec in adapter.tensors.items())
        recipe = (repr(adapter.config.to_dict()), tensors, adapter.num_tokens, repr(adapter.head))
        if recipe not in self._coverages:
            while len(self._coverages) >= _MAX_RECIPES:
                del self._coverages[next(iter(self._coverages))]
            self._coverages[recipe] = self._cover(adapter)
        return self._coverages[recipe]

    def _cover(self, adapter: Adapter) -> Coverage:
        model = self.skeleton()
        give_head(model, adapter.head, on_meta=True)
        resize_vocabulary(model, adapter.num_tokens)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        coverage = cover(adapter, model)
        if adapter.num_tokens is not None:
            check_brought(
                str(adapter.weights_path),
                adapter.tensors,
                adapter.num_tokens,
                tied=coverage.tied,
                untied=coverage.untied,
                resized=[name for name, shape in shapes.items() if shape != self.conversions.shapes.get(name, shape)],
            )
        return coverage

    def read_as(self, source: Source) -> "BasePlan":
        """Return the plan for the same base, as it was looked at just now."""
        task = self.quantization
        task = None if task is None else dataclasses.replace(task, unchanged=source.check_unchanged)
        return dataclasses.replace(self, source=source, quantization=task)

    def stored_weights(self, device: torch.device) -> QuantizedBase:
        """Open its weights in the form they are stored in.

        Args:
            device: where they are dequantized.
        """
        assert self.form is not None
        directory, dtype = self.source.directory, config_dtype(self.source.directory)
        return QuantizedBase.stored(directory, self.layout, device, self.transposed, form=self.form, dtype=dtype)

    def skeleton(self) -> PreTrainedModel:
        """Build its model on the meta device, with the ties that its files have."""
        model = skeleton(self.source.directory)
        come_apart(model, self.apart)
        return model

    def stored_name(self, name: str) -> str | None:
        """Return what a tensor of the model is called in the files: by its own name, or by one that it is tied to.

        None where it is made of several stored tensors, or of a part of one, or not stored at all.
        """
        stored_names = self.conversions.stored_names
        return next((stored_names[same] for same in (name, *self.tied.get(name, ())) if same in stored_names), None)

    @cached_property
    def misread(self) -> str | None:
        """A weight in codes of which transformers makes another one, or none; None where it reads the base as it is."""
        if self.form is None:
            return None
        specs = {name: spec for name, (_, spec) in self.layout.tensors.items()}
        return self.form.misread(specs, config_dtype(self.source.directory))

    @cached_property
    def by_name(self) -> Mapping[str, OutputTensor]:
        """Output tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def linear(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the matrices in its files that are read one by one, [O, I], by name: nothing is tied to them."""
        together = () if self.quantization is None else self.quantization.groups
        other = {name for group in together for name in group.stored} | self.transposed
        names = self.conversions.parameter_names
        return {
            tensor.name: tensor.shape
            for tensor in self.tensors
            if len(tensor.shape) == 2 and tensor.name not in other and names.get(tensor.name) not in self.tied
        }


def plan_base(source: Source, request: MergeRequest) -> BasePlan:
    """Plan what all requests of a pass share.

    Args:
        source: the base.
        request: any request of the pass; they agree in base, quantization and dtype.

    Raises:
        NotFoundError, BadInputError, UnsupportedError: the base cannot be used, or not as asked.
    """
    directory = source.directory
    declared_form(directory)  # other forms are refused by name, before anything is made of their tensors
    layout = read_checkpoint(directory)
    check_depth(directory, len(layout.tensors))
    model = skeleton(directory)
    specs = {name: spec for name, (_, spec) in layout.tensors.items()}
    usual = usual_quantization(directory)
    request = request.settled(usual)
    form = stored_as_asked(source, request, specs)
    in_form = weights_in_form(source, form, specs)
    weight_of = {stored: name for name, parts in in_form.items() for stored in parts.names}
    conversions = _conversions(source, specs, in_form, weight_of, model)
    shapes = {stored: conversions.shapes[name] for name, stored in conversions.stored_names.items()}
    check_shapes(source, specs, in_form, weight_of, shapes)
    transposed = frozenset(
        conversions.stored_names[f"{name}.weight"]
        for name, module in model.named_modules()
        if isinstance(module, Conv1D) and f"{name}.weight" in conversions.stored_names
    )
    asked_dtype = TORCH_DTYPES[request.dtype] if request.dtype else None
    task = None
    if request.base_quantization.converts and form is None:
        task = plan_quantization(
            source, layout, request, conversions=conversions, transposed=transposed, dtype=asked_dtype
        )
    converted = in_form.keys() if task is None else task.converted
    apart = stored_apart(directory, layout, in_form, conversions.stored_names, model)
    come_apart(model, apart)
    dtype = config_dtype(source.directory)
    tensors = []
    for stored, (shard, spec) in layout.tensors.items():
        name = weight_of.get(stored, stored)
        parts = in_form.get(name)
        if parts is not None and parts.codes != stored:
            continue  # the scales and the state of a weight become part of it
        own_dtype = spec.dtype if parts is None else dtype
        own_shape = spec.shape if parts is None else parts.shape or parts.at_most or spec.shape
        tensors.append(
            OutputTensor(
                name=name,
                shape=shapes.get(name, own_shape) if name in converted else own_shape,
                # What is no number keeps its bytes: 8-bit floats are codes, like integers.
                dtype=asked_dtype if asked_dtype is not None and own_dtype in _NUMBERS else own_dtype,
                shard=shard.name,
                stored=None if name in converted else spec,
            )
        )
    embedding, num_rows_beside = token_embedding(model)
    return BasePlan(
        source=source,
        layout=layout,
        tensors=tuple(tensors),
        quantization=task,
        form=form,
        in_form=in_form,
        usual=usual,
        conversions=conversions,
        transposed=transposed,
        tied=tied_names(model),
        tied_by_flag=model.config.model_type not in COMPUTES_WITH_FLAG,
        apart=apart,
        answers_prompts=answers_prompts(model),
        embedding=conversions.stored_names.get(embedding) if embedding else None,
        num_rows_beside=num_rows_beside,
        card=read_base_card(directory),
    )


class PlannedBases:
    """Plans of the bases that were used last: what transformers and PEFT say of a base is asked once for many units."""

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[str, str], BasePlan] = OrderedDict()

    def get(self, source: Source, request: MergeRequest) -> BasePlan:
        """Return the plan for a base as it is now; raises as `plan_base`."""
        key = (request.pass_key(), source.digest)
        if key not in self._plans:
            self._plans[key] = plan_base(source, request)
        self._plans[key] = self._plans[key].read_as(source)
        self._plans.move_to_end(key)
        while len(self._plans) > _MAX_PLANNED_BASES:
            self._plans.popitem(last=False)
        return self._plans[key]


def _conversions(
    source: Source,
    specs: Mapping[str, TensorSpec],
    in_form: Mapping[str, StoredParts],
    weight_of: Mapping[str, str],
    model: PreTrainedModel,
) -> Conversions:
    shapes = {name: spec.stated.shape if spec.stated else spec.shape for name, spec in specs.items()}
    stored = {
        name: torch.empty(shapes[name], dtype=spec.dtype, device="meta")
        for name, spec in specs.items()
        if name not in weight_of
    }
    for name, parts in in_form.items():
        shape = parts.shape or parts.at_most or shapes[parts.codes]
        stored[name] = torch.empty(shape, dtype=specs[parts.codes].dtype, device="meta")
    return relate(
        source.directory,
        model,
        stored,
        frozenset(name for name, parts in in_form.items() if parts.shape is None and parts.at_most is None),
        lambda conversions: refuse_codes(source.directory, model, conversions, specs, weight_of),
    )
