"""Checkpoints that run: loaded by plain transformers in float32, placed where they fit, asked for logits and text.

Float32 throughout: what is left between a merged checkpoint and base + adapter is then the rounding of the merge, not
the noise of 16-bit sums, which is ten times larger (docs/decisions/0003-behavioural-parity.md). A model that does not
fit in float32 is offloaded by accelerate, straight from its safetensors files.

Shape suffixes: B texts, T positions, V vocabulary.
"""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from workers.adapters.adapter import PREFIX, Adapter
from workers.adapters.expert_files import put_on_files
from workers.adapters.resizing import resize_vocabulary
from workers.adapters.wearing import put_on
from workers.bases.model import quiet_transformers

MAX_BATCH_TOKENS = 2048
"""Prompts that are continued together, counted with their padding and what is to come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worn:
    """A model that wears an adapter, not merged."""

    model: PeftModel
    replaced: tuple[tuple[nn.Parameter, torch.Tensor], ...]
    """Parameters of the base that took values of the adapter's, with the values before."""

    @contextlib.contextmanager
    def taken_off(self) -> Iterator[None]:
        """Have the base compute alone: without what the adapter adds, and with its own values."""
        trained = [parameter.data for parameter, _ in self.replaced]
        for parameter, before in self.replaced:
            parameter.data = before
        try:
            with quiet_libraries(), self.model.disable_adapter():
                yield
        finally:
            for (parameter, _), values in zip(self.replaced, trained, strict=True):
                parameter.data = values


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningModel:
    """A model in evaluation mode, in float32."""

    model: PreTrainedModel
    device: torch.device
    """Where its inputs go and its outputs come from."""
    misfits: tuple[str, ...]
    """Tensors that the checkpoint lacks, or has in another shape; empty for a sound one."""
    strangers: frozenset[str]
    """Names of tensors in its files that the model does not take."""
    stop_ids: frozenset[int]
    """Tokens that end a continuation."""

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], num_positions: int) -> torch.Tensor:
        """Return the logits after each of the last positions.

        Args:
            token_ids: one text; runs alone, so that no padding takes part.
            num_positions: T, at most the number of tokens.

        Returns:
            logits_TV, float32, on the CPU.
        """
        logits_BTV = self._forward(torch.tensor([token_ids], device=self.device), num_positions)
        return logits_BTV[0].to(device="cpu", dtype=torch.float32)

    @torch.inference_mode()
    def logits_together(self, texts: Sequence[Sequence[int]], nums_positions: Sequence[int]) -> list[torch.Tensor]:
        """Return the logits after each of the last positions of several texts, which run together.

        For models whose weights take long to come by. Padding is on the right, where causal models do not look; it is
        masked for the others.

        Args:
            texts: token ids.
            nums_positions: T of each, at most its number of tokens.

        Returns:
            logits_TV of each, float32, on the CPU.
        """
        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=self.device)
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=self.device)
        begins = [len(text) - num_positions for text, num_positions in zip(texts, nums_positions, strict=True)]
        first = min(begins)
        logits_BTV = self._forward(ids, longest - first, mask)
        return [
            logits_BTV[row, begin - first : len(text) - first].to(device="cpu", dtype=torch.float32)
            for row, (text, begin) in enumerate(zip(texts, begins, strict=True))
        ]

    def _forward(self, ids: torch.Tensor, num_positions: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        # Most models can leave out the head at positions that are not asked about; the others compute all of them.
        options = {"logits_to_keep": num_positions, "attention_mask": mask}
        taken = inspect.signature(self.model.forward).parameters
        output = self.model(ids, use_cache=False, **{name: options[name] for name in options.keys() & taken.keys()})
        logits_BTV: torch.Tensor = output.logits[:, -num_positions:]
        return logits_BTV

    @torch.inference_mode()
    def continue_greedily(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[tuple[int, ...]]:
        """Return the most likely continuation of each prompt, token by token, up to and with a stop token.

        Prompts run together, padded on the left and masked: an offloaded model is read once per token, not once per
        token and prompt.
        """
        continuations: list[tuple[int, ...]] = []
        for batch in _batches(prompts, max_new_tokens):
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
            generate: Any = self.model.generate
            with quiet_libraries():
                output = generate(
                    ids.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=max_new_tokens
                )
            continuations += [self._cut(row) for row in output[:, longest:].tolist()]
        return continuations

    def _cut(self, token_ids: list[int]) -> tuple[int, ...]:
        stops = [index for index, token_id in enumerate(token_ids) if token_id in self.stop_ids]
        return tuple(token_ids[: stops[0] + 1] if stops else token_ids)

    @property
    def offloaded(self) -> bool:
        """Whether weights stay in their files and come to the device when they are needed."""
        return any(parameter.device.type == "meta" for parameter in self.model.parameters())

    @contextlib.contextmanager
    def with_adapter(self, adapter: Adapter) -> Iterator[Worn]:
        """Put an adapter on, through PEFT, not merged; take it off again at the end.

        Args:
            adapter: of the model's base. What it replaces, rather than adds to, stays replaced at the end.

        Yields:
            The adapter on the model; this model computes with it until the end of the context.

        Raises:
            UnsupportedError, BadInputError: adapter and base do not fit, or a tensor is missing or left over.
        """
        resize_vocabulary(self.model, adapter.num_tokens)
        names = {name.removeprefix(PREFIX).replace(".base_layer.", ".") for name in adapter.tensors}
        own = [
            (parameter, parameter.detach().clone())
            for name, parameter in self.model.named_parameters()
            if name in names
        ]
        with quiet_libraries():
            offloaded_to = self.device if self.offloaded else None
            wrapped = put_on(adapter, self.model, values=True, offloaded_to=offloaded_to)
            put_on_files(adapter, self.model)
        parameters = wrapped.model.named_parameters(remove_duplicate=False)
        taken = {id(parameter) for name, parameter in parameters if name in wrapped.loaded}
        replaced = tuple((parameter, before) for parameter, before in own if id(parameter) in taken)
        del own  # copies that the adapter has for itself leave the base's values alone
        try:
            yield Worn(model=wrapped.model, replaced=replaced)
        finally:
            wrapped.model.unload()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep notices and warnings of transformers, PEFT and accelerate away; errors still arrive as exceptions."""
    accelerate_logger = logging.getLogger("accelerate")
    level = accelerate_logger.level
    accelerate_logger.setLevel(logging.ERROR)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        accelerate_logger.setLevel(level)


def _batches(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    for prompt in prompts:
        longest = max(map(len, [*batch, prompt]))
        if batch and (len(batch) + 1) * (longest + max_new_tokens) > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch
