"""The form, with the groups that a base declares."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStrategy
from pydantic import ValidationError
from transformers.integrations.compressed_tensors import get_dense_scheme, get_experts_scheme

from jobs.errors import BadInputError, UnsupportedError
from workers.bases.forms import PartLayout, StoredParts, StoredWeight, Wider, as_stored
from workers.bases.forms.compressed.compressing import compress, stored_as
from workers.bases.forms.compressed.fused import refuse_fused
from workers.bases.forms.compressed.group import (
    GLOBAL_SCALE,
    ORDER,
    PACKED,
    PLAIN,
    SCALE,
    SHAPE,
    WEIGHT,
    ZERO_POINT,
    Group,
)
from workers.bases.forms.compressed.targets import Targets
from workers.bases.forms.compressed.weight import restored
from workers.bases.forms.compressed.wider import with_wider
from workers.bases.forms.refusals import nothing_stored, nothing_wider, transpose_in_codes
from workers.files.layout import TensorSpec

_PARTS = (WEIGHT, PACKED, SCALE, GLOBAL_SCALE, ZERO_POINT, SHAPE, ORDER)
_EXPERTS = ".experts."
_OF_ACTIVATIONS = tuple(
    f"{of}_{what}" for of in ("input", "output") for what in ("scale", "global_scale", "zero_point")
)
"""Beside a weight, in its module, where the scales of activations are fixed: without meaning for numbers."""


class CompressedTensors:
    """Weights in formats of compressed-tensors."""

    def __init__(
        self, place: str, content: Mapping[str, Any], config: QuantizationConfig, groups: Sequence[Group]
    ) -> None:
        """Take what is declared.

        Args:
            place: of the declaration, for messages.
            content: of it.
            config: the same, as the library reads it.
            groups: those of its groups whose weights are codes.
        """
        self.loaded_as: Mapping[str, Any] | None = {**content, "dequantize": True}
        self._place = place
        self._content = content
        self._config = config
        self._groups = groups
        self._targets = Targets(place, groups, config.ignore or ())

    @classmethod
    def declared(cls, place: str, content: Mapping[str, Any]) -> Self | None:
        """Return the form that a configuration declares; None where it quantizes activations or the KV cache alone.

        Args:
            place: of the declaration, for messages.
            content: of it.

        Raises:
            UnsupportedError: compressed-tensors does not take it, or codes and scales are not all there is to it.
        """
        try:
            config = QuantizationConfig.model_validate(dict(content))
        except (
            KeyError,
            NotImplementedError,
            TypeError,
            ValidationError,
        ) as error:  # its validators raise all of these
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": repr(error)}
            field = ".".join((place, *(str(part) for part in first["loc"] if "[" not in str(part))))
            raise UnsupportedError(
                f"{field}: compressed-tensors does not take this: {first['msg']}; name a base in another form"
            ) from error
        sparsity, transforms = (content.get(field) or {} for field in ("sparsity_config", "transform_config"))
        for field, found in (
            ("sparsity_config", sparsity != {} and _format_of(sparsity) != "dense"),
            ("transform_config", transforms != {} and _groups_of(transforms) != {}),
            ("moe_sparsity_config", config.moe_sparsity_config is not None),
        ):
            if found:
                raise UnsupportedError(
                    f"{place}.{field}: the weights are not those of the model, codes and scales aside; such a base is "
                    "not merged: name one without"
                )
        schemes = [scheme for scheme in config.config_groups.values() if scheme.weights is not None]
        groups = [Group.declared(place, scheme, config.format) for scheme in schemes]
        return cls(place, content, config, groups) if groups else None

    @property
    def words(self) -> str:
        """What people call it."""
        return f"compressed-tensors {', '.join(sorted({group.format.value for group in self._groups}))}"

    def weights(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, StoredParts]:
        """Find the weights, and check what goes with their codes; see `StoredForm`."""
        refuse_fused(specs, self.words)
        found = {}
        for module in dict.fromkeys(name.rpartition(".")[0] for name in specs):
            there = {name: specs[stored] for name in _PARTS if (stored := f"{module}.{name}") in specs}
            if all(name == WEIGHT and spec.code in PLAIN for name, spec in there.items()):
                continue
            group = self._targets.group_of(module)
            if group is None:
                raise BadInputError(
                    f"tensor {next(iter(there.values())).name} is a part of a weight in codes, and {self._place} takes "
                    f"{module} into none of its groups; the checkpoint was put together from two"
                )
            shape = group.check(module, there)
            beside = {name: spec.name for name, spec in there.items() if name != group.codes}
            beside |= {name: stored for name in _OF_ACTIVATIONS if (stored := f"{module}.{name}") in specs}
            codes = there[group.codes]
            found[f"{module}.{WEIGHT}"] = StoredParts(
                codes=codes.name, beside=beside, shape=shape, at_most=group.at_most(codes.shape)
            )
        if not found:
            raise nothing_stored(self._place, self.words, "a part of any")
        return found

    def held_bytes(self, num_elements: int) -> int:
        """Return what codes and scales take; see `StoredForm`."""
        return math.ceil(num_elements * max(group.bytes_per_weight for group in self._groups))

    def misread(self, specs: Mapping[str, TensorSpec], dtype: torch.dtype) -> str | None:
        """Name a weight that transformers 5.23 takes for one of another group, or some of whose parts it leaves out.

        It knows one group for all experts and one for all other weights, in the format that is declared, and of experts
        codes, scales and shapes alone, those in FP8 multiplied in float32; experts as numbers beside FP8 alone.
        """
        if not _takes_numbers(get_experts_scheme(self._config)):
            for name, spec in specs.items():
                if _EXPERTS in name and name.endswith(f".{WEIGHT}") and spec.code in PLAIN:
                    return f"{name}, an expert that is stored as numbers"
        for name, parts in self.weights(specs).items():
            group = self._targets.group_of(name.rpartition(".")[0])
            assert group is not None
            is_expert = _EXPERTS in name
            taken_for = get_experts_scheme(self._config) if is_expert else get_dense_scheme(self._config)
            if group.scheme is not taken_for:
                return f"{name}, and takes it for a weight of another group"
            if group.stated != group.format.value:
                return f"{name}, as its format {group.format.value} is not declared"
            is_fp8 = group.format in (CompressionFormat.float_quantized, CompressionFormat.naive_quantized)
            read = is_fp8 and group.arguments.type == "float" and group.strategy is not QuantizationStrategy.BLOCK
            read = read and specs[parts.beside[SCALE]].dtype in (torch.float32, dtype)
            read = read or group.format is CompressionFormat.mxfp4_pack_quantized
            read = read or (group.format is CompressionFormat.pack_quantized and group.arguments.symmetric)
            if is_expert and not read:
                return f"{name}, an expert in {group.format.value} by {group.strategy.value}, as it is stored"
        return None

    def restore(
        self,
        name: str,
        parts: StoredParts,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        *,
        transposed: bool,
    ) -> StoredWeight:
        """Build a weight from its parts; see `StoredForm`."""
        if transposed:
            raise transpose_in_codes(name, self.words)
        group = self._targets.group_of(name.rpartition(".")[0])
        assert group is not None
        taken = {part: tensors[stored] for part, stored in parts.beside.items() if part not in _OF_ACTIVATIONS}
        shape = tuple(taken[SHAPE].tolist()) if SHAPE in taken else parts.shape
        if shape is None or len(shape) != 2 or shape != (parts.shape or shape):
            raise BadInputError(
                f"tensor {parts.beside[SHAPE]} says {list(shape or ())}; expected {list(parts.shape or ())}, as codes "
                f"and scales of {name} are"
            )
        taken[group.codes] = codes = tensors[parts.codes]
        if group.at_most(tuple(codes.shape)) != group.at_most(group.codes_shape(shape[0], shape[1])):
            raise BadInputError(
                f"tensor {parts.codes} has shape {list(codes.shape)}; expected {list(group.codes_shape(*shape))} for "
                f"{name} {list(shape)} in {group.arguments.num_bits} bits"
            )
        return restored(taken, group, (shape[0], shape[1]), dtype)

    def requantized(self, name: str, parts: StoredParts, specs: Mapping[str, TensorSpec]) -> Mapping[str, PartLayout]:  # noqa: ARG002 - of any
        """Return what parts are stored as again: as they are; see `StoredForm`."""
        return as_stored(parts, specs)

    def quantize(
        self, name: str, parts: StoredParts, tensors: Mapping[str, torch.Tensor], weight: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """Quantize a weight again, by its group's compressor; see `StoredForm`. What fixes activations stays."""
        group = self._targets.group_of(name.rpartition(".")[0])
        assert group is not None
        second = tensors[parts.beside[GLOBAL_SCALE]] if GLOBAL_SCALE in parts.beside else None
        found = compress(weight, group, tensors[parts.beside[SCALE]].dtype, second)
        stored = {group.codes: parts.codes, **parts.beside}
        made = {stored[part]: stored_as(found, part, tensors[stored[part]]) for part in found if part in stored}
        return {**tensors, **made}

    def check_wider(self, weights: Mapping[str, StoredParts], *, in_8_bits: bool) -> None:
        """Refuse to keep weights in 8 bits that have as many, and experts that transformers loads no more then."""
        for name in weights:
            scheme = self._scheme_of(name.rpartition(".")[0])
            assert scheme.weights is not None
            if in_8_bits and scheme.weights.num_bits >= 8:
                raise nothing_wider(name, self.words)
            if _EXPERTS in name and (in_8_bits or not _takes_numbers(scheme)):
                raise UnsupportedError(
                    f"tensor {name} is one of the experts of a layer in {self.words}, and transformers loads none in "
                    "two formats, nor numbers beside packed ones: keep is not proven to load; leave keep out, or "
                    "request output: 16bit"
                )

    def declared_with(self, wider: Wider) -> Mapping[str, Any]:
        """Return the configuration with modules that are ignored, or of a group of 8 bits; see `WideningForm`."""
        return with_wider(self._content, self._config.config_groups, wider, self._scheme_of)

    def _scheme_of(self, module: str) -> QuantizationScheme:
        group = self._targets.group_of(module)
        assert group is not None
        return group.scheme


def _takes_numbers(scheme: QuantizationScheme) -> bool:
    """Whether transformers takes experts that are numbers for what they are, where others are in a scheme."""
    return scheme.weights is None or (scheme.weights.type == "float" and scheme.weights.num_bits == 8)


def _format_of(sparsity: object) -> object:
    return sparsity.get("format", "dense") if isinstance(sparsity, dict) else None


def _groups_of(transforms: object) -> object:
    return transforms.get("config_groups", {}) if isinstance(transforms, dict) else None
