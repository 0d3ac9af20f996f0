"""What a merged checkpoint is compared with: its base in the weights the merge used, and in the other ones."""

from dataclasses import dataclass
from pathlib import Path

from transformers import BitsAndBytesConfig

from jobs.request import BaseQuantization, MergeRequest, QuantizationOptions
from workers.bases.forms.declared import declared_form
from workers.bases.model import bitsandbytes_config, stored_quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A base to put adapters on."""

    words: str
    """Base and adapter, for the report."""
    gates: bool
    quantization: BitsAndBytesConfig | None
    """How linear weights are converted while the base is loaded; None takes them as they are stored."""


def references(base: Path, request: MergeRequest) -> tuple[Reference, ...]:
    """Return the references for a pass.

    Args:
        base: its directory.
        request: any request of the pass.

    Returns:
        The one that gates, then the one for information; the latter is missing for a base in a stored form, which has
        no other weights.
    """
    stored = stored_quantization(base)
    if stored is not None:
        words = f"the base as stored, in {_in_words(stored.quantization, stored.options)}, + adapter"
        return (Reference(words=words, gates=True, quantization=None),)
    form = declared_form(base)
    if form is not None:
        words = f"the base as stored, in {form.words}, dequantized, + adapter"
        return (Reference(words=words, gates=True, quantization=None),)
    plain_gates = not request.base_quantization.converts
    plain = Reference(words="the base in its own weights + adapter", gates=plain_gates, quantization=None)
    quantization = BaseQuantization.NF4 if plain_gates else request.base_quantization
    options = QuantizationOptions() if plain_gates else request.quantization_options
    in_4bit = Reference(
        words=f"the base in {_in_words(quantization, options)} + adapter",
        gates=not plain_gates,
        quantization=bitsandbytes_config(quantization, options),
    )
    return (plain, in_4bit) if plain_gates else (in_4bit, plain)


def dequantized_here(words: str) -> Reference:
    """Return the reference for a base that transformers does not read, or reads as another one.

    Args:
        words: for the form of the base.
    """
    said = f"the base as stored, in {words}, dequantized by mergefleet as transformers does not read it, + adapter"
    return Reference(words=said, gates=True, quantization=None)


def _in_words(quantization: BaseQuantization, options: QuantizationOptions) -> str:
    return f"double-quantized {quantization}" if options.bnb_4bit_use_double_quant else str(quantization)
