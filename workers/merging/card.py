"""The model card of a release: the base's licence and language, and what became of base and adapter."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from jobs.locations import HubRepo
from jobs.release import Artifact
from jobs.request import adapter_name
from workers.merging.plan import MergePlan
from workers.merging.sidecars import digest_file, write_text
from workers.merging.storage import WeightStorage
from workers.merging.wider import kept_in_more_bits
from workers.releases.base_card import differing_licences
from workers.sources.belongings import CARD_NAME, MODULES_FILE

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_OF_STORED_WEIGHTS = re.compile(
    r"[48][-_ ]?bit.*|bitsandbytes|bnb|gptq|awq|fp8|int[48]|nvfp4|mxfp[48]|quantized|compressed-tensors|mlx|gguf",
    re.IGNORECASE,
)
"""Tags of weights in a form that a release does not have."""
_NUM_LISTED = 50
"""Weights that are kept in more bits, by name: of single experts there may be thousands."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def write_card(plan: MergePlan, directory: Path, *, num_changed: int, least_survival: float | None = None) -> Artifact:
    """Write the card of a release, valid for the Hub wherever the base is from.

    Args:
        plan: of the job.
        directory: of the release.
        num_changed: tensors whose values are others than those they were merged into.
        least_survival: smallest share of a tensor's delta that is left in what ships; None where nothing tells.

    Raises:
        NoCapacityError: the disk is full.
    """
    write_text(directory / CARD_NAME, _text(plan, num_changed, least_survival))
    return digest_file(directory, CARD_NAME)


def _text(plan: MergePlan, num_changed: int, least_survival: float | None) -> str:
    request = plan.request
    licences = differing_licences(plan.base.card, plan.adapter_cards)
    base, adapters = plan.base.source.location, [adapter.location for adapter, _ in plan.weighted]
    several = len(adapters) > 1
    kind = "A" if plan.storage else "A plain"
    body = [
        f"# {adapter_name(adapters)} merged into {base.name}",
        "",
        f"{kind} checkpoint: base and adapter{'s' if several else ''} fused, loadable by transformers without PEFT.",
        "",
        f"- base: `{base}`",
        *_adapter_lines(plan),
        *([f"- licences, of which each holds: {', '.join(licences)}, the base's first"] if licences else []),
        f"- merged into: {_merged_into(plan)}",
        *_stored_in(plan),
        *_kept(plan),
        f"- tensors changed: {num_changed} of {len(plan.checked)}",
        *([] if least_survival is None else [f"- of each tensor's delta is left at least: {least_survival:.1%}"]),
        f"- merge key: `{plan.merge_key}`",
        "",
        "`manifest.json` lists every file with its SHA-256; `parity.json` and `parity.html` are the evidence that this",
        f"checkpoint computes what base + adapter computes (level: {request.parity.level}).",
        "",
    ]
    return f"---\n{_data(plan).to_yaml()}\n---\n\n" + "\n".join(body)


def _data(plan: MergePlan) -> ModelCardData:
    card, location = plan.base.card, plan.base.source.location
    # Of a base that is on no Hub, the models that its card says it was made from are those that this one is made from.
    named = [location.repo_id] if isinstance(location, HubRepo) else card.texts("base_model")
    lineage = [name for name in named if _REPOSITORY.fullmatch(name)]
    more: dict[str, Any] = {name: card.metadata[name] for name in _INHERITED if name in card.metadata}
    if licences := differing_licences(card, plan.adapter_cards):
        more.pop("license_link", None)
        more |= {"license": "other", "license_name": "-and-".join(licences)}
    if lineage:
        more["base_model"] = lineage[0] if len(lineage) == 1 else lineage
        more["base_model_relation"] = "merge" if len(plan.weighted) > 1 else "finetune"
    return ModelCardData(
        library_name="sentence-transformers" if MODULES_FILE in plan.shipment.files else "transformers",
        tags=[
            *(tag for tag in card.texts("tags") if not _OF_STORED_WEIGHTS.fullmatch(tag)),
            *(["gguf"] if plan.request.output.is_gguf else []),
            "mergefleet",
        ],
        **more,
    )


def _adapter_lines(plan: MergePlan) -> list[str]:
    combination = plan.request.combination
    if combination is None:
        return [f"- adapter: `{plan.adapter.location}`"]
    lines = [f"- adapter: `{adapter.location}`, weight {weight:g}" for adapter, weight in plan.weighted]
    how = "".join(f", {name} {value}" for name, value in combination.arguments().items() if value is not None)
    return [*lines, f"- combined by PEFT: {combination.type}{how}"]


def _stored_in(plan: MergePlan) -> list[str]:
    if plan.storage is None:
        return []
    if not isinstance(plan.storage, WeightStorage):
        return [f"- stored in: {plan.storage.words}"]
    num_kept = len(plan.storage.in_form) - len(plan.requantized)
    kept = f", {num_kept} with the base's bytes" if num_kept else ""
    return [f"- stored in: {plan.storage.form.words}; {len(plan.requantized)} weights quantized{kept}"]


def _kept(plan: MergePlan) -> list[str]:
    """Return what is kept in more bits than the form has, and how much of the delta that would have left."""
    kept = kept_in_more_bits(plan)
    if kept is None or not kept.weights:
        return []
    lines = [
        f"  - `{each.weight}` in {each.kept_in.words}{'' if each.survival is None else f' ({each.survival:.1%})'}"
        for each in kept.weights[:_NUM_LISTED]
    ]
    more = len(kept.weights) - len(lines)
    return [
        f"- {kept.words}; in brackets what {plan.request.output} would have left of the delta:",
        *lines,
        *([f"  - and {more} more, which `parity.json` lists"] if more else []),
    ]


def _merged_into(plan: MergePlan) -> str:
    if not any(tensor.stored is None for tensor in plan.base.tensors):
        return "the base's own weights"
    if plan.base.form is not None:
        return f"the base's weights as stored in {plan.base.form.words}, dequantized"
    return f"the base's weights through {plan.request.base_quantization} and back"
