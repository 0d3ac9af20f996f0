"""Forms of weights that are not merged: what people call them, and what to do with a base in one.

Merged are weights stored in 16 or 32 bits, and those of the forms in `workers/bases/forms`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_NAME_PLAIN = (
    "mergefleet reads safetensors in 16 or 32 bits, and in the forms of docs/stored-forms.md where they are declared: "
    "name such a base if its maker publishes one"
)


def _made(way: str) -> str:
    return f"{_NAME_PLAIN}; if not, make it of this one: {way}"


_BY_TRANSFORMERS = _made("transformers dequantizes while it loads, as docs/stored-forms.md shows")
_BY_ITS_LIBRARY = _made("load it with the library that wrote it, dequantize it, and save it as safetensors in 16 bits")


@dataclass(frozen=True, slots=True)
class Form:
    """One form of stored weights."""

    words: str
    """What people call it."""
    advice: str = _BY_ITS_LIBRARY
    """What to do with a base in it; names nothing that may not exist."""


FORMS: Mapping[str, Form] = {
    "aqlm": Form("AQLM"),
    "auto-round": Form("AutoRound"),
    "awq": Form("AWQ"),
    "bitnet": Form("BitNet"),
    "bitsandbytes": Form("bitsandbytes 8-bit", _BY_TRANSFORMERS),
    "compressed-tensors": Form("compressed-tensors", _BY_TRANSFORMERS),
    "eetq": Form("EETQ 8-bit"),
    "exl2": Form("EXL2 of ExLlama"),
    "exl3": Form("EXL3 of ExLlama"),
    "fbgemm_fp8": Form("FBGEMM FP8"),
    "fp8": Form("FP8, codes with a scale for each block", _BY_TRANSFORMERS),
    "gguf": Form("GGUF", _BY_TRANSFORMERS),
    "gptq": Form("GPTQ"),
    "higgs": Form("HIGGS"),
    "hqq": Form("HQQ"),
    "metal": Form("MLX for transformers", _BY_TRANSFORMERS),
    "mlx": Form("quantized MLX", _made("`mlx_lm.convert --dequantize` writes it")),
    "modelopt": Form("ModelOpt of NVIDIA"),
    "mxfp4": Form("MXFP4, blocks of 4-bit codes with a scale each", _BY_TRANSFORMERS),
    "mxfp8": Form("MXFP8", _BY_TRANSFORMERS),
    "quanto": Form("Quanto"),
    "quark": Form("Quark of AMD"),
    "spqr": Form("SpQR"),
    "torchao": Form("torchao"),
    "vptq": Form("VPTQ"),
}
"""By `quant_method`, as transformers and vLLM write it; a method that is not here is called by its own word."""

_FILES: Mapping[str, Form] = {
    "adapter_config.json": Form(
        "a PEFT adapter", "Name it as the adapter, and the model it was trained on as the base"
    ),
    "model_index.json": Form("a pipeline of diffusers", "Name the folder of one of its models as the base"),
    ".gguf": Form("GGUF", _BY_TRANSFORMERS),
    "consolidated": Form(
        "its maker's own files (consolidated.*)",
        _made(
            "the sources of transformers bring scripts that convert them (convert_mistral_weights_to_hf.py, "
            "convert_llama_weights_to_hf.py and their like)"
        ),
    ),
    ".npz": Form("arrays of NumPy, as MLX once kept them", _made("`mlx_lm.convert` writes safetensors")),
    ".h5": Form("weights of TensorFlow", _made("transformers 4 loads them (from_tf=True) and saves safetensors")),
    ".msgpack": Form("weights of Flax", _made("transformers 4 loads them (from_flax=True) and saves safetensors")),
    ".onnx": Form("a program of ONNX", _NAME_PLAIN),
    ".nemo": Form("NeMo", _made("NeMo exports it")),
    ".engine": Form("an engine of TensorRT", _NAME_PLAIN),
}
"""What a base without safetensors of transformers is, by what its files are called."""


def form_of_files(names: Iterable[str]) -> Form | None:
    """Return the form of a base that holds no safetensors of transformers, by the names of its files."""
    there = sorted(names)
    for ending, form in _FILES.items():
        if any(ending in name if ending.startswith("consolidated") else name.endswith(ending) for name in there):
            return form
    return None
