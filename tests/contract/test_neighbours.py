"""What belongs to others is left alone: beside, above and below a destination, whatever becomes of an attempt there."""

import signal
from collections.abc import Callable

import pytest

from jobs.errors import DestinationOccupiedError, MergefleetError
from tests.contract.neighbours import FILES, KEY, SMALL_FILES, Neighbours, below, publish
from tests.contract.places import Place, S3Place, content, putting_process, sink_of, wait_until
from tests.releases import fill
from workers.releases.delivery import verify_release

OTHER_KEY = "d" * 64
nested = pytest.mark.parametrize("place", ["directory", pytest.param("s3", marks=pytest.mark.s3)], indirect=True)
"""A Hub repository lies inside of none."""


def own_leftovers(place: Place, neighbours: Neighbours) -> list[str]:
    theirs = [key for key, _ in neighbours.uploads]
    left = [name for name in place.leftovers() if name not in theirs]
    return [name for name in left if name.startswith(".") or isinstance(place, S3Place)]


def test_neighbours_are_left_alone(place: Place) -> None:
    neighbours = Neighbours(place)

    first = sink_of(place).open(KEY)
    fill(first, FILES)
    first.discard()
    neighbours.check()

    with putting_process(place) as process:
        wait_until(place.is_busy)
        process.send_signal(signal.SIGKILL)
    neighbours.check()

    publish(place, FILES)
    neighbours.check()
    assert content(place) == FILES
    assert own_leftovers(place, neighbours) == []
    verify_release(place.location, place.scratch)

    with pytest.raises(DestinationOccupiedError):
        publish(place, SMALL_FILES, OTHER_KEY)
    neighbours.check()


@nested
@pytest.mark.parametrize("merge_key", [KEY, OTHER_KEY], ids=["same", "other"])
@pytest.mark.parametrize("name", ["prod", "eu/prod"])
def test_release_below_is_refused_by_name_and_left_alone(place: Place, name: str, merge_key: str) -> None:
    inner = below(place, name)
    publish(inner)
    before = inner.visible()

    for ask in (sink_of(place).existing, lambda: sink_of(place).open(merge_key)):
        with pytest.raises(DestinationOccupiedError, match=f"has the release at {inner.location} below it"):
            ask()

    assert inner.visible() == before
    verify_release(inner.location, inner.scratch)


@nested
@pytest.mark.parametrize("name", ["prod", "eu/prod"])
def test_release_above_is_refused_by_name_and_stays_whole(place: Place, name: str) -> None:
    publish(place)

    with pytest.raises(DestinationOccupiedError, match=f"lies inside the release at {place.location},"):
        sink_of(below(place, name)).open(KEY)

    verify_release(place.location, place.scratch)


@nested
def test_manifest_of_another_program_above_is_no_release(place: Place) -> None:
    place.write("manifest.json", b'{"name": "an app", "icons": []}')
    inner = below(place, "models/prod")
    publish(inner)
    verify_release(inner.location, inner.scratch)
    with pytest.raises(DestinationOccupiedError, match=r"manifest\.json is no manifest of mergefleet"):
        sink_of(place).open(KEY)


@nested
@pytest.mark.parametrize("outer_first", [True, False])
def test_of_two_that_were_opened_one_inside_the_other_one_is_published(place: Place, outer_first: bool) -> None:
    places = [place, below(place, "prod")]
    stagings = [sink_of(each).open(KEY) for each in places]
    manifests = [fill(staging, SMALL_FILES) for staging in stagings]
    publishing: list[Callable[[], object]] = [
        lambda number=number: stagings[number].publish(manifests[number])
        for number in ((0, 1) if outer_first else (1, 0))
    ]
    outcomes = []
    for each in publishing:
        try:
            outcomes.append(each())
        except MergefleetError as error:
            outcomes.append(None)
            assert isinstance(error, DestinationOccupiedError), error  # noqa: PT017 - one of two
    for staging in stagings:
        staging.discard()

    assert outcomes.count(None) == 1
    (winner,) = [each for each in places if "manifest.json" in each.visible()]
    verify_release(winner.location, winner.scratch)


@nested
def test_file_of_others_below_is_refused_and_left_alone(place: Place) -> None:
    place.write("deeper/notes.txt", b"theirs")
    with pytest.raises(DestinationOccupiedError, match="deeper"):
        sink_of(place).open(KEY)
    assert place.visible() == {"deeper/notes.txt": b"theirs"}
