"""Codes, looked up: what compressed-tensors makes of a weight that has been divided by its scale.

What follows the division (rounding, clamping, the code itself) depends on one number alone. Of 16 bits there are 65,536
such numbers, so the library is asked once for the codes of all of them. A quotient in float32 has the code of the
bfloat16 beside it, as the numbers at which the codes of floats change have so few bits that none lies between the two.

Shape suffixes: O output features, I input features.
"""

import functools

import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import quantize

from workers.bases.forms.compressed.group import GLOBAL_SCALE, PACKED, SCALE, SHAPE, WEIGHT, ZERO_POINT, Group
from workers.numerics.kernels.elements import array
from workers.numerics.kernels.encoding import Scaling, encode

_HALF_BYTE = 4
_OF_MX = frozenset({CompressionFormat.mxfp4_pack_quantized, CompressionFormat.mxfp8_quantized})


def compress_rows(parts: dict[str, torch.Tensor], group: Group, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Do what the compressor of a group does with some rows of a weight, bit for bit.

    Args:
        parts: by what they are called in their module: the rows, in 16 or 32 bits, [O, I]; their scales; zero points
            and a global scale, where the group has such. The rows begin with a block.
        group: of the weight.
        codes: gets the codes of the rows.

    Returns:
        What goes with the codes.
    """
    rows_OI, scales = parts[WEIGHT], parts[SCALE]
    of_all = parts.get(GLOBAL_SCALE)
    divisors = scales if of_all is None else scales / of_all
    dtype = torch.result_type(rows_OI, divisors)
    if not _are_looked_up(group, dtype):
        compressed: dict[str, torch.Tensor] = group.compressor.compress(parts, group.scheme)
        codes.copy_(compressed.pop(group.codes))
        return compressed
    # The library rounds zero points to the dtype of the weight first.
    shifts = parts[ZERO_POINT].to(rows_OI.dtype).float() if ZERO_POINT in parts else torch.empty(0)
    scaling = Scaling(
        scales=array(divisors.float().contiguous()),
        multiplies=False,
        shifts=array(shifts.contiguous()),
        rounded=array(torch.empty(1, dtype=dtype)),
    )
    table = _table(group.format, group.arguments.type, group.arguments.num_bits, dtype)
    _fill(codes, rows_OI, scaling, table, group)
    found = {name: part for name, part in parts.items() if name != WEIGHT}
    if group.format is CompressionFormat.pack_quantized:
        found[SHAPE] = torch.tensor(rows_OI.shape)
    if group.packs_zero_points:
        found[ZERO_POINT] = pack_to_int32(parts[ZERO_POINT], group.arguments.num_bits, packed_dim=0)
    if group.format in _OF_MX:
        found[SCALE] = compress_mx_scale(scales, torch.uint8)
    if group.format is CompressionFormat.nvfp4_pack_quantized:
        found[SCALE] = scales.to(torch.float8_e4m3fn)
    return found


def multiplied(rows_OI: torch.Tensor, factors: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return FP8 codes of rows times factors in float32, rounded to nearest and no further than the last code.

    Args:
        rows_OI: in 16 or 32 bits, [O, I]; they begin with a block.
        factors: float32 [OB, IB].
        block: rows and columns of a block; the last ones may be cut.

    Returns:
        float8_e4m3fn [O, I].
    """
    table = _table(CompressionFormat.float_quantized, QuantizationType.FLOAT, 8, torch.float32)
    nothing = torch.empty(0)
    scaling = Scaling(
        array(factors.contiguous()), multiplies=True, shifts=array(nothing), rounded=array(factors[:1, :1])
    )
    codes_OI = torch.empty(rows_OI.shape, dtype=torch.uint8)
    encode(array(rows_OI), scaling, table.numpy(), (rows_OI.shape[1], *block), array(codes_OI))
    return codes_OI.view(torch.float8_e4m3fn)


def _are_looked_up(group: Group, quotients: torch.dtype) -> bool:
    """Whether a table holds the codes of quotients: those of integers change too often for float32."""
    if quotients is torch.float32 and group.arguments.type == QuantizationType.INT:
        return False
    return group.format is not CompressionFormat.pack_quantized or group.arguments.num_bits in (_HALF_BYTE, 8)


def _fill(codes: torch.Tensor, rows_OI: torch.Tensor, scaling: Scaling, table: torch.Tensor, group: Group) -> None:
    """Write the codes of rows, in the words that they are stored in."""
    num_rows, num_columns = rows_OI.shape
    block = {
        QuantizationStrategy.TENSOR: (num_rows, num_columns),
        QuantizationStrategy.CHANNEL: (1, num_columns),
        QuantizationStrategy.BLOCK: group.block,
    }.get(group.strategy, (1, group.group_size or num_columns))
    layout, target = (num_columns, *block), codes.view(torch.uint8)
    if target.shape[1] * (2 if _are_halves(group) else 1) == num_columns:  # no word is filled up
        encode(array(rows_OI), scaling, table.numpy(), layout, array(target))
        return
    codes_OI = torch.empty(rows_OI.shape, dtype=torch.uint8)
    encode(array(rows_OI), scaling, table.numpy(), layout, array(codes_OI))
    target.copy_(_in_words(codes_OI, group))


@functools.cache
def _table(format_: CompressionFormat, kind: str, num_bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the code of every number of 16 bits, by its bits: uint8 [65,536]."""
    each = torch.arange(1 << 16).to(torch.uint16)
    numbers = each.view(dtype if dtype.itemsize == each.itemsize else torch.bfloat16)[None]
    if kind == QuantizationType.FLOAT and num_bits == _HALF_BYTE:
        group_size = 16
        pairs = quantize_and_pack_fp4(
            numbers, torch.ones(1, numbers.numel() // group_size, dtype=numbers.dtype), group_size=group_size
        )
        return torch.stack((pairs & 0xF, pairs >> _HALF_BYTE), -1).flatten()
    arguments = QuantizationArgs(num_bits=num_bits, type=kind, strategy=QuantizationStrategy.TENSOR)
    one = torch.ones(1, dtype=numbers.dtype)
    codes: torch.Tensor = quantize(numbers, one, None, arguments, dtype=arguments.pytorch_dtype())[0].view(torch.uint8)
    if format_ is CompressionFormat.pack_quantized:  # packed codes are made positive first
        codes = codes + (1 << (num_bits - 1))
    return codes


def _are_halves(group: Group) -> bool:
    """Whether a byte holds two codes."""
    return group.codes == PACKED and group.arguments.num_bits == _HALF_BYTE


def _in_words(codes_OI: torch.Tensor, group: Group) -> torch.Tensor:
    """Return codes in bytes of whole words, the last of each row filled up."""
    if group.codes == PACKED:
        num_in_word = 8 * group.codes_dtype.itemsize // group.arguments.num_bits
        codes_OI = torch.nn.functional.pad(codes_OI, (0, -codes_OI.shape[1] % num_in_word))
    if _are_halves(group):  # the first of two lies in the lower half
        pairs = codes_OI.view(torch.int16)
        codes_OI = (pairs | (pairs >> _HALF_BYTE)).to(torch.uint8)
    return codes_OI
