"""Exit codes follow from the class of a failure, by one table."""

import pytest

from cluster.exit_codes import EXIT_CODES, of_command, of_jobs
from jobs.errors import FailureClass


def test_every_class_has_a_code():
    assert set(EXIT_CODES) == set(FailureClass)


@pytest.mark.parametrize(
    ("failures", "command", "jobs"),
    [
        ([], 0, 0),
        ([FailureClass.BAD_INPUT], 2, 1),
        ([FailureClass.AUTH, FailureClass.NOT_FOUND], 2, 1),
        ([FailureClass.BAD_INPUT, FailureClass.INTERNAL], 1, 1),
        ([FailureClass.WORKER_LOST], 1, 1),
        ([FailureClass.PARITY_FAILED, FailureClass.BAD_INPUT, FailureClass.INTERNAL], 3, 3),
    ],
)
def test_parity_goes_first_and_bad_input_only_when_it_is_all(failures, command, jobs):
    assert of_command(failures) == command
    assert of_jobs(failures) == jobs
