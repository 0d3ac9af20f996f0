"""4-bit weights by bitsandbytes: quantize, dequantize, and the tensors they are stored as.

Everything works on whole blocks of rows, so that no temporary grows with the tensor; the bits are those of
bitsandbytes over the whole tensor, since its blocks run over the flattened weight.

Shape suffixes: O output features, I input features.
"""

import dataclasses
import functools
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import bitsandbytes
import bitsandbytes.functional as bnb
import numpy as np
import torch

from jobs.errors import BadInputError
from workers.numerics.device import raise_of_machine
from workers.numerics.kernels import four_bit
from workers.numerics.kernels.elements import array

BITSANDBYTES_VERSION: str = bitsandbytes.__version__

BLOCK_SIZE = 64
"""Weights per scale; the default of bitsandbytes and the only size transformers uses."""

_FOLLOWED_VERSION = "0.50.2"
"""The bitsandbytes that the kernels follow bit for bit on the CPU; of any other, its own is taken."""
NESTED_BLOCK_SIZE = 256
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_STATE_SUFFIX = ".quant_state.bitsandbytes__"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A linear weight in 4-bit, on the device where it is dequantized, or brought there tile by tile."""

    codes: torch.Tensor
    """uint8 [ceil(O * I / 2), 1]: two codes a byte."""
    absmax: torch.Tensor
    """float32 [ceil(O * I / blocksize)]: the scale of each block, nested scales already resolved."""
    blocksize: int
    quant_type: str
    shape: tuple[int, int]
    dtype: torch.dtype
    """What it dequantizes to: the dtype of the weight it was made from."""
    transposed: bool = False
    """Whether the blocks run over the transpose, as of a `Conv1D`, which keeps its weight [I, O]."""
    device: torch.device | None = None
    """Where tiles are brought to be dequantized; None for where the codes are."""

    @property
    def row_alignment(self) -> int:
        """Rows are dequantized from and in multiples of this, so that tiles begin at a block (and at a whole byte)."""
        return self.shape[0] if self.transposed else row_alignment(self.shape[1], self.blocksize)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.codes.numel() + self.absmax.numel() * 4

    def dequantize_rows(self, start: int, stop: int, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantize rows [start, stop); see `StoredWeight` of `forms`."""
        if self.transposed:
            num_rows, num_columns = self.shape
            upright = dataclasses.replace(self, shape=(num_columns, num_rows), transposed=False)
            return upright.dequantize_rows(0, num_columns).T[start:stop].contiguous()
        num_columns = self.shape[1]
        begin, end = start * num_columns, stop * num_columns
        codes = self.codes[begin // 2 : (end + 1) // 2]
        absmax = self.absmax[begin // self.blocksize : math.ceil(end / self.blocksize)]
        if self.device is not None:
            codes, absmax = codes.to(self.device), absmax.to(self.device)
        if BITSANDBYTES_VERSION == _FOLLOWED_VERSION and codes.device.type == "cpu":
            weight = torch.empty(stop - start, num_columns, dtype=self.dtype) if memory is None else memory
            four_bit.dequantize(
                array(codes),
                array(absmax),
                _tables(self.quant_type).pairs,
                self.blocksize,
                array(weight),
            )
            return weight
        # Handed over one block a row: the AVX-512 kernel of bitsandbytes 0.50.2 takes the wrong scales where blocks go
        # on from one row of a weight to the next.
        num_missing = absmax.numel() * self.blocksize // 2 - codes.numel()
        blocks: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            torch.nn.functional.pad(codes, (0, 0, 0, num_missing)) if num_missing else codes,
            absmax,
            self.blocksize,
            self.quant_type,
            (absmax.numel(), self.blocksize),
            self.dtype,
        )
        return blocks.view(-1)[: end - begin].view(stop - start, num_columns)

    def to(self, device: torch.device) -> "QuantizedWeight":
        """Return this weight with its codes and scales on another device."""
        return dataclasses.replace(self, codes=self.codes.to(device), absmax=self.absmax.to(device))

    def brought_to(self, device: torch.device) -> "QuantizedWeight":
        """Return this weight with tiles of it brought to a device to be dequantized; codes and scales stay."""
        return dataclasses.replace(self, device=device)


def row_alignment(num_columns: int, blocksize: int = BLOCK_SIZE) -> int:
    """Return the smallest number of rows that holds whole blocks."""
    return blocksize // math.gcd(num_columns, blocksize)


def quantize_rows(weight_OI: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a tile that begins at a block of its weight.

    Args:
        weight_OI: [rows, I], float16, bfloat16 or float32.
        quant_type: `nf4` or `fp4`.

    Returns:
        Codes uint8 [ceil(rows * I / 2), 1] and scales float32 [ceil(rows * I / 64)].
    """
    if (
        BITSANDBYTES_VERSION == _FOLLOWED_VERSION
        and weight_OI.device.type == "cpu"
        and weight_OI.dtype in _WEIGHT_DTYPES
        and weight_OI.numel() > 0
        and weight_OI.numel() % BLOCK_SIZE == 0
    ):
        return _quantize_on_cpu(weight_OI, quant_type)
    codes, state = bnb.quantize_4bit(weight_OI, blocksize=BLOCK_SIZE, quant_type=quant_type)
    return codes, state.absmax


def _quantize_on_cpu(weight: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    tables = _tables(quant_type)
    codes = torch.empty(weight.numel() // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(weight.numel() // BLOCK_SIZE)
    four_bit.quantize(array(weight.contiguous()), tables.middles, tables.places, array(codes), absmax.numpy())
    return codes, absmax


@dataclass(frozen=True, slots=True)
class _Tables:
    """The sixteen values of a 4-bit type."""

    pairs: np.ndarray
    """float32 [512]: the two values of each byte of codes, the one in its upper half first."""
    places: np.ndarray
    """uint8 [16]: their codes, the smallest value's first."""
    middles: np.ndarray
    """float32 [15]: between neighbours, ascending."""


@functools.cache
def _tables(quant_type: str) -> _Tables:
    values = bnb.get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(values)
    middles = (values[order[:-1]] + values[order[1:]]) / 2
    # What they come back as: of fp4, the sign of one of its zeros depends on the processor.
    every_code = torch.arange(16, dtype=torch.uint8).repeat_interleave(BLOCK_SIZE // 2).mul_(0x11).view(-1, 1)
    back = torch.ops.bitsandbytes.dequantize_4bit.default(
        every_code, torch.ones(16), BLOCK_SIZE, quant_type, (16, BLOCK_SIZE), torch.float32
    )
    back_values = back[:, 0].numpy()
    pairs = np.stack([back_values.repeat(16), np.tile(back_values, 16)], axis=1).reshape(-1)
    return _Tables(pairs, order.numpy().astype(np.uint8), middles.numpy())


def stored_tensors(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    *,
    quant_type: str,
    double_quant: bool,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Return the tensors that a bnb-4bit checkpoint stores for one weight, on the CPU.

    Double quantization follows `quantize_4bit` of bitsandbytes 0.50.2: the scales, less their mean, in blocks of 256.

    Returns:
        Tensors by suffix: `""` for the codes, `.absmax`, `.quant_map` and so on for the rest.
    """
    code = bnb.get_4bit_type(quant_type, device=codes.device)
    if double_quant:
        offset = absmax.mean()
        nested, nested_state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        state = bnb.QuantState(
            absmax=nested,
            shape=torch.Size(shape),
            dtype=dtype,
            blocksize=BLOCK_SIZE,
            code=code,
            quant_type=quant_type,
            offset=offset,
            state2=nested_state,
        )
    else:
        state = bnb.QuantState(
            absmax=absmax, shape=torch.Size(shape), dtype=dtype, blocksize=BLOCK_SIZE, code=code, quant_type=quant_type
        )
    parts = {f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {suffix: tensor.cpu().contiguous() for suffix, tensor in ({"": codes} | parts).items()}


def quantized_names(tensors: Mapping[str, object]) -> dict[str, str]:
    """Find the 4-bit weights among the tensor names of a checkpoint.

    Returns:
        The quantization type (`nf4`, `fp4`) by weight name.
    """
    return {
        name.partition(_STATE_SUFFIX)[0]: name.partition(_STATE_SUFFIX)[2] for name in tensors if _STATE_SUFFIX in name
    }


def quantized_owner(name: str, weights: Container[str]) -> str | None:
    """Return the 4-bit weight that a stored tensor is a part of (its codes, scales or state), or None."""
    while name and name not in weights:
        name = name.rpartition(".")[0]
    return name or None


def restore(name: str, stored: Mapping[str, torch.Tensor], *, transposed: bool = False) -> QuantizedWeight:
    """Build a weight from the tensors a bnb-4bit checkpoint stores for it.

    Args:
        name: of the weight, for messages.
        stored: tensors by suffix, as `stored_tensors` returns them; views of mapped files are kept as they are.
        transposed: whether they hold the transpose of the weight.

    Raises:
        BadInputError: parts are missing or do not fit together.
    """
    parts = {suffix.removeprefix("."): tensor for suffix, tensor in stored.items() if suffix}
    try:
        codes = stored[""].reshape(-1).view(torch.uint8)
        state = bnb.QuantState.from_dict(parts, device=codes.device)
        _check_state(state, codes.numel())
        weight = of_state(codes, state)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise_of_machine(error)
        raise BadInputError(
            f"{name}: expected the parts of a bitsandbytes 4-bit weight, found {type(error).__name__}: {error}; the "
            "checkpoint is corrupt"
        ) from error
    return dataclasses.replace(weight, shape=weight.shape[::-1], transposed=True) if transposed else weight


def of_state(codes: torch.Tensor, state: bnb.QuantState) -> QuantizedWeight:
    """Return the weight that bitsandbytes holds as codes and their state.

    Args:
        codes: of any shape; with `bnb_4bit_quant_storage`, the same bytes as another dtype.
        state: of them.
    """
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    num_rows, num_columns = state.shape
    return QuantizedWeight(
        codes=codes.reshape(-1).view(torch.uint8).reshape(-1, 1),
        absmax=absmax.float(),
        blocksize=int(state.blocksize),
        quant_type=state.quant_type,
        shape=(num_rows, num_columns),
        dtype=state.dtype,
    )


def _check_state(state: bnb.QuantState, num_code_bytes: int) -> None:
    """Raise ValueError unless the parts fit together: the native code they go into checks nothing."""
    if state.quant_type not in ("nf4", "fp4") or state.dtype not in _WEIGHT_DTYPES:
        raise ValueError(f"type {state.quant_type!r} of {state.dtype}")
    if state.blocksize not in _BLOCK_SIZES:
        raise ValueError(f"blocks of {state.blocksize!r}")
    shape = tuple(state.shape)
    if len(shape) != 2 or min(shape) < 1 or num_code_bytes != (math.prod(shape) + 1) // 2:
        raise ValueError(f"{num_code_bytes} bytes of codes for a weight of shape {list(shape)}")
    num_blocks = math.ceil(math.prod(shape) / state.blocksize)
    scales = [(state.absmax, torch.uint8 if state.nested else torch.float32, num_blocks)]
    if state.nested:
        if state.state2.blocksize not in _BLOCK_SIZES:
            raise ValueError(f"nested blocks of {state.state2.blocksize!r}")
        num_nested = math.ceil(num_blocks / state.state2.blocksize)
        scales += [(state.state2.absmax, torch.float32, num_nested), (state.state2.code, torch.float32, 256)]
    for scale, dtype, num_values in scales:
        if (scale.dtype, scale.numel()) != (dtype, num_values):
            raise ValueError(f"{scale.numel()} scales as {scale.dtype}, expected {num_values} as {dtype}")
