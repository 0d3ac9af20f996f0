"""Whether two merged checkpoints are the same in every bit; where a bit differs, float64 says which one is nearer.

Shape suffixes: O out, I in, R rank.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors import safe_open


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One tensor in which two merges differ."""

    tensor: str
    num_elements: int
    """Elements that differ in at least one bit."""
    num_nearer: int
    """Those of them in which ours is nearer to the exact value than the reference is."""
    num_farther: int
    """Those of them in which it is farther from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Every tensor of two merged checkpoints, compared."""

    num_tensors: int
    num_elements: int
    differences: tuple[Difference, ...]

    @property
    def verdict(self) -> str:
        """One phrase for the table."""
        if not self.differences:
            return "all equal"
        nearer = sum(difference.num_nearer for difference in self.differences)
        farther = sum(difference.num_farther for difference in self.differences)
        return f"{nearer} of {self.num_elements} nearer to exact, {farther} farther"


class Checkpoint:
    """Reads the tensors of a directory of safetensors files, one at a time."""

    def __init__(self, directory: Path) -> None:
        self._files = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


class ExactMerge:
    """W + scaling * B @ A in float64: what both merges round."""

    def __init__(self, base: Path, adapter: Path, *, nf4: bool) -> None:
        self._base = Checkpoint(base)
        self._adapter = Checkpoint(adapter)
        self._nf4 = nf4
        config = json.loads((adapter / "adapter_config.json").read_text())
        self._scaling = config["lora_alpha"] / config["r"]

    def tensor(self, name: str) -> torch.Tensor:
        """Return one merged tensor in float64, from the linear weights in NF4 where the merge is into those."""
        weight_OI = self._base.tensor(name)
        if self._nf4 and name.endswith("_proj.weight"):  # in these shapes exactly what load_in_4bit converts
            weight_OI = dequantize_4bit(*quantize_4bit(weight_OI, quant_type="nf4"))
        exact_OI = weight_OI.double()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in self._adapter.names():
            lora_a_RI = self._adapter.tensor(f"{stem}.lora_A.weight").double()
            lora_b_OR = self._adapter.tensor(f"{stem}.lora_B.weight").double()
            exact_OI.addmm_(lora_b_OR, lora_a_RI, alpha=self._scaling)
        return exact_OI


def compare(ours: Path, reference: Path, exact: ExactMerge) -> Comparison:
    """Compare two merges of the same base and adapter.

    Args:
        ours: merged checkpoint.
        reference: the merge it is held against.
        exact: decides where they differ.

    Raises:
        ValueError: they do not hold the same tensors, or one differs in shape or dtype.
    """
    ours_checkpoint, reference_checkpoint = Checkpoint(ours), Checkpoint(reference)
    names = ours_checkpoint.names()
    if names != reference_checkpoint.names():
        raise ValueError(f"only one of {ours} and {reference} has {sorted(names ^ reference_checkpoint.names())[:5]}")
    num_elements = 0
    differences = []
    for name in sorted(names):
        found, expected = ours_checkpoint.tensor(name), reference_checkpoint.tensor(name)
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"{name} is {found.dtype} {tuple(found.shape)} in {ours}, {expected.dtype} {tuple(expected.shape)} "
                f"in {reference}"
            )
        num_elements += found.numel()
        differs = _bits(found) != _bits(expected)
        if differs.any():
            truth = exact.tensor(name)[differs]
            found_error = (found[differs].double() - truth).abs()
            expected_error = (expected[differs].double() - truth).abs()
            differences.append(
                Difference(
                    tensor=name,
                    num_elements=int(differs.sum()),
                    num_nearer=int((found_error < expected_error).sum()),
                    num_farther=int((found_error > expected_error).sum()),
                )
            )
    return Comparison(num_tensors=len(names), num_elements=num_elements, differences=tuple(differences))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
