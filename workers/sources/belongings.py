"""What belongs to a model: the one list of the files that are brought, that a digest covers, and that a release ships.

Files at the top of a checkpoint belong to it by their names; those in folders, and code, by what its own files name or
hold: `modules.json` (sentence-transformers) names folders, `auto_map` code, and a folder with a tokenizer is one of the
processor's. Nothing here is run, and the model's weights are not listed.
"""

import fnmatch
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jobs.errors import BadInputError
from jobs.release import MANIFEST_NAME, REPORT_NAME, is_plain_path
from workers.files.foreign_json import parse_json
from workers.sources.code_files import CodePlace, code_of, custom_modules
from workers.sources.listing import Files

CARD_NAME = "README.md"
MODULES_FILE = "modules.json"
MODULE_SETTINGS = frozenset({MODULES_FILE, "config_sentence_transformers.json", "sentence_bert_config.json"})
"""At the top of a sentence-transformers model: which modules it has, and how they are used."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
OLD_TEMPLATE = "chat_template.json"
TEMPLATE_FILES = frozenset({"chat_template.jinja", OLD_TEMPLATE})
TEMPLATE_FOLDER = "additional_chat_templates"
_MAX_MODULES = 1000
_SETTINGS = frozenset({TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"})
_VOCABULARY = (
    "tokenizer.json",
    "tokenizer.model*",  # Mistral writes the version behind it
    "*.model",  # sentencepiece, by many names
    "*.spm",
    "*.vocab",
    "*.tiktoken",
    "*.bpe",
    "*.codes",
    "*.tokenizer",
    "*vocab*.json",
    "*vocab*.txt",
    "merges.txt",
    "dict.txt",
    "tekken.json",
    "byte_maps.json",
    "emoji.json",
    "normalizer.json",
    "word_pronunciation.json",
    "word_shape.json",
)
_PROCESSOR = ("*processor_config.json", "feature_extractor_config.json", "audio_tokenizer_config.json")
_DESCRIPTIONS = ("*.json", "*.txt", "*.jinja", "*.yaml", "*.yml")
"""What else describes a model, under names that only its own libraries know."""
_PARTS = (
    "spk_dict.pt",  # voices of Qwen2.5-Omni
    "adapter.*.safetensors",  # languages of Wav2Vec2
    "vocab.pkl",
    "*.ttf",  # what Ernie-4.5-VL writes times with
    "*.ttc",
    "*.otf",
)
"""What some models ask for by name, and no file of theirs names."""
_PART_FOLDERS = {
    "language_model": "alphabet.json",  # of Wav2Vec2ProcessorWithLM
    "speaker_embeddings": "speaker_embeddings_path.json",  # of Bark
}
"""Folders of the same kind, and the file beside them that tells such a model."""
_READ_ONLY = (
    "config.json",  # written anew, as is the next
    "*.safetensors.index.json",
    CARD_NAME,
    "hf_quant_config.json",  # these describe the stored weights, and a release has others
    "quant_config.json",
    "quantize_config.json",
    "quantization_config.json",
)
"""Brought, as a merge reads them, and not shipped."""
_STRANGERS = (
    "adapter_config.json",  # transformers would look for the adapter's weights beside it
    "*.index.json",
    "params.json",  # the weights of other formats
    "consolidated*",
    "measurement.json",
    "ort_config.json",
    "onnx*",
    "openvino*",
    "neuron_config.json",
    "trainer_state.json",  # leftovers of training
    "training_args*",
    "*_results.json",
    "optimizer*",
    "rng_state*",
    "events.out.*",
    MANIFEST_NAME,  # a release that serves as a base
    REPORT_NAME,
)
_OF_NO_USE = (
    *("pytorch_model*", "adapter_model*", "*.safetensors", "tf_model*", "rust_model*", "scheduler.pt", "scaler.pt"),
    *("*.onnx*", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.mlmodel", "*.tflite", "*.xml", "latest"),
    *("*.py", "*.ipynb", "*.sh", "*.md", "*.rst", "*.pdf", "*.html", "*.log", "*.patch"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.wav", "*.mp3", "*.flac"),
    *("onnx*/", "openvino*/", "coreml*/", "gguf*/", "mlx*/", "original/", "metal/", "checkpoint-*/", "global_step*/"),
    *("runs/", "logs/", "wandb/", "__pycache__/", "figures/", "assets/", "images/", "doc*/", "example*/", "scripts/"),
    *("inference/", "eval*/"),
)
"""What is known to be of no use to a checkpoint: other forms of its weights, leftovers, code beside it, its pages."""
_LEGAL = re.compile(
    r"licen[cs]e|copying|copyright|notice|patents|eula|agreement|disclaimer"
    r"|use[-_ ]?policy|usage[-_ ]?policy|terms([-_ ]of|[-_ ]and|\.|$)|third[-_ ]?party|attribution|open[-_ ]?rail"
    r"|许可|許可|協議|协议|ライセンス|利用規約|라이선스|лицензи"
)
_LEGAL_FOLDER = re.compile(r"licen[cs]es?|third[-_ ]?party[-_ ]?(licen[cs]es?|notices?)", re.IGNORECASE)
_NO_TEXT = re.compile(
    r"\.(py|ipynb|sh|cpp|cu|so|safetensors|bin|pt|pth|ckpt|h5|msgpack|ot|onnx|gguf|pkl|npz|npy|zip|tar|gz|7z"
    r"|png|jpe?g|gif|svg|webp|mp4)"
)
"""Suffixes of files that are no licence under any name."""
_OTHER_FORMATS = (".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".gguf", ".mlmodel", ".tflite", ".xml")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def belongings(files: Files) -> frozenset[str]:
    """Return the names of all files that belong to a model, or to an adapter, but for its weights.

    Raises:
        BadInputError: a file that says what belongs to it cannot be read, or names what lies outside.
    """
    top = {name for name in files.top() if belongs(name)}
    code = {name for found in code_of(documents(files), files).values() for name in found.files}
    folders = {name for folder in _folders(files) for name in _of_folder(files.below(folder))}
    templates = {name for name in files.below(TEMPLATE_FOLDER) if is_template(name)}
    return frozenset(
        name for name in top | code | folders | templates | modules_code(files, files) if is_plain_path(name)
    )


def strays(files: Files) -> tuple[str, ...]:
    """Return files and folders at the top that are known neither to belong to a model nor to be of no use to it.

    Folders end in a slash; adapters in folders of their own are known.

    Raises:
        As `belongings`.
    """
    ours = {f"{name.partition('/')[0]}/" if "/" in name else name for name in belongings(files)}
    folders = (folder for folder in files.folders() if not files.has(f"{folder}/adapter_config.json"))
    there = {*files.top(), *(f"{folder}/" for folder in folders)}
    return tuple(
        sorted(name for name in there - ours if not (name[0] == "." or matches(name, (*_STRANGERS, *_OF_NO_USE))))
    )


def belongs(name: str) -> bool:
    """Whether a file at the top of a checkpoint belongs to it by its name, weights aside."""
    if matches(name, _READ_ONLY):
        return True
    if name.startswith(".") or matches(name, _STRANGERS):
        return False
    return is_tokenizer(name) or is_legal(name) or matches(name, (*_DESCRIPTIONS, *_PARTS))


def ships(name: str) -> bool:
    """Whether a belonging goes into a release as it is; the others are read, and written anew or left behind."""
    return "/" in name or not matches(name, _READ_ONLY)


def is_tokenizer(name: str) -> bool:
    """Whether a file at the top is a tokenizer's."""
    return name in _SETTINGS or is_vocabulary(name)


