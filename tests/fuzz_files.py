"""Mutated files against the real worker and the real command line: `make fuzz-files NUM_FILES=10000`.

Each round takes a sound base, adapter, tokenizer or request file, changes it (`tests/mutations.py`), and has it
planned, merged and published, or submitted, by a worker that goes on living. A round is wrong when it ends in a
traceback or a "fault of mergefleet", with an exit code outside 0 to 3, after more than 10 s of work or 1.5 GB, when it
touched anything outside its scratch, or when a release is not what transformers and PEFT make of the same files.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.models import build_llama, make_adapter
from tests.mutations import as_text, mutate_bytes, mutate_header, mutate_json, replace_file

MAX_SECONDS = 10.0
MAX_BYTES = 1_500_000_000
_HANGS_AFTER = 300.0
SECRET = "a file of the service that no release holds"

_KINDS = ("header", "index", "config", "adapter config", "tokenizer", "template", "kind of file", "request file")
_WEIGHTS = (5, 3, 5, 5, 3, 1, 2, 6)

_BESIDE_THE_WEIGHTS = ("index", "tokenizer", "template", "kind of file")
_NOT_LOADED = "released, but transformers and PEFT do not load the files"

_REQUESTS: dict[str, Any] = {
    "defaults": {"base_quantization": "none", "parity": {"level": "arithmetic"}, "labels": {"team": "a"}},
    "requests": [{"id": "one", "base": "/b/x", "adapter": "/a/x", "destination": "/r/x", "priority": 3}],
    "matrix": {"bases": ["/b/y"], "adapters": ["/a/y", "/a/z"], "id": "{base}-{adapter}", "destination": "/r/{id}"},
}


@dataclass(frozen=True)
class Verdict:
    """What one round came to."""

    kind: str
    outcome: str
    wrong: str | None = None


class Round:
    """One mutated set of files below a scratch directory."""

    def __init__(self, sound: Path, scratch: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.kind = self.random.choices(_KINDS, _WEIGHTS)[0]
        self.sound = sound
        self.directory = scratch / f"round-{seed}"
        self.base, self.adapter = self.directory / "base", self.directory / "adapter"
        self.outside = sound.parent / "outside" / "secret"

    def make(self) -> None:
        """Copy what is sound, and change one file of it."""
        self.sound_base = self.sound / ("sharded" if self.kind == "index" else self.random.choice(("base", "sharded")))
        self.sound_adapter = self.sound / self.random.choice(("lora", "dora", "lokr"))
        shutil.copytree(self.sound_base, self.base)
        shutil.copytree(self.sound_adapter, self.adapter)
        match self.kind:
            case "header":
                mutate_header(self._one("*.safetensors"), self.random, self.outside)
            case "index":
                self._change(self.base / "model.safetensors.index.json")
            case "config":
                self._change(self.base / self.random.choice(("config.json", "config.json", "generation_config.json")))
            case "adapter config":
                self._change(self.adapter / "adapter_config.json")
            case "tokenizer":
                self._change(self.base / self.random.choice(("tokenizer.json", "tokenizer_config.json")))
            case "template":
                path = self.random.choice((self.base, self.adapter)) / "chat_template.jinja"
                path.write_bytes(mutate_bytes(b"{% for m in messages %}{{ m.content }}{% endfor %}", self.random))
            case _:
                paths = [path for path in (*self.base.iterdir(), *self.adapter.iterdir()) if path.is_file()]
                replace_file(self.random.choice(sorted(paths)), self.random, self.outside)

    def _one(self, pattern: str) -> Path:
        where = self.random.choice((self.base, self.adapter))
        return self.random.choice(sorted(where.glob(pattern)))

    def _change(self, path: Path) -> None:
        path.write_bytes(as_text(mutate_json(json.loads(path.read_bytes()), self.random, self.outside), self.random))

    def make_requests(self) -> Path:
        """Write a changed request file."""
        self.directory.mkdir()
        changed = mutate_json(_REQUESTS, self.random, self.outside)
        suffix = self.random.choice((".yaml", ".jsonl", ".csv"))
        path = self.directory / f"requests{suffix}"
        if suffix == ".yaml":
            path.write_bytes(as_text(changed, self.random))
        elif suffix == ".jsonl":
            path.write_bytes(as_text(mutate_json(_REQUESTS["requests"][0], self.random, self.outside), self.random))
        else:
            row = b"id,base,adapter,destination,labels.team\none,/b/x,/a/x,/r/x,a\n"
            path.write_bytes(mutate_bytes(row, self.random))
        return path


class Judge:
    """Runs rounds in this process, one after the other, and says what is wrong with each."""

    def __init__(self, sound: Path, scratch: Path) -> None:
        from workers.merging.settings import WorkerSettings
        from workers.unit import vetting
        from workers.worker import MergeWorker

        os.environ["MERGEFLEET_HOME"] = str(scratch / "home")
        self.sound, self.scratch = sound, scratch
        settings = WorkerSettings(
            cache=scratch / "cache",
            scratch=scratch / "work",
            reports=scratch / "reports",
            device="cpu",
            num_threads=1,
            resident_bytes=1 << 30,
        )
        self.worker = MergeWorker(settings)
        self.elsewhere: list[Any] = []
        call = vetting.server.call

        def watched(*arguments: Any, **bounds: Any) -> Any:
            answer = call(*arguments, **bounds)
            self.elsewhere.append(answer)
            return answer

        vetting.server.call = watched  # type: ignore[method-assign]

    def judge(self, seed: int) -> Verdict:
        """Run one round."""
        made = Round(self.sound, self.scratch, seed)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        self.elsewhere.clear()
        begin = time.process_time()
        try:
            outcome, wrong = self._submit(made) if made.kind == "request file" else self._merge(made)
        except Exception as error:  # noqa: BLE001 - what a round must not end in
            outcome, wrong = "exception", f"{type(error).__name__}: {error!r}"
        seconds = time.process_time() - begin + sum(answer.cpu_seconds for answer in self.elsewhere)
        peak = max([_peak_bytes(), *(answer.peak_bytes for answer in self.elsewhere)])
        if wrong is None and outcome != "released" and seconds > MAX_SECONDS:
            wrong = f"took {seconds:.1f} s"
        if wrong is None and peak > MAX_BYTES:
            wrong = f"took {peak / 1e6:.0f} MB"
        if wrong is None:
            shutil.rmtree(made.directory, ignore_errors=True)
        return Verdict(made.kind, outcome, wrong)

    def _merge(self, made: Round) -> tuple[str, str | None]:
        from cluster import exit_codes
        from jobs.errors import FailureClass
        from jobs.request import MergeRequest

        made.make()
        runs = made.kind in ("tokenizer", "template") or (made.kind == "config" and made.random.random() < 0.3)
        # Few positions: what is asked of a model does not depend on how often it is asked.
        few = {"prompts": ["What is a mutation?"], "max_new_tokens": 4, "min_positions": 1}
        request = MergeRequest(
            id=f"round-{made.directory.name}",
            base=str(made.base),
            adapter=str(made.adapter),
            destination=str(made.directory / "release"),
            base_quantization="none",
            parity=few if runs else {"level": "arithmetic"},
        )
        outcome = self.worker.run_unit("fuzz", (request,)).jobs[0]
        failure = outcome.failure or self.worker.publish(request.id).failure
        if failure is None:
            return "released", self._check_release(made, made.directory / "release")
        if (made.directory / "release").exists():
            return "failed", "failed, and left a release"
        code = exit_codes.of_command([failure.failure_class])
        if failure.failure_class is FailureClass.INTERNAL or "Traceback" in failure.message or code not in range(4):
            return "failed", failure.message
        return failure.failure_class.value, _unfit(failure.message)

    def _submit(self, made: Round) -> tuple[str, str | None]:
        from typer.testing import CliRunner

        from cluster.cli import app

        path = made.make_requests()
        os.environ["MERGEFLEET_STORE"] = f"sqlite:///{made.directory}/jobs.db"
        codes = []
        said = ""
        for command in (["submit", str(path)], ["submit", "--json", str(path)], ["status"]):
            result = CliRunner().invoke(app, command)
            codes.append(result.exit_code)
            said += result.output
        wrong = [code for code in codes if code not in range(4)]
        if wrong or "Traceback" in said or "fault of mergefleet" in said:
            return "submitted", f"exit codes {codes}: {said[-500:]}"
        return ("queued" if codes[0] == 0 else "refused"), _unfit(said)

    def _check_release(self, made: Round, release: Path) -> str | None:
        for path in release.rglob("*"):
            if path.is_symlink() or (path.is_file() and SECRET.encode() in path.read_bytes()):
                return f"the release holds {path.name} from outside"
        wrong = _differs(made.base, made.adapter, release)
        if wrong is not None and wrong.startswith(_NOT_LOADED) and made.kind in _BESIDE_THE_WEIGHTS:
            # They need what was changed, a merge does not: it is the one of the sound files.
            return _differs(made.sound_base, made.sound_adapter, release)
        return wrong


def _differs(base: Path, adapter: Path, release: Path) -> str | None:
    """Return in what a release is not PEFT's own merge of the same files; None where it is.

    Where transformers or PEFT do not load the files, or not all of them, there is nothing to compare with.
    """
    from peft import PeftModel
    from safetensors.torch import load_file

    from tests.models import load_plain
    from workers.parity.inference import quiet_libraries

    found: dict[str, torch.Tensor] = {}
    for path in release.glob("*.safetensors"):
        found |= load_file(path)
    with quiet_libraries():
        try:
            merged = PeftModel.from_pretrained(load_plain(base), str(adapter)).merge_and_unload()
        except Exception as error:  # noqa: BLE001 - whatever they stumble over
            return f"{_NOT_LOADED}: {type(error).__name__}: {str(error)[:200]}"
        expected = merged.state_dict()
    for name, tensor in expected.items():
        if name in found:
            difference = (found[name].double() - tensor.double()).abs()
            allowed = 0.01 * tensor.double().abs().clamp(min=1e-3)
            if found[name].shape != tensor.shape or not bool((difference <= allowed).all()):
                return f"{name} differs from PEFT's merge by {float(difference.max())}"
    missing = expected.keys() - found.keys()
    if missing and not merged.config.tie_word_embeddings:
        return f"the release lacks {min(missing)}"
    return None


def _unfit(text: str) -> str | None:
    """Return what in a message would act on a terminal."""
    acting = re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    return None if acting is None else f"a message holds {acting[0]!r}: {text[:200]!r}"


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _work(connection: Connection, sound: Path, scratch: Path) -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    scratch.mkdir(exist_ok=True)
    os.chdir(scratch)
    judge = Judge(sound, scratch)
    while True:
        connection.send(judge.judge(connection.recv()))


class Hand:
    """A process that judges; another takes its place when it does not answer."""

    def __init__(self, sound: Path, scratch: Path) -> None:
        self._arguments = sound, scratch
        self.seed = -1
        self.since = 0.0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, seed: int) -> None:
        """Hand out a round."""
        self.seed, self.since = seed, time.monotonic()
        self.connection.send(seed)

    def take(self) -> Verdict | None:
        """Return the verdict on the round, if there is one by now."""
        try:
            if self.connection.poll():
                verdict: Verdict = self.connection.recv()
                return verdict
        except (EOFError, ConnectionError):
            self._start()
            return Verdict("any", "lost", f"round {self.seed}: the worker's process ended")
        if time.monotonic() - self.since > _HANGS_AFTER:
            self._process.kill()
            self._start()
            return Verdict("any", "held", f"round {self.seed}: no answer in {_HANGS_AFTER:.0f} s")
        return None

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _snapshot(*roots: Path) -> str:
    """Return a digest of names, sizes and times of all files below some directories."""
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*")):
            status = path.lstat()
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns} {status.st_mode}\n".encode())
    return digest.hexdigest()


def _build(sound: Path) -> None:
    from peft import LoKrConfig, get_peft_model

    from tests.models import load_plain

    build_llama(sound / "base")
    build_llama(sound / "sharded", max_shard_size="100KB")
    make_adapter(sound / "base", sound / "lora", rank_pattern={"q_proj": 4})
    make_adapter(sound / "base", sound / "dora", use_dora=True, targets=("q_proj", "down_proj"))
    torch.manual_seed(0)
    model = get_peft_model(load_plain(sound / "base"), LoKrConfig(target_modules=["v_proj", "up_proj"], r=4))
    for name, parameter in model.named_parameters():
        if "lokr" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(sound / "lokr"))


def _judge_all(hands: list[Hand], seeds: range, verdicts: list[Verdict]) -> None:
    """Have all rounds judged; a wrong one is printed as it is found."""
    waiting, free = list(seeds)[::-1], list(hands)
    while waiting or len(free) < len(hands):
        while free and waiting:
            free.pop().give(waiting.pop())
        for hand in [hand for hand in hands if hand not in free]:
            if (verdict := hand.take()) is not None:
                free.append(hand)
                verdicts.append(verdict)
                if verdict.wrong:
                    print(f"round {hand.seed}: {verdict.kind}: {verdict.wrong[:600]}", flush=True)
        time.sleep(0.01)


def main() -> int:
    """Fuzz, print the counts, and return 1 when a round was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; the others follow it")
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0))))
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    first = random.SystemRandom().randrange(10**9) if arguments.seed is None else arguments.seed
    print(f"rounds {first} to {first + arguments.rounds - 1}")
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory(prefix="mergefleet-fuzz-", ignore_cleanup_errors=True) as directory:
        top = Path(directory)
        (top / "outside").mkdir()
        (top / "outside" / "secret").write_text(SECRET)
        _build(top / "sound")
        before = _snapshot(top / "outside", top / "sound")
        hands = [Hand(top / "sound", top / f"scratch-{number}") for number in range(arguments.workers)]
        with contextlib.suppress(KeyboardInterrupt):  # what was found by then is told
            _judge_all(hands, range(first, first + arguments.rounds), verdicts)
        for hand in hands:
            hand.end()
        untouched = _snapshot(top / "outside", top / "sound") == before
    counts = collections.Counter((verdict.kind, verdict.outcome) for verdict in verdicts)
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:16} {outcome:16} {count:6}")
    num_wrong = sum(verdict.wrong is not None for verdict in verdicts)
    outside = "untouched" if untouched else "CHANGED"
    print(f"{len(verdicts)} rounds, {num_wrong} wrong; files outside scratch: {outside}")
    return int(bool(num_wrong) or not untouched)


if __name__ == "__main__":
    sys.exit(main())
