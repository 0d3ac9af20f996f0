"""The merge most people run: the whole model in its own 16 bits, PEFT's merge_and_unload, save.

Usage: python -m benchmarks.reference_16bit BASE ADAPTER OUT
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    """Merge the adapter named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, arguments.adapter).merge_and_unload().save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
