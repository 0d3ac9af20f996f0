"""What a release takes over from its base and what from the adapter: decided from names and small files.

The files are the base's. Where the adapter ships a tokenizer, it is the adapter's, whole; so are the chat templates
where it ships any, the modules of sentence-transformers where it brings other weights of one, and each part of the
processor that it ships. Files that hold the base's vocabulary in another form stay where the adapter's tokenizer has
the same vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.errors import BadInputError, UnsupportedError
from jobs.release import one_name
from jobs.request_files.problems import show
from workers.bases.tokenizers import same_tokens
from workers.files.checkpoint import read_json
from workers.files.foreign import foreign_sha256
from workers.files.local import file_errors
from workers.releases.joined import join_processors, templates_within
from workers.releases.shipped_code import shipped_code
from workers.sources.belongings import (
    MODULE_SETTINGS,
    MODULES_FILE,
    OLD_TEMPLATE,
    TEMPLATE_FILES,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    belongings,
    is_legal,
    is_pickled,
    is_processor,
    is_template,
    is_tokenizer,
    is_vocabulary,
    is_weights,
    module_folders,
    ships,
    strays,
    tokenizer_folders,
)
from workers.sources.code_files import leave_out
from workers.sources.listing import LocalFiles

_NUM_NAMED = 4
"""Of each kind, in a note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """The files of base and adapter that a release has."""

    files: Mapping[str, Path]
    """By their names in the release; copied as they are, but for references that are left out."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Chat templates that the base has in a `tokenizer_config.json` that does not ship, by the files they become."""
    documents: Mapping[str, Any] = field(default_factory=dict)
    """JSON that is made of files of both, by name."""
    broken: Mapping[str, str]
    """References to code that is not there, with the file that is missing. Configurations are shipped without them."""
    from_adapter: frozenset[str]
    """Names of those that are the adapter's."""
    of_base: Mapping[str, Path]
    """What the release would have of the base, were there no adapter."""
    trained_modules: tuple[str, ...]
    """Weights of modules that the adapter brings, and that are not the base's."""
    left: tuple[str, ...]
    """Of the base, what does not ship: vocabulary in forms that the adapter's tokenizer does not have, and named chat
    templates where the adapter brings others."""
    strays: tuple[str, ...] = ()
    """Files and folders in the base's directory of which it is not known whether its model needs them."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of them."""
        notes = []
        if self.broken:
            named = [f"{show(reference)} needs {show(missing)}" for reference, missing in self.broken.items()]
            notes.append(
                f"references to code are left out of auto_map, as files of theirs are missing ({_some(named)}): "
                "classes of transformers are loaded instead; put the files beside the base to have them shipped"
            )
        if code := sorted(name for name in self.from_adapter if name.endswith(".py")):
            notes.append(
                f"the release carries code that came with the adapter ({_some(code)}), not run here; transformers runs "
                "it where trust_remote_code is true"
            )
        if self.trained_modules:
            notes.append(
                "the modules beside the transformer are the adapter's, which brings other weights than the base has "
                f"({_some(self.trained_modules)}); they are copied, and no prompt asks them"
            )
        vocabulary = [name for name in self.left if not is_template(name)]
        if named := [name for name in self.left if is_template(name)]:
            notes.append(
                f"the adapter's chat template replaces those of the base, and {_some(named)} of the base stays behind; "
                "add the file to the adapter to have it shipped"
            )
        if vocabulary:
            notes.append(
                f"the adapter's tokenizer replaces the base's, and {_some(vocabulary)} of the base stays behind: "
                "another vocabulary, one that cannot be compared, or a whole tokenizer of its own; add the file to the "
                "adapter to have it shipped"
            )
        if self.strays:
            notes.append(
                f"{_some(self.strays)} of the base stays behind, as it is not known to belong to a model; where the "
                "model asks for it, the release is not whole: copy it to where the release is loaded from"
            )
        if pickles := sorted(name for name in self.files if is_pickled(name)):
            notes.append(
                f"the release carries pickles of the base ({_some(pickles)}), not read here; save those modules as "
                "safetensors to have a release that cannot run code when it is loaded"
            )
        return tuple(notes)


