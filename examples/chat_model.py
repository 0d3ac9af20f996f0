"""A chat model on the CPU, and what it says: plain transformers, with PEFT on top where an adapter is not merged.

It computes in float32, which every processor is quick at; few have instructions for bfloat16, and those that have none
take ten times as long.
"""

from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

_MAX_NEW_TOKENS = 32


def load_model(
    checkpoint: Path, adapter: Path | None = None, *, quantization: Literal["none", "nf4"] = "none"
) -> PreTrainedModel | PeftModel:
    """Load a checkpoint on the CPU, in float32.

    Args:
        checkpoint: a base or a merged checkpoint.
        adapter: put on top by PEFT, not merged.
        quantization: how the checkpoint's linear weights are held.
    """
    config = None
    if quantization == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def answer(model: PreTrainedModel | PeftModel, checkpoint: Path, question: str) -> str:
    """Return the greedy answer to one question.

    Args:
        model: from `load_model`.
        checkpoint: where the tokenizer and its chat template come from.
        question: what the user says.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
