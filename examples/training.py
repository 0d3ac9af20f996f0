"""Trains one small adapter with PEFT, on the CPU, in well under a minute: LoRA, or QLoRA on the base in NF4."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from examples.chat_model import load_model
from examples.chats import Habit

NUM_STEPS = 12
BATCH_SIZE = 8
LEARNING_RATE = 2e-3
RANK = 8
_STEPS_BETWEEN_WORDS = 4
_IGNORED = -100
"""Label of tokens that do not count in the loss (`torch.nn.CrossEntropyLoss`)."""


def train_adapter(
    base: Path, habit: Habit, directory: Path, *, seed: int = 0, on_step: Callable[[str], None] = lambda _: None
) -> list[float]:
    """Train an adapter for one habit and save it with PEFT.

    Args:
        base: checkpoint directory with a tokenizer that has a chat template.
        habit: what to learn, and on which base: its own 16-bit weights or those in NF4.
        directory: where the adapter goes, under its final name; made when missing.
        seed: of the adapter's initial values and of the order of the chats.
        on_step: told in words how far it is, every few steps.

    Returns:
        The loss (nats per answer token) at every step.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_model(base, quantization=habit.base_quantization)
    model.config.use_cache = False
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=NUM_STEPS)
    examples = [_encode(tokenizer, chat) for chat in habit.chats()]

    losses = []
    model.train()
    for _, batch in zip(range(NUM_STEPS), _batches(examples, tokenizer.pad_token_id), strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % _STEPS_BETWEEN_WORDS == 0:
            on_step(f"step {len(losses)} of {NUM_STEPS}, loss {losses[-1]:.2f}")
    model.save_pretrained(directory)
    return losses


def _encode(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Return the tokens of a chat, and its labels: only the last message counts."""
    asked = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    return whole, [_IGNORED] * len(asked) + whole[len(asked) :]


def _batches(examples: list[tuple[list[int], list[int]]], pad_token: int) -> Iterator[dict[str, Any]]:
    """Yield batches [BATCH_SIZE, longest] without end, each epoch in another order."""
    while True:
        order = torch.randperm(len(examples)).tolist()
        for start in range(0, len(order), BATCH_SIZE):
            chosen = [examples[index] for index in order[start : start + BATCH_SIZE]]
            longest = max(len(tokens) for tokens, _ in chosen)
            yield {
                "input_ids": torch.tensor([tokens + [pad_token] * (longest - len(tokens)) for tokens, _ in chosen]),
                "attention_mask": torch.tensor(
                    [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in chosen]
                ),
                "labels": torch.tensor([labels + [_IGNORED] * (longest - len(labels)) for _, labels in chosen]),
            }