def plan_shipment(base: Path, adapter: Path) -> Shipment:
    """Decide which files of a base and an adapter a release has.

    Raises:
        BadInputError: a configuration cannot be read, or base and adapter have different code under one name.
        UnsupportedError: weights of a module that was trained with the adapter are pickled.
    """
    ours, of_adapter = _shipped(base), _shipped(adapter)
    theirs = _taken(adapter, of_adapter)
    files, from_adapter, left = dict(ours), dict[str, Path](), list[str]()
    if any(name == TOKENIZER_CONFIG or is_vocabulary(name) for name in theirs):
        tokenizer = {name: path for name, path in theirs.items() if is_tokenizer(name)}
        stays = _staying(ours, tokenizer)
        files = {name: path for name, path in files.items() if not is_tokenizer(name) or name in stays}
        left += [name for name in ours if is_vocabulary(name) and name not in {*stays, *tokenizer}]
        from_adapter |= tokenizer
    processors = join_processors(ours, theirs)
    files = {name: path for name, path in files.items() if not is_processor(name)} | processors.files
    from_adapter |= {name: path for name, path in processors.files.items() if theirs.get(name) == path}
    templates = dict[str, str]()
    if _ships_template(theirs):
        named = _templates(theirs)
        left += sorted(_templates(ours) - named - TEMPLATE_FILES)
        files = {name: path for name, path in files.items() if not is_template(name)}
        from_adapter |= {name: path for name, path in theirs.items() if is_template(name)}
        if named == {OLD_TEMPLATE} and _templates(ours) - {OLD_TEMPLATE}:  # processors alone read that one
            templates = templates_within(theirs[OLD_TEMPLATE])
    elif TOKENIZER_CONFIG in ours.keys() - files.keys() and not any(map(is_template, files)):
        templates = templates_within(ours[TOKENIZER_CONFIG])
    for folder in tokenizer_folders(LocalFiles(adapter)):
        files = {name: path for name, path in files.items() if not name.startswith(f"{folder}/")}
        from_adapter |= {name: path for name, path in theirs.items() if name.startswith(f"{folder}/")}
    for name, path in _licences(of_adapter).items():
        if name not in ours or foreign_sha256(path) != foreign_sha256(ours[name]):
            from_adapter[f"{name}.adapter"] = path
    modules = _modules(adapter, theirs)
    if trained := _trained(ours, modules):
        brought = tuple(
            folder for folder in _module_folders(adapter) if any(name.startswith(folder) for name in modules)
        )
        files = {name: path for name, path in files.items() if not name.startswith(brought)}
        from_adapter |= modules
    code, broken = shipped_code(base, adapter, ours, from_adapter)
    from_adapter |= {name: path for name, path in code.items() if path == adapter / name}
    files = {name: path for name, path in (files | from_adapter).items() if not name.endswith(".py")} | code
    _check_case(files)
    for document in processors.made.values():
        leave_out(document, broken.keys())
    return Shipment(
        files=files,
        templates=templates,
        documents=processors.made,
        broken=broken,
        from_adapter=frozenset(from_adapter),
        of_base=ours,
        trained_modules=trained,
        left=tuple(left),
        strays=strays(LocalFiles(base)),
    )


def _check_case(files: Mapping[str, Path]) -> None:
    folded = dict[str, str]()
    for name in files:
        if (other := folded.setdefault(one_name(name), name)) != name:
            raise BadInputError(
                f"{files[name]} and {files[other]} differ in upper and lower case alone, or in the form of a letter, "
                "which many file systems take for one file; remove one of them"
            )


def shipped_files(adapter: Path) -> Mapping[str, Path]:
    """Return the files of an adapter's directory that a merged model takes from it, and the code beside them.

    Modules of sentence-transformers are among them where they have weights: those may be the base's, or trained.
    """
    return _taken(adapter, _shipped(adapter))


def licences_of(adapter: Path) -> Mapping[str, Path]:
    """Return the licences and notices at the top of an adapter's directory, which a release has beside the base's."""
    return _licences(_shipped(adapter))


