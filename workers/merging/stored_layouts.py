"""Where the tensors of a release go that is stored in a form: the base's own, or one that the request names."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from jobs.errors import UnsupportedError
from jobs.output_form import OutputForm
from jobs.request import MergeRequest
from workers.bases.forms import PartLayout, QuantizingForm, StoredParts
from workers.bases.forms.compressed.output import CompressedOutput
from workers.bases.model import TORCH_DTYPES, config_dtype
from workers.files.layout import CheckpointLayout, ShardLayout, lay_out_shard
from workers.merging.at_risk import check_keep
from workers.merging.base_plan import BasePlan
from workers.merging.gguf_storage import plan_file
from workers.merging.output import OutputTensor
from workers.merging.output_layout import Entry, lay_out_as_stored, output_layout, stated_of
from workers.merging.storage import BaseStorage, GivenStorage, Storage, WeightStorage, stored_alike
from workers.releases.shipment import Shipment

_WEIGHT = ".weight"
_EXPERTS = ".experts."
_ROUTERS = frozenset({"gate", "router", "modality_router", "shared_expert_gate"})
"""What modules are called that weigh experts, or what these are in: servers have those as numbers alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layouts:
    """Where merged numbers go, and where what ships."""

    output: CheckpointLayout
    """The shards of the release."""
    merged: CheckpointLayout
    """Merged numbers: `output` itself, or files apart, of the same names."""
    requantized: Mapping[str, StoredParts]
    """Weights that are quantized from there, by name."""
    storage: Storage | None
    """What they are quantized to; None where a release is plain numbers."""


def layouts(
    base: BasePlan, request: MergeRequest, tensors: Sequence[OutputTensor], changed: Collection[str], shipment: Shipment
) -> Layouts:
    """Lay out what a request asks for.

    Args:
        base: planned.
        request: settled.
        tensors: of the merged model.
        changed: names of those that an adapter changes, or that come apart from others.
        shipment: the files that the release takes over.

    Raises:
        UnsupportedError: the release cannot be stored in the form that is asked for; says why, and what to do.
        BadInputError: vocabulary and embedding contradict each other.
    """
    if request.output.is_gguf:
        storage, file = plan_file(base, request, tensors, shipment)
        merged, made_anew = output_layout(base, tensors, None), storage.made_anew
        return Layouts(output=CheckpointLayout((file,)), merged=merged, requantized=made_anew, storage=storage)
    if request.output is OutputForm.AS_BASE:
        found = _as_base(base, request, tensors, changed)
    else:
        merged = output_layout(base, tensors, request.max_shard_size)
        if request.output is OutputForm.PLAIN:
            return Layouts(output=merged, merged=merged, requantized={}, storage=None)
        found = _in_form(base, request, tensors, merged)
    assert isinstance(found.storage, WeightStorage)
    check_keep(base, request, found.storage, [name for name in found.requantized if name in changed])
    return found


def _as_base(
    base: BasePlan, request: MergeRequest, tensors: Sequence[OutputTensor], changed: Collection[str]
) -> Layouts:
    """Lay out every stored tensor of the base, and what comes apart; apart, what the base has no bytes of."""
    place, form = base.source.directory, base.form
    if form is None:
        raise UnsupportedError(
            f"{place}: the base is stored as plain numbers, so output: as_base says nothing; leave output out"
        )
    requantized = {name: parts for name, parts in base.in_form.items() if name in changed}
    if requantized and not isinstance(form, QuantizingForm):
        raise UnsupportedError(
            f"{place}: the adapter changes {next(iter(requantized))}, which is stored in {form.words}, and merged "
            "weights are not quantized to that form again; request output: 16bit, and quantize that release by the "
            "form's own tool"
        )
    specs = {name: spec for name, (_, spec) in base.layout.tensors.items()}
    made: dict[str, PartLayout] = {}
    stored: dict[str, Sequence[Entry]] = {}
    for tensor in tensors:
        name, parts = tensor.name, base.in_form.get(tensor.name)
        if parts is None:
            stored[name] = [(name, tensor.dtype, tensor.shape)]
        elif name not in requantized:
            stored[name] = [(part, specs[part].dtype, specs[part].shape) for part in parts.names]
        else:
            if tensor.shape != base.by_name[name].shape:
                raise UnsupportedError(
                    f"{place}: the adapter makes {name} {list(tensor.shape)}, and in {form.words} it stays "
                    f"{list(base.by_name[name].shape)}; request output: 16bit"
                )
            assert isinstance(form, QuantizingForm)
            made |= form.requantized(name, parts, specs)
            stored[name] = [(part, *made[part]) for part in parts.names]
    # In the files and the order of the base: parts of one weight may lie apart.
    where = {spec.name: shard.name for shard in base.layout.shards for spec in shard.tensors}
    by_shard: dict[str, list[Entry]] = {shard.name: [] for shard in base.layout.shards}
    for tensor in tensors:
        for entry in stored[tensor.name]:
            by_shard[where.get(entry[0], tensor.shard)].append(entry)
    # A weight that is kept in more bits takes those with it that no adapter changes: they need their numbers.
    alike = stored_alike(base.in_form) if request.keep else {}
    with_others = {*changed, *(each for name in requantized for each in alike.get(name, ()))}
    numbers = [tensor for tensor in tensors if tensor.name in with_others or tensor.name not in base.by_name]
    return Layouts(
        output=CheckpointLayout(tuple(_as_before(base, name, group) for name, group in by_shard.items())),
        merged=lay_out_as_stored(base, numbers),
        requantized=requantized,
        storage=BaseStorage(base=base, form=form, layout=made),
    )