def is_vocabulary(name: str) -> bool:
    """Whether a file at the top holds the vocabulary of a tokenizer, or a part of it."""
    return "/" not in name and matches(name, _VOCABULARY) and not matches(name, _STRANGERS)


def is_processor(name: str) -> bool:
    """Whether a file at the top describes what is made of images, sounds and videos."""
    return "/" not in name and matches(name, _PROCESSOR)


def is_template(name: str) -> bool:
    """Whether a file is a chat template."""
    folder, _, inner = name.rpartition("/")
    return name in TEMPLATE_FILES or (folder == TEMPLATE_FOLDER and inner.endswith(".jinja"))


def is_legal(name: str) -> bool:
    """Whether a file at the top is a licence, a notice, or terms of use."""
    lower = name.lower()
    return bool(_LEGAL.search(lower)) and not _NO_TEXT.fullmatch(Path(lower).suffix)


def is_pickled(name: str) -> bool:
    """Whether a file, by its name, is a pickle, which can run code when it is read."""
    return matches(name, _PICKLED) and not name.startswith("language_model/")  # kenlm has a format of its own


def tokenizer_folders(files: Files) -> frozenset[str]:
    """Return the folders that hold a tokenizer and no weights: a processor keeps its second one there."""
    found = {folder for folder in files.folders() if files.has(f"{folder}/{TOKENIZER_CONFIG}")}
    return frozenset(
        folder
        for folder in found
        if not any(name.endswith((".safetensors", *_OTHER_FORMATS)) or is_pickled(name) for name in files.below(folder))
    )


