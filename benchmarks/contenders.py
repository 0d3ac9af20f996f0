"""The ways from base and adapters to merged checkpoints: mergefleet, what people run today, and a plain copy."""

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.make_base import ADAPTERS, make_adapter, make_base
from benchmarks.measurement import Measurement, measure
from benchmarks.resident import Resident
from workers import HUGE_PAGES_VARIABLE

ADAPTER = "r16-all"
"""The adapter of the single merges."""
FEW = "r16-qv"
"""An adapter that changes little of its base."""
EIGHT = tuple(f"{ADAPTER}-{number}" for number in range(8))
"""Adapters for one pass."""


@dataclass(frozen=True, slots=True)
class Site:
    """A directory on one kind of filesystem: the inputs are there, and what runs write."""

    name: str
    root: Path

    @property
    def base(self) -> Path:
        """The base's directory."""
        return self.root / "base"

    def adapter(self, name: str) -> Path:
        """Return the directory of one adapter."""
        return self.root / "adapters" / name

    def out(self, name: str) -> Path:
        """Return where the last run of a contender left its output."""
        return self.root / "out" / name

    def home(self, name: str) -> Path:
        """Return mergefleet's home for a contender: its caches are there."""
        return self.root / "home" / name

    def log(self, name: str) -> Path:
        """Return where a contender writes what it says."""
        return self.root / f"{name}.log"

    def prepare(self, shape: str) -> None:
        """Make the base and the adapters, unless they are there."""
        complete = self.root / "complete"
        if complete.exists() and all(self.adapter(name).is_dir() for name in (*ADAPTERS, *EIGHT)):
            return
        make_base(shape, self.base)
        for name in ADAPTERS:
            make_adapter(shape, name, self.adapter(name), self.base)
        for number, name in enumerate(EIGHT):
            make_adapter(shape, ADAPTER, self.adapter(name), self.base, seed=number)
        complete.touch()

    def fresh(self, name: str) -> Path:
        """Return a contender's output path with nothing there, and nothing left to write back from before."""
        out = self.out(name)
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        os.sync()
        return out


