"""A shared pass that is opened over what a dead attempt has finished."""

from cluster.driving.sharing import SharedPass
from jobs.release import Artifact
from workers.merging.outcomes import MergedShards, PassOpened, Piece, ShardsOutcome, Usage
from workers.releases.sinks import Receipt

ONE, TWO = (
    MergedShards(
        receipts=(Receipt(artifact=Artifact(path=name, num_bytes=1, sha256="0" * 64), stored=None),),
        checks=(),
        wrong=(),
    )
    for name in ("one", "two")
)


def opened(*pieces, resumed):
    tickets = {"a": None, "b": None}
    return PassOpened(ended=(), tickets=tickets, pieces=pieces, bytes_total=4, usage=Usage(), resumed=resumed)


class Request:
    def __init__(self, job_id):
        self.id = job_id


def test_what_was_finished_is_part_of_what_was_merged_and_no_work_touches_it():
    shared = SharedPass("p")
    shared.open(opened(Piece(shards=("two",), num_bytes=1), resumed={"a": ONE}))
    requests = [Request("a"), Request("b")]
    work = shared.work("merge", requests)
    assert work.finished == {"a": frozenset({"one"})}
    shared.give("worker", 1)
    shared.take("worker", ShardsOutcome(merged={"a": TWO, "b": TWO}, ended=(), usage=Usage(), residents=()))
    assert shared.is_merged
    assert shared.merged(requests) == {"a": (ONE, TWO), "b": (TWO,)}


def test_a_pass_of_which_all_is_there_is_merged_when_it_is_open():
    shared = SharedPass("p")
    assert not shared.is_merged
    shared.open(opened(resumed={"a": ONE, "b": TWO}))
    assert shared.is_merged
