"""Attempts that are killed, and the next ones, which use what was finished: the same bytes, less to merge."""

import hashlib
import itertools
import json
import os
import pickle
import shutil

import pytest

from cluster.driving.sharing import SharedPass
from jobs.locations import LocalPath
from tests.contract.places import DirectoryPlace, HubPlace, S3Place
from tests.dying import settings_in
from tests.killing import (
    FULL,
    adapter_bytes,
    assert_whole,
    files_below,
    finished_in,
    killed,
    merged_again,
    requests_for,
    tensor_bytes,
)
from tests.models import build_llama, make_adapter
from workers.worker import MergeWorker


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 20}
    base = build_llama(directory / "base", max_shard_size="6MB", **shape)
    return base, make_adapter(base, directory / "adapter")


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory):
    """Return the files of releases that were made in one go, by the fields of their requests."""
    known = {}

    def files(**fields):
        key = json.dumps(fields, sort_keys=True)
        if key not in known:
            directory = tmp_path_factory.mktemp("undisturbed")
            (request,) = requests_for(sources, [LocalPath(directory / "release")], **fields)
            worker = MergeWorker(settings_in(directory / "home"))
            worker.run_unit("unit", (request,))
            assert worker.publish(request.id).failure is None
            known[key] = files_below(directory / "release")
        return known[key]

    return files


@pytest.fixture(
    params=[
        pytest.param("directory", marks=pytest.mark.slow),
        pytest.param("s3", marks=pytest.mark.s3),
        pytest.param("hub", marks=pytest.mark.slow),
    ]
)
def place(request, tmp_path, monkeypatch):
    monkeypatch.setattr("workers.releases.sinks.s3_objects.MIN_PART_BYTES", 5 << 20)
    name = tmp_path.name.replace("_", "-")
    if request.param == "directory":
        return DirectoryPlace(tmp_path / "home")
    if request.param == "s3":
        return S3Place(tmp_path / "home", request.getfixturevalue("s3"), f"resumed/{name}")
    return HubPlace(tmp_path / "home", request.getfixturevalue("hub"), name)


@pytest.mark.parametrize(
    ("die", "after"),
    [
        ("record", 2),
        pytest.param("put", 3, marks=pytest.mark.slow),
        pytest.param("staged", 0, marks=pytest.mark.slow),
    ],
    ids=["between two shards", "before a record", "before the manifest"],
)
def test_what_a_killed_worker_has_finished_is_used_again(place, sources, undisturbed, tmp_path, die, after):
    requests = requests_for(sources, [place.location])
    sizes = tensor_bytes(sources[0])
    killed(place, requests, die, after)
    (finished,) = finished_in(place).values()
    assert len(finished) == {"record": 2, "put": 2, "staged": len(sizes)}[die]
    usage = merged_again(place, requests)
    left = sum(num_bytes for name, num_bytes in sizes.items() if name not in finished)
    assert usage.bytes_written == left
    assert left <= usage.bytes_read <= left + adapter_bytes(sources[1])
    assert_whole(place, undisturbed(), tmp_path)


@pytest.mark.slow
def test_the_checkpoint_that_is_asked_is_the_one_that_ships(place, sources, undisturbed, tmp_path):
    requests = requests_for(sources, [place.location], parity=FULL)
    killed(place, requests, "record", after=3)
    usage = merged_again(place, requests)
    assert usage.bytes_written < sum(tensor_bytes(sources[0]).values())
    assert_whole(place, undisturbed(parity=FULL), tmp_path)


@pytest.mark.slow
def test_a_worker_that_is_killed_again_and_again_gets_on(place, sources, undisturbed, tmp_path):
    requests = requests_for(sources, [place.location])
    sizes = tensor_bytes(sources[0])
    for _ in range(2):
        killed(place, requests, "record", after=2)
    usage = merged_again(place, requests)
    four = [sum(sizes.values()) - sum(chosen) for chosen in itertools.combinations(sizes.values(), 4)]
    assert usage.bytes_written in four
    assert_whole(place, undisturbed(), tmp_path)


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.parametrize(("die", "after"), [("record", 3), ("complete", 2)])
def test_another_machine_goes_on_with_what_is_at_the_store(s3, sources, undisturbed, tmp_path, monkeypatch, die, after):
    monkeypatch.setattr("workers.releases.sinks.s3_objects.MIN_PART_BYTES", 5 << 20)
    place = S3Place(tmp_path / "home", s3, f"resumed/machines-{die}")
    requests = requests_for(sources, [place.location])
    sizes = tensor_bytes(sources[0])
    killed(place, requests, die, after)
    shutil.rmtree(place.scratch)
    usage = merged_again(place, requests)
    small = {name: size for name, size in sizes.items() if size <= 5 << 20}  # they wait in no upload
    if die == "complete":
        assert usage.bytes_written == sum(small.values())
    else:
        assert usage.bytes_written < sum(sizes.values())
    assert_whole(place, undisturbed(), tmp_path)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _rewrite(path, **changes):
    """Change a record, and have it right again."""
    record = json.loads(path.read_bytes()[65:]) | changes
    body = json.dumps(record).encode()
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _edit_check(path):
    path.write_bytes(path.read_bytes().replace(b'"rounding_excess":', b'"rounding_excess":0'))


