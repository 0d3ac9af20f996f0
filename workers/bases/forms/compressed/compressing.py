"""Numbers made codes by compressed-tensors: scales as its observers of minima and maxima set them, then its compressor.

Shape suffixes: O output features, I input features, G groups along I, B blocks.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from workers.bases.forms.compressed.codes import compress_rows
from workers.bases.forms.compressed.group import GLOBAL_SCALE, SCALE, SHAPE, WEIGHT, ZERO_POINT, Group
from workers.numerics.kernels.elements import array
from workers.numerics.kernels.encoding import extremes

_STEP_ELEMENTS = 1 << 22
"""Weights whose scales are computed at once."""
_PACKED_ROWS = 32
"""Zero points of so many rows fill whole words, however many bits they have."""
_SCALES = {
    CompressionFormat.mxfp4_pack_quantized: torch.uint8,
    CompressionFormat.mxfp8_quantized: torch.uint8,
    CompressionFormat.nvfp4_pack_quantized: torch.float8_e4m3fn,
}
"""What scales are rounded to that are no numbers of 16 or 32 bits: codes are made for those."""
_OF_ALL_ROWS = frozenset({SHAPE, GLOBAL_SCALE})


def _group(format_: str, **weights: object) -> Group:
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    return Group.declared(format_, scheme, format_)


FP8_BY_TENSOR = _group("float-quantized", num_bits=8, type="float", strategy="tensor")
FP8_BY_CHANNEL = _group("float-quantized", num_bits=8, type="float", strategy="channel")
NVFP4 = _group("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
MXFP4 = _group("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)
"""What other forms store the same way, under names of their own."""


def compress(
    weight_OI: torch.Tensor,
    group: Group,
    scale_dtype: torch.dtype,
    of_all: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Quantize a weight as a group says, rows at a time: scales reach no further, but for what all of it shares.

    Args:
        weight_OI: in 16 or 32 bits, [O, I]; may be mapped.
        group: of the weight.
        scale_dtype: what scales are stored in. They are computed in float32, and rounded to it before they are used.
        of_all: float32 [1], in NVFP4: a global scale. It is taken where it reaches far enough, as modules that servers
            fuse (queries, keys and values) share one; a larger weight gets its own.
        codes: memory for the codes, in their dtype and shape.

    Returns:
        What the compressor gives, by what it is called in its module: codes, scales, and what goes with them.
    """
    of_scales = scale_dtype if scale_dtype.itemsize > 1 else weight_OI.dtype
    arguments = group.arguments
    if group.format in _SCALES:  # files of earlier versions do not say so, and decompressing does not ask
        arguments = arguments.model_copy(update={"scale_dtype": _SCALES[group.format]})
    shared: dict[str, torch.Tensor] = {}
    whole: tuple[torch.Tensor, torch.Tensor] | None = None
    if group.strategy is QuantizationStrategy.TENSOR:
        whole = _extremes_of_all(weight_OI)
    if group.strategy is QuantizationStrategy.TENSOR_GROUP:
        own = global_scale([weight_OI])
        # A larger one stands for smaller weights.
        shared[GLOBAL_SCALE] = own if of_all is None or own < of_all else of_all.float()
    alignment = _PACKED_ROWS if group.packs_zero_points else group.block[0]
    if codes is None:
        codes = torch.empty(group.codes_shape(*weight_OI.shape), dtype=group.codes_dtype)
    pieces, begin = [], 0
    for rows_OI in _strips(weight_OI, alignment):
        low, high = whole or _extremes(rows_OI, group)
        scales, zero_points = calculate_qparams(low, high, arguments, shared.get(GLOBAL_SCALE))
        parts = {WEIGHT: rows_OI, SCALE: scales.to(of_scales), **shared}
        if not arguments.symmetric:
            parts[ZERO_POINT] = zero_points
        pieces.append(compress_rows(parts, group, codes[begin : begin + len(rows_OI)]))
        begin += len(rows_OI)
    found = {name: _joined(name, [piece[name] for piece in pieces], group) for name in pieces[0]}
    found[group.codes] = codes
    if SHAPE in found:
        found[SHAPE] = torch.tensor(weight_OI.shape)
    return found


def global_scale(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the global scale of NVFP4 for weights that share one: float32 [1].

    Args:
        weights: in 16 or 32 bits, [O, I] each; may be mapped.
    """
    lows, highs = zip(*map(_extremes_of_all, weights), strict=True)
    scale: torch.Tensor = generate_gparam(torch.stack(lows).amin(), torch.stack(highs).amax())
    return scale


def _extremes_of_all(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    extremes = [torch.stack(torch.aminmax(rows)) for rows in _strips(weight_OI, 1)]
    lowest, highest = torch.stack(extremes).float().unbind(1)
    return lowest.amin(), highest.amax()


def _strips(weight_OI: torch.Tensor, alignment: int) -> Iterator[torch.Tensor]:
    step = max(1, _STEP_ELEMENTS // (weight_OI.shape[1] * alignment)) * alignment
    yield from weight_OI.split(step)


def _extremes(rows_OI: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest of the weights that share a scale, in the shape of the scales, in float32."""
    if group.strategy is QuantizationStrategy.BLOCK:
        return extremes_of_blocks(rows_OI, *group.block)
    return extremes_of_blocks(rows_OI, 1, group.group_size or rows_OI.shape[1])


def extremes_of_blocks(rows_OI: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest of each block of a weight, float32 [OB, IB]; of one that is cut, or zero.

    Args:
        rows_OI: in 16 or 32 bits, [O, I].
        height: rows of a block.
        width: columns of a block.
    """
    num_rows, num_columns = rows_OI.shape
    low, high = torch.empty(2, num_rows, -(-num_columns // width))
    extremes(array(rows_OI), num_columns, width, array(low), array(high))
    if height == 1:
        return low, high
    # Zeros below the last row change nothing: scales are made for zero, too.
    low, high = (torch.nn.functional.pad(each, (0, 0, 0, -num_rows % height)) for each in (low, high))
    return low.unflatten(0, (-1, height)).amin(1), high.unflatten(0, (-1, height)).amax(1)


def _joined(name: str, pieces: list[torch.Tensor], group: Group) -> torch.Tensor:
    shared = name in _OF_ALL_ROWS or (group.strategy is QuantizationStrategy.TENSOR and name in (SCALE, ZERO_POINT))
    return pieces[0] if shared else torch.cat(pieces)


def stored_as(found: Mapping[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    """Return a part in the dtype and the shape that it is stored in."""
    return found[name].to(like.dtype).reshape(like.shape)
