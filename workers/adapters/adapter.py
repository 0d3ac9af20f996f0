"""Adapters as PEFT saves them: read under the same suspicion as a base, and put on a model by PEFT itself."""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from peft import PeftConfig, PeftType

from jobs.errors import BadInputError, UnsupportedError
from workers.adapters import names as adapter_names
from workers.adapters.config import REFUSALS, read_peft_config
from workers.adapters.heads import Head
from workers.bases.conversions import Conversions
from workers.files.checkpoint import read_shard
from workers.files.layout import TensorSpec
from workers.files.tensor_io import read_rows
from workers.numerics.device import raise_of_machine
from workers.sources.foreign_adapters import foreign_kind

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = adapter_names.PREFIX
"""What PEFT puts before the name of every module it saves tensors of."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the tensors of an adapter are stored in; integers are codes that mean nothing without their scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraDelta:
    """What is added to one base weight: scaling * B @ A."""

    weight: str
    """Name of the base tensor, [O, I]."""
    a_RI: TensorSpec
    b_OR: TensorSpec
    scaling: float

    @property
    def rank(self) -> int:
        """Rank of the delta."""
        return self.a_RI.shape[0]


@dataclass(frozen=True)
class Adapter:
    """One adapter, configuration and headers read."""

    directory: Path
    method: str
    """PEFT's name of it, such as `LORA`."""
    config: PeftConfig
    """Never handed out as it is: PEFT writes into the one it wraps a model with."""
    tensors: Mapping[str, TensorSpec]
    """By the names that PEFT gives them; a spec has the name that is stored."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """As in `open_adapter`."""
    num_tokens: int | None = None
    """Size of the vocabulary that it was trained with; None where it is the base's."""
    head: Head | None = None
    """What it brings in the place of the base's head."""
    inert_fields: frozenset[str] = frozenset()
    """Fields of a configuration that the operator knows to change nothing."""
    left_behind: frozenset[str] = frozenset()
    """Tensors of its file that no release takes, by the names stored; a note tells them."""
    deltas: Mapping[str, LoraDelta] = field(default_factory=dict)
    """What is added to the base's files without PEFT, by the names of weights there (`stored.py`)."""
    conversions: Conversions | None = None
    """Between these files and the base's model, where there are such deltas."""
    notes: tuple[str, ...] = ()
    """What a person should know of it who did not write its files."""

    def for_peft(self) -> "Adapter":
        """Return what of it PEFT puts on a model."""
        own = {spec.name for delta in self.deltas.values() for spec in (delta.a_RI, delta.b_OR)}
        return dataclasses.replace(self, tensors={n: spec for n, spec in self.tensors.items() if spec.name not in own})

    def origin(self, stored: str) -> str:
        """Return the file that a tensor comes from, for messages; by the name it is stored under."""
        return f"{self.directory}: {self.beside[stored]}" if stored in self.beside else str(self.weights_path)

    @property
    def weights_path(self) -> Path:
        """The file of its tensors."""
        return self.directory / ADAPTER_WEIGHTS

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.num_bytes for spec in self.tensors.values())


def open_adapter(
    directory: Path,
    inert_fields: frozenset[str] = frozenset(),
    beside: Mapping[str, str] = MappingProxyType({}),
    told: tuple[str, ...] = (),
) -> Adapter:
    """Read the configuration and the headers of an adapter.

    Args:
        directory: of the adapter.
        inert_fields: of the configuration, that PEFT may not know: the operator says that they change nothing.
        beside: files that tensors come from which were trained beside the adapter, by the names stored.
        told: what a person should know of it already.

    Raises:
        NotFoundError: a file is missing.
        UnsupportedError: the method, or something the configuration asks for, cannot be merged; the message names it.
        BadInputError: configuration or weights are malformed.
    """
    config, notes = read_peft_config(directory, inert_fields)
    notes = (*told, *notes)
    path = directory / ADAPTER_WEIGHTS
    method = PeftType(config.peft_type).value
    shard = read_shard(path)
    if found := foreign_kind(spec.name for spec in shard.tensors):
        tensor, kind, advice = found
        raise UnsupportedError(f"{path}: tensor {tensor}: this is {kind}, not one of PEFT; {advice}")
    named = adapter_names.name_as_peft(str(path), method, shard.tensors, beside, functools.partial(same_values, path))
    if named.left_behind:
        first, *others = named.left_behind
        more = f" and {len(others)} more" if others else ""
        notes += (f"a value head is left behind, which only the training needed: {first}{more}",)
    return Adapter(
        directory=directory,
        method=method,
        config=config,
        tensors=named.tensors,
        beside=beside,
        inert_fields=inert_fields,
        left_behind=frozenset(named.left_behind),
        notes=notes,
    )


def same_values(path: Path, one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two tensors of a file are the same, bit for bit."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        read_tensor(path, one), read_tensor(path, other)
    )


def read_tensor(path: Path, spec: TensorSpec, descriptor: int | None = None) -> torch.Tensor:
    """Read one adapter tensor, as stored, from a file that may be open already.

    Raises:
        BadInputError: it holds NaN or infinity.
    """
    stored = read_rows(path, spec, 0, spec.shape[0] if spec.shape else 1, descriptor)
    if spec.dtype.is_floating_point and stored.numel() and not all(map(math.isfinite, torch.aminmax(stored.float()))):
        raise BadInputError(
            f"{path}: tensor {spec.name}: expected finite numbers, found NaN or infinity; the training diverged: "
            "use an earlier checkpoint of the adapter"
        )
    return stored


@contextlib.contextmanager
def refusals(adapter: Adapter, words: str) -> Iterator[None]:
    """Raise what PEFT raises inside as a fault of the adapter or of the base."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise UnsupportedError(f"{adapter.directory}: {adapter.method} needs another package here: {error}") from error
    except KeyError as error:
        raise BadInputError(f"{adapter.directory}/{words}: nothing is there under {error}") from error
    except REFUSALS as error:
        raise_of_machine(error)
        raise BadInputError(f"{adapter.directory}/{words}: {error}") from error
