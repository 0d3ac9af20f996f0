"""What is told of an actor that died, out of what Ray says."""

import pytest

from cluster.ray_fleet.actors import death_of

KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: MergeWorker
\tactor_id: 9e4b7b0c68533386d06cba2c01000000
\tpid: 2418
\tname: merge-worker-0
\tnamespace: mergefleet-vm-1475-02e3e19f
\tip: 127.0.0.1
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was \
killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed \
unexpectedly due to SIGSEGV or another unexpected error."""


def test_its_process_and_how_that_ended_are_what_counts():
    assert death_of(KILLED) == (
        "its process 2418 died (SYSTEM_ERROR): Worker unexpectedly exits with a connection error code 2. End of file. "
        "Its log has what it said, dmesg of its machine whether the kernel killed it"
    )


@pytest.mark.parametrize("text", ["The actor is unavailable: network down.", "", "pid: 7"])
def test_what_says_nothing_of_the_kind_stays_as_it_is(text):
    assert death_of(text) == text
