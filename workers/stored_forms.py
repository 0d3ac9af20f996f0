"""The forms in which bases store their weights other than in plain numbers: what betrays one, and what to do about it.

Merged are weights stored in 16 or 32 bits, and those of bitsandbytes in 4 bits. In all other forms a weight is a code
that means nothing without its scales: such a base is refused, whatever else is asked of it, and called by its name.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import BadInputError, UnsupportedError
from workers.checkpoint import read_json

_NAME_PLAIN = (
    "mergefleet reads safetensors in 16 or 32 bits, or in 4 bits by bitsandbytes: name such a base if its maker "
    "publishes one"
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

DECLARING_FIELDS = ("quantization_config", "compression_config")
DECLARING_FILES: Mapping[str, str] = {
    "hf_quant_config.json": "modelopt",
    "quant_config.json": "awq",
    "quantization_config.json": "exl2",
    "quantize_config.json": "gptq",
}
"""Files beside `config.json` that declare a form in its place, with the method of the tool that first wrote such."""
_OF_MLX = frozenset({"bits", "group_size"})
"""Fields by which MLX declares its form, without a method's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """Where a base says in which form its weights are stored."""

    place: str
    """File and field."""
    at_the_top: bool
    """Whether that is `quantization_config` of `config.json` itself."""
    method: str
    content: Mapping[str, Any]

    @property
    def form(self) -> Form:
        """The form that it declares."""
        if self.in_4bit:
            return Form("bitsandbytes 4-bit")
        return FORMS.get(self.method) or Form(self.method)

    @property
    def in_4bit(self) -> bool:
        """Whether it is the 4-bit format of bitsandbytes."""
        return self.method == "bitsandbytes" and bool(self.content.get("load_in_4bit"))


def declared_4bit(directory: Path) -> Mapping[str, Any] | None:
    """Return what a base declares of its weights in bitsandbytes 4-bit, or None where it declares nothing.

    Raises:
        UnsupportedError: it declares another form; the message names it, where it is declared, and what to do. Or it
            declares several, or in a place where nothing takes it away from a release.
        NotFoundError, BadInputError: `config.json`, or a file that declares a form, cannot be read.
    """
    found = list(_declarations(directory))
    for declared in found:
        if not declared.in_4bit:
            raise UnsupportedError(
                f"{declared.place}: declares that the weights are stored in {declared.form.words} (method "
                f"{declared.method!r}): codes that mean nothing without their scales. {declared.form.advice}. Weights "
                "that are plain numbers by now need no declaration: take it away"
            )
    if found and not found[0].at_the_top:
        raise UnsupportedError(
            f"{found[0].place}: declares weights in bitsandbytes 4-bit; expected this at the top level of config.json, "
            "as transformers writes it: move it there"
        )
    return found[0].content if found else None


def form_of_files(names: Iterable[str]) -> Form | None:
    """Return the form of a base that holds no safetensors of transformers, by the names of its files."""
    there = sorted(names)
    for ending, form in _FILES.items():
        if any(ending in name if ending.startswith("consolidated") else name.endswith(ending) for name in there):
            return form
    return None


def without_declarations(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that declares no stored form, at any depth: that of plain weights."""
    return {
        field: without_declarations(value) if isinstance(value, dict) else value
        for field, value in config.items()
        if field not in DECLARING_FIELDS
    }


def _declarations(directory: Path) -> Iterator[Declaration]:
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise BadInputError(f"{directory / 'config.json'}: expected a JSON object, found {type(config).__name__}")
    sections = [("", config)]
    for where, section in sections:
        for field, value in section.items():
            path = f"{where}{field}"
            place = f"{directory / 'config.json'}: {path}"
            content = value if isinstance(value, dict) else {}
            if field in DECLARING_FIELDS and value:
                otherwise = "compressed-tensors" if field == "compression_config" else str(value)[:80]
                method = _method(content, "mlx" if content.keys() >= _OF_MLX else otherwise)
                at_the_top = path == "quantization_config"
                yield Declaration(place=place, at_the_top=at_the_top, method=method, content=content)
            elif path == "quantization" and content.keys() >= _OF_MLX:
                yield Declaration(place=place, at_the_top=False, method="mlx", content=content)
            elif content:
                sections.append((f"{path}.", content))
    for name, otherwise in DECLARING_FILES.items():
        if not (directory / name).is_file():
            continue
        found = read_json(directory / name)
        content = found if isinstance(found, dict) else {}
        inner = content.get("quantization")
        # ModelOpt writes its file for a quantized KV cache, too, and then names no algorithm of the weights.
        if found and not (isinstance(inner, dict) and not inner.get("quant_algo")):
            yield Declaration(
                place=str(directory / name), at_the_top=False, method=_method(content, otherwise), content=content
            )


def _method(content: Mapping[str, Any], otherwise: str) -> str:
    if content.get("load_in_4bit") or content.get("load_in_8bit"):
        return "bitsandbytes"
    return str(content.get("quant_method") or otherwise).lower()
