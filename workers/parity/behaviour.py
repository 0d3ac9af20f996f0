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
from collections.abc import Callable, Sequence
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
from workers.parity.loading import Room, load_model
from workers.parity.prompts import read_prompts
from workers.parity.references import Reference, references
from workers.parity.rounded import model_dtypes, output_dtype, stored_dtypes


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
    merged, write_plain = trial.subject.merged, trial.subject.write_plain
    if write_plain is None:
        running = load_model(merged, room)
    else:
        plain = room.scratch / "plain"
        plain.mkdir()
        write_plain(plain)
        running = load_model(plain, room)
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
