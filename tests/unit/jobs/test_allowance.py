"""The places that an operator lets requests name."""

import pickle

import pytest

from jobs.allowance import Allowance, Pattern
from jobs.errors import BadInputError, InvalidValueError
from jobs.locations import parse_location
from jobs.request_files.problems import RequestFileError
from jobs.request_files.reading import load_requests


@pytest.mark.parametrize(
    ("pattern", "covered", "not_covered"),
    [
        ("/models", ["/models", "/models/a/b", "/x/../models/a"], ["/models2/a", "/", "/models/../etc", "s3://models/a"]),
        ("/models/*", ["/models/a"], ["/models2", "/etc"]),
        ("/", ["/models", "/etc"], ["s3://bucket/a", "hf://org/a"]),
        ("s3://bucket", ["s3://bucket/a", "s3://bucket/a/b"], ["s3://bucket2/a", "/bucket/a"]),
        ("s3://bucket/team/n", ["s3://bucket/team/n", "s3://bucket/team/n/x"], ["s3://bucket/team/n-2", "s3://bucket/team"]),
        ("s3://bucket/team/*", ["s3://bucket/team/n"], ["s3://bucket/teams/n", "s3://bucket/n"]),
        ("hf://org/*", ["hf://org/a", "hf://org/b@v1"], ["hf://org-2/a", "hf://org", "hf://other/org"]),
        ("hf://org/a", ["hf://org/a", "hf://org/a@v1"], ["hf://org/a-2", "hf://org", "hf://org/A"]),
        ("hf://org/a@v1", ["hf://org/a@v1", "hf://org/a/x@v1"], ["hf://org/a", "hf://org/a@v2", "hf://org/a/x@v2"]),
        ("hf://org/*", ["hf://org/a/x@v1"], ["hf://org-2/a/x", "hf://other/org/a"]),
        ("hf://org/a", ["hf://org/a/x", "hf://org/a/x/y@v1"], ["hf://org/b/a", "hf://a/org/a"]),
        ("hf://org/a/*", ["hf://org/a", "hf://org/a/x"], ["hf://org/b", "hf://org/ab/x"]),
        ("hf://org/a/x", ["hf://org/a/x", "hf://org/a/x/y@v1"], ["hf://org/a", "hf://org/a/xy", "hf://org/a/y/x"]),
        ("hf://org/a/x/*", ["hf://org/a/x/y"], ["hf://org/a/y", "hf://org/a"]),
        ("hf://org/a/x@v1", ["hf://org/a/x@v1", "hf://org/a/x/y@v1"], ["hf://org/a/x", "hf://org/a@v1"]),
        ("hf://gpt2", ["hf://gpt2", "hf://gpt2@v1"], ["hf://gpt2/x", "hf://org/gpt2"]),
    ],
)  # fmt: skip
def test_a_pattern_covers_a_place_and_all_below(pattern, covered, not_covered):
    parsed = Pattern.parse(pattern)
    answers = {
        text: parsed.covers(parse_location(text), follow_links=follow_links)
        for text in (*covered, *not_covered)
        for follow_links in (False, True)
    }
    assert answers == dict.fromkeys(covered, True) | dict.fromkeys(not_covered, False)


@pytest.mark.parametrize(
    "text",
    ["", "*", "/*", "models", "./models", "/mod*els", "/models/*/x", "s3://*", "s3://bucket/a*", "s3://bucket/../x",
     "hf://*", "hf://org/na*", "hf://a/b/c*", "hf://a/b@v1/*", "hf://a//*", "hf://", "https://x/y", "S3://bucket"],
)  # fmt: skip
def test_what_is_no_pattern(text):
    with pytest.raises(InvalidValueError):
        Pattern.parse(text)


def allowance(sources=None, destinations=None):
    return Allowance(
        sources=None if sources is None else tuple(map(Pattern.parse, sources)),
        destinations=None if destinations is None else tuple(map(Pattern.parse, destinations)),
    )


def test_every_place_of_a_request_is_compared(make_request):
    combined = {
        "adapter": None,
        "adapters": [{"adapter": "/models/a"}, {"adapter": "s3://secret/b"}],
        "combination": {"type": "linear"},
    }
    request = make_request("a", base="/other/base", **combined)
    places = allowance(["/models", "hf://org/*"], ["/out"])
    assert [path for path, _, _ in places.refusals(request, follow_links=False)] == [
        ("base",),
        ("adapters", 1, "adapter"),
        ("destination",),
    ]
    with pytest.raises(BadInputError) as caught:
        pickle.loads(pickle.dumps(places)).check(request)
    told = str(caught.value).split("; ")
    assert told[1] == (
        "adapters.1.adapter: expected a source that this fleet reads: /models, hf://org/*, "
        "found 's3://secret/b', links followed"
    )
    assert list(allowance().refusals(request, follow_links=True)) == []
    assert [path for path, _, _ in allowance([], None).refusals(make_request("b"), follow_links=False)] == [
        ("base",),
        ("adapter",),
    ]


def test_links_lead_out_of_nothing_that_is_allowed(make_request, tmp_path):
    for name in ("allowed", "secret/base"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "other_name").symlink_to(tmp_path / "allowed")
    places = allowance([str(tmp_path / "allowed"), str(tmp_path / "other_name")], [str(tmp_path / "allowed")])

    inside = make_request("a", base=f"{tmp_path}/allowed/base", adapter=f"{tmp_path}/other_name/a",
                          destination=f"{tmp_path}/allowed/new/r")  # fmt: skip
    places.check(inside)
    through = make_request("b", base=f"{tmp_path}/allowed/link/base", adapter=f"{tmp_path}/allowed/../allowed/a",
                           destination=f"{tmp_path}/allowed/link/new")  # fmt: skip
    assert list(places.refusals(through, follow_links=False)) == []
    with pytest.raises(BadInputError, match=r"base: .*destination: expected a destination that this fleet writes to"):
        places.check(through)
    climbing = make_request("c", base=f"{tmp_path}/allowed/../secret/base", adapter=f"{tmp_path}/allowed/a",
                            destination=f"{tmp_path}/allowed/r")  # fmt: skip
    assert [path for path, _, _ in places.refusals(climbing, follow_links=False)] == [("base",)]


def test_a_request_file_is_refused_with_its_lines(tmp_path):
    (tmp_path / "batch.yaml").write_text(
        "requests:\n"
        "  - {base: /models/b, adapter: /models/a, destination: s3://out/a}\n"
        "  - base: s3://other/b\n"
        "    adapter: /models/a\n"
        "    destination: s3://out-2/b\n"
    )
    with pytest.raises(RequestFileError) as caught:
        load_requests(tmp_path / "batch.yaml", allowance(["/models"], ["s3://out"]))
    assert [(problem.line, problem.field, problem.expected) for problem in caught.value.problems] == [
        (3, "requests[1].base", "a source that this fleet reads: /models"),
        (5, "requests[1].destination", "a destination that this fleet writes to: s3://out"),
    ]
