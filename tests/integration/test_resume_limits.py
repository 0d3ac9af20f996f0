"""What is not used again, and what an attempt leaves that was not killed."""

import dataclasses
import json
import os
import shutil
import time

import pytest

import workers.merging.made_with
import workers.unit.leftovers
import workers.unit.unit
from jobs.errors import FailureClass, NoCapacityError, OutOfMemoryError, TransientIOError
from jobs.request import MergeRequest
from tests.contract.places import DirectoryPlace, HubPlace, S3Place
from tests.drills import halve_scaling
from tests.dying import settings_in
from tests.methods import make_method_adapter
from tests.models import build_llama, make_adapter
from workers.files.scratch import OwnedDirectory
from workers.releases.delivery import verify_release
from workers.releases.sinks.directory import DirectoryStaging
from workers.releases.sinks.hub import HubStaging
from workers.releases.sinks.local_records import RECORDS_DIRECTORY, LocalRecords
from workers.releases.sinks.s3_staging import S3Staging
from workers.unit.admission import Admission
from workers.worker import MergeWorker


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", max_shard_size="100KB")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def make_worker(tmp_path):
    workers = []

    def make(**settings):
        workers.append(MergeWorker(dataclasses.replace(settings_in(tmp_path / "home"), **settings)))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def request_for(base, adapter, destination, **fields):
    defaults = {"base_quantization": "none", "parity": {"level": "arithmetic"}}
    return MergeRequest(
        id="job", base=str(base), adapter=str(adapter), destination=str(destination), **defaults | fields
    )


def leave_finished(worker, request):
    """Merge as far as the manifest, and leave what a kill leaves there."""
    (job,) = worker.run_unit("unit", (request,)).jobs
    assert job.failure is None
    worker.leave("job")
    return job


def merge(worker, request):
    """Merge and publish; return what it took."""
    outcome = worker.run_unit("unit", (request,))
    assert outcome.jobs[0].failure is None
    assert worker.publish("job").release.created
    return outcome.usage


def fail(worker, request):
    (job,) = worker.run_unit("unit", (request,)).jobs
    return job.failure


def files_below(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def records_below(directory):
    """Return the records in a directory's stagings by the shards they are of."""
    paths = directory.glob(f"*/{RECORDS_DIRECTORY}/*.json")
    return {json.loads(path.read_bytes()[65:])["artifact"]["path"]: path for path in paths}


METHODS = ["LORA", "DORA", "LOHA", "VERA", "TRAINABLE_TOKENS"]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_merge_is_resumed_to_the_same_bytes(make_worker, base, tmp_path, method, quantization):
    if method in ("LORA", "DORA"):
        adapter = make_adapter(base, tmp_path / "adapter", use_dora=method == "DORA", trained=method == "DORA")
    else:
        adapter = make_method_adapter(base, tmp_path / "adapter", method)
    fields = {"base_quantization": quantization}
    worker = make_worker()
    merge(worker, request_for(base, adapter, tmp_path / "alone" / "r", **fields))

    request = request_for(base, adapter, tmp_path / "again" / "r", **fields)
    leave_finished(worker, request)
    records = records_below(tmp_path / "again")
    assert records.keys() == {path.name for path in base.glob("*.safetensors")}
    lost = sorted(records)[2]
    records[lost].unlink()
    opened = make_worker().open_pass("p", "merge", (request_for(base, adapter, tmp_path / "pieces" / "r", **fields),))
    (piece,) = [piece for piece in opened.pieces if lost in piece.shards]

    usage = merge(make_worker(), request)
    assert 0 < usage.bytes_written <= piece.num_bytes
    assert usage.bytes_written >= 0.9 * piece.num_bytes
    assert files_below(tmp_path / "again") == files_below(tmp_path / "alone")


def test_nothing_left_to_merge_reads_nothing(make_worker, base, adapter, tmp_path):
    worker = make_worker()
    merge(worker, request_for(base, adapter, tmp_path / "alone" / "r"))
    request = request_for(base, adapter, tmp_path / "again" / "r")
    leave_finished(worker, request)
    usage = merge(make_worker(), request)
    assert (usage.bytes_read, usage.bytes_written) == (0, 0)
    assert files_below(tmp_path / "again") == files_below(tmp_path / "alone")


def test_a_local_base_whose_files_are_others_by_now_is_read_anew(make_worker, base, adapter, tmp_path):
    """Its digest takes samples: the same one need not stand for the same bytes."""
    copied = shutil.copytree(base, tmp_path / "base")
    request = request_for(copied, adapter, tmp_path / "releases" / "r")
    first = leave_finished(make_worker(), request)
    for path in copied.glob("*.safetensors"):
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=times)
    worker = make_worker()
    outcome = worker.run_unit("unit", (request,))
    assert outcome.jobs[0].merge_key == first.merge_key
    assert outcome.usage.bytes_written > 0.9 * sum(path.stat().st_size for path in copied.glob("*.safetensors"))


