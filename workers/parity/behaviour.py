"""Parity, second question: does the merged checkpoint answer as base + adapter does?

Base + adapter through PEFT, not merged, continues each prompt greedily. Prompt and continuation then go through both
models, and the logits after every position are compared. Two references are asked: the base in the weights the merge
used, which gates, and the base in the other ones, for information. Reference and merged checkpoint are never in memory
together: the reference's logits wait on disk.

Two more answers of the reference say how much the first one means: that of its base without the adapter, which is what
the adapter does, and that of its weights merged and rounded by PEFT and torch, which is what a correct merge loses.

Shape suffixes: T positions, V vocabulary.
"""

import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from jobs.errors import BadInputError, MergefleetError, NotFoundError, ParityFailedError
from jobs.parity_report import BehaviourCheck
from workers.bases.model import config_dtype
from workers.files.checkpoint import read_json
from workers.files.memory import release_memory
from workers.parity.answers import summarize_answers
from workers.parity.asking import Subject, Trial, ask_reference
from workers.parity.divergence import Divergence, compare_logits
from workers.parity.foreign_models import model_of
from workers.parity.inference import RunningModel
from workers.parity.loading import Room, load_model
from workers.parity.prompts import read_prompts
from workers.parity.references import Reference, references
from workers.parity.rounded import model_dtypes, output_dtype, stored_dtypes
from workers.parity.texts import Text


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
        trials: list[Trial] = []
        for subject in subjects:
            try:
                _check_config(subject)
                dtypes = model_dtypes(subject.merged) if subject.in_form else stored_dtypes(subject.merged)
                trial = Trial(
                    subject=subject,
                    prompts=read_prompts(subject.request, subject.merged),
                    dtype=config_dtype(subject.merged) if subject.in_form else output_dtype(subject.merged),
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
            outcomes |= ask_reference(base, reference, trials, room, cancelled)
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


def _check_config(subject: Subject) -> None:
    place = subject.merged / "config.json"
    if "quantization_config" in read_json(place) and not subject.in_form:
        raise ParityFailedError(f"{place}: a merged checkpoint holds plain weights, found a quantization_config")


def _ask_merged(trial: Trial, room: Room, cancelled: Callable[[], None]) -> tuple[BehaviourCheck, ...]:
    merged, gating = trial.subject.merged, trial.answers[0]
    running = load_written(merged, trial.subject.write_plain, room)
    check_fits(merged, running, gating.strangers)
    num_prompts = len(trial.prompts.token_ids)
    continuations = [text.continuation_ids for text in gating.texts[:num_prompts]]
    found = compare_texts(running, merged, [answers.texts for answers in trial.answers], cancelled)
    divergences = [[divergence for divergence, _ in each] for each in found]
    others = [number for number, (_, continued) in enumerate(found[0][:num_prompts]) if not continued]
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


def load_written(directory: Path, write_plain: Callable[[Path], None] | None, room: Room) -> RunningModel:
    """Load a checkpoint to run.

    Args:
        directory: of it.
        write_plain: writes it as numbers into an empty directory, where transformers does not read what it is stored
            in; None where it is read as it is.
        room: where it may go; numbers are written to its scratch.
    """
    if write_plain is None:
        return load_model(directory, room)
    plain = room.scratch / "plain"
    plain.mkdir()
    write_plain(plain)
    return load_model(plain, room)


def check_fits(directory: Path, running: RunningModel, strangers: Collection[str]) -> None:
    """Check that a loaded checkpoint has every tensor of its model, and no other.

    Args:
        directory: of it.
        running: it.
        strangers: tensors that no model takes and that may be there, as the reference has them.

    Raises:
        ParityFailedError: it has not; names one.
    """
    misfits = list(running.misfits)
    # What no model takes is copied from the base; it has no other.
    if unknown := sorted(running.strangers.difference(strangers)):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        misfits.append(f"unexpected keys: {unknown[0]}{more}")
    if misfits:
        raise ParityFailedError(
            f"{directory}: expected every tensor of the model and of the base, and no other, found {'; '.join(misfits)}"
        )


def compare_texts(
    running: RunningModel, directory: Path, answered: Sequence[Sequence[Text]], cancelled: Callable[[], None]
) -> list[list[tuple[Divergence, bool]]]:
    """Compare a model with references, on what each of them was asked.

    Args:
        running: the model.
        directory: of it, for messages.
        answered: for each reference, its texts; texts of one number are alike, or have other continuations.
        cancelled: raises CancelledError when the work should stop; called once per text and reference.

    Returns:
        For each reference and text, how far they are apart, and whether the model's greedy continuation is the same.

    Raises:
        ParityFailedError: the model gives logits for another vocabulary, or such as are not finite.
    """
    found: list[list[tuple[Divergence, bool]]] = [[] for _ in answered]
    for number, first in enumerate(answered[0]):
        logits_TV: torch.Tensor | None = None
        for texts, each in zip(answered, found, strict=True):
            cancelled()
            text = texts[number]
            reference_TV = text.read_logits()
            if logits_TV is None or text.input_ids != first.input_ids:
                logits_TV = running.logits(text.input_ids, text.num_positions)
            _check_logits(directory, logits_TV, reference_TV.shape[1])
            each.append((compare_logits(reference_TV, logits_TV, text.target_T), text.continued_by(logits_TV)))
    return found


def _check_logits(merged: Path, logits_TV: torch.Tensor, vocab_size: int) -> None:
    if logits_TV.shape[1] != vocab_size:
        raise ParityFailedError(f"{merged}: expected logits for {vocab_size} tokens, found {logits_TV.shape[1]}")
    if not logits_TV.isfinite().all():
        raise ParityFailedError(f"{merged}: expected finite logits, found NaN or infinity")
