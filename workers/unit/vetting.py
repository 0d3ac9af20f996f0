"""Files from outside are tried out where time and memory are bounded, before this process works with them.

Planning and tokenizing run what files ask for: regular expressions, templates, normalizers, as many layers as a number
says. Each is run once in a bounded process (`forks.py`), and only what came to its end there is done here: it
is the same computation on the same bytes. What was tried once is not tried again.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils import GENERATION_CONFIG_NAME

from jobs.errors import BadInputError, UnsupportedError
from jobs.request import MergeRequest
from jobs.text import shown
from workers.adapters.adapter import open_adapter
from workers.adapters.config import ADAPTER_CONFIG, read_config
from workers.adapters.fitting import fit
from workers.adapters.methods import WEIGHED
from workers.adapters.wearing import match
from workers.bases.model import skeleton
from workers.files.checkpoint import read_checkpoint, read_json, read_shard
from workers.files.foreign import foreign_sha256, read_foreign
from workers.files.layout import CheckpointLayout
from workers.files.scratch import OwnedDirectory
from workers.merging.base_plan import plan_base
from workers.merging.plan import MergePlan, plan_merge
from workers.merging.sidecars import write_sidecars
from workers.parity.prompts import read_prompts
from workers.releases.shipment import shipped_files
from workers.sources.belongings import TOKENIZER_FILE, is_template, is_tokenizer
from workers.sources.fetch import Source
from workers.unit.forks import Answer, Bounds, ForkServer
from workers.unit.suspects import expressions, widest

logger = logging.getLogger(__name__)


CPU_SECONDS = 6
"""For one base, adapter or tokenizer; a base with thousands of tensors gets more. A LoRA on all of 126 blocks takes
less than three, 45,000 experts of 61 blocks less than two."""
MEMORY_BYTES = 1 << 30
"""Beyond the libraries."""
_MODULES_PER_SECOND = 200
_MOST_OF_MODULES = 2_000
_TENSORS_PER_SECOND = 10_000
_COMPARED_BYTES_PER_SECOND = 250_000_000
"""Of the largest tensor: embedding and head of a base that ties them and stores both are compared by value."""
_WEIGHED_BYTES_PER_SECOND = 1 << 20
TOKENIZER_BYTES_PER_SECOND = 4 << 20
MEMORY_PER_TOKENIZER_BYTE = 32
"""A byte-level BPE of 262,000 tokens, 13 MB, takes 450 MB and a second or two."""
_MAX_REMEMBERED = 4_096
_MAX_BUFFER_BYTES = 1 << 30
"""What a model may make of its configuration alone when it is loaded, beside its weights."""
MAX_ENTRIES = 10_000
"""Of a list or mapping in `adapter_config.json`, such as `target_modules`: each is held against every module."""
MAX_TEXT = 20_000
"""Characters of a text in `adapter_config.json`: some are regular expressions."""


def _prepare() -> None:
    """Have transformers compile its table of renamings, which takes longer than planning a merge."""
    get_checkpoint_conversion_mapping("")


server = ForkServer(_prepare)
"""Started with the first worker of this process, or the first file."""

_known: OrderedDict[str, None] = OrderedDict()


def vet_base(base: Source, request: MergeRequest) -> None:
    """Try out the planning of a base.

    Raises:
        BadInputError: it takes more than planning may; the message names what to look at.
        UnsupportedError: the libraries stumble over it.
        NotFoundError, AuthError, TransientIOError: its headers cannot be read.
    """
    key = key_of("base", request.pass_key(), base.digest)
    if key in _known:
        return
    layout = read_checkpoint(base.directory)
    path = base.directory / "config.json"
    if (base.directory / GENERATION_CONFIG_NAME).exists():
        read_json(base.directory / GENERATION_CONFIG_NAME)
    suspects, bounds = widest(read_json(path)), _bounds(layout)
    try_out(path, _plan_base, base, request, key=key, doing="planning it", suspects=suspects, bounds=bounds)


def vet_adapter(base: Source, request: MergeRequest, adapter: Source) -> None:
    """Try out the planning of one adapter on a base that was vetted.

    Adapters of one recipe, with the same tokenizer and templates, are tried out once.

    Raises:
        As `vet_base`.
    """
    path = adapter.directory / ADAPTER_CONFIG
    config = read_config(adapter.directory)
    _check_sizes(path, config)
    headers = [read_shard(each).header for each in sorted(adapter.directory.glob("*.safetensors"))]
    shipped = shipped_files(adapter.directory)
    digests = [f"{name}:{foreign_sha256(each, num_parts=name.count('/') + 1)}" for name, each in shipped.items()]
    beside = json.dumps(dict(adapter.beside))
    key = key_of("adapter", request.pass_key(), base.digest, read_foreign(path), beside, *headers, *digests)
    if key in _known:
        return
    layout = read_checkpoint(base.directory)
    suspects = ", ".join((expressions(config), *(name for name in shipped if name == TOKENIZER_FILE)))
    bounds = _bounds(layout, (*shipped.values(), *shipped_files(base.directory).values()))
    doing, method = "planning with it", config.get("peft_type")
    if isinstance(method, str) and method in WEIGHED:
        matched = key_of("match", key)
        try_out(path, _match, base, request, adapter, key=matched, doing=doing, suspects=suspects, bounds=bounds)
        # These compute with values: of a base of zeros, whose pages are never there, but which they may decompose.
        bounds = Bounds(
            cpu_seconds=bounds.cpu_seconds + layout.total_size // _WEIGHED_BYTES_PER_SECOND,
            memory_bytes=bounds.memory_bytes + 2 * layout.total_size,
        )
    try_out(path, _plan_merge, base, request, adapter, key=key, doing=doing, suspects=suspects, bounds=bounds)


def vet_planned_prompts(plan: MergePlan, scratch: Path) -> None:
    """Try out the prompts of a job on the files that its merged checkpoint will have, before anything is merged.

    Args:
        plan: of the job.
        scratch: for these files; emptied again.

    Raises:
        As `vet_base`, and BadInputError for prompts, tokenizer and model that do not go together: the message names
        the base, or the adapter where the tokenizer is its own.
    """
    shipment = plan.shipment
    files = {name: path for name, path in shipment.files.items() if is_tokenizer(name) or is_template(name)}
    own = any(is_tokenizer(name) for name in shipment.from_adapter)
    source = (plan.adapter if own else plan.base.source).directory
    place = OwnedDirectory.make(scratch, "prompts-")
    try:
        small = dataclasses.replace(plan, shipment=dataclasses.replace(shipment, files=files))
        write_sidecars(small, place.path)
        vet_prompts(plan.request, place.path, source)
        read_prompts(plan.request, place.path, str(source))
    finally:
        place.leave()


def vet_prompts(request: MergeRequest, merged: Path, source: Path) -> None:
    """Try out the tokenizer and the templates of a merged checkpoint on the prompts of a request.

    Args:
        request: its prompts.
        merged: the checkpoint.
        source: where tokenizer and configuration are from, for messages.

    Raises:
        As `vet_planned_prompts`.
    """
    names = {path: str(path.relative_to(merged)) for path in sorted(merged.rglob("*")) if path.is_file()}
    files = [path for path, name in names.items() if name == "config.json" or is_tokenizer(name) or is_template(name)]
    digests = [f"{names[path]}:{foreign_sha256(path, num_parts=names[path].count('/') + 1)}" for path in files]
    key = key_of("prompts", request.parity.model_dump_json(), *digests)
    num_bytes = sum(path.stat().st_size for path in files)
    bounds = Bounds(
        cpu_seconds=CPU_SECONDS + num_bytes // TOKENIZER_BYTES_PER_SECOND,
        memory_bytes=MEMORY_BYTES + MEMORY_PER_TOKENIZER_BYTE * num_bytes,
    )
    doing, suspects = "tokenizing the prompts", "its normalizer, pre-tokenizer, decoder or chat template"
    arguments = (request, merged, str(source))
    try_out(source, _read_prompts, *arguments, key=key, doing=doing, suspects=suspects, bounds=bounds)


def try_out(
    path: Path, function: Callable[..., None], *arguments: Any, key: str, doing: str, suspects: str, bounds: Bounds
) -> None:
    """Call a function in a bounded process, unless the same was done before.

    Args:
        path: what is tried out, for messages.
        function: of a module; returns nothing.
        arguments: of it.
        key: of what is computed and on which bytes, as `key_of` makes it.
        doing: what is done, for messages.
        suspects: what to look at where it takes too much.
        bounds: what it may take.

    Raises:
        As `vet_base`.
    """
    if key in _known:
        return
    answer: Answer = server.call(function, *arguments, bounds=bounds)
    if answer.overran:
        raise BadInputError(
            f"{shown(path)}: {doing} takes {answer.overran}, more than any sound file needs (docs/bounds.md); look at "
            f"{suspects}"
        )
    if answer.error:
        logger.warning("files that cannot be used", extra={"path": shown(path), "traceback": answer.traceback})
        raise UnsupportedError(
            f"{shown(path)}: {doing} fails in the libraries: {shown(answer.error, 500)}; the file is damaged, or of a "
            "kind that this version does not know"
        )
    _known[key] = None
    while len(_known) > _MAX_REMEMBERED:
        _known.popitem(last=False)


def _plan_base(base: Source, request: MergeRequest) -> None:
    _check_buffers(base)
    plan_base(base, request)
    if (base.directory / GENERATION_CONFIG_NAME).exists():
        try:
            GenerationConfig.from_pretrained(base.directory, local_files_only=True)
        except Exception as error:
            # It travels as it is, and no model loads beside one that cannot be read.
            raise ValueError(f"{GENERATION_CONFIG_NAME}: {type(error).__name__}: {error}") from error


def _match(base: Source, request: MergeRequest, adapter: Source) -> None:
    planned = plan_base(base, request)
    match(
        fit(open_adapter(adapter.directory, beside=adapter.beside), planned.conversions.shapes, planned.skeleton),
        planned.skeleton(),
    )


def _plan_merge(base: Source, request: MergeRequest, adapter: Source) -> None:
    plan_merge(plan_base(base, request), request, adapter)


def _read_prompts(request: MergeRequest, merged: Path, source: str) -> None:
    prompts = read_prompts(request, merged, source)
    for token_ids in prompts.token_ids:
        prompts.show(token_ids)


def _check_sizes(path: Path, config: dict[str, Any]) -> None:
    for field, value in config.items():
        if isinstance(value, list | dict) and len(value) > MAX_ENTRIES:
            raise BadInputError(
                f"{shown(path)}: field {shown(field, 80)}: expected at most {MAX_ENTRIES} entries, found {len(value)}"
            )
        texts = value if isinstance(value, list | dict) else (value,)
        longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
        if max(longest, len(field)) > MAX_TEXT:
            raise BadInputError(
                f"{shown(path)}: field {shown(field, 80)}: expected at most {MAX_TEXT} characters, found "
                f"{max(longest, len(field))}"
            )


def _check_buffers(base: Source) -> None:
    """Check that what a model makes of its configuration alone, such as tables of positions, is no more than it is."""
    model = skeleton(base.directory)
    stored = model.state_dict().keys()
    made = {
        name: math.prod(buffer.shape) * buffer.itemsize for name, buffer in model.named_buffers() if name not in stored
    }
    if sum(made.values()) > _MAX_BUFFER_BYTES:
        name = max(made, key=lambda each: made[each])
        raise MemoryError(f"{name}: {made[name]} bytes")


def _bounds(layout: CheckpointLayout, tokenizers: Iterable[Path] = ()) -> Bounds:
    # Modules are what takes time, then what is read of experts; a machine that others share may take twice as long.
    num_tensors = len(layout.tensors)
    largest = max((spec.num_bytes for _, spec in layout.tensors.values()), default=0)
    seconds = (
        CPU_SECONDS
        + min(num_tensors, _MOST_OF_MODULES) // _MODULES_PER_SECOND
        + num_tensors // _TENSORS_PER_SECOND
        + largest // _COMPARED_BYTES_PER_SECOND
        + sum(path.stat().st_size for path in tokenizers) // TOKENIZER_BYTES_PER_SECOND
    )
    # safetensors maps a shard to read its header: address space, of which nothing is touched.
    mapped = max((shard.num_bytes for shard in layout.shards), default=0)
    return Bounds(cpu_seconds=seconds, memory_bytes=MEMORY_BYTES + mapped)


def key_of(*parts: str | bytes) -> str:
    """Return a digest of several parts, whose bounds count."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
