"""What the weights of a release are stored in: the words of `output` in a request."""

from enum import StrEnum


class OutputForm(StrEnum):
    """What the weights of a release are stored in."""

    PLAIN = "16bit"
    """Numbers: those of a base in a stored form are dequantized."""
    AS_BASE = "as_base"
    """The base's own form: what no adapter changes keeps its stored bytes, and the rest is quantized again."""
    FP8_DYNAMIC = "fp8_dynamic"
    """This and those down to nvfp4a16: schemes of compressed-tensors, which need no data. FP8, a scale for each row."""
    FP8_BLOCK = "fp8_block"
    """FP8 with a scale for each block of 128 x 128."""
    INT8_W8A16 = "int8_w8a16"
    """8-bit integers in groups of 128."""
    INT4_W4A16 = "int4_w4a16"
    """4-bit integers in groups of 128."""
    MXFP4 = "mxfp4"
    """4-bit floats in groups of 32, with a power of two for each."""
    NVFP4A16 = "nvfp4a16"
    """4-bit floats in groups of 16, with an FP8 scale for each and one of all."""
    GGUF = "gguf"
    """One GGUF file, for llama.cpp and what is built on it, with the numbers that a release in 16 bits has."""
    GGUF_Q8_0 = "gguf_q8_0"
    """One GGUF file with matrices in 8-bit integers, 32 of them with one scale."""

    @property
    def is_gguf(self) -> bool:
        """Whether a release is one GGUF file."""
        return self in (OutputForm.GGUF, OutputForm.GGUF_Q8_0)
