"""Patterns of request files are looked up in directories, prefixes and repositories alike."""

import pytest
import torch
from safetensors.torch import save

from jobs.errors import NotFoundError
from jobs.locations import HubRepo, LocalPath, Location
from jobs.request_files.problems import RequestFileError
from jobs.request_files.reading import Origin, read_requests
from tests.contract.places import HubPlace, Place
from workers.sources.fetch import fetch_adapter
from workers.sources.folders import Folders

WEIGHTS = save({"w": torch.zeros(7)})
ADAPTER = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": WEIGHTS}
OF_THE_TRAINER = {"optimizer.pt": b"pickle", "rng_state.pth": b"pickle", "trainer_state.json": b"{}"}


def write(place: Place, folder: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        place.write(f"{folder}/{name}", data)


def text_of(location: Location, pattern: str) -> str:
    """Return what a person writes for a pattern below a place."""
    if isinstance(location, HubRepo):
        return f"hf://{location.repo_id}/{pattern}@{location.revision}"
    return f"{location}/{pattern}"


def read(place: Place, pattern: str):
    text = f"matrix:\n  bases: [/b]\n  adapters: '{text_of(place.location, pattern)}'\n  destination: /out/{{step}}\n"
    return read_requests(text, Origin("f.yaml", ".yaml", place.scratch), listing=Folders())


def test_a_pattern_stands_for_what_is_there(place: Place) -> None:
    """Whole adapters, by number; the rest is told, and a new one is found the next time."""
    for step in (900, 1500, 100):
        write(place, f"runs/x/checkpoint-{step}", ADAPTER | OF_THE_TRAINER)
    write(place, "runs/x/checkpoint-7", OF_THE_TRAINER)
    write(place, "runs/y/checkpoint-8", ADAPTER)
    place.write("runs/x/checkpoint-9", b"a file")

    reading = read(place, "runs/x/checkpoint-*")

    run = place.location.folder("runs/x")
    assert [request.adapter for request in reading.requests] == [
        run.folder(f"checkpoint-{step}") for step in (100, 900, 1500)
    ]
    assert reading.left_out == (f"{run.folder('checkpoint-7')}: has no adapter_config.json",)
    write(place, "runs/x/checkpoint-2000", ADAPTER)
    again = read(place, "runs/x/checkpoint-*")
    assert again.requests[:3] == reading.requests
    assert [str(request.destination) for request in again.requests[3:]] == ["/out/2000"]
    assert [request.adapter.name for request in read(place, "*/y/checkpoint-?").requests] == ["checkpoint-8"]


def test_a_file_that_is_cut_off_is_left_out(place: Place) -> None:
    """A copy of a directory that is being written has such files. On the Hub a commit holds whole files."""
    write(place, "checkpoint-1", ADAPTER)
    write(place, "checkpoint-2", ADAPTER | {"adapter_model.safetensors": WEIGHTS[:-1]})
    reading = read(place, "checkpoint-*")
    assert len(reading.requests) == (2 if isinstance(place, HubPlace) else 1)
    assert len(reading.left_out) == (0 if isinstance(place, HubPlace) else 1)


def test_what_a_pattern_stands_for_is_fetched_without_what_the_trainer_keeps(place: Place) -> None:
    write(place, "run/checkpoint-5", ADAPTER | OF_THE_TRAINER)
    (request,) = read(place, "run/checkpoint-*").requests
    assert request.adapter is not None
    source = fetch_adapter(request.adapter, place.scratch / "cache")
    brought = {path.name for path in source.directory.iterdir()}
    if isinstance(request.adapter, LocalPath):
        assert source.directory == request.adapter.path  # nothing is brought
    else:
        assert brought == ADAPTER.keys()
    write(place, "plain", ADAPTER)
    assert fetch_adapter(place.location.folder("plain"), place.scratch / "cache").digest == source.digest


def test_nothing_that_matches_is_a_mistake_that_names_the_place(place: Place) -> None:
    write(place, "run/other", ADAPTER)
    with pytest.raises(RequestFileError, match=r"f\.yaml:3: matrix\.adapters: expected at least one folder") as caught:
        read(place, "run/checkpoint-*")
    assert f"nothing in {place.location.folder('run')} matches" in str(caught.value)
    with pytest.raises(RequestFileError, match=r"f\.yaml:3: matrix\.adapters: expected .*nowhere"):
        read(place, "nowhere/checkpoint-*")


def test_adapters_with_names_are_told_and_can_be_asked_for(place: Place) -> None:
    for name in ("policy", "critic"):
        write(place, f"run/checkpoint-5/{name}", ADAPTER)
    with pytest.raises(RequestFileError, match="with adapters in its folders critic, policy; write") as caught:
        read(place, "run/checkpoint-*")
    assert repr(text_of(place.location, "run/checkpoint-*/critic")) in str(caught.value)
    (request,) = read(place, "run/checkpoint-*/critic").requests
    assert (request.adapter, request.destination.name) == (place.location.folder("run/checkpoint-5/critic"), "5")
    with pytest.raises(NotFoundError, match=r"2 have one: critic, policy"):
        fetch_adapter(place.location.folder("run/checkpoint-5"), place.scratch / "cache")
