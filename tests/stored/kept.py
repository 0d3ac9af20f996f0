"""What a release has to hold that keeps weights in more bits: by compressed-tensors and PEFT alone."""

import functools
from collections.abc import Iterator, Mapping

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import generate_gparam

from tests.stored.compressed import compress

Tensors = Mapping[str, torch.Tensor]

FORMS = {
    "fp8_dynamic": ("FP8_DYNAMIC", "float-quantized", 1),
    "fp8_block": ("FP8_BLOCK", "float-quantized", 1),
    "int8_w8a16": ("W8A16", "pack-quantized", 128),
    "int4_w4a16": ("W4A16", "pack-quantized", 128),
    "mxfp4": ("MXFP4A16", "mxfp4-pack-quantized", 32),
    "nvfp4a16": ("NVFP4A16", "nvfp4-pack-quantized", 16),
}
"""By the word of a request: the library's preset, its format, and how many weights of a row share a scale."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@functools.cache
def scheme_of(form: str) -> QuantizationScheme:
    """Return the library's scheme for the weights of a form; `8bit` is 8-bit integers with a scale for each row."""
    if form == "8bit":
        weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    else:
        weights = preset_name_to_scheme(FORMS[form][0], ["Linear"]).weights.model_dump()
    return QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})


def is_taken(name: str, weight: torch.Tensor, form: str) -> bool:
    """Whether a form takes a weight."""
    return "proj" in name and name.endswith("weight") and weight.dim() == 2 and weight.shape[1] % FORMS[form][2] == 0


def parts(name: str, merged: Tensors, form: str) -> dict[str, torch.Tensor]:
    """Return a merged weight as the library stores it."""
    shared = None
    if form == "nvfp4a16":
        module = name.split(".")[-2]
        together = next((each for each in FUSED if module in each), (module,))
        siblings = [merged[name.replace(f".{module}.", f".{each}.")].float() for each in together]
        shared = generate_gparam(min(each.min() for each in siblings), max(each.max() for each in siblings))
    format_ = "pack-quantized" if form == "8bit" else FORMS[form][1]
    return compress(name, merged[name], format_, scheme_of(form), shared)[0]


def numbers(stored: Tensors, form: str) -> torch.Tensor:
    """Return the values that parts of one weight stand for, in bfloat16."""
    format_ = "pack-quantized" if form == "8bit" else FORMS[form][1]
    compressor = BaseCompressor.get_value_from_registry(format_)
    inside = {name.rpartition(".")[2]: tensor for name, tensor in stored.items()}
    return compressor.decompress(inside, scheme_of(form))["weight"].to(torch.bfloat16)


def survival(name: str, merged: Tensors, base: Tensors, form: str) -> float | None:
    """Return how much of the delta of a weight is left in a form, in float64; None where there is no delta."""
    delta = merged[name].double() - base[name].double()
    if not delta.any():
        return None
    shipped = numbers(parts(name, merged, form), form).double()
    return float(((shipped - base[name].double()) * delta).sum() / (delta * delta).sum())


def together(name: str, merged: Tensors, form: str) -> tuple[str, ...]:
    """Return the weights that a server takes in one scheme with another."""
    taken = [each for each in merged if is_taken(each, merged[each], form)]
    if ".experts." in name:
        return tuple(each for each in taken if each.startswith(name.partition(".experts.")[0] + ".experts."))
    owner, _, module = name.removesuffix(".weight").rpartition(".")
    fused = next((each for each in FUSED if module in each), (module,))
    return tuple(f"{owner}.{each}.weight" for each in fused if f"{owner}.{each}.weight" in taken)


def kept(merged: Tensors, base: Tensors, form: str, keep: str, least: float) -> dict[str, str]:
    """Return which weights have to be kept, and in what."""
    found: dict[str, str] = {}
    for group in _lost(merged, base, form, least):
        enough = keep == "8bit" and not any(_is_lost(name, merged, base, "8bit", least) for name in group)
        found |= dict.fromkeys(group, "8bit" if enough else "16bit")
    return found


def _lost(merged: Tensors, base: Tensors, form: str, least: float) -> Iterator[tuple[str, ...]]:
    for name, weight in merged.items():
        if is_taken(name, weight, form) and _is_lost(name, merged, base, form, least):
            yield together(name, merged, form)


def _is_lost(name: str, merged: Tensors, base: Tensors, form: str, least: float) -> bool:
    left = survival(name, merged, base, form)
    return left is not None and left < least


def expected(merged: Tensors, form: str, kept_in: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return the tensors of a release: PEFT's merge, stored by the library as each weight has to be."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in merged.items():
        if not is_taken(name, weight, form) or kept_in.get(name) == "16bit":
            found[name] = weight
        else:
            found |= parts(name, merged, "8bit" if name in kept_in else form)
    return found
