"""What makes merged weights a checkpoint: the files that base and adapter bring, configuration and index."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from jobs.output_form import OutputForm
from jobs.release import Artifact
from workers.adapters.heads import Head
from workers.bases.declarations import DECLARING_FIELDS, DECLARING_FILES, without_declarations
from workers.files.checkpoint import read_json
from workers.files.foreign import copy_foreign
from workers.files.layout import INDEX_FILE
from workers.files.local import file_errors, sha256_of
from workers.merging.plan import MergePlan
from workers.sources.code_files import leave_out, references


def write_sidecars(plan: MergePlan, directory: Path) -> tuple[Artifact, ...]:
    """Write the files that make the merged shards of a directory a checkpoint of its own.

    Args:
        plan: of the job.
        directory: holds the merged shards.

    Returns:
        The files written.

    Raises:
        NoCapacityError: the disk is full.
        BadInputError: a configuration file of the base cannot be read.
    """
    written: dict[str, Any] = {"config.json": _merged_config(plan), **plan.shipment.documents}
    index = plan.output.index()
    if index is not None:
        written[INDEX_FILE] = index
    names = {*written, *plan.shipment.templates}
    for name, source in plan.shipment.files.items():
        names.add(name)
        with file_errors(f"copying {source} to {directory}", directory):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            if plan.shipment.broken and name.endswith("config.json"):
                document = read_json(source)
                if plan.shipment.broken.keys() & set(references(document)):
                    leave_out(document, plan.shipment.broken.keys())
                    written[name] = document
                    continue
            copy_foreign(source, directory / name, num_parts=name.count("/") + 1)
    if plan.request.output is OutputForm.AS_BASE:
        for name in DECLARING_FILES:
            if (plan.base.source.directory / name).is_file():
                names.add(name)
                copy_foreign(plan.base.source.directory / name, directory / name)
    for name, content in written.items():
        write_text(directory / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for name, template in plan.shipment.templates.items():
        write_text(directory / name, template)
    return tuple(digest_file(directory, name) for name in sorted(names))


def write_text(path: Path, text: str) -> None:
    """Write a small text file.

    Raises:
        NoCapacityError: the disk is full.
    """
    with file_errors(f"writing {path}", path):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def digest_file(directory: Path, name: str) -> Artifact:
    """Return the size and SHA-256 of a file of a release."""
    path = directory / name
    with file_errors(f"reading {path}", path):
        return Artifact(path=name, num_bytes=path.stat().st_size, sha256=sha256_of(path))


def _merged_config(plan: MergePlan) -> dict[str, Any]:
    config = _declaring(plan, read_json(plan.base.source.directory / "config.json"))
    leave_out(config, plan.shipment.broken.keys())
    config["dtype"] = config.get("dtype") or config.get("torch_dtype") or _main_dtype(plan)
    for section in _sections(config):
        stated = section.get("dtype") or section.get("torch_dtype")
        if isinstance(stated, str):
            # Under both names: older versions of transformers, and what is built on them, read the second alone.
            section["dtype"] = section["torch_dtype"] = plan.request.dtype or stated
    if plan.opened.num_tokens is not None:
        # Other sections, such as that of a vision model, have no vocabulary.
        for part in (config, *config.values()):
            if isinstance(part, dict) and "vocab_size" in part:
                part["vocab_size"] = plan.opened.num_tokens
    if plan.opened.head is not None:
        _name_head(config, plan.opened.head)
    if plan.apart and plan.base.tied_by_flag:
        config["tie_word_embeddings"] = False
        text = config.get("text_config")
        if isinstance(text, dict) and "tie_word_embeddings" in text:
            text["tie_word_embeddings"] = False
    return config


def _declaring(plan: MergePlan, config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that says of the weights what the release stores them in."""
    declaration = None if plan.storage is None else plan.storage.declaration
    as_base = plan.request.output is OutputForm.AS_BASE
    if as_base and declaration is None:
        return config
    field = next((name for name in DECLARING_FIELDS if as_base and config.get(name)), DECLARING_FIELDS[0])
    config = without_declarations(config)
    if declaration:
        config[field] = dict(declaration)
    return config


def _name_head(config: dict[str, Any], head: Head) -> None:
    """Make a configuration one of the class that has a head; labels that the base has names for keep them."""
    config["architectures"] = [head.class_name]
    labels = config.get("id2label")
    if not isinstance(labels, dict) or len(labels) != head.num_labels:
        config["id2label"] = {str(number): f"LABEL_{number}" for number in range(head.num_labels)}
        config["label2id"] = {f"LABEL_{number}": number for number in range(head.num_labels)}
    config.pop("num_labels", None)  # transformers counts the labels; two counts could differ


def _sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a configuration and those of its parts, such as `text_config`."""
    waiting = [config]
    while waiting:
        section = waiting.pop()
        waiting += [value for name, value in section.items() if name.endswith("_config") and isinstance(value, dict)]
        yield section


def _main_dtype(plan: MergePlan) -> str:
    """Return the dtype of most of what a release holds."""
    num_bytes = Counter[torch.dtype]()
    for tensor in plan.tensors:
        num_bytes[tensor.dtype] += tensor.num_bytes if tensor.dtype.is_floating_point else 0
    return str(num_bytes.most_common(1)[0][0]).removeprefix("torch.")
