"""The main memory that the behavioural check takes at its peak, told before anything is loaded."""

import math

import torch

from workers.bases.model import load_config
from workers.merging.plan import MergePlan
from workers.parity.divergence import working_bytes
from workers.parity.prompts import LONGEST_BUILT_IN
from workers.parity.texts import MAX_POSITIONS

_LIBRARY_BYTES = 360_000_000
"""A process that has imported torch, transformers, PEFT and bitsandbytes (CPU builds), tokenizer included."""
_BYTES_PER_TOKEN = 3
"""Of a prompt: most texts have more, so the estimate errs on the safe side."""
_BYTES_PER_ROUNDED = 14
"""Of an element of a weight that is merged and rounded: its value out of 4-bit, its delta, and their sum in 16 bits and
in 32."""


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
