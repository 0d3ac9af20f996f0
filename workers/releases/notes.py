"""What a person should know before a release is used, found while it is planned; what cannot be used is refused here.

A note stops nothing: it is told by `plan` and `merge`, and stands in report and manifest, so it names files by what
they are and no place of this machine.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from jobs.request import BaseQuantization, MergeRequest
from jobs.request_files.problems import show
from workers.bases.tokenizers import read_tokenizer
from workers.files.checkpoint import read_json
from workers.releases.base_card import BaseCard, differing_licences
from workers.releases.shipment import Shipment
from workers.releases.vocabulary import rows_note, stop_notes
from workers.sources.fetch import Source

_BNB_4BIT = re.compile(
    r"bnb[-_.]?(nf4|fp4|4[-_]?bit)|4[-_]?bit[-_.]bnb|(?<![a-z0-9])(nf4|fp4)(?![a-z0-9])", re.IGNORECASE
)
_IN_A_CACHE = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")
"""Where huggingface_hub keeps a repository: its name stands before the commit."""
_OTHER_FORMATS = re.compile(
    r"(?<![a-z0-9])(gptq|awq|gguf|ggml|exl[23]|aqlm|hqq|eetq|fp8|nvfp4|mxfp[48]|w4a16|w8a8|w8a16|int[48]|[48][-_]?bit|mlx)"
    r"(?![a-z0-9])",
    re.IGNORECASE,
)


def find_notes(
    request: MergeRequest,
    base: Source,
    adapters: tuple[Source, ...],
    *,
    stored_in_form: bool,
    card: BaseCard,
    adapter_cards: tuple[BaseCard, ...],
    shipment: Shipment,
    num_rows: int | None,
) -> tuple[str, ...]:
    """Find what a person should know of a planned merge.

    Args:
        request: of the job.
        base: as it was brought.
        adapters: as they were brought.
        stored_in_form: whether the base is, so that no other weights were asked for.
        card: of the base.
        adapter_cards: of the adapters.
        shipment: the files that the release takes over.
        num_rows: of the embedding of the merged model; None where it has none for tokens.

    Raises:
        BadInputError: the release would fail in use; the message says why.
    """
    notes = [*shipment.notes]
    if not card.is_readable:
        notes.append(
            "the metadata of the base's README.md cannot be read, so the release's card says nothing of licence and "
            "language; expected YAML between two lines '---'"
        )
    if card.left:
        notes.append(
            f"the metadata of the base's README.md has values that the Hub takes in no card ({', '.join(card.left)}), "
            "and the release's card leaves them out; correct them there"
        )
    if licences := differing_licences(card, adapter_cards):
        notes.append(
            f"base and adapter have other licences ({', '.join(licences)}), and each holds for the release: its card "
            "says license: other and names them"
        )
    for adapter in adapters:
        notes += _base_notes(request, base, adapter, stored_in_form=stored_in_form)
    tokenizer = read_tokenizer(shipment.files)
    if tokenizer is not None:
        tokenizer = replace(tokenizer, templates=(*tokenizer.templates, *shipment.templates.values()))
        config = read_json(base.directory / "config.json")
        if num_rows is not None:
            notes += rows_note(tokenizer, read_tokenizer(shipment.of_base), config, num_rows)
        notes += stop_notes(tokenizer, shipment.files, config)
    return tuple(dict.fromkeys(notes))


def _base_notes(request: MergeRequest, base: Source, adapter: Source, *, stored_in_form: bool) -> Iterator[str]:
    """Compare what an adapter says it was trained on with what it is merged into."""
    name = read_json(adapter.directory / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(name, str) or stored_in_form:  # it was asked for as it is stored
        return
    cached = _IN_A_CACHE.search(name)
    last = cached[1].rpartition("--")[2] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    trained = f"adapter_config.json says that {adapter.location.name} was trained on {show(name)}"
    options = request.quantization_options
    if _BNB_4BIT.search(last):
        if not request.base_quantization.converts:
            yield (
                f"{trained}, weights in 4 bits, and it is merged into the base's own (base_quantization: "
                f"{request.base_quantization}): what "
                "it learned corrects other values; request base_quantization: nf4, with quantization_options: "
                "{bnb_4bit_use_double_quant: true} where that checkpoint has it (those of unsloth do), or name that "
                "checkpoint as the base"
            )
            return
        if request.base_quantization is BaseQuantization.FP4 and "fp4" not in last.lower().replace("nf4", ""):
            yield (
                f"{trained}, which by its name holds nf4, and it is merged into fp4; request base_quantization: nf4, "
                "or name that checkpoint as the base"
            )
        if not options.bnb_4bit_use_double_quant:
            yield (
                f"{trained}; checkpoints of that name mostly have double quantization (those of unsloth do), and this "
                "merge has not: request quantization_options: {bnb_4bit_use_double_quant: true}, or name that "
                "checkpoint as the base"
            )
    elif (found := _OTHER_FORMATS.search(last)) and last != base.location.name:
        into = "other 4-bit weights" if request.base_quantization.converts else "the base's own weights"
        yield (
            f"{trained}, by its name weights in {found[1]}, and it is merged into {into} "
            f"(base_quantization: {request.base_quantization.value}): what it learned corrects other values"
        )
