"""Where a base declares that its weights are stored in another form than plain numbers.

Merged are weights stored in 16 or 32 bits, and those of the forms that are read (`forms/`). In all others a weight is a
code that means nothing without its scales: such a base is refused in any case, and called by its name.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import BadInputError, UnsupportedError
from workers.files.checkpoint import read_json
from workers.sources.refused_forms import FORMS, Form

DECLARING_FIELDS = ("quantization_config", "compression_config")
DECLARING_FILES: Mapping[str, str] = {
    "hf_quant_config.json": "modelopt",
    "quant_config.json": "awq",
    "quantization_config.json": "exl2",
    "quantize_config.json": "gptq",
}
"""Files beside `config.json` that declare a form in its place, with the method of the tool that first wrote such."""
_OF_MLX = frozenset({"bits", "group_size"})
"""Fields by which MLX declares its form, without a method's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """Where a base says in which form its weights are stored."""

    place: str
    """File and field."""
    at_the_top: bool
    """Whether that is in a file of its own, or in `config.json` and there in no section of it."""
    method: str
    content: Mapping[str, Any]

    @property
    def form(self) -> Form:
        """The form that it declares."""
        if self.in_4bit:
            return Form("bitsandbytes 4-bit")
        return FORMS.get(self.method) or Form(self.method)

    @property
    def in_4bit(self) -> bool:
        """Whether it is the 4-bit format of bitsandbytes."""
        return self.method == "bitsandbytes" and bool(self.content.get("load_in_4bit"))


def declaration(directory: Path, *, read: Collection[str]) -> Declaration | None:
    """Return what a base declares of the form of its weights, or None where it declares nothing.

    Args:
        directory: of the base.
        read: methods of the forms that are read.

    Raises:
        UnsupportedError: it declares another form; the message names it, where it is declared, and what to do. Or it
            declares several, or in a place where nothing takes it away from a release.
        NotFoundError, BadInputError: `config.json`, or a file that declares a form, cannot be read.
    """
    found = list(_declarations(directory))
    for declared in found:
        if declared.method not in read or (declared.method == "bitsandbytes" and not declared.in_4bit):
            raise UnsupportedError(
                f"{declared.place}: declares that the weights are stored in {declared.form.words} (method "
                f"{declared.method!r}): codes that mean nothing without their scales. {declared.form.advice}. Weights "
                "that are plain numbers by now need no declaration: take it away"
            )
    for declared in found:
        if not declared.at_the_top:
            raise UnsupportedError(
                f"{declared.place}: declares weights in {declared.form.words}; expected this at the top level of "
                "config.json, as transformers writes it: move it there"
            )
        if declared.method != found[0].method:
            raise UnsupportedError(
                f"{declared.place}: declares weights in {declared.form.words}, and {found[0].place} in "
                f"{found[0].form.words}; expected one form: take away the declaration that is not true"
            )
    return found[0] if found else None


def without_declarations(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that declares no stored form, at any depth: that of plain weights."""
    return {
        field: without_declarations(value) if isinstance(value, dict) else value
        for field, value in config.items()
        if field not in DECLARING_FIELDS
    }


def _declarations(directory: Path) -> Iterator[Declaration]:
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise BadInputError(f"{directory / 'config.json'}: expected a JSON object, found {type(config).__name__}")
    sections = [("", config)]
    for where, section in sections:
        for field, value in section.items():
            path = f"{where}{field}"
            place = f"{directory / 'config.json'}: {path}"
            content = value if isinstance(value, dict) else {}
            if field in DECLARING_FIELDS and value:
                otherwise = "compressed-tensors" if field == "compression_config" else str(value)[:80]
                method = _method(content, "mlx" if content.keys() >= _OF_MLX else otherwise)
                yield Declaration(place=place, at_the_top=path == field, method=method, content=content)
            elif path == "quantization" and content.keys() >= _OF_MLX:
                yield Declaration(place=place, at_the_top=False, method="mlx", content=content)
            elif content:
                sections.append((f"{path}.", content))
    for name, otherwise in DECLARING_FILES.items():
        if not (directory / name).is_file():
            continue
        found = read_json(directory / name)
        content = found if isinstance(found, dict) else {}
        inner = content.get("quantization")
        # ModelOpt writes its file for a quantized KV cache, too, and then names no algorithm of the weights.
        if found and not (isinstance(inner, dict) and not inner.get("quant_algo")):
            yield Declaration(
                place=str(directory / name), at_the_top=True, method=_method(content, otherwise), content=content
            )


def _method(content: Mapping[str, Any], otherwise: str) -> str:
    if content.get("load_in_4bit") or content.get("load_in_8bit"):
        return "bitsandbytes"
    return str(content.get("quant_method") or otherwise).lower()
