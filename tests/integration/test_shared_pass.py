"""One pass on several workers: the release is, byte for byte, that of one worker that did it all."""

import dataclasses
import itertools
import pickle

import pytest
from safetensors.torch import load_file

from jobs.errors import FailureClass
from jobs.request import MergeRequest
from tests.methods import make_method_adapter
from tests.models import build_bnb_4bit, build_llama, build_qwen2, make_adapter
from tests.releases import left_in
from workers.files.scratch import OwnedDirectory
from workers.merging.outcomes import PassWork, Unreachable
from workers.releases.delivery import pull_release
from workers.releases.sinks.directory import DirectoryStaging
from workers.worker import MergeWorker

FULL = {"prompts": ["The capital of France is"], "max_new_tokens": 2, "min_positions": 1}
NAME = "merge:llama:some"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def base(places):
    return build_llama(places / "llama", max_shard_size="100KB")


@pytest.fixture(scope="module")
def adapters(places, base):
    return {
        "all": make_adapter(base, places / "all"),
        "few": make_adapter(base, places / "few", rank=4, targets=["q_proj", "v_proj"], seed=2),
        "dora": make_adapter(base, places / "dora", seed=3, use_dora=True, trained=True),
    }


@pytest.fixture
def make_worker(settings, tmp_path):
    """Make workers as on one machine: of their own scratch, with a cache they share."""
    workers = []

    def make():
        scratch = tmp_path / f"scratch-{len(workers)}"
        workers.append(MergeWorker(dataclasses.replace(settings, scratch=scratch)))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def requests_for(base, adapters, directory, **fields):
    fields = {"parity": {"level": "arithmetic"}} | fields
    return tuple(
        MergeRequest(id=name, base=str(base), adapter=str(adapter), destination=str(directory / name), **fields)
        for name, adapter in adapters.items()
    )


def work(requests, tickets):
    return PassWork(pass_id="p", name=NAME, requests=requests, tickets=tickets)


def sent(value):
    """Send a value as it goes between processes."""
    return pickle.loads(pickle.dumps(value))


def merge_together(workers, requests, *, finisher):
    """Merge on several workers, a piece each in turns; return the answers, and what each has merged."""
    opened = sent(workers[0].open_pass("p", NAME, requests))
    assert opened.ended == ()
    merged = {request.id: [] for request in requests}
    for worker, piece in zip(itertools.cycle(workers), opened.pieces, strict=False):
        answer = sent(worker.merge_shards(work(requests, opened.tickets), frozenset(piece.shards)))
        assert answer.ended == ()
        for name, shards in answer.merged.items():
            assert sorted(receipt.artifact.path for receipt in shards.receipts) == sorted(piece.shards)
            merged[name].append(shards)
    finished = sent(
        finisher.finish_pass(work(requests, opened.tickets), {name: tuple(shards) for name, shards in merged.items()})
    )
    return opened, finished


def files_below(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("quantization", "parity"),
    [
        ("none", {"level": "arithmetic"}),
        ("nf4", {"level": "arithmetic"}),
        pytest.param("nf4", FULL, marks=pytest.mark.slow),
    ],
)
def test_the_bytes_are_those_of_one_worker(worker, make_worker, base, adapters, tmp_path, quantization, parity):
    fields = {"base_quantization": quantization, "parity": parity}
    alone = requests_for(base, adapters, tmp_path / "alone", **fields)
    for outcome in worker.run_unit("unit", alone).jobs:
        assert worker.publish(outcome.job_id).release.created

    workers = [make_worker() for _ in range(3)]
    together = requests_for(base, adapters, tmp_path / "together", **fields)
    opened, finished = merge_together(workers, together, finisher=workers[1])
    assert len(opened.pieces) > 3
    for outcome in finished.jobs:
        assert outcome.failure is None
        assert workers[1].publish(outcome.job_id).release.created
        for each in workers:
            each.discard(outcome.job_id)

    assert files_below(tmp_path / "together") == files_below(tmp_path / "alone")
    assert all(each.name in adapters for each in (tmp_path / "together").iterdir())  # nothing hidden is left


def test_what_several_leave_until_it_is_approved_is_not_merged_again(make_worker, base, adapters, tmp_path):
    workers = [make_worker() for _ in range(3)]
    requests = requests_for(base, adapters, tmp_path / "releases", parity={"level": "arithmetic"})
    merge_together(workers, requests, finisher=workers[1])
    for request in requests:
        for each in (workers[1], workers[0], workers[2]):
            each.leave(request.id)
            each.discard(request.id)  # told again, as all are of jobs that have ended
    publisher = make_worker()
    outcome = publisher.run_unit("unit", requests)
    assert (outcome.usage.bytes_read, outcome.usage.bytes_written) == (0, 0)
    assert {publisher.publish(job.job_id, "ann").release.manifest.approved_by for job in outcome.jobs} == {"ann"}


