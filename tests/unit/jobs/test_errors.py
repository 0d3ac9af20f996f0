"""The tree of errors: classes, places, and pickling across processes."""

import pickle

import pytest

from jobs import errors
from jobs.errors import FailureClass, InvalidValueError, MergefleetError
from jobs.request_files.problems import Problem, RequestFileError


def all_errors(root=MergefleetError):
    return [root, *(kind for child in root.__subclasses__() for kind in all_errors(child))]


def an_error(kind):
    if issubclass(kind, RequestFileError):
        return kind((Problem("batch.yaml", 3, "base", "a path", "'ftp://x'"),))
    if issubclass(kind, InvalidValueError):
        return kind("a path", "'ftp://x'")
    return kind("what was expected, what was found")


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_survives_pickling_with_its_message(kind):
    error = an_error(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.args == error.args


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_has_a_class_people_see(kind):
    assert isinstance(kind.failure_class, FailureClass)


def test_every_failure_class_belongs_to_an_error_or_is_what_the_ledger_decides():
    of_errors = {kind.failure_class for kind in all_errors()}
    assert set(FailureClass) - of_errors == {FailureClass.DEADLINE_PASSED}


def test_the_place_of_a_fault_survives_pickling():
    error = errors.TransientIOError("no answer").at("s3://bucket")
    assert pickle.loads(pickle.dumps(error)).place == "s3://bucket"
    assert errors.TransientIOError("no answer").place is None


def test_a_request_file_error_keeps_its_problems():
    again = pickle.loads(pickle.dumps(an_error(RequestFileError)))
    assert again.problems == (Problem("batch.yaml", 3, "base", "a path", "'ftp://x'"),)
    assert str(again) == "batch.yaml:3: base: expected a path, found 'ftp://x'"


def test_an_invalid_value_is_a_value_error_with_both_sides():
    error = InvalidValueError("a path", "'ftp://x'")
    assert isinstance(error, ValueError)
    assert isinstance(error, errors.BadInputError)
    assert str(error) == "expected a path, found 'ftp://x'"
