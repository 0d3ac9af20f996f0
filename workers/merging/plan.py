"""What a merge will do, from headers and configurations alone: no weight is read.

A base is planned once per pass, each adapter on top of it. Strict accounting is done here: every tensor of the base and
of the adapter ends up in exactly one action, or the plan fails and names it.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from jobs.errors import UnsupportedError
from jobs.kept import KeptWeight
from jobs.parity_report import CombinedAdapter, TensorCheck
from jobs.request import MergeRequest
from jobs.text import MAX_MESSAGE, shown
from workers.adapters.adapter import Adapter, LoraDelta, open_adapter
from workers.adapters.expert_files import add_to_files
from workers.adapters.fitting import fit
from workers.adapters.plain_lora import plan_lora
from workers.bases.forms import StoredParts
from workers.bases.model import TORCH_DTYPES
from workers.files.layout import CheckpointLayout
from workers.merging.assignment import all_apart, made_by_peft
from workers.merging.base_plan import BasePlan
from workers.merging.output import OutputTensor
from workers.merging.output_layout import output_tensors
from workers.merging.storage import GivenStorage, Storage
from workers.merging.stored_layouts import layouts
from workers.merging.wishes import check_wishes
from workers.releases.base_card import BaseCard, read_base_card
from workers.releases.notes import find_notes
from workers.releases.shipment import Shipment, plan_shipment
from workers.sources.fetch import Source

_FLAG_STAYS = (
    "head and embedding have values of their own by now, and config.json keeps tie_word_embeddings, as this model "
    "scales by it: transformers sees that they are apart, a loader that goes by the flag alone does not"
)


@dataclass(frozen=True)
class MergePlan:
    """One job: which tensors change and how, and where every byte of the output goes."""

    request: MergeRequest
    base: BasePlan
    adapter: Source
    opened: Adapter
    """The adapter, its configuration and headers read."""
    merge_key: str
    deltas: Mapping[str, LoraDelta]
    """What the stream lane adds, by base tensor."""
    by_peft: Mapping[str, tuple[str, ...]]
    """What the `peft` lane makes: by output tensor, names in the model of what it is made of; one, or a whole group."""
    regrouped: frozenset[str]
    """Of these, what no adapter changes, but what goes through 4 bits as a part of another weight."""
    tied: frozenset[str]
    """Names in the model of the tensors that share their values with others, merged as in the base."""
    left_alone: frozenset[str]
    """Names in the model of those that come apart from others and keep the base's values."""
    apart: bool
    """Whether some tensors that the base's configuration ties have values of their own."""
    tensors: tuple[OutputTensor, ...]
    """Of the merged model, in its order: the base's, in the shapes that the adapter makes, and what comes apart."""
    output: CheckpointLayout
    """The shards of the release."""
    merged: CheckpointLayout
    """Where merged numbers go: `output`; or, of a release in a form, files apart, of all of them, and in the base's own
    form of what the base has no bytes of."""
    requantized: Mapping[str, StoredParts]
    """Weights that are stored in the form from there, by name."""
    storage: Storage | None
    """What they are stored in; None where the release is plain numbers."""
    adapter_cards: tuple[BaseCard, ...]
    """What the model cards of its adapters say."""
    shipment: Shipment
    """The files that the release takes over."""
    notes: tuple[str, ...] = ()
    """One sentence for each thing that stops nothing and that a person should know before the release is used. They
    go into report and manifest, so they name no place of this machine."""
    kept_weights: tuple[KeptWeight, ...] = ()
    """Those that are kept in more bits than the form has, in the order of the release: known once they are merged."""

    @property
    def changed(self) -> frozenset[str]:
        """Names of the output tensors that the adapter decides."""
        return (frozenset(self.deltas) | frozenset(self.by_peft)) - self.regrouped

    @property
    def checked(self) -> tuple[str, ...]:
        """Names of the tensors of the release, in the order in which a report has them."""
        return tuple(self.output.tensors) if self.storage else tuple(tensor.name for tensor in self.tensors)

    def by_weight(self, checks: Mapping[str, TensorCheck]) -> Mapping[str, TensorCheck]:
        """Return checks of a release's tensors by what they are of: those of a weight's codes also by the weight."""
        return {
            **checks,
            **{name: checks[parts.codes] for name, parts in self.requantized.items() if parts.codes in checks},
        }

    def shard_of(self, weight: str) -> str:
        """Return the name of the file that a weight's numbers go to: that of its codes, too."""
        return self.merged.tensors[weight][0].name

    def streams(self, name: str) -> bool:
        """Whether the stream lane writes a tensor of the base, changed or not."""
        return name in self.merged.tensors and name not in self.by_peft

    @property
    def can_quantize_tiles(self) -> bool:
        """Whether a tile of merged numbers can be stored in the form of the release as soon as it is there."""
        by_rows = isinstance(self.storage, GivenStorage) and self.storage.by_tiles
        return by_rows and not self.by_peft and self.request.keep is None

    def part(self, shards: Collection[str]) -> "MergePlan":
        """Return what of this plan concerns some of the output's shards: those of whole pieces."""
        output, merged = (
            CheckpointLayout(tuple(shard for shard in layout.shards if shard.name in shards))
            for layout in (self.output, self.merged)
        )
        names = merged.tensors.keys()
        return dataclasses.replace(
            self,
            deltas={name: delta for name, delta in self.deltas.items() if name in names},
            by_peft={name: sources for name, sources in self.by_peft.items() if name in names},
            regrouped=self.regrouped & names,
            tensors=tuple(tensor for tensor in self.tensors if tensor.name in names),
            output=output,
            merged=merged,
            requantized={name: parts for name, parts in self.requantized.items() if name in names},
            kept_weights=tuple(each for each in self.kept_weights if each.weight in names),
        )

    @cached_property
    def made_of(self) -> Mapping[str, str]:
        """Output tensors of the `peft` lane that are one tensor of the model, by its name there."""
        return {sources[0]: output for output, sources in self.by_peft.items() if len(sources) == 1}

    def merges(self, module: str) -> bool:
        """Whether PEFT merges a module; it leaves alone what is streamed, and what the adapter replaces as it is."""
        prefix = f"{module}."
        return any(name.startswith(prefix) for names in self.by_peft.values() for name in names) and not any(
            delta.weight.startswith(prefix) for delta in self.deltas.values()
        )

    @property
    def weighted(self) -> tuple[tuple[Source, float], ...]:
        """The adapters as they were fetched, with their weights; a single one has the weight 1."""
        weights = [each.weight for each in self.request.weighted]
        return tuple(zip(self.adapter.parts or (self.adapter,), weights, strict=True))

    @property
    def combined(self) -> tuple[CombinedAdapter, ...] | None:
        """What the adapter was combined of, for those who read about it later; None where it was not."""
        if self.request.combination is None:
            return None
        return tuple(
            CombinedAdapter(adapter=adapter.location, adapter_digest=adapter.digest, weight=weight)
            for adapter, weight in self.weighted
        )

    @cached_property
    def kept(self) -> frozenset[str]:
        """Names of tensors whose bytes are those of the base's file, at the same place in a file of the same name.

        Only of files that are so for the most part: others are written as a whole.
        """
        stored = {shard.name: shard for shard in self.base.layout.shards}
        kept: set[str] = set()
        for shard in () if self.storage else self.output.shards:
            if stored.get(shard.name) == shard:
                same = [spec for spec in shard.tensors if self.base.by_name[spec.name].copied]
                same = [spec for spec in same if spec.name not in self.deltas and spec.name not in self.by_peft]
                if 2 * sum(spec.num_bytes for spec in same) >= shard.num_bytes:
                    kept.update(spec.name for spec in same)
        return frozenset(kept)

    @property
    def base_names(self) -> frozenset[str]:
        """Names of the base's tensors that the output takes values from."""
        conversions = self.base.conversions
        names = {name for name in self.merged.tensors if name in self.base.by_name}
        for source in itertools.chain.from_iterable(self.by_peft.values()):
            if source in conversions.group_of:
                names.update(conversions.group_of[source].stored)
            elif stored := self.base.stored_name(source):
                names.add(stored)
        return frozenset(names)

    @property
    def num_adapter_bytes(self) -> int:
        """Bytes of the adapter's tensors."""
        return self.opened.num_bytes

    @property
    def num_bytes_read(self) -> int:
        """Bytes of base and adapter that a pass of this job alone reads."""
        return self.base.layout.num_bytes + self.num_adapter_bytes

    @property
    def num_bytes_changed(self) -> int:
        """Bytes of the merged model that are computed; the rest is copied."""
        if self.storage:
            return self.merged.total_size
        return sum(t.num_bytes for t in self.tensors if t.name in self.changed or not t.copied)


