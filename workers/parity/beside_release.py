"""What a checkpoint answers beside the release it was made of: the questions, models and figures of level `full`.

The release, in its own numbers, continues each prompt greedily. The checkpoint reads the same tokens, and where it can
be had, what the release was merged into does: that is what the adapter does, to compare with. Models are never in
memory together; the release's logits wait on disk.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.errors import BadInputError, NoCapacityError, ParityFailedError
from jobs.request import MergeRequest
from workers.files.memory import release_memory
from workers.parity.asking import ask_texts
from workers.parity.behaviour import check_fits, compare_texts, load_written
from workers.parity.divergence import Divergence, total
from workers.parity.effect import RESOLUTION_KL
from workers.parity.foreign_models import model_of
from workers.parity.loading import Room, load_model
from workers.parity.prompts import Prompts, read_prompts
from workers.parity.references import references
from workers.parity.texts import Text

WritePlain = Callable[[Path], None]
"""Writes a checkpoint as numbers into an empty directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """A checkpoint that is asked."""

    directory: Path
    write_plain: WritePlain | None = None
    """Where transformers does not read what it is stored in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parties:
    """Who is asked."""

    release: Path
    """Its directory; its tokenizer reads the prompts."""
    checkpoint: Party
    """What came back."""
    base: Party | None
    """What the release was merged into; None where it cannot be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One prompt, continued by both."""

    prompt: str
    release: str
    checkpoint: str
    mean_kl: float
    """KL(release || checkpoint), nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """How a checkpoint answers beside the release; over all positions of prompts and continuations."""

    num_positions: int
    num_near_ties: int
    """Positions left out of the agreement, where the release is undecided."""
    release_nll: float
    """Negative log likelihood (nats) of a token."""
    checkpoint_nll: float
    mean_kl: float
    """KL(release || checkpoint), nats."""
    kl_p999: float
    """Its 99.9 % quantile."""
    top1_agreement: float
    """Share of positions with the same most likely token, near ties left out."""
    base_nll: float | None
    adapter_kl: float | None
    """KL(release || what it was merged into): what the adapter does; None where that cannot be asked."""
    answers: tuple[Answer, ...]
    remarks: tuple[str, ...]

    @property
    def lost_share(self) -> float | None:
        """mean_kl over adapter_kl: 1 where the checkpoint is as far from the release as the base is.

        None where the prompts show nothing of the adapter.
        """
        shown = self.adapter_kl is not None and self.adapter_kl > RESOLUTION_KL
        return self.mean_kl / self.adapter_kl if shown and self.adapter_kl else None


def ask_beside(
    parties: Parties,
    request: MergeRequest,
    device: torch.device,
    scratch: Path,
    *,
    step: Callable[[str], None],
) -> Beside:
    """Ask a release and a checkpoint that was made of it.

    Args:
        parties: who is asked.
        request: what the release was merged by: prompts, and the weights of the base.
        device: where models run.
        scratch: existing directory for logits and for what is written as numbers; emptied again.
        step: is told what is asked, before each model and each text; may raise to stop.

    Raises:
        ParityFailedError: the checkpoint does not load as it should, or its logits are none.
        BadInputError: the release does not, or its tokenizer does not fit.
        NoCapacityError: there is no room for a model, or on the disk.
    """
    release, checkpoint, base = parties.release, parties.checkpoint, parties.base
    prompts = read_prompts(request, release)
    num_new, remarks = request.parity.max_new_tokens, list(prompts.remarks)
    with tempfile.TemporaryDirectory(prefix="beside-", dir=scratch) as directory:
        rooms = [Room(device=device, scratch=Path(directory, name)) for name in ("release", "base", "checkpoint")]
        for room in rooms:
            room.scratch.mkdir()
        step("asking the release")
        with model_of(release, BadInputError):
            running = load_model(release, rooms[0])
            if running.misfits:
                raise BadInputError(f"{release}: does not fit its own configuration: {'; '.join(running.misfits)}")
            texts = ask_texts(
                running,
                prompts,
                rooms[0].scratch,
                words=str(release),
                max_new_tokens=num_new,
                completions=(),
                cancelled=lambda: step("asking the release"),
            )
        del running
        release_memory()
        effect: Divergence | None = None
        if base is not None:
            step("asking the base")
            answer = _effect(base, request, texts, rooms[1], cancelled=lambda: step("asking the base"))
            if isinstance(answer, str):
                remarks.append(f"What the adapter does was not measured: {answer}")
            else:
                effect = answer
                if effect.mean_kl <= RESOLUTION_KL:
                    remarks.append("The prompts show nothing of the adapter: only its delta tells what is left of it.")
            release_memory()
        step("asking the checkpoint")
        with model_of(checkpoint.directory, ParityFailedError):
            running = load_written(checkpoint.directory, checkpoint.write_plain, rooms[2])
            check_fits(
                checkpoint.directory, running, running.strangers
            )  # every stored tensor is accounted for elsewhere
            (found,) = compare_texts(running, checkpoint.directory, [texts], lambda: step("asking the checkpoint"))
            others = [number for number, (_, continued) in enumerate(found) if not continued]
            own = running.continue_greedily([prompts.token_ids[number] for number in others], num_new)
        del running
        release_memory()
    continued = {number: text.continuation_ids for number, text in enumerate(texts)}
    continued |= dict(zip(others, own, strict=True))
    all_of_it = total(divergence for divergence, _ in found)
    return Beside(
        num_positions=all_of_it.num_positions,
        num_near_ties=all_of_it.num_near_ties,
        release_nll=all_of_it.reference_nll,
        checkpoint_nll=all_of_it.other_nll,
        mean_kl=all_of_it.mean_kl,
        kl_p999=all_of_it.kl_p999,
        top1_agreement=all_of_it.top1_agreement,
        base_nll=None if effect is None else effect.other_nll,
        adapter_kl=None if effect is None else effect.mean_kl,
        answers=_answers(prompts, texts, continued, [divergence.mean_kl for divergence, _ in found]),
        remarks=tuple(remarks),
    )


def _effect(
    base: Party, request: MergeRequest, texts: Sequence[Text], room: Room, *, cancelled: Callable[[], None]
) -> Divergence | str:
    """Return how far the release is from what it was merged into; or why that cannot be asked."""
    gating = references(base.directory, request)[0]
    try:
        with model_of(base.directory, BadInputError):
            if base.write_plain is None:
                running = load_model(base.directory, room, gating.quantization)
            else:
                running = load_written(base.directory, base.write_plain, room)
            (found,) = compare_texts(running, base.directory, [texts], cancelled)
    except (BadInputError, ParityFailedError) as error:
        return f"the base does not answer beside the release: {error}"
    except NoCapacityError as error:
        return f"there is no room for the base: {error}"
    return total(divergence for divergence, _ in found)


def _answers(
    prompts: Prompts, texts: Sequence[Text], continued: dict[int, tuple[int, ...]], kls: Sequence[float]
) -> tuple[Answer, ...]:
    return tuple(
        Answer(
            prompt=prompt,
            release=prompts.show(text.continuation_ids),
            checkpoint=prompts.show(continued[number]),
            mean_kl=kl,
        )
        for number, (prompt, text, kl) in enumerate(zip(prompts.texts, texts, kls, strict=True))
    )