@pytest.mark.parametrize("method", ["LOHA", "IA3", "LN_TUNING", "TRAINABLE_TOKENS", "VERA"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_peft_merges_is_merged_apart_too(worker, make_worker, base, tmp_path, method, quantization):
    adapters = {"one": make_method_adapter(base, tmp_path / "adapter", method)}
    fields = {"base_quantization": quantization}
    for outcome in worker.run_unit("unit", requests_for(base, adapters, tmp_path / "alone", **fields)).jobs:
        assert worker.publish(outcome.job_id).release.created
    workers = [make_worker() for _ in range(2)]
    together = requests_for(base, adapters, tmp_path / "together", **fields)
    opened, _ = merge_together(workers, together, finisher=workers[0])
    assert len(opened.pieces) > 1 or quantization == "nf4"
    assert workers[0].publish("one").release.created
    for each in workers:
        each.discard("one")
    assert files_below(tmp_path / "together") == files_below(tmp_path / "alone")


@pytest.mark.parametrize("kind", ["bnb", "tied"])
def test_other_bases_are_cut_too(worker, make_worker, base, tmp_path, kind):
    if kind == "bnb":
        other = build_bnb_4bit(base, tmp_path / "bnb", max_shard_size="50KB")
    else:
        other = build_qwen2(tmp_path / "qwen", max_shard_size="100KB")
    adapters = {"one": make_adapter(other, tmp_path / "one")}
    for outcome in worker.run_unit("unit", requests_for(other, adapters, tmp_path / "alone")).jobs:
        assert worker.publish(outcome.job_id).release.created
    workers = [make_worker() for _ in range(2)]
    opened, _ = merge_together(workers, requests_for(other, adapters, tmp_path / "together"), finisher=workers[1])
    assert len(opened.pieces) > 1
    assert workers[1].publish("one").release.created
    for each in workers:
        each.discard("one")
    assert files_below(tmp_path / "together") == files_below(tmp_path / "alone")


@pytest.mark.parametrize("where", [pytest.param("s3", marks=pytest.mark.s3), "hub"])
def test_machines_that_share_nothing_ship_one_release(
    request, worker, make_worker, base, adapters, tmp_path, monkeypatch, where
):
    chosen = {"all": adapters["all"]}
    for outcome in worker.run_unit("unit", requests_for(base, chosen, tmp_path / "alone")).jobs:
        assert worker.publish(outcome.job_id).release.created
    if where == "s3":
        destination = f"s3://{request.getfixturevalue('s3').bucket}/{tmp_path.name}"
    else:
        request.getfixturevalue("hub")
        destination = "hf://org/shared"
    (asked,) = requests_for(base, chosen, tmp_path / "unused")
    asked = MergeRequest.model_validate(asked.model_dump(mode="json") | {"destination": destination})
    # No worker but the first sees its directory.
    monkeypatch.setattr(OwnedDirectory, "join", classmethod(lambda *_: None))
    workers = [make_worker() for _ in range(2)]
    opened, finished = merge_together(workers, (asked,), finisher=workers[0])
    assert len(opened.pieces) > 1
    assert [outcome.failure for outcome in finished.jobs] == [None]
    assert workers[0].publish("all").release.created
    for each in workers:
        each.discard("all")
    pulled = tmp_path / "pulled"
    pull_release(asked.destination, pulled)
    assert files_below(pulled) == files_below(tmp_path / "alone" / "all")
    for number in range(2):
        assert left_in(tmp_path / f"scratch-{number}") == []


@pytest.mark.s3
def test_full_parity_needs_the_whole_checkpoint_in_one_place(make_worker, base, adapters, tmp_path, monkeypatch, s3):
    (asked,) = requests_for(base, {"all": adapters["all"]}, tmp_path / "unused", parity=FULL)
    asked = MergeRequest.model_validate(
        asked.model_dump(mode="json") | {"destination": f"s3://{s3.bucket}/{tmp_path.name}"}
    )
    opened = make_worker().open_pass("p", NAME, (asked,))
    monkeypatch.setattr(OwnedDirectory, "join", classmethod(lambda *_: None))
    answer = make_worker().merge_shards(work((asked,), opened.tickets), frozenset(opened.pieces[0].shards))
    assert isinstance(answer, Unreachable)
    assert "not to be seen from here" in answer.reason


def test_a_tensor_that_jobs_have_in_other_shards_is_in_one_piece(worker, make_worker, base, adapters, tmp_path):
    def requests(directory):
        one, two, _ = requests_for(base, adapters, directory)
        return one, two.model_copy(update={"max_shard_size": 150_000})

    for outcome in worker.run_unit("unit", requests(tmp_path / "alone")).jobs:
        assert worker.publish(outcome.job_id).release.created
    opened = make_worker().open_pass("p", NAME, requests(tmp_path / "releases"))
    names = [list(piece.shards) for piece in opened.pieces]
    assert len(opened.pieces) < len(list(base.glob("*.safetensors")))
    seen = {}
    for number, shards in enumerate(names):
        for job, shard in itertools.product(("all", "few"), shards):
            path = tmp_path / "alone" / job / shard
            if path.exists():
                for tensor in load_file(path):
                    assert seen.setdefault(tensor, number) == number


def test_a_job_that_fails_is_told_when_the_pass_is_opened(make_worker, base, adapters, tmp_path):
    broken = {**adapters, "gone": tmp_path / "gone"}
    opened = make_worker().open_pass("p", NAME, requests_for(base, broken, tmp_path / "releases"))
    (ended,) = opened.ended
    assert (ended.job_id, ended.failure.failure_class) == ("gone", FailureClass.NOT_FOUND)
    assert opened.tickets.keys() == adapters.keys()


def test_a_job_that_fails_in_a_piece_fails_alone(make_worker, base, adapters, tmp_path, monkeypatch):
    worker, helper = make_worker(), make_worker()
    requests = requests_for(base, adapters, tmp_path / "releases")
    opened = worker.open_pass("p", NAME, requests)
    really = DirectoryStaging.put

    def put(self, artifact, hashed_as=None):
        if ".few." in self.directory.name:
            (self.directory / artifact.path).write_bytes(b"x" * artifact.num_bytes)
        return really(self, artifact, hashed_as)

    monkeypatch.setattr(DirectoryStaging, "put", put)
    answer = helper.merge_shards(work(requests, opened.tickets), frozenset(opened.pieces[0].shards))
    (ended,) = answer.ended
    assert (ended.job_id, ended.failure.failure_class) == ("few", FailureClass.INTERNAL)
    assert answer.merged.keys() == {"all", "dora"}
    monkeypatch.undo()

    # Those that are left go on without it.
    left = tuple(request for request in requests if request.id != "few")
    merged = {name: [shards] for name, shards in answer.merged.items()}
    shards = frozenset(shard for piece in opened.pieces[1:] for shard in piece.shards)
    rest = worker.merge_shards(work(left, opened.tickets), shards)
    assert rest.merged.keys() == {"all", "dora"}
    finished = worker.finish_pass(
        work(left, opened.tickets), {name: (*merged[name], rest.merged[name]) for name in merged}
    )
    assert [outcome.failure for outcome in finished.jobs] == [None, None]
    assert worker.publish("all").release.created


def test_shards_that_nobody_merged_are_no_release(make_worker, base, adapters, tmp_path):
    worker = make_worker()
    requests = requests_for(base, {"all": adapters["all"]}, tmp_path / "releases")
    opened = worker.open_pass("p", NAME, requests)
    answer = worker.merge_shards(work(requests, opened.tickets), frozenset(opened.pieces[0].shards))
    finished = worker.finish_pass(work(requests, opened.tickets), {"all": (answer.merged["all"],)})
    (outcome,) = finished.jobs
    assert outcome.failure.failure_class is FailureClass.INTERNAL
    assert "were not checked" in outcome.failure.message
    assert not (tmp_path / "releases" / "all").exists()


@pytest.mark.parametrize("what", ["directory", "adapter"])
def test_a_worker_that_sees_other_files_takes_no_part(make_worker, base, adapters, tmp_path, what):
    worker, stranger = make_worker(), make_worker()
    requests = requests_for(base, {"all": adapters["all"]}, tmp_path / "releases")
    opened = worker.open_pass("p", NAME, requests)
    changed = {"directory": tmp_path / "elsewhere"} if what == "directory" else {"merge_key": "0" * 64}
    tickets = {"all": dataclasses.replace(opened.tickets["all"], **changed)}
    answer = stranger.merge_shards(work(requests, tickets), frozenset(opened.pieces[0].shards))
    assert isinstance(answer, Unreachable)
    assert ("elsewhere" if what == "directory" else "another one here") in answer.reason
    assert isinstance(stranger.finish_pass(work(requests, tickets), {"all": ()}), Unreachable)
    # It is as good as new.
    assert stranger.run_unit("unit", requests_for(base, {"few": adapters["few"]}, tmp_path / "releases")).jobs
    assert stranger.publish("few").release.created


def test_a_pass_that_is_given_up_leaves_nothing(make_worker, base, adapters, tmp_path):
    worker, helper = make_worker(), make_worker()
    requests = requests_for(base, adapters, tmp_path / "releases")
    opened = worker.open_pass("p", NAME, requests)
    helper.merge_shards(work(requests, opened.tickets), frozenset(opened.pieces[0].shards))
    for each in (helper, worker):
        for request in requests:
            each.discard(request.id)
    assert list((tmp_path / "releases").iterdir()) == []


def test_usage_is_told_once(make_worker, base, adapters, tmp_path):
    worker = make_worker()
    requests = requests_for(base, {"all": adapters["all"]}, tmp_path / "releases", base_quantization="none")
    opened = worker.open_pass("p", NAME, requests)
    usages = [opened.usage]
    merged = []
    for piece in opened.pieces:
        answer = worker.merge_shards(work(requests, opened.tickets), frozenset(piece.shards))
        usages.append(answer.usage)
        merged.append(answer.merged["all"])
    usages.append(worker.finish_pass(work(requests, opened.tickets), {"all": tuple(merged)}).usage)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert sum(usage.bytes_written for usage in usages) == pytest.approx(size, rel=0.1)
    assert all(usage.seconds[stage] >= 0 for usage in usages for stage in usage.seconds)
    assert worker.progress().bytes_done == opened.bytes_total
