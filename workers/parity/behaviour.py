"""Parity, second question: does the merged checkpoint answer as base + adapter does?

Base + adapter through PEFT, not merged, continues each prompt greedily. Prompt and continuation then go through both
models, and the logits after every position are compared. Two references are asked: the base in the weights the merge
used, which gates, and the base in the other ones, for information. Reference and merged checkpoint are never in memory
together: the reference's logits wait on disk.

Two more answers of the reference say how much the first one means: that of its base without the adapter, which is what
the adapter does, and that of its weights merged and rounded by PEFT and torch, which is what a correct merge loses.

Shape suffixes: T positions, V vocabulary.
"""

import contextlib
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel

from jobs.errors import (
    BadInputError,
    CancelledError,
    MergefleetError,
    NoCapacityError,
    NotFoundError,
    ParityFailedError,
)
from jobs.release import BehaviourCheck
from jobs.request import MergeRequest
from workers.adapters.adapter import Adapter
from workers.bases.model import load_config
from workers.files.checkpoint import read_json
from workers.files.memory import release_memory
from workers.merging.plan import MergePlan
from workers.parity.answers import Answers, summarize_answers
from workers.parity.divergence import Divergence, compare_logits, working_bytes
from workers.parity.foreign_models import model_of
from workers.parity.inference import RunningModel
from workers.parity.loading import Room, load_model
from workers.parity.prompts import LONGEST_BUILT_IN, Prompts, read_prompts
from workers.parity.references import Reference, references
from workers.parity.rounded import merge_and_round, output_dtype, rounding_as_used, stored_dtypes
from workers.parity.texts import MAX_POSITIONS, Text, batches

logger = logging.getLogger(__name__)

_LIBRARY_BYTES = 360_000_000
"""A process that has imported torch, transformers, PEFT and bitsandbytes (CPU builds), tokenizer included."""

_BYTES_PER_TOKEN = 3
"""Of a prompt: most texts have more, so the estimate errs on the safe side."""

_BYTES_PER_ROUNDED = 14
"""Of an element of a weight that is merged and rounded: its value out of 4-bit, its delta, and their sum in 16 bits and
in 32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One merged checkpoint of a pass."""

    request: MergeRequest
    merged: Path
    """Its directory: shards, config and tokenizer, as they will ship."""
    adapter: Adapter
    streamed: bool
    """Whether the adapter does no more than to add to linear weights."""


@dataclass(slots=True, kw_only=True)
class _Trial:
    """A subject on its way through the references."""

    subject: Subject
    prompts: Prompts
    dtype: torch.dtype
    """Of most of the merged checkpoint."""
    dtypes: Mapping[str, torch.dtype]
    """Of each of its tensors, by their names in the model."""
    merge_dtypes: Mapping[str, torch.dtype]
    """That they were merged in, where PEFT did it: those of the base."""
    answers: list[Answers] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """On references that could not be asked, for the report."""