def plan_merge(
    base: BasePlan, request: MergeRequest, adapter: Source, inert_fields: frozenset[str] = frozenset()
) -> MergePlan:
    """Plan one job on a planned base.

    Args:
        base: planned.
        request: of the job.
        adapter: in a local directory.
        inert_fields: of its configuration, as in `open_adapter`.

    Raises:
        NotFoundError, BadInputError, UnsupportedError: the adapter cannot be used, or does not fit the base.
    """
    request = request.settled(base.usual)
    opened = fit(
        open_adapter(adapter.directory, inert_fields, adapter.beside, adapter.notes),
        base.conversions.shapes,
        base.skeleton,
    )
    opened = add_to_files(opened, base.conversions, base.linear)
    check_wishes(base, request, opened)
    coverage = base.coverage(opened)
    apart = bool(coverage.untied or base.apart)
    if apart and base.tied_by_flag:
        coverage = all_apart(base, coverage)
    names = base.conversions.stored_names
    deltas = {names[delta.weight]: delta for delta in plan_lora(opened, coverage) if delta.weight in names}
    deltas |= opened.deltas
    changed_by_peft = made_by_peft(base, opened, coverage, frozenset(delta.weight for delta in deltas.values()))
    groups = () if base.quantization is None else base.quantization.groups
    # What is converted after it was put together has to be taken apart again, whether an adapter changes it or not.
    regrouped = {name: group.parameters for group in groups for name in group.stored if name not in changed_by_peft}
    by_peft = changed_by_peft | regrouped
    tensors = output_tensors(base, coverage, by_peft, opened.head)
    for tensor in tensors:
        if (tensor.name in deltas or tensor.name in by_peft) and tensor.dtype not in TORCH_DTYPES.values():
            raise UnsupportedError(
                f"{base.source.directory}: tensor {tensor.name} is {tensor.dtype}; merging needs float32, float16 or "
                "bfloat16 weights: request a dtype"
            )
    shipment = plan_shipment(base.source.directory, adapter.directory)
    laid_out = layouts(base, request, tensors, frozenset(deltas) | frozenset(by_peft), shipment)
    parts = adapter.parts or (adapter,)
    adapter_cards = tuple(read_base_card(part.directory) for part in parts)
    rows = [tensor.shape[0] + base.num_rows_beside for tensor in tensors if tensor.name == base.embedding]
    notes = (
        *base.source.notes,
        *_notes_of_parts(adapter, inert_fields),
        *opened.notes,
        *((_FLAG_STAYS,) if coverage.untied and not base.tied_by_flag else ()),
        *find_notes(
            request,
            base.source,
            parts,
            stored_in_form=base.form is not None,
            card=base.card,
            adapter_cards=adapter_cards,
            shipment=shipment,
            num_rows=rows[0] if rows else None,
        ),
    )
    return MergePlan(
        request=request,
        base=base,
        adapter=adapter,
        opened=opened,
        merge_key=request.merge_key(base.source.digest, adapter.digest),
        deltas=deltas,
        by_peft=by_peft,
        regrouped=frozenset(regrouped),
        tied=frozenset(coverage.tied.keys() - coverage.untied),
        left_alone=coverage.left_alone,
        apart=apart,
        tensors=tensors,
        output=laid_out.output,
        merged=laid_out.merged,
        requantized=laid_out.requantized,
        storage=laid_out.storage,
        adapter_cards=adapter_cards,
        shipment=shipment,
        notes=tuple(shown(note, MAX_MESSAGE) for note in notes),
    )


def _notes_of_parts(adapter: Source, inert_fields: frozenset[str]) -> tuple[str, ...]:
    """Return what a person should know of the adapters that one was combined of."""
    opened = (open_adapter(part.directory, inert_fields, part.beside, part.notes) for part in adapter.parts)
    notes = (note for part in opened for note in part.notes)
    return tuple(dict.fromkeys(notes))
