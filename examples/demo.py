"""The whole path on a real model: train adapters, merge them in bulk, prove, deliver to S3, pull one back, ask it.

Run by `make demo`. Everything is kept below .demo/: the base, the trained adapters and the quantized base are reused by
the next run; the job store, the object store and the releases are made anew.
"""

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
from rich.console import Console
from rich.table import Table

from examples.chats import HABITS, HELD_OUT_QUESTION, PIRATE
from examples.real_model import build_base
from tests.servers.s3 import S3Server, serve_s3

DEMO = Path(".demo").absolute()
BASE = DEMO / "smollm2-135m-instruct"
ADAPTERS = DEMO / "adapters"
RUN = DEMO / "run"
REQUESTS = Path(__file__).with_name("requests.yaml")
BUCKET = "releases"
PULLED = "pirate-nf4"
"""The job whose release is pulled back and asked."""
_PLAN = """\
What this does, on this machine alone, below .demo/ (about 2.5 GB): five to nine minutes on two cores, two or three of
them to train adapters that the next run finds there.
  1. a real chat model (135 M) out of a package, and three adapters trained on it
  2. one request file, seven merges, two workers under Ray, each release proven; six go to a real S3 server
  3. one release pulled back, verified, and asked a question without PEFT, beside base + adapter with it"""


def main() -> None:
    """Run the demo from the start to the end."""
    started = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 120)
    _quiet_libraries()
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    print(_PLAN, flush=True)

    console.rule("A real base")
    build_base(BASE)
    print(f"SmolLM2-135M-Instruct, bf16: {BASE}")
    console.rule("Three adapters, trained here")
    train_adapters(console)
    server_directory = RUN / "object-store"
    with serve_s3(server_directory) as server:
        console.rule("One bulk file, two workers")
        environment = _environment(server)
        _bucket(server)
        requests = RUN / REQUESTS.name
        shutil.copy(REQUESTS, requests)
        _mergefleet(["submit", requests], environment)
        _mergefleet(["run", "--drain", "--workers", "2"], environment)
        console.rule("Releases")
        show_releases(_mergefleet_json(["status"], environment)["jobs"], console)
        console.rule("One release, back from S3")
        pulled = RUN / "pulled" / PULLED
        _mergefleet(["pull", f"s3://{BUCKET}/{PULLED}", pulled], environment)
    show_answers(pulled, console)
    console.rule("Where things are")
    print(f"request file  {requests}")
    print(f"reports       {RUN / 'mergefleet' / 'reports'}/<job>/parity.html")
    print(f"releases      {RUN / 'releases'}, and in S3 (its server has ended; the data are in {server_directory})")
    print(f"pulled back   {pulled}")
    print(f"job store     MERGEFLEET_HOME={RUN / 'mergefleet'} mergefleet status")
    print("dashboard     while `mergefleet run` works; its address is the first line of that")
    print(f"Done in {time.monotonic() - started:.0f} s.")


def train_adapters(console: Console) -> None:
    """Train the adapter of every habit, unless it is there."""
    from examples.training import train_adapter  # noqa: PLC0415 - loaded after `_quiet_libraries`

    table = Table("adapter", "habit", "trained as", "loss", "seconds")
    for habit in HABITS:
        directory = ADAPTERS / habit.name
        trained_as = "LoRA, 16-bit base" if habit.base_quantization == "none" else "QLoRA, 4-bit base"
        if directory.is_dir():
            table.add_row(habit.name, habit.summary, trained_as, "", "before")
            continue
        start = time.monotonic()
        partial = directory.with_name(f"{habit.name}.partial")
        # Lines, not a bar: they are seen in a log, too.
        on_step = functools.partial(print, f"{habit.name}:", flush=True)
        losses = train_adapter(BASE, habit, partial, on_step=on_step)
        partial.rename(directory)
        seconds = time.monotonic() - start
        table.add_row(habit.name, habit.summary, trained_as, f"{losses[0]:.2f} to {losses[-1]:.2f}", f"{seconds:.0f}")
    console.print(table)


def show_releases(jobs: list[dict[str, Any]], console: Console) -> None:
    """Print where every release is, and the figures that let it out.

    Rounding: the largest error of an element over what one correct rounding allows. Survival: how much of the
    delta outlived the rounding, in the tensor where it is least. KL and top-1: against base + adapter through PEFT.
    """
    table = Table("release", "rounding", "survival", "KL, nats", "top-1")
    for job in jobs:
        parity = job["release"]["parity"]
        table.add_row(
            job["release"]["location"].replace(f"{Path.cwd()}/", ""),
            f"{parity['rounding_excess']:.2f}",
            f"{parity['min_survival']:.3f}",
            f"{parity['mean_kl']:.1e}",
            f"{parity['top1_agreement']:.3f}",
        )
    console.print(table)


def show_answers(pulled: Path, console: Console) -> None:
    """Ask the base, base + adapter, and the merged checkpoint, each through plain transformers."""
    from examples.chat_model import answer, load_model  # noqa: PLC0415 - loaded after `_quiet_libraries`

    console.print(f"[bold]{HELD_OUT_QUESTION}[/] (none of the training chats asks it)")
    table = Table("", "answer")
    table.add_row("base", answer(load_model(BASE), BASE, HELD_OUT_QUESTION))
    unmerged = load_model(BASE, ADAPTERS / PIRATE.name, quantization=PIRATE.base_quantization)
    table.add_row("4-bit base + adapter, through PEFT", answer(unmerged, BASE, HELD_OUT_QUESTION))
    table.add_row("merged, pulled from S3", answer(load_model(pulled), pulled, HELD_OUT_QUESTION))
    console.print(table)


def _quiet_libraries() -> None:
    """Leave the screen to the demo: no progress bars, no hints. Takes effect on libraries that are not loaded yet."""
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT 0.21 reads a flag that transformers 5.23 has renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _environment(server: S3Server) -> dict[str, str]:
    """Return the environment of the command: this demo's own places, and the way to the S3 server."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MERGEFLEET_", "AWS_"))}
    return (
        inherited
        | server.environment()
        | {
            "MERGEFLEET_HOME": str(RUN / "mergefleet"),
            "MERGEFLEET_CACHE": str(DEMO / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
    )


def _bucket(server: S3Server) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)


def _mergefleet(arguments: list[str | Path], environment: Mapping[str, str]) -> None:
    """Run the command as a person would, on this screen."""
    print(f"$ mergefleet {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([Path(sys.executable).with_name("mergefleet"), *arguments], env=environment, check=True)


def _mergefleet_json(arguments: list[str | Path], environment: Mapping[str, str]) -> dict[str, Any]:
    command = [Path(sys.executable).with_name("mergefleet"), *arguments, "--json"]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    main()
