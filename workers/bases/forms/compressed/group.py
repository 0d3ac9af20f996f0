"""Groups of weights, as a configuration of compressed-tensors declares them, and what a weight of one is made of.

Shape suffixes: O output features, I input features.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy

from jobs.errors import BadInputError, UnsupportedError
from workers.bases.forms import PartLayout
from workers.bases.forms.refusals import stored_twice
from workers.files.layout import DTYPES, TensorSpec

WEIGHT, PACKED = "weight", "weight_packed"
"""What codes are called in their module; packed ones do not have the shape of their weight."""
SCALE, GLOBAL_SCALE, ZERO_POINT, SHAPE = "weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape"
"""What may go with them."""
ORDER = "weight_g_idx"
"""Where groups were in the order of activations."""
PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
"""What numbers are stored as."""
_SCALES = PLAIN - {"F64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    codes: str
    dtypes: frozenset[str]
    """What codes, or the words they are packed into, are stored as."""
    scales: frozenset[str] = _SCALES


_LAYOUTS: Mapping[CompressionFormat, _Layout] = {
    CompressionFormat.float_quantized: _Layout(codes=WEIGHT, dtypes=frozenset({"F8_E4M3"})),
    CompressionFormat.int_quantized: _Layout(codes=WEIGHT, dtypes=frozenset({"I8"})),
    CompressionFormat.naive_quantized: _Layout(codes=WEIGHT, dtypes=frozenset({"F8_E4M3", "I8"})),
    CompressionFormat.pack_quantized: _Layout(codes=PACKED, dtypes=frozenset({"I32"})),
    CompressionFormat.nvfp4_pack_quantized: _Layout(
        codes=PACKED, dtypes=frozenset({"U8"}), scales=frozenset({"F8_E4M3"})
    ),
    CompressionFormat.mxfp4_pack_quantized: _Layout(codes=PACKED, dtypes=frozenset({"U8"}), scales=frozenset({"U8"})),
    CompressionFormat.mxfp8_quantized: _Layout(codes=WEIGHT, dtypes=frozenset({"F8_E4M3"}), scales=frozenset({"U8"})),
}
_STRATEGIES = (
    QuantizationStrategy.TENSOR,
    QuantizationStrategy.CHANNEL,
    QuantizationStrategy.GROUP,
    QuantizationStrategy.TENSOR_GROUP,
    QuantizationStrategy.BLOCK,
)
"""How many weights may share a scale."""


@dataclass(frozen=True)
class Group:
    """Weights that are stored in one way."""

    scheme: QuantizationScheme
    """As it is declared, its format found out."""
    format: CompressionFormat
    stated: str
    """The format that is declared, where one is."""

    @classmethod
    def declared(cls, place: str, scheme: QuantizationScheme, of_all: str) -> Self:
        """Return a group as a configuration declares it.

        Args:
            place: of the configuration, for messages.
            scheme: of the group; is given the format that was found out.
            of_all: the format that the configuration states for all groups.

        Raises:
            UnsupportedError: its format, or how weights share scales, is not read.
        """
        told = {each.value for each in CompressionFormat} - {"mixed-precision", "dense"}
        asked = str(scheme.format.value if isinstance(scheme.format, CompressionFormat) else scheme.format or of_all)
        found = CompressionFormat(asked if asked in told else infer_module_format(torch.nn.Linear, scheme))
        if found not in _LAYOUTS:
            raise UnsupportedError(
                f"{place}: declares weights in {found.value}; of compressed-tensors are read: "
                f"{', '.join(each.value for each in _LAYOUTS)}"
            )
        scheme.format = found
        group = cls(scheme, found, asked)
        if group.strategy not in _STRATEGIES:
            raise UnsupportedError(
                f"{place}: declares scales of weights by {group.strategy.value}; expected one of "
                f"{', '.join(each.value for each in _STRATEGIES)}"
            )
        return group

    @cached_property
    def compressor(self) -> type[BaseCompressor]:
        """The library's own for its format."""
        found: type[BaseCompressor] = BaseCompressor.get_value_from_registry(self.format.value)
        return found

    @cached_property
    def arguments(self) -> Any:
        """`QuantizationArgs` of the weights: `num_bits`, `group_size`, `symmetric` and so on."""
        assert self.scheme.weights is not None
        return self.scheme.weights

    @cached_property
    def group_size(self) -> int | None:
        """Weights of a row that share a scale; None where no such groups do."""
        return self.arguments.group_size if (self.arguments.group_size or 0) > 0 else None

    @cached_property
    def strategy(self) -> QuantizationStrategy:
        """How many weights share a scale."""
        return QuantizationStrategy(self.arguments.strategy)

    @cached_property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block, where such share a scale; [1, 1] otherwise."""
        num_rows, num_columns = self.arguments.block_structure or (1, 1)
        return num_rows, num_columns

    @cached_property
    def codes(self) -> str:
        """What codes are called in their module."""
        return _LAYOUTS[self.format].codes

    @cached_property
    def codes_dtype(self) -> torch.dtype:
        """What codes, or the words they are packed into, are stored as."""
        (code,) = self._dtypes_of_codes
        return DTYPES[code]

    @cached_property
    def _dtypes_of_codes(self) -> frozenset[str]:
        dtypes = _LAYOUTS[self.format].dtypes
        return dtypes & {"F8_E4M3" if self.arguments.type == "float" else "I8"} or dtypes

    @cached_property
    def bytes_per_weight(self) -> float:
        """What a weight takes with its share of scales and zero points, at most."""
        num_bits = self.arguments.num_bits if self.codes == PACKED else 8
        return float(num_bits / 8 + 8 / (self.group_size or 64))

    @cached_property
    def packs_zero_points(self) -> bool:
        """Whether zero points are packed into words, along the rows."""
        packs = self.format is CompressionFormat.pack_quantized and not self.arguments.symmetric
        return packs and self.strategy is not QuantizationStrategy.TENSOR

    def at_most(self, codes: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape of a weight whose words of codes are full, by the shape of those."""
        if self.format is CompressionFormat.pack_quantized:
            return codes[0], codes[1] * 32 // self.arguments.num_bits
        return codes[0], codes[1] * (2 if self.codes == PACKED else 1)

    def codes_shape(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Return the shape of the codes of a weight."""
        if self.format is CompressionFormat.pack_quantized:
            return num_rows, math.ceil(num_columns * self.arguments.num_bits / 32)
        return num_rows, num_columns // (2 if self.codes == PACKED else 1)

    def layout(self, num_rows: int, num_columns: int, dtype: torch.dtype) -> Mapping[str, PartLayout]:
        """Return what a weight without zero points is stored as, by what that is called in its module.

        Args:
            num_rows: of the weight.
            num_columns: of the weight.
            dtype: of the model, which scales have that are plain numbers.
        """
        layout = _LAYOUTS[self.format]
        scales = dtype if layout.scales == _SCALES else DTYPES[next(iter(layout.scales))]
        found: dict[str, PartLayout] = {
            self.codes: (self.codes_dtype, self.codes_shape(num_rows, num_columns)),
            SCALE: (scales, self._grid(num_rows, num_columns)),
        }
        if self.format is CompressionFormat.nvfp4_pack_quantized:
            found[GLOBAL_SCALE] = torch.float32, (1,)
        if self.format is CompressionFormat.pack_quantized:
            found[SHAPE] = torch.int64, (2,)
        return found

    def check(self, module: str, there: Mapping[str, TensorSpec]) -> tuple[int, int] | None:
        """Check the parts of a weight.

        Args:
            module: that it is in.
            there: its parts by what they are called there.

        Returns:
            Its shape [O, I]; None where words of codes may be filled up, and only the values of `weight_shape` tell.

        Raises:
            BadInputError: parts are missing, or do not fit together; names the tensor.
            UnsupportedError: parts are of a kind that is not read; names the tensor.
        """
        self._check_presence(module, there)
        self._check_dtypes(there)
        codes, scales = there[self.codes], there[SCALE]
        if len(codes.shape) != 2:
            raise UnsupportedError(
                f"tensor {codes.name} has shape {list(codes.shape)}; expected a matrix: weights of several experts in "
                "one tensor are not read in this form"
            )
        num_rows, num_columns = codes.shape[0], self._num_columns(codes, scales)
        grid = self._grid(num_rows, num_columns or 1)
        if scales.num_elements != math.prod(grid) or (len(grid) == 2 and scales.shape != grid):
            raise BadInputError(
                f"tensor {scales.name} has shape {list(scales.shape)}; expected {list(grid)}, by {self.strategy.value} "
                f"of {codes.name} {list(codes.shape)}"
            )
        if ZERO_POINT in there:
            packed = math.ceil(num_rows * self.arguments.num_bits / 32), grid[-1]
            self._check_shape(there[ZERO_POINT], packed if self.packs_zero_points else scales.shape, codes)
        if GLOBAL_SCALE in there and there[GLOBAL_SCALE].num_elements != 1:
            self._check_shape(there[GLOBAL_SCALE], (1,), codes)
        return None if num_columns is None else (num_rows, num_columns)

    def _check_presence(self, module: str, there: Mapping[str, TensorSpec]) -> None:
        needed = [self.codes, SCALE]
        needed += [SHAPE] if self.format is CompressionFormat.pack_quantized else []
        needed += [GLOBAL_SCALE] if self.format is CompressionFormat.nvfp4_pack_quantized else []
        needed += [] if self.arguments.symmetric else [ZERO_POINT]
        for name in needed:
            if name not in there:
                raise BadInputError(
                    f"{module} is stored in {self.format.value} ({', '.join(there)}), and no file holds {module}.{name}"
                    ", without which the codes are another weight; the checkpoint is not whole"
                )
        if ORDER in there:
            raise UnsupportedError(
                f"tensor {module}.{ORDER}: groups in the order of activations are not read (compressed-tensors gave "
                "them up); name a base in another form"
            )
        if self.codes == PACKED and WEIGHT in there:
            raise stored_twice(f"{module}.{WEIGHT}", there[WEIGHT].code, PACKED)

    def _check_dtypes(self, there: Mapping[str, TensorSpec]) -> None:
        layout = _LAYOUTS[self.format]
        parts = [(there[self.codes], self._dtypes_of_codes), (there[SCALE], layout.scales)]
        parts += [(there[GLOBAL_SCALE], _SCALES)] if GLOBAL_SCALE in there else []
        for spec, expected in parts:
            if spec.code not in expected:
                raise UnsupportedError(
                    f"tensor {spec.name} is stored as {spec.code}; expected {' or '.join(sorted(expected))} in "
                    f"{self.format.value} of {self.arguments.num_bits} bits"
                )

    def _num_columns(self, codes: TensorSpec, scales: TensorSpec) -> int | None:
        group_size = self.group_size
        if self.format is not CompressionFormat.pack_quantized:
            _, num_columns = self.at_most(codes.shape)
        elif group_size and len(scales.shape) == 2:
            num_columns = scales.shape[1] * group_size
            self._check_shape(codes, self.codes_shape(codes.shape[0], num_columns), scales)
        else:
            return None
        if group_size and num_columns % group_size:
            raise UnsupportedError(
                f"tensor {codes.name} has rows of {num_columns} weights; expected a multiple of {group_size}, as so "
                "many share a scale"
            )
        return num_columns

    def _grid(self, num_rows: int, num_columns: int) -> tuple[int, ...]:
        if self.strategy is QuantizationStrategy.TENSOR:
            return (1,)
        if self.strategy is QuantizationStrategy.CHANNEL:
            return num_rows, 1
        if self.strategy is QuantizationStrategy.BLOCK:
            return math.ceil(num_rows / self.block[0]), math.ceil(num_columns / self.block[1])
        return num_rows, num_columns // (self.group_size or num_columns)

    def _check_shape(self, spec: TensorSpec, expected: tuple[int, ...], beside: TensorSpec) -> None:
        if spec.shape != expected:
            raise BadInputError(
                f"tensor {spec.name} has shape {list(spec.shape)}; expected {list(expected)}, beside {beside.name} "
                f"{list(beside.shape)}, by {self.strategy.value}"
            )