@pytest.mark.parametrize("kind", ["directory", pytest.param("hub", marks=pytest.mark.slow)])
def test_what_was_tampered_with_is_merged_anew(kind, request, sources, undisturbed, tmp_path):
    if kind == "directory":
        place = DirectoryPlace(tmp_path / "home")
    else:
        place = HubPlace(tmp_path / "home", request.getfixturevalue("hub"), "tampered")
    requests = requests_for(sources, [place.location])
    sizes = tensor_bytes(sources[0])
    killed(place, requests, "staged")
    ((directory, finished),) = finished_in(place).items()
    damages = [
        lambda name: _flip(directory / name),
        lambda name: os.truncate(directory / name, sizes[name] - 5),
        lambda name: _edit_check(finished[name]),
        lambda name: _rewrite(finished[name], merge_key="0" * 64),
        lambda name: _rewrite(finished[name], origin="0" * 64),
    ]
    damaged = dict(zip(sizes, damages, strict=False))
    assert len(damaged) == len(damages) < len(sizes)
    for name, damage in damaged.items():
        damage(name)
    usage = merged_again(place, requests)
    assert usage.bytes_written == sum(sizes[name] for name in damaged)
    assert_whole(place, undisturbed(), tmp_path)


@pytest.mark.slow
@pytest.mark.s3
def test_what_was_tampered_with_at_the_store_is_merged_anew(s3, sources, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("workers.releases.sinks.s3_objects.MIN_PART_BYTES", 5 << 20)
    place = S3Place(tmp_path / "home", s3, "resumed/tampered")
    requests = requests_for(sources, [place.location])
    sizes = tensor_bytes(sources[0])
    killed(place, requests, "staged")
    shutil.rmtree(place.scratch)
    files = {key.rpartition("/")[2]: (key, upload) for key, upload in place.uploads() if "/." not in key}
    records = {key.rpartition("/")[2]: (key, upload) for key, upload in place.uploads() if "/." in key}
    one, two, three = sorted(files)[:3]
    at = {"Bucket": s3.bucket}
    key, upload = files[one]
    place.client.upload_part(
        **at, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * (5 << 20), ChecksumAlgorithm="CRC64NVME"
    )
    key, upload = files[two]
    place.client.abort_multipart_upload(**at, Key=key, UploadId=upload)
    key, upload = records[three]
    place.client.abort_multipart_upload(**at, Key=key, UploadId=upload)
    forged = place.client.create_multipart_upload(**at, Key=key)["UploadId"]
    place.client.upload_part(**at, Key=key, UploadId=forged, PartNumber=1, Body=b"{}")
    usage = merged_again(place, requests)
    anew = sum(size for name, size in sizes.items() if name in {one, two, three} or name not in files)
    assert usage.bytes_written == anew
    assert_whole(place, undisturbed(), tmp_path)


@pytest.mark.slow
def test_each_job_of_a_pass_uses_its_own_shards(sources, undisturbed, tmp_path):
    places = [DirectoryPlace(tmp_path / name) for name in ("one", "two")]
    base, _ = sources
    requests = requests_for(sources, [place.location for place in places])
    sizes = tensor_bytes(base)
    one, two, three = sorted(sizes)[:3]
    places[0].scratch = tmp_path / "home" / "scratch"
    killed(places[0], requests, "staged")
    for place, lost in zip(places, [(one, two), (two, three)], strict=True):
        (finished,) = finished_in(place).values()
        for name in lost:
            finished[name].unlink()
    worker = MergeWorker(settings_in(tmp_path / "home"))
    outcome = worker.run_unit("unit", requests)
    assert [job.failure for job in outcome.jobs] == [None, None]
    assert outcome.usage.bytes_written == sizes[one] + 2 * sizes[two] + sizes[three]
    read = sizes[one] + sizes[two] + sizes[three]
    assert read <= outcome.usage.bytes_read <= read + 2 * adapter_bytes(sources[1])
    for number, place in enumerate(places):
        assert worker.publish(f"job-{number}").release.created
        expected = undisturbed()
        found = files_below(place.location.path)
        # The request's id is in its manifest and report.
        assert {name: data for name, data in found.items() if name.endswith(".safetensors")} == {
            name: data for name, data in expected.items() if name.endswith(".safetensors")
        }
        if number == 0:
            assert found == expected
        assert place.leftovers() == []
    worker.close()


def test_a_shared_pass_hands_out_what_is_left(place, sources, undisturbed, tmp_path):
    requests = requests_for(sources, [place.location])
    sizes = tensor_bytes(sources[0])
    killed(place, requests, "record", after=3)
    (finished,) = finished_in(place).values()
    workers = [MergeWorker(settings_in(place.scratch.parent)) for _ in range(2)]
    opened = pickle.loads(pickle.dumps(workers[0].open_pass("p", "merge", requests)))
    assert {shard for piece in opened.pieces for shard in piece.shards} == sizes.keys() - finished.keys()
    shared = SharedPass("p")
    shared.open(opened)
    written = 0
    for worker in itertools.cycle(workers):
        if not shared.todo:
            break
        (piece,) = shared.give("it", 1)
        answer = worker.merge_shards(shared.work("some", requests), frozenset(piece.shards))
        written += answer.usage.bytes_written
        shared.take("it", answer)
    outcome = workers[1].finish_pass(shared.work("end", requests), shared.merged(requests))
    assert [job.failure for job in outcome.jobs] == [None]
    assert written == sum(size for name, size in sizes.items() if name not in finished)
    assert workers[1].publish("job-0").release.created
    for worker in workers:
        worker.close()
    assert_whole(place, undisturbed(), tmp_path)
