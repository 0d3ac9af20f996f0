"""References asked: what base + adapter answers, what the adapter does to it, and what one rounding loses."""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from peft import PeftModel

from jobs.errors import BadInputError, CancelledError, MergefleetError, NoCapacityError
from jobs.output_form import OutputForm
from jobs.request import MergeRequest
from workers.adapters.adapter import Adapter
from workers.files.memory import release_memory
from workers.merging.job import Job
from workers.merging.plain_base import is_misread, write_plain_release
from workers.parity.answers import Answers
from workers.parity.divergence import Divergence, compare_logits
from workers.parity.foreign_models import model_of
from workers.parity.inference import RunningModel
from workers.parity.loading import Room, load_model
from workers.parity.prompts import Prompts
from workers.parity.references import Reference
from workers.parity.rounded import merge_and_round, rounding_as_used
from workers.parity.texts import Text, batches

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One merged checkpoint of a pass."""

    request: MergeRequest
    merged: Path
    """Its directory: shards, config and tokenizer, as they will ship."""
    adapter: Adapter
    streamed: bool
    """Whether the adapter does no more than to add to linear weights."""
    write_plain: Callable[[Path], None] | None = None
    """Writes it as numbers into an empty directory, where transformers does not read what it is stored in."""

    @classmethod
    def of(cls, job: Job, device: torch.device) -> Self:
        """Return what a merged job has to answer for.

        Args:
            job: merged, its sidecars written.
            device: where what is stored in a form is dequantized.
        """
        plan = job.plan
        return cls(
            request=job.request,
            merged=job.directory,
            adapter=plan.opened,
            streamed=not (plan.by_peft or plan.opened.deltas),
            write_plain=functools.partial(write_plain_release, plan, job.directory, device=device)
            if is_misread(plan)
            else None,
        )

    @property
    def in_form(self) -> bool:
        """Whether its weights are stored in a form."""
        return self.request.output is not OutputForm.PLAIN


@dataclass(slots=True, kw_only=True)
class Trial:
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


def ask_reference(
    base: Path, reference: Reference, trials: Sequence[Trial], room: Room, cancelled: Callable[[], None]
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
    trial: Trial,
    directory: Path,
    cancelled: Callable[[], None],
) -> Answers:
    request, adapter = trial.subject.request, trial.subject.adapter
    prompts = trial.prompts
    effects = []
    with running.with_adapter(adapter) as worn:
        texts = ask_texts(
            running,
            prompts,
            directory,
            words=f"{adapter.directory}: {reference.words}",
            max_new_tokens=request.parity.max_new_tokens,
            completions=[text.completion for text in request.parity.texts],
            cancelled=cancelled,
        )
        with worn.taken_off():
            for text in texts:
                cancelled()
                without_TV = running.logits(text.input_ids, text.num_positions)
                effects.append(compare_logits(text.read_logits(), without_TV, text.target_T))
        roundings = []
        if reference.gates:
            roundings = _ask_rounded(running, worn.model, trial, texts[: len(prompts.token_ids)], cancelled)
    return Answers(
        reference=reference,
        texts=tuple(texts),
        effects=tuple(effects),
        roundings=tuple(roundings),
        strangers=running.strangers,
    )


def ask_texts(
    running: RunningModel,
    prompts: Prompts,
    directory: Path,
    *,
    words: str,
    max_new_tokens: int,
    completions: Sequence[str],
    cancelled: Callable[[], None],
) -> list[Text]:
    """Have a reference continue prompts, and keep what it says after each position of them and of held-out texts.

    Args:
        running: the reference.
        prompts: what is asked.
        directory: existing; its logits wait there.
        words: for the reference, in messages.
        max_new_tokens: of a continuation.
        completions: the held-out texts, as messages show them.
        cancelled: raises CancelledError when the work should stop; called once per text.

    Raises:
        BadInputError: its logits are not finite.
        NoCapacityError: the disk is full.
    """
    continuations = running.continue_greedily(prompts.token_ids, max_new_tokens)
    read = [*zip(prompts.token_ids, continuations, strict=True), *prompts.held_out]
    texts: list[Text] = []
    for number, (prompt, continuation) in enumerate(read):
        cancelled()
        path = directory / f"text-{number}.f32"
        # Of what is given, nothing is compared.
        skipped = prompts.nums_shared[number] if number < len(continuations) else len(prompt) - 1
        text = Text(prompt_ids=prompt, continuation_ids=continuation, logits_path=path, num_skipped=skipped)
        logits_TV = running.logits(text.input_ids, text.num_positions)
        if not logits_TV.isfinite().all():
            raise BadInputError(
                f"{words} gives logits that are not finite at {(*prompts.texts, *completions)[number]!r}"
            )
        text.write_logits(logits_TV)
        texts.append(text)
    return texts


def _ask_rounded(
    running: RunningModel,
    peft_model: PeftModel,
    trial: Trial,
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