def plain_environment() -> dict[str, str]:
    """Return an environment as people have it: without our settings, and without a GPU, so that all compute alike."""
    ours = ("MERGEFLEET_", HUGE_PAGES_VARIABLE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


class Contender(Protocol):
    """One way to get from base and adapter to a merged checkpoint."""

    @property
    def name(self) -> str:
        """What the table calls it."""

    def run(self, site: Site) -> Measurement:
        """Run once, into a fresh output directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """The base copied, once or several times, and made durable: what a merge costs when it computes nothing."""

    times: int = 1

    @property
    def name(self) -> str:
        """What the table calls it."""
        return "cp -r, sync" if self.times == 1 else f"{self.times} x cp -r, sync"

    def run(self, site: Site) -> Measurement:
        """Run once, into a fresh output directory."""
        out = site.fresh(self.name)
        out.mkdir()
        copies = " && ".join(f'cp -r "$0" "$1/{number}"' for number in range(self.times))
        command = ["sh", "-c", f'{copies} && sync -f "$1"', site.base, out]
        measurement = measure(command, plain_environment(), site.log(self.name))
        shutil.rmtree(out)  # not compared, and eight of them take much room
        return measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """mergefleet in a process that has everything imported; durability included, and arithmetic parity."""

    name: str
    resident: Resident
    base_quantization: str
    adapters: Sequence[str] = (ADAPTER,)
    keeps_cache: bool = False
    """Whether it finds the plan and the 4-bit base of its run before; otherwise every run starts with empty caches."""
    checked: bool = True
    """Whether arithmetic parity is part of it, as it is of every release; the other contenders check nothing."""

    def without_check(self) -> "Ours":
        """Return the same merge without arithmetic parity, to be held against those that have none."""
        return dataclasses.replace(self, name=f"{self.name}, check left out", checked=False)

    def run(self, site: Site) -> Measurement:
        """Run once, into a fresh output directory."""
        # One worker keeps what it knows for all that may find it, as a worker of a fleet does.
        home = site.home("kept" if self.keeps_cache else self.name)
        if not self.keeps_cache:
            shutil.rmtree(home, ignore_errors=True)
        adapters = [site.adapter(name) for name in self.adapters]
        out = site.fresh(self.name)
        measurement = self.resident.merge(
            site.base, adapters, out, base_quantization=self.base_quantization, home=home, checked=self.checked
        )
        if not self.keeps_cache:
            self.resident.forget(home)
        if self.adapters == EIGHT or not self.checked:
            shutil.rmtree(out)  # not compared
        return measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class OurCommand:
    """`mergefleet merge` as a person types it: a process of its own that imports everything first."""

    base_quantization: str
    adapters: Sequence[str] = (ADAPTER,)

    @property
    def name(self) -> str:
        """What the table calls it."""
        which = self.adapters[0] if len(self.adapters) == 1 else f"{len(self.adapters)} adapters"
        return f"mergefleet merge, {self.base_quantization}, {which}"

    def run(self, site: Site) -> Measurement:
        """Run once, into a fresh output directory."""
        home = site.home(self.name)
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        command = [Path(sys.executable).with_name("mergefleet"), "merge"]
        out = site.fresh(self.name)
        command += ["--base", site.base, "--to", out]
        options = ["--base-quantization", self.base_quantization, "--parity", "arithmetic", "--json"]
        for name in self.adapters:
            options += ["--adapter", str(site.adapter(name))]
        environment = plain_environment() | {"MERGEFLEET_HOME": str(home)}
        measurement = measure([*command, *options], environment, site.log(self.name))
        shutil.rmtree(home)
        if self.base_quantization != "none":
            shutil.rmtree(out)  # not compared
        return measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A script of this package that merges as people do today, in a process of its own.

    It ends when the page cache has all; how long its files take from there to the disk is in its output.
    """

    name: str
    module: str

    def run(self, site: Site) -> Measurement:
        """Run once, into a fresh output directory."""
        command = [sys.executable, "-m", self.module, site.base, site.adapter(ADAPTER), site.fresh(self.name)]
        measurement = measure(command, plain_environment(), site.log(self.name))
        begin = time.perf_counter()
        os.sync()
        return dataclasses.replace(measurement, output=json.dumps({"sync_seconds": time.perf_counter() - begin}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Imports:
    """What a reference imports, and nothing else: to be taken off its time, as ours runs in a warm process."""

    model_type: str
    name: str = "imports of a reference"

    def run(self, site: Site) -> Measurement:
        """Run once."""
        # The last two are imported late: by the model, and by PEFT when it puts an adapter on.
        modeling = f"transformers.models.{self.model_type}.modeling_{self.model_type}"
        modules = ("benchmarks.reference_16bit", modeling, "peft.tuners.lora.bnb")
        statement = f"import {', '.join(modules)}"
        return measure([sys.executable, "-c", statement], plain_environment(), site.log(self.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mergekit:
    """mergekit with the adapter on the base as its one model."""

    name: str = "mergekit"

    def run(self, site: Site) -> Measurement:
        """Run once, into a fresh output directory."""
        config = site.root / "mergekit.yaml"
        model = f"{site.base}+{site.adapter(ADAPTER)}"
        config.write_text(f"models: [{{model: {model}}}]\nmerge_method: passthrough\ndtype: bfloat16\n")
        command = [Path(sys.executable).with_name("mergekit-yaml"), config, site.fresh(self.name)]
        options = ["--lora-merge-cache", site.home(self.name), "--no-write-model-card"]
        shutil.rmtree(site.home(self.name), ignore_errors=True)
        return measure([*command, *options], plain_environment(), site.log(self.name))
