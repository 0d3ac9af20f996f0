"""Bases of AutoAWQ: what they stand for is what compressed-tensors converts them into."""

from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.quantization import QuantizationScheme

from tests.stored import Quantized, is_linear, store

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs is at each place of a word."""


def store_awq(base: Path, directory: Path, *, group_size: int = 16, zero_point: bool = True) -> Path:
    """Store random 4-bit codes for the linear weights of a base; see `store`.

    Args:
        base: in 16 bits, in one file.
        directory: becomes the base in AWQ.
        group_size: inputs that share a scale.
        zero_point: whether there are zero points.
    """
    random = torch.Generator().manual_seed(5)
    converter = AutoAWQConverter(group_size=group_size, zero_point=zero_point)
    weights = {"num_bits": 4, "strategy": "group", "group_size": group_size, "symmetric": not zero_point}
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})

    def quantize(name: str, weight: torch.Tensor) -> Quantized:
        num_outputs, num_inputs = weight.shape
        module, num_groups = name.removesuffix(".weight"), num_inputs // group_size
        parts = {
            f"{module}.qweight": pack(torch.randint(0, 16, (num_inputs, num_outputs), generator=random)),
            f"{module}.scales": (torch.rand(num_groups, num_outputs, generator=random) * 0.02).half(),
        }
        if zero_point:
            parts[f"{module}.qzeros"] = pack(torch.randint(0, 16, (num_groups, num_outputs), generator=random))
        converted = {part.rpartition(".")[2]: tensor for part, tensor in converter.process(dict(parts)).items()}
        numbers = BaseCompressor.get_value_from_registry("pack-quantized").decompress(converted, scheme)["weight"]
        return parts, numbers.to(weight.dtype)

    declared = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": zero_point}
    return store(base, directory, quantize, declared, takes=is_linear)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes [I, O] into words of eight, in the order of AutoAWQ."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place, output in enumerate(_ORDER):
        words |= codes[:, output::8] << (4 * place)
    return torch.where(words >= 2**31, words - 2**32, words).int()
