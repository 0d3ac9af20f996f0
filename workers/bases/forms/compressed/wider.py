"""Weights that are kept in more bits, in the configuration of compressed-tensors: numbers are ignored, 8 bits a group.

vLLM looks for the target of a module that it has fused by the name of the module, then by its class, and by the names
of its parts only then (`find_matched_target` of vLLM's compressed_tensors/utils.py): beside a group that takes all of
class Linear, one that names the parts is never found. So where there is a second group, all name their modules.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from workers.bases.forms import Wider

_PATTERN = "re:"
_EXPERTS = ".experts."


def in_8_bits() -> QuantizationScheme:
    """Return the scheme of what is kept in 8 bits: whole numbers, a scale for each row, which takes rows of any length.

    It is packed as 4-bit integers are: vLLM has one kernel for both (`CompressedTensorsWNA16`).
    """
    weights = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
    return QuantizationScheme(targets=[], weights=weights, format=CompressionFormat.pack_quantized)


def with_wider(
    content: Mapping[str, Any],
    schemes: Mapping[str, QuantizationScheme],
    wider: Wider,
    scheme_of: Callable[[str], QuantizationScheme],
) -> dict[str, Any]:
    """Return a configuration in which some modules are ignored, or of a group of 8 bits.

    Args:
        content: of the configuration so far.
        schemes: of its groups, by their names.
        wider: what is kept in more bits.
        scheme_of: returns that of a module in codes, by its name in the files.
    """
    found = dict(content)
    found["ignore"] = list(dict.fromkeys([*(content.get("ignore") or ()), *_targets(wider.as_numbers)]))
    if not wider.in_8_bits:
        return found
    modules: dict[int, list[str]] = {}
    for weight, names in wider.in_form.items():
        modules.setdefault(id(scheme_of(weight.rpartition(".")[0])), []).extend(names)
    declared: dict[str, Any] = {}
    for name, scheme in schemes.items():
        if scheme.weights is None:
            declared[name] = _dumped(scheme, scheme.targets)
        elif id(scheme) in modules:
            others = [each for of, named in modules.items() if of != id(scheme) for each in named]
            declared[name] = _dumped(scheme, _targets(modules[id(scheme)], others))
    free = next(name for number in range(len(schemes) + 1) if (name := f"group_{number}") not in schemes)
    declared[free] = _dumped(in_8_bits(), _targets(wider.in_8_bits))
    formats = {group["format"] for group in declared.values() if group.get("format")}
    # As `ModelCompressor` of compressed-tensors says it.
    found["format"] = formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision.value
    found["config_groups"] = declared
    return found


def _dumped(scheme: QuantizationScheme, targets: Iterable[str]) -> dict[str, Any]:
    named = scheme.model_copy(update={"targets": list(targets)})
    dumped: dict[str, Any] = json.loads(named.model_dump_json(exclude_none=True))
    return dumped


def _targets(modules: Iterable[str], others: Collection[str] = ()) -> list[str]:
    """Return targets that take some modules: their names, and a pattern for all experts of a layer.

    The pattern also takes the names that servers have for experts, whatever they are called in the files: vLLM asks for
    `gate_proj`, `up_proj` and `down_proj` of the first one, SGLang for the module of all.

    Args:
        modules: by name.
        others: modules of other groups; experts of a layer that has such are named one by one.
    """
    apart = {_layer_of(name) for name in others}
    found = (
        f"{_PATTERN}{re.escape(layer)}(\\.|$)" if (layer := _layer_of(name)) and layer not in apart else name
        for name in modules
    )
    return list(dict.fromkeys(found))


def _layer_of(module: str) -> str:
    """Return the module of all experts that an expert is one of, as the model has it; nothing for other modules."""
    layer, dot, _ = module.partition(_EXPERTS)
    return layer + dot.rstrip(".") if dot else ""
