"""The front of a GGUF file: all that stands before its tensors, by the `gguf` package's own writer.

Shapes and types are known beforehand, so the front is written before any number is made, and every offset with it.
"""

import functools
import io
import logging
from collections import Counter
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFType, LlamaFileType
from gguf.gguf_writer import WriterState
from gguf.utility import size_label

from workers.bases.gguf_files.tensors import GgufTensor
from workers.bases.gguf_files.vocabulary import Vocabulary
from workers.files.layout import ShardLayout, Stated, TensorSpec

_NUM_KEPT = 8
"""Fronts kept in memory: with their vocabularies they have megabytes, and the jobs of a pass mostly one."""
_FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}

_OF_NUMBERS = np.dtype(np.float32)

Fields = tuple[tuple[str, int | float], ...]
"""Hyperparameters: methods of `GGUFWriter`, and what they take."""


@functools.lru_cache(maxsize=_NUM_KEPT)
def lay_out_file(
    architecture: str, fields: Fields, vocabulary: Vocabulary, tensors: tuple[GgufTensor, ...]
) -> ShardLayout:
    """Return the layout of a file: its name, its front, and where each tensor is. Equal arguments give one object.

    A tensor is bytes here, with the padding that goes behind it.

    Args:
        architecture: as GGUF calls it.
        fields: its hyperparameters.
        vocabulary: its tokens.
        tensors: in the order of the file.
    """
    kind = main_kind(tensors)
    quiet = logging.getLogger("gguf.gguf_writer")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    front = io.BytesIO()
    try:
        writer = GGUFWriter(None, architecture)
        writer.add_type(GGUFType.MODEL)
        writer.add_size_label(_size_label(tensors))
        writer.add_file_type(_FILE_TYPES[kind])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for method, value in fields:
            getattr(writer, method)(value)
        vocabulary.write(writer)
        for tensor in tensors:
            # The dtype says that the shape is one of numbers; what they are stored as, the last word says.
            writer.add_tensor_info(tensor.name, tensor.shape, _OF_NUMBERS, tensor.num_bytes, raw_dtype=tensor.kind)
        # Opened by hand, in memory: planning writes no file.
        writer.fout, writer.state = [cast("io.BufferedWriter", front)], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(front, front.tell())
        alignment = writer.data_alignment
    finally:
        quiet.setLevel(level)
    specs = []
    begin = front.tell()
    for tensor in tensors:
        num_bytes = GGUFWriter.ggml_pad(tensor.num_bytes, alignment)
        stated = Stated(tensor.kind.name, tensor.shape)
        specs.append(TensorSpec(name=tensor.name, dtype=torch.uint8, shape=(num_bytes,), begin=begin, stated=stated))
        begin += num_bytes
    return ShardLayout(name=f"model-{kind.name}.gguf", header=front.getvalue(), tensors=tuple(specs))


def main_kind(tensors: Sequence[GgufTensor]) -> GGMLQuantizationType:
    """Return what most of a file is stored as."""
    num_bytes = Counter[GGMLQuantizationType]()
    for tensor in tensors:
        num_bytes[tensor.kind] += tensor.num_bytes
    return num_bytes.most_common(1)[0][0]


def _size_label(tensors: Sequence[GgufTensor]) -> str:
    """Return how large a model is, in the words of GGUF: `8B`, or `8x7B` of experts."""
    counts = [(tensor, tensor.num_elements) for tensor in tensors if tensor.sources]
    stacked = [(tensor.shape[0], number) for tensor, number in counts if len(tensor.shape) == 3]
    shared = sum(number for tensor, number in counts if len(tensor.shape) < 3)
    num_experts = stacked[0][0] if stacked else 0
    of_one = sum(number for _, number in stacked) // num_experts if stacked else 0
    return size_label(sum(number for _, number in counts), shared, of_one, num_experts)