def check_behaviour(
    base: Path,
    subjects: Sequence[Subject],
    device: torch.device,
    scratch: Path,
    *,
    cancelled: Callable[[], None],
    host_bytes: int | None = None,
    beside: Sequence[Reference] | None = None,
) -> dict[str, tuple[BehaviourCheck, ...] | MergefleetError]:
    """Compare the merged checkpoints of a pass with base + adapter.

    Args:
        base: directory of the base that all subjects were merged into, the same way.
        subjects: the checkpoints; their requests agree in everything that makes a pass.
        device: where models run; what does not fit is offloaded to main memory, then to their own files.
        scratch: existing directory for logits, 4 bytes x positions x vocabulary for each prompt and held-out text,
            reference and subject; emptied again.
        cancelled: raises CancelledError when the work should stop; called between prompts and between models.
        host_bytes: main memory that weights may take; None means nine tenths of what is free.
        beside: what the checkpoints are compared with, the one that gates first; None means what their requests say.

    Returns:
        By request id: the gating check, then the informational one, which is missing where the base is stored in 4-bit
        and so has no other weights, or where those have no room or do not run, which a remark tells; or the error that
        this subject alone failed with: ParityFailedError for a merged checkpoint that does not load as it should,
        BadInputError or UnsupportedError for prompts or adapter, NoCapacityError where the gating reference has no
        room.

    Raises:
        CancelledError: by `cancelled`.
        BadInputError: the base does not load as it should.
        NoCapacityError: scratch is full.
    """
    outcomes: dict[str, tuple[BehaviourCheck, ...] | MergefleetError] = {}
    with tempfile.TemporaryDirectory(prefix="behaviour-", dir=scratch) as directory:
        room = Room(device=device, scratch=Path(directory), host_bytes=host_bytes)
        trials: list[_Trial] = []
        for subject in subjects:
            try:
                _check_config(subject.merged)
                dtypes = stored_dtypes(subject.merged)
                trial = _Trial(
                    subject=subject,
                    prompts=read_prompts(subject.request, subject.merged),
                    dtype=output_dtype(subject.merged),
                    dtypes=dtypes,
                    merge_dtypes=dtypes if subject.request.dtype is None else dtypes | stored_dtypes(base),
                )
                trials.append(trial)
            except (BadInputError, NotFoundError, ParityFailedError) as error:
                outcomes[subject.request.id] = error
        for reference in beside or references(base, subjects[0].request):
            trials = [trial for trial in trials if trial.subject.request.id not in outcomes]
            if not trials:
                break
            cancelled()
            outcomes |= _ask_reference(base, reference, trials, room, cancelled)
            release_memory()
        for trial in [trial for trial in trials if trial.subject.request.id not in outcomes]:
            cancelled()
            try:
                with model_of(trial.subject.merged, ParityFailedError):
                    outcomes[trial.subject.request.id] = _ask_merged(trial, room, cancelled)
            except ParityFailedError as error:
                outcomes[trial.subject.request.id] = error
            release_memory()
    return outcomes


