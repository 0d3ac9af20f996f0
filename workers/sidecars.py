"""Everything in a checkpoint directory that is no weight: configuration, tokenizer, index and model card.

A merged directory is made of the base's files; where the adapter ships a tokenizer, it is the adapter's, whole, and so
are the chat templates where it ships any.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.locations import HubRepo
from jobs.release import Artifact
from jobs.request import adapter_name
from workers.checkpoint import INDEX_FILE, read_json
from workers.files import file_errors, sha256_of
from workers.lanes.adapter import ADAPTER_CONFIG
from workers.plan import MergePlan
from workers.stored_forms import without_declarations

CARD_NAME = "README.md"

_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm"})
_LEGAL = ("LICENSE", "NOTICE", "USE_POLICY")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names that every store keeps as they are; no file that a checkpoint needs has another."""
_WRITTEN_ANEW = frozenset({"config.json", INDEX_FILE, "manifest.json", "parity.json"})
_OF_ADAPTERS = frozenset({ADAPTER_CONFIG})
"""Never in a merged directory: transformers would look for the adapter's weights there."""
_TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
    }
)
_TEMPLATE_FILES = frozenset({"chat_template.jinja", "chat_template.json"})
_TEMPLATE_FOLDER = "additional_chat_templates"
_PROCESSOR_FILES = frozenset({"processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"})


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
    names = []
    for name, source in _copied_files(plan).items():
        with file_errors(f"copying {source} to {directory}"):
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, directory / name)
        names.append(name)
    written: dict[str, Any] = {"config.json": _merged_config(plan)}
    index = plan.output.index()
    if index is not None:
        written[INDEX_FILE] = index
    for name, content in written.items():
        write_text(directory / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_text(directory / CARD_NAME, _model_card(plan))
    return tuple(digest_file(directory, name) for name in sorted({*names, *written, CARD_NAME}))


def shipped_files(adapter: Path) -> Mapping[str, Path]:
    """Return the files of an adapter's directory that a merged model takes from it: tokenizer, processor, templates."""
    taken = _TOKENIZER_FILES | _PROCESSOR_FILES
    return {name: path for name, path in _plain_files(adapter).items() if name in taken or _is_template(name)}


def write_text(path: Path, text: str) -> None:
    """Write a small text file.

    Raises:
        NoCapacityError: the disk is full.
    """
    with file_errors(f"writing {path}"):
        path.write_text(text, encoding="utf-8")


def digest_file(directory: Path, name: str) -> Artifact:
    """Return the size and SHA-256 of a file of a release."""
    path = directory / name
    with file_errors(f"reading {path}"):
        return Artifact(path=name, num_bytes=path.stat().st_size, sha256=sha256_of(path))


def _copied_files(plan: MergePlan) -> Mapping[str, Path]:
    base = _plain_files(plan.base.source.directory)
    adapter = _plain_files(plan.adapter.directory)
    for family in (_TOKENIZER_FILES, _PROCESSOR_FILES):
        shipped = family & adapter.keys()
        if shipped & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} or family is _PROCESSOR_FILES:
            # Never a mixture of two tokenizers: the adapter's files replace all of the base's.
            base = {name: path for name, path in base.items() if not shipped or name not in family}
            base |= {name: adapter[name] for name in shipped}
    if _ships_template(adapter):
        base = {name: path for name, path in base.items() if not _is_template(name)}
        base |= {name: path for name, path in adapter.items() if _is_template(name)}
    return base


def _is_template(name: str) -> bool:
    return name in _TEMPLATE_FILES or name.startswith(f"{_TEMPLATE_FOLDER}/")


def _ships_template(files: Mapping[str, Path]) -> bool:
    if any(_is_template(name) for name in files):
        return True
    # Older tokenizers hold it themselves, and a file beside them would win over it.
    tokenizer = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    return isinstance(tokenizer, dict) and bool(tokenizer.get("chat_template"))


def _plain_files(directory: Path) -> dict[str, Path]:
    with file_errors(f"reading {directory}"):
        files = {
            path.name: path
            for path in sorted(directory.iterdir())
            if path.is_file()
            and _FILE_NAME.fullmatch(path.name)
            and path.name not in _WRITTEN_ANEW | _OF_ADAPTERS
            and not path.name.endswith(".index.json")
            and (path.suffix in _SUFFIXES or path.name.startswith(_LEGAL))
        }
        templates = sorted((directory / _TEMPLATE_FOLDER).glob("*.jinja"))
    return files | {f"{_TEMPLATE_FOLDER}/{path.name}": path for path in templates if _FILE_NAME.fullmatch(path.name)}


def _merged_config(plan: MergePlan) -> dict[str, Any]:
    config: dict[str, Any] = read_json(plan.base.source.directory / "config.json")
    config = without_declarations(config)
    if plan.request.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = plan.request.dtype
    if plan.unties:
        config["tie_word_embeddings"] = False
    return config


def _model_card(plan: MergePlan) -> str:
    request = plan.request
    base, adapters = plan.base.source.location, [adapter.location for adapter, _ in plan.weighted]
    several = len(adapters) > 1
    lines = ["---", "library_name: transformers", "tags:", "- mergefleet"]
    if isinstance(base, HubRepo):
        lines += [f"base_model: {base.repo_id}", f"base_model_relation: {'merge' if several else 'finetune'}"]
    lines += [
        "---",
        "",
        f"# {adapter_name(adapters)} merged into {base.name}",
        "",
        f"A plain checkpoint: base and adapter{'s' if several else ''} fused, loadable by transformers without PEFT.",
        "",
        f"- base: `{base}`",
        *_adapter_lines(plan),
        f"- merged into: {_merged_into(plan)}",
        f"- tensors changed: {len(plan.changed)} of {len(plan.tensors)}",
        f"- merge key: `{plan.merge_key}`",
        "",
        "`manifest.json` lists every file with its SHA-256; `parity.json` and `parity.html` are the evidence that this",
        f"checkpoint computes what base + adapter computes (level: {request.parity.level}).",
        "",
    ]
    return "\n".join(lines)


def _adapter_lines(plan: MergePlan) -> list[str]:
    combination = plan.request.combination
    if combination is None:
        return [f"- adapter: `{plan.adapter.location}`"]
    lines = [f"- adapter: `{adapter.location}`, weight {weight:g}" for adapter, weight in plan.weighted]
    how = "".join(f", {name} {value}" for name, value in combination.arguments().items() if value is not None)
    return [*lines, f"- combined by PEFT: {combination.type}{how}"]


def _merged_into(plan: MergePlan) -> str:
    if not any(tensor.stored is None for tensor in plan.base.tensors):
        return "the base's own weights"
    return f"the base's weights through {plan.request.base_quantization} and back"
