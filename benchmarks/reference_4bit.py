"""The merge people run for QLoRA adapters: load in 4-bit, dequantize, PEFT's merge_and_unload, save.

Usage: python -m benchmarks.reference_4bit BASE ADAPTER OUT
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    """Merge the adapter named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        arguments.base,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        device_map="cuda:0" if torch.cuda.is_available() else "cpu",
    )
    # Dequantized first: PEFT's own 4-bit merge rounds the result back to 4 bits, which erases most of the delta.
    PeftModel.from_pretrained(model.dequantize(), arguments.adapter).merge_and_unload().save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