def documents(files: Files) -> dict[str, Any]:
    """Return the configurations at the top that may name code, by name.

    Raises:
        BadInputError: one of them is no JSON.
    """
    named = {name for name in files.top() if name in ("config.json", TOKENIZER_CONFIG) or is_processor(name)}
    return {name: _json(files, name) for name in sorted(named)}


def is_weights(name: str) -> bool:
    """Whether a file, by its name, holds weights of a module."""
    return name.endswith(".safetensors") or is_pickled(name)


def module_folders(files: Files) -> Iterator[str]:
    """Yield the folders of a sentence-transformers model's modules.

    Raises:
        BadInputError: the file that names them cannot be read, or names what lies outside.
    """
    for module in _modules(files):
        folder = module.get("path", "")
        if not isinstance(folder, str) or (folder and not is_plain_path(folder.rstrip("/"))):
            raise BadInputError(
                f"{files.place}/{MODULES_FILE}: path: expected the name of a folder beside it, found {folder!r}"
            )
        if folder:
            yield folder.rstrip("/")


def _folders(files: Files) -> Iterator[str]:
    """Yield the folders that belong to a model."""
    yield from module_folders(files)
    yield "custom_generate"  # where transformers looks for a model's own way to generate
    yield from (folder for folder in files.folders() if _LEGAL_FOLDER.fullmatch(folder))
    yield from (folder for folder, told_by in _PART_FOLDERS.items() if files.has(told_by))
    yield from tokenizer_folders(files)


def modules_code(files: Files, place: CodePlace) -> frozenset[str]:
    """Return the code at a place that a sentence-transformers model's modules name; raises as `module_folders`."""
    types = [module.get("type") for module in _modules(files)]
    return custom_modules((name for name in types if isinstance(name, str)), place)


def _of_folder(names: Iterable[str]) -> Iterator[str]:
    """Yield what is shipped of a folder: everything but other formats of the same weights."""
    there = frozenset(names)
    safe = {name.rpartition("/")[0] for name in there if name.endswith(".safetensors")}
    for name in there:
        if name.endswith(_OTHER_FORMATS) or (is_pickled(name) and name.rpartition("/")[0] in safe):
            continue
        yield name


def _modules(files: Files) -> list[dict[str, Any]]:
    """Return the modules of a sentence-transformers model; none where there is no such file, or one of another kind."""
    modules = _json(files, MODULES_FILE) if files.has(MODULES_FILE) else []
    if not isinstance(modules, list):
        return []
    if len(modules) > _MAX_MODULES:
        raise BadInputError(
            f"{files.place}/{MODULES_FILE}: expected at most {_MAX_MODULES} modules, found {len(modules)}"
        )
    return [module for module in modules if isinstance(module, dict)]


def _json(files: Files, name: str) -> Any:
    return parse_json(files.read(name), f"{files.place}/{name}")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of some patterns, in any case."""
    return _any_of(tuple(patterns)).match(name.lower()) is not None


@functools.lru_cache(maxsize=64)
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(pattern.lower()) for pattern in patterns))