def _as_before(base: BasePlan, name: str, tensors: Sequence[Entry]) -> ShardLayout:
    """Return the layout of a shard: the base's own, where it holds the same."""
    before = next(shard for shard in base.layout.shards if shard.name == name)
    if {spec.name: (spec.dtype, spec.shape) for spec in before.tensors} == {each: tuple(is_) for each, *is_ in tensors}:
        return before
    return lay_out_shard(name, tensors, stated=stated_of(base))


def _in_form(
    base: BasePlan, request: MergeRequest, tensors: Sequence[OutputTensor], merged: CheckpointLayout
) -> Layouts:
    """Lay out the linear weights of the text model in a form, and all else as numbers."""
    dtype = TORCH_DTYPES[request.dtype] if request.dtype else config_dtype(base.source.directory)
    output = CompressedOutput.of(request.output, dtype)
    linear = _linear_weights(base)
    taken = {tensor.name: tensor for tensor in tensors if tensor.name in linear and output.takes(tensor.shape)}
    place = base.source.directory
    if fused := next((tensor.name for tensor in tensors if _EXPERTS in tensor.name and len(tensor.shape) == 3), None):
        raise UnsupportedError(
            f"{place}: tensor {fused} holds all experts of a layer at once, and {output.words} has them one by one; "
            "request output: 16bit, and quantize that release by a tool that knows this model"
        )
    if not taken:
        raise UnsupportedError(
            f"{place}: its text model has no torch.nn.Linear whose rows {output.words} takes; request output: 16bit"
        )
    for tensor in taken.values():
        if tensor.dtype != dtype:
            raise UnsupportedError(
                f"{place}: tensor {tensor.name} is {tensor.dtype} in a model of {dtype}; request a dtype"
            )
    parts = {name: output.parts(name, tensor.shape) for name, tensor in taken.items()}
    shards = []
    for shard in merged.shards:
        entries: list[Entry] = []
        for spec in shard.tensors:
            of_form = parts[spec.name][1] if spec.name in parts else {spec.name: (spec.dtype, spec.shape)}
            entries += [(name, *each) for name, each in of_form.items()]
        shards.append(lay_out_shard(shard.name, entries, stated=stated_of(base)))
    ignored = modules_as_numbers(base, tensors, taken)
    in_form = {name: found for name, (found, _) in parts.items()}
    storage = GivenStorage(
        output=output,
        form=output.form(ignored),
        in_form=in_form,
        declaration=output.declaration(ignored),
    )
    return Layouts(output=CheckpointLayout(tuple(shards)), merged=merged, requantized=in_form, storage=storage)


def _linear_weights(base: BasePlan) -> frozenset[str]:
    """Return the stored weights of linear modules in the text model, single experts included; its head is in none.

    Raises:
        UnsupportedError: the model does not continue text.
    """
    model = base.skeleton()
    if not base.answers_prompts:
        raise UnsupportedError(
            f"{base.source.directory}: its model does not continue text, and only such are stored in other forms; "
            "request output: 16bit"
        )
    decoder = model.get_decoder()
    # Of some models that is a whole language model, with its head.
    inside = {*decoder.modules()} - {each.get_output_embeddings() for each in (model, decoder)}
    names = {
        f"{name}{_WEIGHT}"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module in inside and not _ROUTERS.intersection(name.split("."))
    }
    conversions = base.conversions
    single = {conversions.stored_names[name] for name in names if name in conversions.stored_names}
    experts = {stored for group in conversions.groups for stored in group.stored if _EXPERTS in stored}
    return frozenset(single | {name for name in experts if name.endswith(_WEIGHT)})


def modules_as_numbers(base: BasePlan, tensors: Sequence[OutputTensor], taken: Collection[str]) -> list[str]:
    """Return the modules with a matrix for weight that is stored as numbers, by all of their names.

    Files and model may name one differently, or have no file name for it, as for a head that is tied; servers go by the
    names in files, transformers by those in the model, and would make random scales for what it takes to be in codes.

    Args:
        base: planned.
        tensors: of the release.
        taken: names of its weights that are stored in the form.
    """
    matrices = (tensor.name for tensor in tensors if len(tensor.shape) == 2 and tensor.name.endswith(_WEIGHT))
    stored = [name.removesuffix(_WEIGHT) for name in matrices if name not in taken and name != base.embedding]
    names = base.conversions.stored_names
    linear = (name for name, module in base.skeleton().named_modules() if isinstance(module, nn.Linear))
    in_model = [name for name in linear if names.get(f"{name}{_WEIGHT}") not in taken]
    return list(dict.fromkeys((*stored, *in_model)))