def test_other_versions_of_the_libraries_begin_anew(make_worker, base, adapter, tmp_path, monkeypatch):
    request = request_for(base, adapter, tmp_path / "releases" / "r")
    leave_finished(make_worker(), request)
    versions = workers.merging.made_with.library_versions() | {"torch": "0.0.1"}
    monkeypatch.setattr(workers.merging.made_with, "library_versions", lambda: versions)
    usage = merge(make_worker(), request)
    assert usage.bytes_written > 0.9 * sum(path.stat().st_size for path in base.glob("*.safetensors"))


@pytest.fixture
def recorded(monkeypatch):
    """Return the names of the shards that are recorded, as they are."""
    names = []
    really = LocalRecords.keep

    def keep(self, record):
        names.append(record.artifact.path)
        really(self, record)

    monkeypatch.setattr(LocalRecords, "keep", keep)
    return names


def test_a_shard_that_is_wrong_has_no_record(make_worker, base, tmp_path, monkeypatch, recorded):
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"], alpha=32, std=0.1)
    right = request_for(base, adapter, tmp_path / "right" / "r")
    leave_finished(make_worker(), right)
    assert len(recorded) == len(list(base.glob("*.safetensors")))
    recorded.clear()

    def halve_and_wait(base, quantized, weights, jobs, context, **options):
        """Shards are shipped and recorded beside what finds the others wrong: here, before it."""
        took = halve_scaling(base, quantized, weights, jobs, context, **options)
        for job in jobs:
            for upload in job.uploads:
                upload.result()
            for recording in list(job.recordings):
                recording.result()
        return took

    monkeypatch.setattr(workers.unit.unit, "run_pass", halve_and_wait)
    failure = fail(make_worker(), request_for(base, adapter, tmp_path / "wrong" / "r"))
    assert failure.failure_class is FailureClass.PARITY_FAILED
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    wrong = {shard for name, shard in index.items() if "q_proj" in name}
    assert sorted(recorded) == sorted(set(index.values()) - wrong)
    assert list((tmp_path / "wrong").iterdir()) == []


def test_what_was_made_of_a_base_that_changed_has_no_record(
    make_worker, base, adapter, tmp_path, monkeypatch, recorded
):
    changing = shutil.copytree(base, tmp_path / "base")
    really = workers.unit.unit.run_pass

    def run_pass(*arguments, **options):
        path = min(changing.glob("*.safetensors"))
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=times)
        return really(*arguments, **options)

    monkeypatch.setattr(workers.unit.unit, "run_pass", run_pass)
    failure = fail(make_worker(), request_for(changing, adapter, tmp_path / "releases" / "r"))
    assert failure.failure_class is FailureClass.TRANSIENT_IO
    assert recorded == []


STAGINGS = {DirectoryPlace: DirectoryStaging, S3Place: S3Staging, HubPlace: HubStaging}


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.s3), "hub"])
def place(request, tmp_path):
    name = tmp_path.name.replace("_", "-")
    if request.param == "directory":
        return DirectoryPlace(tmp_path / "home")
    if request.param == "s3":
        return S3Place(tmp_path / "home", request.getfixturevalue("s3"), f"limits/{name}")
    return HubPlace(tmp_path / "home", request.getfixturevalue("hub"), name)


