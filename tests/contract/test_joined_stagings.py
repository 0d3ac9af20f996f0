"""Several processes take part in one release: what each has put, any of them can publish."""

import dataclasses
import pickle
from pathlib import Path

import pytest

from tests.contract.places import (
    DirectoryPlace,
    Place,
    S3Place,
    content,
    sink_of,
)
from tests.releases import SHARD, make_files, make_manifest, write_files
from workers.releases.delivery import verify_release
from workers.releases.sinks import Receipt

KEY = "a" * 64
FILES = make_files()


def taken(receipt: Receipt) -> Receipt:
    """Send a receipt as it goes between workers."""
    return pickle.loads(pickle.dumps(receipt))


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_files_put_by_several_processes_are_published_by_one(place: Place, apart: bool) -> None:
    first = sink_of(place).open(KEY)
    ticket = first.ticket
    if apart:  # as on another machine: the directory of the first is not there
        ticket = dataclasses.replace(ticket, directory=Path("/another/machine", ticket.directory.name))
    second = sink_of(place).join(ticket)
    if apart and isinstance(place, DirectoryPlace):
        assert second is None  # it writes where the release will be, or nowhere
        return
    assert second is not None
    assert (second.directory == first.directory) is not apart
    manifest = make_manifest(FILES, merge_key=KEY)
    receipts = []
    for number, artifact in enumerate(manifest.files):
        staging = (first, second)[number % 2]
        write_files(staging.directory, {artifact.path: FILES[artifact.path]})
        receipt = staging.put(artifact)
        if staging is second:
            receipts.append(receipt)
    assert place.visible() == {}
    for receipt in receipts:
        first.take(taken(receipt))

    published = first.publish(manifest)
    first.discard()
    second.discard()

    assert published.created
    assert content(place) == FILES
    assert verify_release(place.location, place.scratch) == manifest
    assert place.leftovers() == []


def test_what_nobody_handed_over_is_gone_with_the_release(place: Place) -> None:
    first = sink_of(place).open(KEY)
    second = sink_of(place).join(first.ticket)
    assert second is not None
    manifest = make_manifest(FILES, merge_key=KEY)
    write_files(first.directory, FILES)
    # Of a process that died between sending a shard and saying so; another sends it again.
    second.put(next(artifact for artifact in manifest.files if artifact.path == SHARD))
    third = sink_of(place).join(first.ticket)
    assert third is not None
    for artifact in manifest.files:
        first.take(taken(third.put(artifact)))
    assert first.publish(manifest).created
    first.discard()
    third.discard()
    if isinstance(place, S3Place):
        assert place.uploads() == []
    second.discard()
    assert place.leftovers() == []
    assert content(place) == FILES


def test_a_directory_that_is_gone_cannot_be_joined(tmp_path: Path) -> None:
    place = DirectoryPlace(tmp_path)
    first = sink_of(place).open(KEY)
    first.discard()
    assert sink_of(place).join(first.ticket) is None
    assert place.leftovers() == []
