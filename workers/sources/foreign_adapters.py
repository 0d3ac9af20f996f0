"""Adapters that PEFT has not saved, by the names of their files and tensors."""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from jobs.errors import NotFoundError, UnsupportedError
from workers.sources.pickled import CONVERTED_WEIGHTS

MLX_WEIGHTS = "adapters.safetensors"
"""What mlx_lm calls its adapter."""
_TORCHTUNE_WEIGHTS = re.compile(r"adapter_(model|\d+)\.pt")
"""What torchtune calls an adapter in its own layout: of a run, and, in its first versions, of an epoch."""

_FOREIGN_FILES = (
    (
        "adapters.npz",
        "an adapter of MLX from before April 2024",
        "write its arrays to adapters.safetensors beside the adapter_config.json of mlx_lm, or merge it with MLX",
    ),
    (
        "*_adapters.safetensors",
        "a checkpoint from the middle of a training of MLX",
        "call the one to merge adapters.safetensors",
    ),
    ("*.gguf", "an adapter of llama.cpp", "use the adapter that it was converted from"),
    ("ggml-adapter-model.bin", "an adapter of llama.cpp", "use the adapter that it was converted from"),
    (
        "*.nemo",
        "an archive of NeMo",
        "export it with convert_nemo_to_canonical.py --hf_format of NeMo's scripts/checkpoint_converters",
    ),
    (
        "pytorch_lora_weights.*",
        "a LoRA of diffusers",
        "it belongs to an image model; merge it there (fuse_lora of diffusers)",
    ),
    *(
        (
            name,
            "called like a whole model",
            "a model that was trained whole needs no merge; if the file holds PEFT's tensors, name it as PEFT does",
        )
        for name in ("model*.safetensors", "pytorch_model*.bin", "consolidated*")
    ),
    *(
        (
            name,
            "a checkpoint of a trainer",
            "save the adapter with save_pretrained of PEFT, or have the trainer export it",
        )
        for name in ("*.pt", "*.pth", "*.ckpt", "*.distcp")
    ),
)
"""By file name: what it is, and what to do."""
_FOREIGN_TENSORS = (
    (
        re.compile(r"(lora_(unet|te\d?|transformer)|lycoris)_.*|.*\.(lora_down|lora_up)\.weight"),
        "a LoRA as kohya's sd-scripts and LyCORIS save it",
        "convert it to PEFT's format first; for an image model, merge it there (fuse_lora of diffusers)",
    ),
    (
        re.compile(
            r"(unet|text_encoder\w*|transformer)\.(.*_blocks?\.|text_model\.).*\.lora(_[AB]|\.(up|down))\.weight"
        ),
        "a LoRA of diffusers",
        "it belongs to an image model; merge it there (fuse_lora of diffusers)",
    ),
)
"""By tensor name."""


def files_of_trainers(there: Sequence[str], place: str) -> tuple[str, ...]:
    """Find the file of an adapter that is converted into PEFT's layout (`workers/adapters/trainers`).

    Args:
        there: names of the files of its directory.
        place: the directory, for messages.

    Raises:
        UnsupportedError: it is of a kind that is not converted; the message says which, and what to do.
        NotFoundError: nothing in it is called as an adapter.
    """
    if MLX_WEIGHTS in there:
        return (MLX_WEIGHTS,)
    of_torchtune = [name for name in there if _TORCHTUNE_WEIGHTS.fullmatch(name)]
    if len(of_torchtune) > 1:
        raise UnsupportedError(
            f"{place}: {of_torchtune[0]} and {of_torchtune[1]} are both adapters of torchtune, and nothing says which "
            "is the one to merge; remove the others"
        )
    if of_torchtune:
        return (of_torchtune[0],)
    for pattern, kind, advice in _FOREIGN_FILES:
        if found := fnmatch.filter(there, pattern):
            raise UnsupportedError(f"{place}: {found[0]} is {kind}; expected {CONVERTED_WEIGHTS}, of PEFT: {advice}")
    raise NotFoundError(f"{place} has no {CONVERTED_WEIGHTS}; found {', '.join(there[:5]) or 'nothing'}")


def foreign_kind(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Return what an adapter is that PEFT has not saved, by the names of its tensors.

    Returns:
        A tensor that tells, what the adapter is, and what to do; None where no tensor tells.
    """
    for name in sorted(names):
        for pattern, kind, advice in _FOREIGN_TENSORS:
            if pattern.fullmatch(name):
                return name, kind, advice
    return None
