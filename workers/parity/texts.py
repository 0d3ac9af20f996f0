"""What two models that are compared both read: a prompt and the reference's continuation, or a text from outside.

The reference's logits wait on disk: the two models are never in memory together.

Shape suffixes: T positions, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from workers.files.local import file_errors

MAX_POSITIONS = 512
"""Positions compared of one text, the last ones: at least the longest continuation, and a bound on memory. As many
tokens, padding included, of texts that run together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One prompt and its continuation, at least one token each."""

    prompt_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    logits_path: Path
    """The reference's logits_TV, float32, row by row."""
    num_skipped: int = 0
    """Tokens at its beginning after which nothing is compared; all of the prompt but the last one, at most."""

    @property
    def input_ids(self) -> tuple[int, ...]:
        """All tokens but the last, which nothing follows."""
        return (*self.prompt_ids, *self.continuation_ids)[:-1]

    @property
    def num_positions(self) -> int:
        """T: positions compared."""
        return min(len(self.input_ids) - self.num_skipped, MAX_POSITIONS)

    @property
    def target_T(self) -> torch.Tensor:  # noqa: N802 - the shape is part of the name
        """The token that follows each of the compared positions."""
        return torch.tensor((*self.prompt_ids, *self.continuation_ids)[-self.num_positions :])

    def write_logits(self, logits_TV: torch.Tensor) -> None:
        """Keep the reference's logits: float32, on the CPU.

        Raises:
            NoCapacityError: the disk is full.
        """
        path = self.logits_path
        with file_errors(f"writing logits to {path}", path), path.open("wb") as file:
            file.write(logits_TV.contiguous().numpy().data)

    def read_logits(self) -> torch.Tensor:
        """Return the reference's logits_TV, mapped: their pages take no memory of the process."""
        num_values = self.logits_path.stat().st_size // torch.float32.itemsize
        values = torch.from_file(str(self.logits_path), shared=False, size=num_values, dtype=torch.float32)
        return values.view(self.num_positions, -1)

    def continued_by(self, logits_TV: torch.Tensor) -> bool:
        """Tell whether greedy search by another model gives this continuation.

        It does if that model's most likely token is the continuation's at each of its positions.

        Args:
            logits_TV: of the other model, on this text.
        """
        best_T = logits_TV[-len(self.continuation_ids) :].argmax(dim=-1)
        return tuple(best_T.tolist()) == self.continuation_ids


def batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Group texts that run together, in their order; one that is longer than `MAX_POSITIONS` runs alone."""
    batch: list[Text] = []
    for text in texts:
        longest = max(len(each.input_ids) for each in (*batch, text))
        if batch and (len(batch) + 1) * longest > MAX_POSITIONS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