@pytest.mark.parametrize("error", [TransientIOError, NoCapacityError])
def test_what_a_fault_of_the_sink_leaves(make_worker, place, base, adapter, monkeypatch, error):
    """Where a remote store fails for a while, the next attempt goes on; where there is no room, room is made."""
    staging = STAGINGS[type(place)]
    really, calls = staging.put, []

    def put(self, artifact, hashed_as=None):
        calls.append(artifact.path)
        if len(calls) == 4:
            raise error("told to fail")
        return really(self, artifact, hashed_as)

    monkeypatch.setattr(staging, "put", put)
    request = request_for(base, adapter, place.location)
    assert fail(make_worker(), request).failure_class is error.failure_class
    assert place.visible() == {}
    is_kept = error is TransientIOError and not isinstance(place, DirectoryPlace)
    assert (place.leftovers() != []) is is_kept
    usage = merge(make_worker(), request)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert (usage.bytes_written < 0.9 * size) is is_kept
    assert place.leftovers() == []


def test_a_job_that_is_refused_before_it_begins_leaves_what_it_found(make_worker, place, base, adapter, monkeypatch):
    request = request_for(base, adapter, place.location)
    leave_finished(make_worker(), request)

    def admit(_, jobs):
        for job in jobs:
            job.error = OutOfMemoryError("told to fail")

    with monkeypatch.context() as patch:
        patch.setattr(Admission, "admit", admit)
        assert fail(make_worker(), request).failure_class is FailureClass.OUT_OF_MEMORY
    assert place.leftovers() != []
    assert merge(make_worker(), request).bytes_written == 0
    assert place.leftovers() == []


def test_what_an_uplink_cannot_send_in_time_is_refused_at_once(make_worker, place, base, adapter):
    """At a byte a second; what is there already, or stays on this machine, does not go over it."""
    request = request_for(base, adapter, place.location, timeout_seconds=60)
    if isinstance(place, DirectoryPlace):
        assert fail(make_worker(uplink_bytes_per_second=1), request) is None
        return
    failure = fail(make_worker(uplink_bytes_per_second=1), request)
    assert failure.failure_class is FailureClass.TOO_LARGE
    assert "s at the 1e-06 MB/s of this machine's uplink, and timeout_seconds of the request is 60" in failure.message
    assert place.leftovers() == []
    leave_finished(make_worker(), request)
    assert merge(make_worker(uplink_bytes_per_second=1), request).bytes_written == 0


def leave_in_scratch(scratch, *, age):
    """Leave a dead staging with a record of some age."""
    owned = OwnedDirectory.make(scratch, "hub-0123-")
    (owned.path / RECORDS_DIRECTORY).mkdir()
    (owned.path / RECORDS_DIRECTORY / "record.json").write_text("{}")
    os.utime(owned.path / RECORDS_DIRECTORY, (time.time() - age,) * 2)
    owned.abandon()
    return owned.path


def test_finished_shards_in_scratch_wait_a_day_for_their_next_attempt(
    make_worker, place, base, adapter, tmp_path, monkeypatch
):
    worker = make_worker()
    young, old = (leave_in_scratch(tmp_path / "home" / "scratch", age=age) for age in (3600, 25 * 3600))
    merge(worker, request_for(base, adapter, place.location))
    assert (young.exists(), old.exists()) == (True, False)
    if isinstance(place, DirectoryPlace):
        return
    # Where the disk has no room for what is merged now, they make room.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    name = tmp_path.name.replace("_", "-")
    elsewhere = f"s3://{place.server.bucket}/other/{name}" if isinstance(place, S3Place) else f"hf://org/other-{name}"
    merge(worker, request_for(base, adapter, elsewhere))
    assert not young.exists()


@pytest.mark.parametrize("level", ["arithmetic", pytest.param("full", marks=pytest.mark.slow)])
def test_what_a_person_approved_is_published_without_being_merged_again(make_worker, place, base, adapter, level):
    request = request_for(base, adapter, place.location, requires_approval=True, parity={"level": level})
    first = leave_finished(make_worker(), request)
    assert place.visible() == {}
    outcome = (worker := make_worker()).run_unit("unit", (request,))
    assert (outcome.jobs[0].failure, outcome.jobs[0].merge_key) == (None, first.merge_key)
    assert outcome.usage.bytes_written == 0
    release = worker.publish("job", "ann").release
    assert release.manifest.approved_by == "ann"
    assert verify_release(release.location, worker._settings.scratch).approved_by == "ann"
