"""What a base, and what an adapter, consists of at a place."""

import fnmatch
import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import NotFoundError, UnsupportedError
from jobs.locations import Location
from jobs.steps import in_order
from workers.sources.adapter_files import weight_files
from workers.sources.belongings import belongings
from workers.sources.listing import Files, LocalFiles
from workers.sources.pickled import PICKLED_WEIGHTS
from workers.sources.pickled_bases import pickled_weights
from workers.sources.refused_forms import form_of_files

_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a base, or an adapter, consists of."""

    name: str
    config: str
    weights: str
    """Pattern of its safetensors files."""
    duplicates: str | None
    """Pattern of safetensors files that repeat the weights in a form that is not read here."""
    pickled: tuple[str, ...]
    """Patterns of the same weights in pickle files."""

    def select(self, files: Files) -> list[str]:
        """Return the names, in order, of the files that belong to it, out of all that are at a place.

        Raises:
            BadInputError: a file that says what belongs together cannot be read.
        """
        top = frozenset(files.top())
        weights = {name for name in top if self._holds(name)} or self._converted(top)
        return sorted(belongings(files) | top & {self.config} | weights)

    def check(self, names: Iterable[str], location: Location) -> None:
        """Check that config and weights are among the files of a location.

        Raises:
            NotFoundError: they are not; the message names what was expected.
            UnsupportedError: there are only pickled weights, of a kind that is not converted.
        """
        there = frozenset(name for name in names if "/" not in name)
        has_weights = any(map(self._holds, there)) or bool(self._converted(there))
        form = form_of_files(there) if self is BASE else None
        if self is BASE and {self.config, ADAPTER.config} <= there:
            raise UnsupportedError(
                f"base {location} holds an adapter of its own ({ADAPTER.config} beside {self.config}): transformers "
                "puts it on where PEFT is installed and leaves it off elsewhere, so that the base is two models; merge "
                "that adapter into the base first, or name a copy of the base without it"
            )
        if not has_weights:
            # What its maker calls consolidated is pickled, too, and has other names of tensors besides.
            pickled = sorted(name for name in there if _matches(name, self.pickled) and "consolidated" not in name)
            if pickled:
                raise UnsupportedError(
                    f"{self.name} {location} has its weights only in pickle files ({pickled[0]}), which can run code "
                    "when they are read; re-save it as safetensors"
                )
        if form is not None and not (has_weights and self.config in there):
            raise UnsupportedError(f"{self.name} {location} is {form.words} (found {_some(there)}). {form.advice}")
        if not has_weights:
            raise NotFoundError(f"{self.name} {location} has no {self.weights}; found {_some(there)}")
        if self.config not in there:
            raise NotFoundError(f"{self.name} {location} has no {self.config}; found {_some(there)}")

    def _converted(self, names: frozenset[str]) -> set[str]:
        """Return the pickled files that are converted, where they are all there is of a base's weights."""
        return set(pickled_weights(names)) if self is BASE else set()

    def _holds(self, name: str) -> bool:
        """Whether a file at the top holds weights as they are read here."""
        is_repeated = self.duplicates is not None and fnmatch.fnmatchcase(name, self.duplicates)
        return fnmatch.fnmatchcase(name, self.weights) and "/" not in name and not is_repeated


class AdapterKind(Kind):
    """An adapter: its own files, and those with what was trained beside it."""

    def select(self, files: Files) -> list[str]:
        """Do as any kind, with the weights that are there."""
        weights = weight_files(files.top(), self.name)
        beside = (name for name in super().select(files) if "/" in name or not name.endswith(".safetensors"))
        return sorted({*beside, *weights.own, *weights.beside})

    def check(self, names: Iterable[str], location: Location) -> None:
        """Check that config and weights are there, of a kind that is read; raises as `weight_files`.

        Raises:
            NotFoundError: adapters lie in folders of the location, and none at its top; names the folders.
        """
        everything = frozenset(names)
        there = frozenset(name for name in everything if "/" not in name)
        if there.isdisjoint({self.weights, PICKLED_WEIGHTS}):
            _check_nemo(everything, location)
        if self.config not in there and (folders := self._folders(everything)):
            listed = ", ".join(folders[:_MAX_SHOWN]) + (", …" if len(folders) > _MAX_SHOWN else "")
            raise NotFoundError(
                f"adapter {location} has no {self.config} at its top; of the folders below it {len(folders)} "
                f"{'has' if len(folders) == 1 else 'have'} one: {listed}; name the one that is meant, such as "
                f"{location.folder(folders[0])}"
            )
        weights = weight_files(there, f"adapter {location}")
        if self.config not in there and weights.own[0].endswith(".pt"):
            raise NotFoundError(
                f"adapter {location} has no {self.config}: {weights.own[0]} is an adapter in torchtune's own layout, "
                "which says nothing of rank and alpha; write them down as torchtune does for checkpoints of Hugging "
                'Face: {"peft_type": "LORA", "r": ..., "lora_alpha": ..., "target_modules": [...]}'
            )
        if self.config not in there and "adapter_config.yaml" in there:
            raise NotFoundError(
                f"adapter {location} has no {self.config}, and an adapter_config.yaml, as the converter of NeMo 1 "
                f"writes it: write its fields as JSON into {self.config}"
            )
        if self.config not in there:
            raise NotFoundError(f"adapter {location} has no {self.config}; found {_some(there)}")

    def _folders(self, names: Iterable[str]) -> list[str]:
        """Return the folders below a place that hold an adapter, as PEFT saves those that have names."""
        return sorted(
            (folder for folder, _, name in (each.rpartition("/") for each in names) if folder and name == self.config),
            key=in_order,
        )


BASE = Kind(
    name="base",
    config="config.json",
    weights="*.safetensors",
    duplicates="consolidated*.safetensors",  # the release format of some makers, beside the one of transformers
    pickled=("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt"),
)
ADAPTER = AdapterKind(
    name="adapter",
    config="adapter_config.json",
    weights="adapter_model.safetensors",
    duplicates=None,
    pickled=(),
)


def local_names(kind: Kind, directory: Path) -> list[str]:
    """Return what `Kind.check` looks at in a local directory: all names at the top, and configs up to two folders down.

    PEFT saves an adapter that has a name into a folder of that name, and trainers that into one of the step.
    """
    below = (f"{folders}/{kind.config}" for folders in ("*", "*/*"))
    found = (name for pattern in below for name in glob.iglob(pattern, root_dir=directory))  # noqa: PTH207 - passes over what it may not read
    return [*(path.name for path in directory.iterdir()), *found]


def files_of(kind: Kind, directory: Path) -> list[Path]:
    """Return the files of a local directory that belong to a kind, by name."""
    return sorted(directory / name for name in kind.select(LocalFiles(directory)))


def _check_nemo(names: frozenset[str], location: Location) -> None:
    """Say what a checkpoint of NeMo 2 is, whose weights are in a folder.

    Raises:
        UnsupportedError: it is one.
    """
    folders = {name.partition("/")[0] for name in names}
    found = {"context", "weights"} if {"context", "weights"} <= folders else {"model_weights"} & folders
    if found:
        raise UnsupportedError(
            f"adapter {location} is a distributed checkpoint of NeMo ({' and '.join(sorted(found))}), with Megatron's "
            "names and fused projections; export it to PEFT's format: "
            "nemo.collections.llm.export_ckpt(path, target='hf-peft', output_path=...)"
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)[:5]) or "nothing"
