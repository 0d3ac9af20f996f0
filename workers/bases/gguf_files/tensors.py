"""The tensors of a GGUF file: what of a model each is made of, in which order of rows, and as which bytes."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    MODEL_TENSOR_SKIP,
    TENSOR_NAMES,
    GGMLQuantizationType,
)
from gguf.quants import dequantize, quantize
from gguf.tensor_mapping import TensorNameMap, get_tensor_name_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jobs.errors import BadInputError, UnsupportedError
from jobs.output_form import OutputForm
from workers.bases.gguf_files.architectures import ADVICE, Architecture, head_size, is_scaled_as_llama3

QUANTIZED: Mapping[OutputForm, GGMLQuantizationType | None] = {
    OutputForm.GGUF: None,
    OutputForm.GGUF_Q8_0: GGMLQuantizationType.Q8_0,
}
"""What matrices are stored as, by the words of a request; None where they stay the numbers they are."""
PLAIN: Mapping[torch.dtype, GGMLQuantizationType] = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
"""Types of numbers: each has the values of a dtype, so that nothing is rounded."""
DTYPES: Mapping[GGMLQuantizationType, torch.dtype] = {kind: dtype for dtype, kind in PLAIN.items()}
_SUFFIXES = (".weight", ".bias")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_IN_FLOAT32 = frozenset({MODEL_TENSOR.FFN_GATE_INP})
"""Matrices that llama.cpp computes with as they are: its converter writes them in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor of a file."""

    name: str
    sources: tuple[str, ...]
    """The tensors of the checkpoint it is made of, one after the other; none of what is no weight."""
    shape: tuple[int, ...]
    """As torch has it: the last dimension lies in a row."""
    kind: GGMLQuantizationType
    num_heads: int | None = None
    """Of queries and keys whose rows are interleaved within each head."""
    values: tuple[float, ...] | None = None
    """Of what is no weight, in float32."""

    @property
    def words(self) -> str:
        """What it is, for messages."""
        return f"{self.kind.name} of {list(self.shape)}"

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes, padding behind it not counted."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.num_elements // block * size

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of each source; a vector is a column."""
        shape = self.shape[1:] if len(self.shape) > 2 else self.shape
        return (shape[0], shape[1]) if len(shape) > 1 else (shape[0], 1)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of that matrix."""
        num_rows, _ = self.matrix
        return self.num_bytes // (num_rows * max(1, len(self.sources)))

    @property
    def row_alignment(self) -> int:
        """Rows that are turned together: those of a head."""
        return 1 if self.num_heads is None else self.matrix[0] // self.num_heads

    @property
    def is_quantized(self) -> bool:
        """Whether it holds codes."""
        return self.kind not in DTYPES

    def interleaved(self, rows_OI: torch.Tensor) -> torch.Tensor:
        """Return rows of whole heads in the order that the file has them.

        As `LlamaModel.permute` of llama.cpp's converter: a head's halves, [2, width / 2], become pairs.
        """
        if self.num_heads is None:
            return rows_OI
        halves = rows_OI.view(-1, 2, self.row_alignment // 2, rows_OI.shape[1])
        return halves.transpose(1, 2).reshape(rows_OI.shape)

    def encode(self, rows_OI: torch.Tensor) -> torch.Tensor:
        """Return the bytes of rows, in the order that they have.

        Args:
            rows_OI: numbers; contiguous, on the CPU.

        Returns:
            uint8 [bytes].
        """
        if (dtype := DTYPES.get(self.kind)) is not None:
            return rows_OI.to(dtype).contiguous().view(-1).view(torch.uint8)
        with np.errstate(over="ignore"):  # a scale beyond float16 is infinite, which `has_finite_scales` tells
            codes = quantize(rows_OI.float().numpy(), self.kind)
        return torch.from_numpy(np.ascontiguousarray(codes)).view(-1)

    def has_finite_scales(self, data: torch.Tensor) -> bool:
        """Return whether all blocks among bytes of whole rows have a number for scale: float16, at their front."""
        if not self.is_quantized:
            return True
        _, size = GGML_QUANT_SIZES[self.kind]
        scales = data.view(-1, size)[:, :2].contiguous().view(torch.float16)
        return bool(scales.isfinite().all())

    def decode(self, data: torch.Tensor) -> torch.Tensor:
        """Return what bytes of whole rows stand for.

        Args:
            data: uint8 [bytes].

        Returns:
            [rows, columns] in the file's dtype of numbers; of codes, float32.
        """
        _, num_columns = self.matrix
        if (dtype := DTYPES.get(self.kind)) is not None:
            return data.view(dtype).view(-1, num_columns)
        return torch.from_numpy(dequantize(data.view(-1, self.row_bytes).numpy(), self.kind))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTensor:
    """A tensor of the merged checkpoint, as far as a file wants to know it."""

    stored: str
    """Its name in the checkpoint."""
    name: str
    """In the model, where that has it as it is."""
    shape: tuple[int, ...]
    dtype: torch.dtype


def tensors_of(
    place: Path, row: Architecture, config: Any, found: Sequence[ModelTensor], quantized: GGMLQuantizationType | None
) -> tuple[GgufTensor, ...]:
    """Return the tensors of a file.

    Args:
        place: of the base, for messages.
        row: of its architecture.
        config: as transformers reads it.
        found: all tensors of the merged checkpoint.
        quantized: what matrices are stored as; None where they stay numbers.

    Raises:
        UnsupportedError: a tensor has no name in such a file, or a file lacks one; says what to do.
    """
    names = get_tensor_name_map(row.arch, config.num_hidden_layers)
    made: dict[str, GgufTensor] = {}
    if row.has_llama3_rope and is_scaled_as_llama3(config):
        made |= {each.name: each for each in (_rope_factors(config),)}
    heads = {MODEL_TENSOR.ATTN_Q: config.num_attention_heads, MODEL_TENSOR.ATTN_K: config.num_key_value_heads}
    experts: dict[str, dict[int, ModelTensor]] = defaultdict(dict)
    for tensor in found:
        if (match := _EXPERT.fullmatch(tensor.stored)) is not None:
            name = _name(place, names, tensor, f"{match[1]}.{match[3]}.weight")
            experts[name][int(match[2])] = tensor
            continue
        kind = names.get_type(tensor.name, _SUFFIXES)
        if kind in MODEL_TENSOR_SKIP.get(row.arch, ()):
            continue  # tables that llama.cpp computes
        name = _name(place, names, tensor, tensor.name)
        made[name] = GgufTensor(
            name=name,
            sources=(tensor.stored,),
            shape=tensor.shape,
            kind=_kind(tensor, quantized) if _is_matrix(name, kind, tensor) else GGMLQuantizationType.F32,
            num_heads=heads.get(kind) if row.is_permuted and kind is not None else None,
        )
    for name, by_number in experts.items():
        made |= _stack(place, name, by_number, config, quantized)
    lacking = [f"blk.{block}.{part}" for block in range(config.num_hidden_layers) for part in row.required]
    lacking = [name for name in ("token_embd.weight", "output_norm.weight", *lacking) if name not in made]
    if lacking:
        raise UnsupportedError(f"{place}: nothing in the checkpoint becomes {lacking[0]} of a GGUF file; {ADVICE}")
    return tuple(made.values())


def _name(place: Path, names: TensorNameMap, tensor: ModelTensor, key: str) -> str:
    found = names.get_name(key, _SUFFIXES)
    if found is None:
        raise UnsupportedError(f"{place}: tensor {tensor.stored} has no name in a GGUF file of its model; {ADVICE}")
    return found


def _is_matrix(name: str, kind: MODEL_TENSOR | None, tensor: ModelTensor) -> bool:
    """Whether a tensor is one that llama.cpp takes in other types than float32."""
    return len(tensor.shape) > 1 and kind not in _IN_FLOAT32 and name.endswith(".weight")


def _stack(
    place: Path,
    name: str,
    by_number: Mapping[int, ModelTensor],
    config: Any,
    quantized: GGMLQuantizationType | None,
) -> dict[str, GgufTensor]:
    """Return what the experts of a layer become: one tensor, in the order of their numbers."""
    first = by_number[min(by_number)]
    alike = {(each.shape, each.dtype) for each in by_number.values()}
    if sorted(by_number) != list(range(config.num_experts)) or len(alike) > 1:
        raise UnsupportedError(
            f"{place}: {name}: expected {config.num_experts} experts of one shape and dtype, found "
            f"{len(by_number)} of {len(alike)}; {ADVICE}"
        )
    return {
        name: GgufTensor(
            name=name,
            sources=tuple(by_number[number].stored for number in sorted(by_number)),
            shape=(len(by_number), *first.shape),
            kind=_kind(first, quantized),
        )
    }


def _kind(tensor: ModelTensor, quantized: GGMLQuantizationType | None) -> GGMLQuantizationType:
    """Return what a matrix is stored as; one whose rows fall into no whole blocks stays numbers."""
    if tensor.dtype not in PLAIN:
        raise BadInputError(f"tensor {tensor.stored} is {tensor.dtype}, which no GGUF file holds as numbers")
    if quantized is None or tensor.shape[-1] % GGML_QUANT_SIZES[quantized][0]:
        return PLAIN[tensor.dtype]
    return quantized


def _rope_factors(config: Any) -> GgufTensor:
    """Return what frequencies are divided by: those without scaling over those with it, by transformers."""
    inverse, scale = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    assert scale == 1.0
    size = head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    plain = 1.0 / (config.rope_parameters["rope_theta"] ** exponents)
    factors = (plain / inverse).float()
    return GgufTensor(
        name=f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight",
        sources=(),
        shape=tuple(factors.shape),
        kind=GGMLQuantizationType.F32,
        values=tuple(factors.tolist()),
    )


def name_of(row: Architecture) -> str:
    """Return what GGUF calls an architecture."""
    return MODEL_ARCH_NAMES[row.arch]