def estimate_peak_bytes(plan: MergePlan) -> int:
    """Return the memory of the process at its peak, mapped file pages not counted, when models run on the CPU.

    One model at a time, in float32; weights stored in float32 stay mapped. On a machine with less than that, weights
    stay in their files; on a GPU, they take its memory instead.

    Args:
        plan: of the job; a pass of several needs no more, since adapters and merged checkpoints come one by one.
    """
    lifted = widest = largest = 0
    changed = plan.changed
    for tensor in plan.base.tensors:
        num_elements = math.prod(tensor.shape)
        mapped = tensor.stored is not None and tensor.stored.dtype == tensor.dtype == torch.float32
        lifted += 0 if mapped else num_elements
        widest += num_elements
        if tensor.name in changed:
            largest = max(largest, num_elements)
    # A 4-bit weight takes half a byte and, for every 64, a float32 scale.
    num_weight_bytes = max(4 * lifted, widest * 9 // 16)
    parity = plan.request.parity
    longest = (
        max(
            LONGEST_BUILT_IN,
            *(len(prompt.encode()) for prompt in parity.prompts),
            *(len((text.prompt + text.completion).encode()) for text in parity.texts),
        )
        // _BYTES_PER_TOKEN
    )
    vocab_size: int = load_config(plan.base.source.directory).get_text_config().vocab_size
    num_logit_bytes = 3 * 4 * vocab_size * min(longest + parity.max_new_tokens, MAX_POSITIONS)
    adapter = plan.opened
    num_replaced_bytes = sum(4 * math.prod(t.shape) for t in adapter.tensors.values() if t.name in adapter.beside)
    num_rounding_bytes = _BYTES_PER_ROUNDED * largest
    return (
        _LIBRARY_BYTES
        + num_weight_bytes
        + plan.num_adapter_bytes
        + num_replaced_bytes
        + max(num_logit_bytes + working_bytes(vocab_size), num_rounding_bytes)
    )


def _check_config(merged: Path) -> None:
    if "quantization_config" in read_json(merged / "config.json"):
        raise ParityFailedError(
            f"{merged / 'config.json'}: a merged checkpoint holds plain weights, found a quantization_config"
        )


def _ask_reference(
    base: Path, reference: Reference, trials: Sequence[_Trial], room: Room, cancelled: Callable[[], None]
) -> dict[str, MergefleetError]:
    """Add what one reference says to each trial; return the errors of those that failed alone."""
    errors: dict[str, MergefleetError] = {}
    running: RunningModel | None = None
    # What only adds to linear weights fits on 4-bit ones and comes off again: one loaded base serves all of those.
    for number, trial in enumerate(sorted(trials, key=lambda trial: not trial.subject.streamed)):
        cancelled()
        directory = room.scratch / f"{'gating' if reference.gates else 'other'}-{number}"
        directory.mkdir()
        try:
            if running is None or not trial.subject.streamed:
                running = None
                release_memory()
                with model_of(base, BadInputError):
                    running = _load_reference(base, reference, room, dequantize=not trial.subject.streamed)
            with model_of(base, BadInputError):
                trial.answers.append(_answer(running, reference, trial, directory, cancelled))
        except CancelledError:
            raise
        except MergefleetError as error:
            if not reference.gates:
                logger.warning("no comparison for information", extra={"base": str(base), "error": str(error)})
                why = "has no room here" if isinstance(error, NoCapacityError) else "does not run, and the log says why"
                trial.remarks.append(f"There is no comparison for information: {reference.words} {why}.")
            elif isinstance(error, NoCapacityError if running is None else BadInputError):
                errors[trial.subject.request.id] = error
            else:
                raise
            running = None  # the adapter may be half on it
    return errors


def _load_reference(base: Path, reference: Reference, room: Room, *, dequantize: bool) -> RunningModel:
    running = load_model(base, room, reference.quantization, dequantize=dequantize)
    if running.misfits:
        raise BadInputError(f"{base}: the base does not fit its own configuration: {'; '.join(running.misfits)}")
    if dequantize and running.offloaded:
        raise NoCapacityError(
            f"{base}: the adapter looks at the weights it changes, and the base does not fit into memory; use a larger "
            "worker, or parity level: arithmetic"
        )
    return running


def _answer(
    running: RunningModel,
    reference: Reference,
    trial: _Trial,
    directory: Path,
    cancelled: Callable[[], None],
) -> Answers:
    request, adapter = trial.subject.request, trial.subject.adapter
    prompts = trial.prompts
    texts: list[Text] = []
    effects = []
    with running.with_adapter(adapter) as worn:
        continuations = running.continue_greedily(prompts.token_ids, request.parity.max_new_tokens)
        read = [*zip(prompts.token_ids, continuations, strict=True), *prompts.held_out]
        for number, (prompt, continuation) in enumerate(read):
            cancelled()
            path = directory / f"text-{number}.f32"
            # Of what is given, nothing is compared.
            skipped = prompts.nums_shared[number] if number < len(continuations) else len(prompt) - 1
            text = Text(prompt_ids=prompt, continuation_ids=continuation, logits_path=path, num_skipped=skipped)
            logits_TV = running.logits(text.input_ids, text.num_positions)
            if not logits_TV.isfinite().all():
                raise BadInputError(
                    f"{adapter.directory}: {reference.words} gives logits that are not finite at "
                    f"{(*prompts.texts, *(text.completion for text in request.parity.texts))[number]!r}"
                )
            text.write_logits(logits_TV)
            texts.append(text)
        with worn.taken_off():
            for text in texts:
                cancelled()
                without_TV = running.logits(text.input_ids, text.num_positions)
                effects.append(compare_logits(text.read_logits(), without_TV, text.target_T))
        roundings = []
        if reference.gates:
            roundings = _ask_rounded(running, worn.model, trial, texts[: len(continuations)], cancelled)
    return Answers(
        reference=reference,
        texts=tuple(texts),
        effects=tuple(effects),
        roundings=tuple(roundings),
        strangers=running.strangers,
    )


def _ask_rounded(
    running: RunningModel,
    peft_model: PeftModel,
    trial: _Trial,
    texts: Sequence[Text],
    cancelled: Callable[[], None],
) -> list[Divergence]:
    """Return how far one correct rounding takes the reference, by text.

    An adapter that is not streamed stays merged: no other is put on this base.
    """
    subject = trial.subject
    with contextlib.ExitStack() as stack:
        if subject.streamed:
            everything = subject.request.dtype is not None
            stack.enter_context(rounding_as_used(peft_model, trial.dtypes, everything=everything))
        else:
            merge_and_round(subject.adapter, peft_model, trial.dtypes, merge_dtypes=trial.merge_dtypes)
        roundings = []
        # Weights are rounded again for each batch: the fewer, the better.
        for batch in batches(texts):
            cancelled()
            logits = running.logits_together([t.input_ids for t in batch], [t.num_positions for t in batch])
            roundings += [
                compare_logits(text.read_logits(), rounded_TV, text.target_T)
                for text, rounded_TV in zip(batch, logits, strict=True)
            ]
    return roundings


def _ask_merged(trial: _Trial, room: Room, cancelled: Callable[[], None]) -> tuple[BehaviourCheck, ...]:
    merged = trial.subject.merged
    running = load_model(merged, room)
    gating = trial.answers[0]
    misfits = list(running.misfits)
    # What no model takes is copied from the base; it has no other.
    if strangers := sorted(running.strangers - gating.strangers):
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        misfits.append(f"unexpected keys: {strangers[0]}{more}")
    if misfits:
        raise ParityFailedError(
            f"{merged}: expected every tensor of the model and of the base, and no other, found {'; '.join(misfits)}"
        )
    num_prompts = len(trial.prompts.token_ids)
    continuations = [text.continuation_ids for text in gating.texts[:num_prompts]]
    divergences: list[list[Divergence]] = [[] for _ in trial.answers]
    others: list[int] = []
    for number, first in enumerate(gating.texts):
        logits_TV: torch.Tensor | None = None
        for answers, found in zip(trial.answers, divergences, strict=True):
            cancelled()
            text = answers.texts[number]
            reference_TV = text.read_logits()
            if logits_TV is None or text.input_ids != first.input_ids:
                logits_TV = running.logits(text.input_ids, text.num_positions)
            _check_logits(merged, logits_TV, reference_TV.shape[1])
            found.append(compare_logits(reference_TV, logits_TV, text.target_T))
            if answers is gating and number < num_prompts and not text.continued_by(logits_TV):
                others.append(number)
    # Where the best token was the reference's all along, so is the continuation; only the others have to be written.
    own = running.continue_greedily(
        [trial.prompts.token_ids[number] for number in others], trial.subject.request.parity.max_new_tokens
    )
    for number, continuation in zip(others, own, strict=True):
        continuations[number] = continuation
    return tuple(
        summarize_answers(
            trial.prompts,
            answers,
            each,
            continuations,
            remarks=(*trial.prompts.remarks, *trial.remarks),
            thresholds=trial.subject.request.parity.thresholds,
            dtype=trial.dtype,
        )
        for answers, each in zip(trial.answers, divergences, strict=True)
    )


def _check_logits(merged: Path, logits_TV: torch.Tensor, vocab_size: int) -> None:
    if logits_TV.shape[1] != vocab_size:
        raise ParityFailedError(f"{merged}: expected logits for {vocab_size} tokens, found {logits_TV.shape[1]}")
    if not logits_TV.isfinite().all():
        raise ParityFailedError(f"{merged}: expected finite logits, found NaN or infinity")