def _taken(adapter: Path, files: Mapping[str, Path]) -> Mapping[str, Path]:
    described = [name for name in files if is_tokenizer(name) or is_processor(name) or is_template(name)]
    code = [name for name in files if name.endswith(".py")]
    folders = tuple(f"{folder}/" for folder in tokenizer_folders(LocalFiles(adapter)))
    return {
        name: files[name] for name in (*described, *code, *(name for name in files if name.startswith(folders)))
    } | _modules(adapter, files)


def _licences(files: Mapping[str, Path]) -> Mapping[str, Path]:
    return {name: path for name, path in files.items() if "/" not in name and is_legal(name)}


def _some(words: Sequence[str]) -> str:
    more = f" and {len(words) - _NUM_NAMED} more" if len(words) > _NUM_NAMED else ""
    return ", ".join(words[:_NUM_NAMED]) + more


def _shipped(directory: Path) -> dict[str, Path]:
    return {name: directory / name for name in sorted(belongings(LocalFiles(directory))) if ships(name)}


def _modules(adapter: Path, files: Mapping[str, Path]) -> dict[str, Path]:
    """Return what an adapter has of a sentence-transformers model's modules; nothing where none of them has weights."""
    folders = tuple(_module_folders(adapter))
    inside = {name: path for name, path in files.items() if name.startswith(folders)}
    if not any(map(is_weights, inside)):
        return {}
    return inside | {name: path for name, path in files.items() if name in MODULE_SETTINGS}


def _module_folders(adapter: Path) -> list[str]:
    return [f"{folder}/" for folder in module_folders(LocalFiles(adapter))]


def _trained(base: Mapping[str, Path], modules: Mapping[str, Path]) -> tuple[str, ...]:
    """Return which weights of an adapter's modules are not the base's."""
    trained = []
    for name, path in modules.items():
        num_parts = name.count("/") + 1
        with file_errors(f"reading {path}", path):
            if is_weights(name) and not (
                name in base
                and foreign_sha256(path, num_parts=num_parts) == foreign_sha256(base[name], num_parts=num_parts)
            ):
                trained.append(name)
        if name in trained and is_pickled(name):
            raise UnsupportedError(
                f"{path}: weights of a module that {MODULES_FILE} of the adapter names; they are not the base's, and a "
                "pickle, which no release takes from an adapter: save the module as safetensors, or remove its folder "
                "if the base's is to be used"
            )
    return tuple(trained)


def _staying(base: Mapping[str, Path], tokenizer: Mapping[str, Path]) -> frozenset[str]:
    """Return which files of the base's tokenizer stay beside an adapter's: forms of the same vocabulary."""
    vocabulary = {name: path for name, path in base.items() if is_vocabulary(name)}
    brought = {name: path for name, path in tokenizer.items() if is_vocabulary(name)}
    if not brought:  # settings alone are those of the base's vocabulary
        return frozenset(vocabulary)
    if TOKENIZER_FILE in brought and TOKENIZER_FILE in vocabulary:
        is_same = same_tokens(brought[TOKENIZER_FILE], vocabulary[TOKENIZER_FILE])
    else:
        common = brought.keys() & vocabulary.keys()
        with file_errors("comparing the tokenizers of base and adapter"):
            is_same = bool(common) and all(
                foreign_sha256(brought[name]) == foreign_sha256(vocabulary[name]) for name in common
            )
    # `tokenizer.json` is a whole tokenizer with its added tokens, and never one of two.
    return frozenset(vocabulary) - brought.keys() - {TOKENIZER_FILE} if is_same else frozenset()


def _templates(files: Mapping[str, Path]) -> frozenset[str]:
    """Return the files that chat templates are in, or would be in were they not in `tokenizer_config.json`."""
    beside = frozenset(name for name in files if is_template(name))
    return beside or frozenset(templates_within(files[TOKENIZER_CONFIG]) if TOKENIZER_CONFIG in files else ())


def _ships_template(files: Mapping[str, Path]) -> bool:
    if any(is_template(name) for name in files):
        return True
    # Older tokenizers hold it themselves, and a file beside them would win over it.
    tokenizer = read_json(files[TOKENIZER_CONFIG]) if TOKENIZER_CONFIG in files else {}
    return isinstance(tokenizer, dict) and bool(tokenizer.get("chat_template"))
